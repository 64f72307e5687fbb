"""FlexAttention: masks and scores as functions, blocks, sinks, rows without a key; on the CPU.

Most tests run the rewritten graph as it stands, where the operation computes all scores by itself, gradients included:
that shows what was written into the graph. A few compile it, as users do.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.checkpoint import checkpoint

import attnpass
from attnpass import choose, cost
from attnpass.capture import frames
from attnpass.capture.dynamo import backend
from attnpass.cost import rated_us, unfused_us
from attnpass.kernels import flex
from attnpass.kernels.flex import Flex
from attnpass.ledger import Report
from attnpass.spec import AttentionSpec, BiasSpec, EmptyRow, MaskSpec
from tests.flex_cases import BY_NAME, CASES, INF, Attention, Case, capped, grid, inputs, masked, scores, weighted
from tests.zoo.numbers import complaints, run, truth

FLEX = attnpass.Policy(kernel="flex")  # by name: whatever it is expected to cost
HOP = torch.ops.higher_order.flex_attention
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that is written on CUDA: with gradients and the log-sum-exp, which the operation by itself has here."""
    refusals = Flex.refusals

    def fewer(self: Flex, spec: AttentionSpec) -> list[Any]:
        return [r for r in refusals(self, spec) if r.code != "grad" and "symbolic sizes on the CPU" not in r.text]

    monkeypatch.setattr(Flex, "refusals", fewer)
    monkeypatch.setattr(Flex, "gives_lse", lambda self, spec: True)
    monkeypatch.setattr(flex, "apart", lambda: torch.ops.aten.clone.default)


class Flexed:
    """A function compiled with the pass, FlexAttention being the only kernel, and the graphs that came of it."""

    def __init__(self, function: Callable[..., Any], *, inner: str = "eager", dynamic: bool | None = False) -> None:
        self.graphs: list[GraphModule] = []
        self.reports: list[Report] = []
        self.inner = inner
        self.compiled = torch.compile(function, backend=self._backend, fullgraph=True, dynamic=dynamic)

    def _backend(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose, "kernels", lambda: (Flex(),))
            done = frames.process(gm, example_inputs, name="graph", policy=FLEX, rewrite=True, compiled=True)
        self.graphs.append(gm)
        self.reports.append(done.report)
        return lookup_backend(self.inner)(gm, example_inputs)

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    @property
    def gm(self) -> GraphModule:
        (gm,) = self.graphs
        return gm

    @property
    def kernels(self) -> list[str | None]:
        assert not any(report.failures for report in self.reports)
        return [site.kernel for report in self.reports for site in report.sites]


def calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is HOP]


def held_to_float64(module: nn.Module, given: tuple[Tensor, ...], call: Callable[..., Any], *, grad: bool) -> list[str]:
    with contextlib.nullcontext() if grad else torch.no_grad():
        mine = run(module, given, call=call, grad=grad)
        return complaints(mine, run(module, given, grad=grad), truth(module, given, grad=grad))


# -- what is written ---------------------------------------------------------------------------------------------------


@by_case
def test_a_case_computes_the_same(case: Case) -> None:
    module = Attention(case)
    found = Flexed(module)
    assert not held_to_float64(module, inputs(), found, grad=False)
    assert found.kernels == ["flex"]


@by_case
def test_a_case_computes_the_same_in_the_form_for_cuda(case: Case, as_on_cuda: None) -> None:
    module = Attention(case)
    found = Flexed(module)
    assert not held_to_float64(module, inputs(grad=case.grad), found, grad=case.grad)
    assert found.kernels == ["flex"]


@by_case
def test_no_tensor_over_queries_and_keys_is_left(case: Case, as_on_cuda: None) -> None:
    given, found = inputs(200), Flexed(Attention(case))
    with torch.no_grad():
        found(*given)
    shapes = {node.name: node.meta.get("example_value") for node in found.gm.graph.nodes if node.op != "placeholder"}
    large = [n for n, x in shapes.items() if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[-2:] == (200, 200)]
    assert not large
    assert "softmax" not in found.gm.code


