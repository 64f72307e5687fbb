"""flash-attn-4 on a GPU: everything it declares against float64.

Each form of a call is compiled when it is first met, which takes most of the time; with
FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 a second run takes none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import attnpass
from attnpass.kernels.flash4 import Flash4, FlashVarlen4
from tests.flex_cases import Attention, Case, capped, inputs, scores, weighted
from tests.kernels.alone import BOTH_WAYS, FULL, PADDED, TO_THE_END, WINDOW, Alone, held_to_float64
from tests.kernels.matrix import FEATURES, LENGTHS, Problem, complaints, flash_operation, given, served

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # what its compiler says of it
    pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning"),
]
KERNEL = FlashVarlen4()  # all of flash_4, and padded keys
FLOORS = {torch.bfloat16: 16.0}
WIDTHS = ((96, 96), (120, 120), (128, 128), (160, 160), (192, 192), (256, 256))
UNLIKE = ((96, 64), (128, 64), (192, 128), (256, 128))

PROBLEMS = (
    *(problem for problem in FEATURES if served(problem, KERNEL)),
    *(
        Problem(batch=3, kv_heads=2, queries=queries, keys=keys, **mask)
        for queries, keys in LENGTHS
        for mask in ({"right": 0}, {"padding": "holes"})
    ),
    *(Problem(queries=70, keys=90, width=width, kv_heads=1, right=0) for width, _ in WIDTHS),
    *(Problem(queries=70, keys=90, width=width, v_width=v_width) for width, v_width in UNLIKE if width != 128),
    Problem(queries=70, keys=90, width=128, v_width=64, grad=False),
    # without bounds it takes other blocks
    *(Problem(queries=170, keys=90, width=width) for width in (120, 128)),
    Problem(queries=70, keys=90, width=192, v_width=128, kv_heads=2, grad=False),
    *(Problem(queries=70, keys=90, width=width, right=0, grad=False) for width in (8, 40, 72, 104)),
    Problem(heads=6, kv_heads=2, queries=200, keys=200, right=0),
    # the first queries stand before all keys, and see none
    Problem(queries=150, keys=90, right=0),
    Problem(queries=150, keys=90, right=5, sink=True),
    Problem(queries=150, keys=90, left=20, right=3),
    Problem(queries=150, keys=90, left=100, right=120),
    Problem(layout="odd", right=0, kv_heads=2),
    Problem(layout="odd", padding="holes", kv_heads=2),
)


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    missing = KERNEL.available()
    if missing is not None:
        pytest.skip(missing.text)
    attnpass.reset()
    yield
    attnpass.reset()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_everything_it_declares(problem: Problem) -> None:
    assert not complaints(flash_operation(KERNEL), problem, "cuda", torch.bfloat16)


@pytest.mark.parametrize("problem", [Problem(right=0), Problem(padding="holes")], ids=lambda problem: problem.name)
def test_float16(problem: Problem) -> None:
    assert not complaints(flash_operation(KERNEL), problem, "cuda", torch.float16)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", [{"right": 0}, {"padding": "holes"}], ids=["causal", "padded"])
def test_the_same_bits_where_they_are_asked_for(kv_heads: int, mask: dict[str, object]) -> None:
    problem = replace(Problem(queries=1024, keys=1024, deterministic=True, kv_heads=kv_heads), **mask)
    assert not complaints(flash_operation(KERNEL), problem, "cuda", torch.bfloat16)
    x = given(problem, "cuda", torch.bfloat16)
    out, _ = flash_operation(KERNEL)(problem, x)
    runs = [torch.autograd.grad(out, x.leaves, torch.ones_like(out), retain_graph=True) for _ in range(4)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def cap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return weighted(capped(scores(q, k)), v, q)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_whole_graphs(grad: bool) -> None:
    module = Attention(FULL, TO_THE_END, WINDOW, BOTH_WAYS, PADDED, Case("cap", cap))
    found = Alone(module, KERNEL, inner="inductor")
    tensors = inputs(300, 64, queries=203, dtype=torch.bfloat16, grad=grad)
    tensors = tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in tensors)
    assert not held_to_float64(module, tensors, found, grad=grad, floors=FLOORS)
    assert found.kernels == ["flash_varlen_4"] * 6


def test_flash_4_by_itself() -> None:
    module = Attention(FULL, TO_THE_END)
    found = Alone(module, Flash4())
    tensors = tuple(x.cuda() for x in inputs(300, 64, dtype=torch.bfloat16))
    assert not held_to_float64(module, tensors, found, grad=False, floors=FLOORS)
    assert found.kernels == ["flash_4"] * 2


@pytest.mark.parametrize("problem", [Problem(right=0), Problem(padding="holes")], ids=lambda problem: problem.name)
def test_cuda_graphs(problem: Problem) -> None:
    problem = replace(problem, sink=True, grad=False)
    x, operation = given(problem, "cuda", torch.bfloat16), flash_operation(KERNEL)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            operation(problem, x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = operation(problem, x)
        x.q.mul_(2)
        if x.seen is not None:
            x.seen.logical_not_()  # how many keys are seen may change from one replay to the next
        graph.replay()
        assert torch.equal(out, operation(problem, x)[0])
