"""Checks of a rewrite before it is committed: the new value must be able to stand wherever the old one stood.

Shape, dtype and device must be equal. Strides may differ (fused kernels lay heads innermost, which saves the copy that
usually follows), so whatever reads the output is replayed on the new strides, and so on until they make no difference
any more. Where a view would fail, or the strides could be seen from outside the graph, they are made those of the
original.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import Builder, is_one, no_new_condition, same, tensor, value

aten = torch.ops.aten
_LOOKS_AT_STRIDES = {aten.as_strided.default, aten.as_strided_.default, aten.view.dtype, aten.view_as_complex.default}
_COPY_OR_VIEW = {aten.reshape, aten.reshape_as, aten.contiguous, aten.flatten, aten.to, aten.type_as}
_REPLAYS = 64  # strides that make a difference for longer are not worth saving a copy


def checked(b: Builder, old: Node, new: Node) -> Node:
    """`new`, or a copy of it with the original's strides, proved to fit; Refuse when it does not."""
    was, now = tensor(old), tensor(new)
    if was is None or now is None:
        raise Refuse("verify_failed", old, detail="the result is no tensor")
    if len(was.shape) != len(now.shape) or not all(same(a, c) for a, c in zip(was.shape, now.shape, strict=True)):
        raise Refuse("verify_failed", old, detail=f"shape {tuple(now.shape)} for {tuple(was.shape)}")
    if was.dtype != now.dtype or was.device != now.device:
        raise Refuse("verify_failed", old, detail=f"{now.dtype} on {now.device} for {was.dtype} on {was.device}")
    if _same_strides(was, now) or _strides_vanish(b, old, now):
        return new
    return _restrided(b, new, was)


def _same_strides(was: Any, now: Any) -> bool:
    if isinstance(was, tuple | list) and isinstance(now, tuple | list):
        return len(was) == len(now) and all(map(_same_strides, was, now))
    if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor):
        return type(was) is type(now)
    # the stride of a dimension of size one is never used
    return was.dim() == now.dim() and all(
        same(a, c) or is_one(n) for n, a, c in zip(was.shape, was.stride(), now.stride(), strict=True)
    )


def _strides_vanish(b: Builder, old: Node, now: torch.Tensor) -> bool:
    """No reader fails on the new strides, and none of them reaches the outside or an unknown operation."""
    stack: list[tuple[Node, Any]] = [(old, now)]
    replays = 0
    with contextlib.ExitStack() as enter:
        if b.mode is not None:
            enter.enter_context(b.mode)
            enter.enter_context(enable_python_dispatcher())
        while stack:
            node, val = stack.pop()
            for user in node.users:
                part = user.target is operator.getitem and isinstance(val, tuple | list)
                known = isinstance(user.target, torch._ops.OpOverload) and user.target not in _LOOKS_AT_STRIDES
                if user.op != "call_function" or not (known or part) or replays == _REPLAYS:
                    return False
                if isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable:
                    if user.args[0] is node:  # writes into it: the result is the same memory
                        stack.append((user, val))
                    continue
                if _may_copy(user) and _written(user):
                    return False  # copy or not is decided by strides, and here it shows
                replays += 1
                try:
                    with no_new_condition(b.mode.shape_env if b.mode is not None else None):
                        out = _replay(user, node, val)
                except (RuntimeError, ValueError, Refuse):
                    return False
                if not _same_strides(value(user), out):
                    stack.append((user, out))
    return True


def _restrided(b: Builder, new: Node, was: torch.Tensor) -> Node:
    """A copy of `new` with the strides of `was`."""
    order = list(range(was.dim()))
    if not was.is_contiguous():
        if not all(isinstance(n, int) for n in (*was.shape, *was.stride())):
            raise Refuse("verify_failed", new, detail="a reader needs the original's strides")
        strides, shape = was.stride(), was.shape
        order.sort(key=lambda d: (-strides[d], -shape[d]))
    plain = order == list(range(was.dim()))
    out = new if plain else b.call(aten.permute.default, new, order)
    out = b.call(aten.clone.default, out, memory_format=torch.contiguous_format)
    if not plain:
        out = b.call(aten.permute.default, out, [order.index(d) for d in range(was.dim())])
    if not _same_strides(was, tensor(out)):
        raise Refuse("verify_failed", new, detail="a reader needs the original's strides")
    return out


def _may_copy(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in _COPY_OR_VIEW


def _written(node: Node) -> bool:
    """Something writes into this tensor, or into what may be a view of it."""
    for user in node.users:
        if not isinstance(user.target, torch._ops.OpOverload):
            continue
        schema = user.target._schema
        if schema.is_mutable or (any(r.alias_info is not None for r in schema.returns) and _written(user)):
            return True
    return False


def _replay(node: Node, changed: Node, val: torch.Tensor) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: val if n is changed else value(n))
    assert callable(node.target)
    return node.target(*args, **kwargs)
