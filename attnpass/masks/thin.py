"""A bias from before it was broadcast under a mask that masks nothing.

    where(keep[b, j], table[h, i, j], lowest)     keep proved to be true everywhere      table[h, i, j]

The two hold the same numbers if they are the same expression of the indices; of the smaller one there is one copy for
all batch rows, and layers that mask anew share it. Limit: a tensor that is written in place is left, for it may hold
other numbers by the time it is read.
"""

from __future__ import annotations

from torch.fx import Node

from attnpass.graph import is_one, same
from attnpass.graph import tensor as tensor_at
from attnpass.masks.expr import Value
from attnpass.masks.frame import of_site, placed_index
from attnpass.masks.lift import Unliftable
from attnpass.masks.logic import TooLarge
from attnpass.masks.prove import Masks
from attnpass.site import Placed, Site


def thinnest(masks: Masks, site: Site, placed: Placed) -> Placed:
    """The tensor of fewest axes, among those that this one was made from, that is the same expression."""
    _, atoms = of_site(masks.sizes, site.roles, site.sizes)

    def lifted(at: Placed) -> Value | None:
        try:
            index = placed_index(at, masks.sizes, site.sizes, atoms)
            return masks.lifter.read(at.node, index, len(masks.lifter.writes.position))
        except (Unliftable, TooLarge):
            return None

    written = masks.lifter.writes.to
    best = at = placed
    masks.lifter.reset()
    value = None if written(placed.node) else lifted(placed)
    while value is not None:
        sources = (_broadcast(node, at) for node in at.node.all_input_nodes if not written(node))
        found = next((before for before in sources if before is not None and lifted(before) == value), None)
        if found is None:
            break
        at = found
        if _axes(at) < _axes(best):
            best = at
    return best


def _broadcast(node: Node, into: Placed) -> Placed | None:
    """An operand as broadcasting would align it: a guess, which the expressions confirm or not."""
    small, large = tensor_at(node), tensor_at(into.node)
    if small is None or large is None or small.dim() > large.dim():
        return None
    if (small.dtype, small.device) != (large.dtype, large.device):
        return None
    skipped = large.dim() - small.dim()
    layout = []
    for n, m, dim in zip(small.shape, large.shape[skipped:], into.layout[skipped:], strict=True):
        if not is_one(n) and not same(n, m):
            return None
        layout.append(dim if same(n, m) else ())
    return Placed(node, tuple(layout))


def _axes(placed: Placed) -> int:
    return sum(map(len, placed.layout))
