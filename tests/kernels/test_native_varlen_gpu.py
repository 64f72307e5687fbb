"""torch's own flash-attn with packed keys and bounds, on a GPU: everything it declares against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnpass
from attnpass.kernels.native_varlen import NativeVarlen
from tests.flex_cases import Attention, inputs
from tests.kernels.alone import BOTH_WAYS, FULL, PADDED, TO_THE_END, WINDOW, Alone, held_to_float64
from tests.kernels.matrix import Problem, complaints, flash_operation, given, problems, served

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]
FLOORS = {torch.bfloat16: 16.0}
WIDTHS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256))
SERVED = [problem for problem in problems(widths=WIDTHS) if served(problem, NativeVarlen())]


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    missing = NativeVarlen().available()
    if missing is not None:
        pytest.skip(missing.text)
    attnpass.reset()
    yield
    attnpass.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", SERVED, ids=lambda problem: problem.name)
def test_everything_it_declares(problem: Problem, dtype: torch.dtype) -> None:
    assert not complaints(flash_operation(NativeVarlen()), problem, "cuda", dtype)


def test_the_same_bits_where_they_are_asked_for() -> None:
    problem = Problem(queries=1024, keys=1024, deterministic=True, kv_heads=2, right=0)
    x = given(problem, "cuda", torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        out, _ = flash_operation(NativeVarlen())(problem, x)
        runs = [torch.autograd.grad(out, x.leaves, torch.ones_like(out), retain_graph=True) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_whole_graphs(inner: str) -> None:
    module = Attention(FULL, TO_THE_END, WINDOW, BOTH_WAYS, PADDED)
    found = Alone(module, NativeVarlen(), inner=inner)
    tensors = inputs(300, 64, queries=203, dtype=torch.bfloat16, grad=True)
    tensors = tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in tensors)
    assert not held_to_float64(module, tensors, found, grad=True, floors=FLOORS)
    assert found.kernels == ["native_varlen"] * 5


def test_cuda_graphs() -> None:
    problem = Problem(padding="holes", sink=True, grad=False)
    x, operation = given(problem, "cuda", torch.bfloat16), flash_operation(NativeVarlen())
    assert x.seen is not None
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            operation(problem, x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = operation(problem, x)
        x.q.mul_(2)
        x.seen.logical_not_()  # how many keys are seen may change from one replay to the next
        graph.replay()
        assert torch.equal(out, operation(problem, x)[0])
