"""One rule for each operation that may stand between the softmax and the product of queries and keys.

A rule gets the step it stands on and returns the next step inwards (or, where it has to try several operands, the end
of the walk). It may raise Refuse. Each says why crossing the operation is allowed. A new idiom is one more rule:

    @register_rule("my_op")
    def my_rule(walker, at):
        return at.step(walker.read(at.node, at.node.args[0]), at.layout)
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import same, tensor
from attnpass.recognize import views
from attnpass.recognize.axes import atoms
from attnpass.recognize.ops import bound, number_in, op_name, pair
from attnpass.recognize.walk import Found, Inner, Sink, Walker, register_rule
from attnpass.site import Factor, Fill, Layer, Layout, Placed


def _floating(at: Inner) -> torch.dtype:
    val = tensor(at.node)
    if val is None or not val.is_floating_point():
        raise Refuse("not_floating", at.node, dtype="no tensor" if val is None else str(val.dtype).split(".")[-1])
    return val.dtype


@register_rule(*views.VIEWS)
def crossed_view(w: Walker, at: Inner) -> Inner:
    # a view renames axes; the layout keeps track of which is which
    return at.step(w.read(at.node, at.node.args[0]), views.backward(at.node, at.layout, w.axes))


@register_rule(*views.CASTS)
def cast(w: Walker, at: Inner) -> Inner:
    # between floating types a cast is the identity up to the rounding that the fused kernel does not do
    return at.step(_in_another_dtype(w, at, at.node.args[0], "a cast from integers"), at.layout)


@register_rule("copy")
def copied_over(w: Walker, at: Inner) -> Inner:
    # scores.copy_(new): afterwards it holds what was copied, cast and broadcast; what it held before is gone
    source = _in_another_dtype(w, at, bound(at.node)["src"], "a copy of integers")
    return at.step(source, w.place(at, source).layout)


def _in_another_dtype(w: Walker, at: Inner, arg: Any, what: str) -> Node:
    """What is cast here: scores that are floating and on the same device."""
    source = w.read(at.node, arg)
    val, out = tensor(source), tensor(at.node)
    _floating(at)
    if val is None or out is None or not val.is_floating_point():
        raise Refuse("unknown_op", at.node, op=what)
    if val.device != out.device:
        raise Refuse("mixed_devices", at.node)
    return source


@register_rule("detach")
def detached(w: Walker, at: Inner) -> Inner:
    # the identity for values; for gradients only where none flow anyway
    source = w.read(at.node, at.node.args[0])
    if source.meta.get("attnpass_grad", False):
        raise Refuse("unknown_op", at.node, op="detach, which stops gradients")
    return at.step(source, at.layout)


@register_rule("dropout")
def dropout(w: Walker, at: Inner) -> Inner:
    args = bound(at.node)
    if args["train"] and args["p"] != 0:
        raise Refuse("nonlinear_scores", at.node, op="dropout")
    return at.step(w.read(at.node, args["input"]), at.layout)


@register_rule("neg")
def neg(w: Walker, at: Inner) -> Inner:
    return at.step(w.read(at.node, at.node.args[0]), at.layout, factor=at.factor.times(Factor(-1.0)))


@register_rule("mul")
def mul(w: Walker, at: Inner) -> Inner | Found:
    _floating(at)
    a, b = pair(at.node)
    arms = [(x, y) for x, y in ((a, b), (b, a)) if w.has_product(x)]
    if len(arms) == 2:
        # softmax of a product of two score tensors is no attention
        raise Refuse("nonlinear_scores", at.node, op="a product of two score tensors")
    if not arms:
        raise w.stopped(at)
    scores, other = arms[0]
    return _scaled(w, at, scores, other, 1)


@register_rule("div")
def div(w: Walker, at: Inner) -> Inner:
    _floating(at)
    a, b = pair(at.node)
    if bound(at.node).get("rounding_mode") is not None:
        raise Refuse("nonlinear_scores", at.node, op="a rounding division")
    if not w.has_product(a):
        raise w.stopped(at)
    return _scaled(w, at, a, b, -1)


def _scaled(w: Walker, at: Inner, scores: Any, other: Any, power: int) -> Inner:
    factor = w.factor_of(at, other, power)
    keys = set(w.axes.resolve_dim(w.over))
    for placed, _ in factor.tensors:
        own = atoms(placed.layout)
        # A factor over keys alone moves into k, one over anything but keys into q: both commute with the product.
        # A factor over queries *and* keys weighs single scores.
        if own & keys and own - keys:
            raise Refuse("score_weights", at.node)
    source = w.read(at.node, scores)
    return at.step(source, w.place(at, source).layout, factor=at.factor.times(factor))


@register_rule("add", "sub", "rsub")
def add(w: Walker, at: Inner) -> Inner | Found:
    _floating(at)
    args = bound(at.node)
    a, b = pair(at.node)
    alpha = args.get("alpha", 1)
    name = op_name(at.node)
    # result = fa * a + fb * b
    if name != "add" and not isinstance(alpha, int | float):
        raise Refuse("unknown_arguments", at.node, op=name, detail="a symbolic alpha")
    fa, fb = (1, alpha) if name == "add" else (1, -alpha) if name == "sub" else (-alpha, 1)
    candidates = [(a, fa, b, fb), (b, fb, a, fa)]
    candidates = [c for c in candidates if w.has_product(c[0])]
    if not candidates:
        raise w.stopped(at)
    arms: list[Inner] = []
    for scores, size, other, other_size in candidates:
        blended = _multiplied_mask(w, at, scores, size, other, other_size)
        if blended is not None:
            arms.append(blended)
            continue
        source = w.read(at.node, scores)
        centred = at.sink is None and _is_row_statistic(w, at, source, other)
        outer = at if centred else w.add_term(at, other, other_size)
        if centred and not at.layers:
            outer = dataclasses.replace(outer, centred=True)
        step = outer.step(source, w.place(at, source).layout, factor=at.factor.times(w.factor_of(at, size, 1)))
        arms.append(step)
    return arms[0] if len(arms) == 1 else w.fork(at, arms)


def _is_row_statistic(w: Walker, at: Inner, scores: Node, term: Any) -> bool:
    """`term` is max or logsumexp of these very scores over the softmax axis.

    Subtracting it changes no softmax (it is one number per row, finite wherever the row has a finite score; where it
    has none, both the original and the fused call are asked about an empty row, which is treated as such).
    """
    node = term
    while isinstance(node, Node) and op_name(node) in ("detach", "unsqueeze", "view", "reshape", "expand", "expand_as"):
        node = node.args[0]
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, Node) or op_name(node) not in ("amax", "max", "logsumexp"):
        return False
    args = bound(node)
    source, dim = args.get("self"), args.get("dim")
    if dim is None or not isinstance(source, Node):
        return False
    # both must see the same value: in place or not, it is the same node that holds it
    if _undetached(w, scores) is not _undetached(w, w.read(node, source)):
        return False
    layout = w.place(at, scores).layout
    dims = [dim] if isinstance(dim, int) else list(dim)
    reduced = {atom for d in dims for atom in layout[d % len(layout)]}
    if reduced != set(w.axes.resolve_dim(w.over)):
        return False
    if not (isinstance(term, Node)):
        return False
    # it must come back broadcast over the softmax axis, not along another one
    return not atoms(w.place(at, term).layout) & reduced


def _undetached(w: Walker, node: Node) -> Node:
    while op_name(node) == "detach":
        node = w.read(node, node.args[0])
    return node


def _multiplied_mask(w: Walker, at: Inner, scores: Any, size: Any, other: Any, other_size: Any) -> Inner | None:
    """``scores * b + c * (1 - b)`` with b proved to hold only 0 and 1 is ``where(b, scores, c)``."""
    if not (isinstance(scores, Node) and op_name(scores) == "mul" and size == 1):
        return None
    value = None
    if isinstance(other, Node) and op_name(other) == "mul":
        for constant, rest in (pair(other), pair(other)[::-1]):
            c = w.number(constant)
            if c is not None and isinstance(rest, Node) and isinstance(other_size, int | float):
                value = (c * other_size, rest)
    if value is None:
        return None
    mask = _one_minus(w, value[1])
    if mask is None:
        return None
    for s, b in (pair(scores), pair(scores)[::-1]):
        if b is mask and w.has_product(s):
            if not _is_indicator(w, mask):
                raise Refuse("score_weights", scores)
            outer = dataclasses.replace(at, node=scores)
            layer = _filled(w, outer, mask, off=False, fill=value[0])
            source = w.read(scores, s)
            return outer.step(source, w.place(outer, source).layout, layers=(*at.layers, layer))
    return None


def _one_minus(w: Walker, node: Node) -> Node | None:
    """m when node is 1 - m."""
    name = op_name(node)
    if name not in ("rsub", "sub") or bound(node).get("alpha", 1) != 1:
        return None
    a, b = pair(node)
    one, mask = (b, a) if name == "rsub" else (a, b)
    return mask if w.number(one) == 1 and isinstance(mask, Node) else None


_KEEPS_VALUES = views.VIEWS | views.CASTS | {"tril", "triu", "detach"}


def _is_indicator(w: Walker, node: Node) -> bool:
    """Proved to hold only 0 and 1: made from booleans or ones by operations that keep that."""
    while True:
        val = tensor(node)
        if w.effects.written(node):
            return False
        if val is not None and val.dtype is torch.bool:
            return True
        if w.number(node) in (0.0, 1.0):
            return True
        if op_name(node) not in _KEEPS_VALUES or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]


def _filled(w: Walker, at: Inner, mask: Any, *, off: bool, fill: float, layout: Layout | None = None) -> Layer:
    """The scores of this step are `fill` wherever `mask` is `off`."""
    if at.softcap is not None:
        # tanh of a fill is +-cap: it masks nothing
        raise Refuse("term_inside_softcap", at.node)
    if not at.factor.is_number:
        raise Refuse("fill_not_constant", at.node)
    source = w.read(at.node, mask)
    if number_in(fill, _floating(at)) != fill:
        fill = number_in(fill, _floating(at))
    total = number_in(fill * at.factor.number, _floating(at))
    if math.isnan(total) or total == math.inf:
        raise Refuse("fill_not_constant", at.node)
    lowest = fill == torch.finfo(_floating(at)).min and at.factor.number >= 1
    placed = w.term(at, source) if layout is None else Placed(source, layout)
    return Fill(placed, off, total, _floating(at), lowest)


@register_rule("masked_fill")
def masked_fill(w: Walker, at: Inner) -> Inner:
    args = bound(at.node)
    fill = w.number(args["value"])
    if fill is None:
        raise Refuse("fill_not_constant", at.node)
    if not w.has_product(args["self"]):
        raise w.stopped(at)
    layer = _filled(w, at, args["mask"], off=True, fill=fill)
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
    layer = _filled(w, at, mask, off=True, fill=fill, layout=w.axes.resolve(at.layout[: val.dim()]))
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
    layer = _filled(w, at, condition, off=not in_yes, fill=fill)
    source = w.read(at.node, scores)
    return at.step(source, w.place(at, source).layout, layers=(*at.layers, layer))


@register_rule("maximum", "max", "clamp", "clamp_min")
def floored(w: Walker, at: Inner) -> Inner:
    # clamping at the lowest finite number changes no score that is a number; only -inf becomes that number
    args = bound(at.node)
    if len(args) < 2 or "dim" in args or args.get("max") is not None or at.softcap is not None or at.sink is not None:
        raise Refuse("nonlinear_scores", at.node, op=op_name(at.node))
    a, b = pair(at.node)
    scores, floor = (a, b) if w.has_product(a) else (b, a)
    if not w.has_product(scores):
        raise w.stopped(at)
    if w.number(floor) != torch.finfo(_floating(at)).min:
        raise Refuse("nonlinear_scores", at.node, op=op_name(at.node))
    source = w.read(at.node, scores)
    return at.step(source, w.place(at, source).layout, floored=True)


@register_rule("tanh")
def softcap(w: Walker, at: Inner) -> Inner:
    # cap * tanh(x / cap): the factor collected outside is the cap, the one met further in contains 1 / cap
    cap = _cap(at.factor)
    if at.softcap is not None or cap is None:
        raise Refuse("nonlinear_scores", at.node, op="tanh")
    source = w.read(at.node, at.node.args[0])
    return at.step(source, at.layout, softcap=cap, factor=Factor())


def _cap(factor: Factor) -> float | Node | None:
    """A positive number, or one symbolic scalar of either sign: by the latter the walk's end has to find x divided."""
    if factor.is_number:
        return factor.number if factor.number > 0 else None
    alone = factor.number == 1.0 and not factor.tensors and len(factor.scalars) == 1
    return factor.scalars[0][0] if alone and factor.scalars[0][1] == 1 else None


