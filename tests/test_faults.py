"""Whatever fails inside the pass: the model runs, and runs right, and the report says what failed.

A fault is put into one function of the pass at a time; then a model is compiled, or its exported program rewritten.
`POINTS` names one function or more for each stage; the long test makes every single function of the pass fail.
"""

from __future__ import annotations

import gc
import importlib
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import attnpass
from attnpass import AttnpassError, warn
from attnpass.capture.dynamo import backend
from attnpass.errors import Refuse
from attnpass.ledger import Report

SDPA = torch.ops.aten.scaled_dot_product_attention.default
LENGTH, WIDTH, HEADS = 10, 16, 2
SOFTMAXES = 4
PACKAGE = Path(attnpass.__file__).parent
PARTS = 12  # of the longest test


class Attention(nn.Module):
    """Hand-written attention with a mask that keeps what `seen(i, j)` says."""

    def __init__(self, seen: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.seen = seen
        if seen is None:  # nanoGPT's: in a buffer
            self.register_buffer("bias", torch.ones(LENGTH, LENGTH).tril())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) * 0.3
        if self.seen is None:
            scores = scores.masked_fill(self.bias[:length, :length] == 0, -math.inf)
        else:
            rows, columns = torch.arange(length)[:, None], torch.arange(length)
            scores = scores + torch.where(self.seen(rows, columns), 0.0, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH)


class Model(nn.Module):
    """A mask in a buffer, one that is computed, one in a nested graph; and a softmax that is no attention."""

    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.held = Attention(None)
        self.window = Attention(lambda i, j: (j <= i) & (j > i - 3))
        self.inner = Attention(lambda i, j: j <= i)
        self.nested = nested

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.window(x + self.held(x))
        y = checkpoint(self.inner, x, use_reentrant=False) if self.nested else self.inner(x)
        return y * x.softmax(-1)


def sample() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


class Own(Exception):
    """An exception that torch has never heard of."""


ERRORS: dict[str, Callable[[], Exception]] = {
    "own": lambda: Own("two\nlines"),
    "runtime": lambda: RuntimeError("boom"),
    "key": lambda: KeyError("boom"),
    "recursion": lambda: RecursionError("maximum recursion depth exceeded"),
    # those that make Dynamo break a graph, or start anew, when they come out of a backend
    "data dependent": lambda: DataDependentOutputException(torch.ops.aten.item.default),
    "dynamic shape": lambda: DynamicOutputShapeException(torch.ops.aten.nonzero.default),
    "no fake tensor": lambda: UnsupportedFakeTensorException("boom"),
    "unsupported": lambda: torch._dynamo.exc.Unsupported("boom", "boom"),
    "restart": lambda: torch._dynamo.exc.RestartAnalysis(restart_reason="boom"),
    "skip": lambda: torch._dynamo.exc.SkipFrame("boom"),
    # ours, where they do not belong
    "refusal": lambda: Refuse("unknown_op"),
    "for the user": lambda: AttnpassError("boom"),
}


@dataclass(frozen=True)
class Point:
    """A function of the pass, the stage that has to be named when it fails, and what the failure is of."""

    place: str  # module:attribute
    stage: str | None  # None: done without, and the report need not say so
    whole: bool = True  # all that is in this graph stays as it was
    times: int | None = None  # only the first so many calls fail
    of: str = "both"  # "dynamo", "export": only this front calls it

    def __str__(self) -> str:
        return self.place


