"""Replacing indices and sizes in an expression by other integers, with everything simplified again."""

from __future__ import annotations

from collections.abc import Mapping

from attnpass.masks.division import floordiv, mod
from attnpass.masks.expr import (
    ZERO,
    And,
    Atom,
    BConst,
    Const,
    Div,
    Eq,
    Fn,
    Ge,
    If,
    Int,
    Load,
    Mod,
    Not,
    Or,
    Poly,
    Value,
    of,
    poly,
)
from attnpass.masks.logic import both, either, eq, ge, ite, negate


def substitute(e: Value, by: Mapping[Atom, Poly]) -> Value:
    """The expression with every atom of `by` replaced; the sizes of variables stay."""
    if isinstance(e, Poly):
        return poly_substitute(e, by)
    if isinstance(e, BConst | Const):
        return e
    if isinstance(e, Int):
        return Int(poly_substitute(e.p, by))
    if isinstance(e, Ge):
        return ge(poly_substitute(e.p, by))
    if isinstance(e, Eq):
        return eq(poly_substitute(e.p, by))
    if isinstance(e, Not):
        return negate(substitute(e.a, by))  # type: ignore[arg-type]
    if isinstance(e, And):
        return both(*(substitute(a, by) for a in e.args))  # type: ignore[arg-type]
    if isinstance(e, Or):
        return either(*(substitute(a, by) for a in e.args))  # type: ignore[arg-type]
    if isinstance(e, If):
        return ite(substitute(e.cond, by), substitute(e.a, by), substitute(e.b, by))  # type: ignore[arg-type]
    return _opaque(e, by)


def _opaque(e: Load | Fn, by: Mapping[Atom, Poly]) -> Load | Fn:
    if isinstance(e, Load):
        return Load(e.source, tuple(poly_substitute(p, by) for p in e.at), e.kind, e.dtype)
    args = tuple(substitute(a, by) for a in e.args)
    return Fn(e.name, args, e.kind, e.dtype)  # type: ignore[arg-type]  # leaves stay leaves


def poly_substitute(p: Poly, by: Mapping[Atom, Poly]) -> Poly:
    out = ZERO
    for mono, c in p.terms:
        term = poly(c)
        for atom in mono:
            term = term * _atom(atom, by)
        out = out + term
    return out


def _atom(atom: Atom, by: Mapping[Atom, Poly]) -> Poly:
    if atom in by:
        return by[atom]
    if isinstance(atom, Div):
        return floordiv(poly_substitute(atom.p, by), poly_substitute(atom.q, by))
    if isinstance(atom, Mod):
        return mod(poly_substitute(atom.p, by), poly_substitute(atom.q, by))
    if isinstance(atom, Load | Fn):
        return of(_opaque(atom, by))
    return of(atom)
