"""Calls of scaled_dot_product_attention that are in the graph already, as sites like any other.

    k (8 heads) ── expand ── reshape (32 heads) ──┐
    mask (dense, computed) ───────────────────────┴── scaled_dot_product_attention(q, k, v, mask)

The call is a fused kernel already, but it may be told more than it needs: heads that were repeated for it, a mask
that is known to be causal. So its axes are named and its operands are read back like those of hand-written attention.
Whether there is anything to gain is decided after the proof of the masks (:mod:`attnpass.gain`).

What a call means is taken from torch's documentation: the last two axes are length and width, those before broadcast,
the last of them are the heads; `enable_gqa` repeats every key/value head contiguously; a boolean mask keeps where it
is True, any other is added; `is_causal` keeps j <= i, counted from the start of both, whatever the lengths. Calls about
which anything is uncertain are only recorded.

Where it is certain that torch takes its unfused form, the call is attention written by hand in all but name (T5: heads
innermost in the mask, so that no kernel reads it), and a site like that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import dtype_text, is_one, same, size_text, state_of, tensor
from attnpass.recognize.assemble import STREAM, Place
from attnpass.recognize.axes import Axes, atoms
from attnpass.recognize.gradients import asked
from attnpass.recognize.meaning import Meaning, describe_layers
from attnpass.recognize.operands import Candidate, Reach, candidates, cheapest, fewest_axes
from attnpass.recognize.ops import bound, op_name
from attnpass.recognize.recorded import recorded
from attnpass.recognize.softmax import Anchor
from attnpass.site import Add, Atom, Dim, Factor, Fill, Layer, Layout, Placed, Roles, Site
from attnpass.spec import AttentionSpec, EmptyRow, Size


def existing_call(anchor: Anchor, place: Place) -> Site:
    """The site of a call, or Refuse where its arguments are not of the documented form."""
    record = recorded(anchor.node, place)
    if op_name(anchor.node) != "scaled_dot_product_attention" or place.picks_kernels:
        return record
    try:
        return _site(anchor.node, place)
    except Refuse:
        return record


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments of one call and their values; the rest of the module need not doubt them."""

    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    tq: torch.Tensor
    tk: torch.Tensor
    tv: torch.Tensor
    out: torch.Tensor
    scale: float
    dropout: float
    causal: bool
    grouped: bool

    @property
    def outer(self) -> Sequence[Any]:
        """The sizes of the axes before length and width, broadcast."""
        return self.out.shape[:-2]


def _read(node: Node) -> _Call:
    args = bound(node)
    q, k, v, mask, p, scale = (args[name] for name in ("query", "key", "value", "attn_mask", "dropout_p", "scale"))
    causal, grouped = bool(args["is_causal"]), bool(args["enable_gqa"])
    tq, tk, tv, out = tensor(q), tensor(k), tensor(v), tensor(node)
    if tq is None or tk is None or tv is None or out is None or (mask is not None and tensor(mask) is None):
        raise _unsure(node, "an argument that is no tensor")
    if scale is None:
        scale = tq.shape[-1] ** -0.5 if isinstance(tq.shape[-1], int) else None
    if not isinstance(scale, int | float) or not isinstance(p, int | float):
        raise _unsure(node, "a symbolic number")
    if causal and mask is not None:
        raise _unsure(node, "a mask beside is_causal")  # not allowed, and not told by every kernel
    # under autocast the call itself narrows what it reads
    if {tk.dtype, tv.dtype, out.dtype} != {tq.dtype} or not tq.is_floating_point():
        raise _unsure(node, "unlike dtypes")
    given = tensor(mask) if mask is not None else None
    if given is not None and not (given.dtype is torch.bool or given.is_floating_point()):
        raise _unsure(node, "a mask of integers")
    if any(t.layout is not torch.strided for t in (tq, tk, tv)):
        raise _unsure(node, "a tensor of another layout")
    if len({t.device for t in (tq, tk, tv, given) if t is not None}) > 1:
        raise Refuse("mixed_devices", node)
    if min(t.dim() for t in (tq, tk, tv)) < 2:
        raise _unsure(node, "a vector")
    pairs = ((tq.shape[-1], tk.shape[-1]), (tk.shape[-2], tv.shape[-2]), (out.shape[-2], tq.shape[-2]))
    if not all(same(a, b) for a, b in (*pairs, (out.shape[-1], tv.shape[-1]))):
        raise _unsure(node, "sizes that do not match")
    return _Call(
        node=node,
        q=q,
        k=k,
        v=v,
        mask=mask,
        tq=tq,
        tk=tk,
        tv=tv,
        out=out,
        scale=float(scale),
        dropout=float(p),
        causal=causal,
        grouped=grouped,
    )


