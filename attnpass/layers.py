"""Masks and biases as one tensor that a kernel takes, and the repair of rows without any key.

The layers were collected outermost first; read inwards they are ``where(off, fill, ...)`` and ``... + term``. A kernel
takes either a boolean tensor (True: the key is seen) or a float tensor that is added. Both leave open what a row
without a key gives, so such rows are taken out of the kernel's hands:

    keep  = keep | ~any(keep)          the kernel never sees an empty row
    out   = where(any(keep), out, nan or mean of the values)

which is exact whatever the kernel, and costs a reduction over the mask.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch.fx import Node

from attnpass.arrange import Sizes, arrange
from attnpass.graph import Builder, Shared, is_one, tensor
from attnpass.site import Add, Call, Factor, Fill, Layout, Placed, Site
from attnpass.spec import EmptyRow

aten = torch.ops.aten

# In float32 a score is swallowed by this bias just as by the lowest float, but no kernel's change of base overflows.
FLOOR = -1e30
BLURRED = -1e4  # beside a bias this low float32 keeps less of a log-sum-exp than a fused backward needs
SWALLOWED = -1e8  # ... and this low nothing of an ordinary score
HALF_SWALLOWED = -6e4  # the same where the original adds in float16
FAINT = 2.0**-40  # scores times this leave all probabilities equal


@dataclass(frozen=True, kw_only=True)
class Dense:
    """What a kernel is given, and which rows have to be answered for it."""

    mask: Node | None
    alive: Node | None = None  # True where the row has a key; None when every row has one
    answer: EmptyRow = EmptyRow.IMPOSSIBLE
    scored: Node | None = None  # False where scores do not count: the queries there are taken for next to nothing
    passes: float = 0.0  # the share of the gradient that goes on through such scores all the same


def dense_mask(b: Builder, site: Site, sizes: Sizes, dtype: torch.dtype, shared: Shared) -> Dense:
    """The one tensor that all layers of a site amount to; sites with the same layers read the same tensor."""
    if not site.layers:
        return Dense(mask=None)
    key = ("dense", _alike(site), dtype)
    return shared.all(key, b, lambda: _dense_mask(b, site, sizes, dtype), lambda d: (d.mask, d.alive, d.scored))


def _alike(site: Site) -> Hashable:
    """Equal for sites whose layers amount to the same tensor: axes are told by their part in the attention."""
    roles = site.roles
    parts = (roles.batch, roles.heads, roles.queries, roles.keys)
    name = {atom: (part, at) for part, atoms in enumerate(parts) for at, atom in enumerate(atoms)}
    lengths = tuple(str(site.sizes[atom]) for atom in name)

    def placed(p: Placed) -> Hashable:
        return p.node, tuple(tuple(name.get(atom) for atom in dim) for dim in p.layout)

    layers = [
        (placed(layer.mask), *(getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name != "mask"))
        if isinstance(layer, Fill)
        else (
            placed(layer.tensor),
            layer.factor.number,
            layer.factor.scalars,
            tuple((placed(p), power) for p, power in layer.factor.tensors),
        )
        for layer in site.layers
    ]
    rest = (site.in_order, site.floor, site.rows, site.hollow, site.spec.grad, site.state)
    return tuple(layers), tuple(name.values()), lengths, rest


def _dense_mask(b: Builder, site: Site, sizes: Sizes, dtype: torch.dtype) -> Dense:
    target: Layout = (site.roles.batch, site.roles.heads, site.roles.queries, site.roles.keys)
    fills = [layer for layer in site.layers if isinstance(layer, Fill)]
    if not fills:
        return _added_only(b, site, sizes, target, dtype)
    if site.in_order:
        return _in_order(b, site, sizes, target, dtype)
    return _kept(b, site, sizes, target, dtype, fills)


def as_given(b: Builder, site: Site, sizes: Sizes) -> Node | None:
    """The mask of an existing call, which has one at most."""
    roles = site.roles
    target: Layout = (roles.batch, roles.heads, roles.queries, roles.keys)
    return arrange(b, site.layers[0].placed, target, sizes, expand=False) if site.layers else None


def _keep(b: Builder, fill: Fill, sizes: Sizes, target: Layout) -> Node:
    mask = arrange(b, fill.mask, target, sizes, expand=False)
    val = tensor(mask)
    if val is not None and val.dtype is not torch.bool:
        mask = b.call(aten.ne.Scalar, mask, 0)
    return b.call(aten.logical_not.default, mask) if fill.off else mask


def _all_of(b: Builder, keeps: list[Node]) -> Node:
    """What every one of these masks keeps."""
    return functools.reduce(lambda keep, one: b.call(aten.logical_and.default, keep, one), keeps)


def _kept(b: Builder, site: Site, sizes: Sizes, target: Layout, dtype: torch.dtype, fills: list[Fill]) -> Dense:
    """A keep-mask, with whatever is added where it keeps."""
    keep = _all_of(b, [_keep(b, fill, sizes, target) for fill in fills])
    alive: Node | None = None
    if site.rows is not EmptyRow.IMPOSSIBLE:
        alive, keep = with_empty_rows(b, keep)
    bias = _sum(b, [layer for layer in site.layers if isinstance(layer, Add)], sizes, target)
    if bias is None:
        return keeping(site, keep, alive)
    mask = b.call(aten.where.ScalarOther, keep, _narrow(b, bias, dtype), -math.inf)
    return Dense(mask=mask, alive=alive, answer=site.rows)


def keeping(site: Site, keep: Node, alive: Node | None) -> Dense:
    """A keep-mask alone, which keeps all keys in the rows where `alive` says that there is none.

    Where the scores of such a row do not count the kernel itself answers with the mean (`hushed`).
    """
    if site.rows is EmptyRow.MEAN and alive is not None and (not site.flows or _whole_sequences(site, alive)):
        return Dense(mask=keep, scored=alive, passes=site.flows)
    return Dense(mask=keep, alive=alive, answer=site.rows)


def _whole_sequences(site: Site, alive: Node) -> bool:
    """Whether there is a key does not depend on the query or the head, so the gradient of a key comes from queries
    that all have one, or all have none.
    """
    val = tensor(alive)
    # float16 has no room for gradients as small as `hushed` makes them on the way
    return val is not None and is_one(val.shape[1]) and is_one(val.shape[2]) and site.spec.dtype != "float16"


def with_empty_rows(b: Builder, keep: Node) -> tuple[Node, Node]:
    """Where a row has a key, and the keep-mask with all keys where it has none."""
    alive = b.call(aten.any.dim, keep, -1, True)
    return alive, b.call(aten.logical_or.default, keep, b.call(aten.logical_not.default, alive))


def _added_only(b: Builder, site: Site, sizes: Sizes, target: Layout, dtype: torch.dtype) -> Dense:
    bias = _sum(b, [layer for layer in site.layers if isinstance(layer, Add)], sizes, target)
    assert bias is not None
    if site.rows is EmptyRow.IMPOSSIBLE:
        return Dense(mask=_narrow(b, bias, dtype))
    return _with_low_rows(b, site, bias, dtype)


def _with_low_rows(b: Builder, site: Site, bias: Node, dtype: torch.dtype, filled: Node | None = None) -> Dense:
    """A bias that may leave rows without any ordinary key.

    `filled`: rows all of whose scores have given way to fills, if that cannot be told by how low they are.

    A row of -inf alone is nan (or zero) in the original: the kernel is given zeros there and the row is answered
    afterwards. A row of very low numbers swallows its scores, in the original as in a kernel's forward; but kernels
    keep only log-sum-exp for the backward, and that is swallowed too. Softmax does not change when a row is shifted, so
    such rows are shifted up to zero, with queries of zero in place of the scores that did not count.
    """
    val = tensor(bias)
    assert val is not None
    if site.floor is not None:
        bias = b.call(aten.clamp.default, bias, torch.finfo(val.dtype).min)
    # two finite fills in one place may add up to -inf, in the original as here
    hollow = site.floor is None and (site.in_order or site.rows in (EmptyRow.NAN, EmptyRow.ZERO))
    half = torch.float16 in (val.dtype, dtype)  # its lowest number does not swallow what a kernel adds in float32
    # raising the bias to a kernel's floor would make -inf and the lowest number of such a row alike
    shift = site.spec.grad or half or _floored_for(val, dtype) or any(v > FLOOR for v in _finite(site))
    if not hollow and not shift:
        return Dense(mask=_narrow(b, bias, dtype))
    top = b.call(aten.amax.default, bias, [-1], True)
    scored: Node | None = None
    if shift:
        silent = b.call(aten.le.Scalar, top, HALF_SWALLOWED if val.dtype == torch.float16 else SWALLOWED)
        if filled is not None:
            silent = b.call(aten.logical_or.default, silent, filled)
        scored = b.call(aten.logical_not.default, silent)
        shifted = b.call(aten.sub.Tensor, bias, b.call(aten.detach.default, top))
        bias = b.call(aten.where.self, b.call(aten.le.Scalar, top, BLURRED), shifted, bias)
    alive: Node | None = None
    if hollow and site.hollow is EmptyRow.NAN:
        # softmax of a row that holds plus infinity is no number either; not every kernel says so
        alive = b.call(aten.lt.Scalar, b.call(aten.abs.default, top), math.inf)
    elif hollow:
        alive = b.call(aten.ne.Scalar, top, -math.inf)
    if alive is not None:
        bias = b.call(aten.where.ScalarOther, alive, bias, 0.0)
    answer = site.hollow if hollow else EmptyRow.IMPOSSIBLE
    return Dense(mask=_narrow(b, bias, dtype), alive=alive, answer=answer, scored=scored)


def _finite(site: Site) -> list[float]:
    """The fills that are numbers."""
    return [f.value for f in site.layers if isinstance(f, Fill) and math.isfinite(f.value)]


def _in_order(b: Builder, site: Site, sizes: Sizes, target: Layout, dtype: torch.dtype) -> Dense:
    """Fills and terms one after the other, as the original has them, on scores of zero.

    Exact because a fill swallows the score in its place; rows of nothing but fills are put right below.
    """
    bias: Node | None = None
    keeps: list[Node] = []
    for layer in reversed(site.layers):
        if isinstance(layer, Add):
            bias = _plus(b, bias, _term(b, layer, sizes, target))
            continue
        keep = _keep(b, layer, sizes, target)
        keeps.append(keep)
        # in the dtype of the scores, whose rounding decides what a later term can still tell apart
        if bias is None:
            bias = b.call(aten.scalar_tensor.default, 0.0, dtype=layer.dtype, device=_device(keep))
        elif tensor(bias).dtype != layer.dtype:  # type: ignore[union-attr]
            bias = b.call(aten.to.dtype, bias, layer.dtype)
        bias = b.call(aten.where.ScalarOther, keep, bias, layer.value)
    assert bias is not None
    filled: Node | None = None
    if any(v > FLOOR for v in _finite(site)):
        # float16's lowest number swallows no score that is added to it in float32, but here it stands in its place
        filled = b.call(aten.logical_not.default, b.call(aten.any.dim, _all_of(b, keeps), -1, True))
    return _with_low_rows(b, site, bias, dtype, filled)


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
    both weigh nothing, and rows without any score were shifted or answered before.
    """
    val = tensor(bias)
    assert val is not None
    if _floored_for(val, dtype):
        bias = b.call(aten.clamp.default, bias, max(FLOOR, torch.finfo(dtype).min))
    return bias if val.dtype == dtype else b.call(aten.to.dtype, bias, dtype)