@register_rule("cat")
def sink(w: Walker, at: Inner) -> Inner:
    # one extra column beside the scores takes part in the softmax and is cut off afterwards: an attention sink
    args = bound(at.node)
    parts, dim = args["tensors"], args["dim"]
    order = [p for p in parts if w.has_product(p)]
    if not order:
        raise w.stopped(at)
    if len(order) > 1:
        raise Refuse("two_score_tensors", at.node)
    dim = dim % len(at.layout)
    whole = w.axes.resolve_dim(at.layout[dim])
    if (
        w.sink is not None
        or at.sink is not None
        or at.softcap is not None
        or whole != w.axes.resolve_dim(w.over)
        or len(parts) != 2
    ):
        raise Refuse("unknown_arguments", at.node, op="cat", detail="not one column beside the scores")
    if any(atoms(layer.placed.layout) & set(whole) for layer in at.layers) or at.factor != Factor():
        raise Refuse("unknown_arguments", at.node, op="cat", detail="the sink is scaled or masked with the scores")
    scores = w.read(at.node, order[0])
    column = w.read(at.node, parts[0] if order[0] is parts[1] else parts[1])
    shape = views.shape_of(column)
    if not same(shape[dim], 1):
        raise Refuse("unknown_arguments", at.node, op="cat", detail="more than one extra column")
    keys = w.axes.new(views.shape_of(scores)[dim])
    layout = (*at.layout[:dim], keys, *at.layout[dim + 1 :])
    w.sink = Sink(whole, keys, first=order[0] is parts[1])
    w.over = keys
    flat = (*at.layout[:dim], (), *at.layout[dim + 1 :])
    placed = Placed(column, w.axes.align(flat, shape, [w.axes.dim_size(d) for d in flat]))
    return at.step(scores, layout, sink=placed)
