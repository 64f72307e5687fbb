"""Rules of operations that look elements up, join tensors, or run along an axis."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from attnpass.masks.expr import FALSE, ONE, TRUE, ZERO, Bool, Eq, Poly, Tree, Value, Var, of, variables
from attnpass.masks.lift import Call, Index, Unliftable, align, as_bool, as_tree, kind_of, rule, tensor_of
from attnpass.masks.logic import both, either, eq, ge, ite, leaves, negate, spread
from attnpass.masks.numeric import Operand, arithmetic, cast, literal
from attnpass.masks.ranges import is_one, nonneg

_MAX_PARTS = 16


# --- looking up --------------------------------------------------------------------------------------------------


@rule("index", "_unsafe_index")
def _index(call: Call, index: Index) -> Value:
    source = call.args["self"]
    shape = call.shape_of(source)
    given: list[Any] = [*call.args["indices"]]
    given += [None] * (len(shape) - len(given))
    places = [d for d, x in enumerate(given) if x is not None]
    if not places or any(tensor_of(given[d]).dtype in (torch.bool, torch.uint8) for d in places):
        raise Unliftable("positions that depend on data")
    # the broadcast index tensors stand where they were if they are neighbours, in front otherwise
    together = places == list(range(places[0], places[-1] + 1))
    ranks = [len(call.shape_of(given[d])) for d in places]
    width = max(ranks)
    front = places[0] if together else 0
    looked = index[front : front + width]
    lengths = call.shape[front : front + width]
    rest = iter(index[:front] + index[front + width :])
    parts: list[Tree] = []
    for d, x in enumerate(given):
        if x is None:
            parts.append(next(rest))
        else:
            parts.append(_wrapped(as_tree(call.read(x, align(looked, lengths, call.shape_of(x)))), shape[d]))
    return _at(call, source, parts)


def _wrapped(at: Tree, size: Poly) -> Tree:
    """Negative positions count from the end."""

    def leaf(p: Poly) -> Value:
        return p if nonneg(p) else ite(ge(p), p, p + size)

    return as_tree(spread(leaf, at))


def _at(call: Call, source: Node, parts: list[Tree]) -> Value:
    def leaf(*index: Poly) -> Value:
        return call.read(source, index)

    return spread(leaf, *parts)


@rule("index_select", "embedding")
def _index_select(call: Call, index: Index) -> Value:
    if call.name == "embedding":
        positions = call.args["indices"]
        parts: list[Tree] = [as_tree(call.read(positions, index[:-1])), index[-1]]
        return _at(call, call.args["weight"], parts)
    source, dim, positions = call.args["self"], call.args["dim"], call.args["index"]
    d = call.dim(dim, len(index))
    at = index[d : d + 1] if len(call.shape_of(positions)) else ()
    parts = [*index[:d], as_tree(call.read(positions, at)), *index[d + 1 :]]
    return _at(call, source, parts)


@rule("gather", "take_along_dim")
def _gather(call: Call, index: Index) -> Value:
    source, dim = call.args["self"], call.args.get("dim")
    positions = call.args.get("index", call.args.get("indices"))
    if not isinstance(dim, int) or not isinstance(positions, Node):
        raise Unliftable("flat")
    d = call.dim(dim, len(index))
    shape = call.shape_of(source)
    looked = call.broadcast(positions, index) if call.name == "take_along_dim" else call.read(positions, index)
    parts: list[Tree] = [ZERO if call.name == "take_along_dim" and is_one(n) else k
                         for k, n in zip(index, shape, strict=True)]  # fmt: skip
    parts[d] = as_tree(looked)
    if call.name == "take_along_dim":
        parts[d] = _wrapped(parts[d], shape[d])
    return _at(call, source, parts)


# --- joining -----------------------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def _cat(call: Call, index: Index) -> Value:
    tensors = [t for t in call.args["tensors"] if call.shape_of(t) != (ZERO,)]
    d = call.dim(call.args.get("dim", 0), len(index))
    return _joined(call, tensors, d, index)


def _joined(call: Call, tensors: list[Node], d: int, index: Index) -> Value:
    if not tensors or len(tensors) > _MAX_PARTS:
        raise Unliftable("too many parts")
    start = ZERO
    starts = []
    for t in tensors:
        starts.append(start)
        start = start + call.shape_of(t)[d]

    def part(place: int) -> Value:
        at = (*index[:d], index[d] - starts[place], *index[d + 1 :])
        source = tensors[place]
        return cast(call, call.read(source, at), tensor_of(source).dtype, call.dtype)

    out = part(len(tensors) - 1)
    for place in range(len(tensors) - 2, -1, -1):
        here = ge(starts[place + 1] - 1 - index[d])
        out = out if here == FALSE else part(place) if here == TRUE else ite(here, part(place), out)
    return out


@rule("stack")
def _stack(call: Call, index: Index) -> Value:
    tensors = call.args["tensors"]
    d = call.dim(call.args["dim"], len(index))
    at = index[:d] + index[d + 1 :]
    if len(tensors) > _MAX_PARTS:
        raise Unliftable("too many parts")

    def part(place: int) -> Value:
        return cast(call, call.read(tensors[place], at), tensor_of(tensors[place]).dtype, call.dtype)

    out = part(len(tensors) - 1)
    for place in range(len(tensors) - 2, -1, -1):
        out = ite(eq(index[d] - place), part(place), out)
    return out


@rule("pad", "constant_pad_nd")
def _pad(call: Call, index: Index) -> Value:
    source = call.args["self"]
    if call.args.get("mode", "constant") != "constant":
        raise Unliftable("mode")
    value = call.args.get("value")
    widths = call.args["pad"]
    shape = call.shape_of(source)
    inside: Bool = TRUE
    at = list(index)
    for pair in range(len(widths) // 2):
        d = len(index) - 1 - pair
        at[d] = index[d] - call.integer(widths[2 * pair])
        inside = both(inside, ge(at[d]), ge(shape[d] - 1 - at[d]))
    fill = literal(0 if value is None else value, call.dtype)
    return fill if inside == FALSE else ite(inside, call.read(source, tuple(at)), fill)


# --- along an axis -----------------------------------------------------------------------------------------------


@rule("diff")
def _diff(call: Call, index: Index) -> Value:
    source, dim, n = call.args["self"], call.args["dim"], call.args["n"]
    if n != 1:
        raise Unliftable("order")
    d = call.dim(dim, len(index))
    given = [call.args.get("prepend"), source, call.args.get("append")]
    tensors = [t for t in given if t is not None]

    def at(step: int) -> Value:
        return _joined(call, tensors, d, (*index[:d], index[d] + step, *index[d + 1 :]))

    if call.dtype == torch.bool:
        a, b = as_bool(at(0)), as_bool(at(1))
        return either(both(a, negate(b)), both(negate(a), b))
    return arithmetic(call, "sub", Operand(at(1), call.dtype), Operand(at(0), call.dtype), call.dtype)


@rule("cumsum")
def _cumsum(call: Call, index: Index) -> Value:
    """Sums of what does not change along the axis, and of a one at a known place."""
    source = call.args["self"]
    d = call.dim(call.args["dim"], len(index))
    if not index:
        raise Unliftable("no axis")
    if kind_of(call.dtype) == "bool" or (kind_of(call.dtype) == "real" and call.dtype != torch.float32):
        raise Unliftable("rounded sums")
    var = Var(call.lifter.fresh(), call.shape_of(source)[d])
    inner = call.read(source, (*index[:d], of(var), *index[d + 1 :]))
    tree = as_tree(cast(call, inner, tensor_of(source).dtype, torch.int64))
    total: Value = ZERO
    for when, leaf in leaves(tree):
        if not isinstance(leaf, Poly) or var.name in variables(leaf):
            raise Unliftable("a sum without a closed form")
        if leaf != ZERO:
            number = _how_many(when, var, index[d])
            total = spread(lambda a, b: a + b, as_tree(total), as_tree(spread(lambda m, x=leaf: m * x, number)))
    return cast(call, total, torch.int64, call.dtype)


def _how_many(when: Bool, var: Var, last: Poly) -> Tree:
    """For how many positions 0 <= var <= last the condition holds."""
    if when == TRUE:
        return last + ONE
    if var.name not in variables(when):
        return as_tree(ite(when, last + ONE, ZERO))
    if isinstance(when, Eq):
        parts = when.p.split(var)
        if parts is not None and parts[0].value in (1, -1) and var.name not in variables(parts[1]):
            place = parts[1] * -parts[0].value  # p = +-var + rest is zero there
            return as_tree(ite(both(ge(place), ge(last - place)), ONE, ZERO))
    raise Unliftable("a count without a closed form")
