"""Operations that only rename axes, as maps between layouts, in both directions.

    backward(node, layout of its result)  -> layout of its input      (walking from a product to its operands)
    forward(node, layout of its input)    -> layout of its result     (walking from the softmax to the values)

``repeat_interleave`` and ``expand`` lose an axis on the way back: the input does not depend on it. That is how
repeated key/value heads are found, whatever spelling repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import is_one, same, tensor
from attnpass.recognize.axes import Axes
from attnpass.recognize.ops import bound, op_name
from attnpass.site import Dim, Layout

_REGROUP = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "view_as",
    "reshape_as",
    "_reshape_alias",
    "ravel",
}
_PERMUTE = {
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "swapaxes",
    "swapdims",
    "movedim",
}
EXPANDS = {"expand", "expand_as", "broadcast_to"}
LIKE_ANOTHER = EXPANDS | {"view_as", "reshape_as"}
_IDENTITY = {"contiguous", "clone", "alias", "lift_fresh"}
_CASTS = {"to", "_to_copy", "type_as"}

VIEWS = (
    _REGROUP
    | _PERMUTE
    | EXPANDS
    | _IDENTITY
    | {"unsqueeze", "squeeze", "repeat_interleave", "repeat", "slice", "narrow"}
)
CASTS = _CASTS


def shape_of(node: Node) -> Sequence[Any]:
    val = tensor(node)
    if val is None:
        raise Refuse("unknown_op", node, op=op_name(node))
    return val.shape


def permutation(node: Node) -> tuple[int, ...]:
    """Dimension i of the result is dimension p[i] of the input: found by running the operation on marked sizes."""
    source = node.args[0]
    assert isinstance(source, Node)
    assert callable(node.target)
    rank = len(shape_of(source))
    marked = torch.empty([i + 2 for i in range(rank)], device="meta")
    out = node.target(marked, *node.args[1:], **node.kwargs)
    return tuple(size - 2 for size in out.shape)


def _singles(node: Node, rank: int) -> list[int]:
    """The dimensions of size one that squeeze removes from its input."""
    args = bound(node)
    source = node.args[0]
    assert isinstance(source, Node)
    shape = shape_of(source)
    dim = args.get("dim")
    if dim is None:
        return [i for i in range(rank) if is_one(shape[i])]
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [d % rank for d in dims if is_one(shape[d % rank])]


def is_whole(node: Node) -> bool:
    """A slice that keeps everything."""
    source = node.args[0]
    assert isinstance(source, Node)
    if op_name(node) == "slice" and bound(node).get("step") not in (1, None):
        return False
    return all(same(a, b) for a, b in zip(shape_of(source), shape_of(node), strict=True))


def backward(node: Node, layout: Layout, axes: Axes) -> Layout:
    """The layout of a view's input, given that of its result."""
    name = op_name(node)
    source = node.args[0]
    assert isinstance(source, Node)
    shape = shape_of(source)
    layout = axes.resolve(layout)
    if name in _IDENTITY or name in _CASTS:
        return layout
    if name in _REGROUP:
        return axes.regroup(layout, shape)
    if name in _PERMUTE:
        dims: list[Dim] = [()] * len(layout)
        for out, into in enumerate(permutation(node)):
            dims[into] = layout[out]
        return tuple(dims)
    if name == "unsqueeze":
        at = bound(node)["dim"] % len(layout)
        return layout[:at] + layout[at + 1 :]
    if name == "squeeze":
        dims = list(layout)
        for at in sorted(_singles(node, len(shape))):
            dims.insert(at, ())
        return tuple(dims)
    if name in EXPANDS:
        offset = len(layout) - len(shape)
        # an expanded dimension of size one: the input does not depend on that axis
        return tuple(() if is_one(shape[i]) else layout[offset + i] for i in range(len(shape)))
    if name == "repeat_interleave":
        return _interleave(node, layout, shape, axes)
    if name == "repeat":
        return _tile(node, layout, shape, axes)
    if name in ("slice", "narrow") and is_whole(node):
        return layout
    raise Refuse("unknown_op", node, op=name)


def _interleave(node: Node, layout: Layout, shape: Sequence[Any], axes: Axes) -> Layout:
    args = bound(node)
    times, dim = args.get("repeats"), args.get("dim")
    if not isinstance(times, int) or dim is None:
        raise Refuse("unknown_arguments", node, op="repeat_interleave", detail="repeats that differ")
    at = dim % len(shape)
    # element e of the input becomes elements e * times .. e * times + times - 1: input major, copy minor
    major, _ = axes.regroup((layout[at],), (shape[at], times))
    return (*layout[:at], major, *layout[at + 1 :])


def _tile(node: Node, layout: Layout, shape: Sequence[Any], axes: Axes) -> Layout:
    repeats = bound(node)["repeats"]
    offset = len(repeats) - len(shape)
    dims: list[Dim] = []
    for i, size in enumerate(shape):
        times, dim = repeats[offset + i], layout[offset + i]
        if not isinstance(times, int):
            raise Refuse("unknown_arguments", node, op="repeat", detail="a symbolic count")
        # the whole input is laid down `times` times: copy major, input minor
        dims.append(dim if times == 1 else axes.regroup((dim,), (times, size))[1])
    return tuple(dims)


def forward(node: Node, layout: Layout, axes: Axes) -> Layout:
    """The layout of a view's result, given that of its input."""
    name = op_name(node)
    shape = shape_of(node)
    layout = axes.resolve(layout)
    if name in _IDENTITY or name in _CASTS:
        return layout
    if name in _REGROUP:
        return axes.regroup(layout, shape)
    if name in _PERMUTE:
        return tuple(layout[into] for into in permutation(node))
    if name == "unsqueeze":
        at = bound(node)["dim"] % len(shape)
        return (*layout[:at], (), *layout[at:])
    if name == "squeeze":
        gone = set(_singles(node, len(layout)))
        return tuple(dim for i, dim in enumerate(layout) if i not in gone)
    if name in EXPANDS:
        source = node.args[0]
        assert isinstance(source, Node)
        before = shape_of(source)
        if len(before) == len(shape) and all(same(a, b) for a, b in zip(before, shape, strict=True)):
            return layout
    if name in ("slice", "narrow") and is_whole(node):
        return layout
    raise Refuse("unknown_op", node, op=name)
