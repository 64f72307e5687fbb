"""The simplifying constructors: comparisons, boolean algebra, decisions, floor division.

    ge(p) eq(p)            p >= 0, p == 0
    both(..) either(..) negate(..)
    ite(c, a, b)           a where c else b, for booleans, integers and reals alike
    spread(f, *trees)      f applied to the leaves of decisions: f(If(c, a, b), x) = If(c, f(a, x), f(b, x))

Simplification uses only what :mod:`~attnpass.masks.ranges` proves, so an expression and its simplified form agree for
every index and size. Implication is decided literal by literal: sound, not complete.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from attnpass.masks.expr import (
    FALSE,
    TRUE,
    And,
    BConst,
    Bool,
    Eq,
    Fn,
    Ge,
    If,
    Leaf,
    Load,
    Not,
    Or,
    Poly,
    Tree,
    Value,
)
from attnpass.masks.ranges import nonneg, positive

MAX_LEAVES = 64
MAX_PARTS = 32  # of a conjunction or disjunction: each is compared with each other
_BOOL = (BConst, Ge, Eq, Not, And, Or)


class TooLarge(Exception):
    """A decision with more leaves, or a mask of more parts, than it is worth to follow: it is kept opaque."""


def is_bool(e: Value) -> bool:
    return isinstance(e, _BOOL) or (isinstance(e, Load | Fn) and e.kind == "bool")


# --- comparisons -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 15)
def ge(p: Poly) -> Bool:
    """p >= 0"""
    if p.value is not None:
        return TRUE if p.value >= 0 else FALSE
    g = p.content()
    if g > 1:
        p = Poly({m: c // g for m, c in p.terms})  # floor of the constant term; the others divide
    if nonneg(p):
        return TRUE
    if nonneg(-p - 1):
        return FALSE
    return Ge(p)


@lru_cache(maxsize=1 << 15)
def eq(p: Poly) -> Bool:
    """p == 0"""
    if p.value is not None:
        return TRUE if p.value == 0 else FALSE
    if len(p.terms) == 1:
        (mono, _) = p.terms[0]
        if len(mono) == 1 and isinstance(mono[0], Fn) and mono[0].name == "sub":
            x, y = mono[0].args  # even where it wraps around, a difference is zero for equal numbers only
            if isinstance(x, Poly) and isinstance(y, Poly):
                return eq(x - y)
    g = p.content()
    if p.constant % g:
        return FALSE
    p = Poly({m: c // g for m, c in p.terms})
    if nonneg(p - 1) or nonneg(-p - 1):
        return FALSE
    if nonneg(p) and nonneg(-p):
        return TRUE
    if next(c for m, c in p.terms if m) < 0:
        p = -p
    return Eq(p)


# --- boolean algebra ---------------------------------------------------------------------------------------------


def negate(a: Bool) -> Bool:
    if isinstance(a, BConst):
        return FALSE if a.value else TRUE
    if isinstance(a, Ge):
        return ge(-a.p - 1)
    if isinstance(a, Not):
        return a.a
    if isinstance(a, And):
        return either(*map(negate, a.args))
    if isinstance(a, Or):
        return both(*map(negate, a.args))
    return Not(a)


@lru_cache(maxsize=1 << 15)
def implies(a: Bool, b: Bool) -> bool:
    """Proved: wherever a holds, b holds."""
    if a in (b, FALSE) or b == TRUE:
        return True
    if isinstance(b, And):
        return all(implies(a, x) for x in b.args)
    if isinstance(a, Or):
        return all(implies(x, b) for x in a.args)
    if isinstance(a, And):
        return any(implies(x, b) for x in a.args) or _sum_implies(a, b)
    if isinstance(b, Or):
        return any(implies(a, x) for x in b.args)
    if isinstance(b, Ge):
        if isinstance(a, Ge):
            return nonneg(b.p - a.p)
        if isinstance(a, Eq):
            return nonneg(b.p - a.p) or nonneg(b.p + a.p)
    if isinstance(b, Not) and isinstance(b.a, Eq):
        if isinstance(a, Ge):  # p >= 0 keeps q away from zero when q - p > 0 or -q - p > 0
            return positive(b.a.p - a.p) or positive(-b.a.p - a.p)
        if isinstance(a, Eq):
            return any(positive(s * b.a.p + t * a.p) for s in (1, -1) for t in (1, -1))
    return False


def _sum_implies(a: And, b: Bool) -> bool:
    """p >= 0 and q >= 0 give p + q >= 0."""
    if not isinstance(b, Ge):
        return False
    ps = [x.p for x in a.args if isinstance(x, Ge)]
    return any(nonneg(b.p - p - q) for at, p in enumerate(ps) for q in ps[at + 1 :])


def excludes(a: Bool, b: Bool) -> bool:
    """Proved: a and b never hold together."""
    return implies(a, negate(b))


def both(*args: Bool) -> Bool:
    """Conjunction."""
    return _join(args, True)


def either(*args: Bool) -> Bool:
    """Disjunction."""
    return _join(args, False)


@lru_cache(maxsize=1 << 14)
def _join(args: tuple[Bool, ...], is_and: bool) -> Bool:
    # Written for conjunction; for disjunction every question is asked of the mirror image.
    one, zero = (TRUE, FALSE) if is_and else (FALSE, TRUE)
    kind: type[And] | type[Or] = And if is_and else Or

    def weaker(x: Bool, y: Bool) -> bool:  # y makes x superfluous
        return implies(y, x) if is_and else implies(x, y)

    def clash(x: Bool, y: Bool) -> bool:
        return implies(x, negate(y)) if is_and else implies(negate(x), y)

    work: list[Bool] = []
    for arg in args:
        work.extend(arg.args if isinstance(arg, kind) else (arg,))
    if len(work) > MAX_PARTS:
        raise TooLarge(f"a mask of more than {MAX_PARTS} parts")
    kept: list[Bool] = []
    while work:
        new = work.pop(0)
        if new == zero:
            return zero
        if new == one or any(weaker(new, old) for old in kept):
            continue
        if any(clash(new, old) for old in kept):
            return zero
        kept = [old for old in kept if not weaker(old, new)]
        changed = False
        for at, old in enumerate(kept):
            merged = _merge(old, new, is_and)
            if merged is not None:
                del kept[at]
                work.insert(0, merged)
                changed = True
                break
        if not changed:
            kept.append(new)
    # inside an argument of the other kind, parts that the rest decides are dropped
    other = Or if is_and else And
    for at, arg in enumerate(kept):
        if isinstance(arg, other):
            rest = [x for k, x in enumerate(kept) if k != at]
            parts = [x for x in arg.args if not any(clash(x, y) for y in rest)]
            if len(parts) < len(arg.args):
                smaller = either(*parts) if is_and else both(*parts)
                return _join((*rest, smaller), is_and)
    if not is_and:
        kept = _factor(kept)
    if not kept:
        return one
    return kept[0] if len(kept) == 1 else kind(kept)


def _merge(x: Bool, y: Bool, is_and: bool) -> Bool | None:
    """One literal that says what two say together: p >= 0 and -p >= 0 is p == 0, and so on."""
    if not is_and:
        merged = _merge(negate(x), negate(y), True)
        return _cases(x, y) if merged is None else negate(merged)
    if isinstance(x, Ge) and isinstance(y, Ge) and (x.p + y.p).value == 0:
        return eq(x.p)
    for a, b in ((x, y), (y, x)):
        if isinstance(a, Ge) and isinstance(b, Not) and isinstance(b.a, Eq) and b.a.p in (a.p, -a.p):
            return ge(a.p - 1)
    return None


def _cases(x: Bool, y: Bool) -> Bool | None:
    """(c and a) or (not c and b) is a and b where c gives b and not c gives a: |i - j| <= w, for one."""
    for c in _conjuncts(x):
        other = negate(c)
        if other in _conjuncts(y):
            a = both(*(z for z in _conjuncts(x) if z != c))
            b = both(*(z for z in _conjuncts(y) if z != other))
            if implies(c, b) and implies(other, a):
                return both(a, b)
    return None


def _factor(args: list[Bool]) -> list[Bool]:
    """(a and x) or (a and y) = a and (x or y)"""
    if len(args) < 2 or not all(isinstance(a, And) for a in args):
        return args
    common = set(_conjuncts(args[0]))
    for arg in args[1:]:
        common &= set(_conjuncts(arg))
    if not common:
        return args
    inner = [both(*(x for x in _conjuncts(a) if x not in common)) for a in args]
    return [both(*sorted(common, key=lambda e: e.key), either(*inner))]


def _conjuncts(a: Bool) -> tuple[Bool, ...]:
    return a.args if isinstance(a, And) else (a,)


def conjuncts(a: Bool) -> tuple[Bool, ...]:
    """The parts of a conjunction; none for what is always true."""
    return () if a == TRUE else _conjuncts(a)


# --- decisions ---------------------------------------------------------------------------------------------------


def ite(cond: Bool, a: Value, b: Value) -> Value:
    """a where cond holds, b elsewhere."""
    if cond == TRUE:
        return a
    if cond == FALSE:
        return b
    if a == b:
        return a
    if is_bool(a):
        return either(both(cond, a), both(negate(cond), b))  # type: ignore[arg-type]
    tree_a, tree_b = under(a, cond), under(b, negate(cond))  # type: ignore[arg-type]
    return tree_a if tree_a == tree_b else If(cond, tree_a, tree_b)


def under(tree: Tree, fact: Bool) -> Tree:
    """The same tree where `fact` is known to hold."""
    if not isinstance(tree, If):
        return tree
    if implies(fact, tree.cond):
        return under(tree.a, fact)
    if excludes(fact, tree.cond):
        return under(tree.b, fact)
    a, b = under(tree.a, fact), under(tree.b, fact)
    if a == b:
        return a
    return tree if a is tree.a and b is tree.b else If(tree.cond, a, b)


def leaves(tree: Tree) -> list[tuple[Bool, Leaf]]:
    """(when, what) for every leaf; the conditions exclude each other and cover everything."""
    if not isinstance(tree, If):
        return [(TRUE, tree)]
    out = [(both(tree.cond, c), leaf) for c, leaf in leaves(tree.a)]
    out += [(both(negate(tree.cond), c), leaf) for c, leaf in leaves(tree.b)]
    return [(c, leaf) for c, leaf in out if c != FALSE]


def count(tree: Value) -> int:
    return count(tree.a) + count(tree.b) if isinstance(tree, If) else 1


def spread(f: Callable[..., Value], *trees: Tree) -> Value:
    """f of the leaves of its arguments, under the decisions that lead there."""
    for at, tree in enumerate(trees):
        if isinstance(tree, If):
            yes = [under(t, tree.cond) for t in trees[:at]] + [tree.a] + [under(t, tree.cond) for t in trees[at + 1 :]]
            no_ = negate(tree.cond)
            no = [under(t, no_) for t in trees[:at]] + [tree.b] + [under(t, no_) for t in trees[at + 1 :]]
            out = ite(tree.cond, spread(f, *yes), spread(f, *no))
            if isinstance(out, If) and count(out) > MAX_LEAVES:
                raise TooLarge
            return out
    return f(*trees)


def any_leaf(tree: Tree, test: Callable[[Leaf], Bool]) -> Bool:
    """Where the leaf that is reached passes the test."""
    return either(*(both(c, test(leaf)) for c, leaf in leaves(tree)))
