"""Tensors of 0 and 1, by which scores may be multiplied: ``scores * b + c * (1 - b)`` is a mask if b holds no other."""

from __future__ import annotations

import torch
from torch.fx import Node

from attnpass.graph import tensor
from attnpass.recognize import views
from attnpass.recognize.ops import bound, op_name, pair
from attnpass.recognize.walk import Walker

_KEEPS_VALUES = views.VIEWS | views.CASTS | {"tril", "triu", "detach"}


def one_minus(w: Walker, node: Node) -> Node | None:
    """m when node is 1 - m."""
    name = op_name(node)
    if name not in ("rsub", "sub") or bound(node).get("alpha", 1) != 1:
        return None
    a, b = pair(node)
    one, mask = (b, a) if name == "rsub" else (a, b)
    return mask if w.number(one) == 1 and isinstance(mask, Node) else None


def is_indicator(w: Walker, node: Node) -> bool:
    """Proved to hold only 0 and 1: made from booleans or ones by operations that keep that."""
    while True:
        val = tensor(node)
        if w.effects.written(node):
            return False
        if val is not None and val.dtype is torch.bool:
            return True
        if w.number(node) in (0.0, 1.0):
            return True
        if op_name(node) not in _KEEPS_VALUES or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]


def computed_alike(w: Walker, a: Node, b: Node) -> bool:
    """One tensor, or the same views and casts of one that nothing writes: ``s * m.to(t) + c * (1 - m.to(t))``."""
    while a is not b:
        same_call = a.target == b.target and a.args[1:] == b.args[1:] and a.kwargs == b.kwargs
        if op_name(a) not in _KEEPS_VALUES or not same_call or w.effects.written(a) or w.effects.written(b):
            return False
        inner_a, inner_b = a.args[0], b.args[0]
        if not isinstance(inner_a, Node) or not isinstance(inner_b, Node):
            return False
        a, b = inner_a, inner_b
    return True