@pytest.mark.parametrize(
    ("queries", "length"),
    [
        (1, 300),
        (129, 257),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((7, 130), (130, 260), (128, 128))),
    ],
)
def test_other_lengths(queries: int, length: int, as_on_cuda: None) -> None:
    cases = [case for case in CASES if case.grad]
    module = Attention(*cases)
    found = Flexed(module)
    given = inputs(length, queries=queries, grad=True)
    assert not held_to_float64(module, given, found, grad=True)
    assert set(found.kernels) == {"flex"}


def test_widths_of_keys_and_values_may_differ(as_on_cuda: None) -> None:
    module = Attention(*(case for case in CASES if case.grad))
    found = Flexed(module)
    assert not held_to_float64(module, inputs(140, 24, v_width=40, grad=True), found, grad=True)


def listed(gm: GraphModule, given: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    """The arguments that each flex_attention in a graph is called with."""
    seen: list[tuple[Any, ...]] = []

    class Recorder(Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is HOP:
                seen.append(args)
            return super().call_function(target, args, kwargs)

    named = {f"l_inputs_{n}_": x for n, x in enumerate(given)}
    wanted = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        Recorder(gm).run(*[named[name] for name in wanted])
    return seen


def dense_blocks(many: Tensor, which: Tensor) -> Tensor:
    out = torch.zeros(which.shape, dtype=torch.bool)
    for at in itertools.product(*map(range, many.shape)):
        out[at][which[at][: int(many[at])].long()] = True
    return out


@by_case
def test_blocks_are_those_of_torch(case: Case, as_on_cuda: None) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    given = inputs(300)
    found = Flexed(Attention(case))
    with torch.no_grad():
        found(*given)
    ((q, k, _, _, blocks, _, _, _, reads),) = listed(found.gm, given)
    keep = blocks[-1]

    def function(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        out: Tensor = keep(b, h, i, j, *reads)
        return out

    true = create_block_mask(function, 2, 1, q.shape[2], k.shape[2], device="cpu")
    theirs = true.as_tuple()
    assert len(theirs) == len(blocks)
    assert blocks[:2] == theirs[:2]
    assert blocks[-3:-1] == theirs[-3:-1]
    part, full = dense_blocks(*blocks[2:4]), dense_blocks(*blocks[4:6]) if blocks[4] is not None else None
    true_part, true_full = dense_blocks(*theirs[2:4]), dense_blocks(*theirs[4:6])
    if full is None:
        assert not (true_part & ~part).any()
    elif case.exact:
        assert torch.equal(part.expand_as(true_part), true_part)
        assert torch.equal(full.expand_as(true_full), true_full)
    else:
        assert not (full & ~true_full).any()
        assert not ((true_part | true_full) & ~(part | full)).any()
        assert not (part & full).any()
    for rows, columns in ((2, 6), (4, 8)):  # what the backward reads is the same, by keys
        if blocks[rows] is not None:
            by_rows, by_columns = dense_blocks(*blocks[rows : rows + 2]), dense_blocks(*blocks[columns : columns + 2])
            assert torch.equal(by_rows, by_columns.mT)


def test_sites_of_one_mask_share_functions_and_blocks(as_on_cuda: None) -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = grid(q, k)
        for keep in (j <= i, (j <= i) & (j > i - 50)) * 2:
            q = weighted(masked(capped(scores(q, k)), keep), v, q)
        return q

    found, given = Flexed(layers), inputs(200, grad=True)[:3]
    found(*given)
    first, second, third, fourth = calls(found.gm)
    assert [node.args[3] for node in (second, third, fourth)] == [first.args[3]] * 3
    assert third.args[4] == first.args[4]
    assert fourth.args[4] == second.args[4]
    assert first.args[4] != second.args[4]
    in_each = 3  # the blocks of a row, those up to each, and each that is listed
    assert sum(node.target is torch.ops.aten.sum.dim_IntList for node in found.gm.graph.nodes) == 8 * in_each


class SelfAttention(Attention):
    """q, k and v from one tensor, so that they are of one length whatever it is."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = x.view(*x.shape[:2], 8, 32).transpose(1, 2)
        return super().forward(parts[:, :4], parts[:, 4:6], parts[:, 6:])


def test_sizes_may_be_symbolic(as_on_cuda: None) -> None:
    names = ("causal", "window", "chunks", "prefix", "cap_alone", "slopes")
    module = SelfAttention(*(case for case in CASES if case.name in names))
    found = Flexed(module, dynamic=None)

    def marked(x: Tensor) -> Any:
        torch._dynamo.mark_dynamic(x, 1)
        return found(x)

    for length in (200, 300, 128, 129):
        assert not held_to_float64(module, (torch.randn(2, length, 256, requires_grad=True),), marked, grad=True)
    assert found.kernels == ["flex"] * len(names)


def test_symbolic_sizes_beside_data_are_left_alone(as_on_cuda: None) -> None:
    (site,) = _dynamic_padding()
    assert [r.code for v in site.verdicts for r in v.refusals] == ["no_fused_form"]


def _dynamic_padding() -> tuple[Any, ...]:
    found = Flexed(Attention(*(case for case in CASES if case.name == "padded")), dynamic=None)
    given = inputs(200)
    for x, dim in zip(given[:4], (2, 2, 2, 1), strict=True):
        torch._dynamo.mark_dynamic(x, dim)
    with torch.no_grad():
        found(*given)
    return found.reports[0].sites


@pytest.mark.parametrize("inner", ["aot_eager"])
def test_within_checkpoints(inner: str, as_on_cuda: None) -> None:
    class Checkpointed(Attention):
        def forward(self, *given: Tensor) -> Any:
            return checkpoint(super().forward, *given, use_reentrant=False)

    module = Checkpointed(*(case for case in CASES if case.name in ("window", "sink")))
    found = Flexed(module, inner=inner)
    assert not held_to_float64(module, inputs(grad=True), found, grad=True)
    assert found.kernels == ["flex", "flex"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusals(function: Any, given: tuple[Any, ...], inner: str = "inductor") -> list[str]:
    """Why not FlexAttention."""
    report = attnpass.audit(function, *given)
    (site,) = report.sites
    (verdict,) = [v for v in site.verdicts if v.kernel == "flex"]
    return [r.code for r in verdict.refusals]


def only(name: str) -> Attention:
    return Attention(*(case for case in CASES if case.name == name))


def test_an_audit_answers_as_for_inductor() -> None:
    with torch.no_grad():
        assert refusals(only("window"), inputs()) == []


def test_training_on_the_cpu_is_refused() -> None:
    assert refusals(only("window"), inputs(grad=True)) == ["grad"]


def test_nothing_is_given_to_a_backend_that_would_not_fuse_it() -> None:
    fast = torch.compile(only("window"), backend=backend, options={"inner": "eager"})
    with torch.no_grad():
        fast(*inputs())
    (site,) = attnpass.report().sites
    assert [[r.code for r in v.refusals] for v in site.verdicts if v.kernel == "flex"] == [["not_compiled"]]


def test_nothing_is_written_into_an_exported_program() -> None:
    program = torch.export.export(only("window"), inputs())
    _, report = attnpass.rewrite(program)
    assert "not_compiled" in [r.code for v in report.sites[0].verdicts for r in v.refusals]


def test_several_masks_that_may_leave_no_key_are_no_function() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        x = capped(scores(q, k)).masked_fill(~pad[:, None, None, :], -INF)
        return weighted(masked(x, grid(q, k)[1] != 3), v, q)

    with torch.no_grad():
        assert refusals(attention, inputs()[:4]) == ["not_expressed"]


def test_gradients_through_the_cap_of_a_row_without_a_key_are_refused(as_on_cuda: None) -> None:
    found = Flexed(only("padded_and_capped"))
    found(*inputs(grad=True))
    assert [r.code for v in found.reports[0].sites[0].verdicts for r in v.refusals] == ["empty_rows"]


def test_where_one_kernel_cannot_be_written_the_next_best_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flex, "cost", lambda self, spec: 1.0)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not today")

    monkeypatch.setattr(Flex, "emit", broken)
    with torch.no_grad():
        report = attnpass.audit(only("causal"), *inputs())
    assert [(site.kernel, site.reason) for site in report.sites] == [("native", None)]


@pytest.mark.parametrize(
    ("form", "width", "dtype", "length", "warps"),
    [
        ("padded", 64, torch.bfloat16, 300, 8),
        ("padded", 64, torch.float16, 300, 8),
        ("padded", 64, torch.float32, 300, None),
        ("padded", 32, torch.bfloat16, 300, None),
        ("padded", 64, torch.bfloat16, 100, None),
        ("window", 64, torch.bfloat16, 300, None),
    ],
)
def test_a_mask_that_reads_a_tensor_gets_enough_registers_on_hopper(
    form: str,
    width: int,
    dtype: torch.dtype,
    length: int,
    warps: int | None,
    as_on_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flex, "_on_hopper", lambda device: True)
    fast = Flexed(only(form))
    with torch.no_grad():
        fast(*inputs(length, width, dtype=dtype))
    (call,) = calls(fast.gm)
    assert call.args[6].get("fwd_num_warps") == warps


# -- which kernel ------------------------------------------------------------------------------------------------------


NOTHING = MaskSpec()
TABLE = BiasSpec(shape=(1, 16, 512, 512), dtype="bfloat16")


def spec(
    mask: MaskSpec = NOTHING, *, length: int = 4096, batch: int = 2, width: int = 128, **more: Any
) -> AttentionSpec:
    shape = (batch, 16, length, width)
    whole = {"dtype": "bfloat16", "device": "cuda", **more}
    return AttentionSpec(q=shape, k=shape, v=shape, scale=0.1, mask=mask, **whole)


def on_cpu(mask: MaskSpec = NOTHING, *, length: int = 2048, dtype: str = "float32", **more: Any) -> AttentionSpec:
    return spec(mask, length=length, batch=1, width=64, device="cpu", dtype=dtype, **more)


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        ("native", spec()),
        ("native", spec(MaskSpec(causal=0))),
        ("native", spec(MaskSpec(key_padding=True), length=512, batch=32, width=64)),
        ("native", spec(MaskSpec(causal=0, key_padding=True), length=32)),
        ("flex", spec(MaskSpec(causal=0, window=(1023, None)), length=8192, batch=1)),
        ("flex", spec(MaskSpec(causal=0, key_padding=True), empty_rows=EmptyRow.MEAN, length=2048, width=64)),
        ("flex", spec(MaskSpec(causal=0, document=True))),
        ("flex", spec(MaskSpec(window=(512, 512)), length=8192)),
        ("flex", spec(MaskSpec(causal=0, chunk=1024), length=8192)),
        ("native", spec(bias=(TABLE,), empty_rows=EmptyRow.NAN, length=512, batch=16, width=64)),
        ("native", spec(bias=(TABLE,), empty_rows=EmptyRow.NAN, length=8192, batch=1, width=64)),
        ("flex", spec(MaskSpec(causal=0), bias=(TABLE,), length=2048)),
        ("native", spec(MaskSpec(dense=True), length=8192, width=64)),  # all blocks are looked at pair by pair
        ("native", on_cpu()),
        ("native", on_cpu(MaskSpec(causal=0))),
        ("native", on_cpu(MaskSpec(key_padding=True))),
        ("flex", on_cpu(MaskSpec(causal=0, window=(255, None)))),
        ("flex", on_cpu(MaskSpec(causal=0, window=(255, None)), dtype="bfloat16")),
        ("flex", on_cpu(MaskSpec(causal=0, key_padding=True))),
        ("native", on_cpu(MaskSpec(causal=0, key_padding=True), dtype="bfloat16")),
    ],
)
def test_the_cheaper_kernel(wanted: str, asked: AttentionSpec) -> None:
    costs = {name: rated_us(asked, name) for name in ("native", "flex")}
    assert None not in costs.values()
    assert min(costs, key=lambda name: costs[name] or 0.0) == wanted


@pytest.mark.parametrize(
    ("kernel", "asked"),
    [
        ("flex", spec(device="mps")),
        ("a kernel that nobody measured", spec()),
        ("native", on_cpu(dtype="float16")),
        ("native", on_cpu(length=32)),  # compiling would take longer than ever is saved
        ("flex", on_cpu(MaskSpec(causal=0), bias=(TABLE,))),
    ],
)
def test_nothing_is_said_of_what_was_not_measured(kernel: str, asked: AttentionSpec) -> None:
    assert rated_us(asked, kernel) is None


def test_the_original_is_measured_on_gpus() -> None:
    assert unfused_us(spec()) is not None
    assert unfused_us(on_cpu()) is None


@pytest.mark.parametrize(
    "asked",
    [
        on_cpu(length=16, dtype="bfloat16"),
        on_cpu(length=2048, dtype="bfloat16"),
        on_cpu(length="s0", dtype="bfloat16"),
        on_cpu(length=128, dtype="bfloat16", softcap=30.0),
        on_cpu(length=128, dtype="bfloat16", sink=True),
        on_cpu(length=128, dtype="float16"),
        spec(length=128, batch=64, device="cpu", width=64),  # scores that no cache holds
    ],
)
def test_of_these_the_original_was_not_measured(asked: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_measured_bfloat16", lambda: True)
    assert unfused_us(asked) is None


def test_nothing_is_said_of_other_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (True, False):
        monkeypatch.setattr(cost, "_measured_bfloat16", lambda known=known: known)
        assert (unfused_us(on_cpu(length=128, dtype="bfloat16")) is not None) is known


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (on_cpu(length=96, dtype="bfloat16"), True),
        (on_cpu(MaskSpec(causal=0), length=128, dtype="bfloat16"), True),
        (on_cpu(MaskSpec(causal=0), length=512, dtype="bfloat16"), True),
        (on_cpu(MaskSpec(causal=0), length=512, dtype="bfloat16", groups=4), True),
        (on_cpu(MaskSpec(key_padding=True), length=512, dtype="bfloat16", grad=True), True),
        (on_cpu(MaskSpec(key_padding=True), length=128, dtype="bfloat16"), True),
        (on_cpu(MaskSpec(key_padding=True), length=512, dtype="bfloat16"), False),  # it depends on how it is spelled
        (on_cpu(bias=(TABLE,), length=512, dtype="bfloat16"), True),
        (on_cpu(bias=(TABLE,), length=512), False),
        (on_cpu(MaskSpec(causal=0), length=700, dtype="bfloat16"), True),
        (on_cpu(MaskSpec(causal=0), length=800, dtype="bfloat16"), False),  # as 1024
        (on_cpu(MaskSpec(causal=0), length=128), False),
        (on_cpu(MaskSpec(key_padding=True), length=512, grad=True), False),
    ],
)
def test_short_sequences_in_bfloat16_are_faster_as_they_are(
    asked: AttentionSpec, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernel for the CPU takes blocks of few queries there."""
    monkeypatch.setattr(cost, "_measured_bfloat16", lambda: True)
    now, fused = unfused_us(asked), rated_us(asked, "native")
    assert fused is not None
    assert (now is not None and now < fused) is kept


def test_a_short_sequence_in_bfloat16_is_left_alone_unless_a_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_measured_bfloat16", lambda: True)
    module, given = only("causal"), inputs(256, 64, kv_heads=4, dtype=torch.bfloat16, grad=False)
    for options, kernel in (({}, None), ({"min_gain": -2.0}, "native"), ({"kernel": "native"}, "native")):
        torch._dynamo.reset()
        attnpass.reset()
        torch.compile(module, backend=backend, options={"inner": "eager", **options})(*given)
        (site,) = attnpass.report().sites
        assert site.kernel == kernel
        assert (site.reason.code if site.reason else None) == (None if kernel else "not_profitable")


# -- compiled ----------------------------------------------------------------------------------------------------------


def test_a_window_and_a_soft_cap_through_inductor() -> None:
    module, given = only("window"), inputs()
    fast = torch.compile(copy.deepcopy(module), backend=backend, fullgraph=True)
    assert not held_to_float64(module, given, fast, grad=False)
    assert [site.kernel for site in attnpass.report().sites] == ["flex"]


@pytest.mark.slow
@pytest.mark.parametrize(("window", "kernel"), [(100, "flex"), (900, "native")])
def test_on_the_cpu_a_long_sequence_with_a_narrow_window_is_given_as_a_function(window: int, kernel: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = grid(q, k)
        return weighted(masked(scores(q, k), (j <= i) & (j > i - window)), v, q)

    given = inputs(1024, 64)[:3]
    with torch.no_grad():
        out = torch.compile(attention, backend=backend, fullgraph=True)(*given)
        torch.testing.assert_close(out, attention(*given))
    assert [site.kernel for site in attnpass.report().sites] == [kernel]


@pytest.mark.slow
def test_operands_that_are_views_through_inductor() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(64, 3 * 64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.view(2, 100, 2, 32).transpose(1, 2) for part in self.out(x).chunk(3, -1))
            return weighted(capped(scores(q, k)), v, q)

    module, given = Layer(), (torch.randn(2, 100, 64),)
    found = Flexed(module, inner="inductor")
    assert not held_to_float64(module, given, found, grad=False)
    assert found.kernels == ["flex"]


@pytest.mark.slow
def test_every_case_through_inductor() -> None:
    module, given = Attention(*CASES), inputs()
    found = Flexed(module, inner="inductor")
    assert not held_to_float64(module, given, found, grad=False)
    assert set(found.kernels) == {"flex"}


WITHOUT_A_KEY = {"none": (0, 200), "a sequence": (0, 650), "all": (700, 700), "some queries": (590, 597)}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("queries", [1, 5, 16])
def test_for_few_queries_the_kernel_answers_rows_without_a_key(queries: int, inner: str) -> None:
    """One graph for all data: lists, mask and bias tell which rows these are."""

    def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
        i, j = grid(q, k)
        x = scores(q, k) - 0.1 * (i - j).abs()
        return weighted(masked(x, (j <= i - 100) & pad[:, None, None, :]), v, q)

    module = Attention(Case("few", attention))
    found = Flexed(module, inner=inner)
    for first in WITHOUT_A_KEY.values():
        q, k, v, _, *rest = inputs(700, queries=queries)
        given = (q, k, v, torch.arange(700) >= torch.tensor(first)[:, None], *rest)
        assert not held_to_float64(module, given, found, grad=False), first
    assert found.kernels == ["flex"]
    assert torch.ops.aten.mean.dim not in {node.target for node in found.gm.graph.nodes}


@pytest.mark.parametrize(("queries", "grad"), [(17, False), (16, True)], ids=["more queries", "gradients"])
def test_elsewhere_they_are_answered_afterwards(queries: int, grad: bool, as_on_cuda: None) -> None:
    module = Attention(BY_NAME["padded"])
    found, given = Flexed(module), list(inputs(200, queries=queries, grad=grad))
    given[3] = torch.arange(200) >= torch.tensor([[0], [200]])
    assert not held_to_float64(module, tuple(given), found, grad=grad)
    assert torch.ops.aten.mean.dim in {node.target for node in found.gm.graph.nodes}


def test_one_query_and_a_sink_through_inductor() -> None:
    """Its template for one query counts full blocks where there is no list of them."""
    module, given = Attention(BY_NAME["sink_and_padding"]), inputs(1300, queries=1)
    found = Flexed(module, inner="inductor")
    assert not held_to_float64(module, given, found, grad=False)
    assert found.kernels == ["flex"]


@pytest.mark.slow
def test_every_case_with_one_query_through_inductor() -> None:
    module, given = Attention(*CASES), inputs(1300, queries=1)
    found = Flexed(module, inner="inductor")
    assert not held_to_float64(module, given, found, grad=False)
    assert set(found.kernels) == {"flex"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "granite_swa"])
def test_models_with_a_soft_cap_or_sinks(name: str) -> None:
    from tests.models import torchvision_stub

    torchvision_stub.ensure()
    pytest.importorskip("transformers")
    model = tiny(name)
    ids = torch.randint(1, 99, (2, 150))
    seen = torch.ones(2, 150, dtype=torch.long)
    seen[0, :37] = 0
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        eager = model(ids, attention_mask=seen, use_cache=False).logits
        compiled = fast(ids, attention_mask=seen, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    report = attnpass.report()
    assert [site.kernel for site in report.sites] == ["flex", "flex"]
    assert {site.spec.mask.window for site in report.sites} == {None, (39, None)}
    assert all(site.spec.mask.key_padding for site in report.sites)


def tiny(name: str) -> nn.Module:
    import transformers

    size: dict[str, Any] = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 40, "pad_token_id": 0,
        "attn_implementation": "eager",
    }  # fmt: skip
    if name == "gemma2":
        config = transformers.Gemma2Config(**size, attn_logit_softcapping=5.0)
        return transformers.Gemma2ForCausalLM(config).eval()
    model: nn.Module
    if name == "granite_swa":
        layers = ["full_attention", "sliding_attention"]
        model = transformers.GraniteSWAForCausalLM(transformers.GraniteSWAConfig(**size, layer_types=layers)).eval()
    else:
        config = transformers.GptOssConfig(**size, num_local_experts=2, num_experts_per_tok=1)
        model = transformers.GptOssForCausalLM(config).eval()
    for key, parameter in model.named_parameters():
        if "sinks" in key:
            nn.init.normal_(parameter)
    return model
