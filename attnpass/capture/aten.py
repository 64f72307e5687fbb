"""Graphs of ATen operations as they come from outside: what counts as one, copies, states, fake values.

    GraphModule ── is every call an ATen operation? ── has every node a value, of one fake mode? ── under which state?

Two kinds of graphs arrive. Exported programs carry everything. A bare GraphModule (``make_fx``, ``ep.module()``, a
graph of one's own) may lack values, or carry one fake mode per node; it is then propagated, in a copy, from example
inputs. Graphs of Python calls (``torch.compile``'s own, ``torch.fx.symbolic_trace``'s) are refused with advice: they
are another language, in which casts and autocast are not written out.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attnpass.errors import AttnpassError
from attnpass.graph import State, value

_ADVICE = (
    "attnpass takes an ExportedProgram or a GraphModule of ATen operations: "
    "use torch.export.export(model, args), or torch.compile(model, backend='attnpass')"
)

# -- copies ------------------------------------------------------------------------------------------------------------


def copy_graph(graph: Graph) -> Graph:
    """A copy with the same names; metadata dictionaries are copied, the values in them shared."""
    new = copy.deepcopy(graph)
    for old, made in zip(graph.nodes, new.nodes, strict=True):
        made.name = old.name  # a copy renames an `input`, which Python has too; signatures go by the name
    return new


def clone(gm: GraphModule, graph: Graph) -> GraphModule:
    """A module like `gm` that runs `graph`: every tensor, submodule and hook is shared, no container is.

    Neither ``copy.deepcopy`` (copies the weights, loses forward hooks) nor ``GraphModule(gm, graph)`` (loses hooks and
    attributes that the graph does not name) will do.
    """
    new = _shallow(gm)
    assert isinstance(new, GraphModule)
    new.graph = graph  # compiles it, too
    return new


def _shallow(module: torch.nn.Module) -> torch.nn.Module:
    new = type(module).__new__(type(module))
    for key, held in module.__dict__.items():
        if isinstance(held, dict | list | set):
            held = copy.copy(held)
        elif isinstance(held, types.MethodType) and held.__self__ is module:
            held = types.MethodType(held.__func__, new)
        new.__dict__[key] = held
    return new


def put_module(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    """Set ``root.<path>``; modules on the way are copied first, because `root` may share them with its original."""
    *prefix, last = path.split(".")
    for name in prefix:
        inner = _shallow(getattr(root, name))
        setattr(root, name, inner)
        root = inner
    setattr(root, last, module)


# -- what counts as ATen -----------------------------------------------------------------------------------------------

_SCALAR_MODULES = frozenset({"_operator", "math", "builtins"})
_STATE_MODULES = frozenset(
    {"torch._functorch.predispatch", "torch.amp.autocast_mode", "torch.fx.experimental.symbolic_shapes"}
)


def foreign_call(gm: GraphModule) -> Node | None:
    """The first node that is no ATen operation, nor one of the few other calls that exported graphs contain."""
    for node in gm.graph.nodes:
        if node.op == "call_method":
            return _node(node)
        # a module whose result nobody reads is a check, as the one of input guards in ``ep.module()``
        if node.op == "call_module" and node.users and not isinstance(gm.get_submodule(node.target), GraphModule):
            return _node(node)
        if node.op == "call_function" and not _known(node):
            return _node(node)
    return None


def _known(node: Node) -> bool:
    target: Any = node.target
    if isinstance(target, OpOverload | HigherOrderOperator):
        return True
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    if module in _SCALAR_MODULES:
        # on numbers; `q @ k` as an operator call on tensors is Dynamo's language
        return name == "getitem" or not isinstance(value(node), torch.Tensor)
    if module in _STATE_MODULES or name in ("_set_grad_enabled", "set_grad_enabled"):
        return True
    return name.startswith("sym_") or name == "_call_custom_autograd_function_in_pre_dispatch"


def require_aten(gm: GraphModule) -> None:
    """AttnpassError unless every call of this graph is an ATen operation."""
    node = foreign_call(gm)
    if node is not None:
        raise AttnpassError(f"node {node.name!r} calls {_target_text(node)}, which is no ATen operation; {_ADVICE}")


def _target_text(node: Node) -> str:
    if isinstance(node.target, str):
        return f"the {'module' if node.op == 'call_module' else 'method'} {node.target!r}"
    return getattr(node.target, "__name__", None) or str(node.target)


def _node(node: Any) -> Node:
    assert isinstance(node, Node)
    return node


# -- bodies ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """A graph inside a graph, the states it is called under (more than one: two calls share it), and what with."""

    path: str
    module: GraphModule
    states: tuple[State, ...]
    operands: frozenset[str]  # names of the nodes that are passed to it, by any of its calls


# their bodies run under vmap, whatever runs them in the end
_VMAPPED = frozenset({"associative_scan", "flex_attention", "flex_attention_backward"})


def bodies(gm: GraphModule, state: State) -> Iterator[Body]:
    """The graphs that this graph calls: those of cond, map, loops, checkpoint, autocast and grad-mode regions."""
    calls: dict[str, list[tuple[Node, State]]] = {}
    for node, here in states(gm.graph, state):
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append((node, here))
        elif isinstance(node.target, HigherOrderOperator):
            for operand in node.all_input_nodes:
                if operand.op == "get_attr":
                    calls.setdefault(str(operand.target), []).append((node, state_inside(node, here)))
    for path, made in calls.items():
        module = _attribute(gm, path)
        if isinstance(module, GraphModule):
            under = tuple(dict.fromkeys(here for _, here in made))
            yield Body(path, module, under, frozenset(arg.name for call, _ in made for arg in call.all_input_nodes))


def _attribute(gm: GraphModule, path: str) -> Any:
    held: Any = gm
    for name in path.split("."):
        held = getattr(held, name)
    return held


def state_inside(node: Node, state: State) -> State:
    """The state of the bodies that a higher-order operation runs."""
    assert isinstance(node.target, HigherOrderOperator)
    name = node.target.__name__
    if name == "wrap_with_set_grad_enabled":
        return replace(state, grad=bool(node.args[0]))
    if name == "wrap_with_autocast":
        return replace(state, autocast=(*state.autocast, _autocast(node)))
    if name in _VMAPPED:
        return replace(state, functorch=state.functorch + 1)
    return state


def _autocast(node: Node) -> tuple[str, torch.dtype, bool]:
    device, dtype, enabled = node.args[:3]
    assert isinstance(device, str)
    if dtype is None:
        dtype = torch.get_autocast_dtype(device)
    assert isinstance(dtype, torch.dtype)
    return device, dtype, bool(enabled)


# -- states ------------------------------------------------------------------------------------------------------------


def states(graph: Graph, state: State) -> Iterator[tuple[Node, State]]:
    """Each node with the state it runs under, where grad mode, autocast and vmap are switched by calls in the graph."""
    entered: dict[Node, tuple[str, torch.dtype, bool]] = {}
    recording: dict[Node, bool] = {}  # grad mode before inference mode was entered
    for node in graph.nodes:
        yield node, state
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", "")
        if name in ("_set_grad_enabled", "set_grad_enabled"):
            state = replace(state, grad=bool(node.args[0]))
        elif name == "_enter_autocast":
            entered[node] = _autocast(node)
            state = replace(state, autocast=(*state.autocast, entered[node]))
        elif name == "_exit_autocast":
            stack = list(state.autocast)
            stack.remove(entered[node.args[0]])
            state = replace(state, autocast=tuple(stack))
        elif name == "_enter_inference_mode":
            recording[node] = state.grad
            state = replace(state, grad=state.grad and not node.args[0])
        elif name == "_exit_inference_mode":
            state = replace(state, grad=recording[node.args[0]])
        elif name.endswith("_increment_nesting") or name == "_enter_dual_level":
            state = replace(state, functorch=state.functorch + 1)
        elif name.endswith("_decrement_nesting") or name == "_exit_dual_level":
            state = replace(state, functorch=state.functorch - 1)


def mark_states(graph: Graph, state: State) -> None:
    """Note on each node the state it runs under, where that is not the state of the whole graph."""
    for node, here in list(states(graph, state)):
        if here != state:
            node.meta["attnpass_state"] = here


def mark_inputs(graph: Graph) -> None:
    """Note that gradients may flow back through what is passed to this graph."""
    for node in graph.nodes:
        val = value(node)
        if node.op == "placeholder" and isinstance(val, torch.Tensor) and val.is_floating_point():
            node.meta["attnpass_grad"] = True


def unmark(graph: Graph) -> None:
    """Take all notes away: a saved or pickled graph must not need this package."""
    for node in graph.nodes:
        for key in [key for key in node.meta if str(key).startswith("attnpass_")]:
            del node.meta[key]


# -- values ------------------------------------------------------------------------------------------------------------


def with_values(gm: GraphModule, example_inputs: Sequence[Any] | None) -> GraphModule:
    """A copy of `gm`, bodies included, in which every node has a value and all values are of one fake mode."""
    new = _deep_clone(gm)
    modes = {id(val.fake_mode): val.fake_mode for val in _fakes(new)}
    if not _lacking(new) and len(modes) <= 1:
        for mode in modes.values():
            _fill_attributes(new, mode)
        return new
    flat = example_inputs is None
    inputs = _inputs_by_values(new) if example_inputs is None else example_inputs
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        # the graph may switch grad mode by calls; whatever happens, the caller's comes back
        with torch.set_grad_enabled(torch.is_grad_enabled()), enable_python_dispatcher():
            _Propagator(new, mode).propagate(*_faked(inputs, mode), flat=flat)
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise AttnpassError(f"the graph does not run on the example inputs: {type(error).__name__}: {text}") from error
    return new


def _deep_clone(gm: GraphModule) -> GraphModule:
    new = clone(gm, copy_graph(gm.graph))
    for body in bodies(new, State()):
        put_module(new, body.path, _deep_clone(body.module))
    return new


def _all_graphs(gm: GraphModule) -> Iterator[GraphModule]:
    yield gm
    for body in bodies(gm, State()):
        yield from _all_graphs(body.module)


def _fakes(gm: GraphModule) -> Iterator[FakeTensor]:
    for module in _all_graphs(gm):
        for node in module.graph.nodes:
            val = value(node)
            for item in val if isinstance(val, tuple | list) else (val,):
                if isinstance(item, FakeTensor):
                    yield item


def _lacking(gm: GraphModule) -> bool:
    """Some node that must yield a tensor or a number says nothing about it."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and "val" not in node.meta:
            return True
        if (
            node.op == "call_function"
            and "val" not in node.meta
            and isinstance(node.target, OpOverload)
            and node.target._schema.returns
        ):
            return True
    return False


