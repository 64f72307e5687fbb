"""What trials do to a decision: a site that is worse than its original is left as it was, and the ledger says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch.fx import Node

from attnpass.choose import Choice
from attnpass.ledger import Decision, Saves
from attnpass.policy import Policy
from attnpass.prove import Proved
from attnpass.reasons import Reason, reason
from attnpass.trial.examine import Tried
from attnpass.trial.pair import Built

CLEAN = "keys that no query sees hold neither NaN nor infinity"


def built_sites(
    decisions: Sequence[Decision], made_from: Sequence[tuple[Proved, Choice]], ends: Mapping[str, Node]
) -> list[Built]:
    """The replaced sites with the node that stands for each in the graph."""
    return [
        Built(
            id=decision.id,
            proved=proved,
            kernel=next(kernel for kernel in choice.kernels if kernel.name == decision.kernel),
            fused=ends[decision.id],
        )
        for decision, (proved, choice) in zip(decisions, made_from, strict=True)
        if decision.replaced
    ]


def judged(decision: Decision, tried: Tried | None, policy: Policy) -> Decision:
    """The decision with its trials, and what follows from them."""
    if tried is None:
        return decision
    decision = dataclasses.replace(decision, trials=tried.trials, untried=tried.untried)
    why = _against(decision, tried)
    if why is None and tried.unclean is not None:
        if not policy.strict:
            return dataclasses.replace(decision, assumptions=(*decision.assumptions, CLEAN))
        why = reason("strict", detail=CLEAN)
    if why is None:
        return decision
    verdicts = tuple(
        dataclasses.replace(v, refusals=(why,), cost_us=None) if v.kernel == decision.kernel else v
        for v in decision.verdicts
    )
    return dataclasses.replace(
        decision, replaced=False, kernel=None, reason=why, verdicts=verdicts, assumptions=(), saves=Saves()
    )


def _against(decision: Decision, tried: Tried) -> Reason | None:
    worse = tried.worse
    if worse is None:
        return None
    if worse.detail:
        return reason("verify_raised", kernel=decision.kernel, inputs=worse.inputs, detail=worse.detail)
    numbers = {key: f"{getattr(worse, key):.2g}" for key in ("original", "replacement", "allowed")}
    return reason("verify_worse", kernel=decision.kernel, what=worse.what, inputs=worse.inputs, **numbers)
