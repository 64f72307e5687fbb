"""Rules of pointwise arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from attnpass.masks.division import floordiv, mod
from attnpass.masks.expr import TRUE, Const, Fn, Int, Leaf, Poly, Value
from attnpass.masks.lift import Call, Index, Unliftable, as_bool, as_tree, kind_of, rule
from attnpass.masks.logic import both, either, eq, ge, ite, spread
from attnpass.masks.numeric import Operand, arithmetic, as_operand, cast, floor, literal, name
from attnpass.masks.ranges import positive

_UNARY = {"exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt}


def operand(call: Call, arg: Any, index: Index) -> Operand:
    """An argument that is a tensor or a Python number."""
    if isinstance(arg, Node):
        val = arg.meta.get("val")
        if isinstance(val, torch.Tensor):
            return Operand(call.broadcast(arg, index), val.dtype, val.dim() == 0)
        if isinstance(val, torch.SymInt):
            return Operand(call.integer(arg), None)
        raise Unliftable("scalar")
    if isinstance(arg, bool | int):
        return Operand(Poly({(): int(arg)}), None)
    if isinstance(arg, float):
        return Operand(Const(arg), None)
    raise Unliftable("argument")


def _kind(x: Operand) -> str:
    if x.dtype is None:
        return "int" if isinstance(x.value, Poly) else "real"
    return kind_of(x.dtype)


# --- arithmetic --------------------------------------------------------------------------------------------------


@rule("add", "sub", "rsub")
def _add(call: Call, index: Index) -> Value:
    left, right = operand(call, call.args["self"], index), operand(call, call.args["other"], index)
    alpha = call.args.get("alpha", 1)
    if call.name == "rsub":
        left, right = right, left
    if alpha != 1:
        if call.name == "rsub" or not isinstance(alpha, int) or kind_of(call.dtype) != "int" or right.dtype is None:
            raise Unliftable("alpha")
        scaled = arithmetic(call, "mul", right, Operand(Poly({(): alpha}), None), call.dtype)
        right = Operand(scaled, call.dtype)
    if call.dtype == torch.bool and call.name == "add":
        return either(as_bool(left.value), as_bool(right.value))
    return arithmetic(call, "add" if call.name == "add" else "sub", left, right, call.dtype)


@rule("mul")
def _mul(call: Call, index: Index) -> Value:
    left, right = operand(call, call.args["self"], index), operand(call, call.args["other"], index)
    if call.dtype == torch.bool:
        return both(as_bool(left.value), as_bool(right.value))
    return arithmetic(call, "mul", left, right, call.dtype)


@rule("div", "floor_divide")
def _div(call: Call, index: Index) -> Value:
    left, right = operand(call, call.args["self"], index), operand(call, call.args["other"], index)
    rounding = "floor" if call.name == "floor_divide" else call.args.get("rounding_mode")
    if rounding is None:
        return arithmetic(call, "div", left, right, call.dtype)
    return whole_quotient(call, left, right, lambda p, q: _quotient(p, q, rounding))


@rule("remainder", "fmod")
def _remainder(call: Call, index: Index) -> Value:
    left, right = operand(call, call.args["self"], index), operand(call, call.args["other"], index)

    def rest(p: Poly, q: Poly) -> Poly:
        if call.name == "fmod":
            _quotient(p, q, "trunc")  # where both are positive the two remainders agree
        return mod(p, q)

    return whole_quotient(call, left, right, rest)


def _quotient(p: Poly, q: Poly, rounding: str) -> Poly:
    if rounding == "trunc" and not (ge(p) == TRUE and positive(q)):
        raise Unliftable("signs of a truncating division")
    return floordiv(p, q)


def whole_quotient(call: Call, left: Operand, right: Operand, f: Callable[[Poly, Poly], Poly]) -> Value:
    """Floor division and remainder, of integers and of floats that hold integers."""

    def leaf(x: Leaf, y: Leaf) -> Value:
        if isinstance(x, Poly) and isinstance(y, Poly) and y.value != 0:
            return f(x, y)
        if isinstance(x, Int) and isinstance(y, Const) and y.value >= 1 and y.value == int(y.value):
            return Int(f(x.p, Poly({(): int(y.value)})))
        raise Unliftable("division")

    return spread(leaf, *(as_operand(call, x, call.dtype) for x in (left, right)))


@rule("neg")
def _neg(call: Call, index: Index) -> Value:
    def leaf(x: Leaf) -> Value:
        if isinstance(x, Const):
            return Const(-x.value)
        if isinstance(x, Int):
            return Int(-x.p)
        return Fn("neg", (x,), "real", name(call.dtype))

    value = operand(call, call.args["self"], index)
    if kind_of(call.dtype) == "int":
        return arithmetic(call, "sub", Operand(Poly({}), None), value, call.dtype)
    return spread(leaf, as_tree(value.value))


@rule("abs")
def _abs(call: Call, index: Index) -> Value:
    def leaf(x: Leaf) -> Value:
        if isinstance(x, Const):
            return Const(abs(x.value))
        if isinstance(x, Int):
            return ite(ge(x.p), Int(x.p), Int(-x.p))
        if isinstance(x, Poly):
            return ite(ge(x), x, -x)
        return Fn("abs", (x,), "real", name(call.dtype))

    return spread(leaf, as_tree(operand(call, call.args["self"], index).value))


@rule("minimum", "maximum", "clamp", "clamp_min", "clamp_max", "min", "max")
def _clamp(call: Call, index: Index) -> Value:
    if call.name in ("minimum", "maximum", "min", "max"):
        if "other" not in call.args:
            raise Unliftable("reduction")
        bounds = {"min" if call.name.startswith("max") else "max": call.args["other"]}
    else:
        bounds = {key: call.args[key] for key in ("min", "max") if call.args.get(key) is not None}
    value = operand(call, call.args["self"], index)
    for key, bound in bounds.items():
        other = operand(call, bound, index)
        op = "maximum" if key == "min" else "minimum"
        if call.dtype == torch.bool:
            join = either if key == "min" else both
            value = Operand(join(as_bool(value.value), as_bool(other.value)), call.dtype)
        else:
            value = Operand(arithmetic(call, op, value, other, call.dtype), call.dtype)
    return value.value


@rule("exp", "log", "sqrt")
def _unary(call: Call, index: Index) -> Value:
    source = operand(call, call.args["self"], index)

    def leaf(x: Leaf) -> Value:
        # constants are not folded here: libraries differ in the last place
        return Fn(call.name, (x,), "real", name(call.dtype))

    assert source.dtype is not None
    return spread(leaf, as_tree(cast(call, source.value, source.dtype, call.dtype)))


@rule("floor", "ceil", "trunc")
def _floor(call: Call, index: Index) -> Value:
    def leaf(x: Leaf) -> Value:
        known = floor(x) if call.name == "floor" or isinstance(x, Int) else None
        return Fn(call.name, (x,), "real", name(call.dtype)) if known is None else known

    value = operand(call, call.args["self"], index).value
    return value if kind_of(call.dtype) == "int" else spread(leaf, as_tree(value))


@rule("sign", "sgn")
def _sign(call: Call, index: Index) -> Value:
    def leaf(x: Leaf) -> Value:
        p = x.p if isinstance(x, Int) else x
        if not isinstance(p, Poly):
            raise Unliftable("sign")
        one, zero, minus = (literal(k, call.dtype) for k in (1, 0, -1))
        return ite(ge(p - 1), one, ite(eq(p), zero, minus))

    return spread(leaf, as_tree(operand(call, call.args["self"], index).value))
