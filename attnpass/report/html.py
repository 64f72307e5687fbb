"""The report as one page: a line per group of equal sites, which opens to everything that is known about it.

The page is one file without scripts, fonts, images or links to elsewhere; its content security policy forbids them, so
that a report of a private model can be opened anywhere. It follows the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from attnpass.ledger import Decision, Miss, Report, Verdict, Where
from attnpass.reasons import CATALOGUE, Reason
from attnpass.report import trials, words
from attnpass.report.group import Group, group_misses, group_sites, name_of

_MOST_MEMBERS = 200  # names listed per group; the JSON has all

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5a6470; --line: #d5dae0; --page: #ffffff; --card: #f6f8fa;
  --good: #116b34; --warn: #8a5300; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #98a3ae; --line: #343b43; --page: #14171a;
  --card: #1d2125; --good: #5fd08a; --warn: #e5b25d; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
code, .mono { font-family: ui-monospace, "SF Mono", Consolas, monospace; font-size: .9em; overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; background: var(--card); }
summary { cursor: pointer; padding: .5rem .75rem; display: grid; gap: .1rem .9rem; align-items: baseline;
  grid-template-columns: 3.5rem minmax(9rem, 3fr) minmax(8rem, 2fr) minmax(12rem, 4fr) 10rem; }
summary::-webkit-details-marker { display: none; }
summary .count::before { content: "+"; float: left; font-weight: 400; color: var(--soft); }
details[open] > summary .count::before { content: "-"; }
summary > * { overflow-wrap: anywhere; } summary .count { font-weight: 600; text-align: right; }
summary:focus-visible { outline: 2px solid var(--good); }
.inside { padding: .25rem .75rem .75rem; border-top: 1px solid var(--line); }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
h3 { font-size: .95rem; margin: .9rem 0 .25rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; width: 9rem; }
ul { margin: .2rem 0; padding-left: 1.2rem; }
pre { margin: .3rem 0; padding: .4rem .6rem; background: var(--page); border: 1px solid var(--line); border-radius: 4px;
  overflow-x: auto; }
ul.members { columns: 16rem; font-size: .9em; }
@media (max-width: 50rem) {
  summary { grid-template-columns: 3.5rem 1fr auto; } summary .meaning, summary .outcome { grid-column: 2 / -1; } }
""".strip()