POINTS = [
    Point("attnpass.capture.frames:ambient", "capture", of="dynamo"),
    Point("attnpass.capture.frames:worth_lowering", "capture", of="dynamo"),
    Point("attnpass.capture.frames:_bodies", "capture", of="dynamo"),
    Point("attnpass.capture.frames:shape_env", "lower", of="dynamo"),
    Point("attnpass.capture.frames:lower", "lower", of="dynamo"),
    Point("attnpass.capture.lower:_Lowering._plan", "lower", of="dynamo"),
    Point("attnpass.capture.lower:_Lowering._instance", "lower", of="dynamo"),
    Point("attnpass.capture.template:Tracer.trace", "lower", of="dynamo"),
    Point("attnpass.capture.template:make_fx", None, of="dynamo"),  # a call without a template is opaque
    Point("attnpass.capture.template:_template", "lower", of="dynamo"),
    Point("attnpass.capture.frames:candidates", "recognize", of="dynamo"),
    Point("attnpass.capture.exported:_names_kept", "validate", of="export"),
    Point("attnpass.capture.exported:_buffers", "capture", whole=False, of="export"),
    Point("attnpass.capture.exported:_flowing", "capture", of="export"),
    Point("attnpass.capture.aten:copy_graph", "capture", times=1, of="export"),
    Point("attnpass.capture.aten:unmark", "capture", of="export"),
    Point("attnpass.pipeline:find", "recognize"),
    Point("attnpass.recognize.find:Effects", "recognize"),
    Point("attnpass.recognize.find:mark_gradients", "recognize"),
    Point("attnpass.recognize.find:anchors", "recognize"),
    Point("attnpass.recognize.find:_recognise", "recognize", whole=False),
    Point("attnpass.recognize.find:assemble", "recognize", whole=False),
    Point("attnpass.recognize.walk:Walker.walk", "recognize", whole=False),
    Point("attnpass.pipeline:_miss", "recognize"),
    Point("attnpass.pipeline:prove", "prove"),
    Point("attnpass.prove:Masks", "prove"),
    Point("attnpass.prove:Masks.of_site", "prove", whole=False),
    Point("attnpass.masks.lift:Lifter.read", "prove", whole=False),
    Point("attnpass.masks.prove:take_apart", "prove", whole=False),
    Point("attnpass.masks.prove:Comparison.check", "prove", whole=False),
    Point("attnpass.masks.compare:Comparison._compared", "prove", whole=False),
    Point("attnpass.prove:_rows", "prove"),
    Point("attnpass.pipeline:choose", "choose"),
    Point("attnpass.choose:kernels", "choose"),
    Point("attnpass.choose:_kept", "choose"),
    Point("attnpass.kernels.native:Native.available", "choose", whole=False),
    Point("attnpass.kernels.native:Native.refusals", "choose", whole=False),
    Point("attnpass.kernels.native:Native.cost", "choose", whole=False),
    Point("attnpass.pipeline:fastest_first", "autotune", whole=False),
    Point("attnpass.autotune:_path", "autotune", whole=False),
    Point("attnpass.autotune:cut", None),  # what cannot be timed is not chosen for its time
    Point("attnpass.autotune:_timed_aside", None),
    Point("attnpass.pipeline:_carry_out", "rewrite"),
    Point("attnpass.pipeline:build", "rewrite", whole=False),
    Point("attnpass.emit:arrange", "rewrite", whole=False),
    Point("attnpass.emit:structured_mask", "rewrite", whole=False),
    Point("attnpass.kernels.native:Native.emit", "rewrite", whole=False),
    Point("attnpass.pipeline:checked", "rewrite", whole=False),
    Point("attnpass.pipeline:stand_ins", "rewrite", whole=False),
    Point("attnpass.pipeline:_done", "rewrite"),
    Point("attnpass.pipeline:_with_dead", "verify"),
    Point("attnpass.capture.frames:relying", "recognize", of="dynamo"),
    Point("attnpass.capture.frames:splice", "splice", of="dynamo"),
    Point("attnpass.capture.splice:_Splice._emit", "splice", of="dynamo"),
    Point("attnpass.capture.splice:_Splice._sweep", "splice", of="dynamo"),
    Point("attnpass.capture.exported:relying", "export", of="export"),
    Point("attnpass.capture.exported:sweep", "export", of="export"),
    Point("attnpass.capture.exported:_Guards.check", "export", of="export"),
    Point("attnpass.capture.exported:_with_graph", "validate", times=1, of="export"),
    Point("attnpass.capture.frames:_Frame.other", "capture", of="dynamo"),
    Point("attnpass.capture.frames:attach", "capture", of="dynamo"),
    Point("attnpass.capture.frames:_Frame.commit", "commit", of="dynamo"),
    Point("attnpass.capture.held:Later.__init__", "watch", whole=False, of="dynamo"),
    Point("attnpass.capture.held:Watched.__init__", "watch", whole=False, of="dynamo"),
    Point("attnpass.report.trace:trace", "trace", whole=False, of="dynamo"),
    Point("attnpass.session:reserve", None, of="dynamo"),
    Point("attnpass.capture.dynamo:of_failures", None, of="dynamo"),
]


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATTNPASS_CACHE", str(tmp_path))
    importlib.import_module("attnpass.report.trace")
    attnpass.reset()
    yield
    attnpass.reset()


class Spy:
    """An inner backend that keeps the code of what it is given: of the graph, and of those inside it by their path."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, str]] = []

    def __call__(self, gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(codes(gm))
        return gm.forward


def codes(gm: GraphModule) -> dict[str, str]:
    return {path: inner.code for path, inner in gm.named_modules() if isinstance(inner, GraphModule)}


def softmaxes(code: dict[str, str]) -> int:
    return sum(len(re.findall(r"softmax[.\w]*\(", text)) for text in code.values())


def results(model: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    out = model(sample())
    return [
        out.detach(),
        *torch.autograd.grad(out.square().sum(), parameters, allow_unused=True, materialize_grads=True),
    ]


def broken(point: Point, make: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Make a function fail; what it has raised is gathered in the list."""
    raised: list[Exception] = []
    module, _, path = point.place.partition(":")
    owner: Any = importlib.import_module(module)
    *inner, name = path.split(".")
    for part in inner:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if point.times is not None and len(raised) >= point.times:
            return real(*args, **kwargs)
        raised.append(make())
        raise raised[-1]

    monkeypatch.setattr(owner, name, fail)
    return raised


