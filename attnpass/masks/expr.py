"""The expressions that masks are lifted to: values as functions of the index (b, h, i, j), without a single node.

    Poly      an exact integer: a polynomial with integer coefficients over atoms
    atoms     Var (an index, 0 <= v < size), Sym (a size), Div and Mod (floor semantics), and opaque Load and Fn
    Bool      BConst, Ge (poly >= 0), Eq (poly == 0), Not, And, Or, and opaque Load and Fn
    Real      Const, Int (an integer held exactly by a float), and opaque Load and Fn
    If        a decision between values, for integers and reals; booleans use And and Or instead

``Load(source, at)`` is the element of tensor `source` at exactly the coordinates `at`: what could not be lifted is kept
so and never guessed. ``Fn(name, args)`` is a known pointwise operation whose value is not known as a closed form.

Every expression is canonical for what it says and carries one string `key`; two expressions are equal when their keys
are. Build Poly by its operators, everything else by the constructors of :mod:`~attnpass.masks.logic`, which simplify.
Limits: integers are mathematical integers, so whoever lifts proves that nothing wraps around; the sign of a float zero
is not kept where an integer was cast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

Kind = Literal["int", "bool", "real"]


class Expr:
    """Anything below: immutable, compared and hashed by its key."""

    __slots__ = ("_hash", "key")
    key: str
    _hash: int

    def _seal(self, key: str) -> None:
        self.key = key
        self._hash = hash(key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Expr) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        from attnpass.masks.text import text  # it needs the classes below

        return text(self)


class Atom(Expr):
    """What a polynomial is over."""

    __slots__ = ()


class Var(Atom):
    """An index: 0 <= v < size."""

    __slots__ = ("name", "size")

    def __init__(self, name: str, size: Poly) -> None:
        self.name = name
        self.size = size
        self._seal(f"{name}<{size.key}>")


class Sym(Atom):
    """A size that is not known, or any other integer that is the same everywhere: low <= s <= high."""

    __slots__ = ("high", "low", "name")

    def __init__(self, name: str, low: int | None = 0, high: int | None = None) -> None:
        self.name = name
        self.low = low
        self.high = high
        self._seal(f"{name}[{low},{high}]")


class Div(Atom):
    """floor(p / q)"""

    __slots__ = ("p", "q")

    def __init__(self, p: Poly, q: Poly) -> None:
        self.p = p
        self.q = q
        self._seal(f"({p.key})//({q.key})")


class Mod(Atom):
    """p - q * floor(p / q)"""

    __slots__ = ("p", "q")

    def __init__(self, p: Poly, q: Poly) -> None:
        self.p = p
        self.q = q
        self._seal(f"({p.key})%({q.key})")


class Load(Atom):
    """One element of a tensor of the graph. `low` and `high` are what its dtype alone promises."""

    __slots__ = ("at", "dtype", "kind", "source")

    def __init__(self, source: str, at: tuple[Poly, ...], kind: Kind, dtype: str) -> None:
        self.source = source
        self.at = at
        self.kind = kind
        self.dtype = dtype
        self._seal(f"{source}[{','.join(p.key for p in at)}]")


class Fn(Atom):
    """A pointwise operation of known name and result dtype on values that are not decisions."""

    __slots__ = ("args", "dtype", "kind", "name")

    def __init__(self, name: str, args: tuple[Leaf, ...], kind: Kind, dtype: str) -> None:
        self.name = name
        self.args = args
        self.kind = kind
        self.dtype = dtype
        self._seal(f"{name}:{dtype}({','.join(a.key for a in args)})")


Mono = tuple[Atom, ...]


class Poly(Expr):
    """An integer polynomial: {product of atoms: coefficient}, in a fixed order, without zeros."""

    __slots__ = ("terms",)
    terms: tuple[tuple[Mono, int], ...]

    def __init__(self, terms: Mapping[Mono, int]) -> None:
        merged = _merge_quotients({m: c for m, c in terms.items() if c})
        items = [(tuple(a.key for a in m), m, c) for m, c in merged.items()]
        items.sort(key=lambda item: item[0])
        self.terms = tuple((m, c) for _, m, c in items)
        self._seal("+".join(f"{c}*{'*'.join(k)}" if k else str(c) for k, _, c in items) or "0")

    @property
    def constant(self) -> int:
        """The constant term."""
        return self.terms[0][1] if self.terms and not self.terms[0][0] else 0

    @property
    def value(self) -> int | None:
        """The integer it is, None when it depends on anything."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    def atoms(self) -> set[Atom]:
        return {a for m, _ in self.terms for a in m}

    def __add__(self, other: Poly | int) -> Poly:
        terms = dict(self.terms)
        for mono, c in as_poly(other).terms:
            terms[mono] = terms.get(mono, 0) + c
        return Poly(terms)

    def __mul__(self, other: Poly | int) -> Poly:
        terms: dict[Mono, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in as_poly(other).terms:
                mono = tuple(sorted(m1 + m2, key=lambda a: a.key))
                terms[mono] = terms.get(mono, 0) + c1 * c2
        return Poly(terms)

    def __neg__(self) -> Poly:
        return self * -1

    def __sub__(self, other: Poly | int) -> Poly:
        return self + as_poly(other) * -1

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Poly | int) -> Poly:
        return as_poly(other) - self

    def split(self, atom: Atom) -> tuple[Poly, Poly] | None:
        """(c, r) with self == atom * c + r and neither c nor r holding the atom on its top level; None otherwise."""
        c: dict[Mono, int] = {}
        r: dict[Mono, int] = {}
        for mono, k in self.terms:
            n = mono.count(atom)
            if n > 1:
                return None
            if n:
                at = mono.index(atom)
                c[mono[:at] + mono[at + 1 :]] = k
            else:
                r[mono] = k
        return Poly(c), Poly(r)

    def content(self) -> int:
        """The greatest common divisor of all coefficients but the constant one."""
        return math.gcd(*(c for m, c in self.terms if m))


