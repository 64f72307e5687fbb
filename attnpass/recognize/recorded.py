"""Fused calls of which only a record is made: what they compute, read from their arguments, and no place to rewrite.

Kernels that the program names itself (``_scaled_dot_product_flash_attention`` and its like) are its own choice; of
other calls, those that :mod:`attnpass.recognize.existing` is not sure about end here. The spec is for the report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import State, dtype_text, size_text, state_of, tensor
from attnpass.reasons import reason
from attnpass.recognize.assemble import Place
from attnpass.recognize.axes import Axes
from attnpass.recognize.gradients import asked
from attnpass.recognize.ops import bound, op_name
from attnpass.site import Factor, Layout, Placed, Roles, Site
from attnpass.spec import AttentionSpec, BiasSpec, EmptyRow, MaskSpec, Size


def recorded(node: Node, place: Place) -> Site:
    """A site that stays as it is, or Refuse where the arguments are not of the documented form."""
    args = bound(node)
    q, k, v = (args[name] for name in ("query", "key", "value"))
    tq, tk, tv = tensor(q), tensor(k), tensor(v)
    if tq is None or tk is None or tv is None or tq.dim() < 2:
        raise Refuse("unknown_arguments", node, op=op_name(node), detail="not three tensors")
    if any(isinstance(size, int) and size == 0 for t in (tq, tk, tv) for size in t.shape):
        raise Refuse("empty_tensor", node)
    state = state_of(node, place.default)
    mask_arg = args.get("attn_mask", args.get("attn_bias"))
    mask, bias, empty = _mask(mask_arg, bool(args.get("is_causal")), state)
    scale = args.get("scale")
    known: Any = scale if scale is not None else tq.shape[-1] ** -0.5
    q_shape, k_shape, v_shape = _canonical(tq), _canonical(tk), _canonical(tv)
    groups = 1
    if isinstance(q_shape[1], int) and isinstance(k_shape[1], int) and k_shape[1] and q_shape[1] % k_shape[1] == 0:
        groups = q_shape[1] // k_shape[1]
    p = args.get("dropout_p", 0.0)
    spec = AttentionSpec(
        q=q_shape,
        k=k_shape,
        v=v_shape,
        dtype=dtype_text(tq.dtype),
        device=tq.device.type,
        scale=float(known) if isinstance(known, int | float) else str(known),
        groups=groups,
        mask=mask,
        bias=bias,
        dropout=float(p) if isinstance(p, int | float) else str(p),
        empty_rows=empty,
        grad=any(asked(x, state) for x in (q, k, v)),
    )
    nothing: Layout = ()
    return Site(
        anchor=node,
        output=node,
        output_layout=nothing,
        q=Placed(q, nothing),
        k=Placed(k, nothing),
        v=Placed(v, nothing),
        sizes=Axes().size,
        roles=Roles(batch=(), heads=(), group=(), queries=(), keys=(), width=(), v_width=()),
        scale=Factor(float(known)) if isinstance(known, int | float) else Factor(),
        layers=(),
        softcap=None,
        sink=None,
        dropout=p,
        spec=spec,
        region=(node,),
        state=state,
        obstacles=(reason("already_fused"),),
        existing_call=True,
    )


def _canonical(t: torch.Tensor) -> tuple[Size, ...]:
    """(batch, heads, length, width): leading axes beyond four are merged into the batch, missing ones are one."""
    shape = list(t.shape)
    while len(shape) < 4:
        shape.insert(0, 1)
    batch: Any = 1
    for size in shape[:-3]:
        batch = batch * size
    return tuple(size_text(s) for s in (batch, *shape[-3:]))


def _mask(arg: Any, causal: bool, state: State) -> tuple[MaskSpec, tuple[BiasSpec, ...], EmptyRow]:
    start = 0 if causal else None  # is_causal is aligned top-left, whatever the lengths
    val = tensor(arg) if isinstance(arg, Node) else None
    if val is None:
        return MaskSpec(causal=start), (), EmptyRow.IMPOSSIBLE
    if val.dtype is torch.bool:
        return MaskSpec(causal=start, dense=True), (), EmptyRow.ZERO
    bias = BiasSpec(shape=_canonical(val), dtype=dtype_text(val.dtype), grad=asked(arg, state))
    return MaskSpec(causal=start), (bias,), EmptyRow.ZERO
