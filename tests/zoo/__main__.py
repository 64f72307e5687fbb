"""Writes docs/zoo.md: ``python -m tests.zoo`` (``--print`` only shows it)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.zoo import CASES
from tests.zoo.case import TEXT, Case, Miss, Site
from tests.zoo.idioms import IDIOMS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
TITLES = {
    "scale": "The scale",
    "masks": "Masks",
    "fills": "Fills, and rows without keys",
    "spellings": "Spellings of softmax, axes and dtypes",
    "products": "Products and views",
    "heads": "Heads and widths",
    "terms": "Biases and soft caps",
    "sinks": "Attention sinks",
    "effects": "Writes, second readers and dropout",
    "forms": "Shapes and dtypes of scores",
    "lookalikes": "Look-alikes",
    "calls": "Calls that are there already",
    "modules": "Modules and regions",
    "corners": "Corners of broadcasting, dtypes and letters",
    "adversarial": "Made to fool the pass",
}
_PLAIN = Site(scale=1.0)


def page() -> str:
    """The text of docs/zoo.md."""
    lines = [
        "# The zoo",
        "",
        "Generated from `tests/zoo` by `python -m tests.zoo`. Each case is a small model; what stands here is tested:",
        "the softmax is recognised with exactly this meaning or refused for exactly this reason, through",
        "`torch.export` and through `torch.compile`; the result is compared with float64, forward and backward.",
        "",
        f"{len(CASES)} cases, {sum(case.trap for case in CASES)} of them look-alikes, traps or bugs of other tools.",
        "A site is *replaced* by a fused call unless a reason says why not; shapes are (batch, heads, length, width).",
    ]
    for theme in TITLES:
        cases = [case for case in CASES if case.theme == theme]
        lines += ["", f"## {TITLES[theme]}", "", "| case | idiom | expected |", "|---|---|---|"]
        lines += [f"| {case.name} | {case.idiom} | {'; '.join(_words(case))} |" for case in cases]
    lines += ["", "## Idioms", "", "| key | what it is |", "|---|---|"]
    lines += [f"| {key} | {text} |" for key, text in IDIOMS.items()]
    return "\n".join(lines).replace("|->", "\\|->") + "\n"


def _words(case: Case) -> Iterator[str]:
    for expected in case.expect:
        yield f"no site: `{expected.reason}`" if isinstance(expected, Miss) else _site(expected)
    if not case.expect:
        yield "no softmax here, nothing reported"


def _site(site: Site) -> str:
    words = ["replaced" if site.replaced else f"left: `{site.reason}`", f"scale {_scale(site.scale)}"]
    if (site.q, site.k, site.v) != (_PLAIN.q, _PLAIN.k, _PLAIN.v):
        words.append(f"q {_shape(site.q)} k {_shape(site.k)} v {_shape(site.v)}")
    if site.groups > 1:
        words.append(f"groups of {site.groups}")
    if site.dtype != "float32" or site.softmax_dtype != site.dtype:
        words.append(f"{site.dtype}, softmax in {site.softmax_dtype}")
    if site.causal is not None:
        words.append(f"causal {site.causal:+d}")
    if site.dense:
        words.append("mask")
    words += [f"bias {_shape(shape)}" for shape in site.bias]
    if site.softcap is not None:
        words.append(f"soft cap {site.softcap:g}")
    if site.sink:
        words.append("sink")
    if site.dropout:
        words.append(f"dropout {site.dropout}")
    if site.empty_rows != "impossible":
        words.append(f"empty rows {site.empty_rows}")
    if site.assumed:
        words.append("with a declared assumption")
    return ", ".join(words)


def _scale(scale: float | str) -> str:
    return "a tensor or symbol" if isinstance(scale, str) else f"{scale:.4g}"


def _shape(shape: tuple[object, ...]) -> str:
    return "x".join("?" if size == TEXT else str(size) for size in shape)


if __name__ == "__main__":
    if "--print" in sys.argv[1:]:
        print(page(), end="")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())
        print(f"{PAGE.name}: {len(CASES)} cases")
