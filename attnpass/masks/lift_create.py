"""Rules of operations that make a tensor out of numbers, and of triangles."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from attnpass.masks.expr import Value
from attnpass.masks.lift import Call, Index, Unliftable, kind_of, rule
from attnpass.masks.logic import eq, ge, ite
from attnpass.masks.numeric import cast, literal


@rule("arange")
def _arange(call: Call, index: Index) -> Value:
    start = call.args.get("start", 0)
    step = call.args.get("step", 1)
    if any(isinstance(x, float) for x in (start, step)):
        raise Unliftable("fractional steps")
    value = call.integer(start) + index[0] * call.integer(step)
    # integer ends make an integer range, whatever dtype it is stored in
    return cast(call, value, torch.int64, call.dtype)


@rule("full", "new_full", "full_like")
def _full(call: Call, index: Index) -> Value:
    return _number(call, call.args["fill_value"])


@rule("scalar_tensor")
def _scalar(call: Call, index: Index) -> Value:
    return _number(call, call.args["s"])


@rule("ones", "new_ones", "ones_like")
def _ones(call: Call, index: Index) -> Value:
    return literal(1, call.dtype)


@rule("zeros", "new_zeros", "zeros_like")
def _zeros(call: Call, index: Index) -> Value:
    return literal(0, call.dtype)


def _number(call: Call, value: Any) -> Value:
    if isinstance(value, bool | int | float):
        if kind_of(call.dtype) == "int" and value != int(value):
            raise Unliftable("fractional fill")
        return literal(value, call.dtype)
    if isinstance(value, Node):
        return cast(call, call.integer(value), torch.int64, call.dtype)
    raise Unliftable("fill")


@rule("eye")
def _eye(call: Call, index: Index) -> Value:
    return cast(call, eq(index[0] - index[1]), torch.bool, call.dtype)


@rule("tril", "triu")
def _triangle(call: Call, index: Index) -> Value:
    diagonal = call.integer(call.args.get("diagonal", 0))
    i, j = index[-2], index[-1]
    kept = ge(i + diagonal - j) if call.name == "tril" else ge(j - i - diagonal)
    return ite(kept, call.read(call.args["self"], index), literal(0, call.dtype))
