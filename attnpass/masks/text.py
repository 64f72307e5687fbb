"""Expressions as people read them: the lines of a proof."""

from __future__ import annotations

from attnpass.masks.expr import And, Const, Div, Eq, Expr, Fn, Ge, If, Int, Load, Mod, Not, Or, Poly, Sym, Var


def text(e: Expr) -> str:
    """For people."""
    if isinstance(e, Poly):
        return _poly_text(e)
    if isinstance(e, Var | Sym):
        return e.name
    if isinstance(e, Div | Mod):
        sign = "//" if isinstance(e, Div) else "%"
        return f"({_factor(e.p)} {sign} {_factor(e.q)})"
    if isinstance(e, Load):
        return f"{e.source}[{', '.join(map(text, e.at))}]"
    if isinstance(e, Fn):
        return f"{e.name}({', '.join(map(text, e.args))})"
    if isinstance(e, Ge | Eq):
        sign = ">=" if isinstance(e, Ge) else "=="
        left = Poly({m: c for m, c in e.p.terms if c > 0})
        right = -Poly({m: c for m, c in e.p.terms if c < 0})
        return f"{text(left)} {sign} {text(right)}"
    if isinstance(e, Not):
        return text(e.a).replace(" == ", " != ") if isinstance(e.a, Eq) else f"not {text(e.a)}"
    if isinstance(e, And | Or):
        return "(" + (" and " if isinstance(e, And) else " or ").join(map(text, e.args)) + ")"
    if isinstance(e, Const):
        return f"{e.value:g}"
    if isinstance(e, Int):
        return text(e.p)
    if isinstance(e, If):
        return f"({text(e.a)} if {text(e.cond)} else {text(e.b)})"
    return e.key


def _factor(p: Poly) -> str:
    return text(p) if (len(p.terms) == 1 and abs(p.terms[0][1]) == 1) or p.value is not None else f"({text(p)})"


def _poly_text(p: Poly) -> str:
    out = ""
    for mono, c in sorted(p.terms, key=lambda t: (not t[0], t[1] < 0)):
        body = "*".join(text(a) for a in mono)
        number = str(abs(c)) if not body else (body if abs(c) == 1 else f"{abs(c)}*{body}")
        out += (" - " if c < 0 else " + ") + number if out else ("-" if c < 0 else "") + number
    return out or "0"
