"""What the ledger is told of graphs as a whole: put back, not looked into, or done.

Every softmax of a graph is in its outcome exactly once, whatever happened to the graph. What was never looked into is
found by the names of calls alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch.fx import GraphModule, Node

from attnpass.capture.calls import is_softmax
from attnpass.capture.lower import Shadow
from attnpass.graph import where
from attnpass.ledger import Failure, Miss, Report
from attnpass.pipeline import Outcome
from attnpass.reasons import Reason, reason


def reported(outcomes: Iterable[Outcome], failures: Iterable[Failure] = ()) -> Report:
    """The outcomes of several graphs as one report."""
    known = tuple(outcomes)
    return Report(
        torch=torch.__version__,
        sites=tuple(site for outcome in known for site in outcome.decisions),
        misses=tuple(miss for outcome in known for miss in outcome.misses),
        failures=(*(failure for outcome in known for failure in outcome.failures), *failures),
        notes=tuple(note for outcome in known for note in outcome.notes),
    )


def undone(outcome: Outcome, why: Reason) -> Outcome:
    """The outcome of a graph that stays as it was: its sites are known, none is replaced."""
    decisions = tuple(
        dataclasses.replace(one, replaced=False, kernel=None, reason=why) if one.replaced else one
        for one in outcome.decisions
    )
    return dataclasses.replace(outcome, decisions=decisions, replacements=())


def not_looked_into(gm: GraphModule, name: str, why: Reason, failures: tuple[Failure, ...] = ()) -> Outcome:
    """The outcome of a graph of either kind in which every softmax is a miss."""
    return Outcome(misses=missed(gm, name, dict.fromkeys(gm.graph.nodes, why)), failures=failures)


def with_lost(gm: GraphModule, name: str, shadow: Shadow, outcome: Outcome) -> Outcome:
    """The outcome of a Dynamo graph with the softmaxes that never got into its shadow."""
    why = {
        node: reason("functorch") if shadow.states[node].functorch else reason("not_lowered", detail=text)
        for node, text in shadow.opaque.items()
    }
    lost = missed(gm, name, why, start=len(outcome.misses))
    return dataclasses.replace(outcome, misses=(*outcome.misses, *lost))


def missed(gm: GraphModule, name: str, why: Mapping[Node, Reason], start: int = 0) -> tuple[Miss, ...]:
    """The softmaxes among these nodes."""
    softmaxes = (node for node in gm.graph.nodes if node in why and is_softmax(gm, node))
    return tuple(
        Miss(id=f"{name}.m{number}", graph=name, where=where(node), reached=(), reason=why[node])
        for number, node in enumerate(softmaxes, start)
    )


def untold(gm: GraphModule, name: str, told: Collection[GraphModule], why: Reason) -> Iterator[Outcome]:
    """The same for a graph and all those inside it of which nothing was told yet."""
    for path, inner in gm.named_modules():
        if isinstance(inner, GraphModule) and inner not in told:
            yield not_looked_into(inner, f"{name}.{path}" if path else name, why)
