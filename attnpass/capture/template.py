"""What one call of a Dynamo graph is in ATen operations: its template.

    F.softmax(x, -1)   x: float32 (2, 4, s27, s27)      ->      aten.softmax.int(x, -1)
    F.multi_head_attention_forward(...)                 ->      some twenty operations, two results

A template depends only on what is called and on the shapes, strides, dtypes and devices of its operands, so calls that
agree in these (the layers of a model) share one. Tracing is torch's own ``make_fx(pre_dispatch=True)`` over fake
operands. Its fixed cost is several times that of one small call, so all calls are traced by one run, side by side: none
reads another's result. Only sizes cross over, because tracing knows a symbolic size by its expression, wherever it met
it first; each template is given its own again.

Not traced: calls without any tensor (they switch states, or are done by the caller), functions from outside torch,
and whatever raises on fake operands. Such a call has no template.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnpass.capture.values import Number, number_key
from attnpass.graph import State

aten = torch.ops.aten


@dataclass(frozen=True)
class Constant:
    """A small tensor that tracing lifted out of the code: a literal."""

    numbers: tuple[float | int | bool, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Template:
    """Operations in order, over `inputs`; `result` is a tree of nodes and constants."""

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    constants: dict[Node, Constant]
    same: dict[Node, Node]  # nodes that are not written again, and what stands for them
    result: Any


@dataclass
class Call:
    """One call to be traced: its operands as fake values, in the order in which they are met."""

    run: Callable[..., Any]
    operands: tuple[Any, ...]
    template: Template | None = None
    why: str = ""  # there is no template
    entangled: bool = False  # its template would need a size that only another call knows


def traceable(target: Any) -> str | None:
    """None, or why this function must not be called to see what it does."""
    if isinstance(target, HigherOrderOperator):
        return f"the higher-order operation {target.__name__}"
    if isinstance(target, str | OpOverload | OpOverloadPacket):
        return None
    module = getattr(target, "__module__", None) or ""
    if isinstance(target, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
        known = not module or module.partition(".")[0] in ("torch", "_operator", "builtins", "math")
    else:
        known = module.partition(".")[0] == "torch"
    return None if known else f"the function {getattr(target, '__qualname__', target)}"


@contextlib.contextmanager
def no_new_guards(env: ShapeEnv | None) -> Iterator[None]:
    """Whatever would add a condition on sizes raises instead: nobody asked for it, so nobody would know of it."""
    if env is None:
        yield
        return
    if hasattr(env, "error_on_new_guards"):
        with env.ignore_fresh_unbacked_symbols(), _quiet(), env.error_on_new_guards():
            yield
        return
    # torch 2.11: a frozen environment counts what it is asked for and would not add
    frozen, before = env.frozen, env.counter["ignored_backward_guard"]
    env.frozen = True
    try:
        with env.ignore_fresh_unbacked_symbols():
            yield
    finally:
        env.frozen = frozen
        ignored = env.counter["ignored_backward_guard"] - before
        env.counter["ignored_backward_guard"] = before
    if ignored:
        raise RuntimeError(f"{ignored} new conditions on sizes")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A guard that is refused is no warning to the user: it is why a site was left alone."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")

    def passes(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("failed during evaluate_expr")

    log.addFilter(passes)
    try:
        yield
    finally:
        log.removeFilter(passes)


@contextlib.contextmanager
def guards_known(env: ShapeEnv | None) -> Iterator[None]:
    """Dynamo has run these very calls and has the guards they need; what tracing asks beyond is for its own notes."""
    if env is None:
        yield
        return
    with env.ignore_fresh_unbacked_symbols(), env.suppress_guards():
        yield


@dataclass
class Tracer:
    """Traces calls in one private fake mode that shares the shape environment of Dynamo's."""

    mode: FakeTensorMode

    def trace(self, calls: list[Call], state: State) -> None:
        """Give each call its template, or a word on why it has none."""
        whole = self._attempt(calls, state)
        for call in calls:
            if call.template is None and (not whole or call.entangled):
                self._attempt([call], state)

    def _attempt(self, calls: list[Call], state: State) -> bool:
        spans: list[list[Node] | None] = []

        def run(*flat: Any) -> list[Any]:
            graph = _graph_being_made()
            rest = iter(flat)
            results: list[Any] = []
            spans.clear()
            for call in calls:
                operands = [next(rest) for _ in call.operands]
                before = _last(graph)
                try:
                    out = _plain(call.run(*operands))
                    spans.append(_behind(before, graph))
                except Exception as error:
                    call.why = _one_line(error)
                    out = None
                    spans.append(None)
                results.append(out)
            return results

        flat = [operand for call in calls for operand in call.operands]
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(enable_python_dispatcher())
                stack.enter_context(self.mode)
                stack.enter_context(state.entered())
                stack.enter_context(guards_known(self.mode.shape_env))
                gm = make_fx(run, pre_dispatch=True, tracing_mode="real")(*flat)
        except Exception as error:
            for call in calls:
                call.why = call.why or _one_line(error)
            return False
        self._cut(gm, calls, spans)
        return True

    def _cut(self, gm: torch.fx.GraphModule, calls: list[Call], spans: list[list[Node] | None]) -> None:
        """Part the common graph into one template for each call."""
        alive = set(gm.graph.nodes)  # tracing sweeps sizes that nothing reads
        inputs = iter(gm.graph.find_nodes(op="placeholder"))
        (results,) = gm.graph.output_node().args
        assert isinstance(results, list | tuple)
        for call, span, result in zip(calls, spans, results, strict=True):
            own = tuple(next(inputs) for _ in call.operands)
            if span is None:
                continue
            body = [node for node in span if node in alive]
            try:
                call.template = _template(gm, own, body, result)
            except ValueError as error:
                call.why, call.entangled = str(error), isinstance(error, _Entangled)