class BConst(Expr):
    __slots__ = ("value",)

    def __init__(self, value: bool) -> None:
        self.value = value
        self._seal("true" if value else "false")


class Ge(Expr):
    """p >= 0"""

    __slots__ = ("p",)

    def __init__(self, p: Poly) -> None:
        self.p = p
        self._seal(f"{{{p.key}>=0}}")


class Eq(Expr):
    """p == 0"""

    __slots__ = ("p",)

    def __init__(self, p: Poly) -> None:
        self.p = p
        self._seal(f"{{{p.key}==0}}")


class Not(Expr):
    """The negation of Eq, Load or Fn; everything else negates into its own form."""

    __slots__ = ("a",)

    def __init__(self, a: Bool) -> None:
        self.a = a
        self._seal(f"!{a.key}")


class And(Expr):
    __slots__ = ("args",)

    def __init__(self, args: Iterable[Bool]) -> None:
        self.args = tuple(sorted(args, key=lambda a: a.key))
        self._seal(f"({'&'.join(a.key for a in self.args)})")


class Or(Expr):
    __slots__ = ("args",)

    def __init__(self, args: Iterable[Bool]) -> None:
        self.args = tuple(sorted(args, key=lambda a: a.key))
        self._seal(f"({'|'.join(a.key for a in self.args)})")


class Const(Expr):
    """A float, exactly. The two zeros are different keys, NaN equals itself."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = float(value)
        self._seal(f"f{self.value!r}")


class Int(Expr):
    """An integer that the float dtype it was cast to holds exactly."""

    __slots__ = ("p",)

    def __init__(self, p: Poly) -> None:
        self.p = p
        self._seal(f"float({p.key})")


class If(Expr):
    """`a` where `cond` holds, `b` elsewhere."""

    __slots__ = ("a", "b", "cond")

    def __init__(self, cond: Bool, a: Tree, b: Tree) -> None:
        self.cond = cond
        self.a = a
        self.b = b
        self._seal(f"if({cond.key},{a.key},{b.key})")


Bool = BConst | Ge | Eq | Not | And | Or | Load | Fn
Leaf = Poly | Const | Int | Load | Fn
Tree = Leaf | If
Value = Bool | Tree

TRUE, FALSE = BConst(True), BConst(False)


def poly(value: int) -> Poly:
    return Poly({(): value})


def of(atom: Atom) -> Poly:
    """The polynomial that is this atom."""
    return Poly({(atom,): 1})


def as_poly(value: Poly | int) -> Poly:
    return value if isinstance(value, Poly) else poly(value)


def _may_merge(mod: Mod, present: set[str]) -> bool:
    """Its quotient, or everything its numerator is made of, is there too."""
    if f"({mod.p.key})//({mod.q.key})" in present:
        return True
    return bool(mod.p.terms) and all(atom.key in present for mono, _ in mod.p.terms for atom in mono)


def _merge_quotients(terms: dict[Mono, int]) -> dict[Mono, int]:
    """q * (p // q) + p % q is p, and p - p % q is q * (p // q): indices that are split and merged leave this behind."""
    mods = [(mono, mod) for mono in terms for mod in mono if isinstance(mod, Mod)]
    present = {atom.key for mono in terms for atom in mono} if mods else set()
    for mono, mod in mods:
        if not _may_merge(mod, present):
            continue
        at = mono.index(mod)
        factor = Poly({mono[:at] + mono[at + 1 :]: terms[mono]})
        quotient = factor * mod.q * of(Div(mod.p, mod.q))
        whole = factor * mod.p
        for found, instead in ((quotient, whole), (-whole, -quotient)):
            if found.terms and all(terms.get(m) == c for m, c in found.terms):
                taken = {mono, *(m for m, _ in found.terms)}
                left = Poly({m: c for m, c in terms.items() if m not in taken})
                return dict((left + instead).terms)
    return terms


ZERO, ONE = Poly({}), Poly({(): 1})


def children(e: Expr) -> tuple[Expr, ...]:
    """The expressions directly inside this one."""
    if isinstance(e, Poly):
        return tuple(e.atoms())
    if isinstance(e, Div | Mod):
        return (e.p, e.q)
    if isinstance(e, Load):
        return e.at
    if isinstance(e, Fn | And | Or):
        return e.args
    if isinstance(e, Ge | Eq | Int):
        return (e.p,)
    if isinstance(e, Not):
        return (e.a,)
    if isinstance(e, If):
        return (e.cond, e.a, e.b)
    return ()


def walk(e: Expr) -> set[Expr]:
    """Everything inside an expression, itself included (the sizes of variables are not inside)."""
    seen: set[Expr] = set()
    work = [e]
    while work:
        node = work.pop()
        if node not in seen:
            seen.add(node)
            work.extend(children(node))
    return seen


def variables(e: Expr) -> frozenset[str]:
    """The names of the indices that an expression depends on."""
    return frozenset(a.name for a in walk(e) if isinstance(a, Var))


def loads(e: Expr) -> tuple[Load, ...]:
    """The opaque loads in an expression, in a fixed order."""
    return tuple(sorted((a for a in walk(e) if isinstance(a, Load)), key=lambda a: a.key))
