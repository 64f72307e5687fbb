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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnpass import pipeline
from attnpass.capture import aten
from attnpass.capture.calls import worth_lowering
from attnpass.capture.held import Held, Other, candidates, relying
from attnpass.capture.lower import Shadow, Unlowerable, lower
from attnpass.capture.record import not_looked_into, reported, undone, untold, with_lost
from attnpass.capture.splice import Unspliceable, attach, copied, detach, splice
from attnpass.capture.template import guards_known, no_new_guards
from attnpass.capture.values import shape_env
from attnpass.errors import first_line
from attnpass.graph import State
from attnpass.ledger import Failure, Report
from attnpass.pipeline import Outcome
from attnpass.policy import Policy
from attnpass.reasons import reason

if TYPE_CHECKING:
    from attnpass.trial import Examiner, Watch

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
    # Dynamo guards the strides of inputs
    return State(autocast=autocast, grad=torch.is_grad_enabled(), functorch=levels, strides_hold=True)


def process(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    name: str,
    policy: Policy,
    rewrite: bool,
    compiled: bool = False,
    left: Collection[str] = (),
    watch: Watch | None = None,
) -> Processed:
    """Rewrite a Dynamo graph in place (or only decide), and say what became of each softmax; `compiled`: inductor
    will compile it; `left`: sites, by id, that are not to be replaced; `watch` is shown what sites are tried on.
    """
    frame = _Frame(policy=policy, rewrite=rewrite, compiled=compiled, left=left, watch=watch)
    stage = "capture"
    try:
        # fake tensors made in inference mode could not stand for ordinary ones
        state = ambient()
        with torch.inference_mode(False), torch.set_grad_enabled(state.grad), _without_collecting():
            frame.visit(gm, name, state, example_inputs)
        other = frame.other(name)
        stage = "commit"
        frame.commit()
    except Exception as error:
        other = None
        frame.take_back(gm, name, Failure.of(name, stage, error))
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
    left: Collection[str] = ()
    watch: Watch | None = None
    inside: dict[GraphModule, Sequence[Any]] = field(default_factory=dict)  # what graphs inside others are called with
    outcomes: list[Outcome] = field(default_factory=list)
    changed: list[tuple[GraphModule, Graph]] = field(default_factory=list)
    seen: set[GraphModule] = field(default_factory=set)
    told: set[GraphModule] = field(default_factory=set)  # those that have an outcome
    relied: tuple[Held, ...] = ()  # by the graph that was visited first: inputs of those inside it are not known
    unproved: tuple[GraphModule, Graph, Outcome] | None = None  # that graph as it is without relying on anything

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
            self.told.add(gm)
        for path, body in _bodies(gm, state).items():
            if body.module in self.seen:
                continue
            inner = f"{name}.{path}"
            if not body.entered:
                self._leave(body.module, inner, body.why)
                continue
            one_state = len(body.states) == 1
            self._enter(gm, example_inputs, path, body.module)
            self.visit(body.module, inner, body.states[0], grad=body.grad, settled=settled and one_state)
            self.inside.pop(body.module, None)

    def _leave(self, gm: GraphModule, name: str, why: str) -> None:
        self.seen.add(gm)
        self.outcomes.append(not_looked_into(gm, name, reason("not_lowered", detail=why)))
        self.told.add(gm)
        for path, body in _bodies(gm, State()).items():
            if body.module not in self.seen:
                self._leave(body.module, f"{name}.{path}", why)

    def _run(
        self, gm: GraphModule, name: str, state: State, example_inputs: Sequence[Any], *, grad: bool, rewrite: bool
    ) -> Outcome:
        outcome, graph, relied = self._pass(gm, name, state, example_inputs, grad=grad, rewrite=rewrite)
        if graph is not None and relied:
            without, plain, _ = self._pass(gm, name, state, example_inputs, grad=grad, rewrite=rewrite, look=False)
            self.relied, self.unproved = relied, (gm, plain or copied(gm.graph), without)
            # what fails there leaves that graph as it was, and not this one
            apart = (dataclasses.replace(f, part=f.part or f"{name}, when buffers change") for f in without.failures)
            failures = dict.fromkeys((*outcome.failures, *apart))
            outcome = dataclasses.replace(outcome, failures=tuple(failures))
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
                    examiner=self._examiner(gm, shadow, example_inputs, tensors),
                    left=self.left,
                )
            if outcome.failed:
                if not outcome.decisions and not outcome.misses:
                    why = reason("failed", detail=outcome.failures[-1].line)
                    outcome = not_looked_into(gm, name, why, outcome.failures)
                return outcome, None, ()
            outcome, relied = relying(outcome, held, checked=True)
            outcome = with_lost(gm, name, shadow, outcome)
            stage = "splice"
            if outcome.replacements:
                graph = splice(gm.graph, shadow, outcome.replacements)
            if _assumed(env) != assumed:
                raise RuntimeError("the rewrite would hold only under new conditions on sizes")
        except Exception as error:
            text = first_line(error)
            failure = Failure.of(name, stage, error)
            if isinstance(error, Unlowerable | Unspliceable):
                failure = Failure(graph=name, stage=stage, text=text, known=True)
            if not outcome.decisions and not outcome.misses:
                outcome = not_looked_into(gm, name, reason("not_lowered", detail=text), outcome.failures)
            else:
                outcome = undone(outcome, reason("failed", detail=text))
            return dataclasses.replace(outcome, failures=(*outcome.failures, failure)), None, ()
        return outcome, graph, relied

    def _examiner(
        self, gm: GraphModule, shadow: Shadow, inputs: Sequence[Any], known: Mapping[str, torch.Tensor]
    ) -> Examiner | None:
        if not self.policy.verify and self.watch is None:
            return None
        from attnpass.capture.actual import of_shadow
        from attnpass.trial import Examiner

        real = of_shadow(gm, shadow, self.inside.get(gm, inputs))
        return Examiner(real=real, known=known, compiled=self.compiled, watch=self.watch)

    def _enter(self, gm: GraphModule, inputs: Sequence[Any], path: str, body: GraphModule) -> None:
        """Find out what a graph inside gets, to try its sites on."""
        if self.policy.verify or self.watch is not None:
            from attnpass.capture.actual import into

            given = into(gm, self.inside.get(gm, inputs), path)
            if given is not None:
                self.inside[body] = given

    def other(self, name: str) -> Other | None:
        """The graph that relies on no buffer, as a module of its own; before the first one changes."""
        if self.unproved is None:
            return None
        gm, graph, outcome = self.unproved
        clone = aten.clone(gm, graph)
        attach(clone, graph)
        report = dataclasses.replace(self, outcomes=[outcome, *self.outcomes[1:]]).report()
        return Other(self.relied, clone, aten.clone(gm, copied(gm.graph)), report, name)

    def commit(self) -> None:
        """All graphs change, or none."""
        before = [(gm, gm.graph) for gm, _ in self.changed]
        try:
            for gm, graph in self.changed:
                attach(gm, graph)
                gm.graph = graph  # compiles it, too
        except BaseException:
            for (gm, graph), (_, made) in zip(before, self.changed, strict=True):
                detach(gm, made)
                gm.graph = graph
            raise

    def take_back(self, gm: GraphModule, name: str, failure: Failure) -> None:
        """All graphs stay as they were."""
        with contextlib.suppress(Exception):  # what failed may be what would tell
            self.outcomes += untold(gm, name, self.told, reason("not_lowered", detail=failure.line))
        self.outcomes = [undone(outcome, reason("failed", detail=failure.line)) for outcome in self.outcomes]
        self.outcomes.append(Outcome(failures=(failure,)))

    def report(self) -> Report:
        return reported(self.outcomes)


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


def _assumed(env: ShapeEnv | None) -> tuple[int, int]:
    return (len(env.guards), len(env.replacements)) if env is not None else (0, 0)
