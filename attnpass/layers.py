"""Masks and biases as one tensor that a kernel takes, and the repair of rows without any key.

The layers were collected outermost first; read inwards they are ``where(off, fill, ...)`` and ``... + term``. A kernel
takes either a boolean tensor (True: the key is seen) or a float tensor that is added. Both leave open what a row
without a key gives, so such rows are taken out of the kernel's hands:

    keep  = keep | ~any(keep)          the kernel never sees an empty row
    out   = where(any(keep), out, nan or mean of the values)

which is exact whatever the kernel, and costs a reduction over the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from attnpass.arrange import Sizes, arrange
from attnpass.graph import Builder, tensor
from attnpass.site import Add, Factor, Fill, Layout, Site
from attnpass.spec import EmptyRow

aten = torch.ops.aten

# In float32 a score is swallowed by this bias just as by the lowest float, but no kernel's change of base overflows.
FLOOR = -1e30


@dataclass(frozen=True, kw_only=True)
class Dense:
    """What a kernel is given, and which rows have to be answered for it."""

    mask: Node | None
    alive: Node | None = None  # True where the row has a key; None when every row has one
    answer: EmptyRow = EmptyRow.IMPOSSIBLE


def dense_mask(b: Builder, site: Site, sizes: Sizes, dtype: torch.dtype) -> Dense:
    """The one tensor that all layers of a site amount to."""
    if not site.layers:
        return Dense(mask=None)
    target: Layout = (site.roles.batch, site.roles.heads, site.roles.queries, site.roles.keys)
    fills = [layer for layer in site.layers if isinstance(layer, Fill)]
    if not fills:
        return _added_only(b, site, sizes, target, dtype)
    last = max(i for i, layer in enumerate(site.layers) if isinstance(layer, Fill))
    outside = any(isinstance(layer, Add) for layer in site.layers[:last])
    if outside and not math.isinf(fills[0].value):
        return _in_order(b, site, sizes, target, dtype)
    return _kept(b, site, sizes, target, dtype, fills)


def _keep(b: Builder, fill: Fill, sizes: Sizes, target: Layout) -> Node:
    mask = arrange(b, fill.mask, target, sizes, expand=False)
    val = tensor(mask)
    if val is not None and val.dtype is not torch.bool:
        mask = b.call(aten.ne.Scalar, mask, 0)
    return b.call(aten.logical_not.default, mask) if fill.off else mask


def _kept(b: Builder, site: Site, sizes: Sizes, target: Layout, dtype: torch.dtype, fills: list[Fill]) -> Dense:
    """A keep-mask, with whatever is added where it keeps."""
    keep: Node | None = None
    for fill in fills:
        one = _keep(b, fill, sizes, target)
        keep = one if keep is None else b.call(aten.logical_and.default, keep, one)
    assert keep is not None
    alive: Node | None = None
    if site.spec.empty_rows is not EmptyRow.IMPOSSIBLE:
        alive = b.call(aten.any.dim, keep, -1, True)
        keep = b.call(aten.logical_or.default, keep, b.call(aten.logical_not.default, alive))
    bias = _sum(b, [layer for layer in site.layers if isinstance(layer, Add)], sizes, target)
    if bias is None:
        mask = keep
    else:
        narrow = _narrow(b, bias, dtype)
        mask = b.call(aten.where.ScalarOther, keep, narrow, -math.inf)
    return Dense(mask=mask, alive=alive, answer=site.spec.empty_rows)


def _added_only(b: Builder, site: Site, sizes: Sizes, target: Layout, dtype: torch.dtype) -> Dense:
    bias = _sum(b, [layer for layer in site.layers if isinstance(layer, Add)], sizes, target)
    assert bias is not None
    alive: Node | None = None
    if site.spec.empty_rows is EmptyRow.NAN:
        # a row of -inf alone is nan in the original; the kernel is given zeros there and the row is answered below
        alive = b.call(aten.ne.Scalar, b.call(aten.amax.default, bias, [-1], True), -math.inf)
        bias = b.call(aten.where.ScalarOther, alive, bias, 0.0)
    return Dense(mask=_narrow(b, bias, dtype), alive=alive, answer=site.spec.empty_rows)


def _in_order(b: Builder, site: Site, sizes: Sizes, target: Layout, dtype: torch.dtype) -> Dense:
    """Terms added outside a finite fill: fill and terms are summed as the original does, scores being swallowed."""
    bias: Node | None = None
    for layer in reversed(site.layers):
        if isinstance(layer, Add):
            bias = _plus(b, bias, _term(b, layer, sizes, target))
            continue
        keep = _keep(b, layer, sizes, target)
        if bias is None:
            zero = b.call(aten.scalar_tensor.default, 0.0, dtype=torch.float32, device=_device(keep))
            bias = b.call(aten.where.ScalarOther, keep, zero, layer.value)
        else:
            bias = b.call(aten.where.ScalarOther, keep, bias, layer.value)
    assert bias is not None
    # two finite fills in one place add up to -inf, in the original as here
    alive = b.call(aten.ne.Scalar, b.call(aten.amax.default, bias, [-1], True), -math.inf)
    bias = b.call(aten.where.ScalarOther, alive, bias, 0.0)
    return Dense(mask=_narrow(b, bias, dtype), alive=alive, answer=EmptyRow.NAN)


def _device(node: Node) -> torch.device:
    val = tensor(node)
    assert val is not None
    return val.device


def _sum(b: Builder, adds: list[Add], sizes: Sizes, target: Layout) -> Node | None:
    total: Node | None = None
    for layer in reversed(adds):
        total = _plus(b, total, _term(b, layer, sizes, target))
    return total


def _plus(b: Builder, a: Node | None, c: Node) -> Node:
    return c if a is None else b.call(aten.add.Tensor, a, c)


def _term(b: Builder, layer: Add, sizes: Sizes, target: Layout) -> Node:
    node = arrange(b, layer.tensor, target, sizes, expand=False)
    val = tensor(node)
    if val is not None and not val.is_floating_point():
        node = b.call(aten.to.dtype, node, torch.float32)
    return multiplied(b, node, layer.factor, sizes, target)


def multiplied(b: Builder, node: Node, factor: Factor, sizes: Sizes, target: Layout) -> Node:
    """`node` (already of layout `target`) times a factor."""
    if factor.number != 1.0:
        node = b.call(aten.mul.Tensor, node, factor.number)
    for scalar, power in factor.scalars:
        node = b.call(aten.mul.Tensor if power > 0 else aten.div.Tensor, node, scalar)
    for placed, power in factor.tensors:
        other = arrange(b, placed, target, sizes, expand=False)
        node = b.call(aten.mul.Tensor if power > 0 else aten.div.Tensor, node, other)
    return node


def _narrow(b: Builder, bias: Node, dtype: torch.dtype) -> Node:
    """The bias in the kernel's dtype, no lower than a floor that every kernel can compute with.

    On CUDA torch's fused kernels change the base of the exponential, which takes the lowest float to -inf and a row
    of it to 0; the floor gives the mean, as the original does. A -inf may be raised to the floor too: beside a score
    both weigh nothing, and rows without any score were answered before.
    """
    val = tensor(bias)
    assert val is not None
    if val.device.type != "cpu" or torch.finfo(val.dtype).min < torch.finfo(dtype).min:
        bias = b.call(aten.clamp.default, bias, max(FLOOR, torch.finfo(dtype).min))
    return bias if val.dtype == dtype else b.call(aten.to.dtype, bias, dtype)


def answered(b: Builder, out: Node, v: Node, dense: Dense, groups: int) -> Node:
    """The kernel's result with the rows without a key as the original has them."""
    if dense.alive is None:
        return out
    if dense.answer is EmptyRow.NAN:
        return b.call(aten.where.ScalarOther, dense.alive, out, math.nan)
    if dense.answer is EmptyRow.ZERO:
        return b.call(aten.where.ScalarOther, dense.alive, out, 0.0)
    mean = b.call(aten.mean.dim, v, [2], True)
    if groups > 1:
        mean = b.call(aten.repeat_interleave.self_int, mean, groups, 1)
    return b.call(aten.where.self, dense.alive, out, mean)
