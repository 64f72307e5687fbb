"""A spec in words, short enough for a table: what is as usual (scale 1/sqrt(width), as many keys) is not said."""

from __future__ import annotations

import math
import os

from attnpass.ledger import Decision, Report, Saves, Where
from attnpass.spec import AttentionSpec, EmptyRow, MaskSpec, Size

EMPTY_ROWS = {
    EmptyRow.IMPOSSIBLE: "none, proved",
    EmptyRow.NAN: "possible: the original gives NaN",
    EmptyRow.MEAN: "possible: the original gives the mean of all values",
    EmptyRow.ZERO: "possible: the original gives zeros",
}


def size(sizes: tuple[Size, ...]) -> str:
    """``2x8x128x64``; a symbolic expression is put in brackets where its operators would be misread."""
    return "x".join(str(n) if isinstance(n, int) or n.isidentifier() else f"({n})" for n in sizes)


def shape(spec: AttentionSpec) -> str:
    """The queries' shape and whatever of k and v does not follow from it."""
    words = [f"q {size(spec.q)}"]
    if spec.keys != spec.queries:
        words.append(f"keys {spec.keys}")
    if spec.groups > 1:
        words.append(f"kv heads {spec.k[1]}")
    if spec.v_width != spec.qk_width:
        words.append(f"v width {spec.v_width}")
    return ", ".join(words)


def mask(spec: MaskSpec) -> str:
    """``causal, key padding``, ``dense mask``, ``no mask``."""
    words = []
    if spec.causal is not None:
        words.append("causal" if spec.causal == 0 else f"causal {_signed(spec.causal)}")
    if spec.window is not None:
        left, right = spec.window
        sides = [f"{side} {name}" for side, name in ((left, "left"), (right, "right")) if side is not None]
        words.append("window " + " ".join(sides))
    if spec.prefix is not None:
        words.append(f"prefix {spec.prefix}")
    if spec.chunk is not None:
        words.append(f"chunks of {spec.chunk}")
    if spec.document:
        words.append("documents")
    if spec.limited:
        words.append("limits that are data")
    if spec.key_padding:
        words.append("key padding")
    if spec.dense:
        words.append("dense mask")
    return ", ".join(words) or "no mask"


def _signed(offset: Size) -> str:
    return f"{offset:+d}" if isinstance(offset, int) else f"+ {offset}"


def extras(spec: AttentionSpec) -> list[str]:
    """Everything else that a reader would want to know and that is not as usual."""
    words = []
    for bias in spec.bias:
        words.append(f"bias {size(bias.shape)}" + ("" if bias.dtype == spec.dtype else f" {bias.dtype}"))
        if bias.grad:
            words[-1] += " trained"
    if spec.softcap is not None:
        words.append(f"softcap {softcap(spec.softcap)}")
    if spec.sink:
        words.append("sinks")
    if spec.dropout != 0:
        words.append(f"dropout {spec.dropout:g}" if isinstance(spec.dropout, float) else f"dropout {spec.dropout}")
    if not usual_scale(spec):
        words.append(f"scale {scale(spec)}")
    return words


def softcap(cap: float | str) -> str:
    return cap if isinstance(cap, str) else f"{cap:g}"


def usual_scale(spec: AttentionSpec) -> bool:
    """1 / sqrt(width), which is what a reader expects."""
    width = spec.qk_width
    known = isinstance(width, int) and isinstance(spec.scale, float | int)
    return known and math.isclose(float(spec.scale), float(width) ** -0.5, rel_tol=1e-3)


def scale(spec: AttentionSpec) -> str:
    return spec.scale if isinstance(spec.scale, str) else f"{spec.scale:.6g}"


def meaning(spec: AttentionSpec) -> str:
    """The whole spec in one line."""
    # a bias is often a mask that is added: "no mask" beside it would mislead
    masked = [] if spec.bias and spec.mask.empty else [mask(spec.mask)]
    return ", ".join([shape(spec), spec.dtype, *masked, *extras(spec)])


def source(where: Where) -> str:
    """``gpt.py:41``."""
    if where.file is None:
        return "(source unknown)"
    name = os.path.basename(where.file)
    return name if where.line is None else f"{name}:{where.line}"


def amount(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(us: float) -> str:
    """Microseconds for people."""
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.1f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def savings(saves: Saves) -> str:
    """``16.0 MiB, 310 us``, or nothing where nothing is known."""
    words = []
    if saves.bytes:
        words.append(amount(saves.bytes))
    if saves.us:
        words.append(duration(saves.us))
    return ", ".join(words)


def saved(report: Report) -> str:
    """What all replaced sites together are known to save."""
    parts = [site.saves for site in report.sites if site.replaced]
    return savings(Saves(bytes=sum(part.bytes or 0 for part in parts), us=sum(part.us or 0.0 for part in parts)))


def unmet(site: Decision) -> list[str]:
    """Each kernel that was asked for and could not serve, with why; only of those that come before the one taken."""
    verdicts = {verdict.kernel: verdict for verdict in site.verdicts}
    texts = []
    for name in site.asked:
        if name == site.kernel:
            break
        verdict = verdicts.get(name)
        if verdict is not None and not verdict.accepts:
            absent = [refusal for refusal in verdict.refusals if refusal.code == "unavailable"]
            texts.append(f"{name}: {', '.join(refusal.text for refusal in absent or verdict.refusals)}")
    return texts


def counted(n: int, noun: str, plural: str | None = None) -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def headline(report: Report) -> str:
    """``13 attention sites, 12 replaced, 1 miss``."""
    if not report.sites and not report.misses and not report.failures:
        return "no softmax found"
    graphs = {site.graph for site in report.sites} | {miss.graph for miss in report.misses}
    inside = f" in {len(graphs)} graphs" if len(graphs) > 1 else ""
    already = sum(site.reason is not None and site.reason.code == "already_fused" for site in report.sites)
    words = [
        counted(len(report.sites), "attention site") + inside,
        f"{report.replaced} replaced",
        *([f"{already} fused already"] if already else []),
        counted(len(report.misses), "miss", "misses"),
        *([counted(len(report.failures), "failure")] if report.failures else []),
    ]
    return ", ".join(words)
