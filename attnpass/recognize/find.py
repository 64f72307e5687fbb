"""The driver of recognition: one pass over a graph's softmaxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from attnpass.errors import Refuse, first_line
from attnpass.graph import State, tensor
from attnpass.recognize import scores as _rules  # noqa: F401  importing registers the rules
from attnpass.recognize.assemble import Place, assemble
from attnpass.recognize.axes import Axes
from attnpass.recognize.existing import existing_call
from attnpass.recognize.gradients import mark_gradients
from attnpass.recognize.inner import Inner
from attnpass.recognize.ops import describe
from attnpass.recognize.purity import Effects
from attnpass.recognize.safe import with_guard
from attnpass.recognize.scaled import Scales
from attnpass.recognize.softmax import Anchor, anchors
from attnpass.recognize.walk import Walker
from attnpass.recognize.weights import outwards
from attnpass.site import Factor, Site
from attnpass.spec import EmptyRow


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A softmax that is no site."""

    anchor: Node
    at: Node | None
    reached: tuple[str, ...]
    refusal: Refuse
    error: Exception | None = None  # a mistake of a rule: it costs this softmax its site


@dataclass(frozen=True, kw_only=True)
class Finding:
    """All softmaxes of one graph, each in exactly one of the two lists."""

    sites: tuple[Site, ...]
    lost: tuple[Lost, ...]
    live: set[Node]


def find(graph: Graph, default: State) -> Finding:
    """Recognise every softmax of a graph."""
    effects = Effects(graph)
    mark_gradients(graph, default, effects)
    live = effects.live()
    place = Place(effects=effects, live=live, default=default)
    lookahead: dict[Node, bool] = {}
    sites: list[Site] = []
    lost: list[Lost] = []
    for plain in anchors(graph, effects, live):
        anchor = with_guard(plain, effects, live)
        trail: list[str] = []
        try:
            sites.append(_recognise(anchor, place, lookahead, trail))
        except Refuse as why:
            lost.append(Lost(anchor=anchor.node, at=why.node, reached=tuple(trail), refusal=why))
        except Exception as error:
            refusal = Refuse("failed", anchor.node, detail=first_line(error))
            lost.append(Lost(anchor=anchor.node, at=None, reached=tuple(trail), refusal=refusal, error=error))
    return Finding(sites=tuple(sites), lost=tuple(lost), live=live)


def _recognise(anchor: Anchor, place: Place, lookahead: dict[Node, bool], trail: list[str]) -> Site:
    if anchor.fused:
        return existing_call(anchor, place)
    if place.sums_exponentials:
        try:
            return _site(anchor, place, lookahead, [], scaled=True)
        except Refuse:
            pass  # without a sink the log-sum-exp is one more reader of the scores
    return _site(anchor, place, lookahead, trail, scaled=False)


def _site(anchor: Anchor, place: Place, lookahead: dict[Node, bool], trail: list[str], *, scaled: bool) -> Site:
    """The site of one softmax; `scaled`: whose result is scaled by a log-sum-exp, which makes a sink of it."""
    assert isinstance(anchor.source, Node)
    val, probabilities = tensor(anchor.source), tensor(anchor.node)
    if val is None or probabilities is None or not val.is_floating_point():
        raise Refuse("not_floating", anchor.node, dtype="no tensor" if val is None else str(val.dtype).split(".")[-1])
    if any(isinstance(size, int) and size == 0 for size in val.shape):
        raise Refuse("empty_tensor", anchor.node)
    axes = Axes()
    layout = axes.of_shape(val.shape)
    over = tuple(a for d in anchor.dims for a in layout[d])
    trail.append(describe(anchor.node))
    if not over:
        raise Refuse("single_key", anchor.node)
    walker = Walker(place.effects, axes, over, lookahead, bears=_bears(anchor))
    source = walker.read(anchor.reader, anchor.source)
    scales = Scales(axes, place.effects, place.live)
    scaling = scales.read(anchor, source, layout, over) if scaled else None
    if scaled and scaling is None:
        raise Refuse("no_product_after", anchor.node, op="nothing")
    reader = tensor(anchor.reader)
    start = Inner(
        node=source,
        layout=layout,
        factor=Factor(anchor.base),
        sink=None if scaling is None else scaling.sink,
        narrowest=val.dtype if reader is None or not reader.is_floating_point() else reader.dtype,  # softmax(dtype=...)
    )
    try:
        found = walker.walk(start)
    except Refuse as why:
        trail.extend(_path(source, why.node))
        raise
    trail.extend(describe(node) for node in found.at.seen)
    out = outwards(anchor.node, axes.resolve(layout), axes, place.effects, place.live, walker.sink)
    if not out.products:
        raise _why_no_values(out.refused) or Refuse("no_product_after", anchor.node, op="nothing")
    if scaling is not None:
        scales.apply(scaling, out)
    return assemble(anchor, layout, found, out, walker, place)


def _bears(anchor: Anchor) -> float:
    """How much may be added to all scores without a change: anything, unless exponentials are summed as they are."""
    val = tensor(anchor.reader)
    if anchor.low is not EmptyRow.NAN or val is None:
        return math.inf
    return math.log(torch.finfo(val.dtype).max) / 3  # which leaves room for the scores


def _why_no_values(refused: list[Refuse]) -> Refuse | None:
    """The most telling of several reasons: what looks most like attention."""
    order = ("mutated", "probabilities_changed", "mixes_heads", "axes_mixed", "not_a_query_key_product")
    for code in order:
        for why in refused:
            if why.code == code:
                return why
    return refused[0] if refused else None


def _path(start: Node, stop: Node | None) -> list[str]:
    """What was crossed before the walk stopped, by the first operands."""
    if stop is None:
        return []
    path: list[str] = []
    node = start
    while node is not stop and len(path) < 24:
        path.append(describe(node))
        inputs = [arg for arg in node.all_input_nodes if tensor(arg) is not None]
        if not inputs:
            break
        node = inputs[0]
    return path
