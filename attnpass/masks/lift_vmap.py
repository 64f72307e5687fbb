"""Masks made under torch.vmap, as torch.export writes them: an axis is hidden on the way in and shown on the way out.

    y = _add_batch_dim(x, in_dim, level)             x[.., t, ..] is y[..] while `level` stands at t
    z = _remove_batch_dim(y, level, size, out_dim)   z[.., t, ..] is y[..] with `level` at t

In between, rules see only the visible axes; the hidden ones are kept beside the index.
"""

from __future__ import annotations

from attnpass.masks.expr import Value
from attnpass.masks.lift import Call, Index, Unliftable, rule


@rule("python:_add_batch_dim")
def _enter(call: Call, index: Index) -> Value:
    source, dim, level = call.node.args
    levels = dict(call.lifter.levels)
    if level not in levels or not isinstance(dim, int):
        raise Unliftable("vmap")
    at = dim % (len(index) + 1)
    return call.read(source, (*index[:at], levels[level], *index[at:]))  # type: ignore[arg-type, index]


@rule("python:_remove_batch_dim")
def _leave(call: Call, index: Index) -> Value:
    source, level, _, dim = call.node.args
    if not isinstance(dim, int) or not isinstance(level, int):
        raise Unliftable("vmap")
    at = dim % len(index)
    outside = call.lifter.levels
    call.lifter.levels = (*outside, (level, index[at]))
    try:
        return call.read(source, index[:at] + index[at + 1 :])  # type: ignore[arg-type]
    finally:
        call.lifter.levels = outside
