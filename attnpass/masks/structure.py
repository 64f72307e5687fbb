"""Which closed forms a keep-mask is made of, one conjunct at a time.

    j <= i + c                      an upper bound: causal, or the right side of a window
    i - left <= j                   a lower bound: the left side of a window
    j <= i + c or j < prefix        prefix-LM
    i // C == j // C                chunks
    f(b, i) == g(b, j)              documents: equal ids
    j <= f(b, i), j >= f(b, i)      a limit, f being data: causal behind a cache whose length is a tensor
    anything over (b, j) alone      key padding
    everything else                 stays dense

Each form is recognised from the shape of a canonical literal, never from values. Offsets may hold sizes but no index
and no data; a limit is where each query's own last or first key is data (the length of a cache, given positions).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnpass.masks.division import floordiv
from attnpass.masks.expr import (
    FALSE,
    TRUE,
    ZERO,
    Bool,
    Div,
    Eq,
    Fn,
    Ge,
    Load,
    Mono,
    Or,
    Poly,
    loads,
    of,
    variables,
    walk,
)
from attnpass.masks.frame import Frame
from attnpass.masks.logic import both, conjuncts, either, eq, ge
from attnpass.masks.ranges import nonneg
from attnpass.masks.sizes import size_of
from attnpass.masks.substitute import poly_substitute
from attnpass.spec import MaskSpec, Size


@dataclass(frozen=True, kw_only=True)
class Document:
    """Query i sees key j where their ids are equal."""

    query: Poly
    key: Poly


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Query i sees the keys j <= end, or j >= end: a position of its own, which is data."""

    end: Poly  # over (b, i)
    upper: bool


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A keep-mask taken apart: the conjunction of all fields is the mask."""

    upper: Poly | None = None  # j <= i + upper
    lower: Poly | None = None  # j >= i - lower
    prefix: Poly | None = None  # or j < prefix, together with `upper`
    chunk: Poly | None = None
    documents: tuple[Document, ...] = ()
    limits: tuple[Limit, ...] = ()
    keys: Bool = TRUE  # over (b, j) alone
    residual: Bool = TRUE  # what is none of these

    def spec(self, frame: Frame) -> MaskSpec:
        """In the words of a spec."""
        causal = None if self.upper is None else size_of(self.upper)
        window: tuple[Size | None, Size | None] | None = None
        if self.lower is not None:
            window = (size_of(self.lower), None)
            if self.upper is not None and not self._aligned(frame):
                window, causal = (size_of(self.lower), size_of(self.upper)), None
        return MaskSpec(
            causal=causal,
            window=window,
            prefix=None if self.prefix is None else size_of(self.prefix),
            chunk=None if self.chunk is None else size_of(self.chunk),
            document=bool(self.documents),
            limited=bool(self.limits),
            key_padding=self.keys != TRUE,
            dense=self.residual != TRUE,
        )

    def _aligned(self, frame: Frame) -> bool:
        """The upper bound is the diagonal, counted from the top or from the bottom."""
        return self.upper in (ZERO, frame.keys - frame.queries)

    def words(self) -> tuple[str, ...]:
        """What was proved, for people."""
        out = []
        if self.prefix is not None:
            out.append(f"prefix: j < {self.prefix!r} or j <= {_shift('i', self.upper)}")
        elif self.upper is not None:
            out.append(f"upper bound: j <= {_shift('i', self.upper)}")
        if self.lower is not None:
            out.append(f"lower bound: j >= {_shift('i', -self.lower)}")
        if self.chunk is not None:
            out.append(f"chunks of {self.chunk!r}")
        out += [f"documents: {d.query!r} == {d.key!r}" for d in self.documents]
        out += [f"limit: j {'<=' if limit.upper else '>='} {limit.end!r}" for limit in self.limits]
        if self.keys != TRUE:
            out.append(f"keys: {self.keys!r}")
        if self.residual != TRUE:
            out.append(f"stays dense: {self.residual!r}")
        return tuple(out) or ("nothing is masked",)


def _shift(name: str, by: Poly | None) -> str:
    return name if by is None or by == ZERO else f"{name} + {by!r}".replace("+ -", "- ")


def take_apart(keep: Bool, frame: Frame) -> Structure:
    """The closed forms whose conjunction, with the residual, is `keep`."""
    out = Structure()
    if keep == FALSE:
        return replace(out, residual=FALSE)
    waiting: list[Bool] = []
    for part in conjuncts(keep):
        known = _fit(part, out, frame)
        if known is None:
            waiting.append(part)
        else:
            out = known
    rest: list[Bool] = []
    for part in waiting:
        chunk = _chunk_start(part, out, frame)
        if chunk is None:
            rest.append(part)
        else:
            out = replace(out, chunk=chunk)
    return replace(out, residual=both(*rest))


def _fit(part: Bool, out: Structure, frame: Frame) -> Structure | None:
    """The structure with one more conjunct, None where it has no place in it."""
    names = variables(part)
    if isinstance(part, Ge):
        slope = _diagonal(part.p, frame)
        if slope is not None:
            sign, offset = slope
            if sign > 0 and out.upper is None:
                return replace(out, upper=offset)
            if sign < 0 and out.lower is None:
                return replace(out, lower=offset)
            return None
        limit = _limit(part.p, frame)
        if limit is not None:
            return replace(out, limits=(*out.limits, limit))
    if isinstance(part, Or):
        prefix = _prefix(part, frame)
        if prefix is not None and out.upper is None:
            return replace(out, upper=prefix[0], prefix=prefix[1])
    if isinstance(part, Eq):
        slope = _diagonal(part.p, frame)
        if slope is not None and out.upper is None and out.lower is None:
            offset = slope[1] if slope[0] > 0 else -slope[1]
            return replace(out, upper=offset, lower=-offset)
        equal = _document(part.p, frame)
        if equal is not None:
            size = _chunk(equal, frame)
            if size is not None and out.chunk is None:
                return replace(out, chunk=size)
            return replace(out, documents=(*out.documents, equal))
    if "j" in names and names <= {"b", "j"}:
        return replace(out, keys=both(out.keys, part))
    return None


def _diagonal(p: Poly, frame: Frame) -> tuple[int, Poly] | None:
    """(1, c) of i - j + c and (-1, c) of j - i + c, where c is made of sizes."""
    i, j = frame.var("i"), frame.var("j")
    if i is None or j is None:
        return None
    split_i = p.split(i)
    if split_i is None:
        return None
    split_j = split_i[1].split(j)
    if split_j is None:
        return None
    a, b, offset = split_i[0].value, split_j[0].value, split_j[1]
    if a is None or b is None or (a, b) not in ((1, -1), (-1, 1)) or not _is_size(offset):
        return None
    return a, offset


def _is_size(p: Poly) -> bool:
    return not variables(p) and not any(isinstance(a, Load | Fn) for a in walk(p))


def _prefix(part: Or, frame: Frame) -> tuple[Poly, Poly] | None:
    """(c, n) of `j <= i + c or j < n`."""
    j = frame.var("j")
    if len(part.args) != 2 or j is None:
        return None
    for a, b in (part.args, part.args[::-1]):
        if isinstance(a, Ge) and isinstance(b, Ge):
            slope = _diagonal(a.p, frame)
            limit = b.p + of(j) + 1
            if slope is not None and slope[0] > 0 and _is_size(limit):
                return slope[1], limit
    return None


def _document(p: Poly, frame: Frame) -> Document | None:
    """p = f(b, i) - g(b, j), each term depending on one side only."""
    query: dict[Mono, int] = {}
    key: dict[Mono, int] = {}
    rest: dict[Mono, int] = {}
    for mono, c in p.terms:
        names = {name for atom in mono for name in variables(atom)}
        if "h" in names or {"i", "j"} <= names:
            return None
        side = query if "i" in names else key if "j" in names else rest
        side[mono] = c
    if not query or not key:
        return None
    f, g = Poly(query) + Poly(rest), -Poly(key)
    if next(iter(query.values())) < 0:
        f, g = -f, -g
    return Document(query=f, key=g)


def _limit(p: Poly, frame: Frame) -> Limit | None:
    """The limit of `f(b, i) - j >= 0` or `j - f(b, i) >= 0`, where f holds data."""
    j = frame.var("j")
    parts = None if j is None else p.split(j)
    if parts is None or parts[0].value not in (1, -1):
        return None
    upper, rest = parts[0].value == -1, parts[1]
    # without i it is key padding
    if not {"i"} <= variables(rest) <= {"b", "i"} or not loads(rest):
        return None
    return Limit(end=rest if upper else -rest, upper=upper)


def _chunk(equal: Document, frame: Frame) -> Poly | None:
    """C of i // C == j // C."""
    i, j = frame.var("i"), frame.var("j")
    if i is None or j is None:
        return None
    for atom in equal.query.atoms():
        if isinstance(atom, Div) and atom.p == of(i) and equal.query == of(atom) and _is_size(atom.q):
            return atom.q if equal.key == poly_substitute(of(atom), {i: of(j)}) else None
    return None


