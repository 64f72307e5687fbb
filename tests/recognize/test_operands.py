"""Where operands are read: never before a cast that changes their numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnpass


class Rounded(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.bfloat16().float() @ k.mT * 0.3).softmax(-1) @ v


def test_a_narrowing_cast_of_an_operand_stays() -> None:
    given = tuple(torch.randn(2, 3, 7, 8) for _ in range(3))
    program, report = attnpass.rewrite(torch.export.export(Rounded(), given))
    assert report.replaced == 1
    # against eager code, which rounds too: float64 would not tell that the rounding is gone
    torch.testing.assert_close(program.module()(*given), Rounded()(*given), atol=1e-6, rtol=1e-6)
