"""The torch.export front: a rewritten copy of an ExportedProgram, or of a GraphModule of ATen operations.

    program ── copy of each graph, bodies included ── pipeline.run ── sweep, lint ── new program ── _validate

The original is never touched: the copy has graphs of its own and shares the weights. Each graph is rewritten whole or
left as it was: whatever fails in one (the pass, the sweep, a guard that the rewrite would have added) is a Failure in
the report, and that graph comes out as it went in. The rewritten program needs nothing of this package to be saved,
loaded, compiled or run.

Left alone: graphs of Python calls (refused with advice), and a body that is called under two autocast or grad states
(decided, not rewritten, because one graph cannot serve both).
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnpass import pipeline
from attnpass.ambient import resolved
from attnpass.capture import actual, aten, fence
from attnpass.capture.held import Held, relying
from attnpass.capture.record import not_looked_into, reported, undone, untold
from attnpass.demands import insist, unmatched
from attnpass.errors import AttnpassError, first_line
from attnpass.graph import State, fake_mode_of, matters
from attnpass.ledger import Failure, Report
from attnpass.masks.content import forget
from attnpass.masks.writes import Writes
from attnpass.pipeline import Outcome, Replacement
from attnpass.policy import Policy
from attnpass.reasons import reason
from attnpass.recognize.gradients import mark_gradients
from attnpass.recognize.purity import Effects
from attnpass.warn import of_failures

if TYPE_CHECKING:
    from attnpass.trial import Examiner

Program = TypeVar("Program", ExportedProgram, GraphModule)


@overload
def rewrite(
    program: ExportedProgram, *, policy: Policy | None = ..., example_inputs: Sequence[Any] | None = ...
) -> tuple[ExportedProgram, Report]: ...
@overload
def rewrite(
    program: GraphModule, *, policy: Policy | None = ..., example_inputs: Sequence[Any] | None = ...
) -> tuple[GraphModule, Report]: ...
def rewrite(
    program: ExportedProgram | GraphModule,
    *,
    policy: Policy | None = None,
    example_inputs: Sequence[Any] | None = None,
) -> tuple[ExportedProgram | GraphModule, Report]:
    """A copy with every attention replaced that can be, and the report; `example_inputs` only for a GraphModule that
    carries no shapes.
    """
    job = _Job(resolved(policy), rewrite=True, inputs=actual.of_call(program, example_inputs))
    done: ExportedProgram | GraphModule
    if isinstance(program, ExportedProgram):
        done, report = _rewrite_program(program, job)
    else:
        done, report = _process_traced(program, example_inputs, job), job.report()
    of_failures(report)
    insist(job.policy, report)
    return done, fence.told(report, fence.UNFENCED)


def audit(
    program: ExportedProgram | GraphModule,
    *,
    policy: Policy | None = None,
    example_inputs: Sequence[Any] | None = None,
) -> Report:
    """What `rewrite` would do, and why; nothing is changed."""
    job = _Job(resolved(policy), rewrite=False, inputs=actual.of_call(program, example_inputs))
    if isinstance(program, ExportedProgram):
        job.read(program)
        job.process(program.graph_module, "program", State())
    else:
        _process_traced(program, example_inputs, job)
    report = job.report()
    insist(job.policy, report)
    return report


def verify(
    program: ExportedProgram | GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], policy: Policy | None = None
) -> Report:
    """What `rewrite` does with ``verify=True`` on these arguments; the program stays as it is. Without arguments those
    that it was exported with are taken.
    """
    job = _Job(dataclasses.replace(resolved(policy), verify=True), rewrite=True)
    job.inputs = actual.of_call(program, (args, kwargs) if args or kwargs else None)
    if isinstance(program, ExportedProgram):
        if job.inputs is None and (args or kwargs):
            raise AttnpassError("the program does not take these arguments; it was exported for others")
        report = _rewrite_program(program, job)[1]
    else:
        _process_traced(program, args or None, job)
        report = job.report()
    insist(job.policy, report)
    return report


def _prepared(program: GraphModule, example_inputs: Sequence[Any] | None) -> GraphModule:
    if not isinstance(program, GraphModule):
        raise AttnpassError(
            f"cannot rewrite {type(program).__name__}; export it first (torch.export.export(model, args)), "
            "or compile it (torch.compile(model, backend='attnpass'))"
        )
    aten.require_aten(program)
    gm = aten.with_values(program, example_inputs)
    aten.require_aten(gm)  # with values known, operators on tensors show
    return gm


def _process_traced(program: GraphModule, example_inputs: Sequence[Any] | None, job: _Job) -> GraphModule:
    gm = _prepared(program, example_inputs)
    return job.process(gm, "graph", State(), grad=_asked(gm))


def _asked(gm: GraphModule) -> bool:
    """Gradients may be asked for of any input: what make_fx traces does not say of which, unless a value does."""
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    return torch.is_grad_enabled() and not any(isinstance(x, torch.Tensor) and x.requires_grad for x in values)


def _rewrite_program(program: ExportedProgram, job: _Job) -> tuple[ExportedProgram, Report]:
    try:
        job.read(program)
        gm = job.process(program.graph_module, "program", State())
        new = _with_graph(program, gm)
        new._validate()  # type: ignore[no-untyped-call]
        return new, job.report()
    except Exception as error:  # torch's verifier, or ours: the user gets an intact copy and the reason
        job.outcomes += untold(program.graph_module, "program", job.told, reason("failed", detail=first_line(error)))
        intact = aten.clone(program.graph_module, aten.copy_graph(program.graph))
        return _with_graph(program, intact), job.report(invalid=error)


def _with_graph(program: ExportedProgram, gm: GraphModule) -> ExportedProgram:
    with warnings.catch_warnings():
        # torch copies its own tree specs, and warns of its own class (2.13)
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        return program._update(gm, copy.deepcopy(program.graph_signature))


def _constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Literals (``torch.tensor(1e-4)`` in the code) that export lifted into constant inputs.

    Unlike buffers they are no state of the model: nothing outside the program holds them.
    """
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    found = {name: program.constants.get(target) for name, target in lifted.items()}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _buffers(program: ExportedProgram) -> dict[str, Held]:
    """What the program's buffers hold now, without those that are written after each call."""
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    values = {**program.constants, **program.state_dict}
    found = {name: (target, values.get(target)) for name, target in signature.inputs_to_buffers.items()}
    return {
        name: Held(target, tensor)
        for name, (target, tensor) in found.items()
        if isinstance(tensor, torch.Tensor) and target not in written
    }


