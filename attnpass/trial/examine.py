"""The trial of every replaced site of one graph, one site at a time.

    real run of the graph ── stops before each site ── pair ── run both, and float64 ── compare ── Tried

A site that is worse than its original is to be put back; the caller does that. Two results are not held against a
site: what a query without any key gets where the user does not care (``empty_rows="dont_care"``), and NaN or infinity
in keys that no query sees. Fused kernels multiply before they mask, so that becomes an assumption, which ``strict``
refuses.

Everything runs in a thread of its own, so that nothing of the compilation that this is part of is seen or changed, and
with the random number generators put back afterwards. Sites that are spelled alike are tried on made-up inputs once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from attnpass.aside import aside
from attnpass.errors import first_line
from attnpass.graph import State
from attnpass.ledger import Trial
from attnpass.masks.writes import Writes
from attnpass.recognize.meaning import NO_GRADIENT
from attnpass.trial import inputs
from attnpass.trial.compare import Gap, gap, largest, weights
from attnpass.trial.inputs import Given, Values, copied
from attnpass.trial.pair import Built, Pair, Untried, paired

Found = Callable[[Node, Values], None]
Real = Callable[[Mapping[Node, Sequence[Node]], Found], None]
"""Runs the graph on real inputs; before each of the nodes it calls back with the values of the others named there."""

Watch = Callable[[Built, Pair, Given, Sequence[Trial]], None]

RESULT, GRADIENT = "result", "gradient"
_REFUSED = (IndexError, RuntimeError, ValueError)  # what operations raise on inputs that they do not take
_LARGEST = 2**28  # scores; in float64 they take 2 GiB, and several such tensors are needed


@dataclass(frozen=True)
class Tried:
    """What came of one site."""

    trials: tuple[Trial, ...] = ()
    untried: str | None = None  # why there is less than there could be

    @property
    def worse(self) -> Trial | None:
        """The worst of those for which the site is to be put back."""
        bad = [t for t in self.trials if t.worse and t.inputs not in inputs.PADDING]
        return max(bad, key=lambda t: t.replacement / t.allowed if t.allowed else t.replacement, default=None)

    @property
    def unclean(self) -> Trial | None:
        """NaN or infinity in keys that nobody sees comes through."""
        return next((t for t in self.trials if t.worse and t.inputs in inputs.PADDING), None)


@dataclass(kw_only=True)
class Examiner:
    """Where real values come from, and what is known without them."""

    real: Real | None = None
    fixed: frozenset[str] = frozenset()  # inputs whose content is part of what was proved
    known: Mapping[str, Tensor] = field(default_factory=dict)  # what inputs hold
    compiled: bool = False  # the graph will be compiled by inductor
    watch: Watch | None = None  # is shown every set of inputs

    def __call__(self, graph: Graph, built: Sequence[Built]) -> dict[str, Tried]:
        """By the id of the site. Raises nothing: what goes wrong is why a site is untried."""
        return aside(_Examination(self, graph).run, built)


class _Examination:
    def __init__(self, asked: Examiner, graph: Graph) -> None:
        self.asked = asked
        self.graph = graph
        self.alike: dict[Any, tuple[Trial, ...]] = {}
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.tried: dict[str, Tried] = {}

    def run(self, built: Sequence[Built]) -> dict[str, Tried]:
        cuda = {n.meta["val"].device for n in self.graph.nodes if getattr(n.meta.get("val"), "is_cuda", False)}
        with torch.random.fork_rng(sorted({device.index or 0 for device in cuda})):
            try:
                self._run(built)
            except Exception as error:
                self.tried |= {one.id: Tried(untried=_why(error)) for one in built if one.id not in self.tried}
        return self.tried

    def _run(self, built: Sequence[Built]) -> None:
        writes = Writes(self.graph)
        pairs: dict[Node, tuple[Built, Pair]] = {}
        for one in built:
            try:
                pair = paired(self.graph, one, writes, self.asked.fixed)
                _small_enough(pair)
                pairs[pair.site.output] = (one, pair)
            except Exception as error:
                self.tried[one.id] = Tried(untried=_why(error))
        no_run = None if self.asked.real else "no inputs to run the model on are known here"
        if self.asked.real is not None:

            def found(output: Node, values: Values) -> None:
                one, pair = pairs[output]
                self.tried[one.id] = self._site(one, pair, values, None)

            try:
                self.asked.real({output: pair.leaves for output, (_, pair) in pairs.items()}, found)
            except Exception as error:
                no_run = f"the model could not be run here: {first_line(error)}"
        for one, pair in pairs.values():
            if one.id not in self.tried:
                self.tried[one.id] = self._site(one, pair, None, no_run)

    def _site(self, one: Built, pair: Pair, real: Values | None, no_run: str | None) -> Tried:
        try:
            trials: tuple[Trial, ...] = ()
            if real is not None:
                trials = self._trials(one, pair, Given(inputs.REAL, real))
            base = inputs.made_up(pair, self.asked.known) if real is None else real
            key = pair.key
            if key not in self.alike:
                self.alike[key] = self._hard(one, pair, base)
            return Tried((*trials, *self.alike[key]), no_run)
        except Exception as error:
            return Tried(untried=_why(error) if no_run is None else f"{no_run}; {_why(error)}")

    def _hard(self, one: Built, pair: Pair, base: Values) -> tuple[Trial, ...]:
        found: list[Trial] = []
        for given in inputs.hard(pair, base, lambda values: _unseen(pair, values)):
            try:
                found += self._trials(one, pair, given)
            except _REFUSED:
                if given.kind == inputs.RANDOM:
                    raise
                # the original itself cannot be run on such masks
        return tuple(found)

    # -- one set of inputs ---------------------------------------------------------------------------------------------

    def _trials(self, one: Built, pair: Pair, given: Given) -> tuple[Trial, ...]:
        leaves = trained(pair, given)
        skip = _indifferent(pair, given.values) if pair.site.waived else None
        unasked = _indifferent(pair, given.values) if leaves and NO_GRADIENT in pair.site.assumptions else None
        values, state = given.values, pair.site.state
        true, true_grads = run(pair.exact, pair.original.reads, values, leaves, state, wide=True, unasked=unasked)
        plain, plain_grads = run(pair.original.module, pair.original.reads, values, leaves, state, unasked=unasked)
        try:
            mine, mine_grads = run(
                self._call(pair, given), pair.replacement.reads, values, leaves, state, unasked=unasked
            )
        except Exception as error:
            worst = Trial(
                inputs=given.kind,
                what=RESULT,
                original=0.0,
                replacement=float("inf"),
                allowed=0.0,
                worse=True,
                detail=first_line(error),
            )
            return (worst,)
        share = share_of(pair, given, plain.dtype)
        hideable = given.kind in inputs.PADDING
        size = largest(true)
        rows = given.kind != inputs.HUGE
        found = _trial(
            given.kind,
            RESULT,
            [gap(mine, plain, true, share=share, size=size, rows=rows, hideable=hideable, skip=skip)],
        )
        if leaves and true_grads and not (skip is not None and bool(skip.any())):
            size = largest(*true_grads)
            grads = zip(mine_grads, plain_grads, true_grads, strict=True)
            # where a row without a key makes the original's gradients NaN, numbers are as good
            if given.kind == inputs.HUGE and plain.dtype in (torch.float16, torch.bfloat16):
                # fused backwards sum up rows from the rounded result; where one key takes all, all hangs on that sum
                share *= 8
            found += _trial(given.kind, GRADIENT, [gap(*each, share=share, size=size, hideable=True) for each in grads])
        if self.asked.watch is not None:
            self.asked.watch(one, pair, given, found)
        return tuple(found)

    def _call(self, pair: Pair, given: Given) -> Callable[..., Any]:
        if not (self.asked.compiled and _by_inductor(pair)):
            return pair.replacement.module
        leaves = trained(pair, given)
        key = (pair.key, bool(leaves))
        if key not in self.compiled:
            example = [copied(given.values[n], grad=n in leaves) for n in pair.replacement.reads]
            with torch.set_grad_enabled(bool(leaves)):  # or no backward is compiled
                self.compiled[key] = torch._inductor.compile(pair.replacement.module, example)
        return self.compiled[key]


def run(
    module: Callable[..., Any],
    reads: Sequence[Node],
    values: Values,
    leaves: Collection[Node],
    state: State,
    *,
    wide: bool = False,
    unasked: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The result on copies of these values, and the gradients of `leaves`; `wide`: given in float64; `unasked`: where
    no gradient of the result is asked for.
    """
    given = {node: copied(values[node], grad=node in leaves) for node in dict.fromkeys((*reads, *leaves))}
    if wide:
        given = {node: widened(x) for node, x in given.items()}
        state = State(grad=state.grad)  # autocast would take it back
    with state.entered():
        return outcome(module, [given[node] for node in reads], [given[node] for node in leaves], unasked)


