"""Running a captured graph on the values that it was captured with, to see what the sites in it really get.

    inputs (those that are written: copies) ── node by node ── before each site: the values that it reads ── stop

Only values that are still needed are kept, and nothing is run behind the last site. Calls that could not be lowered
run as Dynamo recorded them. Nothing of the user's is written: inputs that the graph writes are copied first. What a
call does to the outside (printing, a custom operator's own state) it does once more.

Not run: graphs with collectives (other processes would have to take part), and those given tensors that are not
ordinary ones (fake, distributed). Then there are no real values, and the sites are tried on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from attnpass.aside import aside
from attnpass.capture.lower import Opaque, Shadow
from attnpass.masks.writes import Writes
from attnpass.trial import Real
from attnpass.trial.inputs import copied, hint

_TOGETHER = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor")


def of_shadow(gm: GraphModule, shadow: Shadow, example_inputs: Sequence[Any]) -> Real | None:
    """The graph that Dynamo handed over, seen through its shadow; None where it cannot be run."""

    def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(node.target, Opaque):
            return _call(node, args, kwargs)
        return _recorded(gm, shadow.owner[node], args, kwargs)

    return _real(gm, shadow.graph, example_inputs, call)


def into(gm: GraphModule, inputs: Sequence[Any], path: str) -> list[Any] | None:
    """What a graph inside the one that Dynamo handed over gets, where it is first called; None where that is not known.

    The outer graph is run as Dynamo recorded it, up to that call.
    """
    call = next((node for node in gm.graph.nodes if any(_is_body(arg, path) for arg in node.all_input_nodes)), None)
    operands = _operands(gm, call, path) if call is not None else []
    body = gm.get_submodule(path)
    assert isinstance(body, GraphModule)
    if len(operands) != sum(node.op == "placeholder" for node in body.graph.nodes):
        return None
    given = [x if isinstance(x, torch.nn.Parameter) else copied(x) for x in inputs]
    real = _real(gm, gm.graph, given, lambda node, args, kwargs: _recorded(gm, node, args, kwargs))
    if real is None or call is None:
        return None
    kept: list[Any] = []

    def run() -> None:
        with torch.random.fork_rng([]):
            real({call: operands}, lambda _, values: kept.extend(copied(values[node]) for node in operands))

    try:
        aside(run)
    except Exception:
        return None
    return kept


def _is_body(node: Node, path: str) -> bool:
    return node.op == "get_attr" and str(node.target) == path


def _operands(gm: GraphModule, call: Node, path: str) -> list[Node]:
    """What stands behind the body in the arguments of a higher-order operation, but for other bodies."""
    found: list[Node] = []
    behind = False
    for arg in tree_leaves(call.args):
        if isinstance(arg, Node):
            module = arg.op == "get_attr" and isinstance(_attribute(gm, str(arg.target)), torch.nn.Module)
            behind |= _is_body(arg, path)
            found += [arg] if behind and not module else []
    return found


def of_call(program: ExportedProgram | GraphModule, given: Any) -> list[Any] | None:
    """What the inputs of a program's graph hold when it is called so: a list of arguments, or (args, kwargs); None
    where that is not known.
    """
    if isinstance(program, GraphModule):
        args = given[0] if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping) else given
        return None if args is None else list(args)
    try:
        args, kwargs = given or program.example_inputs
        return list(program._graph_module_flat_inputs(tuple(args), dict(kwargs)))
    except Exception:  # exported without inputs, or for others
        return None


def of_program(gm: GraphModule, graph: Graph, inputs: Sequence[Any]) -> Real | None:
    """A graph of ATen operations; `gm` has what it refers to."""
    return _real(gm, graph, inputs, _call)


def _recorded(gm: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call as Dynamo recorded it."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if next(iter(module.buffers()), None) is not None:
            raise RuntimeError(f"{node.target} may write to what it holds")
        return module(*args, **kwargs)
    return _call(node, args, kwargs)


def _call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _real(gm: GraphModule, graph: Graph, inputs: Sequence[Any], call: Callable[..., Any]) -> Real | None:
    given = [node for node in graph.nodes if node.op == "placeholder"]
    if len(given) != len(inputs) or not all(map(_ordinary, inputs)) or any(map(_together, graph.nodes)):
        return None

    def real(wanted: Mapping[Node, Sequence[Node]], found: Callable[[Node, Mapping[Node, Any]], None]) -> None:
        with torch.no_grad():
            _run(gm, graph, dict(zip(given, inputs, strict=True)), call, wanted, found)

    return real


def _ordinary(x: Any) -> bool:
    if not isinstance(x, torch.Tensor):
        return isinstance(x, int | float | bool | torch.SymInt | torch.SymFloat | None)
    plain = type(x) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or isinstance(x, torch.nn.Parameter)
    return plain and not isinstance(x, FakeTensor) and x.layout is torch.strided and x.device.type != "meta"


def _together(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in _TOGETHER


def _run(
    gm: GraphModule,
    graph: Graph,
    inputs: dict[Node, Any],
    call: Callable[..., Any],
    wanted: Mapping[Node, Sequence[Node]],
    found: Callable[[Node, Mapping[Node, Any]], None],
) -> None:
    writes = Writes(graph)
    original = [node for node in graph.nodes if not node.meta.get("attnpass_made")]
    last: dict[Node, Node] = {}
    for node in original:
        for arg in (*node.all_input_nodes, *wanted.get(node, ())):
            last[arg] = node
    env: dict[Node, Any] = {}
    left = set(wanted)
    for node in original:
        if node in left:
            found(node, {leaf: env[leaf] for leaf in wanted[node]})
            left.discard(node)
        if not left or node.op == "output":
            return
        if node.op == "placeholder":
            held = inputs[node]
            if isinstance(held, torch.Tensor):
                env[node] = copied(held) if writes.to(node) else held.detach()
            else:
                env[node] = held if held is None else hint(held)
        elif node.op == "get_attr":
            env[node] = _attribute(gm, str(node.target))
        else:
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = call(node, args, kwargs)
        for arg in {node, *node.all_input_nodes, *wanted.get(node, ())}:
            if last.get(arg, node) is node:
                env.pop(arg, None)


def _attribute(gm: GraphModule, path: str) -> Any:
    held: Any = gm
    for name in path.split("."):
        held = getattr(held, name)
    return held.detach() if isinstance(held, torch.Tensor) else held
