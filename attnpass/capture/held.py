"""Masks that a model keeps in a buffer: proved from what the buffer holds now, and watched at every call.

    inputs ── is each buffer still what it was? ──┬── yes: the graph that was proved
                                                  └── no:  the graph in which the mask is data

A buffer may be loaded, written, moved or exchanged at any time, and one compiled graph may serve several models. So the
graph that is compiled for a mask of this content is run only while the content is this: an unseen tensor is read once
and compared with the closed form that the proof used; then its identity, its count of writes and its address tell that
it is still the same. (Shape, strides, dtype and device are in Dynamo's own guards.) The other graph is what the pass
makes of the model without looking into buffers; it is compiled when it is first needed.

One integer alone (the length of a cache) is no mask but a position: it is written at every step, so it stays data.

Limit: a write through ``.data`` or through memory shared with another library is counted nowhere, and is not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import preserve_rng_state
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnpass.capture.lower import Shadow
from attnpass.errors import first_line
from attnpass.graph import module_path
from attnpass.ledger import Decision, Failure, Report
from attnpass.masks.content import Form, forget, form_of, readable
from attnpass.pipeline import Outcome

_REMEMBERED = 4096  # tensors per buffer of the graph: as many models as one compiled graph may serve
_READS = 64  # reading is slow; a buffer that is written before every call is not worth it ...
_CALLS_PER_READ = 32  # ... unless this many calls lie between

Compiled = Callable[..., Any]
Inner = Callable[[GraphModule, Any], Compiled]


@dataclass(frozen=True)
class Held:
    """A tensor that the model holds, what the model calls it, and which input of the graph it is."""

    name: str
    tensor: torch.Tensor
    position: int = -1  # of an exported program nobody asks


@dataclass(frozen=True)
class Other:
    """What stands beside a graph whose proofs rely on buffers: what they have to hold, and the graph for when not."""

    relied: tuple[Held, ...]
    module: GraphModule
    recorded: GraphModule  # as Dynamo recorded it: runs uncompiled, too
    report: Report  # what became of each softmax in `module`
    name: str


def candidates(gm: GraphModule, example_inputs: Sequence[Any], shadow: Shadow) -> dict[str, Held]:
    """The buffers and other tensors that modules hold among a graph's inputs, by the name of their shadow node."""
    if not _may_watch():
        return {}
    forget()
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    found: dict[str, Held] = {}
    for position, (node, tensor) in enumerate(zip(nodes, example_inputs, strict=False)):
        twin = shadow.of.get(node)
        if not isinstance(twin, Node) or not _of_module(node) or not isinstance(tensor, torch.Tensor):
            continue
        if _steady(tensor) and not _counter(tensor):
            found[twin.name] = Held(_name(node), tensor, position)
    return found


def relying(outcome: Outcome, held: Mapping[str, Held], *, checked: bool) -> tuple[Outcome, tuple[Held, ...]]:
    """The outcome that says of each site which buffers it relies on, and all these buffers.

    That one is `checked` at every call is a part of the proof; else it is assumed.
    """

    def said(decision: Decision) -> Decision:
        names = sorted(outcome.relies_on.get(decision.id, ()))
        words = [f"the buffer {held[n].name} holds {form_of(held[n].tensor)}" for n in names]
        if checked:
            told = tuple(f"{one}: checked at every call" for one in words)
            return dataclasses.replace(decision, proofs=(*decision.proofs, *told))
        return dataclasses.replace(decision, assumptions=(*decision.assumptions, *words))

    relied = sorted({name for names in outcome.relies_on.values() for name in names})
    decisions = tuple(map(said, outcome.decisions))
    return dataclasses.replace(outcome, decisions=decisions), tuple(held[name] for name in relied)


def _may_watch() -> bool:
    """Not where the result is to be stored: our check would not be stored with it."""
    from torch._dynamo import config as dynamo_config
    from torch._functorch import config

    stored = (config, "bundled_autograd_cache"), (config, "force_autograd_cache"), (dynamo_config, "caching_precompile")
    return not any(getattr(module, name, False) for module, name in stored)


def _of_module(node: Node) -> bool:
    """Dynamo's own mark of parameters and of tensors that are attributes of modules."""
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _steady(tensor: torch.Tensor) -> bool:
    """A tensor whose writes are counted, and that no optimiser is going to write."""
    plain = not isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
    return plain and not tensor.is_inference() and readable(tensor)


def _counter(tensor: torch.Tensor) -> bool:
    """One integer: a proof from what it holds now would serve one step only. (One float may be a mask's fill.)"""
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return whole and tensor.numel() == 1


def _name(node: Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None) or str(node.target)
    if callable(name):  # a method until torch 2.12
        name = name()
    return module_path(str(name).replace("._buffers", ""))


# -- the check ---------------------------------------------------------------------------------------------------------