def to_html(report: Report, title: str = "attnpass") -> str:
    """The whole page."""
    sites = group_sites(report.sites)
    replaced = [group for group in sites if group.first.replaced]
    kept = [group for group in sites if not group.first.replaced]
    saved = words.saved(report)
    body = [
        f"<h1>{escape(title)}: {escape(words.headline(report))}</h1>",
        f'<p class="soft">torch {escape(report.torch)}'
        + (f"; {saved} less per forward call" if saved else "")
        + "</p>",
        _section("Replaced", "", [_site(group) for group in replaced]),
        _section("Left as they are", "Understood, but not replaced; each says why.", [_site(group) for group in kept]),
        _section(
            "Misses",
            "Softmax that is not, or not provably, attention. What is not understood is left alone.",
            [_miss(group) for group in group_misses(report.misses)],
        ),
        _section(
            "Failures",
            "A stage failed; the graph was left as it was, or one part of it did without. Please report it.",
            [
                f"<p>{escape(f.part or f.graph)}, {escape(f.stage)}:</p>"
                f'<pre class="bad">{escape(f.text.rstrip())}</pre>'
                for f in report.failures
            ],
        ),
        _section("Notes", "", [_list(report.notes)] if report.notes else []),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, intro: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    head = f"<h2>{title}</h2>\n" + (f'<p class="soft">{intro}</p>\n' if intro else "")
    return f"<section>\n{head}" + "\n".join(parts) + "\n</section>"


def _site(group: Group[Decision]) -> str:
    site = group.first
    if site.replaced:
        risk = ' <span class="warn">assumes</span>' if site.assumptions else ""
        outcome = f'<span class="good">{escape(site.kernel or "")}</span>{risk}'
    else:
        outcome = f'<span class="warn">{escape(site.reason.code if site.reason else "kept")}</span>'
    inside = [
        _reason(site.reason) if site.reason else "",
        _titled("Asked for, but not taken", _list(words.unmet(site), "warn")),
        _titled("Assumed, not proved", _list(site.assumptions, "warn")),
        _titled("Proved", _list(site.proofs)),
        _titled("Tried against float64", _trials(site)),
        _titled("Place", _place(site.where)),
        _titled("What it computes", _spec(site)),
        _titled("Kernels", _verdicts(site.verdicts)),
        _members([(member.id, name_of(member.where)) for member in group.members]),
    ]
    return _details(len(group.members), group.module, site.where, words.meaning(site.spec), outcome, inside)


def _miss(group: Group[Miss]) -> str:
    miss = group.first
    inside = [
        _reason(miss.reason),
        _titled("Place", _place(miss.where)),
        _titled("Understood so far, outermost first", f"<p><code>{escape(', '.join(miss.reached))}</code></p>")
        if miss.reached
        else "",
        _members([(member.id, name_of(member.where)) for member in group.members]),
    ]
    outcome = f'<span class="warn">{escape(miss.reason.code)}</span>'
    return _details(len(group.members), group.module, miss.where, miss.reason.text, outcome, inside)


def _details(count: int, module: str, where: Where, meaning: str, outcome: str, inside: Iterable[str]) -> str:
    return (
        f'<details>\n<summary><span class="count">{count}x</span><span class="mono">{escape(module)}</span>'
        f'<span class="mono soft">{escape(words.source(where))}</span><span class="meaning">{escape(meaning)}</span>'
        f'<span class="outcome">{outcome}</span></summary>\n'
        f'<div class="inside">\n' + "\n".join(part for part in inside if part) + "\n</div>\n</details>"
    )


def _titled(title: str, content: str) -> str:
    return f"<h3>{title}</h3>\n{content}" if content else ""


def _list(texts: Sequence[str], style: str = "") -> str:
    mark = f' class="{style}"' if style else ""
    return f"<ul{mark}>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>" if texts else ""


def _rows(pairs: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(key)}</th><td>{value}</td></tr>" for key, value in pairs) + "</table>"


def _reason(reason: Reason) -> str:
    entry = CATALOGUE.get(reason.code)
    advice = f'<p class="soft">{escape(entry.advice)}</p>' if entry else ""
    return f'<p><code class="warn">{escape(reason.code)}</code> {escape(reason.text)}</p>{advice}'


def _place(where: Where) -> str:
    line = f"<pre><code>{escape(where.code)}</code></pre>" if where.code else ""
    file = "" if where.file is None else where.file + ("" if where.line is None else f":{where.line}")
    pairs = [("module", where.module), ("class", where.cls), ("source", file)]
    known = [(key, f"<code>{escape(text)}</code>") for key, text in pairs if text]
    return (_rows(known) if known else "") + line


def _spec(site: Decision) -> str:
    spec = site.spec
    bias = [f"{words.size(b.shape)} {b.dtype}" + (", its gradient is needed" if b.grad else "") for b in spec.bias] or [
        "none"
    ]
    pairs = [
        ("q", f"{words.size(spec.q)}"),
        ("k", f"{words.size(spec.k)}"),
        ("v", f"{words.size(spec.v)}"),
        ("query heads per kv head", str(spec.groups)),
        ("dtype", f"{spec.dtype}, softmax in {spec.softmax_dtype}"),
        ("device", spec.device),
        ("scale", words.scale(spec) + (" = 1/sqrt(width)" if words.usual_scale(spec) else "")),
        ("mask", words.mask(spec.mask)),
        ("queries without a key", words.EMPTY_ROWS[spec.empty_rows]),
        ("bias", "; ".join(bias)),
        ("softcap", "none" if spec.softcap is None else words.softcap(spec.softcap)),
        ("sinks", "yes" if spec.sink else "no"),
        ("dropout", str(spec.dropout) if spec.dropout else "none"),
        ("gradients", "needed" if spec.grad else "not needed"),
        ("scores used elsewhere", "yes" if spec.weights_used else "no"),
        ("saves", words.savings(site.saves) or "unknown"),
    ]
    return _rows((key, escape(text)) for key, text in pairs)


def _trials(site: Decision) -> str:
    """Every trial of the first site of a group; the JSON has those of the others."""
    told = f'<p class="warn">Not tried on more: {escape(site.untried)}</p>' if site.untried else ""
    if not site.trials:
        return told
    head = "".join(f"<th>{name}</th>" for name in ("inputs", "", "original", trials.kernel(site), "allowed", ""))
    rows = []
    for t in site.trials:
        numbers = (t.inputs, t.what, *map(trials.number, (t.original, t.replacement, t.allowed)))
        mark = '<span class="bad">worse</span>' if t.worse else ""
        rows.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in numbers) + f"<td>{mark}</td></tr>")
    return f"{told}<table><tr>{head}</tr>{''.join(rows)}</table>"


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    rows = []
    for verdict in verdicts:
        if verdict.accepts:
            cost = (
                ""
                if verdict.cost_us is None
                else f", {'' if verdict.timed else 'about '}{words.duration(verdict.cost_us)}"
            )
            rows.append((verdict.kernel, f'<span class="good">can compute this</span>{cost}'))
        else:
            why = [f"<code>{escape(r.code)}</code> {escape(r.text)}" for r in verdict.refusals]
            rows.append((verdict.kernel, "<ul>" + "".join(f"<li>{text}</li>" for text in why) + "</ul>"))
    return _rows(rows)


def _members(members: Sequence[tuple[str, str]]) -> str:
    shown = [f"{id_}: {name}" for id_, name in members[:_MOST_MEMBERS]]
    if len(members) > _MOST_MEMBERS:
        shown.append(f"and {len(members) - _MOST_MEMBERS} more")
    return _titled(words.counted(len(members), "member"), _list(shown, "members")) if len(members) > 1 else ""
