"""Numbers of a model that torch.compile makes symbolic: what guards have settled is that very number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnpass
from attnpass.capture.dynamo import backend


class Attention(nn.Module):
    def __init__(self, *, fused: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.fused, self.dropout, self.scaling = fused, dropout, 0.3

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, scale=self.scaling)
        return F.dropout((q @ k.mT * self.scaling).softmax(-1), self.dropout) @ v


def compiled(module: Attention) -> tuple[Tensor, Tensor]:
    """Eager code and the compiled module, all numbers dynamic, on the same random stream."""
    torch._dynamo.reset()
    attnpass.reset()
    inputs = (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8))
    fast = torch.compile(module, backend=backend, options={"inner": "eager"}, dynamic=True)
    torch.manual_seed(0)
    out = fast(*inputs)
    torch.manual_seed(0)
    return module(*inputs), out


def test_live_dropout_is_not_taken_for_none() -> None:
    # as an integer 0.25 would be 0, and the dropout would be gone
    expected, out = compiled(Attention(fused=False, dropout=0.25))
    torch.testing.assert_close(out, expected)
    (site,) = attnpass.report().sites
    assert site.spec.dropout == 0.25


def test_the_scale_of_a_call_is_its_scale() -> None:
    expected, out = compiled(Attention(fused=True))
    torch.testing.assert_close(out, expected)
    (site,) = attnpass.report().sites
    assert site.spec.scale == 0.3
