"""Can a query be left without any key?

Impossible is proved by witnesses: keys named by an expression (the query's own position, the ends of its window, the
first key, the last one ...) of which, for every query, one is seen. The conditions under which each witness serves are
joined; when the disjunction is a tautology, no row is empty.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from attnpass.masks.check import NotRun
from attnpass.masks.compare import evaluator, extents
from attnpass.masks.expr import FALSE, TRUE, ZERO, Bool, Div, Poly, Sym, Var, loads, of, variables, walk
from attnpass.masks.frame import Frame
from attnpass.masks.logic import both, either, ge
from attnpass.masks.sizes import Sizes
from attnpass.masks.structure import Structure
from attnpass.masks.substitute import substitute

EmptyRows = Literal["impossible", "possible", "unknown"]


def never_empty(keep: Bool, structure: Structure, frame: Frame) -> str | None:
    """The witnesses that serve every query, in words; None where that is not proved."""
    if keep == TRUE:
        return "nothing is masked"
    j = frame.var("j")
    if keep == FALSE or j is None:
        return None
    served: Bool = FALSE
    used: list[str] = []
    for witness in _witnesses(structure, frame):
        in_range = both(ge(witness), ge(frame.keys - 1 - witness))
        seen = substitute(keep, {j: witness})
        serves = both(in_range, seen)  # type: ignore[arg-type]
        if serves == FALSE:
            continue
        used.append(f"j = {witness!r}")
        served = either(served, serves)
        if served == TRUE:
            return "every query sees " + " or ".join(used)
    return None


def _witnesses(structure: Structure, frame: Frame) -> list[Poly]:
    i = frame.i
    out = [i, ZERO, frame.keys - 1, i + frame.keys - frame.queries]
    if structure.upper is not None:
        out.append(i + structure.upper)
    if structure.lower is not None:
        out.append(i - structure.lower)
    if structure.chunk is not None:
        var = frame.var("i")
        if var is not None:
            out.append(structure.chunk * of(Div(of(var), structure.chunk)))
    return list(dict.fromkeys(out))


def empty_rows(keep: Bool, structure: Structure, frame: Frame, sizes: Sizes) -> tuple[EmptyRows, str]:
    """(answer, why)"""
    why = never_empty(keep, structure, frame)
    if why is not None:
        return "impossible", why
    if loads(keep):
        return "possible", "it depends on data"
    try:
        names = variables(keep) | {"i", "j"}
        empty = not bool(evaluator(names, frame, sizes)(keep).expand(_grid(names, frame, sizes)).any(-1).all())
    except NotRun as reason:
        return "unknown", str(reason)
    symbolic = any(isinstance(a, Sym) or (isinstance(a, Var) and a.size.value is None) for a in walk(keep))
    symbolic = symbolic or frame.queries.value is None or frame.keys.value is None
    if empty:
        return "possible", "at the traced sizes" if symbolic else "evaluated"
    return ("unknown", "there is none at the traced sizes") if symbolic else ("impossible", "evaluated")


def _grid(names: Collection[str], frame: Frame, sizes: Sizes) -> tuple[int, ...]:
    return tuple(extents(names, frame, sizes).values())
