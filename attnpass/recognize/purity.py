"""Who writes what: the proof that a value read earlier is still the same later.

ATen graphs before functionalisation contain in-place operations, and FX edges say nothing about them: after
``s.masked_fill_(m, x)`` every later reader of ``s`` sees the filled values although its edge points at ``s``. This
module answers three questions from the operators' schemas alone:

    value_at(a, reader)   which node's out-of-place value does `reader` see in `a`?   (refuses if only partly written)
    unchanged(a, i, j)    is no storage that `a` may share written strictly between the positions i and j?
    live(...)             which nodes are still needed, writes included?

Storages are groups of nodes that *may* share memory (flow-insensitive, so too large at worst). Operations without a
schema (higher-order operations, Python functions) may write whatever they read.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

from attnpass.errors import Refuse
from attnpass.graph import positions, value
from attnpass.recognize.ops import op_name

# Composite operations that may return their input itself although their schema does not say so.
_MAY_RETURN_INPUT = {"dropout", "feature_dropout", "alpha_dropout", "type_as", "rrelu", "pad", "nan_to_num"}
_PURE_PYTHON = {operator.getitem} | {
    getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")
}
_SAME_VIEW = {"alias", "detach", "lift_fresh"}


@cache
def _writes_and_alias(target: Any) -> tuple[frozenset[int], frozenset[str], frozenset[int]] | None:
    """(positions written, keyword names written, positions the result may share memory with); None: unknown."""
    if target in _PURE_PYTHON or getattr(target, "__module__", "") == "_operator":
        return frozenset(), frozenset(), frozenset({0} if target is operator.getitem else ())
    if getattr(target, "__name__", "").startswith("sym_") and getattr(target, "__module__", "") == "torch":
        return frozenset(), frozenset(), frozenset()
    if target is torch.ops.higher_order.flex_attention:
        return frozenset(), frozenset(), frozenset()  # torch refuses functions of scores that write to anything
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target is torch.ops.aten.detach_.default:
        return frozenset(), frozenset(), frozenset({0})  # writes no element: it only cuts the history off
    schema = target._schema
    where_: set[int] = set()
    names: set[str] = set()
    returns = any(r.alias_info is not None for r in schema.returns)
    shares: set[int] = set()
    for index, argument in enumerate(schema.arguments):
        if returns and argument.alias_info is not None:
            shares.add(index)
        if argument.alias_info is not None and argument.alias_info.is_write:
            names.add(argument.name)
            if not argument.kwarg_only:
                where_.add(index)
    if schema.name.split("::")[-1] in _MAY_RETURN_INPUT:
        shares = set(range(len(schema.arguments)))
    if not schema.name.startswith("aten::") and not names and not shares and _is_opaque(target):
        return None
    return frozenset(where_), frozenset(names), frozenset(shares)


def _is_opaque(target: torch._ops.OpOverload) -> bool:
    # A custom operator's schema is a promise by its author; torch itself relies on it, so do we. Only operators that
    # declare no result at all can do nothing but have an effect.
    return not target._schema.returns


class Effects:
    """Storage groups and writes of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position = positions(graph)
        self._parent: dict[Node, Node] = {}
        self.writers: dict[Node, list[tuple[int, Node, Node | None]]] = defaultdict(list)
        self._external: set[Node] = set()
        raw: list[tuple[Node, list[Node]]] = []
        for node in graph.nodes:
            self._parent[node] = node
            if node.op == "call_function":
                self._scan(node, raw)
        for writer, targets in raw:
            for target in targets:
                self.writers[self.group(target)].append((self.position[writer], writer, target))
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._external.add(self.group(node))
        # inputs may share memory with each other, so a write to one of them may be a write to any
        self._external_writes = sorted(w[0] for group in self._external for w in self.writers.get(group, ()))
        for entries in self.writers.values():
            entries.sort(key=lambda entry: entry[0])

    def _scan(self, node: Node, raw: list[tuple[Node, list[Node]]]) -> None:
        effect = _writes_and_alias(node.target)
        if effect is None:
            tensors = [arg for arg in node.all_input_nodes if _holds_tensor(arg)]
            raw.append((node, tensors))
            for arg in tensors:
                self._join(node, arg)
            return
        written, names, shares = effect
        targets = _targets(node, written, names)
        if targets:
            raw.append((node, targets))
        shared = [arg for i in shares if i < len(node.args) for arg in _nodes(node.args[i])]
        if op_name(node) == "einsum" and len(node.all_input_nodes) == 1:
            shared = list(node.all_input_nodes)  # of one operand it may be a mere view
        for arg in (*targets, *shared):
            if _holds_tensor(arg):
                self._join(node, arg)

    def _join(self, a: Node, b: Node) -> None:
        ra, rb = self.group(a), self.group(b)
        if ra is not rb:
            self._parent[ra] = rb

    def group(self, node: Node) -> Node:
        """The representative of all nodes that may share memory with this one."""
        root = node
        while self._parent[root] is not root:
            root = self._parent[root]
        while self._parent[node] is not root:
            self._parent[node], node = root, self._parent[node]
        return root

    def written(self, node: Node) -> bool:
        """Something in this graph may write into this tensor's memory, at whatever time."""
        return bool(self.writers.get(self.group(node)))

    def is_external(self, node: Node) -> bool:
        """May share memory with an input, a parameter or a buffer."""
        return self.group(node) in self._external

    def value_at(self, node: Node, reader: Node) -> Node:
        """The node whose value `reader` sees in `node`.

        A later in-place operation on exactly this tensor is that node; a write through any other view of its memory
        leaves a value that no node has, so it refuses.
        """
        entries = self.writers.get(self.group(node))
        if not entries:
            return node
        start, stop = self.position[node], self.position[reader]
        last = None
        for position, writer, target in entries:
            if start < position < stop:
                last = (writer, target)
        if last is None:
            return node
        writer, target = last
        if target is None or _writes_and_alias(writer.target) is None or self._origin(target) is not self._origin(node):
            raise Refuse("mutated", reader, what=f"{node.name}")
        return writer

    def _origin(self, node: Node) -> Node:
        """Through in-place results and plain aliases to the tensor whose whole extent they are."""
        while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
            effect = _writes_and_alias(node.target)
            in_place = effect is not None and effect[0] == {0}
            if not in_place and op_name(node) not in _SAME_VIEW:
                break
            node = node.args[0]
        return node

    def unchanged(self, node: Node, start: int, stop: int) -> bool:
        """No write that may reach this tensor's memory strictly between two positions."""
        group = self.group(node)
        if any(start < position < stop for position, _, _ in self.writers.get(group, ())):
            return False
        return not (group in self._external and any(start < position < stop for position in self._external_writes))

    def live(self) -> set[Node]:
        """All nodes that are needed, given that writes to memory that a needed node reads are needed too."""
        work = [node for node in self.graph.nodes if self._is_root(node)]
        live: set[Node] = set()
        seen_groups: set[Node] = set()
        while work:
            node = work.pop()
            if node in live:
                continue
            live.add(node)
            for arg in node.all_input_nodes:
                work.append(arg)
                group = self.group(arg)
                if group not in seen_groups:
                    seen_groups.add(group)
                    work.extend(writer for _, writer, _ in self.writers.get(group, ()))
        return live

    def _is_root(self, node: Node) -> bool:
        if node.op != "call_function":
            return node.op in ("output", "placeholder", "call_module", "call_method")
        effect = _writes_and_alias(node.target)
        if effect is None:
            return True  # unknown: may do anything
        if is_check(node):
            return False
        if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
            return True
        return any(self.is_external(target) for target in _targets(node, effect[0], effect[1]))


def is_check(node: Node) -> bool:
    """A check that capture put beside a tensor: needed only as long as the tensor is."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def _targets(node: Node, written: frozenset[int], names: frozenset[str]) -> list[Node]:
    """The arguments that a call writes to."""
    targets = [arg for i in written if i < len(node.args) for arg in _nodes(node.args[i])]
    return targets + [arg for name in names if name in node.kwargs for arg in _nodes(node.kwargs[name])]


def _holds_tensor(node: Node) -> bool:
    val = value(node)
    return val is None or isinstance(val, torch.Tensor | tuple | list)


def _nodes(arg: Any) -> Iterable[Node]:
    if isinstance(arg, Node):
        return (arg,)
    if isinstance(arg, tuple | list):
        return tuple(node for item in arg for node in _nodes(item))
    return ()
