"""Time and memory of the pass stay bounded: hostile graphs, masks too large to be made, many compilations."""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import importlib
import pkgutil
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import attnpass
from attnpass import session
from attnpass.capture.dynamo import backend
from attnpass.ledger import Report
from tests.hostile import CASES, Maker

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


# -- hostile graphs ----------------------------------------------------------------------------------------------------


def audited(case: str, size: int) -> tuple[Report, float]:
    gm = CASES[case][0](Maker(), size)
    start = time.process_time()
    with torch.no_grad():
        report = attnpass.audit(gm)
    return report, time.process_time() - start


def judged(case: str, size: int, *, each: float) -> None:
    """`each`: seconds of CPU time for one more node, or mask, or layer."""
    report, seconds = audited(case, size)
    assert not report.failures, report.failures[0].text
    assert not any("bug" in note for note in report.notes)
    assert seconds < 5 + each * size
    if case != "softmaxes":
        assert report.replaced == (size if case == "layers" else 1)


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_graph(case: str) -> None:
    judged(case, 100 if case == "layers" else 300, each=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_large_hostile_graph(case: str) -> None:
    judged(case, CASES[case][1], each=0.02)


# -- masks that are too large to be made -------------------------------------------------------------------------------

HUGE = """
import resource, sys
import torch, attnpass
from tests.hostile import Maker, aten
from attnpass.capture import exported

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def causal(m):
    rows, columns = m.grid()
    return m.call(m.keep, aten.ge.Tensor, rows, columns)

def triangle(m):
    ones = m.call(m.keep, aten.ones.default, [m.length, m.length], dtype=torch.bool, device=torch.device("cpu"))
    return m.call(m.keep, aten.tril.default, ones)

def held(m):
    # one byte, seen as a tensor of four billion
    module.register_buffer("mask", torch.ones(1, 1, dtype=torch.bool).expand(m.length, m.length))
    node = m.graph.create_node("get_attr", "mask")
    node.meta["val"] = m.keep
    return node

attnpass.audit(Maker(8).done())
for make in (causal, triangle, held):
    module = torch.nn.Module()
    m = Maker(65536)
    scores = m.masked(m.product(m.q), make(m))
    m.graph.output((m.weighted(scores),))
    gm = torch.fx.GraphModule(module, m.graph)
    before = peak()
    done, report = attnpass.rewrite(gm)
    assert not report.failures, report.failures
    assert report.replaced == 1
    print(make.__name__, report.sites[0].spec.mask, peak() - before)
    assert peak() - before < 100, (make.__name__, before, peak())
    if make is not held:
        assert report.sites[0].spec.mask.causal == 0
"""


def test_a_mask_of_four_billion_elements_is_never_made() -> None:
    # a process of its own, for its peak of memory
    done = subprocess.run([sys.executable, "-c", HUGE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# -- many compilations -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.register_buffer("keep", torch.ones(64, 64).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        length = x.shape[-2]
        scores = (q @ k.mT * 0.2).masked_fill(self.keep[:length, :length] == 0, -torch.inf)
        return scores.softmax(-1) @ v


def compile_once(refs: list[weakref.ref[Any]], *, ours: bool = True) -> None:
    model = Attention()

    def inner(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        refs.append(weakref.ref(gm))
        refs.append(weakref.ref(next(n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder")))
        return gm.forward

    refs.extend(map(weakref.ref, (model, model.qkv.weight, model.keep)))
    options: dict[str, Any] = {"backend": backend, "options": {"inner": inner}} if ours else {"backend": inner}
    torch.compile(model, **options)(torch.randn(2, 8, 16)).sum().backward()
    torch._dynamo.reset()


def swept() -> None:
    """Tensors and what refers to them weakly go one after the other."""
    session.reset()
    for _ in range(3):
        gc.collect()


def grown(warm: int, times: int, *, ours: bool) -> float:
    """How many objects more there are after each compilation; what was compiled must be gone."""
    refs: list[weakref.ref[Any]] = []
    for _ in range(warm):
        compile_once(refs, ours=ours)
    swept()
    before = len(gc.get_objects())
    for _ in range(times):
        compile_once(refs, ours=ours)
    assert attnpass.report().replaced == times * ours
    assert not attnpass.report().failures
    swept()
    assert not [ref() for ref in refs if ref() is not None], "something keeps what was compiled"
    return (len(gc.get_objects()) - before) / times


def test_what_was_compiled_is_freed() -> None:
    # Dynamo itself keeps some 300 (records of compilations, notes of guards); ten more are in its cache of fake values
    assert grown(4, 3, ours=True) < grown(2, 3, ours=False) + 100


@pytest.mark.slow
def test_two_hundred_compilations_leave_nothing_behind() -> None:
    assert grown(20, 200, ours=True) < grown(20, 200, ours=False) + 30


def tensors_in(thing: Any, seen: set[int]) -> Iterator[Any]:
    """Whatever of torch a value holds, at any depth."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor | torch.SymInt | nn.Module | torch.fx.Node | torch.fx.Graph):
        yield thing
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from tensors_in(getattr(thing, field.name), seen)
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.items()), seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        for one in thing:
            yield from tensors_in(one, seen)
    else:
        assert isinstance(thing, str | int | float | bool | enum.Enum | None), thing


def test_the_ledger_holds_plain_data() -> None:
    compile_once([])
    torch.compile(Attention(), backend=backend, options={"inner": "eager"}, dynamic=True)(torch.randn(3, 9, 16))
    report = attnpass.report()
    assert report.sites
    assert not list(tensors_in(report, set()))


def test_the_ledger_of_a_process_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_KEPT", 3)
    for _ in range(5):
        compile_once([])
    report = attnpass.report()
    assert [site.graph for site in report.sites] == ["graph2", "graph3", "graph4"]
    assert "2 before them are forgotten" in report.notes[-1]
    assert len(session._attempts) <= 3
    attnpass.reset()
    assert not attnpass.report().notes


def recompiled(lengths: range) -> float:
    """Seconds of CPU time of the pass alone, for one compilation."""
    spent, model = [], Attention()

    def watched(gm: GraphModule, inputs: Any) -> Any:
        start = time.process_time()
        out = backend(gm, inputs, options={"inner": "eager"})
        spent.append(time.process_time() - start)
        return out

    compiled = torch.compile(model, backend=watched, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=100, accumulated_recompile_limit=1000), torch.no_grad():
        for length in lengths:
            x = torch.randn(2, length, 16)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    assert len(spent) == len(lengths) == attnpass.report().replaced
    return sum(spent[-3:]) / sum(spent[1:4])


def test_recompilations_cost_what_the_first_one_costs() -> None:
    assert recompiled(range(3, 13)) < 5


@pytest.mark.slow
def test_fifty_recompilations_cost_what_the_first_one_costs() -> None:
    assert recompiled(range(3, 53)) < 5


# -- what is remembered ------------------------------------------------------------------------------------------------


def modules() -> Iterator[types.ModuleType]:
    for info in pkgutil.walk_packages(attnpass.__path__, "attnpass."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def caches() -> dict[str, Any]:
    found = {}
    for module in modules():
        for name, thing in vars(module).items():
            if isinstance(thing, functools._lru_cache_wrapper) and thing.__module__ == module.__name__:
                found[f"{module.__name__}:{name}"] = thing
    return found


def test_every_cache_is_bounded_or_known_not_to_grow() -> None:
    compile_once([])
    compile_once([])
    sizes = {name: cache.cache_info().currsize for name, cache in caches().items()}
    assert len(sizes) > 10
    for _ in range(3):
        compile_once([])
    for name, cache in caches().items():
        info = cache.cache_info()
        if info.maxsize is None:
            assert info.currsize == sizes[name], f"{name} grows with each compilation"
        else:
            assert info.maxsize <= 1 << 16
