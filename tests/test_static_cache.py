"""Decoding behind a static cache, whose length is a tensor: one graph serves every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnpass
from attnpass.capture.dynamo import backend
from attnpass.ledger import Decision
from attnpass.spec import MaskSpec
from tests.models import torchvision_stub

torchvision_stub.ensure()
transformers = pytest.importorskip("transformers")

# transformers 5.24 calls it cache, and older ones know no other name
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
BATCH, FIRST, STEPS, ROOM = 2, 6, 4, 32
Step = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def decoder(implementation: str) -> nn.Module:
    from tests.models.transformers_cases import config_of

    torch.manual_seed(0)
    config = config_of("llama", use_cache=True)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval()


def decoded(model: nn.Module, step: Step, queries: int) -> list[Tensor]:
    """What each step says, `queries` tokens at a time behind the first few."""
    cache = transformers.StaticCache(model.config, max_cache_len=ROOM)
    ids = torch.randint(2, 99, (BATCH, FIRST + STEPS * queries), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids[:, :FIRST], past_key_values=cache)
        return [step(input_ids=part, past_key_values=cache).logits for part in ids[:, FIRST:].split(queries, 1)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("queries", "mask"), [(1, MaskSpec(key_padding=True)), (3, MaskSpec(limited=True))], ids=["one", "several"]
)
def test_one_graph_serves_every_step(implementation: str, dynamic: bool, queries: int, mask: MaskSpec) -> None:
    model, graphs = decoder(implementation), []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    step = torch.compile(model, backend=backend, options={"inner": inner}, dynamic=dynamic, fullgraph=True)
    expected = decoded(model, model, queries)
    for found, wanted in zip(decoded(model, step, queries), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    sites: list[Decision] = list(attnpass.report().sites)
    assert len(sites) == 2  # one for each layer
    assert {site.spec.mask for site in sites} == {mask}
    assert not any("checked at every call" in proof for site in sites for proof in site.proofs)
    if implementation == "eager":
        assert all(site.replaced for site in sites)


class Counted(nn.Module):
    """A layer that keeps its keys and values, and how many they are."""

    def __init__(self, length: Tensor) -> None:
        super().__init__()
        self.register_buffer("length", length)
        self.register_buffer("keys", torch.zeros(2, 4, ROOM, 16))
        self.register_buffer("values", torch.zeros(2, 4, ROOM, 16))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, first: bool) -> Tensor:
        """`first`: the length counts on before the mask is made, which then is of the new one."""
        new = q.shape[2]
        at = torch.arange(new) + self.length
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        if first:
            self.length.add_(new)
        seen = torch.arange(ROOM) <= (torch.arange(new) + self.length - (new if first else 0))[:, None]
        if not first:
            self.length.add_(new)
        scores = (q @ self.keys.mT / 4).masked_fill(~seen, float("-inf"))
        return scores.softmax(-1) @ self.values


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
def test_the_length_is_that_of_its_place_in_the_graph(first: bool, new: int, shape: tuple[int, ...]) -> None:
    plain, mine = (Counted(torch.zeros(shape, dtype=torch.int64)) for _ in range(2))
    fast = torch.compile(mine, backend=backend, options={"inner": "eager"}, fullgraph=True)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(STEPS):
            given = torch.randn(3, 2, 4, new, 16, generator=g).unbind()
            torch.testing.assert_close(fast(*given, first=first), plain(*given, first=first))
    (site,) = attnpass.report().sites
    assert site.replaced, site.reason
    assert not site.spec.mask.dense, site.proofs
    assert not any("checked at every call" in proof for proof in site.proofs)