def _number(tensor: torch.Tensor | None) -> float | None:
    plain = tensor is not None and tensor.numel() == 1 and not tensor.is_complex()
    return float(tensor.item()) if plain and tensor is not None else None


def _names_kept(program: ExportedProgram) -> Iterable[str]:
    """Names by which the program's signatures refer to nodes of the top graph."""
    signature = program.graph_signature
    specs: list[Any] = [*signature.input_specs, *signature.output_specs]
    arguments: list[Any] = [spec.arg for spec in specs]
    for entry in program.module_call_graph:
        if entry.signature is not None:
            arguments += [*entry.signature.inputs, *entry.signature.outputs]
    for argument in arguments:
        name = getattr(argument, "name", None)
        if name:
            yield name


@dataclass
class _Job:
    """One walk over a program's graphs, and what it has gathered."""

    policy: Policy
    rewrite: bool
    named: frozenset[str] = frozenset()  # nodes of the top graph that signatures name
    constants: dict[str, torch.Tensor] = field(default_factory=dict)  # inputs of the top graph: literals of the code
    buffers: dict[str, Held] = field(default_factory=dict)  # ... and buffers of the model
    outcomes: list[Outcome] = field(default_factory=list)
    told: set[GraphModule] = field(default_factory=set)  # those that have an outcome
    inputs: list[Any] | None = None  # of the top graph, to try sites on

    def read(self, program: ExportedProgram) -> None:
        """What a program says beside its graphs. Without the names that are kept it cannot be rewritten."""
        self.named = frozenset(_names_kept(program))
        try:
            self.constants, self.buffers = _constants(program), _buffers(program)
        except Exception as error:  # then they are data
            self.constants, self.buffers = {}, {}
            self.outcomes.append(Outcome(failures=(Failure.of("program", "capture", error, "constants"),)))

    def process(
        self, gm: GraphModule, name: str, state: State, *, settled: bool = True, grad: bool = False
    ) -> GraphModule:
        """A copy of `gm` with its graph and those inside it rewritten, or as they were.

        `settled`: it runs under this state only. `grad`: gradients may flow back through what it is called with.
        """
        before = len(self.outcomes)
        try:
            return self._process(gm, name, state, settled=settled, grad=grad)
        except Exception as error:
            failure = Failure.of(name, "capture", error)
            why = reason("failed", detail=failure.line)
            self.outcomes[before:] = [undone(outcome, why) for outcome in self.outcomes[before:]]
            self.outcomes.append(Outcome(failures=(failure,)))
            self.outcomes += untold(gm, name, self.told, why)
            return aten.clone(gm, aten.copy_graph(gm.graph))

    def _process(self, gm: GraphModule, name: str, state: State, *, settled: bool, grad: bool) -> GraphModule:
        candidate = aten.copy_graph(gm.graph)
        aten.mark_states(candidate, state)
        if grad:
            aten.mark_inputs(candidate)
        if "." not in name:
            for node in candidate.nodes:
                number = _number(self.constants.get(node.name)) if node.op == "placeholder" else None
                if number is not None:
                    node.meta["attnpass_constant"] = number
        # read from the original: a fused site never holds a call of a body
        bodies = list(aten.bodies(gm, state))
        flows = _flowing(candidate, state) if bodies else frozenset()
        outcome = self._run(gm, candidate, name, state, rewrite=self.rewrite and settled)
        if not settled:
            outcome = undone(outcome, reason("mixed_state"))
        if outcome.failed:
            candidate = aten.copy_graph(gm.graph)
            if not outcome.decisions and not outcome.misses:
                why = reason("failed", detail=outcome.failures[-1].line)
                outcome = not_looked_into(gm, name, why, outcome.failures)
        aten.unmark(candidate)
        self.outcomes.append(outcome)
        self.told.add(gm)
        new = aten.clone(gm, candidate)
        for body in bodies:
            inner = self.process(
                body.module,
                f"{name}.{body.path}",
                body.states[0],
                settled=settled and len(body.states) == 1,
                grad=not flows.isdisjoint(body.operands),
            )
            aten.put_module(new, body.path, inner)
        return new

    def _run(self, gm: GraphModule, graph: Graph, name: str, state: State, *, rewrite: bool) -> Outcome:
        """The pass on one graph in place; after a failure nothing is replaced and the graph is not to be used."""
        guards = _Guards.of(graph)
        outcome = Outcome()
        try:
            constants = {} if "." in name else self.constants
            held = {} if "." in name else self._trusted(graph)
            outcome = pipeline.run(
                graph,
                name=name,
                policy=self.policy,
                state=state,
                rewrite=rewrite,
                constants=constants,
                held={node: one.tensor for node, one in held.items()},
                examiner=self._examiner(gm, graph, name) if self.policy.verify else None,
            )
            outcome, _ = relying(outcome, held, checked=False)
            sweep(graph, outcome.replacements, self.named if "." not in name else frozenset())
            graph.lint()
            guards.check()
        except Exception as error:
            failure = Failure.of(name, "export", error)
            outcome = undone(outcome, reason("failed", detail=first_line(error)))
            outcome = dataclasses.replace(outcome, failures=(*outcome.failures, failure))
        return outcome

    def _examiner(self, gm: GraphModule, graph: Graph, name: str) -> Examiner:
        from attnpass.trial import Examiner

        if "." in name:
            return Examiner()
        known = {node: held.tensor for node, held in self.buffers.items()} | self.constants
        real = actual.of_program(gm, graph, self.inputs) if self.inputs is not None else None
        return Examiner(real=real, fixed=frozenset(self.constants), known=known)

    def _trusted(self, graph: Graph) -> dict[str, Held]:
        """Nobody will look at the buffers of a program again, so their content is an assumption, made on request."""
        if not self.policy.trust_buffers or self.policy.strict:
            return {}
        forget()
        writes = Writes(graph)
        written = {node.name for node in graph.nodes if node.op == "placeholder" and writes.to(node)}
        return {name: held for name, held in self.buffers.items() if name not in written}

    def report(self, *, invalid: Exception | None = None) -> Report:
        """What became of all graphs; `invalid`: why none of them was changed after all."""
        outcomes, failures = self.outcomes, tuple[Failure, ...]()
        if invalid is not None:
            why = reason("verify_failed", detail=first_line(invalid))
            outcomes = [undone(outcome, why) for outcome in outcomes]
            failures = (Failure.of("program", "validate", invalid),)
        report = reported(outcomes, failures)
        return dataclasses.replace(report, notes=(*report.notes, *unmatched(self.policy, report)))