def _template(gm: torch.fx.GraphModule, inputs: tuple[Node, ...], body: list[Node], result: Any) -> Template:
    constants: dict[Node, Constant] = {}
    sizes = _Sizes(inputs, {*inputs, *body})
    same = sizes.same
    nodes: list[Node] = []
    for node in body:
        sizes.settle(node.all_input_nodes)
        if node.op == "get_attr":
            constants[node] = _constant(getattr(gm, str(node.target)))
            nodes.append(node)
        elif node.op != "call_function":
            raise ValueError(f"a {node.op}")
        elif node.target in _FRESH and node.args[0] in {**constants, **same}:
            # lift_fresh_copy and detach_ of a literal: it is made anew by each call anyway
            source = node.args[0]
            assert isinstance(source, Node)
            same[node] = same.get(source, source)
        else:
            if isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags:
                raise ValueError(f"{node.target} changes the shape of a tensor in place")
            nodes.append(node)
    sizes.settle(leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Node))
    nodes = [*sizes.made, *nodes]
    return Template(inputs=inputs, nodes=tuple(nodes), constants=constants, same=same, result=result)


class _Entangled(ValueError):
    """Traced by itself it may do."""


@dataclass
class _Sizes:
    """Finds for each size that a template has from elsewhere the same size among its own operands."""

    inputs: tuple[Node, ...]
    known: set[Node]
    same: dict[Node, Node] = field(default_factory=dict)
    made: list[Node] = field(default_factory=list)

    def settle(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node not in self.known and node not in self.same:
                self._settle(node, node.meta.get("val"))

    def _settle(self, node: Node, size: Any) -> None:
        if not isinstance(size, Number):
            raise _Entangled("a value that comes from another place")
        key = number_key(size)
        for own in self.inputs:
            held = own.meta.get("val")
            if isinstance(held, Number) and number_key(held) == key:
                self.same[node] = own
                return
            for dim, extent in enumerate(held.shape if isinstance(held, torch.Tensor) else ()):
                if number_key(extent) == key:
                    self.same[node] = self._add(own.graph.call_function(aten.sym_size.int, (own, dim)), size)
                    return
        if node.op != "call_function":
            raise _Entangled("a size that comes from another place")
        self.settle(node.all_input_nodes)
        self._add(node, size)

    def _add(self, node: Node, size: Any) -> Node:
        node.meta["val"] = size
        self.made.append(node)
        self.known.add(node)
        return node


_MOST_NUMBERS = 64  # of a literal, which is written out number by number: the slopes of as many heads
_FRESH = {aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default}


def _constant(held: Any) -> Constant:
    real = held.constant if isinstance(held, FakeTensor) else held
    if not isinstance(real, torch.Tensor) or isinstance(real, FakeTensor) or real.is_complex():
        raise ValueError("a tensor constant")
    if not 0 < real.numel() <= _MOST_NUMBERS:
        raise ValueError(f"a tensor constant of {real.numel()} numbers")
    # read outside the fake mode: the literal itself is asked for
    with torch._C._DisableTorchDispatch():
        numbers = real.flatten().tolist()
    return Constant(tuple(numbers), tuple(real.shape), real.dtype, held.device)


def _graph_being_made() -> Graph:
    mode = get_proxy_mode()
    assert mode is not None
    graph = mode.tracer.graph
    assert isinstance(graph, Graph)
    return graph


def _last(graph: Graph) -> Node | None:
    return next(iter(reversed(graph.nodes)), None)


def _behind(before: Node | None, graph: Graph) -> list[Node]:
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if node is before:
            break
        nodes.append(node)
    return nodes[::-1]


def _plain(out: Any) -> Any:
    """A result as tuples (named ones too) of what a graph can yield."""
    if isinstance(out, tuple | list):
        return tuple(_plain(item) for item in out)
    if out is None or isinstance(out, torch.Tensor | Number | int | float | bool):
        return out
    raise TypeError(f"yields a {type(out).__name__}")


def _one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
