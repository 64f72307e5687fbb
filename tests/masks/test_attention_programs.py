"""Whatever program makes a mask: attention with it, through the whole pass, computes what it did before.

The data that a mask reads is another when the rewritten graph runs than it was when the graph was traced, so a proof
that took data for structure would show.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import attnpass
from tests.masks.programs import PROGRAMS, Instruction, run

EXAMPLES = int(os.environ.get("ATTNPASS_MASK_EXAMPLES", "500")) // 4
thorough = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 125, suppress_health_check=list(HealthCheck)
)
HEADS, WIDTH = 2, 4


def operands(length: int, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, 1, HEADS, length, WIDTH, generator=g).unbind()
    return *qkv, torch.randint(0, 3, (length,), generator=g)


def masked(program: Sequence[Instruction], scores: Tensor, x: Tensor) -> Tensor:
    mask = run(program, x)
    if mask.dtype.is_floating_point:
        return scores + mask.to(scores.dtype)
    return scores.masked_fill(~mask.bool(), -math.inf)


def attention(program: Sequence[Instruction], q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return masked(program, q @ k.mT * 0.5, x).softmax(-1) @ v


def is_ordinary(program: Sequence[Instruction], x: Tensor) -> bool:
    """Beside a large number scores lose digits, in the original as in a kernel, but not the same ones."""
    mask = run(program, x).float().double()
    large = mask.abs() > 100
    return not bool((large & (mask > -1e8)).any() or mask.isnan().any())


@given(PROGRAMS, st.integers(4, 7))
@thorough
def test_attention_with_a_mask_computes_the_same(program: list[Instruction], length: int) -> None:
    traced, other = operands(length, 0), operands(length, 1)
    assume(is_ordinary(program, traced[3]) and is_ordinary(program, other[3]))
    gm = make_fx(
        lambda *given: attention(program, *given),
        tracing_mode="fake",
        pre_dispatch=True,
        _error_on_data_dependent_ops=False,
    )(*traced)
    rewritten, report = attnpass.rewrite(gm)
    assert not report.failures
    assert not report.notes
    for given_now in (traced, other):
        torch.testing.assert_close(
            rewritten(*given_now), attention(program, *given_now), rtol=1e-4, atol=1e-5, equal_nan=True
        )
