"""What an analysis is asked about: the tensors that a site adds to its scores or masks them with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.fx import Node

from attnpass.masks.expr import Poly


@dataclass(frozen=True, kw_only=True)
class Term:
    """One mask or bias of a site: element `index` of `node` belongs to scores[b, h, i, j]."""

    node: Node
    index: tuple[Poly, ...]
    off: bool | None = None  # a mask: the truth value at which scores are replaced; None: added to the scores
    fill: float = -math.inf  # what replaces them
    factor: float = 1.0  # what an added tensor is multiplied by
