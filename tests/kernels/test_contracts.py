"""Kernels for devices that are not at hand: held to the signatures of their vendors' wheels, and to eager code through
functions that do what those wheels document (fakes.py).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnpass
from attnpass.kernels import Kernel, flash_base, late
from attnpass.kernels import aiter as aiter_module
from attnpass.kernels.aiter import Aiter
from attnpass.kernels.flash_ops import define
from attnpass.kernels.npu import NativeNpu
from attnpass.kernels.xla import NativeXla, operation
from attnpass.spec import BiasSpec, MaskSpec
from tests.flex_cases import Attention, Case, inputs
from tests.kernels import contracts, fakes
from tests.kernels.alone import (
    BIASED,
    DENSE,
    FROM_THE_START,
    FULL,
    PADDED,
    PADDED_AND_CAUSAL,
    TO_THE_END,
    Alone,
    codes,
    held_to_float64,
)
from tests.kernels.matrix import FEATURES, Problem, complaints, flash_operation, given, served

FLOORS = {torch.float32: 32.0}
CAUSAL, DENSELY = MaskSpec(causal=0), MaskSpec(dense=True)


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fakes.aiter(monkeypatch)
    fakes.xla(monkeypatch)
    flash_base.trial.cache_clear()
    attnpass.reset()
    with fakes.npu(monkeypatch, contracts.load("torch_npu")["schemas"]["npu_fusion_attention"]):
        late.imported.cache_clear()
        yield
    late.imported.cache_clear()
    flash_base.trial.cache_clear()
    attnpass.reset()


def on_cpu(kind: type[Kernel]) -> Kernel:
    """The kernel with a table that takes the CPU and float32 as well; the rest is its own."""
    can = replace(kind.can, devices=frozenset({"cpu"}), dtypes=kind.can.dtypes | {"float32"})
    return type(f"{kind.__name__}OnCpu", (kind,), {"can": can, "available": lambda self: None})()  # type: ignore[no-any-return]


def why(kernel: Kernel) -> str:
    found = kernel.available()
    assert found is None or found.code == "unavailable"
    return "" if found is None else found.text


# -- signatures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["amd_aiter", "torch_xla", "xformers"])
def test_the_stand_ins_have_the_signatures_of_the_wheels(package: str) -> None:
    known = contracts.load(package)["functions"]
    assert contracts.parameters(inspect.getsource(fakes), list(known)) == known


def test_the_operation_of_the_npu_is_that_of_the_wheel() -> None:
    schema = torch.ops.npu.npu_fusion_attention.default._schema
    known = torch._C.parse_schema("npu::" + contracts.load("torch_npu")["schemas"]["npu_fusion_attention"])
    assert str(schema) == str(known)


@pytest.mark.parametrize("kind", [Aiter, NativeNpu, NativeXla], ids=lambda kind: kind.name)
def test_they_say_that_they_never_ran_and_are_not_taken_unasked(kind: type[Kernel]) -> None:
    assert kind.verified == "contract"
    assert kind.only_by_name


# -- aiter -------------------------------------------------------------------------------------------------------------

PROBLEMS = [
    *FEATURES,
    Problem(batch=3, kv_heads=2, queries=1, keys=40, right=0),
    Problem(queries=30, keys=50, kv_heads=1, right=0),
    Problem(width=48, v_width=80, kv_heads=2),
    Problem(layout="odd", kv_heads=2, right=0),
]


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if served(p, Aiter())], ids=lambda problem: problem.name)
def test_aiter_computes_what_it_says(problem: Problem) -> None:
    assert not complaints(flash_operation(Aiter()), problem, "cpu", torch.float32)


def test_the_operation_around_aiter_is_what_torch_takes_it_for() -> None:
    x = given(Problem(queries=9, keys=20, kv_heads=2, width=16), "cpu", torch.float32)
    args = (x.q, x.k, x.v, torch.ones(4), None, None, None, 0.3, -1, 0, 0.0, 0.0, False)
    torch.library.opcheck(define(Aiter.vendor), args)


def test_whole_graphs_with_aiter() -> None:
    module = Attention(FULL, TO_THE_END, PADDED)
    found = Alone(module, on_cpu(Aiter))
    assert not held_to_float64(module, inputs(45, 16, queries=33, grad=True), found, grad=True, floors=FLOORS)
    assert found.kernels == ["aiter", "aiter", None]


SHORT, LONG = (2, 8, 100, 64), (2, 8, 300, 64)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mask": CAUSAL, "grad": True, "deterministic": True}, []),
        ({"mask": CAUSAL, "q": SHORT}, []),
        ({"mask": CAUSAL, "q": LONG}, ["no_form"]),
        ({"mask": MaskSpec(causal=0, window=(40, None))}, []),
        ({"mask": MaskSpec(window=(0, None))}, ["kernel_bug"]),
        ({"mask": MaskSpec(window=(40, None)), "q": SHORT}, ["kernel_bug"]),
        ({"mask": CAUSAL, "bias": (BiasSpec(shape=(1, 8, 1, 256), dtype="float32"),)}, []),
        ({"mask": MaskSpec(key_padding=True)}, ["no_form"]),
        ({"sink": True}, ["sink"]),
        ({"softcap": 3.0}, ["softcap"]),
        ({"dropout": 0.1}, ["dropout"]),
        ({"dtype": "float32"}, ["dtype"]),
        ({"v": (2, 8, 256, 128)}, []),
    ],
    ids=str,
)
def test_what_aiter_refuses(changes: dict[str, Any], expected: list[str]) -> None:
    assert codes(Aiter(), **changes) == expected


def test_a_window_of_a_single_key_is_what_the_stand_in_takes_for_none() -> None:
    """Otherwise its refusal would be about nothing."""
    assert complaints(flash_operation(Aiter()), Problem(left=0, right=0), "cpu", torch.float32)


def amd(patch: pytest.MonkeyPatch, name: str) -> None:
    patch.setattr(torch.version, "hip", "6.4")
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_properties", lambda at: types.SimpleNamespace(gcnArchName=name))


def test_where_aiter_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why(Aiter()) == "needs an AMD GPU and a torch built for ROCm"
    amd(monkeypatch, "gfx1100")
    assert why(Aiter()) == "needs one of gfx90a, gfx942, gfx950; this GPU is gfx1100"
    amd(monkeypatch, "gfx942:sramecc+:xnack-")
    assert why(Aiter()) == ""
    fakes.modules(monkeypatch, aiter=None)
    assert why(Aiter()) == "aiter is not installed: pip install amd-aiter"


def test_the_other_package_called_aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    amd(monkeypatch, "gfx942")
    fakes.modules(monkeypatch, aiter={"iter": iter, "anext": None})
    assert (
        why(Aiter()) == "the package aiter that is installed is not AMD's: pip uninstall aiter, pip install amd-aiter"
    )


def test_an_aiter_of_another_time(monkeypatch: pytest.MonkeyPatch) -> None:
    amd(monkeypatch, "gfx942")
    fakes.modules(monkeypatch, aiter__ops__mha={})
    assert why(Aiter()) == "this aiter has no _flash_attn_backward: it is of another time"


def test_a_window_of_three_numbers() -> None:
    def later(window_size: tuple[int, ...] = (-1, -1, 0)) -> None: ...

    assert aiter_module._further(later) == (0,)
    assert aiter_module._further(fakes.flash_attn_func) == ()


# -- torch_npu ---------------------------------------------------------------------------------------------------------

NPU_CASES = (FULL, FROM_THE_START, TO_THE_END, PADDED, PADDED_AND_CAUSAL, DENSE)


@pytest.mark.parametrize("case", NPU_CASES, ids=lambda case: case.name)
def test_the_npu_computes_the_same(case: Case) -> None:
    module = Attention(case)
    found = Alone(module, on_cpu(NativeNpu))
    assert not held_to_float64(module, inputs(45, 24, queries=33, v_width=16, grad=True), found, grad=True)
    assert found.kernels == ["native_npu"]
    assert "npu.npu_fusion_attention.default" in found.targets()


def test_a_mask_of_each_head() -> None:
    def by_head(q: Any, k: Any, v: Any, pad: Any, ids: Any, sinks: Any, dense: Any) -> Any:
        heads = torch.arange(q.shape[1]).view(1, -1, 1, 1)
        return DENSE.attention(q, k, v, pad, ids, sinks, dense[:1] | (heads == 2))

    module = Attention(Case("by_head", by_head))
    found = Alone(module, on_cpu(NativeNpu))
    assert not held_to_float64(module, inputs(45, 24), found, grad=False)
    assert found.kernels == ["native_npu"]


WIDE = (2, 8, 256, 776)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mask": DENSELY, "grad": True, "dropout": 0.1, "groups": 4}, []),
        ({"device": "cuda"}, ["device"]),
        ({"dtype": "float64"}, ["dtype"]),
        ({"bias": (BiasSpec(shape=(1, 8, 1, 1), dtype="bfloat16"),)}, ["no_form"]),
        ({"v": (2, 8, 256, 80)}, ["unlike_widths"]),
        ({"v": (2, 8, 256, 32)}, []),
        ({"q": WIDE, "k": WIDE}, ["head_width"]),
        ({"q": (2, 300, 256, 64)}, ["no_form"]),
        ({"softcap": 3.0}, ["softcap"]),
        ({"grad": True, "deterministic": True}, ["not_deterministic"]),
    ],
    ids=str,
)
def test_what_the_npu_refuses(changes: dict[str, Any], expected: list[str]) -> None:
    assert codes(NativeNpu(), **{"device": "npu"} | changes) == expected


def test_where_the_npu_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why(NativeNpu()) == ""
    fakes.modules(monkeypatch, torch_npu={"npu": types.SimpleNamespace(is_available=lambda: False)})
    assert why(NativeNpu()) == "there is no NPU"
    fakes.modules(monkeypatch, torch_npu=None)
    assert why(NativeNpu()) == "torch_npu is not installed: pip install torch-npu, which needs CANN"


# -- torch_xla ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FULL, FROM_THE_START, PADDED, PADDED_AND_CAUSAL, DENSE], ids=lambda case: case.name)
def test_the_tpu_computes_the_same(case: Case) -> None:
    module = Attention(case)
    found = Alone(module, on_cpu(NativeXla))
    assert not held_to_float64(module, inputs(128, 16, grad=True), found, grad=True, floors=FLOORS)
    assert found.kernels == ["native_xla"]
    assert "attnpass.native_xla.default" in found.targets()


@pytest.mark.parametrize("case", [FROM_THE_START, PADDED, BIASED, DENSE], ids=lambda case: case.name)
def test_blocks_that_are_filled_up(case: Case) -> None:
    module = Attention(case)
    found = Alone(module, on_cpu(NativeXla))
    assert not held_to_float64(module, inputs(600, 8, heads=2), found, grad=False, floors=FLOORS)
    assert found.kernels == ["native_xla"]


def test_without_a_mask_the_stand_in_sees_what_is_filled_up() -> None:
    """Otherwise its refusal would be about nothing."""
    q = torch.randn(1, 1, 600, 8)
    out = operation()(q, q, q, None, False, 0.3, False)[0]
    right = torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=0.3)
    assert (out - right).abs().max() > 1e-3


def test_the_operation_around_xla_is_what_torch_takes_it_for() -> None:
    q, k, v = (torch.randn(2, 3, 128, 16, requires_grad=True) for _ in "qkv")
    for ab in (None, torch.randn(2, 3, 128, 128)):
        torch.library.opcheck(operation(), (q, k, v, ab, ab is None, 0.3, True))
    torch.library.opcheck(operation(), (*(x.detach() for x in (q, k, v)), None, True, 0.3, False))


def lengths(size: int) -> dict[str, Any]:
    return dict.fromkeys("qkv", (2, 8, size, 64))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"grad": True}, []),
        ({"device": "cuda"}, ["device"]),
        ({"dtype": "float16"}, ["dtype"]),
        (lengths(600), ["kernel_bug"]),
        (lengths(600) | {"mask": CAUSAL}, []),
        (lengths(600) | {"mask": DENSELY}, []),
        (lengths(300), []),
        (lengths(300) | {"grad": True}, ["kernel_bug"]),
        (lengths(1536) | {"grad": True}, ["kernel_bug"]),
        (lengths(2048) | {"grad": True, "mask": CAUSAL}, []),
        ({"k": SHORT, "v": SHORT}, ["no_form"]),
        ({"v": (2, 8, 256, 32)}, ["unlike_widths"]),
        (dict.fromkeys("qkv", (2, 8, 256, 192)), ["head_width"]),
        ({"dropout": 0.1}, ["dropout"]),
        ({"bias": (BiasSpec(shape=(1, 8, 1, 1), dtype="float32", exact=False),)}, ["bias_precision"]),
        ({"bias": (BiasSpec(shape=(1, 8, 1, 1), dtype="bfloat16", grad=True),)}, ["bias_gradient"]),
    ],
    ids=str,
)
def test_what_the_tpu_refuses(changes: dict[str, Any], expected: list[str]) -> None:
    assert codes(NativeXla(), **{"device": "xla"} | changes) == expected


def test_where_the_tpu_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why(NativeXla()) == ""
    fakes.xla(monkeypatch, device="CPU")
    assert why(NativeXla()).startswith("needs a TPU")
    fakes.modules(monkeypatch, jax=None)
    assert why(NativeXla()).startswith("jax is not installed")
    fakes.modules(monkeypatch, torch_xla=None, torch_xla__runtime=None)
    assert why(NativeXla()) == "torch_xla is not installed: pip install 'torch_xla[tpu,pallas]'"