def _unsure(node: Node, detail: str) -> Refuse:
    return Refuse("unknown_arguments", node, op="scaled_dot_product_attention", detail=detail)


def _site(node: Node, place: Place) -> Site:
    call, effects = _read(node), place.effects
    state = state_of(node, place.default)
    if state.functorch:
        raise Refuse("functorch", node)
    axes = Axes()
    outer = axes.of_shape(call.outer)
    sizes = (call.tq.shape[-2], call.tk.shape[-2], call.tq.shape[-1], call.tv.shape[-1])
    queries, keys, width, v_width = (axes.new(size) for size in sizes)
    if not keys:
        raise Refuse("single_key", node)
    q_layout = (*axes.align(outer, call.tq.shape[:-2], call.outer), queries, width)
    k_layout = (*_shared(call, call.tk, outer, axes), keys, width)
    v_layout = (*_shared(call, call.tv, outer, axes), keys, v_width)

    reach = Reach(axes=axes, effects=effects, stop=effects.position[node], state=state, default=place.default)
    ks = _readings(call.k, k_layout, node, reach)
    vs = _readings(call.v, v_layout, node, reach)
    # reading further back may have cut axes finer: from here on everything is said in the finest
    outer, q_layout = axes.resolve(outer), axes.resolve(q_layout)
    queries, keys, width, v_width = (axes.resolve_dim(dim) for dim in (queries, keys, width, v_width))
    heads = outer[-1] if outer else ()
    group = _group(heads, atoms(q_layout), fewest_axes(ks, axes) | fewest_axes(vs, axes))
    roles = Roles(
        batch=tuple(a for dim in outer[:-1] for a in dim),
        heads=heads,
        group=group,
        queries=queries,
        keys=keys,
        width=width,
        v_width=v_width,
    )
    k = _unrepeated(ks, (roles.batch, roles.shared, keys, width), group, axes)
    v = _unrepeated(vs, (roles.batch, roles.shared, keys, v_width), group, axes)
    layers = _layers(call, (*outer, queries, keys), axes)
    grad = any(asked(x, state) for x in (call.q, call.k, call.v))
    masks = describe_layers(layers, effects, call.tq.dtype, roles, axes, state, grad=grad, floored=False)
    by_hand = _unfused(call) and all(bias.exact for bias in masks.bias)
    spec = _spec(call, roles, masks, axes, grad=grad, by_hand=by_hand)
    assumptions = STREAM if call.dropout else ()
    if by_hand:
        assumptions = (*assumptions, *masks.assumptions, *(() if state.strides_hold else (LAYOUT,)))
    elif spec.empty_rows is EmptyRow.ZERO and all(isinstance(x, Fill) for x in layers) and spec.device != "cpu":
        assumptions = (*assumptions, DEFINED)
    return Site(
        anchor=node,
        output=node,
        output_layout=(*outer, queries, v_width),
        q=Placed(call.q, q_layout),
        k=k,
        v=v,
        sizes=axes.size,
        roles=roles,
        scale=Factor(call.scale),
        layers=layers,
        in_order=by_hand and masks.in_order,
        hollow=EmptyRow.ZERO if by_hand else EmptyRow.NAN,
        causal=call.causal,
        softcap=None,
        sink=None,
        dropout=call.dropout,
        spec=dataclasses.replace(spec, inference=state.inference),
        region=(node,),
        state=state,
        output_written=effects.written(node),
        assumptions=assumptions,
        obstacles=masks.obstacles if by_hand else (),
        existing_call=not by_hand,
    )


# Where no fused kernel of torch is chosen for a mask whose keys do not lie side by side in memory.
_SIDE_BY_SIDE = frozenset({"cuda"})
DEFINED = "a query without any key gets zeros, as torch lays down for a boolean mask (its cuDNN kernel does not)"
LAYOUT = "the mask of this call is laid out in memory as it was when the program was traced"


