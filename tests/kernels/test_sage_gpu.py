"""SageAttention on a GPU: every form of the release that is installed, within the error that it declares.

Its errors are those of few bits, so they are measured by L2 over all of a result, not element by element.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnpass.kernels.sage import (
    Sage,
    SageFp8Cuda,
    SageFp8CudaSm90,
    SageFp16Cuda,
    SageFp16Triton,
    SageKernel,
    SageVarlen,
)
from attnpass.kernels.sage_ops import FORMS, operation
from attnpass.spec import MaskSpec
from tests.flex_cases import Attention, inputs
from tests.kernels.alone import FROM_THE_START, FULL, PADDED, Alone, codes
from tests.kernels.matrix import Given, Problem, definition, given
from tests.zoo.numbers import run, truth

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]
KINDS: tuple[type[SageKernel], ...] = (Sage, SageVarlen, SageFp16Triton, SageFp16Cuda, SageFp8Cuda, SageFp8CudaSm90)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
SHAPES = ((1, 1), (7, 7), (64, 64), (128, 128), (200, 200), (1024, 1024), (1, 200), (64, 192), (300, 64), (1, 1024))


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def there(kind: type[SageKernel]) -> SageKernel:
    missing = kind().available()
    if missing is not None:
        pytest.skip(missing.text)
    return kind()


def accepted(kernel: SageKernel, problem: Problem, dtype: torch.dtype) -> None:
    """A test of what is refused beforehand tells nothing."""
    batch, width = problem.batch, problem.width
    k = (batch, problem.kv_heads, problem.keys, width)
    refused = codes(
        kernel,
        q=(batch, problem.heads, problem.queries, width),
        k=k,
        v=k,
        groups=problem.heads // problem.kv_heads,
        dtype=str(dtype).removeprefix("torch."),
        mask=MaskSpec(causal=0 if problem.right == 0 else None, key_padding=bool(problem.padding)),
    )
    if refused:
        pytest.skip(f"refused: {refused}")


def called(kernel: SageKernel, problem: Problem, x: Given) -> Tensor:
    form = kernel._form()
    order = ends = None
    if x.seen is not None:
        keep = x.seen.expand(problem.batch, 1, 1, problem.keys).flatten()
        order = keep.logical_not().to(torch.uint8).sort(stable=True).indices
        ends = torch.nn.functional.pad(keep.view(problem.batch, -1).sum(1).cumsum(0).to(torch.int32), (1, 0))
    out: Tensor = operation(form)(x.q, x.k, x.v, order, ends, form, problem.scale, problem.right == 0)
    return out


def error(mine: Tensor, true: Tensor) -> float:
    assert mine.isfinite().all()
    return float((mine.double() - true.double()).norm() / true.double().norm())


def held(kernel: SageKernel, problem: Problem, dtype: torch.dtype = torch.bfloat16) -> None:
    accepted(kernel, problem, dtype)
    x = given(problem, "cuda", dtype)
    before = [y.clone() for y in (x.q, x.k, x.v)]
    found = error(called(kernel, problem, x), definition(problem, x, torch.float64)[0])
    assert found <= FORMS[kernel._form()].error, f"relative error {found:.3g}"
    assert all(torch.equal(y, was) for y, was in zip((x.q, x.k, x.v), before, strict=True))


def problem(**changes: Any) -> Problem:
    width = changes.get("width", 64)
    return Problem(**({"grad": False, "scale": width**-0.5, "batch": 3, "kv_heads": 2} | changes))


# -- what is declared --------------------------------------------------------------------------------------------------


@by_kind
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("right", [None, 0], ids=["full", "causal"])
def test_lengths(kind: type[SageKernel], queries: int, keys: int, right: int | None) -> None:
    held(there(kind), problem(queries=queries, keys=keys, right=right))


@by_kind
@pytest.mark.parametrize("width", [8, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("right", [None, 0], ids=["full", "causal"])
def test_widths(kind: type[SageKernel], width: int, right: int | None) -> None:
    held(there(kind), problem(queries=192, keys=192, width=width, right=right))


@by_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["model", "plain", "odd"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_dtypes_layouts_and_groups(kind: type[SageKernel], dtype: torch.dtype, layout: str, kv_heads: int) -> None:
    held(there(kind), problem(layout=layout, kv_heads=kv_heads, width=128), dtype)


@by_kind
@pytest.mark.parametrize("padding", ["left", "right", "holes", "row"])
@pytest.mark.parametrize("queries", [1, 200])
def test_padded_keys(kind: type[SageKernel], padding: str, queries: int) -> None:
    held(there(kind), problem(padding=padding, queries=queries, keys=200))


# -- what the package does wrong ---------------------------------------------------------------------------------------


@by_kind
def test_memory_that_belongs_to_nobody_is_not_read(kind: type[SageKernel]) -> None:
    kernel = there(kind)
    for length in (1, 33, 129, 190, 320):
        # whatever is allocated next was NaN before, and so is what lies behind it
        torch.cuda.empty_cache()
        left = [torch.full((size,), float("nan"), device="cuda") for size in (128, 1024, 2**14, 2**18, 2**22)]
        del left
        shape = problem(queries=length, keys=length, right=0, batch=2, heads=1, kv_heads=1)
        if codes(kernel, mask=MaskSpec(causal=0)):
            pytest.skip("has no causal mask")
        held(kernel, shape)


@by_kind
def test_columns_of_zeros_stay_zeros(kind: type[SageKernel]) -> None:
    kernel, shape = there(kind), problem(queries=192, keys=192)
    x = given(shape, "cuda", torch.bfloat16)
    x.v[0, 1, :, 5] = 0.0
    x.v[1] = 0.0
    x.v[2, 0, :, 7] *= 1e-38
    out = called(kernel, shape, x)
    assert (out[0, 2:, :, 5] == 0).all()
    assert (out[1] == 0).all()
    assert error(out, definition(shape, x, torch.float64)[0]) <= FORMS[kernel._form()].error


@by_kind
def test_keys_with_a_common_part_lose_no_bits(kind: type[SageKernel]) -> None:
    # what the mean of the keys is subtracted for
    kernel, shape = there(kind), problem(queries=200, keys=192)
    x = given(shape, "cuda", torch.float16)
    x.k.add_(torch.randn(64, device="cuda").mul(8).half())
    assert error(called(kernel, shape, x), definition(shape, x, torch.float64)[0]) <= FORMS[kernel._form()].error


@by_kind
def test_it_waits_for_the_current_stream(kind: type[SageKernel]) -> None:
    kernel, shape = there(kind), problem(queries=1024, keys=1024)
    x = given(shape, "cuda", torch.bfloat16)
    expected = called(kernel, shape, x)
    late = [torch.zeros_like(y) for y in (x.q, x.k, x.v)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for y, true in zip(late, (x.q, x.k, x.v), strict=True):
            y.copy_(true)
        out = called(kernel, shape, Given(*late, slopes=None, sink=None, seen=None))
        result = out.clone()
        for y in late:
            y.fill_(float("nan"))
        assert torch.cuda.current_stream() == side
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(result, expected)


@by_kind
def test_cuda_graphs(kind: type[SageKernel]) -> None:
    kernel, shape = there(kind), problem(queries=192, keys=192, right=None if kind is SageVarlen else 0)
    x = given(shape, "cuda", torch.bfloat16)
    form = FORMS[kernel._form()]
    assert (torch.Tag.cudagraph_unsafe in operation(kernel._form()).tags) != form.captured  # type: ignore[attr-defined]
    if not form.captured:
        return
    called(kernel, shape, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = called(kernel, shape, x)
    x.q.mul_(2)
    graph.replay()
    assert torch.equal(out, called(kernel, shape, x))


# -- whole graphs ------------------------------------------------------------------------------------------------------


@by_kind
def test_whole_graphs(kind: type[SageKernel]) -> None:
    kernel = there(kind)
    module = Attention(FULL, PADDED) if kind is SageVarlen else Attention(FULL, FROM_THE_START)
    found = Alone(module, kernel, inner="inductor")
    tensors = tuple(x.cuda() for x in inputs(320, 64, dtype=torch.bfloat16))
    with torch.no_grad():
        mine = run(module, tensors, call=found, grad=False)
        true = truth(module, tensors, grad=False)
    for name in ("output 0", "output 1"):
        # the scale of these cases is twice and more what a model would have, and errors of scores grow with it
        assert error(mine.tensors[name], true.tensors[name]) <= 3 * FORMS[kernel._form()].error
    assert found.kernels == [kind.name] * 2
