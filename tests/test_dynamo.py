"""torch.compile: what the backend replaces, what it leaves alone, and that nothing is lost on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attnpass
from attnpass.capture import frames, lower
from attnpass.capture.dynamo import backend
from attnpass.capture.template import Tracer
from attnpass.ledger import Report

pytestmark = [
    # Dynamo itself looks at .grad of what follows a graph break, and makes an instance of what it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    return F.softmax(scores, dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, scale: float = 0.3) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.out(attention(q, k, v, self.scale).transpose(1, 2).reshape(x.shape))


class Net(nn.Module):
    def __init__(self, layers: int = 2, **kwargs: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(**kwargs) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Spy:
    """An inner backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def targets(self) -> list[Any]:
        return [node.target for gm in self.graphs for node in gm.graph.nodes]


def sample(length: int = 10, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 32)


def gradients(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    torch.manual_seed(1)
    out = model(x)
    found = torch.autograd.grad((out.float() ** 2).sum(), [x, *parameters], allow_unused=True, materialize_grads=True)
    return out.detach(), list(found)


def agrees(model: Any, x: Tensor, *, inner: Any = "eager", tolerance: float = 1e-4, **kwargs: Any) -> Report:
    """Compiled with the pass, `model` gives what it gives without: outputs, their strides, and gradients."""
    wanted, wanted_gradients = gradients(model, x)
    compiled = torch.compile(model, backend=backend, options={"inner": inner}, **kwargs)
    got, got_gradients = gradients(compiled, x)
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance, check_stride=True)
    torch.testing.assert_close(got_gradients, wanted_gradients, atol=10 * tolerance, rtol=10 * tolerance)
    report = attnpass.report()
    assert not report.failures
    return report


def codes(report: Report) -> list[str]:
    return [site.reason.code for site in report.sites if site.reason] + [miss.reason.code for miss in report.misses]


# -- what is replaced --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_attention_is_replaced_and_outputs_and_gradients_stay(inner: str) -> None:
    assert agrees(Net(), sample(), inner=inner).replaced == 2


def test_the_fused_call_takes_the_place_of_the_products_and_the_softmax() -> None:
    spy = Spy()
    agrees(Net(1), sample(), inner=spy)
    targets = spy.targets()
    assert SDPA in targets
    assert F.softmax not in targets
    assert torch.matmul not in targets
    assert torch._C._nn.linear in targets  # what is no attention stays the call that Dynamo recorded


def test_new_nodes_say_where_they_come_from_and_what_they_yield() -> None:
    spy = Spy()
    agrees(Net(1), sample(), inner=spy)
    node = next(node for node in spy.graphs[0].graph.nodes if node.target is SDPA)
    assert "test_dynamo.py" in node.meta["stack_trace"]
    assert node.meta["nn_module_stack"]
    value = node.meta["example_value"]
    assert tuple(value.shape) == (2, 4, 10, 8)
    assert value.requires_grad
    placeholder = next(iter(spy.graphs[0].graph.nodes)).meta["example_value"]
    assert value.fake_mode is placeholder.fake_mode


def test_the_report_says_where_each_site_is() -> None:
    report = agrees(Net(), sample())
    assert [site.where.module for site in report.sites] == ["layers.0", "layers.1"]
    assert {site.where.cls for site in report.sites} == {"Attention"}
    assert {site.where.code for site in report.sites} == {"return F.softmax(scores, dim=-1) @ v"}
    assert [site.id for site in report.sites] == ["graph0.s0", "graph0.s1"]


def test_multi_head_attention_that_computes_weights_is_opened_and_replaced() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=True)[0]

    spy = Spy()
    assert agrees(Model(), sample(), inner=spy).replaced == 1
    assert F.multi_head_attention_forward not in spy.targets()
    assert torch.ops.aten.softmax.int not in spy.targets()


def test_multi_head_attention_whose_weights_are_returned_is_left_whole() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, weights = self.inner(x, x, x, need_weights=True)
            return out + weights.sum()

    spy = Spy()
    report = agrees(Model(), sample(), inner=spy)
    assert codes(report) == ["weights_used"]
    assert F.multi_head_attention_forward in spy.targets()


