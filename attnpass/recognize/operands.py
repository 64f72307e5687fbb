"""Where q, k and v may be read: every tensor from a product's operand back through pure views and scalings.

    k (8 heads) -> unsqueeze -> expand -> reshape (32 heads) -> contiguous -> transpose -> matmul
    ^ read here: no copy, no repeat, and the layout says which query heads share a head

Each candidate computes the same operand; the one that needs the least rearranging and depends on the fewest axes is
chosen later. A candidate is offered only if nothing writes its memory up to the place of the fused call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import State, state_of, tensor
from attnpass.recognize import views
from attnpass.recognize.axes import Axes, atoms
from attnpass.recognize.ops import bound, number, op_name, pair
from attnpass.recognize.purity import Effects
from attnpass.site import Layout, Placed


@dataclass(frozen=True)
class Candidate:
    """One place to read an operand: its value is ``scale * placed.node`` up to the view."""

    placed: Placed
    scale: float
    dtype: torch.dtype
    depth: int
    folded: int  # scalings that become part of the kernel's scale


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far back an operand may be read: up to writes before the fused call, and within one grad mode."""

    axes: Axes
    effects: Effects
    stop: int  # the position of the fused call
    state: State
    default: State

    def until(self, grad: bool) -> int:
        """How long a tensor must stay as it is: a kernel's backward reads its arguments again."""
        return len(self.effects.position) if grad else self.stop


def candidates(node: Node, layout: Layout, reader: Node, reach: Reach) -> list[Candidate]:
    """The operand itself and everything behind it that holds the same numbers, nearest first."""
    axes, effects = reach.axes, reach.effects
    if not effects.unchanged(node, effects.position[reader] - 1, reach.stop):
        raise Refuse("mutated", node, what=node.name)
    scale, folded = 1.0, 0
    out: list[Candidate] = []
    while True:
        val = tensor(node)
        assert val is not None
        out.append(Candidate(Placed(node, layout), scale, val.dtype, len(out), folded))
        further = _further(node, layout, axes, effects)
        # an operation under no_grad stops gradients, even where it is the identity for values
        if further is None or state_of(node, reach.default).grad != reach.state.grad:
            return out
        node_before, (node, layout, factor) = node, further
        # reading it later than the original did is only allowed while nothing writes to it, this step included
        stop = reach.until(node.meta.get("attnpass_grad", False))
        if not effects.unchanged(node, effects.position[node_before] - 1, stop):
            return out
        scale *= factor
        folded += op_name(node_before) in ("mul", "div")


def _further(node: Node, layout: Layout, axes: Axes, effects: Effects) -> tuple[Node, Layout, float] | None:
    name = op_name(node)
    val = tensor(node)
    try:
        if name in views.VIEWS:
            source = effects.value_at(_first(node), node)
            return source, views.backward(node, layout, axes), 1.0
        if name in views.CASTS:
            source = effects.value_at(_first(node), node)
            before = tensor(source)
            # only a widening cast loses nothing, so that the narrow tensor holds the same numbers
            if before is None or val is None or before.device != val.device or not widens(before.dtype, val.dtype):
                return None
            return source, layout, 1.0
        if name in ("mul", "div"):
            return _scaled(node, name, layout, axes, effects)
    except Refuse:
        return None
    return None


def _first(node: Node) -> Node:
    source = node.args[0]
    if not isinstance(source, Node):
        raise Refuse("unknown_arguments", node, op=op_name(node), detail="no tensor")
    return source


def widens(a: torch.dtype, b: torch.dtype) -> bool:
    return a == b or (a.is_floating_point and torch.promote_types(a, b) == b)


def _scaled(node: Node, name: str, layout: Layout, axes: Axes, effects: Effects) -> tuple[Node, Layout, float] | None:
    a, b = pair(node)
    if name == "div" and bound(node).get("rounding_mode") is not None:
        return None
    arms = [(a, b)] if name == "div" else [(a, b), (b, a)]
    for x, c in arms:
        known = number(c, effects.written)
        if known is None or known == 0 or not isinstance(x, Node):
            continue
        before, after = tensor(x), tensor(node)
        if before is None or after is None or before.dtype != after.dtype or before.shape != after.shape:
            continue
        source = effects.value_at(x, node)
        return source, layout, 1 / known if name == "div" else known
    return None


def fewest_axes(found: list[Candidate], axes: Axes) -> frozenset[int]:
    """The axes that the operand really depends on: the smallest set among its candidates (they are nested)."""
    return min((atoms(axes.resolve(c.placed.layout)) for c in found), key=len)


def cheapest(found: list[Candidate], target: Layout, axes: Axes) -> Candidate:
    """The candidate that folds most scalings and needs the least rearranging; the deepest of equals.

    A free view is well spent on dropping a multiplication of the whole operand, a copy is not.
    """

    def cost(c: Candidate) -> tuple[bool, int, int, int]:
        effort = _effort(axes.resolve(c.placed.layout), target)
        return effort > _FREE, -c.folded, effort, -c.depth

    return min(found, key=cost)


_FREE = 3  # up to here only views are needed


def _effort(layout: Layout, target: Layout) -> int:
    if layout == target:
        return 0
    have, want = [d for d in layout if d], [d for d in target if d]
    if have == want:
        return 1
    if sorted(have) == sorted(want):
        return 2
    # cut through a dimension, or worse, merge (which may copy)
    pieces = {a for d in have for a in d}
    return 3 if all(d in have or len(d) == 1 for d in want if set(d) <= pieces) else 4
