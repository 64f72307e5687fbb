"""One graph that Dynamo captured, and the graphs inside it, through the pass.

    graph ── lower ── pipeline.run ── splice into a copy ──┐
      └─ bodies of checkpoint, cond ...: the same          ├── all graphs change together, at the very end
                                                           ┘
Whatever fails before that end leaves the graph concerned as it was and is a Failure in the report; nothing raises.
Bodies of other higher-order operations (loops, scans, autograd.Function, flex_attention ...) are left alone, and so is
what runs under vmap; a softmax in them is a miss that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnpass import pipeline
from attnpass.capture import aten
from attnpass.capture.calls import is_softmax, worth_lowering
from attnpass.capture.held import Held, Other, candidates, relying
from attnpass.capture.lower import Shadow, lower
from attnpass.capture.splice import attach, copied, splice
from attnpass.capture.template import guards_known, no_new_guards
from attnpass.capture.values import shape_env
from attnpass.errors import first_line
from attnpass.graph import State, where
from attnpass.ledger import Failure, Miss, Report
from attnpass.pipeline import Outcome
from attnpass.policy import Policy
from attnpass.reasons import Reason, reason

# Higher-order operations that run their bodies once, as if written in their place.
_ENTERED = frozenset(
    {
        "cond",
        "invoke_subgraph",
        "tag_activation_checkpoint",
        "wrap",
        "wrap_activation_checkpoint",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)


def ambient() -> State:
    """The state in which a graph compiled now will run."""
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        devices.append(accelerator.type)
    autocast = tuple(
        (device, torch.get_autocast_dtype(device), True) for device in devices if torch.is_autocast_enabled(device)
    )
    levels = int(torch._C._functorch.peek_interpreter_stack() is not None)
    levels += int(torch.autograd.forward_ad._current_level >= 0)
    return State(autocast=autocast, grad=torch.is_grad_enabled(), functorch=levels)


def process(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    name: str,
    policy: Policy,
    rewrite: bool,
    compiled: bool = False,
) -> Processed:
    """Rewrite a Dynamo graph in place (or only decide), and say what became of each softmax; `compiled`: inductor
    will compile it.
    """
    frame = _Frame(policy=policy, rewrite=rewrite, compiled=compiled)
    try:
        # fake tensors made in inference mode could not stand for ordinary ones
        state = ambient()
        with torch.inference_mode(False), torch.set_grad_enabled(state.grad), _without_collecting():
            frame.visit(gm, name, state, example_inputs)
        other = frame.other()
        frame.commit()
    except Exception as error:
        other = None
        frame.take_back(name, "commit", error)
    return Processed(frame.report(), other)


@dataclass(frozen=True)
class Processed:
    """What became of a graph, and what to run in its place while buffers do not hold what was proved of them."""

    report: Report
    other: Other | None


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Graphs of many nodes are made here, and none is garbage before the end."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@dataclass
class _Frame:
    policy: Policy
    rewrite: bool
    compiled: bool
    outcomes: list[Outcome] = field(default_factory=list)
    changed: list[tuple[GraphModule, Graph]] = field(default_factory=list)
    seen: set[GraphModule] = field(default_factory=set)
    relied: tuple[Held, ...] = ()  # by the graph that was visited first: inputs of those inside it are not known
    unproved: tuple[GraphModule, Graph] | None = None  # that graph as it is without relying on anything

    def visit(
        self,
        gm: GraphModule,
        name: str,
        state: State,
        example_inputs: Sequence[Any] = (),
        *,
        grad: bool = False,
        settled: bool = True,
    ) -> None:
        """One graph, then those inside it. `grad`: gradients may flow through its inputs; `settled`: it runs under
        this state only.
        """
        self.seen.add(gm)
        if worth_lowering(gm):
            outcome = self._run(gm, name, state, example_inputs, grad=grad, rewrite=self.rewrite and settled)
            self.outcomes.append(outcome if settled else undone(outcome, reason("mixed_state")))
        for path, body in _bodies(gm, state).items():
            if body.module in self.seen:
                continue
            inner = f"{name}.{path}"
            if not body.entered:
                self._leave(body.module, inner, body.why)
                continue
            one_state = len(body.states) == 1
            self.visit(body.module, inner, body.states[0], grad=body.grad, settled=settled and one_state)

    def _leave(self, gm: GraphModule, name: str, why: str) -> None:
        self.seen.add(gm)
        self.outcomes.append(_all_missed(gm, name, why))
        for path, body in _bodies(gm, State()).items():
            if body.module not in self.seen:
                self._leave(body.module, f"{name}.{path}", why)

    def _run(
        self, gm: GraphModule, name: str, state: State, example_inputs: Sequence[Any], *, grad: bool, rewrite: bool
    ) -> Outcome:
        outcome, graph, relied = self._pass(gm, name, state, example_inputs, grad=grad, rewrite=rewrite)
        if graph is not None and relied:
            _, plain, _ = self._pass(gm, name, state, example_inputs, grad=grad, rewrite=rewrite, look=False)
            self.relied, self.unproved = relied, (gm, plain or copied(gm.graph))
        if graph is not None:
            self.changed.append((gm, graph))
        return outcome

    def _pass(
        self,
        gm: GraphModule,
        name: str,
        state: State,
        example_inputs: Sequence[Any],
        *,
        grad: bool,
        rewrite: bool,
        look: bool = True,
    ) -> tuple[Outcome, Graph | None, tuple[Held, ...]]:
        """What to replace, the graph with it (where there is anything), and the buffers that this relies on.

        `look`: into the buffers that the model holds.
        """
        outcome = Outcome()
        graph: Graph | None = None
        relied: tuple[Held, ...] = ()
        stage = "lower"
        try:
            env = shape_env(gm.graph)
            assumed = _assumed(env)
            with guards_known(env):
                shadow = lower(gm, state, example_inputs)
            if grad:
                aten.mark_inputs(shadow.graph)
            stage = "recognize"
            held = candidates(gm, example_inputs, shadow) if look else {}
            tensors = {node: one.tensor for node, one in held.items()}
            with no_new_guards(env):
                outcome = pipeline.run(
                    shadow.graph,
                    name=name,
                    policy=self.policy,
                    state=state,
                    rewrite=rewrite,
                    held=tensors,
                    compiled=self.compiled,
                )
            outcome, relied = relying(outcome, held, checked=True)
            outcome = _with_lost(gm, name, shadow, outcome)
            stage = "splice"
            if outcome.replacements:
                graph = splice(gm.graph, shadow, outcome.replacements)
            if _assumed(env) != assumed:
                raise RuntimeError("the rewrite would hold only under new conditions on sizes")
        except Exception as error:
            text = first_line(error)
            failure = Failure(graph=name, stage=stage, text=text)
            if stage == "lower":
                outcome = _all_missed(gm, name, text)
            else:
                outcome = undone(outcome, reason("failed", detail=text))
            return dataclasses.replace(outcome, failures=(*outcome.failures, failure)), None, ()
        return outcome, graph, relied

    def other(self) -> Other | None:
        """The graph that relies on no buffer, as a module of its own; before the first one changes."""
        if self.unproved is None:
            return None
        gm, graph = self.unproved
        clone = aten.clone(gm, graph)
        attach(clone, graph)
        return Other(self.relied, clone, aten.clone(gm, copied(gm.graph)))

    def commit(self) -> None:
        """All graphs change, or none."""
        before = [(gm, gm.graph) for gm, _ in self.changed]
        try:
            for gm, graph in self.changed:
                attach(gm, graph)
                gm.graph = graph  # compiles it, too
        except BaseException:
            for gm, graph in before:
                gm.graph = graph
            raise

    def take_back(self, name: str, stage: str, error: Exception) -> None:
        text = first_line(error)
        self.outcomes = [undone(outcome, reason("failed", detail=text)) for outcome in self.outcomes]
        self.outcomes.append(Outcome(failures=(Failure(graph=name, stage=stage, text=text),)))

    def report(self) -> Report:
        return Report(
            torch=torch.__version__,
            sites=tuple(site for outcome in self.outcomes for site in outcome.decisions),
            misses=tuple(miss for outcome in self.outcomes for miss in outcome.misses),
            failures=tuple(failure for outcome in self.outcomes for failure in outcome.failures),
            notes=tuple(note for outcome in self.outcomes for note in outcome.notes),
        )


# -- bodies ------------------------------------------------------------------------------------------------------------


@dataclass
class _Body:
    module: GraphModule
    states: list[State] = field(default_factory=list)
    grad: bool = False
    entered: bool = True
    why: str = ""


def _bodies(gm: GraphModule, state: State) -> dict[str, _Body]:
    """The graphs inside a graph, by the attribute that holds them, and how they are called."""
    found: dict[str, _Body] = {}
    for node, here in aten.states(gm.graph, state):
        if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            name = node.target.__name__
            for operand in node.all_input_nodes:
                module = _module(gm, operand)
                if module is None:
                    continue
                body = found.setdefault(str(operand.target), _Body(module))
                inside = aten.state_inside(node, here)
                if inside not in body.states:
                    body.states.append(inside)
                body.grad |= any(_needs_grad(arg) for arg in node.all_input_nodes)
                why = _why_not_entered(name, inside, body)
                if why is not None:
                    body.entered, body.why = False, why
    return found


def _why_not_entered(name: str, state: State, body: _Body) -> str | None:
    if name not in _ENTERED:
        return f"inside {name}"
    if state.functorch:
        return "inside vmap, grad or another functorch transform"
    if name == "invoke_subgraph" and state.grad and body.grad:
        # seen with inductor on torch 2.13, the model itself calling scaled_dot_product_attention
        return "inside a nested compile region, where inductor gets the gradients of a fused call wrong"
    return None


def _module(gm: GraphModule, node: Node) -> GraphModule | None:
    if node.op != "get_attr":
        return None
    held: Any = gm
    for name in str(node.target).split("."):
        held = getattr(held, name, None)
    return held if isinstance(held, GraphModule) else None


def _needs_grad(node: Node) -> bool:
    held = node.meta.get("example_value")
    return isinstance(held, torch.Tensor) and held.requires_grad


# -- the record --------------------------------------------------------------------------------------------------------


def _with_lost(gm: GraphModule, name: str, shadow: Shadow, outcome: Outcome) -> Outcome:
    """The outcome with the softmaxes that never got into the shadow."""
    why = {
        node: reason("functorch") if shadow.states[node].functorch else reason("not_lowered", detail=text)
        for node, text in shadow.opaque.items()
    }
    lost = _misses(gm, name, why, start=len(outcome.misses))
    return dataclasses.replace(outcome, misses=(*outcome.misses, *lost))


def _misses(gm: GraphModule, name: str, why: Mapping[Node, Reason], start: int = 0) -> tuple[Miss, ...]:
    softmaxes = (node for node in gm.graph.nodes if node in why and is_softmax(gm, node))
    return tuple(
        Miss(id=f"{name}.m{number}", graph=name, where=where(node), reached=(), reason=why[node])
        for number, node in enumerate(softmaxes, start)
    )


def _all_missed(gm: GraphModule, name: str, text: str) -> Outcome:
    """The outcome of a graph that was not looked into."""
    return Outcome(misses=_misses(gm, name, dict.fromkeys(gm.graph.nodes, reason("not_lowered", detail=text))))


def undone(outcome: Outcome, why: Reason) -> Outcome:
    """The outcome of a graph that stays as it was: its sites are known, none is replaced."""
    decisions = tuple(
        dataclasses.replace(one, replaced=False, kernel=None, reason=why) if one.replaced else one
        for one in outcome.decisions
    )
    return dataclasses.replace(outcome, decisions=decisions, replacements=())


def _assumed(env: ShapeEnv | None) -> tuple[int, int]:
    return (len(env.guards), len(env.replacements)) if env is not None else (0, 0)
