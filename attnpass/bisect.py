"""Finding the sites that make a model's output differ, and writing each as a file that shows it.

    the model in float64 ─┐
    as it is ─────────────┼── all sites replaced: does the output differ? ── half of them ── ... ── one site
    some sites replaced ──┘                                                                          └── its file

"Differs" means: further from the model in float64 than twice what the model itself is, and the tolerance. Where a
model does not run in float64, what the last bit of its weights and inputs changes takes the place of its own error. Any
set of sites can be replaced alone, so several wrong ones are found, each by itself; a set that differs only as a whole
(roundings that add up) is reported as a set.

By default the graphs run uncompiled (`inner="eager"`): what inductor does to the rest of a model is not looked for.
Random numbers start from the same seed in every run. Sites with live dropout draw others than the model does, so they
are left out, and said to be.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from attnpass.ambient import resolved
from attnpass.capture import frames
from attnpass.capture.dynamo import Setup
from attnpass.capture.observe import isolated
from attnpass.errors import AttnpassError, first_line
from attnpass.ledger import Decision, Report, merge
from attnpass.policy import Policy
from attnpass.trial import Built, Given, Pair
from attnpass.trial.compare import Gap, gap, largest, weights
from attnpass.trial.reference import widened
from attnpass.trial.reproducer import Reproducer, reproducer

_ULPS = {torch.float16: 8.0, torch.bfloat16: 8.0}  # units in the last place of the largest element; others: 64
_SEED = 0

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Sites that make the output differ: one, or several that do so only together."""

    sites: tuple[Decision, ...]
    tensor: str  # where in the output (or which gradient) it shows most
    gap: Gap
    reproducer: str | None = None  # the file written
    alone: bool = False  # running it shows the difference


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What was looked at, and what was found."""

    replaced: int  # sites that could be the cause
    left_out: tuple[Decision, ...]  # replaced ones with live dropout
    tensor: str  # with all of them replaced: where it differs most ...
    gap: Gap  # ... and by how much
    against: str  # "float64", or what stood in for it
    found: tuple[Found, ...] = ()
    runs: int = 0

    @property
    def differs(self) -> bool:
        return bool(self.found)


def bisect(
    fn: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    policy: Policy | None = None,
    inner: Any = "eager",
    gradients: bool = False,
    tolerance: float | None = None,
    output: str | None = None,
) -> Bisection:
    """Find the sites that make the output of `fn` (and its parameters' gradients) differ; files go to `output`."""
    search = _Search(fn, args, kwargs, resolved(policy), inner, gradients=gradients, tolerance=tolerance)
    everything = [site for site in search.all.sites if site.replaced]
    left_out = tuple(site for site in everything if site.spec.dropout != 0)
    names = [site.id for site in everything if site not in left_out]
    if not names:
        nothing = Gap(0.0, 0.0, 0.0)
        return Bisection(replaced=0, left_out=left_out, tensor="", gap=nothing, against=search.against)
    tensor, most = search.difference(names) if left_out else search.compared(search.whole)
    by_id = {site.id: site for site in everything}
    found: list[Found] = []
    if most.worse:
        for at, (guilty, tensor_there, gap_there) in enumerate(search.culprits(names, tensor, most)):
            one = Found(sites=tuple(by_id[name] for name in guilty), tensor=tensor_there, gap=gap_there)
            found.append(search.written(one, guilty, _numbered(output, at)) if output and len(guilty) == 1 else one)
    return Bisection(
        replaced=len(names),
        left_out=left_out,
        tensor=tensor,
        gap=most,
        against=search.against,
        found=tuple(found),
        runs=search.runs,
    )


def _numbered(path: str | None, at: int) -> str:
    """repro.py, repro_2.py, ..."""
    assert path is not None
    stem, dot, end = path.rpartition(".")
    return path if at == 0 else f"{stem}_{at + 1}{dot}{end}"


class _Search:
    def __init__(
        self,
        fn: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        policy: Policy,
        inner: Any,
        *,
        gradients: bool,
        tolerance: float | None,
    ) -> None:
        self.fn, self.args, self.kwargs = fn, args, kwargs
        self.policy = dataclasses.replace(policy, verify=False, fuel=None)  # which sites are replaced is asked here
        self.setup = Setup.of(None, {"inner": inner})
        self.gradients, self.tolerance = gradients, tolerance
        self.runs = 0
        self.whole, self.all = self._run(None)
        self.plain, _ = self._run(())
        self.true, self.against = self._truth()

    # -- running -------------------------------------------------------------------------------------------------------

    def _run(self, wanted: Collection[str] | None, watch: Any = None) -> tuple[Tensors, Report]:
        """The output with these sites replaced (None: all that can be), and the report."""
        reports: list[Report] = []
        every = [site.id for site in self.all.sites] if wanted is not None else []
        left = frozenset(name for name in every if name not in (wanted or ()))

        def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
            done = frames.process(
                gm,
                example_inputs,
                name=f"graph{len(reports)}",
                policy=self.policy,
                rewrite=True,
                compiled=True,  # the kernels that are chosen behind inductor, whatever runs them here
                left=left,
                watch=watch,
            )
            reports.append(done.report)
            return self.setup.inner(gm, example_inputs)

        self.runs += 1
        with _seeded():
            out = isolated(self.fn, self.args, self.kwargs, backend, then=self._tensors)
        return out, merge(reports)

    def _tensors(self, subject: Any, out: Any) -> Tensors:
        """What is compared of one run, by name."""
        found = {name: x for name, x in _leaves("output", out) if x.is_floating_point()}
        if self.gradients:
            trained = {name: p for name, p in _parameters(subject) if p.requires_grad}
            heads = [x for x in found.values() if x.requires_grad]
            if not trained or not heads:
                raise AttnpassError("there is no gradient to compare: no parameter requires one, or grad mode is off")
            given = list(map(weights, heads))
            grads = torch.autograd.grad(heads, list(trained.values()), given, allow_unused=True)
            found |= {f"gradient of {n}": g for n, g in zip(trained, grads, strict=True) if g is not None}
        return {name: x.detach().clone() for name, x in found.items()}

    def _truth(self) -> tuple[Tensors, str]:
        """The model in float64; where it does not run there, the model itself with its last bits changed."""
        if self.tolerance is not None:
            return {name: x.double() for name, x in self.plain.items()}, "the model as it is"
        try:
            model = copy.deepcopy(self.fn)
            if isinstance(model, nn.Module):
                model = model.double()
            args, kwargs = tree_map(_double, copy.deepcopy((tuple(self.args), dict(self.kwargs))))
            with _seeded(), _InFloat64():  # type: ignore[no-untyped-call]
                found = self._tensors(model, model(*args, **kwargs))
            if all(name in found and found[name].shape == x.shape for name, x in self.plain.items()):
                return found, "float64"
        except Exception as error:
            why = first_line(error)
        else:
            why = "its output has another form there"
        return self._nudged(), f"the model with its last bits changed (in float64 it does not run: {why})"

    def _nudged(self) -> Tensors:
        """In place of the truth the plain run; in its place the run that is furthest from it."""
        generator = torch.Generator().manual_seed(_SEED)

        def nudge(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device, x.dtype) * 2 - 1
            return (x.detach() * (1 + signs * torch.finfo(x.dtype).eps)).requires_grad_(x.requires_grad)

        furthest = dict(self.plain)
        true = {name: x.double() for name, x in self.plain.items()}
        for _ in range(3):
            model = copy.deepcopy(self.fn)
            if isinstance(model, nn.Module):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.copy_(nudge(parameter))
            args, kwargs = tree_map(nudge, copy.deepcopy((tuple(self.args), dict(self.kwargs))))
            with _seeded():
                now = self._tensors(model, model(*args, **kwargs))
            for name, x in now.items():
                if name in true and _off(x, true[name]) > _off(furthest[name], true[name]):
                    furthest[name] = x
        self.plain = furthest
        return true

    # -- comparing -----------------------------------------------------------------------------------------------------

    def difference(self, wanted: Collection[str]) -> tuple[str, Gap]:
        """Where the output differs most with these sites replaced."""
        return self.compared(self._run(wanted)[0])

    def compared(self, now: Tensors) -> tuple[str, Gap]:
        """Where this output is furthest beyond what is allowed."""
        found: list[tuple[str, Gap]] = []
        for name, plain in self.plain.items():
            ulps = _ULPS.get(plain.dtype, 64.0) * torch.finfo(plain.dtype).eps
            share = ulps if self.tolerance is None else self.tolerance
            size = largest(self.true[name])
            one = gap(now[name], plain, self.true[name], share=share, size=size)
            if one is not None:
                found.append((name, one))
        return max(found, key=lambda each: each[1].excess, default=("", Gap(0.0, 0.0, 0.0)))

    def culprits(self, names: Sequence[str], tensor: str, most: Gap) -> Iterator[tuple[list[str], str, Gap]]:
        """The sites among these, which differ together, that do so alone."""
        if len(names) == 1:
            yield list(names), tensor, most
            return
        middle = len(names) // 2
        any_found = False
        for half in (names[:middle], names[middle:]):
            where, there = self.difference(half)
            if there.worse:
                any_found = True
                yield from self.culprits(half, where, there)
        if not any_found:
            yield list(names), tensor, most

    # -- the file ------------------------------------------------------------------------------------------------------

    def written(self, found: Found, names: Sequence[str], path: str) -> Found:
        """The same with its file: on the model's own values, or on others that show it where those do not."""
        kept: list[Reproducer] = []
        compiled = "both" if self.setup.compiled else ""

        def watch(built: Built, pair: Pair, given: Given, trials: Sequence[Any]) -> None:
            worse = any(trial.worse for trial in trials)
            if built.id == names[0] and (
                not kept or (worse and not kept[0].worse and not given.kind.startswith("pad"))
            ):
                kept[:] = [reproducer(built, pair, given, trials, compiled=compiled)]

        self._run(names, watch)
        if not kept:
            return found
        kept[0].write(path)
        return dataclasses.replace(found, reproducer=path, alone=kept[0].worse)


class _InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whatever asks for a narrower floating type gets float64."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(widened, args), **tree_map(widened, kwargs or {}))


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers in every run, and the user's afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        yield


def _double(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def _off(x: Tensor, true: Tensor) -> float:
    return largest(x.double() - true)


def _parameters(subject: Any) -> Iterator[tuple[str, Tensor]]:
    module = subject if isinstance(subject, nn.Module) else getattr(subject, "__self__", None)
    if isinstance(module, nn.Module):
        yield from module.named_parameters()


def _leaves(name: str, held: Any, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of whatever a model returns."""
    if isinstance(held, Tensor):
        yield name, held
    elif isinstance(held, Mapping):
        for key, item in held.items():
            yield from _leaves(f"{name}[{key!r}]", item, depth + 1)
    elif isinstance(held, list | tuple):
        for i, item in enumerate(held):
            yield from _leaves(f"{name}[{i}]", item, depth + 1)
    elif depth < 8 and dataclasses.is_dataclass(held):
        for field in dataclasses.fields(held):
            yield from _leaves(f"{name}.{field.name}", getattr(held, field.name), depth + 1)
