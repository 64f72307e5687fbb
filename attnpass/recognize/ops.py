"""Reading one ATen node: its operation's name, its arguments by name, and the numbers among them.

In-place forms read like their functional twins (``masked_fill_`` -> ``masked_fill``): what they write is the business
of :mod:`attnpass.recognize.purity`. ``out=`` forms have no name here, so no rule can match them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from attnpass.graph import tensor, value

# Other names of the same operations; they reach ATen graphs under the name that was called.
_ALIASES = {
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "linalg_matmul": "matmul",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_log_softmax": "log_softmax",
    "special_logsumexp": "logsumexp",
    "special_softmax": "softmax",
    "subtract": "sub",
    "true_divide": "div",
}


@cache
def _name(target: Any) -> str:
    if not isinstance(target, torch._ops.OpOverload):
        return f"python:{getattr(target, '__name__', target)}"
    namespace, name = target._schema.name.split("::")
    arguments = target._schema.arguments
    if any(a.is_out for a in arguments):
        return f"{namespace}::{name}.out"
    first = arguments[0].alias_info if arguments else None
    if name.endswith("_") and not name.endswith("__") and first is not None and first.is_write:
        name = name[:-1]
    name = _ALIASES.get(name, name)
    return name if namespace == "aten" else f"{namespace}::{name}"


def op_name(node: Node) -> str:
    """``"masked_fill"`` for any overload of the ATen operation, in place or not; other nodes' names have a colon."""
    return _name(node.target) if node.op == "call_function" else f"{node.op}:"


def bound(node: Node) -> dict[str, Any]:
    """All arguments by their schema's names, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    out: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args) and not argument.kwarg_only:
            out[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            out[argument.name] = node.kwargs[argument.name]
        else:
            out[argument.name] = argument.default_value if argument.has_default_value() else None
    return out


def pair(node: Node) -> tuple[Any, Any]:
    """The two operands of a binary operation."""
    args = bound(node)
    names = list(args)
    return args[names[0]], args[names[1]]


def describe(node: Node) -> str:
    """The operation in words, for reasons."""
    if node.op == "placeholder":
        return f"the input {node.target}"
    if node.op == "get_attr":
        return f"the tensor {node.target}"
    if node.op == "output":
        return "the output"
    name = op_name(node)
    return name.removeprefix("python:")


def number_in(value_: Any, dtype: torch.dtype) -> float:
    """A Python number as the given dtype holds it: finfo(float32).min is -inf in bfloat16."""
    return float(torch.tensor(float(value_), dtype=torch.float64).to(dtype).item())


_FILLED = {"full": "fill_value", "full_like": "fill_value", "new_full": "fill_value", "scalar_tensor": "s"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_ONES = {"ones", "ones_like", "new_ones"}
_SAME_NUMBER = {
    "alias",
    "clone",
    "contiguous",
    "detach",
    "expand",
    "expand_as",
    "lift_fresh",
    "lift_fresh_copy",
    "permute",
    "reshape",
    "squeeze",
    "to",
    "_to_copy",
    "transpose",
    "type_as",
    "unsqueeze",
    "view",
}
_ARITHMETIC = {
    "neg": lambda a: -a,
    "sqrt": lambda a: a**0.5,
    "rsqrt": lambda a: a**-0.5,
    "reciprocal": lambda a: 1 / a,
}


def number(arg: Any, written: Callable[[Node], bool], depth: int = 0) -> float | None:
    """The number that an argument certainly is: a literal, or a tensor filled with one constant by this very graph.

    Parameters, buffers and inputs are data, not numbers, whatever they hold now; so is a tensor that `written` says
    something writes into.
    """
    if isinstance(arg, bool | int | float):
        return float(arg)
    if not isinstance(arg, Node) or depth > 8 or written(arg):
        return None
    constant = arg.meta.get("attnpass_constant")  # a scalar literal that capture found lifted out of the code
    if constant is not None:
        return float(constant)
    val = tensor(arg)
    if val is None or not isinstance(arg.target, torch._ops.OpOverload):
        return None
    name = op_name(arg)
    found: float | None = None
    if name in _FILLED:
        found = number(bound(arg)[_FILLED[name]], written, depth + 1)
    elif name in _ZEROS:
        found = 0.0
    elif name in _ONES:
        found = 1.0
    elif name in _SAME_NUMBER:
        found = number(arg.args[0], written, depth + 1)
    elif name in _ARITHMETIC:
        inner = number(arg.args[0], written, depth + 1)
        if inner is not None and (inner > 0 or name == "neg"):
            found = _ARITHMETIC[name](inner)
    return None if found is None or val.is_complex() else number_in(found, val.dtype)


def is_scalar_node(arg: Any) -> bool:
    """A symbolic number (SymInt, SymFloat) or an opaque Python number computed in the graph."""
    return isinstance(arg, Node) and isinstance(value(arg), int | float | torch.SymInt | torch.SymFloat)
