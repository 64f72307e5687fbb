"""The whole pass over one ATen graph, one named stage a line.

    recognize -> prove -> choose -> rewrite -> verify -> report

``capture`` brings graphs here and takes the result back; the ledger entries made here are what every report shows.
The pass is transactional: it works on a graph that its caller can throw away, a site that fails is taken back whole,
and whatever goes wrong inside becomes a :class:`~attnpass.ledger.Failure`, never an exception.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.fx import Graph, Node

from attnpass.autotune import fastest_first
from attnpass.choose import Choice, choose
from attnpass.cost import called_us, unfused_us
from attnpass.emit import build
from attnpass.errors import Refuse, first_line
from attnpass.graph import Shared, State, tensor, where
from attnpass.kernels import Kernel
from attnpass.ledger import Decision, Failure, Miss, Saves, Verdict
from attnpass.policy import Policy
from attnpass.prove import WAIVED, Proved, prove, waive
from attnpass.reasons import Reason, reason
from attnpass.recognize import Finding, Lost, find
from attnpass.recognize.purity import Effects
from attnpass.site import Site
from attnpass.spelling import spelling_hash
from attnpass.standin import stand_ins
from attnpass.verify import checked

if TYPE_CHECKING:
    from attnpass.trial import Examiner


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One rewritten site: every use of `output` now reads `fused`; `dead` has lost its last live reader."""

    site: str
    output: Node
    fused: Node
    dead: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the pass did to one graph; a failure of the whole graph means that it is not to be used."""

    decisions: tuple[Decision, ...] = ()
    misses: tuple[Miss, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    replacements: tuple[Replacement, ...] = field(default=())
    relies_on: Mapping[str, frozenset[str]] = field(default_factory=dict)  # of replaced sites: held tensors, by node

    @property
    def failed(self) -> bool:
        return any(failure.part is None for failure in self.failures)


def run(
    graph: Graph,
    *,
    name: str,
    policy: Policy,
    state: State,
    rewrite: bool = True,
    constants: Mapping[str, torch.Tensor] | None = None,
    held: Mapping[str, torch.Tensor] | None = None,
    compiled: bool = False,
    examiner: Examiner | None = None,
    left: Collection[str] = (),
) -> Outcome:
    """Run the pass on one graph in place; with rewrite=False only decide.

    `constants` are tensors that are part of the code, by the name of their node; `held` are tensors of the model that
    hold these values now, and that the caller watches. `compiled`: inductor will compile the graph. `examiner` tries
    what was built before any use is moved; what is worse than the original is put back. `left`: sites, by id, that are
    not to be replaced (for bisection).

    Nested graphs are the caller's: each is a graph of its own here. Dead nodes are left in the graph for the caller to
    erase, because only he knows what else refers to them.
    """
    stage = "recognize"
    finding: Finding | None = None
    failures: list[Failure] = []
    try:
        finding = find(graph, state)
        failures += [
            Failure.of(name, stage, lost.error, f"{name}.m{i}")
            for i, lost in enumerate(finding.lost)
            if lost.error is not None
        ]
        misses = tuple(_miss(lost, f"{name}.m{i}", name) for i, lost in enumerate(finding.lost))
        decisions: list[Decision] = []
        pairs: list[tuple[str, Node, Node]] = []
        built: list[tuple[Proved, Choice]] = []
        relies_on: dict[str, frozenset[str]] = {}
        stage = "prove"
        # all proofs before the first insertion: they speak of the graph as it was found
        proofs = prove(graph, [_surrounded(site) for site in finding.sites], constants or {}, held or {})
        if policy.empty_rows == "dont_care":
            proofs = [waive(proved) for proved in proofs]
        notes = tuple(
            f"a bug of attnpass, please report it: {name}, masks: {p.bug}" for p in proofs if p.bug is not None
        )
        shared = Shared()
        for i, proved in enumerate(proofs):
            id_ = f"{name}.s{i}"
            failures += [Failure.of(name, "prove", error, id_) for error in proved.errors]
            stage = "choose"
            fuel = None if policy.fuel is None else policy.fuel - sum(d.replaced for d in decisions)
            choice = choose(proved, policy, 0 if id_ in left else fuel, compiled=compiled)
            failures += [Failure.of(name, stage, error, id_) for error in choice.errors]
            if policy.autotune:
                stage = "autotune"
                try:
                    choice = fastest_first(graph, proved, choice, policy, compiled=compiled)
                except Exception as error:  # then the kernels come in the order that is expected
                    failures.append(Failure.of(name, stage, error, id_))
            stage = "rewrite"
            decision, moved, errors = _carry_out(graph, proved, choice, shared, id_, name)
            failures += [Failure.of(name, stage, error, id_) for error in errors]
            decisions.append(decision)
            pairs += [(decision.id, old, new) for old, new in moved]
            built.append((proved, choice))
            if moved and proved.held:
                relies_on[decision.id] = proved.held
        stage = "verify"
        if examiner is not None:
            decisions = _tried(graph, decisions, built, pairs, examiner, policy)
            kept = {decision.id for decision in decisions if decision.replaced}
            _take_back(graph, [new for id_, _, new in pairs if id_ not in kept])
            pairs = [pair for pair in pairs if pair[0] in kept]
            relies_on = {id_: names for id_, names in relies_on.items() if id_ in kept}
        if rewrite:
            for _, old, new in pairs:
                old.replace_all_uses_with(new)
            replacements = _with_dead(graph, finding, pairs)
        else:
            _take_back(graph, [new for *_, new in pairs])
            replacements = ()
        return Outcome(
            decisions=tuple(decisions),
            misses=misses,
            failures=tuple(failures),
            notes=notes,
            replacements=replacements,
            relies_on=relies_on,
        )
    except Exception as error:
        return _failed(finding, name, first_line(error), (*failures, Failure.of(name, stage, error)))


def _failed(finding: Finding | None, name: str, why: str, failures: tuple[Failure, ...]) -> Outcome:
    """Nothing was done; what had been found by then is told."""
    if finding is None:
        return Outcome(failures=failures)
    decisions = (
        Decision(
            id=f"{name}.s{i}",
            graph=name,
            where=where(site.anchor),
            spec=site.spec,
            replaced=False,
            reason=reason("failed", detail=why),
        )
        for i, site in enumerate(finding.sites)
    )
    misses = (_miss(lost, f"{name}.m{i}", name) for i, lost in enumerate(finding.lost))
    try:
        return Outcome(decisions=tuple(decisions), misses=tuple(misses), failures=failures)
    except Exception:  # what failed may be what would tell
        return Outcome(failures=failures)


def _surrounded(site: Site) -> Site:
    """What the graph does not tell of how it will run."""
    spec = dataclasses.replace(site.spec, deterministic=torch.are_deterministic_algorithms_enabled())
    return dataclasses.replace(site, spec=spec)


def _carry_out(
    graph: Graph, proved: Proved, choice: Choice, shared: Shared, id_: str, name: str
) -> tuple[Decision, list[tuple[Node, Node]], list[Exception]]:
    """Build and check the replacement of one site: what is to be read in place of what. No use is touched yet."""
    site = proved.site
    decision = Decision(
        id=id_,
        graph=name,
        where=where(site.anchor),
        spec=site.spec,
        replaced=False,
        reason=choice.reason,
        asked=choice.asked,
        verdicts=choice.verdicts,
        proofs=proved.steps,
    )
    errors: list[Exception] = []
    for kernel in choice.kernels:
        try:
            moved = _replaced(graph, proved, kernel, shared)
        except Refuse as why:
            failed = reason(why.code, **why.details)
        except Exception as error:
            errors.append(error)
            failed = reason("failed", detail=first_line(error))
        else:
            return _done(decision, site, kernel), moved, errors
        # the next best may do
        decision = dataclasses.replace(
            decision, reason=decision.reason or failed, verdicts=_refused(decision.verdicts, kernel, failed)
        )
    return decision, [], errors


def _tried(
    graph: Graph,
    decisions: Sequence[Decision],
    made_from: Sequence[tuple[Proved, Choice]],
    pairs: Sequence[tuple[str, Node, Node]],
    examiner: Examiner,
    policy: Policy,
) -> list[Decision]:
    """The decisions after each replacement has been run beside its original."""
    from attnpass.trial import built_sites, judged

    ends = {id_: new for id_, _, new in pairs}  # of a site's pairs the last one is its output
    tried = examiner(graph, built_sites(decisions, made_from, ends))
    return [judged(decision, tried.get(decision.id), policy) for decision in decisions]


def _refused(verdicts: tuple[Verdict, ...], kernel: Kernel, why: Reason) -> tuple[Verdict, ...]:
    """A kernel that had accepted, but whose call could not be written."""
    return tuple(
        dataclasses.replace(v, refusals=(*v.refusals, why), cost_us=None) if v.kernel == kernel.name else v
        for v in verdicts
    )


def _replaced(graph: Graph, proved: Proved, kernel: Kernel, shared: Shared) -> list[tuple[Node, Node]]:
    """The call of one kernel, built and checked; nothing of it is left where that fails."""
    b, fused = build(graph, proved, kernel, shared)
    try:
        fused = checked(b, proved.site.output, fused)
        return [*stand_ins(graph, proved.site), (proved.site.output, fused)]
    except BaseException:
        b.discard()
        raise


def _done(decision: Decision, site: Site, kernel: Kernel) -> Decision:
    return dataclasses.replace(
        decision,
        replaced=True,
        reason=None,
        kernel=kernel.name,
        # what the user has waived himself is no assumption that strict would refuse, but it has to be said
        assumptions=(*site.assumptions, *((WAIVED,) if site.waived else ())),
        saves=Saves(bytes=_saved(site), us=_saved_us(site, decision.verdicts, kernel)),
    )


def _saved_us(site: Site, verdicts: Sequence[Verdict], kernel: Kernel) -> float | None:
    """Microseconds that one forward call is expected to save."""
    now = called_us(site.spec) if site.existing_call else unfused_us(site.spec)
    cost = next((v.cost_us for v in verdicts if v.kernel == kernel.name and not v.timed), None)
    return None if now is None or cost is None else now - cost


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
        return ()  # nothing was rewritten: the graph need not be looked at again
    after = Effects(graph)
    still = after.live()
    # of masks that were dropped or computed anew not even the stand-ins are needed
    pairs = sorted((pair for pair in pairs if pair[2] in still), key=lambda pair: after.position[pair[1]])
    if not pairs:
        return ()
    ends = [after.position[old] for _, old, _ in pairs]
    dead: list[list[Node]] = [[] for _ in pairs]
    gone: set[Node] = set()
    for node in graph.nodes:
        # what was never needed goes along where it reads something that goes (checks, unused averages)
        idle = any(arg in gone for arg in node.all_input_nodes)
        if node not in still and (node in finding.live or idle or node.meta.get("attnpass_made")):
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
