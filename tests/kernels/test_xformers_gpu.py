"""xformers on a GPU, whichever of its operators it takes: everything it declares against float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import attnpass
from attnpass.kernels.xformers import Xformers
from attnpass.spec import MaskSpec
from tests.flex_cases import Attention, inputs
from tests.kernels.alone import BOTH_WAYS, FULL, TO_THE_END, WINDOW, Alone, codes, held_to_float64
from tests.kernels.matrix import Problem, complaints, flash_operation, given, problems, served

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]
FLOORS = {torch.bfloat16: 16.0, torch.float32: 64.0}
WIDTHS = ((32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (320, 320))


def fits(problem: Problem) -> bool:
    bounded = problem.left is not None or problem.right is not None
    return served(problem, Xformers()) and not (bounded and problem.queries > problem.keys)


SERVED = [problem for problem in problems(widths=WIDTHS) if fits(problem)]


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about its own imports
        missing = Xformers().available()
    if missing is not None:
        pytest.skip(missing.text)
    attnpass.reset()
    yield
    attnpass.reset()


def windowed(problem: Problem) -> bool:
    return problem.left is not None or problem.right not in (None, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("problem", SERVED, ids=lambda problem: problem.name)
def test_everything_it_declares(problem: Problem, dtype: torch.dtype) -> None:
    if windowed(problem) and dtype == torch.float32:
        pytest.skip("refused")
    if dtype == torch.float32 and max(problem.queries, problem.keys) > 500:
        pytest.skip("once is enough for long ones")
    assert not complaints(flash_operation(Xformers()), problem, "cuda", dtype)


def test_what_no_operator_takes_is_a_refusal() -> None:
    wide = (2, 8, 256, 320)
    assert codes(Xformers(), grad=True) == []
    window = MaskSpec(causal=0, window=(40, None))
    assert codes(Xformers(), q=wide, k=wide, v=wide, mask=window, grad=True) == ["unavailable"]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_whole_graphs(inner: str) -> None:
    module = Attention(FULL, TO_THE_END, WINDOW, BOTH_WAYS)
    found = Alone(module, Xformers(), inner=inner)
    tensors = inputs(300, 64, queries=203, dtype=torch.bfloat16, grad=True)
    tensors = tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in tensors)
    assert not held_to_float64(module, tensors, found, grad=True, floors=FLOORS)
    assert found.kernels == ["xformers"] * 4


def test_cuda_graphs() -> None:
    problem = Problem(sink=True, right=0, kv_heads=2, grad=False)
    x, operation = given(problem, "cuda", torch.bfloat16), flash_operation(Xformers())
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            operation(problem, x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = operation(problem, x)
        x.q.mul_(2)
        graph.replay()
        assert torch.equal(out, operation(problem, x)[0])
