"""FlexAttention compiled for CUDA: every case over several blocks and batches, forward and backward."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from tests.flex_cases import BY_NAME, CASES, Attention, Case, inputs
from tests.test_flex import Flexed
from tests.zoo.numbers import complaints, run, truth

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]
# the gradient of a sink is a sum over all queries, which a kernel adds up in another order than eager code
FLOORS = {torch.float32: 32.0}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
LENGTHS = pytest.mark.parametrize("length", [600, 1024])  # with a short block at the end, and without


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> None:
    """Nothing compiled before is reused."""


def on_cuda(length: int, dtype: torch.dtype, *, grad: bool) -> tuple[Tensor, ...]:
    return tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in inputs(length, 64, dtype=dtype, grad=grad))


@LENGTHS
@DTYPES
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_computes_the_same(case: Case, dtype: torch.dtype, length: int, grad: bool) -> None:
    if grad and not case.grad:
        pytest.skip("its gradient is no number")
    module, given = Attention(case), on_cuda(length, dtype, grad=grad)
    found = Flexed(module, inner="inductor")
    with contextlib.nullcontext() if grad else torch.no_grad():
        mine = run(module, given, call=found, grad=grad)
        assert not complaints(mine, run(module, given, grad=grad), truth(module, given, grad=grad), floors=FLOORS)
    assert found.kernels == ["flex"]


@DTYPES
def test_a_mask_of_each_batch_row_reads_its_own_blocks(dtype: torch.dtype) -> None:
    """Lists of blocks of more than one batch row, for which torch's template reads a stride that must be true."""
    padded = BY_NAME["padded"]
    module = Attention(padded)
    q, k, v, _, *rest = on_cuda(2048, dtype, grad=False)
    q, k, v = (x.repeat(2, 1, 1, 1) for x in (q, k, v))
    pad = torch.arange(2048, device="cuda") < torch.tensor([[2048], [1500], [700], [130]], device="cuda")
    given = (q, k, v, pad, *rest)
    found = Flexed(module, inner="inductor")
    with torch.no_grad():
        mine = run(module, given, call=found, grad=False)
        assert not complaints(mine, run(module, given, grad=False), truth(module, given, grad=False))
    assert found.kernels == ["flex"]
