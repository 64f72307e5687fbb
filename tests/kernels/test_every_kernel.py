"""One matrix: every kernel, every feature of a spec, shapes odd and even, forward and backward, through the whole pass.

    declared by the kernel's table    computed within its tolerance of float64, or refused with a narrower reason
    not declared                      refused

A kernel that refused all it declares would pass the first line, so each feature that a table has must be *held* for a
plain shape, but for what ``NARROWER`` says. With ATTNPASS_MATRIX=FILE each outcome is appended to that file as a line
of JSON, of which ``python -m tests.kernels.outcomes`` makes the table in the documentation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attnpass.kernels import Kernel, kernels
from attnpass.kernels.base import Capabilities
from attnpass.kernels.flash3 import Flash3Hub
from attnpass.kernels.sage import SageKernel
from attnpass.kernels.sage_ops import FORMS
from tests.flex_cases import (
    SCALE,
    Attention,
    Case,
    cap_alone,
    chunks,
    documents,
    inputs,
    limits,
    prefix,
    repeated,
    sink,
    sink_and_padding,
    slopes_computed,
    table,
)
from tests.kernels.alone import MASKS, Alone
from tests.zoo.numbers import Run, complaints, run, truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # what flash-attn 4's compiler says of it
    pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning"),
]


@dataclass(frozen=True)
class Shape:
    queries: int
    keys: int
    width: int
    kv_heads: int
    dtype: torch.dtype = torch.bfloat16
    v_width: int | None = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        v_width = f"/{self.v_width}" if self.v_width else ""
        return f"{self.queries}x{self.keys} {self.width}{v_width} kv{self.kv_heads} {dtype}"


EVEN, ODD = Shape(256, 256, 64, 4), Shape(203, 333, 40, 2)
OTHERS = (
    Shape(333, 203, 128, 4, torch.float16),
    Shape(128, 192, 128, 1),
    Shape(1, 320, 64, 2),
    Shape(256, 256, 192, 4, v_width=128),
    Shape(130, 130, 64, 2, torch.float32),
)

Declares = Callable[[Capabilities, Shape], bool]


@dataclass(frozen=True)
class Feature:
    """One attention, and what a kernel's table has to say for it."""

    case: Case
    forms: Declares  # of kernels that are given what a mask means
    tensor: Declares = lambda can, shape: can.dense_mask  # of those that are given a tensor
    by_key: bool = False  # its data are those of keys, and each query has one of them

    @property
    def name(self) -> str:
        return self.case.name


