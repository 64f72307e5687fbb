"""The report as text: which sites, what became of them and why, and what was assumed.

    attnpass: 13 attention sites, 12 replaced, 1 miss (torch 2.13.0)

    replaced
      12x  layers.*.attn  gpt.py:41  -> native  q 2x8x128x64, kv heads 2, float32, causal

    left as they are
      1x  pool  pool.py:12  weights_used  q 2x1x1x64, keys 128, float32, no mask
            scores or probabilities are read by something else (output), so nothing would be saved

One line per group of equal sites; a meaning that does not fit the width goes to a second line.
One layout serves both forms: plain text, and rich for terminals, where the same lines have styles.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpass.ledger import Decision, Miss, Report
from attnpass.report import trials, words
from attnpass.report.group import Group, group_misses, group_sites

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 100
_INDENT = 8
_NARROWEST = 60

Span = tuple[str, str]  # text, style
Line = tuple[Span, ...]


def to_text(report: Report, width: int = WIDTH) -> str:
    """Plain text, no colour."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines(report, width))


def to_rich(report: Report) -> RenderableType:
    """The same for a terminal, laid out for its width."""
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

    class Rendered:
        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for line in lines(report, max(options.max_width, _NARROWEST)):
                yield Text.assemble(*line)

    return Rendered()


def lines(report: Report, width: int) -> Iterator[Line]:
    """All lines with their styles."""
    yield (("attnpass: ", "bold"), (words.headline(report), "bold"), (f" (torch {report.torch})", "dim"))
    sites = group_sites(report.sites)
    yield from _sites("replaced" + _saved(report), [group for group in sites if group.first.replaced], width)
    yield from _sites("left as they are", [group for group in sites if not group.first.replaced], width)
    yield from _tried(report, width)
    yield from _misses(group_misses(report.misses), width)
    yield from _assumed(report, width)
    yield from _listed("failed: these graphs were left as they were", _failures(report, whole=True), "red", width)
    yield from _listed("failed: these did without", _failures(report, whole=False), "red", width)
    yield from _listed("notes", list(report.notes), "", width)
    if report.sites or report.misses:
        yield ()
        yield (("Every verdict: to_json(), or `attnpass audit --json`. Codes: docs/reasons.md", "dim"),)


def _sites(title: str, groups: Sequence[Group[Decision]], width: int) -> Iterator[Line]:
    if not groups:
        return
    yield ()
    yield ((title, "bold"),)
    for row, group in zip(_table([_site_row(group) for group in groups], width), groups, strict=True):
        yield from row
        yield from _why_kept(group.first, width)
        yield from _unmet(group.first, width)


@dataclass(frozen=True)
class Row:
    """One group: how many, where, its outcome; and what it means."""

    cells: tuple[Span, ...]
    meaning: str = ""


def _cells(group: Group[Any], outcome: Span) -> tuple[Span, ...]:
    return (
        (f"{len(group.members)}x", "bold"),
        (group.module, "cyan"),
        (words.source(group.first.where), "dim"),
        outcome,
    )


def _site_row(group: Group[Decision]) -> Row:
    site = group.first
    if site.replaced:
        outcome = (f"-> {site.kernel}", "green")
    else:
        outcome = (site.reason.code if site.reason else "kept", "yellow")
    return Row(_cells(group, outcome), words.meaning(site.spec))


def _saved(report: Report) -> str:
    saved = words.saved(report)
    return f" ({saved} less per forward call)" if saved else ""


def _why_kept(site: Decision, width: int) -> Iterator[Line]:
    """The reason, and under it each kernel's own, unless the reason has said it already."""
    if site.replaced or site.reason is None:
        return
    yield from _wrapped(site.reason.text, width)
    for verdict in site.verdicts:
        if verdict.absent or verdict.kernel in site.asked:
            continue  # what is not installed has nothing to do with this site; the others have a line of their own
        unsaid = [refusal.text for refusal in verdict.refusals if refusal.text not in site.reason.text]
        if unsaid and site.reason.code == "no_kernel":
            yield from _wrapped(f"{verdict.kernel}: {'; '.join(unsaid)}", width, style="dim")


