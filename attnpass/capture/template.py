"""What one call of a Dynamo graph is in ATen operations: its template.

    F.softmax(x, -1)   x: float32 (2, 4, s27, s27)      ->      aten.softmax.int(x, -1)
    F.multi_head_attention_forward(...)                 ->      some twenty operations, two results

A template depends only on what is called and on the shapes, strides, dtypes and devices of its operands, so calls that
agree in these (the layers of a model) share one. Tracing is torch's own ``make_fx(pre_dispatch=True)`` over fake
operands. Its fixed cost is several times that of one small call, so all calls without symbolic sizes are traced by one
run, side by side: none reads another's result.

Not traced: calls without any tensor (they switch states, or are done by the caller), functions from outside torch,
and whatever raises on fake operands. Such a call has no template.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnpass.capture.values import Number
from attnpass.graph import State

aten = torch.ops.aten


@dataclass(frozen=True)
class Constant:
    """A 0-d tensor that tracing lifted out of the code: a literal."""

    number: float | int | bool
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

    @property
    def symbolic(self) -> bool:
        return any(
            isinstance(o, Number) or (isinstance(o, torch.Tensor) and o._has_symbolic_sizes_strides)
            for o in self.operands
        )


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
        together = [call for call in calls if not call.symbolic]
        if together and not self._attempt(together, state):
            # one of them upset the whole run: each by itself
            for call in together:
                self._attempt([call], state)
        for call in calls:
            if call.symbolic:
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
                call.why = str(error)


def _template(gm: torch.fx.GraphModule, inputs: tuple[Node, ...], body: list[Node], result: Any) -> Template:
    constants: dict[Node, Constant] = {}
    same: dict[Node, Node] = {}
    nodes: list[Node] = []
    known = {*inputs, *body}
    for node in body:
        if any(arg not in known for arg in node.all_input_nodes):
            raise ValueError("a size that comes from another place")
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
    return Template(inputs=inputs, nodes=tuple(nodes), constants=constants, same=same, result=result)


_FRESH = {aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default}


def _constant(held: Any) -> Constant:
    real = held.constant if isinstance(held, FakeTensor) else held
    if not isinstance(real, torch.Tensor) or isinstance(real, FakeTensor) or real.dim() or real.is_complex():
        raise ValueError("a tensor constant")
    # read outside the fake mode: the literal itself is asked for
    with torch._C._DisableTorchDispatch():
        number = real.item()
    return Constant(number, real.dtype, held.device)


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
