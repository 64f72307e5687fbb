"""Choosing a kernel for a site: every kernel is asked, every refusal is kept, the best that accepts is taken.

    asked for by name     in the order given, whatever they are expected to cost
    all others            by expected cost, if that is not above the original's (min_gain)
    "keep"                ends the list: the site is rather left

Leaving the graph as it is is always an allowed choice. Capabilities are read before preferences: what a kernel
computes does not depend on what the user likes. Two things are never done unasked: an approximate kernel is taken only
where that is allowed, however it is named, and a kernel that is there to be named is not considered otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from attnpass.closed import obstacles as unsaid
from attnpass.cost import unfused_us
from attnpass.errors import first_line
from attnpass.functions import obstacles
from attnpass.gain import gained
from attnpass.graph import where
from attnpass.kernels import Kernel, kernels
from attnpass.ledger import Verdict, Where
from attnpass.names import KEEP, NATIVE
from attnpass.policy import Policy
from attnpass.prove import Proved
from attnpass.reasons import Reason, reason
from attnpass.site import Site

_ALIKE = 1.03  # what was measured of one kernel differs by as much from one day to another


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernels that would serve a site, the best one first, or why there is none."""

    kernels: tuple[Kernel, ...]
    reason: Reason | None
    verdicts: tuple[Verdict, ...]
    asked: tuple[str, ...] = ()  # what the user would have for this site
    errors: tuple[Exception, ...] = ()  # raised by kernels when they were asked, which they must not


def choose(proved: Proved, policy: Policy, fuel: int | None, *, compiled: bool = False) -> Choice:
    """Ask all kernels about a site; `compiled`: inductor will compile the graph."""
    site = proved.site
    try:
        asked = policy.asked(where(site.anchor) if policy.rules else Where(), site.spec)
    except Exception as error:  # a predicate of the user's: no reason not to run his model
        return Choice(kernels=(), reason=reason("rule_failed", detail=first_line(error)), verdicts=())
    considered = {k.name: k for k in kernels() if not k.only_by_name or k.name in asked}
    answers: dict[str, Verdict] = {}
    errors: list[Exception] = []
    for name, kernel in considered.items():
        try:
            answers[name] = _verdict(kernel, proved, policy, compiled, named=name in asked)
        except Exception as error:  # anybody may register a kernel: one that fails here is not taken
            errors.append(error)
            answers[name] = Verdict(kernel=name, refusals=(reason("failed", detail=first_line(error)),))
    willing: dict[str, Verdict] = {}
    for name, answer in list(answers.items()):
        if not answer.accepts:
            continue
        if not site.existing_call or gained(proved, considered[name], named=name in asked):
            willing[name] = answer
        elif name in asked and name != NATIVE:  # which is what the call is already
            answers[name] = dataclasses.replace(answer, refusals=(reason("unlike_call"),), cost_us=None)
    named, alone = _named(site, asked, willing)
    others = [] if alone else _by_cost([v for v in willing.values() if v.kernel not in named])
    best = [*named, *(v.kernel for v in _gainful(site, others, policy))]
    verdicts = (*answers.values(), *_unregistered(asked, considered))
    why = _kept(site, policy, fuel, asked, best)
    if why is None and not best:
        why = reason("not_profitable") if others else reason("kept") if KEEP in asked else _no_kernel(verdicts)
    taken = () if why is not None else tuple(considered[name] for name in best)
    return Choice(kernels=taken, reason=why, verdicts=verdicts, asked=asked, errors=tuple(errors))


def _verdict(kernel: Kernel, proved: Proved, policy: Policy, compiled: bool, *, named: bool) -> Verdict:
    site = proved.site
    refusals = tuple(kernel.refusals(site.spec))
    if kernel.takes == "tensor" and site.bent:
        refusals = (*refusals, reason("empty_rows", detail="gradients through the soft cap"))
    if kernel.takes == "forms":
        refusals = (*refusals, *unsaid(proved, kernel))
    if kernel.takes == "functions":
        uncompiled = () if compiled else (reason("not_compiled"),)
        refusals = (*uncompiled, *refusals, *obstacles(proved, while_tame=True))
    if kernel.can.approximate and not policy.allow_approximate:
        refusals = (*refusals, reason("approximate"))
    # packages are imported only for a site that they would serve, or to tell who asked for one that it is missing
    missing = kernel.available() if named or not refusals else None
    refusals = tuple(
        dict.fromkeys((*((missing,) if missing else ()), *refusals))
    )  # one width too wide is as good as two
    return Verdict(kernel=kernel.name, refusals=refusals, cost_us=None if refusals else kernel.cost(site.spec))


def _unregistered(asked: Sequence[str], considered: Collection[str]) -> list[Verdict]:
    """Kernels that have a name, but are not there: taken out again, or of a package that was left out."""
    missing = reason("unavailable", detail="no kernel of this name is registered")
    return [Verdict(kernel=n, refusals=(missing,)) for n in asked if n not in considered and n != KEEP]


def _named(site: Site, asked: Sequence[str], willing: Collection[str]) -> tuple[list[str], bool]:
    """The kernels that were asked for and would serve, in that order; and whether no others may be taken."""
    named: list[str] = []
    for name in asked:
        # a call that torch's own kernels serve already, and no better if it were written anew, has what is asked for
        if name == KEEP or (name == NATIVE and site.existing_call and name not in willing):
            return named, True
        if name in willing:
            named.append(name)
    return named, False


def _by_cost(verdicts: list[Verdict]) -> list[Verdict]:
    """Those that tell no cost keep their order, behind those that do; and so do those that are as good as the best."""
    least = min((v.cost_us for v in verdicts if v.cost_us is not None), default=0.0)

    def expected(verdict: Verdict) -> float:
        if verdict.cost_us is None:
            return math.inf
        return least if verdict.cost_us <= _ALIKE * least else verdict.cost_us

    return sorted(verdicts, key=expected)


def _gainful(site: Site, verdicts: list[Verdict], policy: Policy) -> list[Verdict]:
    """Those expected to be as much faster than the original as the policy wants; where nothing is known, all."""
    now = unfused_us(site.spec)
    if site.existing_call or now is None or not verdicts or verdicts[0].cost_us is None:
        return verdicts
    return [v for v in verdicts if v.cost_us is not None and v.cost_us <= (1 - policy.min_gain) * now]


def _kept(site: Site, policy: Policy, fuel: int | None, asked: Sequence[str], best: Sequence[str]) -> Reason | None:
    if tuple(asked) == (KEEP,):
        return reason("kept")
    if site.existing_call and not best:
        return reason("already_fused")
    if site.obstacles:
        return site.obstacles[0]
    if policy.strict and site.assumptions:
        return reason("strict", detail="; ".join(site.assumptions))
    if fuel is not None and fuel <= 0:
        return reason("fuel")
    return None


def _no_kernel(verdicts: Sequence[Verdict]) -> Reason:
    """What each kernel that could run here has against it."""
    here = [v for v in verdicts if not v.absent]
    texts = [f"{v.kernel}: {', '.join(refusal.text for refusal in v.refusals)}" for v in here]
    away = len(verdicts) - len(here)
    return reason("no_kernel", detail="; ".join([*texts, *([f"{away} more cannot run here"] if away else [])]))
