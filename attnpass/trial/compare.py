"""Errors against float64, and when a replacement is worse than the original.

    error of the replacement  >  2 * error of the original  +  the kernel's tolerance * largest element        -> worse

Fused kernels add in another order, so being twice as far off, here and there, is luck. The tolerance is what a kernel
declares (`Kernel.tolerance`), as a share of the largest element of the true result. Where rows of the result are looked
at one by one, a row may also be as far off as four times what is usual for the original. Where the original's own error
is beyond the tolerance the inputs are at fault (scores beside a mask of -10000 lose their last digits): what each side
makes of them is chance, and eight times that error, in place of twice, is allowed for what is beyond.

What is no number counts like this. Where the true result is a number: the replacement must be one if the original is
one; where the original is none (its own float16 has run over), nothing is asked. Where the true result is none, as for
a query without any key: the replacement must not hide that, unless it is `hideable`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_UNSURE = 6.0  # times as much of the original's error as is beyond the tolerance
_USUAL = 4.0  # times the median error of the original's rows
_LEAST = 1e-300


@dataclass(frozen=True)
class Gap:
    """How far both sides are from the truth where the replacement does worst against what is allowed."""

    original: float
    replacement: float
    allowed: float

    @property
    def worse(self) -> bool:
        return not self.replacement <= self.allowed

    @property
    def excess(self) -> float:
        """Above one: worse."""
        if self.replacement == 0:
            return 0.0
        return self.replacement / self.allowed if self.allowed > 0 else math.inf


def gap(
    mine: Tensor,
    plain: Tensor,
    true: Tensor,
    *,
    share: float,
    size: float,
    rows: bool = False,
    hideable: bool = False,
    skip: Tensor | None = None,
) -> Gap | None:
    """One tensor of the replacement and of the original beside the true one; `skip` is True where nothing is asked.
    None where nothing is asked anywhere.
    """
    known = true.isfinite() & plain.isfinite()
    if skip is not None:
        known &= ~skip
    lost = known & ~mine.isfinite()
    own = torch.where(known, plain.double() - true, 0.0).abs()
    here = torch.where(known & ~lost, mine.double() - true, 0.0).abs()
    here = torch.where(lost, math.inf, here)
    asked = bool(known.any())
    if not hideable:
        unknown = ~true.isfinite() & ~plain.isfinite()
        unknown = unknown if skip is None else unknown & ~skip
        here = torch.where(unknown & mine.isfinite(), math.inf, here)
        asked |= bool(unknown.any())
    if not asked:
        return None
    if rows and here.dim():
        own, here = own.amax(-1), here.amax(-1)
        usual = float(own.median())
    else:
        own, here = own.amax(), here.amax()
        usual = 0.0
    tolerance = share * size
    allowed = 2 * own + (_USUAL * usual + tolerance) + _UNSURE * (own - tolerance).clamp_min(0)
    worst = int((here / allowed.clamp_min(_LEAST)).argmax())
    return Gap(*(float(x.flatten()[worst]) for x in (own, here, allowed)))


def largest(*tensors: Tensor) -> float:
    """The largest number in them that is one."""
    found = (torch.where(t.isfinite(), t, 0.0).abs().amax() for t in tensors if t.numel())
    return max(map(float, found), default=0.0)


def weights(x: Tensor) -> Tensor:
    """One fixed number for each element, for gradients that tell where they come from."""
    numbers = torch.linspace(-1, 1, max(x.numel(), 2), dtype=torch.float64, device=x.device)
    return numbers[: x.numel()].view(x.shape).to(x.dtype)
