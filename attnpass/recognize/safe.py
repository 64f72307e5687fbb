"""Torch's safe softmax written out: a softmax whose rows of nothing but -inf are set to zero afterwards.

    where(all(s == -inf), 0, softmax(s))                        as its decomposition reads
    where(not any(not (s == -inf)), 0, softmax(s))              and what core ATen makes of that

The rows that are cleared must be exactly those that the softmax cannot answer. A condition made from a mask instead
of from the scores, or one that takes "very low" for -inf, clears other rows and is no such guard.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.fx import Node

from attnpass.graph import same, tensor
from attnpass.recognize.operands import widens
from attnpass.recognize.ops import bound, number, op_name
from attnpass.recognize.purity import Effects
from attnpass.recognize.softmax import Anchor, reduced, seen_by
from attnpass.recognize.views import CASTS
from attnpass.spec import EmptyRow

_NOT = {"logical_not", "bitwise_not"}
_CHOICES = {"where", "masked_fill"}


def with_guard(anchor: Anchor, effects: Effects, live: set[Node]) -> Anchor:
    """The anchor, widened to the guard behind it if there is one."""
    if anchor.fused or anchor.empty is not EmptyRow.NAN or anchor.low is not EmptyRow.MEAN:
        return anchor  # (a spelling that fails for low numbers too fails in rows that the guard does not clear)
    for user in anchor.node.users:
        if user in live and op_name(user) in _CHOICES:
            parts = _guard(user, anchor, effects)
            if parts is not None:
                known = (*anchor.parts, anchor.node, *parts)
                return dataclasses.replace(anchor, node=user, empty=EmptyRow.ZERO, parts=known)
    return anchor


def _guard(node: Node, anchor: Anchor, effects: Effects) -> list[Node] | None:
    """The nodes of the condition, if `node` clears the rows of -inf and changes nothing else."""
    args = bound(node)
    if op_name(node) == "masked_fill":
        kept, flag, cleared, when = args["self"], args["mask"], args["value"], True
    elif args.get("self") is anchor.node:
        kept, flag, cleared, when = args["self"], args["condition"], args["other"], False
    else:
        kept, flag, cleared, when = args.get("other"), args["condition"], args.get("self"), True
    before, after = tensor(anchor.node), tensor(node)
    if kept is not anchor.node or seen_by(effects, kept, node) is not kept or before is None or after is None:
        return None
    unlike = before.dtype != after.dtype or not all(map(same, before.shape, after.shape))
    if unlike or before.dim() != after.dim() or number(cleared, effects.written) != 0:
        return None
    return _rows_of_inf(flag, when, node, anchor, effects)


def _rows_of_inf(flag: Any, truth: bool, reader: Node, anchor: Anchor, effects: Effects) -> list[Node] | None:
    """`flag` is `truth` exactly where a whole row of the scores is -inf."""
    outer, reduction, truth = _through_nots(flag, truth, reader, effects)
    if reduction is None or op_name(reduction) != ("all" if truth else "any"):
        return None
    source = anchor.source
    assert source is not None
    if reduced(reduction, source) != anchor.dims or bound(reduction).get("keepdim") is not True:
        return None
    # each element of the reduction is `truth` exactly where its score is -inf
    inner, test, truth = _through_nots(reduction.args[0], truth, reduction, effects)
    if test is None or not _is_inf(test, truth, effects):
        return None
    if not _same_numbers(test.args[0], test, source, anchor.reader, effects):
        return None
    return [*outer, reduction, *inner, test]


def _through_nots(flag: Any, truth: bool, reader: Node, effects: Effects) -> tuple[list[Node], Node | None, bool]:
    """The negations crossed, what is negated, and which of its values is meant."""
    crossed: list[Node] = []
    while True:
        if not isinstance(flag, Node) or seen_by(effects, flag, reader) is not flag:
            return crossed, None, truth
        val = tensor(flag)
        if val is None or val.dtype is not torch.bool:
            return crossed, None, truth
        if op_name(flag) not in _NOT:
            return crossed, flag, truth
        crossed.append(flag)
        flag, reader, truth = flag.args[0], flag, not truth


def _is_inf(test: Node, truth: bool, effects: Effects) -> bool:
    """`test` is `truth` exactly where its operand is -inf (and never for a NaN)."""
    name = op_name(test)
    if name == "isneginf":
        return truth
    if name not in ("eq", "ne"):
        return False
    return truth == (name == "eq") and number(test.args[1], effects.written) == -math.inf


def _same_numbers(a: Any, reader_a: Node, b: Any, reader_b: Node, effects: Effects) -> bool:
    """Both readers see the same scores, up to casts that widen: those keep -inf and make no other."""
    seen_a, seen_b = _narrowest(a, reader_a, effects), _narrowest(b, reader_b, effects)
    return seen_a is not None and seen_a is seen_b


def _narrowest(arg: Any, reader: Node, effects: Effects) -> Node | None:
    node = seen_by(effects, arg, reader)
    while node is not None and op_name(node) in CASTS:
        source = seen_by(effects, node.args[0], node)
        before, after = (tensor(source) if source is not None else None), tensor(node)
        if before is None or after is None or not before.is_floating_point() or not widens(before.dtype, after.dtype):
            break
        node = source
    return node
