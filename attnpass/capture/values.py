"""Values as Dynamo notes them on its nodes: trees of tensors and of plain or symbolic numbers; keys to compare them.

Two tensors are the same to us when their shapes, strides, dtypes and devices are; a symbolic size is its expression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

Number = torch.SymInt | torch.SymFloat | torch.SymBool


def shape_env(graph: Graph) -> ShapeEnv | None:
    """Where the symbolic sizes of this graph live."""
    for node in graph.nodes:
        held = node.meta.get("example_value")
        if isinstance(held, FakeTensor) and held.fake_mode.shape_env is not None:
            return held.fake_mode.shape_env
        if isinstance(held, Number) and isinstance(held.node.shape_env, ShapeEnv):
            return held.node.shape_env
    return None


def settled(number: Any) -> Any:
    """A symbolic number whose value the guards have settled is that value."""
    if not isinstance(number, Number):
        return number
    # each asked for what it is: as an integer, a settled 0.25 would be 0
    symbolic = number.node
    if isinstance(number, torch.SymInt):
        value = symbolic.maybe_as_int()
    else:
        value = symbolic.maybe_as_float() if isinstance(number, torch.SymFloat) else symbolic.maybe_as_bool()
    return number if value is None else value


def operands(tree: Any, shadow: Any = None) -> Iterator[Any]:
    """The tensors and symbolic numbers of a tree of values, or what stands in their places in a tree like it."""
    if isinstance(tree, tuple):
        for i, item in enumerate(tree):
            yield from operands(item, None if shadow is None else shadow[i])
    elif isinstance(tree, torch.Tensor | Number):
        yield tree if shadow is None else shadow


def filled(tree: Any, operands: Iterator[Any]) -> Any:
    """The tree with its operands replaced, in the order of `operands`."""
    if isinstance(tree, tuple):
        return tuple(filled(item, operands) for item in tree)
    return next(operands) if isinstance(tree, torch.Tensor | Number) else tree


def mapped(tree: Any, one: Callable[[Any], Any]) -> Any:
    """The tree with `one` applied to each leaf."""
    return tuple(mapped(item, one) for item in tree) if isinstance(tree, tuple | list) else one(tree)


def holds_tensor(tree: Any) -> bool:
    """There is a tensor among the leaves."""
    return any(isinstance(leaf, torch.Tensor) for leaf in operands(tree))


def number_key(value: Any) -> Any:
    """1, 1.0, True and a symbolic size are four things."""
    value = settled(value)
    if isinstance(value, Number):
        return type(value).__name__, str(value.node.expr)
    return value if type(value) is int else (type(value).__name__, repr(value))


def signature(tree: Any) -> Any:
    """What distinguishes one value from another."""
    if isinstance(tree, torch.Tensor):
        sizes = tuple(map(number_key, tree.shape)), tuple(map(number_key, tree.stride()))
        return (*sizes, tree.dtype, tree.device)
    return tuple(map(signature, tree)) if isinstance(tree, tuple) else number_key(tree)


def frozen(arg: Any, index: dict[Node, int]) -> Any:
    """An argument tree that compares as the call would see it: 1, 1.0 and True are three things."""
    if isinstance(arg, Node):
        return "operand", index[arg]
    if isinstance(arg, tuple | list):
        return (type(arg).__name__, *(frozen(item, index) for item in arg))
    if isinstance(arg, dict):
        return ("dict", *((key, frozen(item, index)) for key, item in arg.items()))
    if isinstance(arg, slice):
        return ("slice", *(frozen(item, index) for item in (arg.start, arg.stop, arg.step)))
    if arg is None or isinstance(arg, bool | int | float | complex | str):
        return type(arg).__name__, repr(arg)
    if isinstance(arg, torch.dtype | torch.device | torch.memory_format | torch.layout) or arg is Ellipsis:
        return "plain", arg
    return "object", id(arg)  # alive as long as the graph is


def agrees(result: Any, value: Any) -> bool:
    """What the template yields is what Dynamo has seen this call yield."""
    if isinstance(value, tuple):
        same_length = isinstance(result, tuple | list) and len(result) == len(value)
        return same_length and all(map(agrees, result, value))
    made = result.meta.get("val") if isinstance(result, Node) else result
    if not isinstance(value, torch.Tensor):
        return value is None or number_key(made) == number_key(value)
    if not isinstance(made, torch.Tensor) or made.dtype != value.dtype or made.device != value.device:
        return False
    return tuple(map(number_key, made.shape)) == tuple(map(number_key, value.shape))
