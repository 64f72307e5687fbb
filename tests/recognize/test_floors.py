"""Scores clamped at the lowest number: which part of a gradient reaches the scores of a row without any key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnpass
from attnpass.capture.dynamo import backend

MIN = torch.finfo(torch.float32).min
INF = torch.inf

FLOORS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "clamp": lambda s: s.clamp(min=MIN),
    "clamp_min": lambda s: s.clamp_min(MIN),
    "clamp of a tensor": lambda s: s.clamp(min=torch.tensor(MIN)),
    "in place": lambda s: s.clamp_(min=MIN),
    # where both are equal, each gets half of the gradient
    "max": lambda s: torch.max(s, torch.tensor(MIN)),
    "maximum": lambda s: torch.maximum(torch.tensor(MIN), s),
}
MASKED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "filled": lambda s, gone, low: s.masked_fill(gone, low),
    "added": lambda s, gone, low: s + torch.zeros(gone.shape).masked_fill(gone, low),
    "added for all heads": lambda s, gone, low: s + torch.where(gone[:, :1], low, 0.0),
}


@pytest.mark.parametrize("low", [-INF, MIN, -1e9])
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("floor", FLOORS)
def test_gradients_of_rows_without_a_key(floor: str, masked: str, low: float, fresh_dynamo: None) -> None:
    if floor == "none" and low == -INF:
        pytest.skip("such rows are no number, and have no gradient")
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 2, 5, 8, generator=generator).requires_grad_() for _ in range(3)]
    gone = torch.rand(2, 2, 5, 5, generator=generator) < 0.4
    gone[0, :, 1] = gone[1, :, 3] = True

    def attention(q: Tensor, k: Tensor, v: Tensor, gone: Tensor) -> Tensor:
        return FLOORS[floor](MASKED[masked](q @ k.mT * 0.3, gone, low)).softmax(-1) @ v

    def results(call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = call(*given, gone)
        return (out, *torch.autograd.grad(out.sin().sum(), given))

    attnpass.reset()
    got = results(torch.compile(attention, backend=backend, options={"inner": "eager"}))
    torch.testing.assert_close(got, results(attention), atol=1e-5, rtol=1e-4)
    (site,) = attnpass.report().sites
    assert site.replaced
