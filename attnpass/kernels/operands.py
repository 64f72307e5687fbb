"""q, k, v and masks brought into the form that kernels read: rows contiguous, widths padded, shared heads copied.

Each of these is exact: zeros appended to a width add nothing to a score, and the columns that they make are cut off.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from attnpass.graph import Builder, is_one, tensor
from attnpass.site import Call

aten = torch.ops.aten
ALIGNED = 8  # elements, which are at least the sixteen bytes of one load


def rows_contiguous(b: Builder, node: Node) -> Node:
    """Fused kernels want the last dimension contiguous; without it torch silently takes its unfused form."""
    val = tensor(node)
    assert val is not None
    last = val.stride(-1)
    return node if isinstance(last, int) and last == 1 else b.call(aten.contiguous.default, node)


def heads_repeated(b: Builder, node: Node, groups: int) -> Node:
    """Heads of k or v for a kernel that shares none: a copy that is still far smaller than the scores."""
    return node if groups == 1 else b.call(aten.repeat_interleave.self_int, node, groups, 1)


def widened(b: Builder, node: Node, multiple: int) -> Node:
    """The width filled up with zeros to a multiple."""
    val = tensor(node)
    assert val is not None
    more = -val.shape[-1] % multiple
    return b.call(aten.constant_pad_nd.default, node, [0, more]) if more else node


def one_width(b: Builder, q: Node, k: Node, v: Node) -> tuple[Node, Node, Node]:
    """q and k, or v, filled up with zeros to the wider of both; symbolic widths are left as they are."""
    tk, tv = tensor(k), tensor(v)
    assert tk is not None
    assert tv is not None
    if not isinstance(tk.shape[-1], int) or not isinstance(tv.shape[-1], int):
        return q, k, v
    more = tv.shape[-1] - tk.shape[-1]
    if more > 0:
        return b.call(aten.constant_pad_nd.default, q, [0, more]), b.call(aten.constant_pad_nd.default, k, [0, more]), v
    return (q, k, b.call(aten.constant_pad_nd.default, v, [0, -more])) if more else (q, k, v)


def narrowed(b: Builder, out: Node, width: int | str) -> Node:
    """The result without the columns that padding made; a symbolic width was never padded."""
    val = tensor(out)
    assert val is not None
    padded = isinstance(width, int) and val.shape[-1] != width
    return b.call(aten.slice.Tensor, out, -1, 0, width) if padded else out


def keys_contiguous(b: Builder, call: Call) -> Node | None:
    """The mask laid out along the keys, also where it is the same for all of them. CUDA kernels need it: torch's choice
    falls to its unfused form without, and cuDNN, called by itself, reads beyond the mask.
    """
    val = tensor(call.mask) if call.mask is not None else None
    if call.mask is None or val is None:
        return call.mask
    if is_one(val.shape[-1]):
        wide = b.call(aten.expand.default, call.mask, [-1, -1, -1, b.size(call.k, 2)])
        return b.call(aten.contiguous.default, wide)
    return rows_contiguous(b, call.mask)


def loadable(b: Builder, node: Node) -> Node:
    """It loads sixteen bytes at a time, and heads that many batch rows share by a stride of zero have been read wrong
    (pytorch#191937): such are copied.
    """
    val = tensor(node)
    assert val is not None
    offset = val.storage_offset()
    broadcast = any(
        isinstance(s, int) and s == 0 and not is_one(n) for n, s in zip(val.shape, val.stride(), strict=True)
    )
    if not broadcast and not (isinstance(offset, int) and offset % ALIGNED):
        return node
    return b.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def upright(b: Builder, call: Call) -> tuple[Node, float | Node]:
    """Queries and a scale above zero: these kernels look for the greatest score before they scale, which is the least
    one where the scale is negative; and zero times the -inf of a masked score is no number.
    """
    scale = call.scale
    if isinstance(scale, Node) or scale > 0:
        return call.q, scale
    if scale == 0:
        return b.call(aten.mul.Tensor, call.q, 0.0), 1.0
    return b.call(aten.neg.default, call.q), -scale
