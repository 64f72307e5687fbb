"""What trials against float64 (verify=True) have shown, in words: one verdict for each group of equal sites.

2x  layers.*.attn  native  fine
      worst: gradient on random inputs, error 1.4e-06, the original's 9.5e-07, allowed 2.4e-05
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attnpass.ledger import Decision, Report, Trial
from attnpass.report.group import Group, group_sites

PUT_BACK = ("verify_worse", "verify_raised")


def was_put_back(site: Decision) -> bool:
    """The site was left as it was because of its trials."""
    return not site.replaced and any(t.worse for t in site.trials)


def untried(site: Decision) -> bool:
    """Replaced without a single trial."""
    return site.replaced and not site.trials and site.untried is not None


def tried_groups(report: Report) -> list[Group[Decision]]:
    """The sites that were tried, or should have been."""
    return [group for group in group_sites(report.sites) if group.first.trials or group.first.untried]


def worst(sites: Sequence[Decision]) -> Trial | None:
    """The trial that comes nearest to what is allowed, or goes farthest beyond it.

    Of a site that was put back it is one of those that it was put back for.
    """
    trials = [t for site in sites for t in site.trials]
    counted = [t for t in trials if not t.inputs.startswith("padding")]
    return max(counted or trials, key=_excess, default=None)


def _excess(trial: Trial) -> float:
    if trial.allowed > 0:
        return trial.replacement / trial.allowed
    return math.inf if trial.replacement > 0 else 0.0


def kernel(site: Decision) -> str:
    """The kernel that was tried."""
    if site.kernel is not None:
        return site.kernel
    return next((v.kernel for v in site.verdicts if any(r.code in PUT_BACK for r in v.refusals)), "")


def verdict(site: Decision) -> tuple[str, str]:
    """In a word or two, and its style."""
    if was_put_back(site):
        return "put back", "red"
    if not site.trials:
        return "not tried", "yellow"
    if any(t.worse for t in site.trials):
        return "fine, if padding is clean", "magenta"
    return "fine", "green"


def told(trial: Trial) -> str:
    """One trial in words."""
    what = f"{trial.what} on {trial.inputs} inputs"
    if trial.detail:
        return f"{what}: {trial.detail}"
    here, own, allowed = map(number, (trial.replacement, trial.original, trial.allowed))
    return f"{what}, error {here}, the original's {own}, allowed {allowed}"


def number(error: float) -> str:
    return f"{error:.1e}" if math.isfinite(error) else "no number"


def headline(report: Report) -> str:
    """``tried against float64: 12 sites, 1 put back``."""
    groups = tried_groups(report)
    sites = [site for group in groups for site in group.members]
    back, missing = sum(map(was_put_back, sites)), sum(map(untried, sites))
    words = [f"{len(sites)} site{'' if len(sites) == 1 else 's'}"]
    words.append(f"{back} put back" if back else "none worse than its original")
    if missing:
        words.append(f"{missing} not tried")
    return "tried against float64: " + ", ".join(words)