def _unfused(call: _Call) -> bool:
    """Torch takes its unfused form for this call, which gives 0 where a mask of -inf leaves a query no key."""
    mask = None if call.mask is None else tensor(call.mask)
    if mask is None or mask.device.type not in _SIDE_BY_SIDE or mask.dim() < 2 or call.dropout != 0.0:
        return False
    stride = mask.stride(-1)
    return isinstance(stride, int) and stride != 1 and not is_one(mask.shape[-1])


def _shared(call: _Call, t: torch.Tensor, outer: Layout, axes: Axes) -> Layout:
    """The outer axes of k or v: broadcast, and with `enable_gqa` fewer heads, each of them for a run of query heads."""
    shape, full = t.shape[:-2], call.outer
    if not call.grouped or not shape or is_one(shape[-1]) or same(shape[-1], full[-1]):
        return axes.align(outer, shape, full)
    # query head h reads head h // times, so h is (head, copy), major first
    major, _ = axes.regroup((axes.resolve_dim(outer[-1]),), (shape[-1], full[-1] // shape[-1]))
    return (*axes.align(outer[:-1], shape[:-1], full[:-1]), major)


def _readings(arg: Node, layout: Layout, call: Node, reach: Reach) -> list[Candidate]:
    """The argument itself, and what it was made from by views alone: the same numbers, in fewer heads perhaps.

    Unlike in hand-written attention no cast and no scaling is undone: the call computes what it is asked for.
    """
    itself = candidates(arg, layout, call, reach)[0]
    try:
        if reach.effects.value_at(arg, call) is not arg:
            return [itself]
    except Refuse:
        return [itself]
    found = candidates(arg, layout, call, reach)
    return [c for c in found if not c.folded and c.dtype == itself.dtype]


def _group(heads: Dim, in_q: frozenset[Atom], needed: frozenset[Atom]) -> Dim:
    """The innermost head axes on which neither k nor v depends: a fused call shares heads in contiguous runs."""
    count = 0
    for atom in reversed(heads):
        if atom in needed or atom not in in_q:
            break
        count += 1
    return heads[len(heads) - count :]


def _unrepeated(found: list[Candidate], target: Layout, group: Dim, axes: Axes) -> Placed:
    """Where to read k or v: as the call does if it does not repeat heads, else before they are repeated."""
    fitting = [c for c in found if not atoms(axes.resolve(c.placed.layout)) & set(group)]
    best = found[0] if found[0] in fitting else cheapest(fitting, target, axes)
    return Placed(best.placed.node, axes.resolve(best.placed.layout))


def _layers(call: _Call, scores: Layout, axes: Axes) -> tuple[Layer, ...]:
    if call.mask is None:
        return ()
    val = tensor(call.mask)
    assert val is not None
    full = (*call.outer, call.tq.shape[-2], call.tk.shape[-2])
    placed = Placed(call.mask, axes.align(scores, val.shape, full))
    if val.dtype is torch.bool:
        return (Fill(placed, off=False, value=-math.inf, dtype=call.tq.dtype),)
    return (Add(placed, Factor(), call.tq.dtype),)


def _spec(call: _Call, roles: Roles, masks: Meaning, axes: Axes, *, grad: bool, by_hand: bool) -> AttentionSpec:
    def size(part: tuple[Atom, ...]) -> Size:
        return size_text(axes.dim_size(part))

    groups = axes.dim_size(roles.group)
    if not isinstance(groups, int):
        raise _unsure(call.node, "a symbolic number of heads")
    rows = EmptyRow.IMPOSSIBLE if call.mask is None else EmptyRow.ZERO
    if by_hand and masks.empty is not EmptyRow.NAN:
        rows = masks.empty
    batch, shared = size(roles.batch), size(roles.shared)
    return AttentionSpec(
        q=(batch, size(roles.heads), size(roles.queries), size(roles.width)),
        k=(batch, shared, size(roles.keys), size(roles.width)),
        v=(batch, shared, size(roles.keys), size(roles.v_width)),
        dtype=dtype_text(call.tq.dtype),
        device=call.tq.device.type,
        scale=call.scale,
        groups=groups,
        mask=dataclasses.replace(masks.mask, causal=0 if call.causal else None),
        bias=masks.bias,
        dropout=call.dropout,
        empty_rows=rows,
        grad=grad,
    )
