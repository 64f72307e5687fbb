"""One rule for each operation that may stand between the softmax and the product of queries and keys.

A rule gets the step it stands on and returns the next step inwards (or, where it has to try several operands, the end
of the walk). It may raise Refuse. Each says why crossing the operation is allowed. A new idiom is one more rule:

    @register_rule("my_op")
    def my_rule(walker, at):
        return at.step(walker.read(at.node, at.node.args[0]), at.layout)
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import same, tensor
from attnpass.recognize import views
from attnpass.recognize.axes import atoms
from attnpass.recognize.fills import floating, multiplied_mask
from attnpass.recognize.inner import Inner
from attnpass.recognize.ops import bound, op_name, pair
from attnpass.recognize.ranges import less_range
from attnpass.recognize.walk import Found, Sink, Walker, register_rule
from attnpass.site import Factor, Placed


@register_rule(*views.VIEWS)
def crossed_view(w: Walker, at: Inner) -> Inner:
    # a view renames axes; the layout keeps track of which is which
    return at.step(w.read(at.node, at.node.args[0]), views.backward(at.node, at.layout, w.axes))


@register_rule(*views.CASTS)
def cast(w: Walker, at: Inner) -> Inner:
    # between floating types a cast is the identity up to the rounding that the fused kernel does not do, and but for
    # numbers that only the wider one holds
    source = _in_another_dtype(w, at, at.node.args[0], "a cast from integers")
    return at.step(source, at.layout, narrowest=_narrowest(at))


@register_rule("copy")
def copied_over(w: Walker, at: Inner) -> Inner:
    # scores.copy_(new): afterwards it holds what was copied, cast and broadcast; what it held before is gone
    source = _in_another_dtype(w, at, bound(at.node)["src"], "a copy of integers")
    return at.step(source, w.place(at, source).layout, narrowest=_narrowest(at))


def _narrowest(at: Inner) -> torch.dtype:
    """That of the least range from this cast outwards."""
    own = floating(at)
    return own if less_range(own, at.narrowest) else at.narrowest


def _in_another_dtype(w: Walker, at: Inner, arg: Any, what: str) -> Node:
    """What is cast here: scores that are floating and on the same device."""
    source = w.read(at.node, arg)
    val, out = tensor(source), tensor(at.node)
    floating(at)
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
    floating(at)
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
    floating(at)
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
    floating(at)
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
        blended = multiplied_mask(w, at, scores, size, other, other_size)
        if blended is not None:
            arms.append(blended)
            continue
        source = w.read(at.node, scores)
        centred = at.sink is None and other_size in (1, -1) and _is_row_statistic(w, at, source, other)
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
    if not w.same_for_a_row(at.factor):
        return False
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
