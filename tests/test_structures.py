"""What the audit says of the masks of real models: their true structure, and nothing over queries and keys is left.

The models are tiny ones of tests/models, with windows and chunks shorter than the text and padding on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import attnpass
from attnpass import functions
from attnpass.capture import frames
from attnpass.capture.dynamo import backend
from attnpass.kernels.flex import Flex
from attnpass.spec import EmptyRow, MaskSpec
from tests.models import torchvision_stub

if find_spec("torchvision") is not None:  # transformers imports it where it is there
    torchvision_stub.ensure()
pytest.importorskip("transformers")
# torch's own tracing of the autograd.Function in Bloom (2.13)
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

CAUSAL, NOTHING = MaskSpec(causal=0), MaskSpec()
WINDOW = MaskSpec(causal=0, window=(4, None))
CHUNK = MaskSpec(causal=0, chunk=5)


@dataclass(frozen=True)
class Model:
    """The masks of its sites without padding, each as often as it occurs."""

    masks: tuple[MaskSpec, ...]
    biased: int = 0  # how many of them have a bias besides
    sdpa: bool = True  # it can be asked to call scaled_dot_product_attention
    dynamic: bool = True


MODELS = {
    "llama": Model((CAUSAL, CAUSAL)),
    "mistral": Model((WINDOW, WINDOW)),
    "gemma2": Model((WINDOW, CAUSAL), sdpa=False),
    "gemma3_text": Model((WINDOW, CAUSAL)),
    "gpt_oss": Model((WINDOW, CAUSAL), sdpa=False),
    "qwen2": Model((CAUSAL, CAUSAL)),
    "qwen3": Model((CAUSAL, CAUSAL)),
    "gpt2": Model((CAUSAL, CAUSAL)),
    "bert": Model((NOTHING, NOTHING)),
    "t5": Model((NOTHING, NOTHING, CAUSAL, CAUSAL, NOTHING, NOTHING), biased=4),
    "bloom": Model((CAUSAL, CAUSAL), biased=2, sdpa=False),
    "mpt": Model((CAUSAL, CAUSAL), biased=2, sdpa=False),
    "falcon": Model((CAUSAL, CAUSAL)),
    "falcon_alibi": Model((CAUSAL, CAUSAL), biased=2),
    "deepseek_v3": Model((CAUSAL, CAUSAL)),
    "llama4_text": Model((CHUNK, CAUSAL)),
    # windows are parted by -100, which is no mask; torch itself takes minutes to trace it with symbolic sizes
    "swin": Model((NOTHING,) * 4, biased=4, sdpa=False, dynamic=False),
}
RUNS = [
    pytest.param(
        *(name, how, dynamic, padded),
        id="-".join((name, how, *["dynamic"] * dynamic, *["padded"] * padded)),
        marks=[pytest.mark.slow] * dynamic,  # not one by one, but there are many
    )
    for name, model in MODELS.items()
    for how in ("eager", *["sdpa"] * model.sdpa)
    for dynamic in (False, *[True] * model.dynamic)
    for padded in (False, *[True] * (name != "swin"))
]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    attnpass.reset()
    yield
    torch._dynamo.reset()


def with_padding(mask: MaskSpec) -> MaskSpec:
    if mask.chunk is not None:  # the chunks of transformers begin at each row's first token
        return replace(mask, chunk=None, document=True, key_padding=True)
    return replace(mask, key_padding=True)


def compiled(
    name: str, how: str, *, dynamic: bool, padded: bool, **options: Any
) -> tuple[list[GraphModule], attnpass.Report]:
    """The graphs that the inner backend is given, and the report."""
    from tests.models.transformers_cases import _build

    model, inputs = _build(name)
    model.set_attn_implementation(how)
    given: dict[str, Any] = {key: value for key, value in inputs.items() if padded or "attention_mask" not in key}
    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    run = torch.compile(model, backend=backend, dynamic=dynamic or None, options={"inner": inner, **options})
    with torch.no_grad():
        run(**given)
    return graphs, attnpass.report()


def lengths(report: attnpass.Report) -> set[int]:
    return {size for site in report.sites for size in (site.spec.queries, site.spec.keys) if isinstance(size, int)}


def over_queries_and_keys(graphs: list[GraphModule], sizes: set[int]) -> list[str]:
    values = [(node, node.meta.get("example_value")) for gm in graphs for node in gm.graph.nodes]
    return [
        str(node)
        for node, value in values
        if isinstance(value, Tensor) and value.dim() >= 2 and {int(n) for n in value.shape[-2:]} <= sizes
    ]


@pytest.mark.parametrize(("name", "how", "dynamic", "padded"), RUNS)
def test_the_audit_states_the_true_structure(name: str, how: str, dynamic: bool, padded: bool) -> None:
    model = MODELS[name]
    graphs, report = compiled(name, how, dynamic=dynamic, padded=padded)
    wanted = Counter(with_padding(mask) if padded else mask for mask in model.masks)
    assert Counter(site.spec.mask for site in report.sites) == wanted, str(report)
    assert sum(bool(site.spec.bias) for site in report.sites) == model.biased
    assert not report.notes
    assert not report.failures
    for site in report.sites:
        if not padded and not site.spec.bias:
            assert site.spec.empty_rows is EmptyRow.IMPOSSIBLE
    if set(wanted) <= {CAUSAL, NOTHING} and not model.biased and not dynamic:
        assert not over_queries_and_keys(graphs, lengths(report))


def as_functions() -> Iterator[tuple[str, str, bool]]:
    for name, model in MODELS.items():
        for padded in (False, True):
            if name != "swin":  # whose masks are buffers of data
                yield name, "eager", padded
            # a call is left alone where no mask is given, or one is added whose rows may be empty
            if model.sdpa and name != "t5" and (padded or name != "bert"):
                yield name, "sdpa", padded


@pytest.mark.parametrize(("name", "how", "padded"), list(as_functions()))
def test_no_tensor_over_queries_and_keys_is_left(
    name: str, how: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mask as a function, as it is written on CUDA, where heads as narrow as those of these models are fine."""
    refusals = Flex.refusals
    monkeypatch.setattr(
        Flex, "refusals", lambda self, spec: (r for r in refusals(self, spec) if r.code != "kernel_bug")
    )
    monkeypatch.setattr(Flex, "gives_lse", lambda self, spec: True)
    # of a few queries it is asked beforehand which have a key: a loop over the mask, once for all layers
    monkeypatch.setattr(functions, "_FEW_QUERIES", 0)
    process = frames.process
    monkeypatch.setattr(frames, "process", lambda *args, **named: process(*args, **{**named, "compiled": True}))
    graphs, report = compiled(name, how, dynamic=False, padded=padded, kernel="flex")
    assert {site.kernel for site in report.sites} == {"flex"}, str(report)
    assert not over_queries_and_keys(graphs, lengths(report))
