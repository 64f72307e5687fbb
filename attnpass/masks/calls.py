"""The mask of a scaled_dot_product_attention call that is in the graph already, as terms over its scores."""

from __future__ import annotations

from torch.fx import Node

from attnpass.masks.division import divmod_
from attnpass.masks.expr import ONE, TRUE, ZERO, Bool, Poly
from attnpass.masks.frame import Frame, frame
from attnpass.masks.lift import bind, tensor_of
from attnpass.masks.logic import ge
from attnpass.masks.sizes import Sizes
from attnpass.masks.terms import Term


def terms_of_call(node: Node, sizes: Sizes) -> tuple[Frame, tuple[Term, ...], Bool]:
    """The axes of the call's scores, its mask, and what is_causal keeps. Axes before the heads are one batch."""
    args = bind(node)
    query, key = tensor_of(args["query"]), tensor_of(args["key"])
    lead = list(query.shape[:-2])
    for size in (*lead, query.shape[-2], key.shape[-2]):
        sizes.length(size)
    batch = ONE
    for size in lead[:-1]:
        batch = batch * sizes.poly(size)
    heads = sizes.poly(lead[-1]) if lead else ONE
    axes = frame(sizes, batch, heads, query.shape[-2], key.shape[-2])
    rest, index = axes.b, [axes.h] if lead else []
    for size in reversed(lead[1:-1]):
        rest, at = divmod_(rest, sizes.poly(size))
        index.insert(0, at)
    full = ([rest] if len(lead) > 1 else []) + index + [axes.i, axes.j]
    # is_causal counts from the top, whatever the lengths
    keep = ge(axes.i - axes.j) if args.get("is_causal") else TRUE
    mask = args.get("attn_mask", args.get("attn_bias"))
    if not isinstance(mask, Node):
        return axes, (), keep
    val = tensor_of(mask)
    shape = [sizes.poly(size) for size in val.shape]
    at_mask: list[Poly] = [
        ZERO if n.value == 1 else k for n, k in zip(shape, full[len(full) - len(shape) :], strict=True)
    ]
    return axes, (Term(node=mask, index=tuple(at_mask), off=None if val.dtype.is_floating_point else False),), keep
