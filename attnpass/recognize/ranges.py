"""What a cast to a dtype of less range does to the numbers of a mask.

    float32 scores  + finfo(float32).min  ── to bfloat16 ──  -inf        a row of them: NaN
                                          ── softmax ──────  finite      a row of them: the mean of the values

Scores themselves are taken to be within the range of all dtypes that they go through, as whoever wrote the casts did.
"""

from __future__ import annotations

import math

import torch

from attnpass.recognize.ops import number_in

_CLOSE = 1e-4  # multiplications between a number and a cast: by how much they may change it on the way


def greatest(dtype: torch.dtype) -> float:
    """The greatest finite number."""
    if dtype is torch.bool:
        return 1.0
    return float((torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max)


def less_range(a: torch.dtype, b: torch.dtype) -> bool:
    """Some finite number of `b` is infinite in `a`."""
    return greatest(a) < greatest(b)


def holds(dtype: torch.dtype, before: float, after: float) -> bool:
    """It is finite in `dtype`, wherever on the way from `before` to `after` it is cast."""
    if before == after:
        return math.isfinite(number_in(after, dtype))
    return max(abs(before), abs(after)) < _CLOSE * torch.finfo(dtype).max
