"""Bringing the replacements made in a shadow back into the Dynamo graph it was made from.

    shadow:   q ─ matmul ─ mul ─ softmax ─ matmul ─ view          Dynamo:   q ─ matmul ─ mul ─ softmax ─ matmul ─ view
              └──────── scaled_dot_product_attention ──┘                     └──── aten.scaled_dot_... ──────────┘

Only what is new is written, as calls of ATen operations, each right before the Dynamo call whose place in the shadow
follows it. Everything else stays the call that Dynamo has recorded. Where a replacement touches the inside of one
Dynamo call (``F.multi_head_attention_forward``), that whole call is written out in its ATen operations, in its place
and order, so nothing is computed twice or at another time.

A Dynamo call is erased only when every operation it was lowered to has lost its last reader, which the pass has proved
with writes taken into account. ``eliminate_dead_code`` is never used: to it an in-place call without readers is dead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from attnpass.capture.aten import copy_graph
from attnpass.capture.calls import COPIED_META
from attnpass.capture.lower import Shadow
from attnpass.graph import State, value
from attnpass.pipeline import Replacement

_FUNCTION = "attnpass_function"  # the meta of a node that yields a function: what nobody but the node has yet


class Unspliceable(Exception):
    """The replacements cannot be expressed in this Dynamo graph; the text says why."""


def splice(original: Graph, shadow: Shadow, replacements: Sequence[Replacement]) -> Graph:
    """A copy of the Dynamo graph that the shadow was made from, with the replacements written into it."""
    graph = copied(original)
    twin = dict(zip(original.nodes, graph.nodes, strict=True))
    _Splice(shadow, replacements, graph, twin).run()
    graph.lint()
    graph.python_code("self")  # what cannot be written out as code fails here, not when it is put in place
    return graph


def copied(original: Graph) -> Graph:
    """A copy of a Dynamo graph, with what Dynamo notes on the nodes themselves: where an input comes from."""
    graph = copy_graph(original)
    for node, twin in zip(original.nodes, graph.nodes, strict=True):
        for key, held in vars(node).items():
            if key not in vars(twin):
                setattr(twin, key, held)
    return graph


def attach(gm: GraphModule, graph: Graph) -> None:
    """Give a graph module the functions that calls of its new graph take as arguments."""
    for node in graph.nodes:
        if _FUNCTION in node.meta:
            gm.add_module(str(node.target), node.meta[_FUNCTION])


def detach(gm: GraphModule, graph: Graph) -> None:
    """Take them back, as far as they were given."""
    for node in graph.nodes:
        if _FUNCTION in node.meta and hasattr(gm, str(node.target)):
            delattr(gm, str(node.target))


class _Splice:
    def __init__(
        self, shadow: Shadow, replacements: Sequence[Replacement], graph: Graph, twin: dict[Node, Node]
    ) -> None:
        self.shadow = shadow
        self.graph = graph
        self.twin = twin
        self.fused = {one.output: one.fused for one in replacements}
        self.dead = {node for one in replacements for node in one.dead}
        self.had_users = {node for node in graph.nodes if node.users}
        self.final = _final_places(shadow)
        self.needed = self._needed()
        self.opened = self._opened()
        self.here: dict[Node, Any] = {}  # shadow node -> its node in the copy
        self.mode = _mode_of(graph)

    def run(self) -> None:
        self._write()
        for node in self.opened:
            self._hand_over(node, self.shadow.of[node])
        for output, fused in self.fused.items():
            node = self.shadow.owner[output]
            if node not in self.opened:
                self.twin[node].replace_all_uses_with(self.here[fused])
        self._sweep()

    # -- what has to be written ----------------------------------------------------------------------------------------

    def _needed(self) -> set[Node]:
        """New nodes that something reads."""
        needed: set[Node] = set()
        work = list(self.fused.values())
        while work:
            node = work.pop()
            if node in needed or not _is_new(node):
                continue
            needed.add(node)
            work.extend(node.all_input_nodes)
        return needed

    def _opened(self) -> set[Node]:
        """Dynamo calls that have to be written out, because the rewrite reads or replaces something inside them."""
        opened: set[Node] = set()
        for node in self.needed:
            inside = (arg for arg in node.all_input_nodes if not _is_new(arg) and arg not in self.final)
            opened.update(map(self._owner, inside))
        for output in self.fused:
            owner = self._owner(output)
            if self.shadow.of[owner] is not output:
                opened.add(owner)
        for node in opened & set(self.shadow.opaque):
            raise Unspliceable(f"{node.name} has no ATen form")
        return opened

    def _owner(self, node: Node) -> Node:
        return self.shadow.owner[node]

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        pending: list[Node] = []
        for node in self.shadow.graph.nodes:
            if _is_new(node):
                if node in self.needed:
                    pending.append(node)
                continue
            owner = self._owner(node)
            before = self.twin[owner]
            for new in pending:
                self._emit(new, before, owner)
            pending.clear()
            if owner in self.opened and node not in self.dead:
                self._emit(node, before, owner)
        if pending:
            raise Unspliceable("a new operation stands behind the output")

    def _emit(self, node: Node, before: Node, owner: Node) -> None:
        if node.op == "get_attr":
            self.here[node] = self._function(node, before)
            return
        args, kwargs = map_arg((node.args, node.kwargs), lambda arg: self._in_copy(arg, before))
        assert callable(node.target)
        with self.graph.inserting_before(before):
            made = self.graph.call_function(node.target, args, kwargs)
        for key in COPIED_META:
            if key in node.meta:
                made.meta[key] = node.meta[key]
        made.meta["example_value"] = self._example(value(node), made, self.shadow.states[owner])
        self.here[node] = made

    def _function(self, node: Node, before: Node) -> Node:
        name = f"{node.target}_{sum(_FUNCTION in one.meta for one in self.graph.nodes)}"
        with self.graph.inserting_before(before):
            made = self.graph.create_node("get_attr", name)
        made.meta[_FUNCTION] = made.meta["example_value"] = value(node)
        return made

    def _in_copy(self, node: Node, before: Node) -> Any:
        """The node of the copy that yields what this shadow node yields."""
        if node in self.here:
            return self.here[node]
        dynamo, path = self.final[node]
        found = self.twin[dynamo]
        for index in path:
            found = self._part(found, index, before)
        return found

    def _part(self, whole: Node, index: int, before: Node) -> Node:
        for user in whole.users:
            if user.target is operator.getitem and user.args[1] == index and user < before:
                return user
        with self.graph.inserting_after(whole):
            part = self.graph.call_function(operator.getitem, (whole, index))
        held = whole.meta.get("example_value")
        part.meta = {key: whole.meta[key] for key in COPIED_META if key in whole.meta}
        part.meta["example_value"] = None if held is None else held[index]
        return part

    def _example(self, val: Any, made: Node, state: State) -> Any:
        """The value as the rest of the Dynamo graph has it: in Dynamo's own fake mode."""
        if isinstance(val, tuple | list):
            return type(val)(self._example(item, made, state) for item in val)
        if not isinstance(val, torch.Tensor) or self.mode is None:
            return val
        with self.mode:
            new = torch.empty_strided(val.size(), val.stride(), dtype=val.dtype, device=val.device)
        inputs = [arg.meta.get("example_value") for arg in made.all_input_nodes]
        flows = state.grad and val.is_floating_point() and any(getattr(held, "requires_grad", False) for held in inputs)
        return new.requires_grad_(flows)

    # -- handing over --------------------------------------------------------------------------------------------------

    def _hand_over(self, node: Node, tree: Any) -> None:
        """Everything that read a Dynamo call reads what it was written out to."""
        old = self.twin[node]
        for user in list(old.users):
            if isinstance(tree, tuple):
                self._replace_part(old, tree, user)
            else:
                user.replace_input_with(old, self._leaf(tree, old))

    def _replace_part(self, old: Node, tree: tuple[Any, ...], user: Node) -> None:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            self._replace_whole(old, tree, user)
            return
        part = tree[user.args[1]]
        for reader in list(user.users):
            if isinstance(part, tuple):
                self._replace_part(user, part, reader)
            elif isinstance(part, Node):
                reader.replace_input_with(user, self._leaf(part, old))
            else:
                _replace_by_constant(reader, user, part)

    def _replace_whole(self, old: Node, tree: tuple[Any, ...], user: Node) -> None:
        """Functions of torch take a size, or several tensors, as any tuple; what makes use of its own type does not."""
        if user.op not in ("call_function", "call_method") or (user.op == "call_method" and user.args[0] is old):
            raise Unspliceable(f"{user.name} reads all results of {old.name} together")
        _replace_by_constant(user, old, self._parts(tree, old))

    def _parts(self, tree: Any, before: Node) -> Any:
        if isinstance(tree, tuple):
            return tuple(self._parts(part, before) for part in tree)
        return self._leaf(tree, before) if isinstance(tree, Node) else tree

    def _leaf(self, node: Node, before: Node) -> Node:
        assert isinstance(node, Node)
        found = self._in_copy(self.fused.get(node, node), before)
        assert isinstance(found, Node)
        return found

    # -- sweeping ------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        parts: dict[Node, list[Node]] = {}
        for node, owner in self.shadow.owner.items():
            parts.setdefault(owner, []).append(node)
        for node, twin in reversed(self.twin.items()):
            if node.op not in ("call_function", "call_method", "call_module") or twin.users:
                continue
            own = parts.get(node, [])
            # what owns nothing computes nothing: a part of a tuple, an identity
            gone = all(part in self.dead for part in own) if own else twin in self.had_users
            if node in self.opened or (gone and node not in self.shadow.opaque):
                self.graph.erase_node(twin)


def _is_new(node: Node) -> bool:
    return bool(node.meta.get("attnpass_made"))


def _final_places(shadow: Shadow) -> dict[Node, tuple[Node, tuple[int, ...]]]:
    """Where a shadow node is the result of a Dynamo node, or a part of it; the first such place."""
    places: dict[Node, tuple[Node, tuple[int, ...]]] = {}

    def visit(tree: Any, node: Node, path: tuple[int, ...]) -> None:
        if isinstance(tree, tuple):
            for index, item in enumerate(tree):
                visit(item, node, (*path, index))
        elif isinstance(tree, Node):
            places.setdefault(tree, (node, path))

    for node, tree in shadow.of.items():
        if node.op != "output":
            visit(tree, node, ())
    return places


def _mode_of(graph: Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        held = node.meta.get("example_value")
        if isinstance(held, FakeTensor):
            return held.fake_mode
    return None


def _replace_by_constant(reader: Node, old: Node, constant: Any) -> None:
    one: Callable[[Node], Any] = lambda node: constant if node is old else node  # noqa: E731
    reader.args, reader.kwargs = map_arg((reader.args, reader.kwargs), one)