def _floored_for(bias: torch.Tensor, dtype: torch.dtype) -> bool:
    """The kernel needs the bias raised to its floor."""
    return bias.device.type != "cpu" or torch.finfo(bias.dtype).min < torch.finfo(dtype).min


def hushed(b: Builder, dense: Dense, q: Node, k: Node) -> tuple[Node, Node]:
    """Queries whose scores are all equal where they do not count, so that the kernel answers with the mean.

    With queries of zero the scores get no gradient, as behind a fill. An addition lets it through (`passes`): there

        q  is made so small, by a power of two, that all probabilities are equal, but its gradient is left as it is
        k  stays, and its gradient, to which the kernel has put that small q, is made as large again

    All factors are powers of two, so nothing is rounded, and numbers far smaller than these are still float32 and
    bfloat16.
    """
    if dense.scored is None:
        return q, k
    if not dense.passes:
        return b.call(aten.where.ScalarOther, dense.scored, q, 0.0), k
    return _faded(b, dense, q, FAINT, 1.0), _faded(b, dense, k, 1.0, 1.0 / FAINT)


def _faded(b: Builder, dense: Dense, x: Node, factor: float, gradient: float) -> Node:
    """`x` times a factor where scores do not count, and its gradient times another one."""
    still = b.call(aten.detach.default, x)
    nothing = b.call(aten.sub.Tensor, x, still)  # but for its gradient
    other = b.call(aten.add.Tensor, _times(b, still, factor), _times(b, nothing, gradient * dense.passes))
    return b.call(aten.where.self, dense.scored, x, other)


