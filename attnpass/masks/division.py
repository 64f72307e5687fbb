"""Floor division and remainder of integer expressions, with multiples of the divisor taken out."""

from __future__ import annotations

import math

from attnpass.masks.expr import ONE, ZERO, Div, Mod, Mono, Poly, of, poly
from attnpass.masks.ranges import nonneg


def divmod_(p: Poly, q: Poly) -> tuple[Poly, Poly]:
    """(floor(p / q), p - q * floor(p / q)); q is not zero wherever the program runs."""
    if q == ONE:
        return p, ZERO
    a, r = _extract(p, q)
    if r == ZERO:
        return a, ZERO
    if nonneg(r) and nonneg(q - 1 - r):
        return a, r
    if nonneg(r + q) and nonneg(-1 - r):
        return a - 1, r + q
    c = q.value
    if c is not None and c > 0:
        k, rest = divmod(r.constant, c)
        a, r = a + k, r + (rest - r.constant)
        if nonneg(r) and nonneg(q - 1 - r):
            return a, r
        g = math.gcd(r.content(), c)
        if g > 1:  # (g * x + d) // (g * m) = (x + d // g) // m, and the remainder likewise
            most, least = divmod(r.constant, g)
            x, m = Poly({mono: k // g for mono, k in r.terms if mono}) + most, c // g
            quotient, remainder = divmod_(x, poly(m))
            return a + quotient, remainder * g + least
        inner = _single_div(r)
        if inner is not None:  # (x // m) // c = x // (m * c), for the quotient only
            return a + floordiv(inner.p, inner.q * c), of(Mod(r, q))
    return a + of(Div(r, q)), of(Mod(r, q))


def floordiv(p: Poly, q: Poly) -> Poly:
    return divmod_(p, q)[0]


def mod(p: Poly, q: Poly) -> Poly:
    return divmod_(p, q)[1]


def _single_div(r: Poly) -> Div | None:
    if len(r.terms) == 1 and r.terms[0][1] == 1 and len(r.terms[0][0]) == 1:
        atom = r.terms[0][0][0]
        if isinstance(atom, Div) and atom.q.value is not None and atom.q.value > 0:
            return atom
    return None


def _extract(p: Poly, q: Poly) -> tuple[Poly, Poly]:
    """(a, r) with p = q * a + r, taking out every multiple of q that shows."""
    if not q.terms:
        return ZERO, p
    lead, c = max(q.terms, key=lambda t: (len(t[0]), tuple(x.key for x in t[0])))
    a = ZERO
    for _ in range(16):
        for mono, k in p.terms:
            rest = _without(mono, lead)
            if rest is not None and mono and k % c == 0:
                step = Poly({rest: k // c})
                a, p = a + step, p - step * q
                break
        else:
            break
    return a, p


def _without(mono: Mono, part: Mono) -> Mono | None:
    """mono / part, None where it does not divide."""
    left = list(mono)
    for atom in part:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)
