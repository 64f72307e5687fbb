"""Choosing a kernel for a site: every kernel is asked, every refusal is kept, the cheapest that accepts is taken.

Leaving the graph as it is is always an allowed choice. Capabilities are read before preferences: what a kernel
computes does not depend on what the user likes.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnpass.kernels import Kernel, kernels
from attnpass.ledger import Verdict
from attnpass.policy import Policy
from attnpass.reasons import Reason, reason
from attnpass.site import Site


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernel chosen for a site, or why there is none."""

    kernel: Kernel | None
    reason: Reason | None
    verdicts: tuple[Verdict, ...]


def choose(site: Site, policy: Policy, fuel: int | None) -> Choice:
    """Ask all kernels about a site."""
    asked = [(kernel, _verdict(kernel, site)) for kernel in kernels()]
    verdicts = tuple(verdict for _, verdict in asked)
    why = _kept(site, policy, fuel)
    if why is not None:
        return Choice(kernel=None, reason=why, verdicts=verdicts)
    willing = [(kernel, verdict) for kernel, verdict in asked if verdict.accepts]
    if not willing:
        texts = "; ".join(f"{v.kernel}: {', '.join(r.text for r in v.refusals)}" for v in verdicts)
        return Choice(kernel=None, reason=reason("no_kernel", detail=texts), verdicts=verdicts)
    # kernels that tell no cost keep their order, behind those that do
    best = min(willing, key=lambda pair: float("inf") if pair[1].cost_us is None else pair[1].cost_us)
    return Choice(kernel=best[0], reason=None, verdicts=verdicts)


def _verdict(kernel: Kernel, site: Site) -> Verdict:
    missing = kernel.available()
    refusals = (*((missing,) if missing else ()), *kernel.refusals(site.spec))
    return Verdict(kernel=kernel.name, refusals=refusals, cost_us=None if refusals else kernel.cost(site.spec))


def _kept(site: Site, policy: Policy, fuel: int | None) -> Reason | None:
    if site.obstacles:
        return site.obstacles[0]
    if policy.strict and site.assumptions:
        return reason("strict", detail="; ".join(site.assumptions))
    if fuel is not None and fuel <= 0:
        return reason("fuel")
    return None
