"""The whole pass over one ATen graph, one named stage a line.

    recognize -> choose -> rewrite -> verify -> report

``capture`` brings graphs here and takes the result back; the ledger entries made here are what every report shows.
The pass is transactional: it works on a graph that its caller can throw away, a site that fails is taken back whole,
and whatever goes wrong inside becomes a :class:`~attnpass.ledger.Failure`, never an exception.
"""

from __future__ import annotations

import bisect
import dataclasses
import traceback
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from attnpass.choose import Choice, choose
from attnpass.emit import build
from attnpass.errors import Refuse, first_line
from attnpass.graph import State, tensor, where
from attnpass.ledger import Decision, Failure, Miss, Saves
from attnpass.policy import Policy
from attnpass.reasons import reason
from attnpass.recognize import Finding, Lost, find
from attnpass.recognize.purity import Effects
from attnpass.site import Site
from attnpass.spelling import spelling_hash
from attnpass.verify import checked


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One rewritten site: every use of `output` now reads `fused`; `dead` has lost its last live reader."""

    site: str
    output: Node
    fused: Node
    dead: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the pass did to one graph."""

    decisions: tuple[Decision, ...] = ()
    misses: tuple[Miss, ...] = ()
    failures: tuple[Failure, ...] = ()
    replacements: tuple[Replacement, ...] = field(default=())


def run(graph: Graph, *, name: str, policy: Policy, state: State, rewrite: bool = True) -> Outcome:
    """Run the pass on one graph in place; with rewrite=False only decide.

    Nested graphs are the caller's: each is a graph of its own here. Dead nodes are left in the graph for the caller to
    erase, because only he knows what else refers to them.
    """
    stage = "recognize"
    try:
        finding = find(graph, state)
        misses = tuple(_miss(lost, f"{name}.m{i}", name) for i, lost in enumerate(finding.lost))
        decisions: list[Decision] = []
        pairs: list[tuple[str, Node, Node]] = []
        for i, site in enumerate(finding.sites):
            stage = "choose"
            fuel = None if policy.fuel is None else policy.fuel - sum(d.replaced for d in decisions)
            choice = choose(site, policy, fuel)
            stage = "rewrite"
            decision, pair = _carry_out(graph, site, choice, f"{name}.s{i}", name)
            decisions.append(decision)
            if pair is not None:
                pairs.append((decision.id, *pair))
        stage = "verify"
        if rewrite:
            for _, old, new in pairs:
                old.replace_all_uses_with(new)
            replacements = _with_dead(graph, finding, pairs)
        else:
            _take_back(graph, [new for *_, new in pairs])
            replacements = ()
        return Outcome(decisions=tuple(decisions), misses=misses, replacements=replacements)
    except Exception:
        return Outcome(failures=(Failure(graph=name, stage=stage, text=traceback.format_exc()),))


def _carry_out(
    graph: Graph, site: Site, choice: Choice, id_: str, name: str
) -> tuple[Decision, tuple[Node, Node] | None]:
    """Build and check the replacement of one site; the graph's uses are not touched yet."""
    decision = Decision(
        id=id_,
        graph=name,
        where=where(site.anchor),
        spec=site.spec,
        replaced=False,
        reason=choice.reason,
        verdicts=choice.verdicts,
    )
    if choice.kernel is None:
        return decision, None
    try:
        b, fused = build(graph, site, choice.kernel)
        try:
            fused = checked(b, site.output, fused)
        except BaseException:
            b.discard()
            raise
    except Refuse as why:
        return dataclasses.replace(decision, reason=reason(why.code, **why.details)), None
    except Exception as error:
        return dataclasses.replace(decision, reason=reason("failed", detail=first_line(error))), None
    done = dataclasses.replace(
        decision,
        replaced=True,
        kernel=choice.kernel.name,
        assumptions=site.assumptions,
        saves=Saves(bytes=_saved(site)),
    )
    return done, (site.output, fused)


def _saved(site: Site) -> int | None:
    """Bytes of the tensors over queries and keys that no longer come to be."""
    total = 0
    outer = 1
    for size in (*site.spec.q[:3], site.spec.keys):
        if not isinstance(size, int):
            return None
        outer *= size
    for node in site.region:
        val = tensor(node)
        if node is not site.output and val is not None and val.numel() == outer:
            total += outer * val.element_size()
    return total


def _with_dead(graph: Graph, finding: Finding, pairs: list[tuple[str, Node, Node]]) -> tuple[Replacement, ...]:
    """What each replacement has made superfluous: alive before, not needed now."""
    if not pairs:
        return ()
    after = Effects(graph)
    still = after.live()
    ends = [after.position[old] for _, old, _ in pairs]
    dead: list[list[Node]] = [[] for _ in pairs]
    gone: set[Node] = set()
    for node in graph.nodes:
        # what was never needed goes along where it reads something that goes (checks, unused averages)
        idle = any(arg in gone for arg in node.all_input_nodes)
        if node not in still and (node in finding.live or idle):
            gone.add(node)
            # it died with the first site that ends behind it
            dead[min(bisect.bisect_left(ends, after.position[node]), len(ends) - 1)].append(node)
    return tuple(
        Replacement(site=id_, output=old, fused=new, dead=tuple(nodes))
        for (id_, old, new), nodes in zip(pairs, dead, strict=True)
    )


def _take_back(graph: Graph, ends: list[Node]) -> None:
    """Erase what was built only to be checked."""
    work = list(ends)
    while work:
        node = work.pop()
        if node.users or node._erased or not node.meta.get("attnpass_made"):
            continue
        inputs = list(node.all_input_nodes)
        graph.erase_node(node)
        work.extend(inputs)


def _miss(lost: Lost, id_: str, name: str) -> Miss:
    return Miss(
        id=id_,
        graph=name,
        where=where(lost.anchor),
        reached=lost.reached,
        reason=reason(lost.refusal.code, **lost.refusal.details),
        shape_hash=spelling_hash(lost.anchor),
    )
