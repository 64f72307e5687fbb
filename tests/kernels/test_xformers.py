"""xformers on the CPU, through functions that keep its contract (fakes.py): numbers, refusals, what is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnpass
from attnpass.kernels import flash_base, late
from attnpass.kernels.flash_ops import define
from attnpass.kernels.xformers import Xformers
from attnpass.spec import MaskSpec
from tests.flex_cases import Attention, inputs
from tests.kernels import fakes
from tests.kernels.alone import BOTH_WAYS, FULL, PADDED, TO_THE_END, WINDOW, Alone, codes, held_to_float64
from tests.kernels.matrix import FEATURES, Problem, complaints, flash_operation, given, served

CAUSAL, WINDOWED = MaskSpec(causal=0), MaskSpec(causal=0, window=(40, None))
PROBLEMS = [
    *FEATURES,
    Problem(batch=3, kv_heads=2, queries=1, keys=40),
    Problem(batch=3, kv_heads=1, queries=30, keys=50, right=0),
    Problem(queries=30, keys=50, left=9, right=0, sink=True),
    Problem(queries=30, keys=50, left=9, right=4, kv_heads=2),
    Problem(width=48, v_width=80, kv_heads=2),
    Problem(layout="plain", kv_heads=2),
    Problem(layout="odd", kv_heads=2, right=0),
]
SERVED = [problem for problem in PROBLEMS if served(problem, Xformers())]


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fakes.xformers(monkeypatch)
    forget()
    attnpass.reset()
    yield
    forget()
    attnpass.reset()


def forget() -> None:
    late.imported.cache_clear()
    flash_base.trial.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


class OnCpu(Xformers):
    """With a table that takes the CPU; the rest is its own."""

    can = replace(Xformers.can, devices=frozenset({"cpu"}))

    def available(self) -> None:
        return None


@pytest.mark.parametrize("problem", SERVED, ids=lambda problem: problem.name)
def test_the_operation_computes_what_it_says(problem: Problem) -> None:
    assert not complaints(flash_operation(Xformers()), problem, "cpu", torch.float32)


def test_the_operation_is_what_torch_takes_it_for() -> None:
    x = given(Problem(queries=9, keys=20, kv_heads=2, width=16, sink=True), "cpu", torch.float32)
    torch.library.opcheck(
        define(Xformers.vendor), (x.q, x.k, x.v, None, x.sink, None, None, 0.3, 3, 2, 0.0, 0.0, False)
    )


def test_whole_graphs() -> None:
    module = Attention(FULL, TO_THE_END)
    found = Alone(module, OnCpu())
    given = inputs(45, 16, queries=33, grad=True)
    assert not held_to_float64(module, given, found, grad=True, floors={torch.float32: 32.0})
    assert found.kernels == ["xformers"] * 2
    assert found.targets().count("attnpass.xformers.default") == 2


def test_windows_are_for_half_precision() -> None:
    module = Attention(WINDOW, BOTH_WAYS, PADDED)
    found = Alone(module, OnCpu())
    assert not held_to_float64(module, inputs(45, 16, dtype=torch.bfloat16), found, grad=False)
    assert found.kernels == ["xformers", "xformers", None]
    assert set(found.refusals) == {"no_form"}


# -- refusals ----------------------------------------------------------------------------------------------------------

SHORT, LONG = (2, 8, 100, 64), (2, 8, 300, 64)
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"mask": CAUSAL, "grad": True}, []),
    ({"mask": CAUSAL, "q": SHORT}, []),
    ({"mask": CAUSAL, "q": LONG}, ["no_form"]),
    ({"q": LONG}, []),
    ({"mask": CAUSAL, "q": (2, 8, "s0", 64)}, ["no_form"]),
    ({"mask": CAUSAL, "q": (2, 8, "s0", 64), "k": (2, 8, "s0", 64), "v": (2, 8, "s0", 64)}, []),
    ({"mask": WINDOWED}, []),
    ({"mask": WINDOWED, "dtype": "float32"}, ["no_form"]),
    ({"mask": CAUSAL, "dtype": "float32"}, []),
    ({"mask": MaskSpec(key_padding=True)}, ["no_form"]),
    ({"mask": MaskSpec(dense=True)}, ["no_form"]),
    ({"softcap": 3.0}, ["softcap"]),
    ({"sink": True}, []),
    ({"dropout": 0.1}, ["dropout"]),
    ({"dtype": "float64"}, ["dtype"]),
    ({"device": "cpu"}, ["device"]),
    ({"q": (2, 8, 256, 60), "k": (2, 8, 256, 60)}, ["head_width"]),
    ({"grad": True, "deterministic": True}, ["not_deterministic"]),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=str)
def test_what_it_refuses(changes: dict[str, Any], expected: list[str]) -> None:
    assert codes(Xformers(), **changes) == expected


def test_a_call_that_it_has_no_operator_for_is_a_refusal(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n ...")

    sample = flash_base._sample
    monkeypatch.setattr(flash_base, "_sample", lambda spec: replace(sample(spec), device="cpu"))
    assert codes(Xformers(), grad=True, mask=CAUSAL) == []
    forget()
    monkeypatch.setattr(sys.modules["xformers.ops"].fmha, "memory_efficient_attention_forward_requires_grad", none)
    assert codes(Xformers()) == ["unavailable"]


# -- what is there -----------------------------------------------------------------------------------------------------


def why() -> str:
    found = Xformers().available()
    assert found is None or found.code == "unavailable"
    return "" if found is None else found.text


def test_it_is_there(hopper: None) -> None:
    assert why() == ""


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why().startswith("needs an NVIDIA GPU")


def test_it_is_absent(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.modules(monkeypatch, xformers=None, xformers__ops=None)
    assert why() == "xformers is not installed: pip install xformers"


def test_a_build_whose_cuda_part_was_not_loaded(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
    wrapped, invalid = OSError("Could not load this library: .../_C.so"), Exception("xFormers can't load")
    wrapped.__cause__, invalid.__cause__ = said, wrapped
    fakes.xformers(monkeypatch, _built_with_cuda=False, _cpp_library_load_exception=invalid)
    assert "libcudart.so.12: cannot open" in why()
    assert "pip install nvidia-cuda-runtime-cu12, and preload libcudart.so.12" in why()


def test_a_build_without_cuda(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.xformers(monkeypatch, _built_with_cuda=False)
    assert why() == "the CUDA part of xformers was not loaded: it was built without CUDA"


def imported_from(patch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """A package whose `ops` runs this text when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("xformers", "flash_attn")]:
        patch.delitem(sys.modules, name)
    for path, inside in (("xformers/__init__.py", ""), ("xformers/ops.py", text), ("flash_attn/cute.py", "")):
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(inside)
    patch.syspath_prepend(str(folder))
    forget()


def test_flash_attn_4_alone_ends_its_import(hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imported_from(monkeypatch, tmp_path, "import flash_attn, flash_attn.flash_attn_interface")
    assert "it needs flash_attn.flash_attn_interface" in why()
    assert "install flash-attn 2 as well, or neither" in why()


def test_a_flash_attn_that_it_does_not_know_ends_its_import(
    hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "raise ImportError('Requires Flash-Attention version >=2.7.1,<=2.8.4 but got 2.9.0.')"
    imported_from(monkeypatch, tmp_path, text)
    assert (
        why()
        == "xformers cannot be imported: ImportError: Requires Flash-Attention version >=2.7.1,<=2.8.4 but got 2.9.0."
    )


def test_a_version_without_what_is_called(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["xformers.ops"].fmha, "memory_efficient_attention_backward")
    assert "has no memory_efficient_attention_backward" in why()