def _times(b: Builder, x: Node, factor: float) -> Node:
    return x if factor == 1.0 else b.call(aten.mul.Scalar, x, factor)


def answered(b: Builder, out: Node, call: Call, dense: Dense, sizes: Sizes, site: Site) -> Node:
    """The kernel's result with the rows without a key as the original has them."""
    if dense.alive is None:
        return out
    if dense.answer is EmptyRow.NAN:
        return b.call(aten.where.ScalarOther, dense.alive, out, math.nan)
    if dense.answer is EmptyRow.ZERO:
        return b.call(aten.where.ScalarOther, dense.alive, out, 0.0)
    mean = b.call(aten.mean.dim, call.v, [2], True)
    if call.groups > 1:
        mean = b.call(aten.repeat_interleave.self_int, mean, call.groups, 1)
    if site.flows:
        mean = b.call(aten.add.Tensor, mean, _first_order(b, call, sizes, site))
    return b.call(aten.where.self, dense.alive, out, mean)


def _first_order(b: Builder, call: Call, sizes: Sizes, site: Site) -> Node:
    """Zero, with the gradient (or a share of it) that an additive mask lets through to q and k in a row without a key.

    There all probabilities are 1/n, and the original's backward sends dS = (1/n) dO (v - mean v) on into the scores.
    The same gradient belongs to the linear term of softmax around equal scores,

        (scale / n) * sum_j (v_j - mean v) (k_j . q)

    taken for q and k (v held still) and then subtracted from itself, which costs two small products.
    """
    still = b.call(aten.detach.default, call.v)
    centred = b.call(aten.sub.Tensor, still, b.call(aten.mean.dim, still, [2], True))
    across = b.call(aten.matmul.default, b.call(aten.transpose.int, call.k, -1, -2), centred)
    if call.groups > 1:
        across = b.call(aten.repeat_interleave.self_int, across, call.groups, 1)
    across = b.call(aten.div.Scalar, across, sizes.dim(site.roles.keys))
    term = _times(b, b.call(aten.mul.Scalar, b.call(aten.matmul.default, call.q, across), call.scale), site.flows)
    return b.call(aten.sub.Tensor, term, b.call(aten.detach.default, term))
