"""On a GPU, through torch.compile as a user calls it: autotune, CUDA graphs, symbolic caps, decoding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnpass
from attnpass import choose
from attnpass.autotune import ORIGINAL
from attnpass.capture.dynamo import backend
from attnpass.kernels import kernels
from attnpass.kernels.flash import Flash
from attnpass.kernels.flash3 import Flash3
from attnpass.kernels.flex import Flex
from attnpass.kernels.native import Native
from attnpass.recognize.existing import DEFINED
from tests.flex_cases import Attention, Case, causal, inputs
from tests.kernels.alone import PADDED
from tests.test_autotune import kept
from tests.test_symbolic_caps import CAPS, Capped
from tests.zoo.numbers import complaints, run, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning"),
    # torch's own first capture, made to start its pool of memory (2.11)
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]
FLOORS = {torch.float32: 64.0, torch.bfloat16: 16.0}


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def on_cuda(length: int = 300, *, grad: bool) -> tuple[Tensor, ...]:
    given = inputs(length, 64, dtype=torch.bfloat16, grad=grad)
    return tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in given)


def held(module: nn.Module, given: tuple[Tensor, ...], call: Any, *, grad: bool) -> list[str]:
    with torch.set_grad_enabled(grad):
        mine = run(module, given, call=call, grad=grad)
        return complaints(mine, run(module, given, grad=grad), truth(module, given, grad=grad), floors=FLOORS)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_autotune_takes_what_is_fastest_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    monkeypatch.setenv("ATTNPASS_CACHE", str(tmp_path))
    module = Attention(Case("causal", causal))
    monkeypatch.setattr(choose, "kernels", lambda: (Native(), Flex(), Flash3(), Flash()))
    given = on_cuda(2048, grad=grad)
    assert not held(module, given, torch.compile(module, backend=backend, options={"autotune": True}), grad=grad)
    (site,) = attnpass.report().sites
    times = kept(tmp_path)
    assert {verdict.kernel for verdict in site.verdicts if verdict.timed} == times.keys() - {ORIGINAL}
    assert {"native", "flex", ORIGINAL} <= times.keys()
    # where other processes use the GPU as well, even the original may have been that
    assert (site.kernel or ORIGINAL) == min(times, key=lambda name: times[name])


def in_graphs() -> list[str]:
    """Kernels whose calls CUDA graphs can hold."""
    names = ["native", "flex", "native_efficient", "native_varlen", "flash", "flash_varlen", "flash_3", "xformers"]
    return [*names, "flash_varlen_3", "flash_4", "flash_varlen_4"]


@pytest.mark.parametrize("name", in_graphs())
def test_reduce_overhead(name: str) -> None:
    """mode="reduce-overhead": nothing is skipped, and each replay sees the numbers that it is given."""
    (kernel,) = (kernel for kernel in kernels() if kernel.name == name)
    missing = kernel.available()
    if missing is not None:
        pytest.skip(missing.text)
    module = Attention(PADDED if kernel.can.key_padding or kernel.takes != "forms" else Case("causal", causal))
    call = torch.compile(module, backend="attnpass", mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    with attnpass.policy(kernel=name, strict_kernel=True):
        for turn in range(4):  # warmed up, recorded, replayed
            given = on_cuda(grad=True)
            with torch.no_grad():
                for x in given[:3]:
                    x.mul_(1 + turn)
            assert not held(module, given, call, grad=True)
    assert [site.kernel for site in attnpass.report().sites] == [name]
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CAPS)
def test_symbolic_caps(name: str, grad: bool) -> None:
    module = Capped(CAPS[name]).cuda()
    call = torch.compile(module, backend=backend, dynamic=True, options={"kernel": "flex", "strict_kernel": True})
    for length in (150, 300):
        g = torch.Generator().manual_seed(length)
        given = tuple(torch.randn(2, length, 128, generator=g).cuda().requires_grad_(grad) for _ in range(3))
        assert not held(module, given, call, grad=grad)
    assert isinstance(attnpass.report().sites[0].spec.softcap, str)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [2, 5])
def test_decoding_behind_a_long_static_cache(batch: int, attention: str) -> None:
    """Heads are shared, not copied, and one graph serves all steps."""
    from benchmarks.models import Model, decoder, tokens

    shape = Model("LlamaConfig", decoder(512, 512, 8, 2, use_cache=True), dict, cache=32768)
    torch.manual_seed(0)
    plain = shape.build(attention).cuda().bfloat16().eval()
    given = {"input_ids": tokens(batch, 1).cuda()}
    exact = copy.deepcopy(plain).double()
    caches = [shape.state(model, given) for model in (plain, plain, exact)]
    step = torch.compile(plain, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            theirs, mine, true = (
                model(**given, **cache).last_hidden_state.double()
                for model, cache in zip((plain, step, exact), caches, strict=True)
            )
            assert (mine - true).norm() <= 2 * (theirs - true).norm()
    sites = attnpass.report().sites
    assert {site.kernel for site in sites} == {"flex"}
    assert len(sites) == 4


class Called(nn.Module):
    """A window over padded keys, as the boolean mask of a call: queries on the padding have no key."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        near = (at[:, None] >= at) & (at[:, None] - at < 256)
        return F.scaled_dot_product_attention(q, k, v, near & pad[:, None, None, :], enable_gqa=True)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_a_boolean_mask_leaves_zeros_where_a_query_has_no_key(grad: bool) -> None:
    """As torch lays down, and as its other kernels answer; cuDNN's, which it takes here, does not."""
    module, given = Called(), on_cuda(4096, grad=grad)[:4]
    call = torch.compile(module, backend=backend, options={"verify": True})
    with torch.set_grad_enabled(grad):
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            plain, true = run(module, given, grad=grad), truth(module, given, grad=grad)
        assert not complaints(run(module, given, call=call, grad=grad), plain, true, floors=FLOORS)
    (site,) = attnpass.report().sites
    assert site.kernel == "flex"
    assert site.assumptions == (DEFINED,)
    assert site.trials
    for found in (plain, true):
        assert not found.tensors["output 0"][0, :, :37].any()


class HeadsInnermost(nn.Module):
    """As T5 calls it: torch's kernels do not read this mask, so it computes the call unfused."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(512, 512, 12))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = self.table.to(q.dtype).permute(2, 0, 1)[None] + pad
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.bfloat16).min])
def test_a_call_that_torch_computes_unfused_is_fused(low: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 12, 512, 64, dtype=torch.bfloat16, device="cuda").unbind(0)
    pad = torch.zeros(4, 1, 512, 512, dtype=torch.bfloat16, device="cuda")
    pad[1, ..., 400:] = low
    pad[2, :, 7] = low
    module = HeadsInnermost().cuda().requires_grad_(False)
    assert not held(module, (q, k, v, pad), torch.compile(module, backend=backend), grad=False)
    (site,) = attnpass.report().sites
    assert site.replaced
    out = torch.compile(module, backend=backend)(q, k, v, pad)
    assert not out[2, :, 7].any() if low == -torch.inf else out[2, :, 7].any()
