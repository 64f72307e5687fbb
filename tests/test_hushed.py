"""A whole sequence that a mask takes away by addition: the mean of all values, and the gradients that addition lets
through to queries and keys.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import attnpass
from attnpass.capture.dynamo import backend
from attnpass.recognize.ops import op_name
from tests.test_zoo_gpu import FLOORS, on_cuda
from tests.zoo.heads import repeat_kv
from tests.zoo.numbers import complaints, run, truth


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


class Encoder(nn.Module):
    """As BERT masks its padding."""

    def __init__(self, groups: int = 1, *, floored: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.groups, self.floored, self.causal = groups, floored, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        low = torch.finfo(torch.float32 if q.dtype is torch.float16 else q.dtype).min
        seen = pad[:, None, None, :]
        if self.causal:
            seen = seen & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = q @ repeat_kv(k, self.groups).mT * 0.2
        if q.dtype is torch.float16:
            scores = scores.float()
        scores = scores + torch.where(seen, 0.0, low)
        if self.floored:
            scores = torch.maximum(scores, torch.tensor(low, dtype=scores.dtype))
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ repeat_kv(v, self.groups)


def inputs(dtype: torch.dtype = torch.float32, *, kv_heads: int = 4, width: int = 16) -> tuple[Tensor, ...]:
    """The first sequence is all padding."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 40, width, generator=g).to(dtype)
    k, v = (torch.randn(3, kv_heads, 24, width, generator=g).to(dtype) for _ in range(2))
    pad = torch.arange(24) < torch.tensor([[0], [24], [9]])
    return *(x.requires_grad_() for x in (q, k, v)), pad


def held(module: nn.Module, given: tuple[Tensor, ...], floors: dict[torch.dtype, float] | None = None) -> set[str]:
    """The operations of the rewritten graph; its results and gradients are as near to float64 as the original's."""
    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    call = torch.compile(module, backend=backend, options={"inner": inner, "kernel": "native"})
    plain, exact = run(module, given, grad=True), truth(module, given, grad=True)
    for name in ("grad of input 0", "grad of input 1"):
        assert exact.tensors[name][0].abs().max() > 1e-3, "what is to be compared would be nothing"
    assert not complaints(run(module, given, call=call, grad=True), plain, exact, floors=floors)
    (site,) = attnpass.report().sites
    assert site.kernel == "native"
    (graph,) = graphs
    return {op_name(node) for node in graph.graph.nodes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_kernel_itself_answers_and_has_the_gradients(dtype: torch.dtype, groups: int) -> None:
    ops = held(Encoder(groups), inputs(dtype, kv_heads=4 // groups))
    assert not ops & {"mean", "matmul"}


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dtype", "floored"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_so_do_the_kernels_of_a_gpu(dtype: torch.dtype, groups: int, floored: bool) -> None:
    given = on_cuda(inputs(dtype, kv_heads=4 // groups, width=64))
    ops = held(Encoder(groups, floored=floored), given, FLOORS)
    assert not ops & {"mean", "matmul"}


def test_half_of_the_gradient() -> None:
    # which is what goes on from the greater one of two equal numbers
    ops = held(Encoder(floored=True), inputs())
    assert not ops & {"mean", "matmul"}


@pytest.mark.parametrize(
    ("causal", "dtype"), [(True, torch.float32), (False, torch.float16)], ids=["some of its queries", "float16"]
)
def test_where_that_cannot_be_it_is_put_in_afterwards(causal: bool, dtype: torch.dtype) -> None:
    ops = held(Encoder(causal=causal), inputs(dtype))
    assert ops >= {"mean", "matmul"}
