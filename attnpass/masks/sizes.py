"""Sizes of the graph as polynomials, and back to numbers.

A SymInt's expression becomes a polynomial over its symbols. Only what holds for every run is used of a symbol: sizes
are never negative; the upper bound, where the ShapeEnv has one. The lower bound of two that torch assumes of every
symbol is not used, because an exported program may be run at smaller sizes. Nothing here adds a guard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnpass.masks.division import floordiv, mod
from attnpass.masks.expr import Atom, Div, Mod, Poly, Sym, Var, of, poly
from attnpass.masks.substitute import poly_substitute

_UNBOUNDED = 2**40  # torch's "no upper bound" is some number beyond any size


class Sizes:
    """The symbols of one graph; symbols that are lengths of the scores' own axes are at least one."""

    def __init__(self) -> None:
        self._syms: dict[str, Sym] = {}
        self.hints: dict[str, int] = {}  # the sizes of the trace
        self.exprs: dict[str, Any] = {}  # the sympy expression of each symbol
        self._lengths: set[str] = set()

    def length(self, size: Any) -> Poly:
        """A length of the scores: where it is zero there is no score, so it may be taken to be positive."""
        if isinstance(size, torch.SymInt):
            expr = size.node.expr
            if expr.is_Symbol and str(expr) not in self._syms:
                self._lengths.add(str(expr))
        return self.poly(size)

    def poly(self, size: Any) -> Poly:
        """Any integer of the graph."""
        if isinstance(size, Node):
            size = size.meta.get("val")
        if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
            raise TypeError(f"not an integer: {size!r}")
        if isinstance(size, int):
            return poly(size)
        return self._convert(size.node.expr, size.node.shape_env)

    def _convert(self, expr: Any, env: ShapeEnv | None) -> Poly:
        if expr.is_Integer:
            return poly(int(expr))
        if expr.is_Add:
            out = poly(0)
            for arg in expr.args:
                out = out + self._convert(arg, env)
            return out
        if expr.is_Mul and all(arg.is_integer is not False for arg in expr.args):
            out = poly(1)
            for arg in expr.args:
                out = out * self._convert(arg, env)
            return out
        if expr.is_Pow and expr.args[1].is_Integer and 0 < int(expr.args[1]) <= 4:
            base = self._convert(expr.args[0], env)
            out = base
            for _ in range(int(expr.args[1]) - 1):
                out = out * base
            return out
        name = type(expr).__name__
        if name in ("FloorDiv", "CleanDiv", "PythonMod", "Mod") and len(expr.args) == 2:
            p, q = (self._convert(arg, env) for arg in expr.args)
            if q.value is not None and q.value > 0:  # other divisors may have other conventions
                return floordiv(p, q) if name.endswith("Div") else mod(p, q)
        return of(self._symbol(expr, env))

    def _symbol(self, expr: Any, env: ShapeEnv | None) -> Sym:
        """A symbol, or any other expression as a symbol of its own."""
        name = str(expr)
        if name not in self._syms:
            low: int | None = None
            high: int | None = None
            if env is not None:
                bounds = env.bound_sympy(expr)
                low, high = _finite(bounds.lower), _finite(bounds.upper)
            # torch takes sizes to be at least two; only their sign is certain
            low = None if low is None else (1 if name in self._lengths else min(low, 0))
            self._syms[name] = Sym(name, low, high)
            self.exprs[name] = expr
            hint = _hint(expr, env)
            if hint is not None:
                self.hints[name] = hint
        return self._syms[name]

    def at_hint(self, p: Poly) -> int | None:
        """The number this polynomial is at the traced sizes; None where it has indices, loads or no hint."""
        by: dict[Atom, Poly] = {}
        for atom in _inner(p):
            if not isinstance(atom, Sym) or atom.name not in self.hints:
                return None
            by[atom] = poly(self.hints[atom.name])
        return poly_substitute(p, by).value


def _inner(p: Poly) -> set[Atom]:
    out: set[Atom] = set()
    for atom in p.atoms():
        out |= _inner(atom.p) | _inner(atom.q) if isinstance(atom, Div | Mod) else {atom}
    return out


def _finite(bound: Any) -> int | None:
    try:
        number = int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    return number if abs(number) < _UNBOUNDED else None


def _hint(expr: Any, env: ShapeEnv | None) -> int | None:
    if env is None:
        return None
    # a plain substitution of the traced sizes: asking the ShapeEnv could add a guard in some releases
    known = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    value = expr.xreplace(dict(known))
    return int(value) if value.is_Integer else None


def size_of(p: Poly) -> int | str:
    """As a spec keeps it."""
    return p.value if p.value is not None else repr(p)


def index(name: str, size: Poly) -> Poly:
    """The index of an axis of this length."""
    return poly(0) if size.value == 1 else of(Var(name, size))