def test_parts_of_a_tuple_are_read_where_they_are() -> None:
    spy = Spy()
    lin = nn.Linear(32, 96)

    def model(x: Tensor) -> Tensor:
        q, k, v = lin(x).chunk(3, dim=-1)
        return attention(q, k, v, 0.2)

    assert agrees(model, sample(), inner=spy).replaced == 1
    assert spy.targets().count("chunk") == 1


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expanded to": lambda keep, scores: keep.expand(scores.shape),
    "made of": lambda keep, scores: keep & torch.ones(scores.shape, dtype=torch.bool),
    "cut": lambda keep, scores: keep.expand((*scores.shape[:1], *scores.shape[-2:])),
}


@pytest.mark.parametrize("read", SHAPES)
def test_the_shape_of_scores_may_be_read_as_a_whole(read: str) -> None:
    # found by random programs: the scores are gone, and with them the call that gave their sizes
    def model(x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        keep = SHAPES[read](torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), scores)
        scores[~keep] = torch.finfo(scores.dtype).min
        return torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).softmax(-1) @ x

    x = sample()
    torch._dynamo.mark_dynamic(x, 1)
    assert agrees(model, x).replaced == 1


def test_a_mask_filled_with_a_literal_tensor_is_understood() -> None:
    def model(x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = torch.where(keep, x @ x.transpose(-1, -2), torch.tensor(-torch.inf))
        return scores.softmax(-1) @ x

    assert agrees(model, sample()).replaced == 1


def test_autocast_inside_the_graph_is_honoured() -> None:
    model = Net()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    report = agrees(run, sample(), tolerance=2e-2)
    assert report.replaced == 2
    assert {site.spec.dtype for site in report.sites} == {"bfloat16"}


def test_autocast_around_the_compiled_call_is_honoured() -> None:
    model, x = Net(), sample()
    compiled = torch.compile(model, backend=backend, options={"inner": "aot_eager"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x), atol=5e-2, rtol=5e-2)
    assert {site.spec.dtype for site in attnpass.report().sites} == {"bfloat16"}


@pytest.mark.parametrize("enter", [torch.no_grad, torch.inference_mode])
def test_a_region_without_gradients_is_known_to_be_one(enter: Any) -> None:
    lin = nn.Linear(32, 32)

    def model(x: Tensor) -> Tensor:
        with enter():
            inner = attention(lin(x), x, x, 0.2)
        return inner + attention(lin(x), x, x, 0.2)

    compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
    x = sample()
    torch.testing.assert_close(compiled(x), model(x))
    assert [(site.replaced, site.spec.grad) for site in attnpass.report().sites] == [(True, False), (True, True)]


@pytest.mark.parametrize("enter", [torch.no_grad, torch.inference_mode])
def test_compiling_without_gradients_works(enter: Any) -> None:
    model, x = Net(), sample()
    with enter():
        got = torch.compile(model, backend=backend, options={"inner": "aot_eager"})(x)
        torch.testing.assert_close(got, model(x))
    assert [(site.replaced, site.spec.grad) for site in attnpass.report().sites] == [(True, False)] * 2


# -- sizes that vary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_sizes_may_vary_after_the_rewrite(inner: str) -> None:
    model = Net()
    report = agrees(model, sample(), inner=inner, dynamic=True)
    assert report.replaced == 2
    compiled = torch.compile(model, backend=backend, options={"inner": inner}, dynamic=True)
    compiled(sample())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, batch in ((7, 3), (33, 5), (12, 2)):
            x = sample(length, batch)
            torch.testing.assert_close(compiled(x), model(x))


def test_the_pass_adds_no_guard_on_sizes() -> None:
    seen: list[tuple[int, int]] = []

    def watch(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        env = lower.shape_env(gm.graph)
        assert env is not None
        before = list(env.guards), dict(env.replacements)
        report = frames.process(gm, inputs, name="graph", policy=attnpass.Policy(), rewrite=True).report
        assert (list(env.guards), dict(env.replacements)) == before
        seen.append((report.replaced, len(report.sites)))
        return gm.forward

    def in_place(x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        scores[..., 3:] = -torch.inf
        return scores.softmax(-1) @ x

    torch.compile(Net(), backend=watch, dynamic=True)(sample())
    torch.compile(in_place, backend=watch, dynamic=True)(sample())
    assert seen[0] == (2, 2)
    assert len(seen) == 2


def test_a_scale_that_became_symbolic_is_honoured() -> None:
    # dynamic=True turns Python floats of modules into symbolic ones
    model = Net(1, scale=0.7)
    compiled = torch.compile(model, backend=backend, options={"inner": "eager"}, dynamic=True)
    x = sample()
    torch.testing.assert_close(compiled(x), model(x))
    model.layers[0].scale = 0.1
    torch.testing.assert_close(compiled(x), model(x))
    assert attnpass.report().replaced >= 1


def test_a_scale_read_from_data_is_honoured() -> None:
    def model(x: Tensor, s: Tensor) -> Tensor:
        return (x @ x.transpose(-1, -2) * s.item()).softmax(-1) @ x

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
        x = sample()
        for s in (torch.tensor(0.3), torch.tensor(0.6)):
            torch.testing.assert_close(compiled(x, s), model(x, s))
    assert [site.replaced for site in attnpass.report().sites] == [True]


# -- graphs inside graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_body_of_a_checkpoint_is_rewritten(inner: str) -> None:
    layer = Attention()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return x + checkpoint(self.layer, x, use_reentrant=False)

    report = agrees(Model(), sample(), inner=inner)
    assert [(site.graph, site.replaced, site.spec.grad) for site in report.sites] == [
        ("graph0.wrap_body_0", True, True)
    ]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_both_branches_of_cond_are_rewritten(inner: str) -> None:
    model = Net()

    def run(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: model.layers[0](x), lambda x: model.layers[1](x) * 2, (x,))

    x = sample()
    x = x - x.mean()
    assert agrees(run, x + 1, inner=inner).replaced == 2
    assert agrees(run, x - 1, inner=inner).replaced == 2


def test_a_branch_keeps_the_strides_that_the_other_branch_has() -> None:
    def run(x: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.view(2, 10, 4, 8).transpose(1, 2)

        return torch.cond(
            x.sum() > 0,
            lambda x: attention(heads(x), heads(x), heads(x), 0.2),
            lambda x: heads(x * 2).contiguous(),
            (x,),
        )

    assert agrees(run, sample() + 1, inner="aot_eager").replaced == 1


def test_a_nested_compile_region_is_rewritten_only_where_no_gradients_flow() -> None:
    # inductor gets the gradients of a fused call inside such a region wrong, whoever wrote the call (torch 2.13, CPU)
    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return attention(x * 3, x * 1, x * 2, 0.2)

    def model(x: Tensor) -> Tensor:
        return region(region(x))

    assert codes(agrees(model, sample(), inner="aot_eager")) == ["not_lowered"]
    attnpass.reset()
    x = sample()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, options={"inner": "aot_eager"})
        torch.testing.assert_close(compiled(x), model(x))
    assert [(site.graph, site.replaced) for site in attnpass.report().sites] == [("graph0.subgraph_0", True)]


def test_every_part_of_a_broken_graph_is_rewritten() -> None:
    model = Net()

    def run(x: Tensor) -> Tensor:
        x = model.layers[0](x)
        torch._dynamo.graph_break()
        return model.layers[1](x)

    report = agrees(run, sample())
    assert [(site.graph, site.replaced) for site in report.sites] == [("graph0", True), ("graph1", True)]


def test_a_softmax_inside_an_operation_that_is_not_entered_is_a_miss() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return (x @ x.transpose(-1, -2)).softmax(-1) @ x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    report = agrees(lambda x: Own.apply(x) * 2, sample())
    assert codes(report) == ["not_lowered"]


# -- what must be left alone -------------------------------------------------------------------------------------------


def test_what_runs_under_vmap_is_a_miss() -> None:
    report = agrees(lambda x: torch.vmap(lambda t: (t @ t.T).softmax(-1) @ t)(x), sample())
    assert not report.sites
    assert codes(report) == ["functorch"]


def test_scores_that_pass_through_an_unknown_function_are_left_alone() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 3

    report = agrees(lambda x: Double.apply(x @ x.transpose(-1, -2)).softmax(-1) @ x, sample())
    assert report.replaced == 0
    assert len(report.misses) == 1


def test_a_query_written_in_place_after_its_product_is_not_read_again() -> None:
    def model(x: Tensor) -> Tensor:
        q = x * 2
        scores = q @ x.transpose(-1, -2)
        q.add_(1)
        return scores.softmax(-1) @ x + q

    x = sample()
    with torch.no_grad():
        got = torch.compile(model, backend=backend, options={"inner": "eager"})(x)
        torch.testing.assert_close(got, model(x))
    assert codes(attnpass.report()) == ["mutated"]


def test_a_mask_written_into_the_scores_is_not_lost() -> None:
    def model(x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        scores[..., 3:] = -1e9
        return scores.softmax(-1) @ x

    agrees(model, sample())


def test_scores_filled_in_place_are_replaced_with_their_mask() -> None:
    def model(x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        scores.masked_fill_(torch.ones(10, 10, dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1) @ x

    spy = Spy()
    assert agrees(model, sample(), inner=spy).replaced == 1
    assert "masked_fill_" not in spy.targets()


def test_writes_that_nothing_reads_survive_the_rewrite() -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__(1)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(2, 10, 32))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            out = super().forward(x)
            with torch.no_grad():
                torch.mul(out, 2, out=self.last)
            return out

    model = Model()
    compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
    out = compiled(sample())
    compiled(sample())
    assert attnpass.report().replaced == 1
    assert model.calls.item() == 2
    assert not torch.equal(model.last, out * 2)
    assert model.last.abs().sum() > 0


def test_probabilities_that_are_returned_stay() -> None:
    def model(x: Tensor) -> Tensor:
        weights = (x @ x.transpose(-1, -2)).softmax(-1)
        return weights @ x + weights.sum()

    assert codes(agrees(model, sample())) == ["weights_used"]


def test_a_graph_that_changes_a_shape_in_place_is_left_alone() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        y.transpose_(0, 1)
        return attention(y, y, y, 0.2)

    compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
    x = sample()
    torch.testing.assert_close(compiled(x), model(x))
    report = attnpass.report()
    assert not report.sites
    assert codes(report) == ["not_lowered"]
    assert "changes the shape" in report.failures[0].text


@pytest.mark.parametrize(
    "after",
    [
        lambda out: out,
        lambda out: F.dropout(out, 0.0, True).view(8, 10, 8),
        lambda out: (out * 2 + 1).view(8, 10, 8),
        lambda out: out.transpose(1, 2).reshape(2, 10, 32),
    ],
    ids=["returned", "viewed after dropout", "viewed after arithmetic", "heads merged"],
)
def test_strides_that_can_be_seen_are_those_of_the_original(after: Callable[[Tensor], Tensor]) -> None:
    def model(x: Tensor) -> Tensor:
        heads = [(x * i).view(2, 10, 4, 8).transpose(1, 2) for i in (1, 2, 3)]
        return after(attention(*heads, 0.2))

    assert agrees(model, sample(), inner="aot_eager").replaced == 1


def test_a_body_keeps_the_strides_that_its_caller_sees() -> None:
    def model(x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            heads = x.view(2, 10, 4, 8).transpose(1, 2)
            return attention(heads, heads, heads, 0.2)

        return checkpoint(body, x, use_reentrant=False).view(8, 10, 8)

    assert agrees(model, sample(), inner="aot_eager").replaced == 1


# -- cost --------------------------------------------------------------------------------------------------------------


def calls_traced(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> int:
    count = 0
    trace = Tracer.trace

    def counting(self: Tracer, calls: Any, state: Any) -> None:
        nonlocal count
        count += len(calls)
        trace(self, calls, state)

    with monkeypatch.context() as patch:
        patch.setattr(Tracer, "trace", counting)
        torch.compile(model, backend=backend, options={"inner": "eager"})(x)
    return count


def test_layers_that_are_alike_are_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (calls_traced(monkeypatch, Net(layers), sample()) for layers in (2, 6))
    assert few == many > 0


def test_layers_that_differ_in_a_constant_only_are_not_confused() -> None:
    model = Net(3)
    for layer, scale in zip(model.layers, (1.0, 2.0, 0.5), strict=True):
        layer.scale = scale
    report = agrees(model, sample())
    assert [site.spec.scale for site in report.sites] == [1.0, 2.0, 0.5]


def test_a_graph_without_any_softmax_is_not_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("lowered")

    monkeypatch.setattr(frames, "lower", refuse)
    report = agrees(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), sample())
    assert not report.sites
    assert not report.misses


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["lower", "splice", "process"])
def test_a_failure_of_the_pass_leaves_the_graph_and_is_reported(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch._subclasses.fake_tensor.DataDependentOutputException(torch.ops.aten.item.default)

    # such an exception, let out of a backend, makes Dynamo break the graph without a word
    monkeypatch.setattr(frames._Frame, "commit", fail) if stage == "process" else monkeypatch.setattr(
        frames, stage, fail
    )
    model, x, spy = Net(), sample(), Spy()
    compiled = torch.compile(model, backend=backend, options={"inner": spy})
    torch.testing.assert_close(compiled(x), model(x))
    assert len(spy.graphs) == 1
    assert SDPA not in spy.targets()
    report = attnpass.report()
    assert len(report.failures) == 1
    assert "DataDependentOutputException" in report.failures[0].text
    assert report.replaced == 0
    assert len(report.sites) + len(report.misses) == 2
    assert all(code in ("failed", "not_lowered") for code in codes(report))


def test_an_error_of_the_inner_backend_is_its_own() -> None:
    class Broken(Exception):
        pass

    def inner(gm: Any, inputs: Any) -> Any:
        raise Broken("no")

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(Net(), backend=backend, options={"inner": inner})(sample())
    assert isinstance(caught.value.__cause__, Broken) or "Broken" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "mode", "text"),
    [
        ({"iner": "eager"}, None, "unknown option 'iner'; did you mean 'inner'?"),
        ({"strct": True}, None, "did you mean 'strict'?"),
        ({"inner": "egaer"}, None, "there is no backend 'egaer'; did you mean 'eager'?"),
        ({"inner": "attnpass"}, None, "the backend behind attnpass"),
        ({"inner": 3}, None, "a backend or a callable"),
        ({"inner": "eager", "inductor": {"max_autotune": True}}, None, "settings for inductor"),
        ({"inductor": {"max_autotun": True}}, None, "no setting 'max_autotun'; did you mean 'max_autotune'?"),
        ({"inductor": {"max_autotune": "yes"}}, None, "max_autotune"),
        ({"inductor": 3}, None, "a dictionary"),
        ({"inner": "eager"}, "max-autotune", "a mode of inductor"),
        (None, "max-autotun", "no mode 'max-autotun'; did you mean 'max-autotune"),
        ({"strict": 1}, None, "'strict' is True or False"),
    ],
)
def test_a_wrong_option_is_an_error_that_says_what_to_do(options: Any, mode: str | None, text: str) -> None:
    gm = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(attnpass.AttnpassError) as caught:
        backend(gm, [sample()], mode=mode, options=options)
    assert text in str(caught.value)


def test_a_wrong_option_is_seen_by_the_caller_of_torch_compile() -> None:
    with pytest.raises(Exception, match="unknown option 'iner'; did you mean 'inner'"):
        torch.compile(Net(), backend=backend, options={"iner": "eager"})(sample())


@pytest.mark.parametrize(
    ("kwargs", "setting", "value"),
    [
        ({"mode": "max-autotune-no-cudagraphs"}, "max_autotune", True),
        ({"options": {"inductor": {"shape_padding": False}}}, "shape_padding", False),
    ],
)
def test_modes_and_settings_reach_inductor(
    kwargs: Any, setting: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.compile_fx

    seen: dict[str, Any] = {}

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None, **_: Any) -> Any:
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    torch.compile(Net(), backend=backend, **kwargs)(sample())
    assert seen[setting] == value


def test_fuel_limits_the_sites_that_are_rewritten() -> None:
    compiled = torch.compile(Net(3), backend=backend, options={"inner": "eager", "fuel": 1})
    compiled(sample())
    assert [site.replaced for site in attnpass.report().sites] == [True, False, False]


def test_the_report_is_forgotten_on_request_and_numbers_start_anew() -> None:
    agrees(Net(1), sample())
    attnpass.reset()
    assert not attnpass.report().sites
    torch._dynamo.reset()
    assert [site.graph for site in agrees(Net(1), sample()).sites] == ["graph0"]


# -- audit -------------------------------------------------------------------------------------------------------------


class Stateful(Net):
    """Everything a forward may change: buffers, an attribute, random numbers, a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch._dynamo.graph_break()
        return self.drop(super().forward(self.norm(x)))


class Broken(Net):
    """Two graphs, the second of which belongs to a frame of the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return super().forward(x)


def test_an_audit_finds_what_compiling_would_replace_and_says_so_each_time() -> None:
    model, x = Stateful(), sample()
    reports = [attnpass.audit(model, x) for _ in range(12)]
    for report in reports:
        assert [site.where.module for site in report.sites] == ["layers.0", "layers.1"]
        assert report.replaced == 2
    assert not attnpass.report().sites  # nothing was compiled for use


def test_an_audit_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model, x = Stateful(), sample()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    version = x._version
    attnpass.audit(model, x)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.calls == 0
    assert model.training
    assert x._version == version


def test_an_audit_of_a_model_that_cannot_be_copied_puts_its_buffers_back() -> None:
    model, x = Stateful(), sample()
    model.lock = (i for i in range(3))
    mean = model.norm.running_mean.clone()
    assert attnpass.audit(model, x).replaced == 2
    assert torch.equal(model.norm.running_mean, mean)


def test_an_audit_does_not_write_into_the_arguments() -> None:
    def model(x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(x)
        x.add_(1)
        return attention(x, x, x, 0.2)

    x, cache = sample(), []
    before = x.clone()
    assert attnpass.audit(model, x, cache).replaced == 1
    assert torch.equal(x, before)
    assert not cache


def test_an_audit_neither_uses_nor_spoils_what_the_user_has_compiled() -> None:
    model, x = Broken(), sample()
    compiled = torch.compile(model, backend="eager")
    wanted = compiled(x)
    for _ in range(10):
        assert attnpass.audit(compiled, x).replaced == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(x), wanted)


@pytest.mark.skipif("2.11" in torch.__version__, reason="torch 2.11 cannot count recompilations apart")
def test_an_audit_uses_up_none_of_the_recompilations_of_the_user() -> None:
    model = Broken()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    compiled(sample())
    for _ in range(10):
        attnpass.audit(compiled, sample())
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in range(3, 8):
            compiled(sample(batch=batch))


def test_an_audit_takes_functions_methods_and_keywords() -> None:
    model, x = Net(), sample()
    assert attnpass.audit(model.layers[0].forward, x).replaced == 1
    assert attnpass.audit(attention, x, x, x, scale=0.2).replaced == 1


def test_an_audit_respects_grad_mode() -> None:
    model, x = Net(1), sample()
    assert [site.spec.grad for site in attnpass.audit(model, x).sites] == [True]
    with torch.no_grad():
        assert [site.spec.grad for site in attnpass.audit(model, x).sites] == [False]
        assert not torch.is_grad_enabled()


def test_an_audit_of_arguments_that_do_not_fit_says_so() -> None:
    with pytest.raises(attnpass.AttnpassError, match="does not run on these arguments"):
        attnpass.audit(Net(), torch.randn(3))


def test_an_audit_that_captures_nothing_says_so() -> None:
    report = attnpass.audit(lambda x: x, sample())
    assert "captured no graph" in report.notes[0]


class Biased(nn.Module):
    """A bias that is learned as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2, 4, 8, 8))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + self.bias).softmax(-1) @ v


class Called(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_parameter_asks_for_no_gradient_where_none_is_recorded() -> None:
    # torch's fused kernel for the CPU has no gradient for a bias, and refuses one that merely says that it needs it
    model, args = Biased(), torch.randn(3, 2, 4, 8, 16).requires_grad_().unbind(0)
    called = Called()

    def watched(gm: GraphModule, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            with called:
                return gm.forward(*inputs)

        return run

    # as it is: nothing is computed of it for queries without a key
    options = {"inner": watched, "empty_rows": "dont_care"}
    compiled = torch.compile(model, backend="attnpass", options=options)
    for grad in (True, False):
        attnpass.reset()
        called.names.clear()
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(*args), model(*args))
        (site,) = attnpass.report().sites
        assert site.replaced is not grad
        assert site.spec.grad is grad
        assert [bias.grad for bias in site.spec.bias] == [grad]
        assert ("aten._scaled_dot_product_flash_attention_for_cpu.default" in called.names) is not grad
