"""torch's own kernels by name, on a GPU: forward and backward against float64, with every kind of mask they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnpass.kernels import Kernel
from attnpass.kernels.native_named import NativeCudnn, NativeEfficient, NativeFlash, NativeMath
from tests.flex_cases import SCALE, Attention, Case, inputs
from tests.kernels.alone import (
    BIASED,
    DENSE,
    FROM_THE_START,
    FULL,
    PADDED,
    PADDED_AND_CAUSAL,
    TO_THE_END,
    Alone,
    held_to_float64,
)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]
# products in float32 may be taken in TF32 by a fused kernel, and sums go another way
FLOORS = {torch.float32: 64.0, torch.bfloat16: 16.0, torch.float16: 16.0}
KINDS = (NativeMath, NativeFlash, NativeEfficient, NativeCudnn)
MASKED = (NativeMath, NativeEfficient, NativeCudnn)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
# queries, keys, width, heads of k and v; rows of 150 padded keys are more than a block
SHAPES = [(200, 200, 64, 2), (1024, 1024, 128, 1), (97, 1024, 80, 4), (7, 7, 20, 2)]


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def available(kind: type[Kernel]) -> Kernel:
    kernel = kind()
    missing = kernel.available()
    if missing is not None:
        pytest.skip(missing.text)
    return kernel


def on_cuda(
    shape: tuple[int, int, int, int], *, dtype: torch.dtype, grad: bool, v_width: int | None = None
) -> tuple[Tensor, ...]:
    queries, length, width, kv_heads = shape
    given = inputs(length, width, queries=queries, kv_heads=kv_heads, v_width=v_width, dtype=dtype, grad=grad)
    return tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@by_kind
def test_masks_forward_and_backward(kind: type[Kernel], shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if dtype == torch.float16 and shape[0] > 200:
        pytest.skip("once is enough for long ones")
    cases: tuple[Case, ...] = (FULL, FROM_THE_START)
    if kind is NativeFlash and shape[0] != shape[1]:
        cases = (FULL,)
    elif kind is not NativeFlash:
        cases = (FULL, FROM_THE_START, TO_THE_END, PADDED_AND_CAUSAL)
    module = Attention(*cases)
    found = Alone(module, available(kind))
    assert not held_to_float64(module, on_cuda(shape, dtype=dtype, grad=True), found, grad=True, floors=FLOORS)
    assert found.kernels == [kind.name] * len(cases)


@pytest.mark.parametrize("kind", MASKED, ids=lambda kind: kind.name)
def test_biases_and_masks_without_structure(kind: type[Kernel]) -> None:
    module = Attention(BIASED, DENSE)
    found = Alone(module, available(kind))
    grad = kind is not NativeCudnn
    given = on_cuda((203, 333, 64, 2), dtype=torch.bfloat16, grad=grad)
    assert not held_to_float64(module, given, found, grad=grad, floors=FLOORS)
    assert found.kernels == [kind.name] * 2


@pytest.mark.parametrize("kind", [NativeMath, NativeEfficient], ids=lambda kind: kind.name)
def test_float32(kind: type[Kernel]) -> None:
    module = Attention(FULL, FROM_THE_START, BIASED, DENSE)
    found = Alone(module, available(kind))
    given = on_cuda((203, 333, 20, 2), dtype=torch.float32, grad=True)
    assert not held_to_float64(module, given, found, grad=True, floors=FLOORS)
    assert found.kernels == [kind.name] * 4


@by_kind
def test_unlike_widths(kind: type[Kernel]) -> None:
    module = Attention(FULL)
    found = Alone(module, available(kind))
    given = on_cuda((130, 200, 96, 4), v_width=64, dtype=torch.bfloat16, grad=True)
    assert not held_to_float64(module, given, found, grad=True, floors=FLOORS)
    assert found.kernels == [kind.name]


def test_latent_attention_with_cudnn() -> None:
    module = Attention(FULL, FROM_THE_START)
    found = Alone(module, available(NativeCudnn))
    given = on_cuda((256, 256, 192, 4), v_width=128, dtype=torch.bfloat16, grad=True)
    assert not held_to_float64(module, given, found, grad=True, floors=FLOORS)
    assert set(found.kernels) <= {"native_cudnn", None}  # refused by an older cuDNN or another GPU


class Transposed(nn.Module):
    """Heads side by side in memory, as projections leave them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        x = (q @ k.mT * -SCALE).softmax(-1)
        return (x @ v).transpose(1, 2).flatten(2)


@by_kind
def test_other_strides_and_a_negative_scale(kind: type[Kernel]) -> None:
    module = Transposed()
    found = Alone(module, available(kind))
    g = torch.Generator("cuda").manual_seed(0)
    given = tuple(
        torch.randn(2, n, 4, 64, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
        for n in (130, 200, 200)
    )
    assert not held_to_float64(module, given, found, grad=True, floors=FLOORS)
    assert found.kernels == [kind.name]


@by_kind
def test_inductor_and_cuda_graphs(kind: type[Kernel]) -> None:
    module = Attention(FULL, FROM_THE_START) if kind is NativeFlash else Attention(FULL, PADDED_AND_CAUSAL, DENSE)
    available(kind)
    given = on_cuda((203, 203, 64, 2), dtype=torch.bfloat16, grad=True)
    found = Alone(module, kind(), inner="inductor")
    assert not held_to_float64(module, given, found, grad=True, floors=FLOORS)
    assert set(found.kernels) == {kind.name}


@by_kind
def test_symbolic_lengths(kind: type[Kernel]) -> None:
    module = Attention(FULL, FROM_THE_START) if kind is NativeFlash else Attention(FULL, PADDED)
    found = Alone(module, available(kind), dynamic=None)
    for length in (45, 60, 203):
        given = on_cuda((length, length, 64, 2), dtype=torch.bfloat16, grad=False)
        assert not held_to_float64(module, given, found, grad=False, floors=FLOORS)
    # of two symbolic lengths nothing says that they are the same, which a diagonal of native_flash needs
    assert found.kernels == [kind.name] * 3 + [None if kind is NativeFlash else kind.name]


@pytest.mark.parametrize("kind", [NativeFlash, NativeEfficient], ids=lambda kind: kind.name)
def test_the_same_bits_where_they_are_asked_for(kind: type[Kernel]) -> None:
    module = Attention(FULL)
    given = on_cuda((1024, 1024, 64, 2), dtype=torch.bfloat16, grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        found = Alone(module, available(kind))
        (first,) = found(*given)
        grads = [torch.autograd.grad(found(*given)[0], given[:3], torch.ones_like(first)) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.kernels == [kind.name]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


class Dropping(nn.Module):
    """Dropout of the probabilities."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.25, self.training) @ v


@by_kind
def test_dropout(kind: type[Kernel]) -> None:
    kernel = available(kind)
    q = torch.zeros(4, 8, 512, 64, device="cuda", dtype=torch.bfloat16)
    v = torch.ones_like(q).requires_grad_()
    found = Alone(Dropping(), kernel)
    out = found(q, q, v)
    if found.kernels == [None]:
        assert found.refusals == ["kernel_bug"]
        pytest.skip("this cuDNN has no dropout")
    (grad,) = torch.autograd.grad(out, v, torch.ones_like(out))
    # each row keeps three quarters of 512 equal probabilities, times four thirds: one, give or take 0.0255
    for x in (out, grad):
        assert abs(x.float().mean().item() - 1) < 0.005
        assert 0.015 < x.float()[..., 0].std().item() < 0.04
