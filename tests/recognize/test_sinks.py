"""Attention sinks, however they are written: what the zoo's expectations do not show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnpass


def column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, sinks.view(1, -1, 1, 1).expand(*q.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def scale(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.softmax(-1) @ v * torch.special.expit(scores.logsumexp(-1, keepdim=True) - sinks.view(1, -1, 1, 1))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("attention", [column, scale])
def test_a_gradient_that_nothing_but_a_sink_asks_for(attention: Callable[..., Tensor], learned: bool) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = nn.Parameter(torch.randn(3), requires_grad=learned)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, self.sinks)

    (site,) = attnpass.audit(Module(), *torch.randn(3, 2, 3, 5, 8)).sites
    assert site.spec.sink
    assert site.spec.grad == learned
