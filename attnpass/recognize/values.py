"""Which few values a tensor can hold: enough to know an additive mask from a bias.

``where(m, 0, finfo.min)`` holds 0 and finfo.min, ``(1 - m) * -10000`` holds 0 and -10000, whatever m is. A tensor
made from data holds anything (None). The sets are over-approximations: each value listed *may* occur, no other can.

Of data the dtype tells something: ``table.float()`` holds nothing that table's own dtype does not hold (`of_dtype`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Node

from attnpass.graph import tensor
from attnpass.recognize import views
from attnpass.recognize.ops import bound, number, number_in, op_name, pair
from attnpass.recognize.purity import Effects

Levels = frozenset[float]
_MOST = 8
_SUBSET = views.VIEWS | {"select", "index", "index_select", "gather", "detach", "alias"}


def levels(node: Any, effects: Effects, depth: int = 0) -> Levels | None:
    """All values that the tensor may hold, None when they are unknown or many."""
    known = number(node, effects.written)
    if known is not None:
        return frozenset((known,))
    if not isinstance(node, Node) or depth > 40:
        return None
    val = tensor(node)
    if val is None or effects.written(node):
        return None
    if val.dtype is torch.bool:
        return frozenset((0.0, 1.0))
    found = _levels(node, effects, depth + 1)
    if found is None or len(found) > _MOST or any(math.isnan(v) for v in found):
        return None
    if val.is_complex():
        return None
    return frozenset(number_in(v, val.dtype) for v in found)


def _levels(node: Node, effects: Effects, depth: int) -> Collection[float] | None:
    name = op_name(node)
    if node.op != "call_function":
        return None
    if name in _SUBSET or name in views.CASTS:
        source = node.args[0]
        return levels(source, effects, depth)
    if name in ("tril", "triu"):
        inner = levels(node.args[0], effects, depth)
        return None if inner is None else inner | {0.0}
    if name == "neg":
        inner = levels(node.args[0], effects, depth)
        return None if inner is None else [-v for v in inner]
    if name == "where":
        args = bound(node)
        return _union(levels(args.get("self"), effects, depth), levels(args.get("other"), effects, depth))
    if name == "masked_fill":
        args = bound(node)
        return _union(levels(args["self"], effects, depth), levels(args["value"], effects, depth))
    if name in ("add", "sub", "rsub", "mul", "minimum", "maximum"):
        return _binary(node, name, effects, depth)
    return None


def of_dtype(node: Any, dtype: torch.dtype, effects: Effects, depth: int = 0) -> bool:
    """A dtype holds every number of the tensor: it was only widened since it had a dtype that this one includes."""
    found = levels(node, effects)
    if found is not None:
        return all(number_in(v, dtype) == v for v in found)
    val = tensor(node) if isinstance(node, Node) else None
    if val is None or not val.is_floating_point() or effects.written(node) or depth > 40:
        return False  # an integer has more digits than the floating-point number that it is promoted to
    if torch.promote_types(val.dtype, dtype) == dtype:
        return True
    name = op_name(node)
    if name in views.CASTS:
        source = tensor(node.args[0])
        widens = source is not None and torch.promote_types(source.dtype, val.dtype) == val.dtype
        return widens and of_dtype(node.args[0], dtype, effects, depth + 1)
    return (name in _SUBSET or name == "neg") and of_dtype(node.args[0], dtype, effects, depth + 1)


def _union(a: Levels | None, b: Levels | None) -> Levels | None:
    return None if a is None or b is None else a | b


_BINARY: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
}


def _binary(node: Node, name: str, effects: Effects, depth: int) -> list[float] | None:
    if bound(node).get("alpha", 1) != 1:
        return None
    a, b = pair(node)
    left, right = levels(a, effects, depth), levels(b, effects, depth)
    if left is None or right is None:
        return None
    return [_BINARY[name](x, y) for x in left for y in right]
