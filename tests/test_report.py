"""What people and programs read of a report: golden text, golden JSON, its schema, the page, the trace.

After a wanted change: ``ATTNPASS_GOLDEN=write python -m pytest tests/test_report.py``, and read the difference.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attnpass.ledger import Decision, Failure, Miss, Report, Saves, Trial, Verdict, Where
from attnpass.reasons import reason
from attnpass.report import words
from attnpass.report.group import group_misses, group_sites, pattern
from attnpass.report.html import to_html
from attnpass.report.text import to_rich, to_text
from attnpass.report.trace import NAME, trace
from attnpass.spec import AttentionSpec, BiasSpec, EmptyRow, MaskSpec

GOLDEN = Path(__file__).parent / "golden"
PLAIN = AttentionSpec(
    q=(2, 8, 128, 64), k=(2, 2, 128, 64), v=(2, 2, 128, 64), dtype="float32", device="cpu", scale=0.125, groups=4
)
SYMBOLIC = AttentionSpec(
    q=("s0", 8, "2*s1", 64),
    k=("s0", 8, "s1", 64),
    v=("s0", 8, "s1", 32),
    dtype="bfloat16",
    device="cuda",
    scale="mul_3",
    mask=MaskSpec(dense=True),
    bias=(BiasSpec(shape=(1, 8, "2*s1", "s1"), dtype="float32", grad=True, exact=False),),
    softmax_dtype="bfloat16",
    dropout=0.1,
    softcap=50.0,
    sink=True,
    empty_rows=EmptyRow.MEAN,
    grad=True,
    weights_used=True,
)


def at(module: str | None, line: int | None = 41, file: str | None = "/home/me/gpt.py", code: str = "a.softmax(-1)"):
    return Where(module=module, cls="Attention", file=file, line=line, code=code)


def site(id_: str, where: Where, spec: AttentionSpec = PLAIN, **more: Any) -> Decision:
    more = {"replaced": True, "kernel": "native", "verdicts": (Verdict(kernel="native"),)} | more
    return Decision(id=id_, graph=id_.split(".")[0], where=where, spec=spec, **more)


def miss(id_: str, where: Where, shape_hash: str = "ab", **details: str) -> Miss:
    why = reason("no_product_before", **({"op": "linear"} | details))
    return Miss(
        id=id_, graph=id_.split(".")[0], where=where, reached=("softmax", "to"), reason=why, shape_hash=shape_hash
    )


def trial(inputs: str, what: str = "result", replacement: float = 2e-7, worse: bool = False) -> Trial:
    return Trial(inputs=inputs, what=what, original=1e-7, replacement=replacement, allowed=5e-6, worse=worse)


def full_report() -> Report:
    """One of everything."""
    causal = dataclasses.replace(PLAIN, mask=MaskSpec(causal=0))
    layers = [
        site(f"g0.s{i}", at(f"layers.{i}.attn"), causal, saves=Saves(bytes=2**24), proofs=("causal from arange",))
        for i in range(12)
    ]
    capped = (
        Verdict(kernel="native", refusals=(reason("softcap", detail=""), reason("sink"))),
        Verdict(kernel="other", refusals=(reason("device", device="cpu"),)),
    )
    cross = site(
        "g0.s12",
        at("decoder.cross", 99),
        SYMBOLIC,
        assumptions=("scores stay far above the mask's fill of -1e+09",),
        verdicts=(Verdict(kernel="native", cost_us=310.0),),
        saves=Saves(us=1250.0),
        trials=(trial("real"), trial("random", what="gradient", replacement=3e-6), trial("padding_nan", worse=True)),
    )
    pool = site(
        "g1.s0",
        at(None, 77),
        dataclasses.replace(PLAIN, softcap=30.0),
        replaced=False,
        kernel=None,
        reason=reason("no_kernel", detail="native: has no soft cap"),
        verdicts=capped,
        asked=("other",),
    )
    head = site(
        "g1.s1", at("head", None, None), replaced=False, kernel=None, reason=reason("weights_used", op="output")
    )
    worse = reason(
        "verify_worse",
        kernel="native",
        what="result",
        inputs="real",
        original="1e-07",
        replacement="0.5",
        allowed="5e-06",
    )
    back = site(
        "g1.s2",
        at("tail"),
        replaced=False,
        kernel=None,
        reason=worse,
        verdicts=(Verdict(kernel="native", refusals=(worse,)),),
        trials=(trial("real", replacement=0.5, worse=True), trial("random", replacement=math.inf, worse=True)),
        untried="no inputs to run the model on are known here",
    )
    routers = tuple(miss(f"g0.m{i}", at(f"layers.{i}.router", 12, "/home/me/moe.py")) for i in (1, 3, 5, 7))
    trace_back = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\nRuntimeError: boom <&>\n'
    return Report(
        torch="2.13.0",
        sites=(*layers, cross, pool, head, back),
        misses=routers,
        failures=(Failure(graph="g2", stage="rewrite", text=trace_back),),
        notes=("g3: not lowered",),
    )


def golden(name: str, text: str) -> str:
    path = GOLDEN / name
    if os.environ.get("ATTNPASS_GOLDEN") == "write":
        path.write_text(text)
    return path.read_text()


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_text_is_as_agreed():
    text = str(full_report()) + "\n"
    assert text == golden("report.txt", text)


def test_the_text_of_an_empty_report_is_one_line():
    assert str(Report(torch="2.13.0")) == "attnpass: no softmax found (torch 2.13.0)"


@pytest.mark.parametrize("width", [90, 100, 140])
def test_no_line_is_wider_than_asked_for(width: int):
    for line in to_text(full_report(), width).splitlines():
        assert len(line) <= width, line
        assert line == line.rstrip()


def test_plain_text_has_no_colour_and_a_terminal_has():
    report = full_report()
    assert "\x1b" not in str(report)
    plain, coloured = (
        Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=system)
        for terminal, system in ((False, None), (True, "standard"))
    )
    for console in (plain, coloured):
        console.print(report)
    assert [line.rstrip() for line in plain.file.getvalue().splitlines()] == str(report).splitlines()
    assert "\x1b[32m-> native" in coloured.file.getvalue()


def test_markup_in_a_users_code_is_printed_as_it_is():
    report = Report(torch="2", misses=(miss("g.m0", at("a", code="x[bold] = softmax(y)[/bold]")),))
    console = Console(file=io.StringIO(), width=100)
    console.print(to_rich(report))
    assert "x[bold] = softmax(y)[/bold]" in console.file.getvalue()


def test_calls_that_are_fused_already_are_counted_apart():
    call = site("g.s0", at("a"), replaced=False, kernel=None, reason=reason("already_fused"))
    assert str(Report(torch="2", sites=(call,))).startswith("attnpass: 1 attention site, 0 replaced, 1 fused already, ")


def test_a_report_of_failures_alone_shows_them():
    failed = Report(torch="2", failures=(Failure(graph="g", stage="recognize", text="Boom: x"),))
    assert "g, recognize: Boom: x" in str(failed)
    assert "no softmax found" not in str(failed)


def test_an_assumption_is_shown_only_for_sites_that_rely_on_it():
    kept = site("g.s0", at("a"), replaced=False, kernel=None, reason=reason("fuel"), assumptions=("the sun shines",))
    assert "the sun shines" not in str(Report(torch="2", sites=(kept,)))
    done = site("g.s1", at("b"), assumptions=("the sun shines",))
    assert "the sun shines (1 site)" in str(Report(torch="2", sites=(kept, done)))


def test_every_kernel_that_could_not_serve_says_why():
    text = str(full_report())
    assert "other: does not run on cpu" in text
    assert "native: has no attention sinks" in text, "only the soft cap was in the reason's own text"


# -- groups ------------------------------------------------------------------------------------------------------------


def test_equal_layers_are_one_group_and_unlike_ones_are_not():
    other = dataclasses.replace(PLAIN, mask=MaskSpec(causal=0, window=(127, None)))
    sites = [site(f"g.s{i}", at(f"layers.{i}.attn"), PLAIN if i % 2 else other) for i in range(8)]
    groups = group_sites(sites)
    assert [(group.module, len(group.members)) for group in groups] == [
        ("layers.{0,2,..,6}.attn", 4),
        ("layers.{1,3,..,7}.attn", 4),
    ]
    assert [member for group in groups for member in group.members] == sites[::2] + sites[1::2], "nothing is lost"


@pytest.mark.parametrize(
    "change",
    [
        {"where": at("layers.1.attn", 42)},
        {"spec": dataclasses.replace(PLAIN, scale=0.5)},
        {"assumptions": ("x",)},
        {"kernel": "other"},
        {"asked": ("native",)},
        {"replaced": False, "kernel": None, "reason": reason("fuel")},
        {"verdicts": ()},
        {"where": at("decoder.1.attn")},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_difference_that_matters_makes_another_group(change: dict[str, Any]):
    same = site("g.s0", at("layers.0.attn")), site("g.s1", at("layers.1.attn"))
    assert len(group_sites(same)) == 1
    assert len(group_sites((same[0], dataclasses.replace(same[1], **change)))) == 2


def test_misses_are_grouped_by_spelling_reason_and_source():
    a, b = miss("g.m0", at("layers.0.router")), miss("g.m1", at("layers.1.router"))
    assert [group.module for group in group_misses((a, b))] == ["layers.*.router"]
    for other in (
        miss("g.m1", at("layers.1.router"), shape_hash="cd"),
        miss("g.m1", at("layers.1.router"), op="mean"),
        miss("g.m1", at("layers.1.router", 13)),
    ):
        assert len(group_misses((a, other))) == 2


@pytest.mark.parametrize(
    ("paths", "exact", "expected"),
    [
        (["a.b"], False, "a.b"),
        (["a.0.b", "a.0.b"], False, "a.0.b"),
        (["a.0.b", "a.1.b"], False, "a.*.b"),
        (["a.0.b", "a.1.b"], True, "a.{0,1}.b"),
        (["a.0", "a.1", "a.2", "a.7"], True, "a.{0..2,7}"),
        (["a.5", "a.11", "a.17", "a.23"], True, "a.{5,11,..,23}"),
        (["a.0.b.3", "a.1.b.4"], True, "a.*.b.*"),
        (["enc.0", "dec.0"], False, "*.0"),
        (["a", "a.b"], False, "a and 1 other"),
        (["a", "a.b", "a.b.c"], False, "a and 2 others"),
    ],
)
def test_one_pattern_stands_for_several_module_paths(paths: list[str], exact: bool, expected: str):
    assert pattern(paths, exact=exact) == expected


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (MaskSpec(), "no mask"),
        (MaskSpec(causal=0), "causal"),
        (MaskSpec(causal=3, key_padding=True), "causal +3, key padding"),
        (MaskSpec(causal=-2), "causal -2"),
        (MaskSpec(causal="s3 - s1"), "causal + s3 - s1"),
        (MaskSpec(causal=0, window=(127, None)), "causal, window 127 left"),
        (MaskSpec(window=(3, 4)), "window 3 left 4 right"),
        (MaskSpec(prefix=16, chunk=8192, document=True), "prefix 16, chunks of 8192, documents"),
        (MaskSpec(limited=True, key_padding=True), "limits that are data, key padding"),
        (MaskSpec(dense=True), "dense mask"),
    ],
)
def test_a_mask_in_words(mask: MaskSpec, expected: str):
    assert words.mask(mask) == expected


def test_only_what_is_unusual_is_said():
    assert words.meaning(PLAIN) == "q 2x8x128x64, kv heads 2, float32, no mask"
    assert words.meaning(dataclasses.replace(PLAIN, scale=1.0)).endswith("no mask, scale 1")
    biased = dataclasses.replace(PLAIN, bias=(BiasSpec(shape=(2, 1, 128, 128), dtype="float32"),))
    assert words.meaning(biased) == "q 2x8x128x64, kv heads 2, float32, bias 2x1x128x128", "a bias may be a mask"
    assert words.meaning(SYMBOLIC) == (
        "q s0x8x(2*s1)x64, keys s1, v width 32, bfloat16, dense mask, bias 1x8x(2*s1)xs1 float32 trained, "
        "softcap 50, sinks, dropout 0.1, scale mul_3"
    )


def test_amounts_are_written_for_people():
    assert [words.amount(n) for n in (12, 2048, 3 * 2**20, 2**41)] == ["12 B", "2.0 KiB", "3.0 MiB", "2048.0 GiB"]
    assert [words.duration(us) for us in (12.0, 1500.0, 2.5e6)] == ["12 us", "1.5 ms", "2.50 s"]


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_the_json_is_as_agreed():
    text = full_report().to_json() + "\n"
    assert text == golden("report.json", text)


TEXT, WHOLE, NUMBER, TRUTH = str, int, (int, float), bool
SIZE = (int, str)
OR_NULL = type(None)
REASON = {"code": TEXT, "text": TEXT}
WHERE = {
    "module": (str, OR_NULL),
    "class": (str, OR_NULL),
    "file": (str, OR_NULL),
    "line": (int, OR_NULL),
    "code": (str, OR_NULL),
}
SPEC = {
    "q": [SIZE],
    "k": [SIZE],
    "v": [SIZE],
    "dtype": TEXT,
    "device": TEXT,
    "scale": (int, float, str),
    "groups": WHOLE,
    "softmax_dtype": TEXT,
    "dropout": (int, float, str),
    "softcap": (int, float, str, OR_NULL),
    "sink": TRUTH,
    "deterministic": TRUTH,
    "bias": [{"shape": [SIZE], "dtype": TEXT, "grad": TRUTH, "exact": TRUTH}],
    "mask": {
        "causal": (int, str, OR_NULL),
        "window": ([(int, str, OR_NULL)], OR_NULL),
        "prefix": (int, str, OR_NULL),
        "chunk": (int, str, OR_NULL),
        "document": TRUTH,
        "limited": TRUTH,
        "key_padding": TRUTH,
        "dense": TRUTH,
    },
    "empty_rows": {"impossible", "nan", "mean", "zero"},
    "grad": TRUTH,
    "inference": TRUTH,
    "weights_used": TRUTH,
}
SCHEMA = {
    "version": {1},
    "torch": TEXT,
    "sites": [
        {
            "id": TEXT,
            "graph": TEXT,
            "where": WHERE,
            "spec": SPEC,
            "replaced": TRUTH,
            "kernel": (str, OR_NULL),
            "asked": [TEXT],
            "reason": (REASON, OR_NULL),
            "verdicts": [{"kernel": TEXT, "refusals": [REASON], "cost_us": (int, float, OR_NULL), "timed": TRUTH}],
            "assumptions": [TEXT],
            "proofs": [TEXT],
            "saves": {"bytes": (int, OR_NULL), "us": (int, float, OR_NULL)},
            "trials": [
                {
                    "inputs": TEXT,
                    "what": {"result", "gradient"},
                    "original": (int, float, OR_NULL),
                    "replacement": (int, float, OR_NULL),
                    "allowed": (int, float, OR_NULL),
                    "worse": TRUTH,
                    "detail": TEXT,
                }
            ],
            "untried": (str, OR_NULL),
        }
    ],
    "misses": [{"id": TEXT, "graph": TEXT, "where": WHERE, "reached": [TEXT], "reason": REASON, "shape_hash": TEXT}],
    "failures": [{"graph": TEXT, "part": (str, OR_NULL), "stage": TEXT, "text": TEXT}],
    "notes": [TEXT],
}


def problems(data: Any, schema: Any, path: str = "report") -> list[str]:
    """Everything in which `data` is not of this form; each key must be there, none may be unknown."""
    if isinstance(schema, tuple):
        tried = [problems(data, option, path) for option in schema]
        return [] if any(not found for found in tried) else tried[0]
    if isinstance(schema, set):
        return [] if data in schema else [f"{path} is {data!r}"]
    if isinstance(schema, list):
        if not isinstance(data, list):
            return [f"{path} is no list"]
        return [p for i, item in enumerate(data) for p in problems(item, schema[0], f"{path}[{i}]")]
    if isinstance(schema, dict):
        if not isinstance(data, dict):
            return [f"{path} is no object"]
        wrong = [f"{path} lacks or adds {key}" for key in sorted(schema.keys() ^ data.keys())]
        return wrong + [
            p for key in schema.keys() & data.keys() for p in problems(data[key], schema[key], f"{path}.{key}")
        ]
    fits = type(data) is schema  # bool is no int here
    return [] if fits else [f"{path} is {type(data).__name__}, not {schema.__name__}"]


def test_the_json_has_exactly_the_documented_form():
    assert problems(json.loads(full_report().to_json()), SCHEMA) == []


def test_the_check_of_the_form_finds_what_is_wrong():
    data = full_report().to_dict()
    data["sites"][0]["spec"].pop("device")
    data["sites"][1]["replaced"] = 1
    data["misses"][0]["more"] = None
    assert len(problems(data, SCHEMA)) == 3


def test_every_key_of_the_form_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text()

    def keys(schema: Any) -> set[str]:
        if isinstance(schema, dict):
            return set(schema) | set().union(*map(keys, schema.values()), set())
        return set().union(*map(keys, schema), set()) if isinstance(schema, list | tuple) else set()

    documented = {name.split(".")[-1].removesuffix("[]") for name in re.findall(r"^\| `([a-z_.\[\]]+)`", page, re.M)}
    assert keys(SCHEMA) - documented == set()
    assert documented - keys(SCHEMA) == set()


def test_numbers_that_are_not_finite_stay_strict_json():
    odd = dataclasses.replace(PLAIN, scale=math.inf, softcap=math.nan, dropout=math.nan)
    verdicts = (Verdict(kernel="native", cost_us=math.inf),)
    report = Report(torch="2", sites=(site("g.s0", at("a"), odd, verdicts=verdicts, saves=Saves(us=math.nan)),))

    def forbidden(name: str) -> None:
        raise AssertionError(name)

    data = json.loads(report.to_json(), parse_constant=forbidden)
    spec = data["sites"][0]["spec"]
    assert (spec["scale"], spec["softcap"], spec["dropout"]) == ("inf", None, "nan")
    assert data["sites"][0]["verdicts"][0]["cost_us"] is None
    assert data["sites"][0]["saves"]["us"] is None
    assert problems(data, SCHEMA) == []
    assert "scale inf" in str(report)


# -- page, trace -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects tags and attributes; raises where tags do not nest."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing():
    page = full_report().to_html()
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parser.tags}
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in parser.tags for name in attrs)
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    # 12 equal layers, one cross attention, two left, one put back, one kind of miss
    assert sum(tag == "details" for tag, _ in parser.tags) == 6


def test_the_page_says_what_the_text_says_and_more():
    page = to_html(full_report())
    for text in ("layers.*.attn", "gpt.py:41", "has no soft cap", "causal from arange", "mean of all values", "g0.s11"):
        assert text in page
    assert "Return no attention weights" in page, "the advice of the catalogue"
    assert "RuntimeError: boom &lt;&amp;&gt;" in page


def test_a_users_code_cannot_break_the_page():
    hostile = at('<script>alert("x")</script>', file="/<b>.py", code="</pre><script>")
    page = to_html(Report(torch="2", sites=(site("g.s0", hostile),), misses=(miss("g.m0", hostile),)))
    parser = Page()
    parser.feed(page)
    assert "script" not in {tag for tag, _ in parser.tags}


def test_the_trace_has_the_report_as_an_artifact():
    from torch._logging import _internal

    records: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Handler()
    _internal.trace_log.addHandler(handler)
    try:
        trace(full_report())
    finally:
        _internal.trace_log.removeHandler(handler)
    (record,) = [r for r in records if getattr(r, "metadata", {}).get("artifact", {}).get("name") == NAME]
    assert record.metadata["artifact"]["encoding"] == "json"
    assert json.loads(record.payload) == full_report().to_dict()
