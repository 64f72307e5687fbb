"""flash-attn-4 on the CPU: through functions that keep its contract, and its own compiler where it is installed."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import attnpass
from attnpass.kernels import flash4, late
from attnpass.kernels.flash4 import Flash4, FlashVarlen4
from attnpass.kernels.flash_base import FlashKernel
from attnpass.kernels.flash_ops import define
from attnpass.spec import BiasSpec, MaskSpec
from tests.flex_cases import CASES, Attention, Case, capped, grid, inputs, masked, scores, weighted
from tests.kernels import standins
from tests.kernels.alone import PADDED, codes
from tests.kernels.matrix import (
    FEATURES,
    INF,
    Problem,
    Through,
    complaints,
    flash_operation,
    given,
    held_to_float64,
    served,
)

# the log-sum-exp is float32, which eager code does not need
FLOORS = {torch.float32: 32.0}
KINDS: tuple[type[FlashKernel], ...] = (Flash4, FlashVarlen4)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    installed(monkeypatch)
    attnpass.reset()
    yield
    attnpass.reset()
    forget()


def forget() -> None:
    late.imported.cache_clear()
    flash4._unlike_release.cache_clear()


# -- a stand-in: flash_attn/cute/interface.py of 4.0.0b36 --------------------------------------------------------------


def said(
    scale: float | None,
    causal: bool,
    softcap: float | None,
    left: int | None,
    right: int | None,
    q: Tensor,
    most: tuple[Any, Any],
) -> standins.Said:
    """``_resolve_causal_local_window``: two sides of -1 are no window to it, one of them is a bound of -1."""
    assert all(size is None or type(size) is int for size in most), "a tensor is read on the host, or compiled in"
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    return standins.Said(
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        left=left,
        right=0 if causal else right,
        softcap=softcap or 0.0,
    )


def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    most = (max_seqlen_q, max_seqlen_k)
    numbers = said(softmax_scale, causal, softcap, window_size_left, window_size_right, q, most)
    out, lse = standins.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, numbers, -INF)
    return out, lse if return_lse else None, None, None, None


def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    assert softcap is not None  # None is a cap here
    most = (max_seqlen_q, max_seqlen_k)
    numbers = said(softmax_scale, causal, softcap, window_size_left, window_size_right, q, most)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    standins.backward(dout, q, k, v, out, lse, grads, cu_seqlens_q, cu_seqlens_k, numbers)
    return grads


def installed(patch: pytest.MonkeyPatch) -> ModuleType:
    # as it is installed alone: a package without a file of its own
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    modules = [ModuleType(name) for name in names]
    vars(modules[-1]).update(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    for module in modules:
        module.__path__ = []
        patch.setitem(sys.modules, module.__name__, module)
    forget()
    return modules[-1]


def on_cpu(kind: type[FlashKernel]) -> FlashKernel:
    """The kernel with a table that takes the CPU and float32 as well; the rest is its own."""
    can = replace(kind.can, devices=frozenset({"cpu"}), dtypes=kind.can.dtypes | {"float32"})

    def available(self: FlashKernel) -> None:
        return None

    return type(f"{kind.__name__}OnCpu", (kind,), {"can": can, "available": available})()


# -- the operation -----------------------------------------------------------------------------------------------------

SMALL = [
    *FEATURES,
    Problem(batch=3, kv_heads=2, queries=1, keys=40),
    Problem(batch=3, kv_heads=2, queries=1, keys=40, padding="holes"),
    Problem(queries=30, keys=50, kv_heads=1, left=9, right=0),
    Problem(queries=50, keys=30, right=0),
    Problem(queries=50, keys=30, left=60, right=40),
    Problem(queries=50, keys=30, right=0, sink=True),
    Problem(width=128, v_width=64, queries=30, keys=30),
    Problem(layout="odd", kv_heads=2, right=0),
    Problem(layout="odd", padding="holes"),
]
SERVED = [problem for problem in SMALL if served(problem, FlashVarlen4())]


@pytest.mark.parametrize("problem", SERVED, ids=lambda problem: problem.name)
def test_the_operation_computes_what_it_says(problem: Problem) -> None:
    assert not complaints(flash_operation(FlashVarlen4()), problem, "cpu", torch.float32)


@pytest.mark.parametrize("extra", [{"right": 0, "sink": True}, {"padding": "holes"}], ids=["sink", "padded"])
def test_the_operation_is_what_torch_takes_it_for(extra: Any) -> None:
    problem = Problem(queries=9, keys=20, kv_heads=2, width=16, **extra)
    x = given(problem, "cpu", torch.float32)
    order, ends = torch.randperm(2 * 20), torch.tensor([0, 14, 29], dtype=torch.int32)
    packing = (None, None) if x.seen is None else (order, ends)
    right = -1 if problem.right is None else problem.right
    torch.library.opcheck(define(Flash4.vendor), (x.q, x.k, x.v, None, x.sink, *packing, 0.3, -1, right, *REST))


REST = (0.0, 0.0, False)


def test_an_absent_bound_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = installed(monkeypatch), []

    def spy(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            seen.append((kwargs["causal"], kwargs["window_size_left"], kwargs["window_size_right"]))
            return function(*args, **kwargs)

        called.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return called

    vars(module).update(_flash_attn_fwd=spy(_flash_attn_fwd), _flash_attn_bwd=spy(_flash_attn_bwd))
    q = torch.randn(1, 1, 8, 8, requires_grad=True)
    for left, right, told in (
        (-1, -1, (False, None, None)),
        (-1, 0, (True, None, None)),
        (3, -1, (False, 3, None)),
        (-1, 3, (False, None, 3)),
        (3, 0, (False, 3, 0)),
    ):
        out = define(Flash4.vendor)(q, q, q, None, None, None, None, 0.3, left, right, *REST)[0]
        out.sum().backward()
        assert seen == [told, told]
        seen.clear()


def test_a_fixed_order_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = installed(monkeypatch), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["deterministic"])
        return _flash_attn_bwd(*args, **kwargs)

    vars(module).update(_flash_attn_bwd=spy)
    q = torch.randn(1, 1, 8, 8, requires_grad=True)
    for wanted in (True, False):
        rest = (0.0, 0.0, wanted)
        define(Flash4.vendor)(q, q, q, None, None, None, None, 0.3, -1, -1, *rest)[0].sum().backward()
    assert seen == [True, False]


# -- through the pass --------------------------------------------------------------------------------------------------


def capped_window(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(capped(scores(q, k)), (j <= i) & (j > i - 50)), v, q)


def upwards(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(-scores(q, k), j <= i), v, q)


MODELS = [
    *(case for case in CASES if case.name in ("cap_alone", "causal", "window", "sink")),
    Case("capped_window", capped_window),
    Case("upwards", upwards),
]


@pytest.mark.parametrize("queries", [None, 120], ids=["square", "fewer queries"])
def test_models_compute_the_same(queries: int | None) -> None:
    module = Attention(*MODELS)
    through = Through(module, on_cpu(Flash4))
    x = inputs(width=64, queries=queries, grad=True)
    assert not held_to_float64(module, x, through, grad=True, floors=FLOORS), through.reasons
    assert [site.kernel for site in through.sites] == ["flash_4"] * len(MODELS)
    assert len(through.calls(define(Flash4.vendor))) == len(MODELS)


@by_kind
def test_padded_keys_are_packed_or_refused(kind: type[FlashKernel]) -> None:
    module = Attention(PADDED)
    through = Through(module, on_cpu(kind))
    assert not held_to_float64(module, inputs(width=64, grad=True), through, grad=True, floors=FLOORS)
    assert [site.kernel for site in through.sites] == ["flash_varlen_4" if kind is FlashVarlen4 else None]


def test_it_is_compiled() -> None:
    module = Attention(MODELS[1], PADDED)
    through = Through(module, on_cpu(FlashVarlen4), inner="inductor")
    assert not held_to_float64(module, inputs(width=64, grad=True), through, grad=True, floors=FLOORS)
    assert [site.kernel for site in through.sites] == ["flash_varlen_4"] * 2


# -- available ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu(monkeypatch, (9, 0))


def has_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)


def missing(kernel: FlashKernel) -> str:
    found = kernel.available()
    assert found is not None
    assert found.code == "unavailable"
    return found.text


@by_kind
def test_it_is_there(kind: type[FlashKernel], hopper: None) -> None:
    assert kind().available() is None


@by_kind
def test_nothing_is_imported_without_a_gpu(kind: type[FlashKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flash4, "imported", None)
    assert "NVIDIA" in missing(kind())


@by_kind
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_other_gpus(kind: type[FlashKernel], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu(monkeypatch, capability)
    assert "compute capability" in missing(kind())


@pytest.mark.parametrize("absent", ["flash_attn", "flash_attn.cute", "flash_attn.cute.interface"])
def test_flash_attn_alone_is_another_package(absent: str, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        if name.startswith(absent):
            monkeypatch.setitem(sys.modules, name, None)
    assert "flash-attn-4 is not installed: pip install --pre flash-attn-4" in missing(Flash4())


def test_what_it_needs_is_named(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lacking:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name == "flash_attn.cute.interface":
                raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.delitem(sys.modules, "flash_attn.cute.interface")
    monkeypatch.setattr(sys, "meta_path", [Lacking(), *sys.meta_path])
    assert "needs cutlass" in missing(Flash4())


def test_another_interface_is_a_reason(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None: ...

    module = installed(monkeypatch)
    vars(module).update(_flash_attn_bwd=renamed)
    assert "_flash_attn_bwd without causal" in missing(Flash4())
    del vars(module)["_flash_attn_fwd"]
    forget()
    assert "_flash_attn_fwd without causal" in missing(Flash4())


def test_its_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(flash4, "version_of", lambda name: asked.append(name) or "4.0.0b36")
    assert Flash4().version() == "4.0.0b36"
    assert asked == ["flash-attn-4"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def sizes(width: int, v_width: int | None = None, kv_heads: int = 8) -> dict[str, Any]:
    k = (2, kv_heads, 256, width)
    groups = 8 // kv_heads
    return {"q": (2, 8, 256, width), "k": k, "v": (*k[:3], v_width or width), "groups": groups}


@by_kind
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, set()),
        ({"grad": True, "deterministic": True, "softcap": 30.0, "sink": True}, set()),
        ({"mask": MaskSpec(causal=0, window=(40, None))}, set()),
        ({"device": "cpu"}, {"device"}),
        ({"dtype": "float32"}, {"dtype"}),
        ({"dropout": 0.1}, {"dropout"}),
        ({"bias": (BiasSpec(shape=(1, 8, 1, 256), dtype="float32"),)}, {"no_form"}),
        ({"mask": MaskSpec(dense=True)}, {"no_form"}),
        ({"mask": MaskSpec(document=True)}, {"no_form"}),
        (sizes(60), {"head_width"}),
        (sizes(264), {"head_width"}),
        (sizes(256), set()),
        (sizes(192, 128) | {"grad": True}, set()),
        (sizes(96, 64) | {"grad": True}, set()),
        (sizes(64, 128), {"head_width"}),
        (sizes(128, 8), {"head_width"}),
        (sizes(192, 128, kv_heads=2), set()),
        (sizes(192, 128, kv_heads=2) | {"grad": True}, {"grad"}),
        (sizes(104), set()),
        (sizes(104) | {"grad": True}, {"kernel_bug"}),
        (sizes(112) | {"grad": True}, {"kernel_bug"}),
        (sizes(120) | {"grad": True}, set()),
    ],
)
def test_refusals(kind: type[FlashKernel], changes: dict[str, Any], found: set[str]) -> None:
    assert set(codes(kind(), **changes)) == found


def test_padded_keys_need_packing() -> None:
    assert codes(Flash4(), mask=MaskSpec(key_padding=True)) == ["no_form"]
    assert codes(FlashVarlen4(), mask=MaskSpec(key_padding=True)) == []


def test_blackwell_has_fewer_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu(monkeypatch, (10, 0))
    for width, v_width, found in (
        (128, 128, []),
        (192, 128, []),
        (256, 256, []),
        (192, 192, ["head_width"]),
        (160, 160, ["head_width"]),
        (256, 128, ["head_width"]),
    ):
        assert codes(Flash4(), **sizes(width, v_width)) == found


# -- its own compiler --------------------------------------------------------------------------------------------------

COMPILED = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from attnpass.kernels.flash4 import _backward, _forward, _unlike_release
from attnpass.kernels.flash_ops import Lengths, Plan, Saved

assert _unlike_release() is None, _unlike_release()
for left, right, softcap, packed in ((-1, 0, 0.0, False), (7, 3, 30.0, True)):
    plan = Plan(scale=0.1, left=left, right=right, softcap=softcap, dropout=0.0, deterministic=False)
    with FakeTensorMode():
        shape = (3 * 200,) if packed else (3, 200)
        q, k, v = (torch.empty(*shape, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        lengths = Lengths(queries=ends, keys=ends, most_queries=200, most_keys=200) if packed else None
        out, lse, rng = _forward(q, k, v, None, plan, lengths)
        assert out.shape == q.shape, out.shape
        assert lse.shape == ((4, 600) if packed else (3, 4, 200)), lse.shape
        saved = Saved(q=q, k=k, v=v, out=out, lse=lse, rng=lse, slopes=None)
        grads = _backward(torch.empty_like(out), saved, plan, lengths)
        assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
print("compiled")
"""


@pytest.mark.slow
def test_the_package_itself_takes_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles for a GPU that is not there; nothing runs."""
    monkeypatch.undo()
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        pytest.skip("flash-attn-4 is not installed")
    hopper = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=os.environ | hopper, capture_output=True, text=True, check=False)
    assert "compiled" in done.stdout, done.stderr[-2000:]
