"""Rules of comparisons, boolean algebra, choices and casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from attnpass.masks.division import floordiv
from attnpass.masks.expr import FALSE, TRUE, Bool, Const, Int, Leaf, Poly, Value
from attnpass.masks.lift import Call, Index, Unliftable, as_bool, as_tree, kind_of, rule, tensor_of
from attnpass.masks.lift_pointwise import operand, whole_quotient
from attnpass.masks.logic import both, either, ite, negate, spread
from attnpass.masks.numeric import Operand, arithmetic, cast, compare, literal
from attnpass.masks.ranges import is_one


def _to_bool(call: Call, arg: Any, index: Index) -> Bool:
    """Whether an element is nonzero."""
    x = operand(call, arg, index)
    if x.dtype is None:
        raise Unliftable("number")
    return as_bool(cast(call, x.value, x.dtype, torch.bool))


def _finish(call: Call, value: Bool) -> Value:
    """A truth value, as an element of a result of whatever dtype (in-place comparisons write numbers)."""
    return cast(call, value, torch.bool, call.dtype)


# --- comparisons and boolean algebra -----------------------------------------------------------------------------


def _as_number(call: Call, x: Operand) -> Operand:
    return Operand(cast(call, x.value, torch.bool, torch.int64), torch.int64, x.scalar) if x.dtype == torch.bool else x


@rule("lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater", "greater_equal", "not_equal")
def _compare(call: Call, index: Index) -> Value:
    op = {
        "less": "lt",
        "less_equal": "le",
        "greater": "gt",
        "greater_equal": "ge",
        "not_equal": "ne",
    }.get(call.name, call.name)
    left, right = operand(call, call.args["self"], index), operand(call, call.args["other"], index)
    if left.dtype is None or right.dtype is None or left.dtype != torch.bool or right.dtype != torch.bool:
        left, right = _as_number(call, left), _as_number(call, right)
        return _finish(call, compare(call, op, left, right))
    a, b = as_bool(left.value), as_bool(right.value)
    if op in ("eq", "ne"):
        differ = either(both(a, negate(b)), both(negate(a), b))
        return _finish(call, differ if op == "ne" else negate(differ))
    if op in ("gt", "ge"):
        a, b = b, a
    return _finish(call, both(negate(a), b) if op in ("lt", "gt") else either(negate(a), b))


@rule("logical_and", "logical_or", "logical_xor", "__and__", "__or__", "__xor__",
      "bitwise_and", "bitwise_or", "bitwise_xor")  # fmt: skip
def _logical(call: Call, index: Index) -> Value:
    bitwise = not call.name.startswith("logical")
    args = [call.args["self"], call.args["other"]]
    if bitwise and call.dtype != torch.bool:
        return _bits(call, args, index)
    a, b = (_to_bool(call, arg, index) if isinstance(arg, Node) else (TRUE if arg else FALSE) for arg in args)
    if "and" in call.name:
        out = both(a, b)
    elif "xor" in call.name:
        out = either(both(a, negate(b)), both(negate(a), b))
    else:
        out = either(a, b)
    return _finish(call, out)


def _bits(call: Call, args: list[Any], index: Index) -> Value:
    """Bitwise operations on integers: known where both are numbers, as in sums of truth values."""

    def leaf(x: Leaf, y: Leaf) -> Value:
        if isinstance(x, Poly) and isinstance(y, Poly) and x.value is not None and y.value is not None:
            a, b = x.value, y.value
            out = a & b if "and" in call.name else a ^ b if "xor" in call.name else a | b
            return Poly({(): out})
        raise Unliftable("bits")

    trees = []
    for arg in args:
        x = operand(call, arg, index)
        trees.append(as_tree(x.value if x.dtype is None else cast(call, x.value, x.dtype, call.dtype)))
    return spread(leaf, *trees)


@rule("__rshift__", "__lshift__", "bitwise_right_shift", "bitwise_left_shift")
def _shift(call: Call, index: Index) -> Value:
    by = call.args["other"]
    if not isinstance(by, int) or not 0 <= by < 32 or kind_of(call.dtype) != "int":
        raise Unliftable("shift")
    value, factor = operand(call, call.args["self"], index), Operand(Poly({(): 1 << by}), None)
    if "l" in call.name.strip("_")[:1] or "left" in call.name:
        return arithmetic(call, "mul", value, factor, call.dtype)
    return whole_quotient(call, value, factor, floordiv)


@rule("logical_not", "bitwise_not")
def _not(call: Call, index: Index) -> Value:
    if call.name == "bitwise_not" and call.dtype != torch.bool:
        value = operand(call, call.args["self"], index)
        minus = arithmetic(call, "sub", Operand(Poly({}), None), value, call.dtype)
        return arithmetic(call, "sub", Operand(minus, call.dtype), Operand(Poly({(): 1}), None), call.dtype)
    return _finish(call, negate(_to_bool(call, call.args["self"], index)))


@rule("isinf", "isneginf", "isnan", "isposinf", "isfinite")
def _special(call: Call, index: Index) -> Value:
    tests: dict[str, Callable[[float], bool]] = {
        "isinf": lambda v: v in (float("inf"), float("-inf")),
        "isneginf": lambda v: v == float("-inf"),
        "isposinf": lambda v: v == float("inf"),
        "isnan": lambda v: v != v,
        "isfinite": lambda v: v - v == 0,
    }

    def leaf(x: Leaf) -> Bool:
        if isinstance(x, Const):
            return TRUE if tests[call.name](x.value) else FALSE
        if isinstance(x, Int | Poly):
            return TRUE if call.name == "isfinite" else FALSE
        raise Unliftable(call.name)

    return as_bool(spread(leaf, as_tree(operand(call, call.args["self"], index).value)))


# --- choices -----------------------------------------------------------------------------------------------------


def _element(call: Call, arg: Any, index: Index) -> Value:
    """A tensor's element or a number, as an element of the result."""
    x = operand(call, arg, index)
    if x.dtype is not None:
        return cast(call, x.value, x.dtype, call.dtype)
    if isinstance(x.value, Const):
        return literal(x.value.value, call.dtype)
    assert isinstance(x.value, Poly)
    if x.value.value is not None:
        return literal(x.value.value, call.dtype)
    return cast(call, x.value, torch.int64, call.dtype)


