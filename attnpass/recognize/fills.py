"""Masks in the scores: what stands in place of a score where a mask is off.

    masked_fill   where   scores[mask] = fill   scores * m + fill * (1 - m)   a floor at the lowest number

Each is a layer over the scores further in, with the number that softmax will see there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from attnpass.aside import aside
from attnpass.errors import Refuse
from attnpass.graph import dtype_text, same, tensor
from attnpass.recognize import views
from attnpass.recognize.indicators import computed_alike, is_indicator, one_minus
from attnpass.recognize.inner import Inner
from attnpass.recognize.ops import bound, number_in, op_name, pair
from attnpass.recognize.ranges import holds, less_range
from attnpass.recognize.walk import Walker, register_rule
from attnpass.site import Factor, Fill, Floor, Layer, Layout, Placed


def floating(at: Inner) -> torch.dtype:
    val = tensor(at.node)
    if val is None or not val.is_floating_point():
        raise Refuse("not_floating", at.node, dtype="no tensor" if val is None else str(val.dtype).split(".")[-1])
    return val.dtype


def multiplied_mask(w: Walker, at: Inner, scores: Any, size: Any, other: Any, other_size: Any) -> Inner | None:
    """``scores * b + c * (1 - b)`` with b proved to hold only 0 and 1 is ``where(b, scores, c)``."""
    if not (isinstance(scores, Node) and op_name(scores) == "mul" and size == 1):
        return None
    value = None
    if isinstance(other, Node) and op_name(other) == "mul":
        for constant, rest in (pair(other), pair(other)[::-1]):
            c = w.number(constant)
            if c is None or not math.isfinite(c):
                continue  # where the mask keeps a score an infinite number adds no zero
            if isinstance(rest, Node) and isinstance(other_size, int | float):
                value = (c * other_size, rest)
    if value is None:
        return None
    mask = one_minus(w, value[1])
    if mask is None:
        return None
    for s, b in (pair(scores), pair(scores)[::-1]):
        if isinstance(b, Node) and computed_alike(w, b, mask) and w.has_product(s):
            if not is_indicator(w, mask):
                raise Refuse("score_weights", scores)
            outer = dataclasses.replace(at, node=scores, seen=(*at.seen, at.node))
            layer = filled(w, outer, mask, off=False, fill=value[0])
            source = w.read(scores, s)
            return outer.step(source, w.place(outer, source).layout, layers=(*at.layers, layer), weighed=True)
    return None


def filled(w: Walker, at: Inner, mask: Any, *, off: bool, fill: float, layout: Layout | None = None) -> Layer:
    """The scores of this step are `fill` wherever `mask` is `off`."""
    if at.softcap is not None:
        # tanh of a fill is +-cap: it masks nothing
        raise Refuse("term_inside_softcap", at.node)
    if not at.factor.is_number:
        raise Refuse("fill_not_constant", at.node)
    source = w.read(at.node, mask)
    fill = number_in(fill, floating(at))
    total = number_in(fill * at.factor.number, floating(at))
    if math.isinf(at.largest(fill, floating(at))):
        if at.weighed:
            # further out the score is multiplied by 0 and 1, which leaves no number of an infinity
            raise Refuse("fill_not_constant", at.node)
        total = math.copysign(math.inf, total)
    if math.isnan(total) or total == math.inf:
        raise Refuse("fill_not_constant", at.node)
    if math.isfinite(total) and less_range(at.narrowest, floating(at)) and not holds(at.narrowest, fill, total):
        if fill != total or at.weighed:
            raise Refuse("overflows", at.node, dtype=dtype_text(at.narrowest))
        total = -math.inf
    if math.isfinite(total) and at.lowered and at.narrows(floating(at)) and not at.survives(total):
        raise Refuse("overflows", at.node, dtype=dtype_text(at.narrowest))
    if math.isfinite(total):
        at.lower(-fill, floating(at))  # asked only: what is further in gives way to the fill
    lowest = total != -math.inf and fill == torch.finfo(floating(at)).min and at.factor.number >= 1
    placed = w.term(at, source) if layout is None else Placed(source, layout)
    return Fill(placed, off, total, floating(at), lowest)


@register_rule("masked_fill")
def masked_fill(w: Walker, at: Inner) -> Inner:
    args = bound(at.node)
    fill = w.number(args["value"])
    if fill is None:
        raise Refuse("fill_not_constant", at.node)
    if not w.has_product(args["self"]):
        raise w.stopped(at)
    layer = filled(w, at, args["mask"], off=True, fill=fill)
    source = w.read(at.node, args["self"])
    return at.step(source, w.place(at, source).layout, layers=(*at.layers, layer))


@register_rule("index_put", "_unsafe_index_put")
def boolean_index(w: Walker, at: Inner) -> Inner:
    # scores[mask] = fill with one boolean index is masked_fill; the index lies on the leading dimensions
    args = bound(at.node)
    indices, fill = args["indices"], w.number(args["values"])
    mask = indices[0] if len(indices) == 1 else None
    val = tensor(mask) if isinstance(mask, Node) else None
    if val is None or val.dtype is not torch.bool or args.get("accumulate"):
        raise Refuse("unknown_arguments", at.node, op="index_put", detail="not one boolean index")
    if fill is None:
        raise Refuse("fill_not_constant", at.node)
    source = w.read(at.node, args["self"])
    shape = views.shape_of(source)
    if not all(same(a, b) for a, b in zip(val.shape, shape[: val.dim()], strict=True)):
        raise Refuse("unknown_arguments", at.node, op="index_put", detail="an index of another shape")
    layer = filled(w, at, mask, off=True, fill=fill, layout=w.axes.resolve(at.layout[: val.dim()]))
    return at.step(source, w.place(at, source).layout, layers=(*at.layers, layer))


@register_rule("where")
def where(w: Walker, at: Inner) -> Inner:
    args = bound(at.node)
    if "self" not in args or args.get("condition") is None:
        raise Refuse("unknown_arguments", at.node, op="where", detail="the form with one argument")
    condition, yes, no = args["condition"], args["self"], args["other"]
    in_yes, in_no = w.has_product(yes), w.has_product(no)
    if in_yes and in_no:
        raise Refuse("two_score_tensors", at.node)
    if not in_yes and not in_no:
        raise w.stopped(at)
    scores, other = (yes, no) if in_yes else (no, yes)
    fill = w.number(other)
    if fill is None:
        raise Refuse("fill_not_constant", at.node)
    layer = filled(w, at, condition, off=not in_yes, fill=fill)
    source = w.read(at.node, scores)
    return at.step(source, w.place(at, source).layout, layers=(*at.layers, layer))


@register_rule("maximum", "max", "clamp", "clamp_min")
def floored(w: Walker, at: Inner) -> Inner:
    # clamping at the lowest finite number changes no score that is a number; only -inf becomes that number
    args = bound(at.node)
    if len(args) < 2 or "dim" in args or args.get("max") is not None or at.softcap is not None or at.sink is not None:
        raise Refuse("nonlinear_scores", at.node, op=op_name(at.node))
    a, b = pair(at.node)
    scores, least = (a, b) if w.has_product(a) else (b, a)
    if not w.has_product(scores):
        raise w.stopped(at)
    lowest = torch.finfo(floating(at)).min
    if w.number(least) != lowest or not holds(at.narrowest, lowest, lowest):
        raise Refuse("nonlinear_scores", at.node, op=op_name(at.node))
    if at.layers or at.factor != Factor():
        # what comes after it may make -inf of the lowest number again, or of any other
        raise Refuse("nonlinear_scores", at.node, op=f"{op_name(at.node)}, which is not the last step")
    source = w.read(at.node, scores)
    at_it = share_at_a_bound(at.node.target, isinstance(least, Node), scores is a)
    return at.step(source, w.place(at, source).layout, floor=Floor(lowest, at_it=at_it))


@functools.cache
def share_at_a_bound(op: Callable[..., torch.Tensor], tensor: bool, first: bool) -> float:
    """How much of a gradient passes a score that lies at the bound it is clamped to.

    Asked of torch itself: a clamp lets it through up to 2.13; from 2.14 on it stops it, or halves it as a maximum does.
    """

    def asked() -> float:
        score = torch.zeros((), requires_grad=True)
        bound = torch.zeros(()) if tensor else 0.0
        x = score * 1  # which an operation in place may write to
        (share,) = torch.autograd.grad(op(x, bound) if first else op(bound, x), score)
        return share.item()

    return aside(asked)  # a thread has no modes, whatever this one is in
