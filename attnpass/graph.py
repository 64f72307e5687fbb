"""Helpers over FX graphs of ATen operations: values, sizes, places, and the builder that inserts new nodes.

Every graph this package works on keeps the fake value of a node in ``node.meta["val"]``: exported programs do so by
themselves, graphs lowered from Dynamo are made so by ``capture``. Nothing here decides anything about attention.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from attnpass.errors import Refuse, first_line
from attnpass.ledger import Where
from attnpass.spec import Size

T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """The ambient state under which a node runs."""

    autocast: tuple[tuple[str, torch.dtype, bool], ...] = ()  # (device type, dtype, enabled)
    grad: bool = True
    functorch: int = 0  # depth of vmap/grad/jvp levels
    inference: bool = False  # the graph may be run under either grad mode; choose as if without
    strides_hold: bool = False  # what the graph is called with always has the strides that it was traced with

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Re-enter this state, so that fake values come out with the dtypes that the real ones will have."""
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            yield


def state_of(node: Node, default: State) -> State:
    """The state that capture recorded for this node, or that of the whole graph."""
    state = node.meta.get("attnpass_state", default)
    assert isinstance(state, State)
    return state


def value(node: Node) -> Any:
    """The fake value of a node (a tensor, a symbolic number, a tuple of them), None where there is none."""
    return node.meta.get("val")


def tensor(node: Node) -> torch.Tensor | None:
    """The fake tensor of a node, None when it yields anything else."""
    val = value(node)
    return val if isinstance(val, torch.Tensor) else None


def is_one(size: Any) -> bool:
    """Proved to be one; never adds a guard."""
    return bool(statically_known_true(size == 1))


def same(a: Any, b: Any) -> bool:
    """Two sizes proved equal; never adds a guard."""
    return bool(statically_known_true(a == b))


@contextlib.contextmanager
def no_new_condition(env: ShapeEnv | None) -> Iterator[None]:
    """Refuses what torch can tell only under a condition on sizes that the graph was not captured with: nobody would
    check it when the graph runs.
    """
    if env is None:
        yield
        return
    known, ignored = len(env.guards), env.counter["ignored_backward_guard"]
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "_ShapeEnvGuardError":  # not there in torch 2.11
            raise
        raise Refuse("new_condition", detail=first_line(error)) from error
    finally:  # a call that ends in any other way is not taken either, and nothing of it stays
        new = [guard.expr for guard in env.guards[known:]]
        del env.guards[known:]
        counted = env.counter["ignored_backward_guard"] > ignored
        env.counter["ignored_backward_guard"] = ignored
    if counted and not new:  # torch 2.11: an environment that is closed only counts
        raise Refuse("new_condition", detail="one that torch does not name")
    if any(map(matters, new)):
        raise Refuse("new_condition", detail=", ".join(str(expr) for expr in new if matters(expr)))


def matters(condition: Any) -> bool:
    """A condition on sizes is more than "this size is not 1", under which strides of fake results are computed: they
    are not what the real call goes by.
    """
    return not (getattr(condition, "rel_op", None) == "!=" and condition.rhs in (0, 1))


def plain(size: Any) -> Any:
    """A symbolic size whose expression is a number, as that number."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_Integer:
        return int(size.node.expr)
    return size


def size_text(size: Any) -> Size:
    """A size as a spec keeps it: an integer, or the text of the symbolic expression."""
    size = plain(size)
    return size if isinstance(size, int) else str(size.node.expr)


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def positions(graph: Graph) -> dict[Node, int]:
    """The place of each node in the order of execution."""
    return {node: index for index, node in enumerate(graph.nodes)}


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    """The fake mode that the graph's values live in."""
    for node in graph.nodes:
        val = value(node)
        if isinstance(val, torch.Tensor) and hasattr(val, "fake_mode"):
            mode = val.fake_mode
            assert isinstance(mode, FakeTensorMode)
            return mode
    return None


