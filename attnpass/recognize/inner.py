"""Where a walk through the scores stands, and what the numbers met there have to bear on their way to the softmax.

    softmax <- factor * (... + terms, fills) <- here

A kernel is given every mask and bias as it comes out of all factors and casts. That is the same only while no sum or
product in between was infinite, or had lost the scores, in the dtype that the original computes in.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.recognize.ops import number_in
from attnpass.recognize.ranges import greatest, holds, less_range
from attnpass.site import Factor, Floor, Layer, Layout, Placed


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Where the walk stands."""

    node: Node
    layout: Layout
    factor: Factor = dataclasses.field(default_factory=Factor)
    layers: tuple[Layer, ...] = ()
    softcap: float | Node | None = None  # a node: a symbolic scalar, by which the factor further in has to divide
    sink: Placed | None = None
    centred: bool = False  # the row maximum is taken away before anything else happens to the scores
    floor: Floor | None = None  # scores are clamped further out
    weighed: bool = False  # ... are multiplied by a mask of 0 and 1 further out, where an infinity would become NaN
    narrowest: torch.dtype = torch.float64  # of what the scores are cast to further out, that of the least range
    wide: bool = False  # ... and something was added before such a cast, in a dtype of more range
    spare: float = math.inf  # how much lower sums that are scaled down further out may get, and stay finite
    lowered: float = 0.0  # by how much all that is added further out may lower a score, as far as it is known
    seen: tuple[Node, ...] = ()  # the nodes crossed, outermost first
    steps: tuple[float, ...] = ()  # the numbers that `factor` is a product of, outermost first
    forks: int = 0

    def step(self, node: Node, layout: Layout, **changes: Any) -> Inner:
        factor = changes.get("factor")
        if factor is not None and self.factor.number != 0:
            step = factor.number / self.factor.number
            changes["steps"] = (*self.steps, step)
            known = (factor.scalars, factor.tensors) == (self.factor.scalars, self.factor.tensors)
            if math.isfinite(self.spare):
                changes["spare"] = self.spare / abs(step) if known and step else 0.0
        return dataclasses.replace(self, node=node, layout=layout, seen=(*self.seen, self.node), **changes)

    @property
    def beyond_half(self) -> bool:
        """Something is added or filled further out in a dtype that tells more numbers apart than float16."""
        return any(layer.dtype is not torch.float16 for layer in self.layers)

    @property
    def shrinks(self) -> bool:
        """What is added here may come out smaller."""
        return not self.factor.is_number or abs(self.factor.number) < 1

    def narrows(self, dtype: torch.dtype) -> bool:
        """What is added or filled here, in this dtype, is cast to one of less range further out, alone or in a sum."""
        return self.wide or less_range(self.narrowest, dtype)

    def survives(self, low: float) -> bool:
        """Such a cast leaves a number finite that is added or filled here, whatever else is added further out."""
        return holds(self.narrowest, low + self.lowered, low + self.lowered)

    def lower(self, by: float, dtype: torch.dtype) -> Inner:
        """Scores of this dtype may be lowered by so much here: by what is added, or filled in.

        A kernel is given each number as it comes out of all factors. If two of them together are infinite before they
        are scaled down, the sum is -inf in the original and finite there.
        """
        by = min(max(by, 0.0), greatest(dtype))
        if by > self.spare:
            raise Refuse("overflows_between", self.node)
        left = min(self.spare, greatest(dtype) if self.shrinks else math.inf) - by
        return dataclasses.replace(self, spare=left)

    def largest(self, value: float, dtype: torch.dtype) -> float:
        """The largest that a number met here becomes on its way out; inf where the factors take it beyond its dtype,
        even if they would bring it back: ``x * 4.0 * 0.25`` of the lowest number is -inf.
        """
        top = abs(value)
        for step in reversed(self.steps):
            value = number_in(value * step, dtype)
            top = max(top, abs(value))
        return top
