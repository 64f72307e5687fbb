"""Every spelling of softmax, as an anchor: what it is taken of, over which dimensions, and which node holds it.

    softmax(x)   _softmax(x)   _safe_softmax(x)   special_softmax(x)
    exp(log_softmax(x))
    exp(x - logsumexp(x))
    exp(x) / sum(exp(x))       with or without x - max(x), either way of writing the quotient

A softmax with something added to its denominator is another function and no anchor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Graph, Node

from attnpass.errors import Refuse
from attnpass.graph import tensor
from attnpass.recognize.ops import bound, op_name, pair
from attnpass.recognize.purity import Effects
from attnpass.recognize.views import shape_of
from attnpass.spec import EmptyRow

_FUSED = {
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
}
_DIRECT = {"softmax", "_softmax", "_safe_softmax"}
_KEEPS = {"view", "unsqueeze", "expand", "expand_as", "reshape"}


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """One softmax."""

    node: Node  # holds the probabilities
    source: Node | None  # what it is taken of (as the reader's argument)
    reader: Node  # the node that reads `source`
    dims: tuple[int, ...]  # dimensions of `source`
    base: float = 1.0  # softmax(base * source): ln 2 for powers of two
    empty: EmptyRow = EmptyRow.NAN  # what a row of -inf gives
    low: EmptyRow | None = EmptyRow.MEAN  # what a row of one very low number gives; None: none of the known answers
    fused: bool = False  # an existing fused call
    parts: tuple[Node, ...] = ()  # further nodes that belong to the spelling


def anchors(graph: Graph, effects: Effects, live: set[Node]) -> Iterator[Anchor]:
    """All softmaxes that something depends on, in graph order."""
    for node in graph.nodes:
        if node.op != "call_function" or node not in live:
            continue
        found = _anchor(node, effects)
        if found is not None:
            yield found


def _anchor(node: Node, effects: Effects) -> Anchor | None:
    name = op_name(node)
    if name in _FUSED:
        return Anchor(node=node, source=None, reader=node, dims=(), empty=EmptyRow.ZERO, fused=True)
    if name in _DIRECT:
        args = bound(node)
        source = args["self"]
        rank = len(shape_of(source))
        if rank == 0:
            return None
        empty = EmptyRow.ZERO if name == "_safe_softmax" else EmptyRow.NAN
        return Anchor(node=node, source=source, reader=node, dims=(args["dim"] % rank,), empty=empty)
    if name == "exp":
        return _from_exp(node, effects)
    if name == "div":
        if bound(node).get("rounding_mode") is None:
            a, b = pair(node)
            return _quotient(node, a, b, effects)
        return None
    if name == "mul":
        for a, b in (pair(node), pair(node)[::-1]):
            if isinstance(b, Node) and op_name(b) == "reciprocal":
                inner = b.args[0]
                found = _quotient(node, a, inner, effects)
                if found is not None:
                    return found
    return None


def _from_exp(node: Node, effects: Effects) -> Anchor | None:
    source = node.args[0]
    if not isinstance(source, Node) or seen_by(effects, source, node) is not source:
        return None
    name = op_name(source)
    if name in ("log_softmax", "_log_softmax"):
        args = bound(source)
        inner = args["self"]
        dim = args["dim"] % len(shape_of(inner))
        return Anchor(node=node, source=inner, reader=source, dims=(dim,), parts=(source,))
    if name == "sub" and bound(source).get("alpha", 1) == 1:
        # exp(x - logsumexp(x)) == softmax(x) by definition
        x, lse = pair(source)
        if not isinstance(x, Node) or not isinstance(lse, Node):
            return None
        stat, crossed = _through_views(lse)
        seen = seen_by(effects, x, source)
        if op_name(stat) == "logsumexp" and seen is not None and seen_by(effects, stat.args[0], stat) is seen:
            dims = reduced(stat, x)
            if dims is not None and _broadcast_back(lse, stat, x, dims):
                # log-sum-exp of a row of the lowest number is that number again: all weights come out as one
                return Anchor(node=node, source=x, reader=source, dims=dims, low=None, parts=(source, stat, *crossed))
    return None


def _quotient(node: Node, a: object, b: object, effects: Effects) -> Anchor | None:
    """exp(x) / sum(exp(x)); the same node twice, or the same exponential of the same node."""
    if not isinstance(a, Node) or not isinstance(b, Node) or tensor(a) is None or tensor(b) is None:
        return None
    stat, crossed = _through_views(b)
    if op_name(stat) != "sum" or op_name(a) not in ("exp", "exp2"):
        return None
    summed = stat.args[0]
    if not isinstance(summed, Node):
        return None
    twin = op_name(summed) == op_name(a) and summed.args[0] is a.args[0]
    if not (summed is a or twin) or seen_by(effects, a, node) is not a or seen_by(effects, summed, stat) is not summed:
        return None
    source = a.args[0]
    seen = seen_by(effects, source, a)
    if not isinstance(source, Node) or seen is None or seen_by(effects, source, summed) is not seen:
        return None
    dims = reduced(stat, a)
    if dims is None or not _broadcast_back(b, stat, a, dims):
        return None
    base = 1.0 if op_name(a) == "exp" else math.log(2.0)
    # unless the row maximum was taken away before, every exponential of such a row is zero
    return Anchor(
        node=node, source=source, reader=a, dims=dims, base=base, low=EmptyRow.NAN, parts=(a, summed, stat, *crossed)
    )


def seen_by(effects: Effects, arg: object, reader: Node) -> Node | None:
    """The node whose value `reader` sees in `arg`; None where no node has it."""
    try:
        return effects.value_at(arg, reader) if isinstance(arg, Node) else None
    except Refuse:
        return None


def _through_views(node: Node) -> tuple[Node, tuple[Node, ...]]:
    crossed: list[Node] = []
    while op_name(node) in _KEEPS and isinstance(node.args[0], Node):
        crossed.append(node)
        node = node.args[0]
    return node, tuple(crossed)


def reduced(stat: Node, source: Node) -> tuple[int, ...] | None:
    dim = bound(stat).get("dim")
    if dim is None or bound(stat).get("dtype") is not None:
        return None
    rank = len(shape_of(source))
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    return tuple(sorted(d % rank for d in dims)) or None


def _broadcast_back(term: Node, stat: Node, source: Node, dims: tuple[int, ...]) -> bool:
    """The statistic meets its source with size one exactly where it was reduced.

    With keepdim it does. Without, it must have been unsqueezed or viewed at the same place; only the single-dimension
    forms are accepted.
    """
    rank = len(shape_of(source))
    if bound(stat).get("keepdim") is True:
        return term is stat or (op_name(term) in ("expand", "expand_as") and term.args[0] is stat)
    if len(dims) != 1 or op_name(term) != "unsqueeze" or term.args[0] is not stat:
        return False
    return bool(bound(term)["dim"] % rank == dims[0])
