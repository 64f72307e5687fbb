"""What the pass leaves alone stays right: inductor's own attention patterns do not get at it."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import attnpass
from attnpass import warn
from attnpass.capture import fence
from attnpass.capture.dynamo import Setup
from tests.plain import compiled, counting, distance, eager, error, plain_is_wrong, with_gradients

ROOT = Path(__file__).resolve().parent.parent
EXP, HIDDEN = torch.ops.aten.exp.default, torch.ops.prims.exp.default

Program = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


# -- programs that are not the attention they look like ----------------------------------------------------------------


def tensors(*shape: int) -> tuple[Tensor, ...]:
    made = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=made) for _ in range(3))


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-2) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, dim=1) @ v


def over_queries_of_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=1), v)


def kept_where_not_zero(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The mask holds twos: all that is not zero is kept."""
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)).div(2.0)
    gone = (keep == 0).view(keep.shape[0], 1, 1, -1).expand_as(scores)
    return torch.softmax(scores.masked_fill(gone, torch.full((), -float("inf"))), dim=-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, fill: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)).div(torch.full([], 2.8))
    scores = torch.where(keep, scores, torch.full((), fill))
    return torch.matmul(scores.softmax(-1), v), k, v


def filled_with_a_score(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    """-1.5 is a score like another."""
    return filled(q, k, v, keep, -1.5)


def filled_with_the_lowest_number(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    """A query without any key gets the mean of all values."""
    return filled(q, k, v, keep, torch.finfo(torch.float32).min)


def some(*shape: int) -> Tensor:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.3
    keep[..., 3, :] = False
    return keep


TWOS = torch.tensor([[2] * 16, [0] * 8 + [2] * 8])

MISCOMPILED: dict[str, tuple[Program, tuple[Tensor, ...]]] = {
    "over queries": (over_queries, tensors(2, 4, 16, 16)),
    "over heads, gradients": (with_gradients(over_heads), tensors(2, 4, 16, 16)),
    "filled with a score": (filled_with_a_score, (*tensors(2, 16, 4, 8), some(1, 1, 16, 16))),
    "over heads": (over_heads, tensors(2, 4, 16, 16)),
    "over queries, three dimensions": (over_queries_of_three_dimensions, tensors(16, 16, 16)),
    "over queries, gradients": (with_gradients(over_queries), tensors(2, 4, 16, 16)),
    "a mask of twos": (kept_where_not_zero, (*tensors(2, 16, 4, 8), TWOS)),
    "a query without a key": (filled_with_the_lowest_number, (*tensors(2, 16, 4, 8), some(1, 1, 16, 16))),
}


# each costs a compilation: the first three in every run, the others in the long one
SOME = [pytest.param(name, marks=[pytest.mark.slow] if i > 2 else []) for i, name in enumerate(MISCOMPILED)]


@pytest.mark.parametrize("name", SOME)
def test_plain_inductor_gets_it_wrong(name: str) -> None:
    plain_is_wrong(*MISCOMPILED[name])


@pytest.mark.parametrize("name", SOME)
def test_it_is_right_behind_the_pass(name: str) -> None:
    fn, args = MISCOMPILED[name]
    assert error(fn, args, "attnpass") < 1e-4
    report = attnpass.report()
    assert report.sites or report.misses
    left = report.misses or report.replaced < len(report.sites)
    assert (fence.NOTE in report.notes) == bool(left)


def test_the_report_says_what_was_done_and_why() -> None:
    compiled(over_queries, tensors(2, 4, 16, 16), "attnpass")
    assert "inductor's own attention patterns" in str(attnpass.report())
    assert "196468" in str(attnpass.report())


def test_where_nothing_is_left_nothing_is_said() -> None:
    compiled(attention, tensors(2, 4, 16, 16), "attnpass")
    assert attnpass.report().replaced == 1
    assert attnpass.report().notes == ()


def test_symbolic_sizes_change_nothing() -> None:
    assert error(over_queries, tensors(2, 4, 16, 16), "attnpass", dynamic=True) < 1e-4


# -- what the user leaves alone stays as he wrote it -------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)).mul(0.25), dim=-1).matmul(v)


def test_a_site_that_is_to_be_kept_is_not_fused_behind_our_back() -> None:
    with counting() as count:
        compiled(attention, tensors(2, 4, 16, 16), "attnpass", options={"kernel": "keep"})
        assert count() == 0
        assert fence.NOTE in attnpass.report().notes


def test_another_compilation_has_its_patterns_afterwards() -> None:
    before = config.joint_custom_pre_pass, config.joint_custom_post_pass
    args = tensors(2, 4, 16, 16)
    with counting() as count:
        compiled(attention, args, "attnpass", options={"kernel": "keep"})
        assert (config.joint_custom_pre_pass, config.joint_custom_post_pass) == before
        compiled(attention, args, "inductor")
        assert count() == 1


def test_two_threads_do_not_see_one_another() -> None:
    args = tensors(2, 4, 16, 16)
    found: dict[str, float] = {}

    def work(backend: str, fn: Program) -> None:
        found[backend] = distance(torch.compile(fn, backend=backend)(*args), eager(fn, args))

    with counting() as count:
        threads = [
            threading.Thread(target=work, args=("attnpass", lambda q, k, v: over_queries(q, k, v))),
            threading.Thread(target=work, args=("inductor", lambda q, k, v: attention(q, k, v))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found["attnpass"] < 1e-4
        assert found["inductor"] < 1e-4
        assert count() == 1


def test_a_backward_that_is_compiled_later_elsewhere_is_right() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 16, 16))
    wanted = torch.autograd.grad(over_heads(q, k, v).sin().sum(), (q, k, v))
    out = torch.compile(over_heads, backend="attnpass")(q, k, v)
    compiled_otherwise = torch.compile(attention, backend="inductor")(q.detach(), k.detach(), v.detach())
    assert compiled_otherwise.isfinite().all()
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(torch.autograd.grad(out.sin().sum(), (q, k, v))))
    thread.start()
    thread.join()
    assert distance(got[0], wanted) < 1e-4


def test_another_inner_backend_that_ends_in_inductor_is_fenced_too() -> None:
    from torch._inductor.compile_fx import compile_fx

    assert error(over_queries, tensors(2, 4, 16, 16), "attnpass", options={"inner": compile_fx}) < 1e-4


@pytest.mark.parametrize("ends", [True, False], ids=["inductor", "another backend"])
def test_without_a_fence_inductor_looks_for_nothing_and_the_report_says_why(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.compile_fx import compile_fx

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such setting")

    monkeypatch.setattr(fence, "inductor_settings", fail)
    monkeypatch.setattr(warn, "_told", False)
    options, args = {} if ends else {"inner": compile_fx}, tensors(2, 4, 16, 16)
    with counting() as count:
        with pytest.warns(RuntimeWarning, match="fence: RuntimeError: no such setting"):
            off = error(over_queries, args, "attnpass", options=options)
        assert count() == 0
    assert off < 1e-4
    (failure,) = attnpass.report().failures
    assert (failure.stage, failure.part) == ("fence", "all patterns of inductor")


# -- the two passes ----------------------------------------------------------------------------------------------------


def test_every_attention_pattern_of_this_torch_has_the_quotient_that_is_hidden() -> None:
    """All that write scaled_dot_product_attention have it; nothing else has, so nothing else is kept from its work."""
    from torch._inductor.fx_passes import joint_graph, serialized_patterns

    joint_graph.lazy_init(torch.device("cpu"))
    patterns = [
        entry.pattern
        for matcher in (joint_graph.early_patterns, *joint_graph.pass_patterns)
        for each in matcher.patterns.values()
        for entry in each
    ]
    stored = {
        id(value)
        for module in pkgutil.iter_modules(serialized_patterns.__path__, f"{serialized_patterns.__name__}.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if name.startswith("_sfdp_pattern")
    }
    attention = [pattern for pattern in patterns if id(pattern) in stored]
    others = [pattern for pattern in patterns if id(pattern) not in stored]
    assert len({id(pattern) for pattern in attention}) > 30
    assert all(map(_has_quotient, attention))
    assert others
    assert not any(map(_has_quotient, others))


def _has_quotient(pattern: Any) -> bool:
    """exp(...) divided by something, anywhere in the pattern."""
    from torch._inductor.pattern_matcher import PatternExpr

    seen: set[int] = set()
    work = [pattern]
    while work:
        one = work.pop()
        if isinstance(one, list | tuple):
            work += one
        if not isinstance(one, PatternExpr) or id(one) in seen:
            continue
        seen.add(id(one))
        args = getattr(one, "args", ())
        work += [*args, *getattr(one, "kwargs", {}).values(), *getattr(one, "outputs", ())]
        if _calls(one, torch.ops.aten.div.Tensor) and args and _calls(args[0], EXP):
            return True
    return False


def _calls(pattern: Any, target: Any) -> bool:
    return target in getattr(pattern, "fns", ())


def softmax_graph() -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    exp = graph.call_function(EXP, (x,))
    total = graph.call_function(torch.ops.aten.sum.dim_IntList, (exp, [-1], True))
    quotient = graph.call_function(torch.ops.aten.div.Tensor, (exp, total))
    other = graph.call_function(EXP, (quotient,))
    graph.output(other)
    return graph


def test_only_numerators_are_hidden_and_all_come_back() -> None:
    graph = softmax_graph()
    before = str(graph)
    fence.hide(graph)
    assert [node.target for node in graph.nodes if node.target in (EXP, HIDDEN)] == [HIDDEN, EXP]
    fence.show(graph)
    assert str(graph) == before


def test_what_stays_hidden_is_computed_all_the_same() -> None:
    class Hidden(fence._Fence):
        def __call__(self, graph: Graph) -> None:
            fence.hide(graph)

    options = {"joint_custom_pre_pass": Hidden(())}
    assert error(over_queries, tensors(2, 4, 16, 16), "inductor", options=options) < 1e-4


# -- the user's own settings -------------------------------------------------------------------------------------------


class Looking(CustomGraphPass):
    """A user's pass: notes which operators it meets."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.met: list[set[Any]] = []

    def __call__(self, graph: Graph) -> None:
        self.met.append({node.target for node in graph.nodes})

    def uuid(self) -> str | None:
        return self.name


@pytest.mark.parametrize("how", ["options", "process"])
def test_passes_of_the_user_run_on_the_graph_as_it_is(how: str) -> None:
    before, after = Looking("before"), Looking("after")
    passes = {"joint_custom_pre_pass": before, "joint_custom_post_pass": after}
    args = tensors(2, 4, 16, 16)
    with counting() as count:
        if how == "options":
            result = compiled(over_queries, args, "attnpass", options={"inductor": passes})
        else:
            with config.patch(passes):
                result = compiled(over_queries, args, "attnpass")
        assert count() == 0
    assert distance(result, eager(over_queries, args)) < 1e-4
    for seen in (before.met, after.met):
        assert len(seen) == 1
        assert EXP in seen[0]
        assert HIDDEN not in seen[0]


def test_a_mode_keeps_its_settings() -> None:
    inner: Any = Setup.of("max-autotune-no-cudagraphs", None).inner
    assert inner.config["max_autotune"] is True
    assert isinstance(inner.config["joint_custom_pre_pass"], fence.Hide)


def test_a_fence_is_not_built_twice() -> None:
    once = attnpass.inductor_settings({"max_autotune": True})
    assert attnpass.inductor_settings(once) == once
    assert once["max_autotune"] is True


def test_the_identity_tells_passes_apart() -> None:
    def identity(*theirs: Any) -> Any:
        return fence.Hide(theirs).uuid()

    assert identity() == identity() != fence.Show(()).uuid()
    assert identity(Looking("a")) == identity(Looking("a"))
    assert len({identity(), identity(Looking("a")), identity(Looking("b"))}) == 3
    assert identity(Looking(None)) is None  # what has no identity is not cached, with us or without
    assert identity(lambda graph: None) is None


def test_the_identity_holds_which_kernels_torch_may_take() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = fence.Hide(()).uuid()
    with sdpa_kernel(SDPBackend.MATH):
        assert fence.Hide(()).uuid() != before
    assert fence.Hide(()).uuid() == before


# -- caches ------------------------------------------------------------------------------------------------------------

CACHED = """
import sys, torch
from torch._dynamo.utils import counters
from tests.plain import distance
from tests.test_fence import over_queries, tensors
args = tensors(2, 4, 16, 16)
found = distance(torch.compile(over_queries, backend=sys.argv[1])(*args), over_queries(*args))
hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print("wrong" if found > 1e-2 else "right", "hit" if hits else "miss")
"""


def run(backend: str, folder: Path) -> str:
    import os

    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CACHED, backend]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["inductor", "attnpass"])
def test_processes_that_share_a_cache_do_not_get_one_anothers_results(first: str, tmp_path: Path) -> None:
    second = {"inductor": "attnpass", "attnpass": "inductor"}[first]
    results = {first: run(first, tmp_path), second: run(second, tmp_path)}
    assert results["attnpass"] == "right miss"
    assert results["inductor"].endswith("miss")
    assert run("attnpass", tmp_path) == "right hit"


# -- exported programs -------------------------------------------------------------------------------------------------


class OverQueries(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return over_queries(q, k, v)


def test_a_rewritten_program_in_which_something_is_left_says_how_to_compile_it() -> None:
    program, report = attnpass.rewrite(torch.export.export(OverQueries(), tensors(2, 4, 16, 16)))
    assert report.notes == (fence.UNFENCED,)
    assert attnpass.audit(program).notes == ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ahead_of_time_compilation_can_be_fenced(tmp_path: Path) -> None:
    args = tensors(2, 4, 16, 16)
    program, _ = attnpass.rewrite(torch.export.export(OverQueries(), args))
    file = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2"), inductor_configs=attnpass.inductor_settings()
    )
    assert distance(torch._inductor.aoti_load_package(file)(*args), over_queries(*args)) < 1e-4


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_rows_without_a_key_in_half_precision() -> None:
    """A dense float mask over a whole row: eager gives the mean of the values, inductor alone keeps the scores."""
    q, k, v = (x.half().cuda() for x in tensors(2, 16, 4, 64))
    mask = torch.zeros(2, 1, 1, 16, dtype=torch.float16, device="cuda")
    mask[1] = torch.finfo(torch.float16).min

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
        return (torch.matmul(q, k.transpose(-2, -1)).div(8.0) + mask).softmax(dim=-1).matmul(v)

    assert error(masked, (q, k, v, mask), "attnpass", options={"kernel": "native"}) < 5e-3
    assert [site.kernel for site in attnpass.report().sites] == ["native"]
    # what is kept is inductor's, which computes in float32 and so has the scores that float16 loses beside the mask
    kept = compiled(masked, (q, k, v, mask), "attnpass", options={"kernel": "keep"})
    assert distance(kept.double(), masked(*(x.double() for x in (q, k, v, mask)))) < 5e-3