def nothing_is_left_on() -> None:
    """No mode of torch's that the pass has entered."""
    assert torch.is_grad_enabled()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert not torch.is_autocast_enabled("cpu")
    assert gc.isenabled()


def told(report: Report, point: Point, raised: list[Exception]) -> None:
    """The report has the failure, with stage and traceback, and every softmax exactly once."""
    assert len(report.sites) + len(report.misses) == SOFTMAXES, (report.sites, report.misses)
    str(report), report.to_json(), report.to_html()
    if point.stage is None or isinstance(raised[0], Refuse):
        return
    failures = [
        f for f in report.failures if f.line.startswith((type(raised[0]).__name__, "torch.", "attnpass.", "tests."))
    ]
    assert failures, report.failures
    assert {f.stage for f in failures} == {point.stage}
    assert all(f.text.startswith("Traceback (most recent call last)") and "in fail\n" in f.text for f in failures)
    assert {f.part is None for f in failures} == {point.whole}


def quietly(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `run` returns, and what attnpass says on the way."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = run()
    return out, [str(one.message) for one in said if str(one.message).startswith("attnpass: ")]


def compiled_with(
    point: Point, error: str, monkeypatch: pytest.MonkeyPatch, wanted: list[Tensor], plain: dict[str, str]
) -> None:
    torch._dynamo.reset()
    attnpass.reset()
    model, spy = Model(nested=True), Spy()
    options = {"inner": spy, "autotune": "autotune" in (point.stage, point.place.partition(":")[0].rpartition(".")[2])}
    with monkeypatch.context() as patch:
        patch.setattr(warn, "_told", False)
        raised = broken(point, ERRORS[error], patch)
        compiled = torch.compile(model, backend=backend, options=options)
        got, said = quietly(lambda: results(compiled, list(model.parameters())))
    assert raised, "the fault was not met"
    nothing_is_left_on()
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    assert len(spy.graphs) == 1  # not broken into parts
    report = attnpass.report()
    if not point.place.endswith("reserve"):  # then there is no number under which to keep it
        told(report, point, raised)
        assert report.replaced == softmaxes(plain) - softmaxes(spy.graphs[0])
    for name in {failure.graph for failure in report.failures if failure.part is None}:
        path = name.partition(".")[2]
        assert spy.graphs[0][path] == plain[path], "half rewritten"
    assert len(said) <= 1
    if point.stage is not None and not isinstance(raised[0], Refuse):
        assert len(said) == 1


def one_of(point: Point) -> str:
    """Each point gets another exception: the long test gives it all of them."""
    return list(ERRORS)[POINTS.index(point) % len(ERRORS)]


@pytest.fixture(scope="module")
def expected() -> tuple[list[Tensor], dict[str, str]]:
    """What the model gives, and the code of its graphs as Dynamo records it."""
    model, spy = Model(nested=True), Spy()
    torch.compile(model, backend=spy)(sample())
    return results(model, list(model.parameters())), spy.graphs[0]


@pytest.mark.parametrize("point", [point for point in POINTS if point.of != "export"], ids=str)
def test_compiling(point: Point, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_with(point, one_of(point), monkeypatch, *expected)


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in POINTS if point.of != "export"], ids=str)
def test_compiling_with_every_exception(point: Point, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in ERRORS:
        compiled_with(point, error, monkeypatch, *expected)


# -- every function ----------------------------------------------------------------------------------------------------


class Tripwire:
    """Makes one function of the pass raise at its first call, whichever it is; or only lists what is called."""

    def __init__(self, at: tuple[str, int] | None = None) -> None:
        self.at = at
        self.called: dict[tuple[str, int], str] = {}
        self.raised: Own | None = None

    def __enter__(self) -> Tripwire:
        sys.settrace(self.look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def look(self, frame: types.FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        place = code.co_filename, code.co_firstlineno
        self.called[place] = code.co_qualname
        if place == self.at and self.raised is None:
            self.raised = Own(f"{code.co_qualname} was called")
            raise self.raised


def tripped(wire: Tripwire) -> tuple[nn.Module, Any, list[dict[str, str]]]:
    """The model, compiled with a backend that has the wire laid."""
    torch._dynamo.reset()
    attnpass.reset()
    model, spy = Model(nested=True), Spy()

    def watched(gm: GraphModule, inputs: Any) -> Any:
        with wire:
            return backend(gm, inputs, options={"inner": spy, "autotune": True})

    compiled = torch.compile(model, backend=watched)
    return model, quietly(lambda: results(compiled, list(model.parameters())))[0], spy.graphs


def wrong(wire: Tripwire, got: list[Tensor], graphs: list[dict[str, str]], wanted: Any, plain: dict[str, str]) -> str:
    """What is not as it should be after one function has failed."""
    report = attnpass.report()
    if wire.raised is None:
        return ""  # what it found the first time is remembered
    nothing_is_left_on()
    if not all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in zip(got, wanted, strict=True)):
        return "gives other results"
    if len(graphs) != 1:
        return f"breaks the graph into {len(graphs)}"
    if wire.at is not None and wire.at[0].endswith(("session.py", "record.py")):
        return ""  # what would tell of it
    if len(report.sites) + len(report.misses) != SOFTMAXES:
        return f"{len(report.sites)} sites and {len(report.misses)} misses are told"
    if report.replaced != softmaxes(plain) - softmaxes(graphs[0]):
        return f"{report.replaced} are said to be replaced"
    failed = {failure.graph.partition(".")[2] for failure in report.failures if failure.part is None}
    return "is half rewritten" if any(graphs[0][path] != plain[path] for path in failed) else ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_function_of_the_pass_may_fail(
    part: int, expected: tuple[list[Tensor], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything, found = Tripwire(), []
    tripped(everything)
    assert len(everything.called) > 500
    # what the user asks for, and what it is an error to ask for; the shells, in front of the first `try`; and the
    # check, in whose place the other graph is compiled
    left_out = (
        "Setup.",
        "_other",
        "_inductor",
        "backend",
        "_attempted",
        "process",
        "fenced",
        "within",
        "ready",
        "guarded",
    )
    for place, name in list(everything.called.items())[part::PARTS]:
        if name.startswith(left_out) or place[0].endswith(("policy.py", "ambient.py", "demands.py", "names.py")):
            continue
        monkeypatch.setenv("ATTNPASS_CACHE", str(tmp_path / f"{len(found)}"))
        monkeypatch.setattr(warn, "_told", False)
        wire = Tripwire(place)
        try:
            _, got, graphs = tripped(wire)
            said = wrong(wire, got, graphs, *expected)
        except Exception as error:
            said = f"raises {type(error).__name__}"
        if said:
            found.append(f"{place[0].rpartition('attnpass/')[2]}:{place[1]} {name} {said}")
    assert not found, "\n".join(found)


# -- exported programs -------------------------------------------------------------------------------------------------


class Program(Model):
    """The same, with a nested graph that export has."""

    def __init__(self) -> None:
        super().__init__(nested=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.window(x + self.held(x))
        with torch.no_grad():
            weights = self.inner(x)
        return (x * weights) * x.softmax(-1)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return torch.export.export(Program(), (sample(),))


def exported_with(point: Point, error: str, monkeypatch: pytest.MonkeyPatch, program: ExportedProgram) -> None:
    before = codes(program.graph_module)
    policy = attnpass.Policy(trust_buffers=True, autotune="autotune" in point.place or point.stage == "autotune")
    with monkeypatch.context() as patch:
        patch.setattr(warn, "_told", False)
        raised = broken(point, ERRORS[error], patch)
        (new, report), said = quietly(lambda: attnpass.rewrite(program, policy=policy))
    assert raised, "the fault was not met"
    nothing_is_left_on()
    after = codes(new.graph_module)
    assert codes(program.graph_module) == before, "the original was touched"
    parameters = list(new.parameters())
    torch.testing.assert_close(
        results(new.module(), parameters), results(program.module(), parameters), atol=1e-4, rtol=1e-3
    )
    told(report, point, raised)
    assert report.replaced == softmaxes(before) - softmaxes(after)
    for name in {failure.graph for failure in report.failures if failure.part is None}:
        path = name.partition(".")[2]
        assert after[path] == before[path], "half rewritten"
    assert len(said) <= 1
    if point.stage is not None and not isinstance(raised[0], Refuse):
        assert len(said) == 1


@pytest.mark.parametrize("point", [point for point in POINTS if point.of != "dynamo"], ids=str)
def test_exported_programs(point: Point, program: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    exported_with(point, one_of(point), monkeypatch, program)


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in POINTS if point.of != "dynamo"], ids=str)
def test_exported_programs_with_every_exception(
    point: Point, program: ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in ERRORS:
        exported_with(point, error, monkeypatch, program)