class Builder:
    """Inserts call_function nodes before one node, each with its fake value and the metadata of the code it serves.

    The values are computed as the graph will compute them (same fake mode, autocast and grad state); nothing is
    guessed, so a call that the operation itself would reject raises here, before the graph is committed.
    """

    def __init__(self, graph: Graph, before: Node, *, mode: FakeTensorMode | None, state: State, like: Node) -> None:
        self.graph = graph
        self.before = before
        self.mode = mode
        self.state = state
        self.like = like
        self.made: list[Node] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """One node calling `target`; arguments may be nodes, numbers and (nested) lists of them."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "attnpass_state"):
            if key in self.like.meta:
                node.meta[key] = self.like.meta[key]
        node.meta["attnpass_made"] = True
        self.made.append(node)
        node.meta["val"] = self._value(node)
        return node

    def size(self, node: Node, dim: int) -> int | Node:
        """The size of a dimension as the tensor itself tells it: a number, or the node of a symbolic one."""
        size = plain(value(node).shape[dim])
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, node, dim)

    def module(self, module: GraphModule) -> Node:
        """One node yielding a function that a call takes as an argument. Whoever puts the graph in place attaches the
        module, which the node itself carries: no graph module has it yet.
        """
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node("get_attr", "attnpass_function")
        node.meta.update(attnpass_made=True, val=module)
        self.made.append(node)
        return node

    def _value(self, node: Node) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
        assert callable(node.target)
        with contextlib.ExitStack() as stack:
            if self.mode is not None:
                stack.enter_context(no_new_condition(self.mode.shape_env))
                # to keep a result torch asks whether it is in channels last: a condition that no result depends on
                stack.enter_context(disable_fake_tensor_cache(self.mode))
                stack.enter_context(self.mode)
                stack.enter_context(enable_python_dispatcher())
                if self.mode.shape_env is not None:
                    stack.enter_context(self.mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(self.state.entered())
            if isinstance(node.target, HigherOrderOperator):
                stack.enter_context(torch.no_grad())  # its autograd traces the functions it is given; values need none
            out = node.target(*args, **kwargs)
            return out.detach() if isinstance(out, torch.Tensor) else out

    def discard(self) -> None:
        """Take back everything that was inserted (nothing outside may use it yet)."""
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()


class Shared:
    """Nodes that several sites of a graph read: each is made once, where the first of them needs it."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, b: Builder, make: Callable[[], Node]) -> Node:
        """The node made for this key, if it is still there and stands before what `b` is building."""
        return self.all(key, b, make, lambda node: (node,))

    def all(self, key: Hashable, b: Builder, make: Callable[[], T], nodes: Callable[[T], Iterable[Node | None]]) -> T:
        """The same for a thing that is made of several nodes."""
        made: T | None = self._made.get(key)
        if made is None or any(n is not None and (n._erased or not n < b.before) for n in nodes(made)):
            made = self._made[key] = make()
        return made


_INDEX = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")
_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:, in (\S+))?')


def module_path(raw: str) -> str:
    """``L['self']._modules['layers']._modules['0'].attn`` -> ``layers.0.attn``."""
    path = _INDEX.sub(r".\1", raw.replace("._modules", "").replace("_modules", ""))
    parts = [part for part in path.split(".") if part]
    if parts and parts[0] == "L":
        parts = parts[2:]
    return ".".join(parts)


def where(node: Node) -> Where:
    """The place in the user's program that a node came from, as far as its metadata tells."""
    module: str | None = None
    cls: str | None = None
    stack = node.meta.get("nn_module_stack")
    if stack:
        raw, kind = list(stack.values())[-1]
        module = module_path(str(raw))
        cls = kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]
    # the innermost frame that is the user's: torch's own wrappers say nothing to him
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH_DIR)] or frames
    if not own:
        return Where(module=module, cls=cls)
    file, line, _ = own[-1]
    code = linecache.getline(file, int(line)).strip() or None
    return Where(module=module, cls=cls, file=file, line=int(line), code=code)


def hint(size: Any) -> int | float | bool | None:
    """A size that is a number, or what a symbol stood for when it was traced; None where neither is known."""
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        size = size.node.hint
    return size if isinstance(size, int | float | bool) else None