def _flowing(graph: Graph, state: State) -> frozenset[str]:
    """The nodes that gradients may flow back through."""
    mark_gradients(graph, state, Effects(graph))
    return frozenset(node.name for node in graph.nodes if node.meta["attnpass_grad"])


def sweep(graph: Graph, replacements: Sequence[Replacement], named: frozenset[str] = frozenset()) -> None:
    """Erase what the rewrite left without readers; nothing else, however dead it looks.

    Where a signature names a site's old output, the fused node takes the name over; other named nodes stay.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    heirs = {one.output: one.fused for one in replacements}
    dead = {node for one in replacements for node in (*one.dead, one.output)}
    for node in sorted(dead, key=order.__getitem__, reverse=True):
        if node.users or node.op in ("placeholder", "output"):
            continue
        heir = heirs.get(node)
        if node.name in named and heir is None:
            continue
        graph.erase_node(node)
        if node.name in named and heir is not None:
            heir.name = node.name


@dataclass(frozen=True)
class _Guards:
    """What the shape environment had assumed before the pass: a rewrite may not assume more, nobody would check it."""

    env: ShapeEnv | None
    guards: int
    replacements: int

    @classmethod
    def of(cls, graph: Graph) -> _Guards:
        mode = fake_mode_of(graph)
        env = mode.shape_env if mode is not None else None
        return cls(env, len(env.guards), len(env.replacements)) if env is not None else cls(None, 0, 0)

    def check(self) -> None:
        """Put the environment back, which the original shares, and raise if something was assumed that matters."""
        if self.env is None:
            return
        new = [guard.expr for guard in self.env.guards[self.guards :]]
        del self.env.guards[self.guards :]
        assumed = [str(expr) for expr in new if matters(expr)]
        if assumed or len(self.env.replacements) != self.replacements:
            raise RuntimeError(f"the rewrite would hold only under a new condition on sizes: {', '.join(assumed)}")
