"""Checks of a rewrite before it is committed: the new value must be able to stand wherever the old one stood.

Shape, dtype and device must be equal. Strides may differ (fused kernels lay heads innermost, which saves the copy that
usually follows), so every view that reads the output is replayed on the new strides; where one of them would fail, the
output is made contiguous first.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import Builder, same, tensor, value

aten = torch.ops.aten
_LOOKS_AT_STRIDES = {aten.as_strided.default, aten.as_strided_.default, aten.view.dtype, aten.view_as_complex.default}


def checked(b: Builder, old: Node, new: Node) -> Node:
    """`new`, or a contiguous copy of it, proved to fit; Refuse when it does not."""
    was, now = tensor(old), tensor(new)
    if was is None or now is None:
        raise Refuse("verify_failed", old, detail="the result is no tensor")
    if len(was.shape) != len(now.shape) or not all(same(a, c) for a, c in zip(was.shape, now.shape, strict=True)):
        raise Refuse("verify_failed", old, detail=f"shape {tuple(now.shape)} for {tuple(was.shape)}")
    if was.dtype != now.dtype or was.device != now.device:
        raise Refuse("verify_failed", old, detail=f"{now.dtype} on {now.device} for {was.dtype} on {was.device}")
    if all(same(a, c) for a, c in zip(was.stride(), now.stride(), strict=True)) or _views_hold(b, old, now):
        return new
    if not was.is_contiguous():
        raise Refuse("verify_failed", old, detail="a view needs the original's strides")
    return b.call(aten.clone.default, new, memory_format=torch.contiguous_format)


def _views_hold(b: Builder, old: Node, now: torch.Tensor) -> bool:
    """Every chain of views behind the output also works on the new strides."""
    stack: list[tuple[Node, torch.Tensor]] = [(old, now)]
    with contextlib.ExitStack() as enter:
        if b.mode is not None:
            enter.enter_context(b.mode)
            enter.enter_context(enable_python_dispatcher())
        while stack:
            node, val = stack.pop()
            for user in node.users:
                if user.op != "call_function" or not isinstance(user.target, torch._ops.OpOverload):
                    continue
                if user.target in _LOOKS_AT_STRIDES:
                    return False
                if not _shares_memory(user):
                    continue
                try:
                    out = _replay(user, node, val)
                except (RuntimeError, ValueError):
                    return False
                if isinstance(out, torch.Tensor):
                    stack.append((user, out))
    return True


def _shares_memory(node: Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    return any(r.alias_info is not None for r in schema.returns) and not schema.is_mutable


def _replay(node: Node, changed: Node, val: torch.Tensor) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: val if n is changed else value(n))
    assert callable(node.target)
    return node.target(*args, **kwargs)