def _fill_attributes(gm: GraphModule, mode: FakeTensorMode) -> None:
    """``ep.module()`` reads weights as attributes, without a value."""
    for module in _all_graphs(gm):
        for node in module.graph.nodes:
            if node.op == "get_attr" and "val" not in node.meta:
                held = _attribute(module, node.target)
                if isinstance(held, torch.Tensor):
                    node.meta["val"] = mode.from_tensor(held, static_shapes=True)


def _inputs_by_values(gm: GraphModule) -> tuple[Any, ...]:
    """Inputs of the sizes that the graph itself states, for graphs whose values live in unlike fake modes."""
    inputs: list[Any] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        val = value(node)
        if "val" not in node.meta or (isinstance(val, torch.Tensor) and val._has_symbolic_sizes_strides):
            raise AttnpassError(
                f"the graph does not say of what shape its input {node.name!r} is; pass example_inputs=(...), "
                "or export the model with torch.export.export(model, args)"
            )
        inputs.append(val)
    return tuple(inputs)


def _faked(inputs: Sequence[Any], mode: FakeTensorMode) -> tuple[Any, ...]:
    def fake(item: Any) -> Any:
        if isinstance(item, FakeTensor):
            with mode:
                new = torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device=item.device)
            return new.requires_grad_(item.requires_grad)
        return mode.from_tensor(item, static_shapes=True) if isinstance(item, torch.Tensor) else item

    return tuple(torch.utils._pytree.tree_map(fake, tuple(inputs)))


class _Propagator(FakeTensorProp):
    """Fake values for a graph and, as they are called, for the graphs inside it."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, mode=mode)
        self.mode = mode

    def propagate(self, *inputs: Any, flat: bool = False) -> Any:
        with self.mode:  # inputs are fake already, also where they are nested
            return self.run(*inputs, enable_io_processing=not flat)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        # what is noted is detached; that an input needs gradients is told by its value alone
        if n.op == "placeholder" and isinstance(result, torch.Tensor) and result.requires_grad:
            n.meta["val"].requires_grad_()
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        held = super().get_attr(target, args, kwargs)
        if isinstance(held, GraphModule):
            return self._body(held)
        return self.mode.from_tensor(held, static_shapes=True) if isinstance(held, torch.Tensor) else held

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        return self._body(module)(*args) if isinstance(module, GraphModule) else module(*args, **kwargs)

    def _body(self, module: GraphModule) -> Callable[..., Any]:
        return lambda *operands: _Propagator(module, self.mode).propagate(*operands)
