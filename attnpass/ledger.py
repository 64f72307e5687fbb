"""What was found in a graph and what became of it: decisions, misses, and the report over them.

    Report ── Decision (one per site) ── Where, AttentionSpec, Verdict (one per kernel) ── Reason
           └─ Miss (one per softmax that is no site) ── Where, Reason

Every softmax of every graph is in exactly one of ``Report.sites`` or ``Report.misses``. The ledger holds plain data
only: no tensor, node or module, so it can be kept for the life of a process and pickled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from attnpass.errors import traced
from attnpass.reasons import Reason
from attnpass.spec import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class Where:
    """A place in the user's program, as far as the graph's metadata tells."""

    module: str | None = None  # path of the module, "layers.0.attn"
    cls: str | None = None  # its class
    file: str | None = None
    line: int | None = None
    code: str | None = None  # the source line itself


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One kernel's answer to one spec: every reason why not, or what it would cost."""

    kernel: str
    refusals: tuple[Reason, ...] = ()
    cost_us: float | None = None
    timed: bool = False  # measured here (autotune), not expected

    @property
    def accepts(self) -> bool:
        return not self.refusals

    @property
    def absent(self) -> bool:
        """It cannot run on this machine, or not on this device, whatever else the spec says."""
        return any(refusal.code in ("unavailable", "device") for refusal in self.refusals)


@dataclass(frozen=True, kw_only=True)
class Saves:
    """What the replacement is expected to save in one forward call; None where it cannot be told."""

    bytes: int | None = None
    us: float | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Original and replacement, both held to float64, on one kind of inputs: where the replacement does worst."""

    inputs: str  # "real", "huge" ...: attnpass/trial/inputs.py
    what: str  # "result", or "gradient" (the worst one)
    original: float  # its error; infinity where it is no number and the true result is one
    replacement: float
    allowed: float  # for the replacement
    worse: bool
    detail: str = ""  # what it raised


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A site and what became of it."""

    id: str
    graph: str
    where: Where
    spec: AttentionSpec
    replaced: bool
    kernel: str | None = None
    asked: tuple[str, ...] = ()  # kernels that the policy would have here, in order; "keep" may end them
    reason: Reason | None = None  # why it was not replaced
    verdicts: tuple[Verdict, ...] = ()
    assumptions: tuple[str, ...] = ()
    proofs: tuple[str, ...] = ()  # what was proved about the mask, and how
    saves: Saves = field(default_factory=Saves)
    trials: tuple[Trial, ...] = ()  # with verify=True
    untried: str | None = None  # why verify=True could try less than it does elsewhere, or nothing


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A softmax that is no site: how far the walk got, and where and why it stopped."""

    id: str
    graph: str
    where: Where
    reached: tuple[str, ...]  # the operations that were understood, outermost first
    reason: Reason
    shape_hash: str = ""  # equal for misses whose neighbourhoods are spelled alike


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A stage that failed: the graph was left as it was, or one part of it did without what failed."""

    graph: str
    stage: str
    text: str  # the traceback
    part: str | None = None  # what did without: a site, a miss ...; None: the whole graph was left as it was
    known: bool = False  # a documented limit, no defect of ours

    @classmethod
    def of(cls, graph: str, stage: str, error: Exception, part: str | None = None) -> Failure:
        return cls(graph=graph, stage=stage, text=traced(error), part=part)

    @property
    def line(self) -> str:
        """The exception itself: what follows the last frame of the traceback."""
        last = self.text.rpartition("Traceback (most recent call last):\n")[2]
        return next((line for line in last.splitlines() if line and not line[0].isspace()), "")


@dataclass(frozen=True)
class Report:
    """All decisions, misses and failures of one or more graphs."""

    torch: str
    sites: tuple[Decision, ...] = ()
    misses: tuple[Miss, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def replaced(self) -> int:
        return sum(site.replaced for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        from attnpass.report.json import to_dict

        return to_dict(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        from attnpass.report.json import to_json

        return to_json(self, indent=indent)

    def to_html(self, *, title: str = "attnpass") -> str:
        from attnpass.report.html import to_html

        return to_html(self, title)

    def __str__(self) -> str:
        from attnpass.report.text import to_text

        return to_text(self)

    def __rich__(self) -> Any:
        from attnpass.report.text import to_rich

        return to_rich(self)


def merge(reports: Iterable[Report]) -> Report:
    """One report over several; ids are already unique because they carry their graph's name."""
    import torch

    parts = list(reports)
    return Report(
        torch=torch.__version__,
        sites=tuple(site for part in parts for site in part.sites),
        misses=tuple(miss for part in parts for miss in part.misses),
        failures=tuple(failure for part in parts for failure in part.failures),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
