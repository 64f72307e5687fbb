"""Proofs that an integer expression is nowhere negative, and the bounds of one.

    nonneg(p)   True only where p >= 0 for every value of every index and size in it

One atom at a time is replaced by the end of its range at which p is smallest (its coefficient has one sign), compound
atoms first, then indices, then sizes. What remains is a number. Each step only weakens what has to hold, so True is a
proof and False means "not proved". Sizes are any integers from their lower bound on; relations between sizes are known
only where one is written as a polynomial of the other.
"""

from __future__ import annotations

from functools import lru_cache

from attnpass.masks.expr import ZERO, Atom, Div, Fn, Load, Mod, Poly, Sym, Var, of, poly

_DEPTH = 12  # nested eliminations; a mask needs three or four
_UNSIGNED = {"uint8": 255, "uint16": 2**16 - 1, "uint32": 2**32 - 1}
_SIGNED = {"int8": 2**7, "int16": 2**15, "int32": 2**31, "int64": 2**63}


def nonneg(p: Poly) -> bool:
    """Proved: p >= 0 everywhere."""
    return _nonneg(p, 0)


def positive(p: Poly) -> bool:
    return nonneg(p - 1)


@lru_cache(maxsize=1 << 16)
def _nonneg(p: Poly, depth: int) -> bool:
    value = p.value
    if value is not None:
        return value >= 0
    if depth > _DEPTH:
        return False
    for atom in sorted(p.atoms(), key=_order):
        parts = p.split(atom)
        if parts is None:
            continue
        c, rest = parts
        if isinstance(atom, Div) and _quotient(atom, c, rest, depth):
            return True
        end: Poly | None = None
        if _nonneg(c, depth + 1):
            end = low(atom)
        elif _nonneg(-c, depth + 1):
            end = high(atom)
        if end is not None:
            return _nonneg(rest + c * end, depth + 1)
    return _shifted(p)


def _quotient(atom: Div, c: Poly, rest: Poly, depth: int) -> bool:
    """c is k * q: then q * floor(x / q) lies between x - q + 1 and x, which is closer than bounds of the quotient."""
    if not c.terms or not atom.q.terms or not positive(atom.q):
        return False
    k, left = divmod(c.terms[-1][1], atom.q.terms[-1][1])
    if left or c != atom.q * k:
        return False
    nearest = atom.p - atom.q + 1 if k > 0 else atom.p
    return _nonneg(rest + nearest * k, depth + 1)


def _order(atom: Atom) -> int:
    if isinstance(atom, Div | Mod | Load | Fn):
        # a quotient whose numerator holds another is eliminated before it
        return 0 if isinstance(atom, Div | Mod) and any(isinstance(a, Div | Mod) for a in atom.p.atoms()) else 1
    return 2 if isinstance(atom, Var) else 3


def _shifted(p: Poly) -> bool:
    """Only sizes are left and occur in higher powers: write each as its lower bound plus something >= 0."""
    shifted = ZERO
    for mono, c in p.terms:
        term = poly(c)
        for atom in mono:
            if not isinstance(atom, Sym) or atom.low is None:
                return False
            term = term * (of(atom) + atom.low)
        shifted = shifted + term
    return all(c >= 0 for _, c in shifted.terms)


def low(atom: Atom) -> Poly | None:
    """Something the atom is never below."""
    if isinstance(atom, Var):
        return ZERO
    if isinstance(atom, Sym):
        return None if atom.low is None else poly(atom.low)
    if isinstance(atom, Mod):
        return ZERO if positive(atom.q) else None
    if isinstance(atom, Div):
        q = atom.q.value
        if q is not None and q > 0:
            least = integer_bounds(atom.p)[0]
            return None if least is None else poly(least // q)
        return ZERO if positive(atom.q) and nonneg(atom.p) else None
    if isinstance(atom, Load | Fn):
        if atom.dtype in _UNSIGNED:
            return ZERO
        return poly(-_SIGNED[atom.dtype]) if atom.dtype in _SIGNED else None
    return None


def high(atom: Atom) -> Poly | None:
    """Something the atom is never above."""
    if isinstance(atom, Var):
        return atom.size - 1
    if isinstance(atom, Sym):
        return None if atom.high is None else poly(atom.high)
    if isinstance(atom, Mod):
        return atom.q - 1 if positive(atom.q) else None
    if isinstance(atom, Div):
        q = atom.q.value
        if q is not None and q > 0:
            most = integer_bounds(atom.p)[1]
            if most is not None:
                return poly(most // q)
        if positive(atom.q) and nonneg(atom.p):
            return atom.p
        return None
    if isinstance(atom, Load | Fn):
        if atom.dtype in _UNSIGNED:
            return poly(_UNSIGNED[atom.dtype])
        return poly(_SIGNED[atom.dtype] - 1) if atom.dtype in _SIGNED else None
    return None


@lru_cache(maxsize=1 << 14)
def integer_bounds(p: Poly) -> tuple[int | None, int | None]:
    """The least and the greatest value, as numbers; None where there is no such number or none was found."""
    lo: int | None = 0
    hi: int | None = 0
    for mono, c in p.terms:
        a, b = _mono_bounds(mono)
        if c < 0:
            a, b = b, a
        lo = None if lo is None or a is None else lo + c * a
        hi = None if hi is None or b is None else hi + c * b
    return lo, hi


def _mono_bounds(mono: tuple[Atom, ...]) -> tuple[int | None, int | None]:
    lo: int | None = 1
    hi: int | None = 1
    for atom in mono:
        a, b = _number(low(atom), 0), _number(high(atom), 1)
        if lo is not None and lo >= 0 and a is not None and a >= 0:
            lo = lo * a
            hi = None if hi is None or b is None else hi * b
        elif None in (lo, hi, a, b):
            return None, None
        else:
            assert lo is not None
            assert hi is not None
            assert a is not None
            assert b is not None
            ends = (lo * a, lo * b, hi * a, hi * b)
            lo, hi = min(ends), max(ends)
    return lo, hi


def _number(p: Poly | None, end: int) -> int | None:
    if p is None:
        return None
    return p.value if p.value is not None else integer_bounds(p)[end]


def is_one(p: Poly) -> bool:
    """Proved to be one everywhere: the size of a dimension that broadcasts."""
    return p.value == 1
