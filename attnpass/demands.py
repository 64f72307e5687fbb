"""What a policy demands of a finished report.

A kernel that was asked for may turn out not to serve at any stage: when kernels are asked, when the call is written,
when the result is checked. So it is not the stages that raise, but this, once everything is known and for all sites
together.
"""

from __future__ import annotations

import os

from attnpass.errors import AttnpassError
from attnpass.ledger import Decision, Report, Where
from attnpass.names import KEEP, NATIVE
from attnpass.policy import Policy

_PLACES = 3  # how many equal sites an error names


def insist(policy: Policy, report: Report) -> None:
    """With `strict_kernel`: an error that names every site which has not got a kernel asked for, and every reason."""
    if not policy.strict_kernel:
        return
    places: dict[str, list[str]] = {}
    for site in report.sites:
        if not _satisfied(site):
            places.setdefault(_why(site), []).append(_place(site.where))
    texts = [f"{_several(names)}: {why}" for why, names in places.items()]
    if policy.kernel is not None or policy.rules:
        # what a graph that failed holds is not known, so it is not known to be as asked either
        texts += [f"{f.graph}: {f.stage} failed: {f.line}" for f in report.failures if f.part is None]
    if texts:
        raise AttnpassError("strict_kernel: no kernel that was asked for serves\n  " + "\n  ".join(texts))


def unmatched(policy: Policy, report: Report) -> tuple[str, ...]:
    """A remark on each rule that fits none of the sites: mostly a name that is not spelled as it is in the model."""
    if not report.sites:
        return ()
    remarks = []
    for rule in policy.each_rule():
        try:
            if any(rule.fits(site.where, site.spec) for site in report.sites):
                continue
        except Exception:  # its sites say so
            continue
        remarks.append(f"the rule for {rule} fits no site")
    return tuple(remarks)


def _satisfied(site: Decision) -> bool:
    names = [name for name in site.asked if name != KEEP]
    if not names or site.kernel in names:
        return True
    code = None if site.reason is None else site.reason.code
    if code == "already_fused" and NATIVE in names:
        return True
    # left as the user himself would have it
    return not site.replaced and (KEEP in site.asked or code == "fuel")


def _why(site: Decision) -> str:
    refusals = {verdict.kernel: verdict.refusals for verdict in site.verdicts}
    texts = [f"{name}: {', '.join(r.text for r in refusals[name])}" for name in site.asked if refusals.get(name)]
    # a reason that speaks of the kernels would only repeat theirs
    if site.reason is not None and not (texts and site.reason.code in ("no_kernel", "already_fused")):
        texts.insert(0, site.reason.text)
    return "; ".join(texts)


def _place(where: Where) -> str:
    """``layers.0.attn (gpt.py:41)``."""
    name = where.module or where.cls or "(no module)"
    return name if where.file is None else f"{name} ({os.path.basename(where.file)}:{where.line})"


def _several(names: list[str]) -> str:
    more = len(names) - _PLACES
    return ", ".join(names[:_PLACES]) + (f" and {more} more" if more > 0 else "")
