"""From a Dynamo graph to its shadow: one ATen graph of the whole, with fake values, that the pass can work on.

    Dynamo:   x ── F.linear ── transpose ── matmul ── softmax ── ...        (torch functions, methods, modules)
                     │            │           │          │
    shadow:   x ── aten.linear ─ aten.transpose ─ aten.matmul ─ aten.softmax ...

Every Dynamo call is lowered alone, by its template (see :mod:`attnpass.capture.template`), and keeps its place, so
what is in place stays in place and what aliases still aliases. Both directions of the correspondence are kept: a
Dynamo node's value is a tree of shadow nodes, and each shadow node belongs to one Dynamo node.

A call without a template becomes an *opaque* node: the pass meets an operation it does not know, which may write to
whatever it reads and is never removed. Two things are refused for the whole graph: a tensor whose shape is changed in
place (later readers would be lowered with the wrong shape), and a placeholder about which nothing is known.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from attnpass.capture import aten
from attnpass.capture.calls import COPIED_META, changes_shape_in_place, name_of
from attnpass.capture.template import Call, Constant, Template, Tracer, traceable
from attnpass.capture.values import (
    Number,
    agrees,
    filled,
    frozen,
    holds_tensor,
    mapped,
    operands,
    settled,
    shape_env,
    signature,
)
from attnpass.graph import State

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float)


class Unlowerable(Exception):
    """This graph cannot be lowered without risk; the text says why."""


@dataclass(frozen=True)
class Opaque:
    """The target of an opaque node: a name for reports, and nothing that could be called."""

    name: str

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(self.name)  # the graph is only read: what runs is the original's own call


@dataclass(kw_only=True)
class Shadow:
    """The ATen graph of a Dynamo graph, and what corresponds to what."""

    graph: Graph
    of: dict[Node, Any] = field(default_factory=dict)  # Dynamo node -> tree of shadow nodes and constants
    owner: dict[Node, Node] = field(default_factory=dict)  # shadow node -> the Dynamo node it is a part of
    opaque: dict[Node, str] = field(default_factory=dict)  # Dynamo nodes that could not be lowered, and why
    states: dict[Node, State] = field(default_factory=dict)  # of the Dynamo nodes


def lower(gm: GraphModule, state: State, example_inputs: Sequence[Any] = ()) -> Shadow:
    """The shadow of one Dynamo graph (not of those inside it), which runs under `state`."""
    return _Lowering(gm, state, example_inputs).run()


class _Lowering:
    def __init__(self, gm: GraphModule, state: State, example_inputs: Sequence[Any]) -> None:
        self.gm = gm
        self.state = state
        self.env = shape_env(gm.graph)
        self.mode = FakeTensorMode(shape_env=self.env)
        self.shadow = Shadow(graph=Graph(), states=dict(aten.states(gm.graph, state)))
        self.values: dict[Node, Any] = {}
        self.fakes: dict[Any, torch.Tensor] = {}
        self.calls: dict[Node, Call] = {}
        self._read_values(example_inputs)

    def run(self) -> Shadow:
        self._plan()
        for node in self.gm.graph.nodes:
            self.shadow.of[node] = self._compose(node)
        return self.shadow

    # -- values --------------------------------------------------------------------------------------------------------

    def _read_values(self, example_inputs: Sequence[Any]) -> None:
        inputs = iter(example_inputs)
        for node in self.gm.graph.nodes:
            held = node.meta.get("example_value")
            if node.op == "placeholder":
                given = next(inputs, None)
                if held is None:
                    held = given
                    if isinstance(held, torch.Tensor) and not isinstance(held, FakeTensor):
                        raise Unlowerable(f"nothing is known about the shape of the input {node.name}")
            elif node.op == "get_attr" and held is None:
                held = _attribute(self.gm, str(node.target))
                if isinstance(held, torch.Tensor) and not isinstance(held, FakeTensor):
                    held = self.mode.from_tensor(held, static_shapes=True)
            self.values[node] = self._faked(held)

    def _faked(self, held: Any, *, grad: bool = False, fresh: bool = False) -> Any:
        """The same value in our own mode: Dynamo's may be older than the sizes it has since learnt.

        Tensors of the same shape, strides, dtype and device share one, unless a `fresh` one is asked for.
        """
        if isinstance(held, tuple | list):
            return tuple(self._faked(item, grad=grad, fresh=fresh) for item in held)
        if isinstance(held, Number):
            return settled(held)
        if not isinstance(held, torch.Tensor):
            return held if isinstance(held, int | float | bool) else None
        plain = type(held) is FakeTensor and held.layout is torch.strided and not held.is_quantized
        if not plain or held.is_conj() or held.is_neg():
            return None  # batched by vmap, distributed, sparse ...: nothing that could be made anew from sizes
        key = signature(held)
        if fresh or (grad and held.requires_grad):
            return self._made(held).requires_grad_(grad and held.requires_grad)
        if key not in self.fakes:
            self.fakes[key] = self._made(held)
        return self.fakes[key]

    def _made(self, like: torch.Tensor) -> torch.Tensor:
        sizes, strides = tuple(map(settled, like.shape)), tuple(map(settled, like.stride()))
        with self.mode:
            return torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)

    # -- which calls there are, and their templates --------------------------------------------------------------------

    def _plan(self) -> None:
        memo: dict[Any, Call] = {}
        by_state: dict[State, list[Call]] = defaultdict(list)
        for node in self.gm.graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module") or self._is_simple(node):
                continue
            if changes_shape_in_place(node):
                raise Unlowerable(f"{node.name} changes the shape of a tensor in place")
            why = self._untraceable(node)
            if why is not None:
                self.shadow.opaque[node] = why
                continue
            state = self.shadow.states[node]
            key = self._key(node, state)
            if key not in memo:
                memo[key] = self._call(node)
                by_state[state].append(memo[key])
            self.calls[node] = memo[key]
        tracer = Tracer(self.mode)
        for state, calls in by_state.items():
            tracer.trace(calls, state)
        for node, call in self.calls.items():
            if call.template is None:
                pass
            elif not call.template.nodes and not self._is_identity(node):
                call.template, call.why = None, "what it does leaves no trace"
            elif not agrees(call.template.result, self.values[node]):
                call.template, call.why = None, "lowered alone it yields another shape or dtype"
            if call.template is None:
                self.shadow.opaque[node] = call.why

    def _untraceable(self, node: Node) -> str | None:
        if self.shadow.states[node].functorch:
            return "inside vmap, grad or another functorch transform"
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            held = next(iter([*module.parameters(), *module.buffers()]), None)
            plain = held is None and type(module).__module__.startswith("torch.nn.")
            return None if plain else f"the module {node.target}"
        if name_of(self.gm, node) == "requires_grad_":
            return "starts to record gradients"
        why = traceable(node.target)
        if why is not None:
            return why
        values = [self.values[arg] for arg in node.all_input_nodes]
        if any(value is None and arg.meta.get("example_value") is not None for arg, value in self._inputs(node)):
            return "an operand is no ordinary tensor"
        if any(value is None for value in values):
            return "nothing is known about an operand"
        if not any(map(holds_tensor, [*values, self.values[node]])):
            return "no tensor comes or goes"  # switches a state, seeds, synchronises ...
        if self.values[node] is None and node.meta.get("example_value") is not None:
            return "the result is no ordinary tensor"
        if isinstance(self.values[node], Number):
            return "a number that depends on data"
        return None

    def _is_identity(self, node: Node) -> bool:
        """A call that lowers to nothing may return its operand, as ``contiguous`` does, or register a hook on it."""
        name = name_of(self.gm, node)
        return node.target is operator.getitem or (self.values[node] is not None and hasattr(torch.ops.aten, name))

    def _inputs(self, node: Node) -> Iterator[tuple[Node, Any]]:
        return ((arg, self.values[arg]) for arg in node.all_input_nodes)

    def _key(self, node: Node, state: State) -> Any:
        """Calls with equal keys have equal templates."""
        index = {arg: i for i, arg in enumerate(node.all_input_nodes)}
        operands = tuple(signature(value) for _, value in self._inputs(node))
        return node.op, node.target, state, operands, frozen(node.args, index), frozen(node.kwargs, index)

    def _call(self, node: Node) -> Call:
        inputs = node.all_input_nodes
        trees = [self.values[arg] for arg in inputs]
        target = node.target
        args, kwargs, op = node.args, node.kwargs, node.op
        module = self.gm.get_submodule(str(target)) if op == "call_module" else None

        def run(*operands: Any) -> Any:
            rest = iter(operands)
            new = {arg: filled(tree, rest) for arg, tree in zip(inputs, trees, strict=True)}
            a, k = map_arg((args, kwargs), new.__getitem__)
            if op == "call_method":
                assert isinstance(target, str)
                return getattr(a[0], target)(*a[1:], **k)
            function = module if module is not None else target
            assert callable(function)
            return function(*a, **k)

        # own objects: tracing tells operands apart by identity
        return Call(run, tuple(leaf for tree in trees for leaf in operands(self._faked(tree, fresh=True))))

    # -- the shadow ----------------------------------------------------------------------------------------------------

    def _compose(self, node: Node) -> Any:
        graph = self.shadow.graph
        if node.op == "output":
            return self._own(node, graph.output(self._mapped(node.args[0])), None)
        if node.op == "placeholder":
            held = node.meta.get("example_value")
            value = self.values[node] if held is None else self._faked(held, grad=True)
            return self._own(node, graph.placeholder(str(node.target)), value)
        if node.op == "get_attr":
            # not graph.get_attr, which would look for the attribute
            return self._own(node, graph.create_node("get_attr", str(node.target)), self.values[node])
        if self._is_simple(node):
            return self._simple(node)
        call = self.calls.get(node)
        if call is None or call.template is None:
            target = Opaque(name_of(self.gm, node))
            args, kwargs = self._mapped(node.args), self._mapped(node.kwargs)
            made = graph.create_node("call_function", target, args, kwargs)
            held = node.meta.get("example_value")
            return self._spread(node, made, self._faked(held, grad=True))
        return self._instance(node, call.template)

    def _instance(self, node: Node, template: Template) -> Any:
        """A copy of the template, over this node's own operands."""
        env: dict[Node, Any] = {}
        inputs = iter(template.inputs)
        for arg, value in self._inputs(node):
            for leaf in operands(value, self.shadow.of[arg]):
                env[next(inputs)] = leaf
        aliases: dict[Node, list[Node]] = defaultdict(list)
        for alias, source in template.same.items():
            aliases[source].append(alias)
        for source in template.inputs:
            env.update((alias, env[source]) for alias in aliases[source])
        graph = self.shadow.graph
        for old in template.nodes:
            if old in template.constants:
                made = self._literal(node, template.constants[old])
            else:
                args, kwargs = map_arg((old.args, old.kwargs), env.__getitem__)
                made = self._own(
                    node, graph.create_node("call_function", old.target, args, kwargs), old.meta.get("val")
                )
            env[old] = made
            env.update((alias, made) for alias in aliases[old])
        return mapped(template.result, lambda leaf: env[leaf] if isinstance(leaf, Node) else leaf)

    def _literal(self, node: Node, literal: Constant) -> Node:
        """The numbers of a literal, each by itself, and the tensor that they make."""
        aten = torch.ops.aten

        def made(target: Any, args: tuple[Any, ...], shape: tuple[int, ...], **kwargs: Any) -> Node:
            with self.mode:
                value = torch.empty(shape, dtype=literal.dtype, device=literal.device)
            return self._own(node, self.shadow.graph.call_function(target, args, kwargs), value)

        parts = [
            made(aten.full.default, ([], number), (), dtype=literal.dtype, device=literal.device)
            for number in literal.numbers
        ]
        if not literal.shape:
            return parts[0]
        flat = made(aten.stack.default, (parts,), (len(parts),))
        return (
            made(aten.reshape.default, (flat, list(literal.shape)), literal.shape) if len(literal.shape) > 1 else flat
        )

    def _is_simple(self, node: Node) -> bool:
        """Numbers, sizes, items and parts of tuples need no tracing."""
        value = self.values[node]
        if node.op == "call_method":
            plain = len(node.all_input_nodes) == 1 and isinstance(self.values[node.all_input_nodes[0]], torch.Tensor)
            if node.target == "size":
                return plain and value is not None
            return node.target == "item" and plain and isinstance(value, _NUMBERS) and not isinstance(value, bool)
        if node.op != "call_function":
            return False
        if node.target is operator.getitem:
            source = node.args[0]
            if isinstance(source, Node) and isinstance(self.values[source], tuple):
                return isinstance(node.args[1], int)
        if not isinstance(value, _NUMBERS) or not all(isinstance(v, _NUMBERS) for _, v in self._inputs(node)):
            return False
        module = getattr(node.target, "__module__", None)
        return module in ("_operator", "math", "builtins") or getattr(node.target, "__name__", "").startswith("sym_")

    def _simple(self, node: Node) -> Any:
        graph, value = self.shadow.graph, self.values[node]
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            assert isinstance(index, int)
            return self.shadow.of[source][index]
        if node.target == "item":
            made = graph.call_function(torch.ops.aten.item.default, (self._mapped(node.args[0]),))
            return self._own(node, made, value)
        if node.target == "size":
            source = self._mapped(node.args[0])
            tensor = self.values[node.all_input_nodes[0]]
            if isinstance(value, tuple):
                return tuple(self._size(node, source, dim, size) for dim, size in enumerate(value))
            dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
            assert isinstance(dim, int)
            return self._size(node, source, dim % tensor.dim(), value)
        if isinstance(value, bool | int | float):
            return value  # settled by a guard that Dynamo has already
        made = graph.create_node("call_function", node.target, self._mapped(node.args), self._mapped(node.kwargs))
        return self._own(node, made, value)

    def _size(self, node: Node, source: Any, dim: int, size: Any) -> Any:
        if isinstance(size, int):
            return size
        return self._own(node, self.shadow.graph.call_function(torch.ops.aten.sym_size.int, (source, dim)), size)

    def _spread(self, node: Node, made: Node, value: Any) -> Any:
        """An opaque result as a tree of nodes."""
        self._own(node, made, value)
        if not isinstance(value, tuple):
            return made
        parts = (self.shadow.graph.call_function(operator.getitem, (made, i)) for i in range(len(value)))
        return tuple(self._spread(node, part, item) for part, item in zip(parts, value, strict=True))

    def _own(self, node: Node, made: Node, value: Any) -> Node:
        made.meta["val"] = value
        made.meta["attnpass_state"] = self.shadow.states[node]
        for key in COPIED_META:
            if key in node.meta:
                made.meta[key] = node.meta[key]
        self.shadow.owner[made] = node
        return made

    def _mapped(self, arg: Any) -> Any:
        def one(node: Node) -> Any:
            value = self.values[node]
            return value if isinstance(value, bool | int | float) else self.shadow.of[node]

        return map_arg(arg, one)


def _attribute(gm: GraphModule, path: str) -> Any:
    held: Any = gm
    for name in path.split("."):
        held = getattr(held, name)
    return held