def _chunk_start(part: Bool, out: Structure, frame: Frame) -> Poly | None:
    """C of `j >= C * (i // C)`: with j <= i this is the query's own chunk."""
    i, j = frame.var("i"), frame.var("j")
    if not isinstance(part, Ge) or i is None or j is None or out.chunk is not None or out.prefix is not None:
        return None
    if out.upper is None or not nonneg(-out.upper):
        return None
    start = of(j) - part.p
    for atom in start.atoms():
        if isinstance(atom, Div) and atom.p == of(i) and _is_size(atom.q) and start == atom.q * of(atom):
            return atom.q
    return None


def whole(structure: Structure, frame: Frame) -> Bool:
    """The mask again, put together from its parts: what a check compares with."""
    i, j = frame.i, frame.j
    parts: list[Bool] = [structure.keys, structure.residual]
    if structure.upper is not None:
        bound = ge(i + structure.upper - j)
        parts.append(bound if structure.prefix is None else either(bound, ge(structure.prefix - 1 - j)))
    if structure.lower is not None:
        parts.append(ge(j - i + structure.lower))
    if structure.chunk is not None:
        parts.append(eq(floordiv(i, structure.chunk) - floordiv(j, structure.chunk)))
    parts += [eq(d.query - d.key) for d in structure.documents]
    parts += [ge(limit.end - j if limit.upper else j - limit.end) for limit in structure.limits]
    return both(*parts)