def _unmet(site: Decision, width: int) -> Iterator[Line]:
    """Why a kernel that was asked for was not taken."""
    said = "" if site.reason is None else site.reason.text
    for text in words.unmet(site):
        if text not in said:
            yield from _wrapped(f"asked for {text}", width, style="yellow")


def _tried(report: Report, width: int) -> Iterator[Line]:
    """What verify=True has shown."""
    groups = trials.tried_groups(report)
    if not groups:
        return
    yield ()
    yield ((trials.headline(report), "bold"),)
    rows = [
        Row(
            _cells(
                group,
                (f"{trials.kernel(group.first)}: {trials.verdict(group.first)[0]}", trials.verdict(group.first)[1]),
            )
        )
        for group in groups
    ]
    for row, group in zip(_table(rows, width), groups, strict=True):
        yield from row
        worst = trials.worst(group.members)
        if worst is not None:
            yield from _wrapped(f"worst: {trials.told(worst)}", width)
        if group.first.untried is not None:
            yield from _wrapped(f"not tried on more: {group.first.untried}", width, style="yellow")


def _misses(groups: Sequence[Group[Miss]], width: int) -> Iterator[Line]:
    if not groups:
        return
    yield ()
    yield (("misses: softmax that is not, or not provably, attention", "bold"),)
    rows = [Row(_cells(group, (group.first.reason.code, "yellow"))) for group in groups]
    for row, group in zip(_table(rows, width), groups, strict=True):
        yield from row
        yield from _wrapped(group.first.reason.text, width)
        if group.first.where.code:
            yield from _wrapped(f"softmax: {group.first.where.code}", width, style="dim")
        if group.first.reached:
            yield from _wrapped("understood from there: " + ", ".join(group.first.reached), width, style="dim")


def _assumed(report: Report, width: int) -> Iterator[Line]:
    """What the replaced sites rely on that was not proved: the risk that is left."""
    counts: dict[str, int] = {}
    for site in report.sites:
        if site.replaced:
            for assumption in dict.fromkeys(site.assumptions):
                counts[assumption] = counts.get(assumption, 0) + 1
    texts = [f"{text} ({words.counted(count, 'site')})" for text, count in counts.items()]
    yield from _listed("assumed, not proved (strict=True refuses these)", texts, "magenta", width)


def _failures(report: Report, *, whole: bool) -> list[str]:
    """The last line of each; to_json() has the whole traceback."""
    return [f"{f.part or f.graph}, {f.stage}: {f.line}" for f in report.failures if (f.part is None) == whole]


def _listed(title: str, texts: Sequence[str], style: str, width: int) -> Iterator[Line]:
    if not texts:
        return
    yield ()
    yield ((title, "bold"),)
    for text in texts:
        for index, part in enumerate(_split(text, width - 4)):
            yield (("  - " if index == 0 else "    ", ""), (part, style))


def _table(rows: Sequence[Row], width: int) -> Iterator[list[Line]]:
    """Aligned columns; the meaning ends its line where there is room for it, else it goes below."""
    widths = [max(len(row.cells[i][0]) for row in rows) for i in range(len(rows[0].cells))]
    for row in rows:
        line: list[Span] = []
        for index, ((text, style), wide) in enumerate(zip(row.cells, widths, strict=True)):
            line += [("  ", ""), (text.ljust(wide) if index else text.rjust(wide), style)]
        if sum(len(text) for text, _ in line) + 2 + len(row.meaning) <= width:
            yield [(*line, ("  " + row.meaning, ""))]
        else:
            yield [tuple(line), *_wrapped(row.meaning, width)]


def _wrapped(text: str, width: int, style: str = "") -> Iterator[Line]:
    for part in _split(text, width - _INDENT):
        yield ((" " * _INDENT, ""), (part, style))


def _split(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
