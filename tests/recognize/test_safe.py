"""Calls of scaled_dot_product_attention taken apart by `run_decompositions`, with every kind of mask: fused again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnpass
from attnpass.spec import EmptyRow
from tests.zoo.case import keep, noise, qkv

BOOLEAN = keep(2, 1, 5, 7, empty=True)
ADDED = torch.zeros(2, 1, 5, 7).masked_fill(~BOOLEAN, -torch.inf)
MASKS: dict[str, tuple[Callable[[], Tensor | None], EmptyRow]] = {
    "none": (lambda: None, EmptyRow.IMPOSSIBLE),
    "boolean": (lambda: BOOLEAN, EmptyRow.ZERO),
    "added": (lambda: ADDED, EmptyRow.ZERO),
    "bias": (lambda: noise(2, 3, 5, 7, grad=False), EmptyRow.ZERO),
}


class Called(nn.Module):
    """One call; the mask is an input."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decomposed_call_is_fused_again(name: str, dtype: torch.dtype) -> None:
    mask, rows = MASKS[name][0](), MASKS[name][1]
    inputs: tuple[Tensor, ...] = tuple(x.detach() for x in qkv(dtype=dtype))
    if mask is not None:
        inputs = (*inputs, mask if mask.dtype is torch.bool else mask.to(dtype))
    program = torch.export.export(Called(), inputs).run_decompositions()
    after, report = attnpass.rewrite(program)
    (site,) = report.sites
    assert site.replaced
    assert site.spec.empty_rows == rows
    assert not any("softmax" in str(node.target) for node in after.graph.nodes)
    wanted = program.module()(*inputs)
    torch.testing.assert_close(after.module()(*inputs), wanted)


def test_an_empty_row_is_zero_and_keeps_its_gradients() -> None:
    q, k, v = qkv()
    bias = ADDED + noise(2, 1, 5, 7, seed=5, grad=False)
    program = torch.export.export(Called(), (q, k, v, bias)).run_decompositions()
    after, report = attnpass.rewrite(program)
    assert report.sites[0].replaced
    out, wanted = after.module()(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert not wanted[0, :, 0].any()
    torch.testing.assert_close(out, wanted)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.testing.assert_close(grads, torch.autograd.grad(wanted.square().sum(), (q, k, v)))
