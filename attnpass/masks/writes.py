"""In-place operations: what a tensor holds at a given time.

Nodes that may share memory form a group (from the operators' schemas; inputs may share memory with each other; an
operation without a schema may write and alias whatever it reads, unless its body provably writes nothing). Most groups
are never written, and then time does not matter. In a group that is written, a tensor is followed to the tensor that
owns the memory through operations that are certainly views; where that fails the caller keeps the reader opaque.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node

Link = Literal["owner", "same", "view", "unknown"]

VMAP = "torch._functorch.predispatch"  # how torch.export writes the borders of a vmap
_SAME = {"alias", "detach"}
_VIEWS = {
    "slice",
    "select",
    "narrow",
    "unsqueeze",
    "squeeze",
    "transpose",
    "swapaxes",
    "t",
    "permute",
    "expand",
    "expand_as",
    "view",
    "diagonal",
    "unbind",
    "split",
    "chunk",
    "split_with_sizes",
    "movedim",
}
# composite operations that may return their input itself although their schema does not say so
_MAY_RETURN_INPUT = {"dropout", "type_as", "pad", "nan_to_num", "einsum", "_unsafe_view"}


@cache
def name_of(target: Any) -> str:
    """The operation without its namespace and overload, in-place forms by their functional name."""
    if not isinstance(target, torch._ops.OpOverload):
        return f"python:{getattr(target, '__name__', target)}"
    namespace, name = target._schema.name.split("::")
    if namespace not in ("aten", "prims"):
        return f"{namespace}::{name}"
    if any(a.is_out for a in target._schema.arguments):
        return f"{name}.out"
    if writes_first(target):
        name = {"__iand__": "__and__", "__ior__": "__or__", "__ixor__": "__xor__"}.get(name, name.removesuffix("_"))
    return name


@cache
def writes_first(target: Any) -> bool:
    """Writes its first argument and nothing else."""
    written = _written(target)
    return written is not None and written == (0,)


@cache
def _written(target: Any) -> tuple[int, ...] | None:
    """The arguments written, by their place in the schema; None where there is no schema."""
    if target is operator.getitem or getattr(target, "__module__", "") in ("_operator", "math"):
        return ()
    if getattr(target, "__name__", "").startswith("sym_") or getattr(target, "__module__", "") == VMAP:
        return ()
    if not isinstance(target, torch._ops.OpOverload):
        return None
    arguments = target._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


@cache
def _shares(target: Any) -> bool:
    if target is operator.getitem or getattr(target, "__module__", "") == VMAP:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    aliases = any(r.alias_info is not None for r in target._schema.returns)
    return aliases or name_of(target) in _MAY_RETURN_INPUT


class Writes:
    """The writes of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.position = {node: at for at, node in enumerate(graph.nodes)}
        self._parent: dict[Node, Node] = {node: node for node in graph.nodes}
        self._module = graph.owning_module
        raw: list[tuple[Node, Node]] = []
        inputs: list[Node] = []
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                inputs.append(node)
            elif node.op != "output":
                self._scan(node, raw)
        external = {self._group(node) for node in inputs}
        if any(self._group(target) in external for _, target in raw):
            for node in inputs[1:]:
                self._join(inputs[0], node)
        self._entries: dict[Node, list[Node]] = defaultdict(list)
        for writer, target in raw:
            self._entries[self._group(target)].append(writer)

    def _scan(self, node: Node, raw: list[tuple[Node, Node]]) -> None:
        written = _written(node.target) if node.op == "call_function" else None
        if written is None:
            if self._harmless(node):
                return
            for arg in filter(_is_tensor, node.all_input_nodes):
                raw.append((node, arg))
                self._join(node, arg)
            return
        targets = [arg for i in written for arg in _nodes(_argument(node, i))]
        raw.extend((node, target) for target in targets)
        if targets or _shares(node.target):
            for arg in targets or node.all_input_nodes:
                if _is_tensor(arg):
                    self._join(node, arg)

    def _harmless(self, node: Node) -> bool:
        """A higher-order operation whose bodies write nothing; its results may still share memory."""
        bodies = [arg for arg in node.all_input_nodes if arg.op == "get_attr" and not _is_tensor(arg)]
        if not bodies or self._module is None:
            return False
        for body in bodies:
            module = getattr(self._module, str(body.target), None)
            if not isinstance(module, GraphModule) or not _pure(module.graph):
                return False
        for arg in filter(_is_tensor, node.all_input_nodes):
            self._join(node, arg)
        return True

    def _join(self, a: Node, b: Node) -> None:
        self._parent[self._group(a)] = self._group(b)

    def _group(self, node: Node) -> Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def to(self, node: Node) -> list[Node]:
        """All nodes that may write the memory of this one, in order."""
        return self._entries.get(self._group(node), [])

    def between(self, node: Node, start: int, stop: int) -> list[Node]:
        """Those strictly between two positions."""
        return [w for w in self.to(node) if start < self.position[w] < stop]


def link(node: Node) -> tuple[Link, Node | None]:
    """How a node's memory hangs together with its first input's."""
    if node.op != "call_function":
        return "owner", None
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if node.target is operator.getitem:
        return "view", first
    if first is not None and writes_first(node.target):
        return "same", first
    if not _shares(node.target):
        return ("owner", None) if _written(node.target) == () else ("unknown", first)
    name = name_of(node.target)
    if name in _SAME:
        return "same", first
    if name == "to" and first is not None and _dtype(first) != _dtype(node):
        return "owner", None
    return ("view" if name in _VIEWS else "unknown"), first


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _argument(node: Node, place: int) -> Any:
    if place < len(node.args):
        return node.args[place]
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.kwargs.get(node.target._schema.arguments[place].name)


def _nodes(arg: Any) -> Iterator[Node]:
    if isinstance(arg, Node):
        yield arg
    elif isinstance(arg, tuple | list):
        for item in arg:
            yield from _nodes(item)


def _is_tensor(node: Node) -> bool:
    val = node.meta.get("val")
    if node.op == "get_attr" and val is None:
        return False  # a nested graph
    return val is None or isinstance(val, torch.Tensor | tuple | list)


def _pure(graph: Graph) -> bool:
    return all(node.op != "call_function" or _written(node.target) == () for node in graph.nodes) and all(
        node.op in ("placeholder", "output", "call_function") for node in graph.nodes
    )