def dropping(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    x = (q @ repeated(k, q).mT * SCALE).softmax(-1)
    return F.dropout(x, 0.25, training=True) @ repeated(v, q)


def square(shape: Shape) -> bool:
    return shape.queries == shape.keys


NEVER: Declares = lambda can, shape: False  # noqa: E731
CAUSAL: Declares = lambda can, shape: can.causal  # noqa: E731
DIAGONAL: Declares = lambda can, shape: can.causal if square(shape) else can.window or can.causal  # noqa: E731
BY_NAME = {case.name: case for case in MASKS}
FEATURES = (
    Feature(BY_NAME["full"], lambda can, shape: True, lambda can, shape: True),
    Feature(
        BY_NAME["causal_from_the_start"],
        # counted from the other end it is a diagonal of its own, as long as that is not behind the query
        lambda can, shape: can.causal if square(shape) else can.window and shape.queries > shape.keys,
        lambda can, shape: can.causal or can.dense_mask,
    ),
    Feature(
        BY_NAME["causal_to_the_end"], DIAGONAL, lambda can, shape: can.dense_mask or (can.causal and square(shape))
    ),
    Feature(BY_NAME["window"], lambda can, shape: can.window),
    Feature(BY_NAME["both_ways"], lambda can, shape: can.window),
    Feature(BY_NAME["padded"], lambda can, shape: can.key_padding),
    Feature(BY_NAME["padded_and_causal"], NEVER),
    Feature(BY_NAME["biased"], NEVER),
    Feature(BY_NAME["dense_mask"], NEVER),
    Feature(Case("soft_cap", cap_alone), lambda can, shape: can.softcap, lambda can, shape: can.softcap),
    Feature(Case("sink", sink), lambda can, shape: can.sink and can.window, lambda can, shape: can.sink),
    Feature(Case("sink_and_padding", sink_and_padding, empty=True), NEVER, lambda can, shape: can.sink),
    Feature(Case("alibi", slopes_computed), lambda can, shape: can.alibi),
    Feature(Case("bias_by_distance", table, grad=False), NEVER),
    # where the diagonal is further ahead than the prefix is long there is no prefix
    Feature(Case("prefix", prefix), lambda can, shape: shape.keys - shape.queries >= 40 and DIAGONAL(can, shape)),
    Feature(Case("chunks", chunks), NEVER),
    Feature(Case("documents", documents), NEVER, by_key=True),
    Feature(Case("limits", limits, empty=True), NEVER, by_key=True),
    Feature(Case("dropout", dropping), lambda can, shape: can.dropout, lambda can, shape: can.dropout),
)

# What is declared, and refused even for a plain shape: where a table cannot say it. By kernel and feature.
NARROWER = {
    ("native", "dropout"): {"kernel_bug", "no_fused_form"},  # torch takes cuDNN's on Hopper; not fused on the CPU
    ("native", "biased"): {"no_fused_form"},  # with a gradient on the CPU
    ("native_flash", "dropout"): {"dropout"},  # on the CPU
    ("native_cudnn", "dropout"): {"kernel_bug"},
    ("native_cudnn", "biased"): {"bias_gradient", "kernel_bug"},
    ("flash_3", "soft_cap"): {"unavailable"},  # a build without it
    ("flash_varlen_3", "soft_cap"): {"unavailable"},
    ("native_flash", ""): {"dense_mask"},  # on CUDA
    ("flex", ""): {"grad"} if DEVICE == "cpu" else set(),
}


def narrower(kernel: Kernel, feature: Feature) -> set[str]:
    # slopes are float32, so the sum of scores and biases is: kernels that add in q's dtype refuse
    wide = {"bias_precision"} if feature.name == "alibi" else set()
    return wide | NARROWER.get((kernel.name, feature.name), set()) | NARROWER.get((kernel.name, ""), set())


def declared(kernel: Kernel, feature: Feature, shape: Shape, *, grad: bool) -> bool:
    """The kernel's table has all that this needs."""
    can = kernel.can
    if kernel.takes == "functions":
        takes = can.dropout if feature.name == "dropout" else True
    else:
        takes = (feature.forms if kernel.takes == "forms" else feature.tensor)(can, shape)
    bias_grad = feature.name == "biased" and grad
    return (
        takes
        and str(shape.dtype).removeprefix("torch.") in can.dtypes
        and all(
            (can.max_width is None or width <= can.max_width) and width % can.width_multiple == 0
            for width in (shape.width, shape.v_width or shape.width)
        )
        and (can.unlike_widths or shape.v_width in (None, shape.width))
        and (can.groups or shape.kv_heads == 4)
        and (can.backward or not grad)
        and (can.bias_gradient or not bias_grad)
    )


def for_this_device() -> list[Kernel]:
    return [kernel for kernel in kernels() if DEVICE in kernel.can.devices]


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
@pytest.mark.parametrize("kernel", for_this_device(), ids=lambda kernel: kernel.name)
def test_declared_is_held_and_the_rest_refused(kernel: Kernel, feature: Feature) -> None:
    missing = kernel.available()
    if missing is not None:
        pytest.skip(missing.text)
    if isinstance(kernel, Flash3Hub):
        pytest.skip("it downloads its code: test_flash_gpu.py gives it a local copy")
    # FlexAttention is compiled for each form, which takes seconds; tests/test_flex*.py have its shapes
    shapes = (EVEN,) if kernel.takes == "functions" else (EVEN, ODD, *OTHERS)
    if feature.by_key:
        shapes = tuple(shape for shape in shapes if shape.queries <= shape.keys)
    wrong = [text for shape in shapes for grad in (False, True) for text in outcome(kernel, feature, shape, grad=grad)]
    assert not wrong, "\n".join(wrong)


def outcome(kernel: Kernel, feature: Feature, shape: Shape, *, grad: bool) -> list[str]:
    """What is wrong with one cell of the matrix."""
    if grad and (not feature.case.grad or shape.queries > shape.keys):
        return []  # eager's own gradients are NaN where queries stand before all keys
    torch._dynamo.reset()
    said = declared(kernel, feature, shape, grad=grad)
    given = tuple(
        x.detach().to(DEVICE).requires_grad_(x.requires_grad)
        for x in inputs(
            shape.keys,
            shape.width,
            queries=shape.queries,
            v_width=shape.v_width,
            kv_heads=shape.kv_heads,
            dtype=shape.dtype,
            grad=grad,
        )
    )
    module = Attention(feature.case)
    found = Alone(module, kernel, inner="inductor" if kernel.takes == "functions" else "eager")
    with torch.set_grad_enabled(grad):
        mine = run(module, given, call=found, grad=grad)
        (used,) = found.kernels
        held = used == kernel.name
        wrong = further(kernel, feature, module, given, mine, grad=grad) if held else []
    refused = sorted(set(found.refusals))
    if held and not said and shape.queries > 1:  # to a single query most masks are masks over keys
        wrong.append("computed, but not declared")
    elif not held and not refused:
        wrong.append("neither computed nor refused")
    elif not held and said and shape == EVEN and not narrower(kernel, feature) & set(refused):
        wrong.append(f"declared, but refused: {refused}")
    log(kernel, feature, shape, grad=grad, held=held, said=said, refused=refused, wrong=wrong)
    return [f"{shape.name}{' backward' if grad else ''}: {text}" for text in wrong]


def further(
    kernel: Kernel, feature: Feature, module: Attention, given: tuple[Tensor, ...], mine: Run, *, grad: bool
) -> list[str]:
    """Where it is further from float64 than the kernel declares."""
    if feature.name == "dropout":  # other numbers are dropped: tests of each family look at which
        return [] if all(x.isfinite().all() for x in mine.tensors.values() if x.is_floating_point()) else ["not finite"]
    true = truth(module, given, grad=grad)
    if isinstance(kernel, SageKernel):
        a, b = mine.tensors["output 0"].double(), true.tensors["output 0"].double()
        error = float((a - b).norm() / b.norm())
        # the scale of these cases is twice and more what a model would have, and errors of scores grow with it
        return [] if error <= 3 * FORMS[kernel._form()].error else [f"relative error {error:.3g}"]
    # products in float32 may be taken in TF32 by a fused kernel, and sums go another way
    floors = {torch.float32: 64.0, torch.bfloat16: 16.0, torch.float16: 16.0}
    return complaints(mine, run(module, given, grad=grad), true, floors=floors)


def log(kernel: Kernel, feature: Feature, shape: Shape, **found: object) -> None:
    path = os.environ.get("ATTNPASS_MATRIX")
    if path:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
        row = {"kernel": kernel.name, "version": kernel.version(), "torch": torch.__version__, "device": device}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "feature": feature.name, "shape": shape.name, **found}) + "\n")
