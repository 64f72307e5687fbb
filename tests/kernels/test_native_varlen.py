"""torch's own flash-attn with packed keys and bounds, on the CPU: its two operations stand in under torch's schemas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnpass
from attnpass.kernels import flash_base
from attnpass.kernels.flash_ops import define
from attnpass.kernels.native_varlen import NativeVarlen
from attnpass.spec import MaskSpec
from tests.flex_cases import Attention, inputs
from tests.kernels import fakes
from tests.kernels.alone import BOTH_WAYS, FULL, PADDED, TO_THE_END, WINDOW, Alone, codes, held_to_float64
from tests.kernels.matrix import FEATURES, Problem, complaints, flash_operation, given, served

PROBLEMS = [
    *FEATURES,
    Problem(batch=3, kv_heads=2, queries=1, keys=40),
    Problem(batch=3, kv_heads=2, queries=1, keys=40, padding="holes"),
    Problem(queries=50, keys=30, right=0),
    Problem(queries=30, keys=50, padding="row", sink=True, kv_heads=2),
    Problem(layout="odd", kv_heads=2, right=0),
    Problem(layout="odd", padding="holes"),
]
SERVED = [problem for problem in PROBLEMS if served(problem, NativeVarlen())]


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    flash_base.trial.cache_clear()
    attnpass.reset()
    with fakes.flash_of_torch():
        yield
    flash_base.trial.cache_clear()
    attnpass.reset()


class OnCpu(NativeVarlen):
    """With a table that takes the CPU and float32; the rest is its own."""

    can = replace(NativeVarlen.can, devices=frozenset({"cpu"}), dtypes=frozenset({"float32"}))

    def available(self) -> None:
        return None


@pytest.mark.parametrize("problem", SERVED, ids=lambda problem: problem.name)
def test_the_operation_computes_what_it_says(problem: Problem) -> None:
    assert not complaints(flash_operation(NativeVarlen()), problem, "cpu", torch.float32)


@pytest.mark.parametrize("padded", [False, True])
def test_the_operation_is_what_torch_takes_it_for(padded: bool) -> None:
    x = given(Problem(queries=9, keys=20, kv_heads=2, width=16, sink=True), "cpu", torch.float32)
    packing = (torch.randperm(40), torch.tensor([0, 14, 29], dtype=torch.int32)) if padded else (None, None)
    bounds = (-1, -1) if padded else (3, 2)
    args = (x.q, x.k, x.v, None, x.sink, *packing, 0.3, *bounds, 0.0, 0.0, False)
    torch.library.opcheck(define(NativeVarlen.vendor), args)


def test_whole_graphs() -> None:
    module = Attention(FULL, TO_THE_END, WINDOW, BOTH_WAYS, PADDED)
    found = Alone(module, OnCpu())
    given = inputs(45, 16, queries=33, grad=True)
    assert not held_to_float64(module, given, found, grad=True, floors={torch.float32: 32.0})
    assert found.kernels == ["native_varlen"] * 5


CAUSAL = MaskSpec(causal=0)
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"mask": CAUSAL, "grad": True, "deterministic": True, "sink": True}, []),
    ({"mask": MaskSpec(key_padding=True), "grad": True}, []),
    ({"mask": MaskSpec(causal=0, window=(40, None))}, []),
    ({"mask": MaskSpec(window=(40, None)), "q": (2, 8, 300, 64)}, ["no_form"]),
    ({"mask": MaskSpec(dense=True)}, ["no_form"]),
    ({"softcap": 3.0}, ["softcap"]),
    ({"dropout": 0.1}, ["dropout"]),
    ({"dtype": "float32"}, ["dtype"]),
    ({"v": (2, 8, 256, 128)}, ["unlike_widths"]),
    ({"q": (2, 8, 256, 264), "k": (2, 8, 256, 264), "v": (2, 8, 256, 264)}, ["head_width"]),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=str)
def test_what_it_refuses(changes: dict[str, Any], expected: list[str]) -> None:
    assert codes(NativeVarlen(), **changes) == expected


def test_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def why() -> str:
        found = NativeVarlen().available()
        return "" if found is None else found.text

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why().startswith("needs an NVIDIA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    assert why().startswith("needs a GPU of compute capability 8.0 or above")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert why() == "this torch was built without flash-attn"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert why() == ""
    assert NativeVarlen().version() == torch.__version__
