"""Arithmetic on lifted values with the exact semantics of the tensors' dtypes.

Integers are computed as integers where nothing can wrap around, floats that hold integers exactly are kept as integers,
constants are folded by running the very operation on them, and everything else stays a named operation (Fn) in the
dtype that torch computes it in. Sizes without a bound are taken to be small enough for int32 and float32 indices; the
proof says so wherever it relied on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnpass.masks.division import floordiv
from attnpass.masks.expr import (
    FALSE,
    TRUE,
    Atom,
    Bool,
    Const,
    Div,
    Fn,
    Int,
    Leaf,
    Load,
    Mod,
    Poly,
    Sym,
    Tree,
    Value,
    Var,
    of,
    poly,
    walk,
)
from attnpass.masks.lift import Call, Unliftable, as_bool, as_tree, kind_of
from attnpass.masks.logic import any_leaf, eq, ge, ite, negate, spread
from attnpass.masks.ranges import integer_bounds
from attnpass.masks.substitute import poly_substitute

_EXACT = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}
# What sizes without a bound are taken to be, so that positions made of them stay exact. In int64 that is no assumption:
# scores of so many queries cannot be held.
_SIZES_BELOW = {torch.float32: 2**20, torch.int32: 2**24, torch.float64: 2**31, torch.int64: 2**31}
_MANTISSA = {torch.float16: (11, 5), torch.bfloat16: (8, 8), torch.float32: (24, 8), torch.float64: (53, 11)}


@dataclass(frozen=True)
class Operand:
    """A value and the dtype of the tensor it is an element of; None for a Python number."""

    value: Value
    dtype: torch.dtype | None
    scalar: bool = False  # of a tensor without dimensions, which yields to the other operand's dtype


def literal(number: float, dtype: torch.dtype) -> Value:
    """A Python number as an element of a tensor of this dtype."""
    kind = kind_of(dtype)
    if kind == "bool":
        return TRUE if number else FALSE
    if kind == "int":
        return poly(int(number))
    return Const(_rounded(float(number), dtype))


def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=torch.float64).to(dtype).item())


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- ranges ------------------------------------------------------------------------------------------------------


def _only_indices(p: Poly) -> bool:
    """Made of indices and sizes alone, so as small as tensors are."""
    for atom in p.atoms():
        if isinstance(atom, Load | Fn):
            return False
        if isinstance(atom, Div | Mod) and not (_only_indices(atom.p) and _only_indices(atom.q)):
            return False
        if isinstance(atom, Sym) and atom.low is None:
            return False
    return True


def _within(call: Call, p: Poly, bound: int, dtype: torch.dtype) -> bool:
    """|p| <= bound, proved; or assumed, where only sizes without a bound stand against it."""
    lo, hi = integer_bounds(p)
    if lo is not None and hi is not None:
        return -bound <= lo and hi <= bound
    limit = _SIZES_BELOW.get(dtype)
    if limit is None or not _only_indices(p):
        return False
    lo, hi = integer_bounds(_with_sizes_below(p, limit))
    if lo is None or hi is None or lo < -bound or hi > bound:
        return False
    if dtype != torch.int64:
        call.assume(f"sizes stay below 2**{limit.bit_length() - 1}: positions are computed in {name(dtype)}")
    return True


def _with_sizes_below(p: Poly, limit: int) -> Poly:
    """The same with an upper bound for every size that has none."""
    by: dict[Atom, Poly] = {}
    for atom in walk(p):
        if isinstance(atom, Sym) and atom.high is None:
            by[atom] = of(Sym(atom.name, atom.low, limit))
        elif isinstance(atom, Var):
            by[atom] = of(Var(atom.name, _with_sizes_below(atom.size, limit)))
    return poly_substitute(p, by)


def fits(call: Call, p: Poly, dtype: torch.dtype) -> bool:
    """This integer is held by this integer dtype without wrapping around."""
    if dtype == torch.uint8:
        lo, hi = integer_bounds(p)
        return lo is not None and hi is not None and lo >= 0 and hi <= 255
    return _within(call, p, torch.iinfo(dtype).max, dtype)


# --- casts -------------------------------------------------------------------------------------------------------


def cast(call: Call, value: Value, src: torch.dtype, dst: torch.dtype) -> Value:
    """`tensor.to(dst)`"""
    if src == dst:
        return value
    a, b = kind_of(src), kind_of(dst)
    if a == "bool":
        if b == "bool":
            return value
        return ite(as_bool(value), literal(1, dst), literal(0, dst))
    tree = as_tree(value)
    if b == "bool":
        return any_leaf(tree, nonzero)
    if a == "int":
        if b == "real":
            return spread(lambda leaf: _int_to_real(call, leaf, dst), tree)
        return spread(lambda leaf: _int_to_int(call, leaf, dst), tree)
    if b == "real":
        return spread(lambda leaf: _real_to_real(call, leaf, src, dst), tree)
    return spread(lambda leaf: _real_to_int(call, leaf, dst), tree)


def nonzero(leaf: Leaf) -> Bool:
    if isinstance(leaf, Poly):
        return negate(eq(leaf))
    if isinstance(leaf, Int):
        return negate(eq(leaf.p))
    if isinstance(leaf, Const):
        return FALSE if leaf.value == 0 else TRUE
    return negate(Fn("eq", (leaf, Const(0.0)), "bool", "bool"))


def _int_to_real(call: Call, leaf: Leaf, dst: torch.dtype) -> Leaf:
    assert isinstance(leaf, Poly)
    if leaf.value is not None:
        return Const(float(torch.tensor(leaf.value).to(dst).item()))
    if _within(call, leaf, _EXACT[dst], dst):
        return Int(leaf)
    return Fn("to", (leaf,), "real", name(dst))


def _int_to_int(call: Call, leaf: Leaf, dst: torch.dtype) -> Leaf:
    assert isinstance(leaf, Poly)
    if not fits(call, leaf, dst):
        raise Unliftable("may wrap around")
    return leaf


def _real_to_real(call: Call, leaf: Leaf, src: torch.dtype, dst: torch.dtype) -> Leaf:
    if isinstance(leaf, Const):
        return Const(_rounded(leaf.value, dst))
    widens = all(x <= y for x, y in zip(_MANTISSA[src], _MANTISSA[dst], strict=True))
    if widens or (isinstance(leaf, Int) and _within(call, leaf.p, _EXACT[dst], dst)):
        return leaf
    return Fn("to", (leaf,), "real", name(dst))


def _real_to_int(call: Call, leaf: Leaf, dst: torch.dtype) -> Leaf:
    if isinstance(leaf, Const):
        if not math.isfinite(leaf.value) or abs(leaf.value) >= 2**53:
            raise Unliftable("not an integer")
        return _int_to_int(call, poly(int(leaf.value)), dst)
    if isinstance(leaf, Int):
        return _int_to_int(call, leaf.p, dst)
    scaled = _power_of_two_quotient(leaf)
    if scaled is not None and integer_bounds(scaled[0])[0] is not None and ge(scaled[0]) == TRUE:
        return _int_to_int(call, floordiv(*scaled), dst)
    return of(Fn("to", (leaf,), "int", name(dst)))


def _power_of_two_quotient(leaf: Leaf) -> tuple[Poly, Poly] | None:
    """(p, c) of p / c, which is exact in floating point when c is a power of two."""
    if isinstance(leaf, Fn) and leaf.name == "div":
        a, b = leaf.args
        if isinstance(a, Int) and isinstance(b, Const) and b.value >= 1 and math.frexp(b.value)[0] == 0.5:
            return a.p, poly(int(b.value))
    return None


def floor(leaf: Leaf) -> Leaf | None:
    """floor of a float, where it is known exactly."""
    if isinstance(leaf, Int):
        return leaf
    if isinstance(leaf, Const):
        return Const(math.floor(leaf.value)) if math.isfinite(leaf.value) else leaf
    scaled = _power_of_two_quotient(leaf)
    return None if scaled is None else Int(floordiv(*scaled))


# --- arithmetic --------------------------------------------------------------------------------------------------

_OPS: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
}


def arithmetic(call: Call, op: str, left: Operand, right: Operand, dtype: torch.dtype) -> Value:
    """left op right, computed in and yielding `dtype`."""
    computed = _common(left, right)
    if op == "div" and kind_of(computed) != "real":
        computed = torch.float32
    if kind_of(dtype) == "bool" or computed != dtype:
        raise Unliftable("dtypes")  # an in-place operation or autocast computes in another dtype than it yields
    a, b = (as_operand(call, x, dtype) for x in (left, right))
    if kind_of(dtype) == "int":
        return spread(lambda x, y: _integers(call, op, x, y, dtype), a, b)

    def leaf(x: Leaf, y: Leaf) -> Value:
        return _reals(call, op, x, y, left.dtype, right.dtype, dtype)

    return spread(leaf, a, b)


def as_operand(call: Call, x: Operand, dtype: torch.dtype) -> Tree:
    """An operand as an operation in `dtype` sees it."""
    if x.dtype is None:
        # a Python number keeps its precision: the operation itself rounds it
        if kind_of(dtype) == "real" and isinstance(x.value, Poly) and x.value.value is not None:
            return Const(float(x.value.value))
        if kind_of(dtype) == "real" and isinstance(x.value, Poly):
            return as_tree(cast(call, x.value, torch.int64, dtype))
        return as_tree(x.value)
    tree = as_tree(cast(call, x.value, x.dtype, dtype))
    if x.scalar and kind_of(x.dtype) == "real" and tree != x.value:
        raise Unliftable("a scalar tensor that is rounded")  # devices differ in when they round it
    return tree


def _integers(call: Call, op: str, x: Leaf, y: Leaf, dtype: torch.dtype) -> Value:
    assert isinstance(x, Poly)
    assert isinstance(y, Poly)
    if op == "minimum":
        return ite(ge(y - x), x, y)
    if op == "maximum":
        return ite(ge(x - y), x, y)
    if op not in ("add", "sub", "mul"):
        raise Unliftable(op)
    out = x + y if op == "add" else x - y if op == "sub" else x * y
    if fits(call, out, dtype):
        return out
    return of(Fn(op, (x, y), "int", name(dtype)))


def _reals(
    call: Call, op: str, x: Leaf, y: Leaf, x_dtype: torch.dtype | None, y_dtype: torch.dtype | None, dtype: torch.dtype
) -> Leaf:
    if isinstance(x, Const) and isinstance(y, Const):
        return Const(_fold(op, x.value, y.value, x_dtype, y_dtype, dtype))
    p, q = _whole(x), _whole(y)
    if p is not None and q is not None and op in ("add", "sub", "mul"):
        out = p + q if op == "add" else p - q if op == "sub" else p * q
        if _within(call, out, _EXACT[dtype], dtype):
            return Const(out.value) if out.value is not None else Int(out)
    if op in ("add", "sub") and isinstance(y, Const) and y.value == 0:
        return x
    if op == "add" and isinstance(x, Const) and x.value == 0:
        return y
    if op in ("mul", "div") and isinstance(y, Const) and y.value == 1:
        return x
    if op == "mul" and isinstance(x, Const) and x.value == 1:
        return y
    if op in ("add", "mul") and isinstance(x, Const):
        x, y = y, x  # constants last, so that one value has one spelling
    elif op == "sub" and isinstance(x, Const):
        return Fn("rsub", (y, x), "real", name(dtype))
    return Fn(op, (x, y), "real", name(dtype))


def _whole(leaf: Leaf) -> Poly | None:
    if isinstance(leaf, Int):
        return leaf.p
    if isinstance(leaf, Const) and abs(leaf.value) < 2**53 and leaf.value == int(leaf.value):
        return poly(int(leaf.value))
    return None


def _fold(
    op: str, x: float, y: float, x_dtype: torch.dtype | None, y_dtype: torch.dtype | None, dtype: torch.dtype
) -> float:
    """Run the operation itself on one element, as the program does."""
    left = torch.tensor([x], dtype=torch.float64).to(dtype)
    right: torch.Tensor | float = y
    if x_dtype is None:
        left = torch.tensor([x], dtype=torch.float64).to(torch.float32 if dtype != torch.float64 else dtype)
    if y_dtype is not None or op in ("minimum", "maximum"):
        right = torch.tensor([y], dtype=torch.float64).to(left.dtype if x_dtype is None else dtype)
    return float(_OPS[op](left, right).to(dtype).item())


# --- comparisons -------------------------------------------------------------------------------------------------


def compare(call: Call, op: str, left: Operand, right: Operand) -> Bool:
    """lt, le, eq and their mirror images; integers exactly, floats where they are integers or constants."""
    if op in ("gt", "ge"):
        op, left, right = {"gt": "lt", "ge": "le"}[op], right, left
    if op == "ne":
        return negate(compare(call, "eq", left, right))
    dtype = _common(left, right)
    if kind_of(dtype) == "bool":
        raise Unliftable("boolean comparison")
    a, b = (as_operand(call, x, dtype) for x in (left, right))
    return as_bool(spread(lambda x, y: _compare(op, x, y, dtype), a, b))


def _common(left: Operand, right: Operand) -> torch.dtype:
    """The dtype that two operands are compared in."""
    samples: list[torch.Tensor | float] = []
    for x in (left, right):
        if x.dtype is None:
            samples.append(1 if isinstance(x.value, Poly) else 1.0)
        else:
            samples.append(torch.empty([] if x.scalar else [1], dtype=x.dtype))
    if not any(isinstance(s, torch.Tensor) for s in samples):
        raise Unliftable("numbers")
    return torch.result_type(samples[0], samples[1])


def _compare(op: str, x: Leaf, y: Leaf, dtype: torch.dtype) -> Bool:
    if isinstance(x, Poly) and isinstance(y, Poly):
        return eq(y - x) if op == "eq" else ge(y - x) if op == "le" else ge(y - x - 1)
    if isinstance(x, Const) and isinstance(y, Const):
        if _holds(op, x.value, y.value) != _holds(op, _rounded(x.value, dtype), _rounded(y.value, dtype)):
            raise Unliftable("a number that is rounded")  # devices differ in whether they round it
        return TRUE if _holds(op, x.value, y.value) else FALSE
    x, y = (Const(_rounded(z.value, dtype)) if isinstance(z, Const) else z for z in (x, y))
    if isinstance(x, Int) and isinstance(y, Int):
        return _compare(op, x.p, y.p, dtype)
    if isinstance(x, Int) and isinstance(y, Const):
        return _against(op, x.p, y.value)
    if isinstance(x, Const) and isinstance(y, Int):
        if op == "eq":
            return _against(op, y.p, x.value)
        # c <= p is not p < c, c < p is not p <= c; NaN compares false with everything
        if math.isnan(x.value):
            return FALSE
        return negate(_against("lt" if op == "le" else "le", y.p, x.value))
    if op == "eq" and y.key < x.key:
        x, y = y, x
    return Fn(op, (x, y), "bool", "bool")


def _holds(op: str, x: float, y: float) -> bool:
    return {"eq": x == y, "le": x <= y, "lt": x < y}[op]


def _against(op: str, p: Poly, c: float) -> Bool:
    """p op c, for an integer and any float."""
    if math.isnan(c):
        return FALSE
    if math.isinf(c):
        return TRUE if op != "eq" and c > 0 else FALSE
    if op == "eq":
        return eq(p - int(c)) if c == int(c) else FALSE
    most = math.floor(c) if op == "le" else math.ceil(c) - 1
    return ge(poly(most) - p)