@rule("where")
def _where(call: Call, index: Index) -> Value:
    if "self" not in call.args:
        raise Unliftable("nonzero")
    cond = _to_bool(call, call.args["condition"], index)
    # a branch that is never taken need not be understood
    if cond == TRUE:
        return _element(call, call.args["self"], index)
    if cond == FALSE:
        return _element(call, call.args["other"], index)
    return ite(cond, _element(call, call.args["self"], index), _element(call, call.args["other"], index))


@rule("masked_fill")
def _masked_fill(call: Call, index: Index) -> Value:
    mask = _to_bool(call, call.args["mask"], index)
    new = _element(call, call.args["value"], index)
    return new if mask == TRUE else ite(mask, new, _element(call, call.args["self"], index))


@rule("index_put")
def _index_put(call: Call, index: Index) -> Value:
    """``x[mask] = number``; positions that are computed are left alone."""
    indices = call.args["indices"]
    values = call.args["values"]
    if call.args.get("accumulate") or len(indices) != 1 or not isinstance(indices[0], Node):
        raise Unliftable("index_put")
    mask = tensor_of(indices[0])
    if mask.dtype != torch.bool or not all(is_one(size) for size in call.shape_of(values)):
        raise Unliftable("index_put")
    rank = mask.dim()
    if call.shape_of(indices[0]) != call.shape[:rank]:
        raise Unliftable("index_put")
    on = as_bool(call.read(indices[0], index[:rank]))
    zeros = tuple(Poly({}) for _ in range(tensor_of(values).dim()))
    new = cast(call, call.read(values, zeros), tensor_of(values).dtype, call.dtype)
    return ite(on, new, _element(call, call.args["self"], index))


@rule("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy",
      "lift", "_conj", "positive")  # fmt: skip
def _cast(call: Call, index: Index) -> Value:
    source = call.args.get("self")
    if not isinstance(source, Node):
        raise Unliftable("cast")
    if call.name.startswith("lift_fresh") and source.op == "get_attr":
        return _lifted(call, source, index)
    return cast(call, call.read(source, index), tensor_of(source).dtype, call.dtype)


def _lifted(call: Call, source: Node, index: Index) -> Value:
    """``torch.tensor(3.0)`` in the program: a constant that nothing else can reach."""
    module = call.node.graph.owning_module
    value = getattr(module, str(source.target), None) if module is not None else None
    if not isinstance(value, torch.Tensor):
        return call.read(source, index)
    return call.lifter.constant(value, index)


@rule("copy")
def _copy(call: Call, index: Index) -> Value:
    return _element(call, call.args["src"], index)


@rule("fill", "zero")
def _fill(call: Call, index: Index) -> Value:
    return literal(0, call.dtype) if call.name == "zero" else _element(call, call.args["value"], index)
