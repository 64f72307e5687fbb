"""Rules of operations that only rearrange elements: the index goes in, the input's index comes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from attnpass.masks.division import divmod_
from attnpass.masks.expr import FALSE, ONE, TRUE, ZERO, Poly, Value
from attnpass.masks.lift import Call, Index, Unliftable, align, as_bool, rule, slice_start, tensor_of
from attnpass.masks.logic import both, ge
from attnpass.masks.numeric import Operand, arithmetic
from attnpass.masks.ranges import is_one

Regrouped = list[tuple[list[int], list[int]]]


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias", "ravel",
      "squeeze")  # fmt: skip
def _view(call: Call, index: Index) -> Value:
    source = call.args["self"]
    if call.args.get("dtype") is not None:
        raise Unliftable("bits")
    return call.read(source, regroup(index, call.shape, call.shape_of(source)))


def regroup(index: Index, shape: Index, source: Index) -> Index:
    """The index into `source` of the element at `index` of a row-major view of it with this shape."""
    out: list[Poly] = []
    for dims, into in _groups(shape, source):
        if len(dims) == 1 and len(into) == 1:
            out.append(index[dims[0]])
            continue
        flat = ZERO
        for d in dims:
            flat = flat * shape[d] + index[d]
        inner: list[Poly] = []
        for place in range(len(into) - 1, -1, -1):
            size = source[into[place]]
            if is_one(size):
                inner.append(ZERO)
            elif all(is_one(source[into[k]]) for k in range(place)):
                inner.append(flat)
            else:
                flat, rest = divmod_(flat, size)
                inner.append(rest)
        out.extend(reversed(inner))
    return tuple(out)


def _groups(shape: Index, source: Index) -> Regrouped:
    """Runs of dimensions of the two shapes with provably equal products; as short as can be."""
    groups: Regrouped = []
    a = b = 0
    while a < len(shape) or b < len(source):
        dims: list[int] = []
        into: list[int] = []
        left, right = ONE, ONE
        while True:
            # take from whichever side is smaller; symbolic sizes are compared as polynomials
            if left == right and dims and into:
                break
            take_left = a < len(shape) and (not dims or (into and _behind(left, right)) or b >= len(source))
            if take_left and (not into or left != right or b >= len(source)):
                left, dims, a = left * shape[a], [*dims, a], a + 1
            elif b < len(source):
                right, into, b = right * source[b], [*into, b], b + 1
            elif a < len(shape):
                left, dims, a = left * shape[a], [*dims, a], a + 1
            else:
                if left != right:
                    return [(list(range(len(shape))), list(range(len(source))))]
                break
        groups.append((dims, into))
    return groups


def _behind(left: Poly, right: Poly) -> bool:
    """The product on the left still divides the one on the right (or is smaller)."""
    if left.value is not None and right.value is not None:
        return left.value < right.value
    return ge(right - left) == TRUE


@rule("expand", "expand_as", "broadcast_to")
def _expand(call: Call, index: Index) -> Value:
    return call.broadcast(call.args["self"], index)


@rule("unsqueeze")
def _unsqueeze(call: Call, index: Index) -> Value:
    at = call.dim(call.args["dim"], len(index))
    return call.read(call.args["self"], index[:at] + index[at + 1 :])


@rule("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint")
def _permute(call: Call, index: Index) -> Value:
    source = call.args["self"]
    out = [ZERO] * len(index)
    for at, into in enumerate(permutation(call.node, len(index))):
        out[into] = index[at]
    return call.read(source, tuple(out))


def permutation(node: Node, rank: int) -> Sequence[int]:
    """Dimension i of the result is dimension p[i] of the input: found by running the operation on marked sizes."""
    assert callable(node.target)
    marked = torch.empty([i + 2 for i in range(rank)], device="meta")
    out = node.target(marked, *node.args[1:], **node.kwargs)
    return [size - 2 for size in out.shape]


@rule("slice", "narrow")
def _slice(call: Call, index: Index) -> Value:
    source = call.args["self"]
    d = call.dim(call.args["dim"], len(index))
    step = call.args.get("step", 1)
    if not isinstance(step, int):
        raise Unliftable("step")
    start = slice_start(call, call.shape_of(source)[d])
    return call.read(source, (*index[:d], start + index[d] * step, *index[d + 1 :]))


@rule("select")
def _select(call: Call, index: Index) -> Value:
    source = call.args["self"]
    d = call.dim(call.args["dim"], len(index) + 1)
    k = call.integer(call.args["index"])
    if ge(k) == FALSE:
        k = k + call.shape_of(source)[d]
    elif ge(k) != TRUE:
        raise Unliftable("index of unknown sign")
    return call.read(source, (*index[:d], k, *index[d:]))


@rule("flip")
def _flip(call: Call, index: Index) -> Value:
    source = call.args["self"]
    shape = call.shape_of(source)
    out = list(index)
    for dim in call.args["dims"]:
        d = call.dim(dim, len(index))
        out[d] = shape[d] - 1 - out[d]
    return call.read(source, tuple(out))


@rule("roll")
def _roll(call: Call, index: Index) -> Value:
    source = call.args["self"]
    shape = call.shape_of(source)
    dims, shifts = call.args["dims"], call.args["shifts"]
    if not isinstance(dims, list | tuple) or not dims or not isinstance(shifts, list | tuple):
        raise Unliftable("flat roll")
    out = list(index)
    for dim, shift in zip(dims, shifts, strict=True):
        d = call.dim(dim, len(index))
        out[d] = divmod_(out[d] - call.integer(shift), shape[d])[1]
    return call.read(source, tuple(out))


@rule("repeat", "tile")
def _repeat(call: Call, index: Index) -> Value:
    source = call.args["self"]
    shape = call.shape_of(source)
    skip = len(index) - len(shape)
    out = [ZERO if is_one(n) else divmod_(k, n)[1] for k, n in zip(index[skip:], shape, strict=True)]
    return call.read(source, tuple(out))


@rule("repeat_interleave")
def _interleave(call: Call, index: Index) -> Value:
    source, repeats, dim = call.args.get("self"), call.args["repeats"], call.args.get("dim")
    if isinstance(source, Node) and dim is None and len(call.shape_of(source)) == 1:
        dim = 0
    if not isinstance(source, Node) or not isinstance(dim, int):
        raise Unliftable("repeats")
    d = call.dim(dim, len(index))
    quotient = divmod_(index[d], call.integer(repeats))[0]
    return call.read(source, (*index[:d], quotient, *index[d + 1 :]))


@rule("kron")
def _kron(call: Call, index: Index) -> Value:
    a, b = call.args["self"], call.args["other"]
    inner = call.shape_of(b)
    if len(call.shape_of(a)) != len(index) or len(inner) != len(index):
        raise Unliftable("ranks")
    pairs = [divmod_(k, n) for k, n in zip(index, inner, strict=True)]
    return _product(call, a, tuple(q for q, _ in pairs), b, tuple(r for _, r in pairs))


@rule("outer", "ger")
def _outer(call: Call, index: Index) -> Value:
    other = call.args.get("vec2", call.args.get("other"))
    if not isinstance(other, Node):
        raise Unliftable("outer")
    return _product(call, call.args["self"], index[:1], other, index[1:])


def _product(call: Call, a: Node, at_a: Index, b: Node, at_b: Index) -> Value:
    x, y = call.read(a, at_a), call.read(b, at_b)
    if call.dtype == torch.bool:
        return both(as_bool(x), as_bool(y))
    return arithmetic(call, "mul", Operand(x, tensor_of(a).dtype), Operand(y, tensor_of(b).dtype), call.dtype)


@rule("diagonal")
def _diagonal(call: Call, index: Index) -> Value:
    source = call.args["self"]
    rank = len(index) + 1
    d1, d2 = call.dim(call.args["dim1"], rank), call.dim(call.args["dim2"], rank)
    offset = call.args["offset"]
    if not isinstance(offset, int):
        raise Unliftable("offset")
    at = {d1: index[-1] + max(-offset, 0), d2: index[-1] + max(offset, 0)}
    rest = iter(index[:-1])
    return call.read(source, tuple(at[d] if d in at else next(rest) for d in range(rank)))


@rule("python:getitem")
def _getitem(call: Call, index: Index) -> Value:
    source, place = call.args["self"], call.args["index"]
    if not isinstance(source, Node) or not isinstance(place, int):
        raise Unliftable("getitem")
    if not isinstance(source.meta.get("val"), tuple | list):
        raise Unliftable("getitem")
    return call.lifter.apply(source, index, call.when, place)


@rule("unbind")
def _unbind(call: Call, index: Index) -> Value:
    d = call.dim(call.args["dim"], len(index) + 1)
    return call.read(call.args["self"], (*index[:d], Poly({(): call.output}), *index[d:]))


@rule("split", "chunk", "split_with_sizes")
def _split(call: Call, index: Index) -> Value:
    d = call.dim(call.args["dim"], len(index))
    start = ZERO
    for piece in call.node.meta["val"][: call.output]:
        start = start + call.lifter.shape(piece)[d]
    return call.read(call.args["self"], (*index[:d], start + index[d], *index[d + 1 :]))


@rule("meshgrid")
def _meshgrid(call: Call, index: Index) -> Value:
    tensors = call.args["tensors"]
    place = call.output
    if call.args.get("indexing", "ij") == "xy" and place < 2:
        place = 1 - place
    if len(call.shape_of(tensors[call.output])) == 0:
        return call.read(tensors[call.output], ())
    return call.read(tensors[call.output], (index[place],))


@rule("broadcast_tensors")
def _broadcast_tensors(call: Call, index: Index) -> Value:
    source = call.args["tensors"][call.output]
    return call.read(source, align(index, call.shape, call.shape_of(source)))