class Watched:
    """One input of the graph, and the tensors seen there that hold what was proved (or do not)."""

    def __init__(self, held: Held) -> None:
        form = form_of(held.tensor)
        assert form is not None
        self.position = held.position
        self.form: Form = form
        self.seen: dict[int, tuple[weakref.ref[Any], int, int, bool]] = {}
        self.read(held.tensor)

    def read(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor holds what was proved; what cannot be read does not."""
        if not _steady(tensor) or _capturing(tensor):
            return False
        version, address = tensor._version, tensor.data_ptr()  # as they are before it is read
        holds = form_of(tensor) == self.form
        if len(self.seen) >= _REMEMBERED:
            self.seen.clear()
        key, seen = id(tensor), self.seen
        ref = weakref.ref(tensor, lambda _: seen.pop(key, None))
        self.seen[key] = (ref, version, address, holds)
        return holds


def _capturing(tensor: torch.Tensor) -> bool:
    """While a CUDA graph is recorded nothing can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def guarded(proved: Compiled, other: Compiled, watched: Sequence[Watched]) -> Compiled:
    """Calls `proved` while everything that it relies on holds what was proved, else `other`."""
    places = [(one.position, one.seen) for one in watched]
    calls = reads = 0

    def look(args: Sequence[Any]) -> bool:
        """At least one tensor is new, or has been written."""
        nonlocal reads
        if reads > _READS + calls // _CALLS_PER_READ:
            return False
        reads += 1
        try:
            return all(_known(one, args[one.position]) for one in watched)
        except Exception:  # a tensor that is no ordinary one here and now
            return False

    def run(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        for position, seen in places:
            tensor = args[position]
            entry = seen.get(id(tensor))
            if (
                entry is None
                or tensor._version != entry[1]
                or tensor.data_ptr() != entry[2]
                or entry[0]() is not tensor
            ):
                return proved(*args) if look(args) else other(*args)
            if not entry[3]:
                return other(*args)
        return proved(*args)

    return run


def _known(one: Watched, tensor: torch.Tensor) -> bool:
    entry = one.seen.get(id(tensor))
    if entry is not None and entry[0]() is tensor and entry[1:3] == (tensor._version, tensor.data_ptr()):
        return entry[3]
    return one.read(tensor)


def ready(
    gm: GraphModule, report: Report, other: Other | None, example_inputs: Sequence[Any], inner: Inner
) -> tuple[Report, Callable[[], Compiled]]:
    """What became of a graph, and how it is compiled: behind its check, where it has one. Never raises.

    Where the check cannot be made, nobody would see that a buffer has changed: then the graph that relies on none.
    """
    if other is None:
        return report, lambda: inner(gm, example_inputs)
    try:
        later = Later(other, example_inputs, inner)
        watched = [Watched(held) for held in other.relied]
    except Exception as error:
        names = ", ".join(held.name for held in other.relied)
        failure = Failure.of(other.name, "watch", error, f"{other.name}, {names}")
        report = dataclasses.replace(other.report, failures=(*other.report.failures, failure))
        return report, lambda: inner(other.module, example_inputs)

    def compiled() -> Compiled:
        proved = inner(gm, example_inputs)
        try:
            return guarded(proved, later, watched)
        except Exception:
            return later  # right whatever buffers hold

    return report, compiled


# -- the other graph ---------------------------------------------------------------------------------------------------


class Later:
    """A graph that is compiled at its first call, as it would have been while Dynamo was at work.

    Its inputs are kept as fake tensors, with the sizes that Dynamo saw: compilers look at them. Dynamo's guards are
    settled by then, so what compiling would still require of sizes could not be checked; such a graph is run
    uncompiled, and so is one that does not compile.
    """

    def __init__(self, other: Other, example_inputs: Sequence[Any], inner: Inner) -> None:
        context = TracingContext.get()
        assert context.fake_mode is not None
        self.other = other
        self.inner = inner
        self.env = context.fake_mode.shape_env
        self.mode = FakeTensorMode(shape_env=self.env)
        self.inputs = [_faked(x, self.mode, context) for x in example_inputs]
        self.compilation = CompileContext.try_get()
        self.lock = threading.Lock()
        self.compiled: Compiled | None = None

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            with self.lock:
                if self.compiled is None:
                    self.compiled = self._compiled()
        return self.compiled(*args)

    def _compiled(self) -> Compiled:
        try:
            with (
                compile_context(self.compilation),
                tracing(TracingContext(self.mode)),
                preserve_rng_state(),
                _conditions(self.env) as new,
            ):
                compiled = self.inner(self.other.module, self.inputs)
            if not new:
                return compiled
            why = f"compiled now, it would hold only where {', '.join(new)}"
        except Exception as error:
            why = first_line(error)
        warnings.warn(f"attnpass: a mask in a buffer has changed, and the graph runs uncompiled: {why}", stacklevel=3)
        return self.other.recorded.forward


def _faked(x: Any, mode: FakeTensorMode, context: TracingContext) -> Any:
    """An input as Dynamo described it, without its memory."""
    if not isinstance(x, torch.Tensor):
        return x
    symbols = context.tensor_to_context.get(x)  # type: ignore[no-untyped-call]
    return mode.from_tensor(x, symbolic_context=symbols, source=symbols.tensor_source if symbols else None, trace=False)


@contextlib.contextmanager
def _conditions(env: ShapeEnv | None) -> Iterator[list[str]]:
    """What is asked of sizes inside; filled in at the end.

    They are recorded although Dynamo has frozen its own record: code that was compiled under a condition goes into
    torch's caches together with it.
    """
    new: list[str] = []
    if env is None:
        yield new
        return
    guards, replaced, frozen = [str(guard.expr) for guard in env.guards], set(env.replacements), env.frozen
    env.frozen = False
    try:
        yield new
    finally:
        env.frozen = frozen
        asked = dict.fromkeys(str(guard.expr) for guard in env.guards[len(guards) :])
        new += [expr for expr in asked if expr not in guards]
        new += [f"{symbol} is {env.replacements[symbol]}" for symbol in env.replacements if symbol not in replaced]
