"""Choosing a kernel for a site: every kernel is asked, every refusal is kept, the cheapest that accepts is taken.

Leaving the graph as it is is always an allowed choice. Capabilities are read before preferences: what a kernel
computes does not depend on what the user likes.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnpass.closed import obstacles as unsaid
from attnpass.functions import obstacles
from attnpass.gain import gained
from attnpass.kernels import Kernel, kernels
from attnpass.ledger import Verdict
from attnpass.policy import Policy
from attnpass.prove import Proved
from attnpass.reasons import Reason, reason
from attnpass.site import Site


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernels that would serve a site, the best one first, or why there is none."""

    kernels: tuple[Kernel, ...]
    reason: Reason | None
    verdicts: tuple[Verdict, ...]


def choose(proved: Proved, policy: Policy, fuel: int | None, *, compiled: bool = False) -> Choice:
    """Ask all kernels about a site; `compiled`: inductor will compile the graph."""
    site = proved.site
    asked = [(kernel, _verdict(kernel, proved, compiled)) for kernel in kernels()]
    verdicts = tuple(verdict for _, verdict in asked)
    willing = [pair for pair in asked if pair[1].accepts and (not site.existing_call or gained(proved, pair[0]))]
    why = reason("already_fused") if site.existing_call and not willing else _kept(site, policy, fuel)
    if why is not None:
        return Choice(kernels=(), reason=why, verdicts=verdicts)
    if not willing:
        texts = "; ".join(f"{v.kernel}: {', '.join(r.text for r in v.refusals)}" for v in verdicts)
        return Choice(kernels=(), reason=reason("no_kernel", detail=texts), verdicts=verdicts)
    # kernels that tell no cost keep their order, behind those that do
    ranked = sorted(willing, key=lambda pair: float("inf") if pair[1].cost_us is None else pair[1].cost_us)
    return Choice(kernels=tuple(kernel for kernel, _ in ranked), reason=None, verdicts=verdicts)


def _verdict(kernel: Kernel, proved: Proved, compiled: bool) -> Verdict:
    site = proved.site
    missing = kernel.available()
    refusals = (*((missing,) if missing else ()), *kernel.refusals(site.spec))
    if kernel.takes == "forms":
        refusals = (*refusals, *unsaid(proved, kernel))
    if kernel.takes == "functions":
        uncompiled = () if compiled else (reason("not_compiled"),)
        refusals = (*uncompiled, *refusals, *obstacles(proved))
    return Verdict(kernel=kernel.name, refusals=refusals, cost_us=None if refusals else kernel.cost(site.spec))


def _kept(site: Site, policy: Policy, fuel: int | None) -> Reason | None:
    if site.obstacles:
        return site.obstacles[0]
    if policy.strict and site.assumptions:
        return reason("strict", detail="; ".join(site.assumptions))
    if fuel is not None and fuel <= 0:
        return reason("fuel")
    return None
