"""What ``attnpass verify`` shows: one line for each group of equal sites.

    sites  where                      kernel  worst inputs     original  replacement  allowed  verdict
       2x  model.layers.*.self_attn   native  random gradient  9.5e-07   1.4e-06      2.4e-05  fine

Every trial of every site is in the JSON, and in the page that --html writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnpass.bisect import Bisection
    from attnpass.ledger import Report

SITE_PUT_BACK, SITE_NOT_TRIED = 3, 4


def status(report: Report) -> int:
    """0 every replaced site is fine, 1 nothing was to be replaced, 3 a site was put back, 4 one could not be tried."""
    from attnpass.report import trials

    if any(map(trials.was_put_back, report.sites)):
        return SITE_PUT_BACK
    if any(map(trials.untried, report.sites)):
        return SITE_NOT_TRIED
    return 0 if report.replaced else 1


def shown(report: Report) -> RenderableType:
    """The table, and what it leaves open."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from attnpass.report import trials, words

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in ("", "where", "source", "kernel", "worst inputs", "original", "replacement", "allowed", "verdict"):
        table.add_column(name, overflow="fold", justify="right" if name in _NUMBERS else "left")
    below: list[Any] = []
    for group in trials.tried_groups(report):
        site, worst = group.first, trials.worst(group.members)
        numbers = ["", "", "", ""]
        if worst is not None:
            errors = map(trials.number, (worst.original, worst.replacement, worst.allowed))
            numbers = [f"{worst.inputs} {worst.what}", *errors]
        said, style = trials.verdict(site)
        place = (f"{len(group.members)}x", group.module, words.source(site.where), trials.kernel(site))
        table.add_row(*map(escape, (*place, *numbers)), Text(said, style=style))
        below += [Text(f"  {group.module}: {text}", style="yellow") for text in _remarks(site)]
    title = Text(trials.headline(report) if table.row_count else "nothing to try: no site would be replaced", "bold")
    rest = Text("All trials: --json, --html. What they mean: docs/verify.md", style="dim")
    return Group(title, *([table] if table.row_count else []), *below, rest)


_NUMBERS = ("", "original", "replacement", "allowed")


def _remarks(site: Any) -> list[str]:
    from attnpass.report import trials
    from attnpass.trial import CLEAN

    found = []
    if trials.was_put_back(site) and site.reason is not None:
        found.append(site.reason.text)
    if site.untried is not None:
        found.append(f"not tried on more: {site.untried}")
    if CLEAN in site.assumptions:
        found.append(f"assumed: {CLEAN}")
    return found


# -- attnpass bisect ---------------------------------------------------------------------------------------------------


def bisection(found: Bisection) -> RenderableType:
    """What a bisection has found: where in the source, by how much, and the file that shows it."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(text, style) for text, style in _lines(found)))


def bisection_status(found: Bisection) -> int:
    """0 nothing differs, 1 nothing is replaced, 3 sites were found that make the output differ."""
    if not found.replaced:
        return 1
    return SITE_PUT_BACK if found.differs else 0


def bisection_row(found: Bisection) -> dict[str, Any]:
    """A bisection as JSON holds it."""
    from attnpass.ledger import Report
    from attnpass.report.json import finite, to_dict

    def numbers(gap: Any) -> dict[str, float | None]:
        return {name: finite(getattr(gap, name)) for name in ("original", "replacement", "allowed")}

    def sites(given: Any) -> Any:
        return to_dict(Report(torch="", sites=tuple(given)))["sites"]

    return {
        "version": 1,
        "replaced": found.replaced,
        "left_out": sites(found.left_out),
        "differs": found.differs,
        "tensor": found.tensor,
        **numbers(found.gap),
        "against": found.against,
        "runs": found.runs,
        "found": [
            {
                "sites": sites(one.sites),
                "tensor": one.tensor,
                **numbers(one.gap),
                "reproducer": one.reproducer,
                "reproducer_shows_it": one.alone,
            }
            for one in found.found
        ],
    }


def _lines(found: Bisection) -> Iterator[tuple[str, str]]:
    from attnpass.report import words

    if found.left_out:
        yield (
            f"{words.counted(len(found.left_out), 'site')} with live dropout left out: they draw other numbers",
            "yellow",
        )
    if not found.replaced:
        yield "nothing to bisect: no site is replaced", "bold"
        return
    sites = words.counted(found.replaced, "site")
    if not found.differs:
        yield f"no difference with all {sites} replaced: {_difference(found.tensor, found.gap)}", "bold"
        yield f"  measured against {found.against}", "dim"
        return
    yield f"with all {sites} replaced: {_difference(found.tensor, found.gap)}", "bold"
    yield f"  measured against {found.against}, in {found.runs} runs", "dim"
    for one in found.found:
        yield "", ""
        if len(one.sites) > 1:
            yield f"only together: {words.counted(len(one.sites), 'site')}", "red"
        for site in one.sites:
            place = site.where
            yield f"{place.module or place.cls or '(no module)'}  {words.source(place)}  -> {site.kernel}", "red"
            if place.file:
                yield f"  {place.file}:{place.line}", ""
            if place.code:
                yield f"  {place.code}", "dim"
            yield f"  {words.meaning(site.spec)}", ""
        yield (
            f"  alone: {_difference(one.tensor, one.gap)}"
            if len(one.sites) == 1
            else f"  {_difference(one.tensor, one.gap)}",
            "",
        )
        if one.reproducer and one.alone:
            yield f"  shown without the model by: python {one.reproducer}", "green"
        elif one.reproducer:
            yield f"  {one.reproducer} runs it without the model, where it shows no difference: the fault is", "yellow"
            yield "  in how the call was put into the graph, or in what compiles the graph", "yellow"


def _difference(tensor: str, gap: Any) -> str:
    from attnpass.report.trials import number

    return (
        f"{tensor} is off by {number(gap.replacement)} (as it is {number(gap.original)}, allowed {number(gap.allowed)})"
    )