def outcome(
    module: Callable[..., Any], args: Sequence[Any], leaves: Sequence[Tensor], unasked: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradients of `leaves` for one fixed weight on the result."""
    with torch.set_grad_enabled(bool(leaves)):
        out = module(*args)
        out = out[0] if isinstance(out, tuple | list) else out
        if not leaves or not out.requires_grad:
            return out.detach(), []
        given = weights(out) if unasked is None else weights(out).masked_fill(unasked, 0.0)
        grads = torch.autograd.grad(out, list(leaves), given, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return out.detach(), filled


def _by_inductor(pair: Pair) -> bool:
    """What takes functions is fused by inductor only: elsewhere it is computed as it is written."""
    return pair.kernel.takes == "functions"


def widened(x: Any) -> Any:
    """The same leaf in float64."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def share_of(pair: Pair, given: Given, dtype: torch.dtype) -> float:
    """The share of the largest element that an error may come to beyond twice the original's."""
    share = pair.kernel.tolerance(str(dtype).removeprefix("torch.")) * torch.finfo(dtype).eps
    if given.kind == inputs.HUGE:  # all accumulate in float32 at best, and scores are as exact as that
        share += 2 * inputs.SCORES * torch.finfo(torch.float32).eps
    return share


def trained(pair: Pair, given: Given) -> tuple[Node, ...]:
    """The leaves whose gradients are compared."""
    if not given.grad or not pair.site.spec.grad or not pair.site.output.meta.get("attnpass_grad"):
        return ()
    kept = (n for n in pair.leaves if n.meta.get("attnpass_grad") and isinstance(given.values[n], Tensor))
    return tuple(n for n in kept if given.values[n].is_floating_point())


def _unseen(pair: Pair, values: Values) -> Tensor | None:
    """Where k is seen by no query: nothing flows back there, in float64, but somewhere else."""
    q, k, v = (placed.node for placed in (pair.site.q, pair.site.k, pair.site.v))
    if k in (q, v) or 0 in values[k].stride():
        return None
    _, grads = run(pair.exact, pair.original.reads, values, (k, v), State(), wide=True)
    if len(grads) != 2:
        return None
    # a value without a gradient may be seen by queries of no weight, a key by queries that agree
    hidden = [bool((grad == 0).any() and (grad != 0).any()) for grad in grads]
    return grads[0] == 0 if all(hidden) else None


def _indifferent(pair: Pair, values: Values) -> Tensor:
    """Rows of the result that do not depend on the query: those without a key, and those with a single one.

    Asked of the original as it is, too: in float64 a score can still be read beside a fill of -1e9.
    """
    q = pair.site.q.node
    other = {**values, q: inputs.filled(values[q], -2 * values[q])}
    reads, state = pair.original.reads, pair.site.state

    def alike(module: Callable[..., Any], near: float, *, wide: bool) -> Tensor:
        a, b = (run(module, reads, x, (), state, wide=wide)[0].double() for x in (values, other))
        same = (a - b).abs() <= near * max(largest(a), 1e-30)
        return (same | ~a.isfinite()).all(-1, keepdim=True).expand(a.shape)

    eps = torch.finfo(pair.site.output.meta["val"].dtype).eps
    return alike(pair.exact, 1e-12, wide=True) | alike(pair.original.module, 16 * eps, wide=False)


def _trial(kind: str, what: str, gaps: Sequence[Gap | None]) -> list[Trial]:
    """The worst of them; none where nothing was to be compared."""
    found = max((g for g in gaps if g is not None), key=lambda g: g.excess, default=None)
    if found is None:
        return []
    return [
        Trial(
            inputs=kind,
            what=what,
            original=found.original,
            replacement=found.replacement,
            allowed=found.allowed,
            worse=found.worse,
        )
    ]


def _small_enough(pair: Pair) -> None:
    spec = pair.site.spec
    scores = 1
    for size in (*spec.q[:3], spec.keys):
        scores *= size if isinstance(size, int) else 1
    if scores > _LARGEST:
        raise Untried(f"its scores in float64 would take {scores * 8 / 2**30:.0f} GiB at once")


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, Untried) else first_line(error)
