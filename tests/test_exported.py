"""The torch.export front: what the rewritten copy does, what the original keeps, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import attnpass
from attnpass import AttnpassError, Policy, pipeline
from attnpass.capture import aten, exported

SDPA = torch.ops.aten.scaled_dot_product_attention.default
WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """Hand-written multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 3.0, dim=-1)
        return (weights @ v).transpose(1, 2).reshape(batch, length, WIDTH)


class Last(nn.Module):
    """The attention is the last thing that the program computes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 3.0, dim=-1) @ v


def graphs(gm: GraphModule) -> list[Graph]:
    return [gm.graph, *(graph for body in aten.bodies(gm, exported.State()) for graph in graphs(body.module))]


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for graph in graphs(gm) for node in graph.nodes]


def fused(program: ExportedProgram | GraphModule) -> int:
    return targets(program if isinstance(program, GraphModule) else program.graph_module).count(SDPA)


def softmaxes(program: ExportedProgram | GraphModule) -> int:
    gm = program if isinstance(program, GraphModule) else program.graph_module
    return sum("softmax" in str(target) for target in targets(gm))


def x_of(batch: int = 2, length: int = 8) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def dynamic(model: nn.Module) -> ExportedProgram:
    return torch.export.export(model.eval(), (x_of(),), dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},))


# -- the rewritten program ---------------------------------------------------------------------------------------------


def test_a_rewritten_program_computes_the_same_at_other_dynamic_sizes() -> None:
    model = Attention()
    program, report = attnpass.rewrite(dynamic(model))
    assert report.replaced == 1
    assert report.failures == ()
    assert fused(program) == 1
    assert softmaxes(program) == 0
    for batch, length in ((2, 8), (3, 11), (7, 1), (1, 64)):
        x = x_of(batch, length)
        torch.testing.assert_close(program.module()(x), model(x))


def test_the_original_is_untouched_and_its_weights_are_shared() -> None:
    original = dynamic(Attention())
    text, metas = str(original), [dict(node.meta) for node in original.graph.nodes]
    program, report = attnpass.rewrite(original)
    assert report.replaced == 1
    assert str(original) == text
    assert [dict(node.meta) for node in original.graph.nodes] == metas
    assert fused(original) == 0
    assert program.state_dict["qkv.weight"] is original.state_dict["qkv.weight"]
    assert program.graph_signature is not original.graph_signature


def test_the_rewritten_program_keeps_its_dynamic_range() -> None:
    program, _ = attnpass.rewrite(dynamic(Attention()))
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)guard|shape|expected"):
        program.module()(torch.randn(2, 8, WIDTH + 1))


def test_gradients_flow_through_the_rewritten_program() -> None:
    model = Attention()
    program, _ = attnpass.rewrite(dynamic(model))
    x = x_of(3, 5)
    expected = torch.autograd.grad(model(x).square().sum(), model.qkv.weight)
    rewritten = program.module()
    actual = torch.autograd.grad(rewritten(x).square().sum(), rewritten.qkv.weight)
    torch.testing.assert_close(actual, expected)


def test_an_attention_that_is_the_output_keeps_the_output_name() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    original = torch.export.export(Last(), (q, k, v))
    program, report = attnpass.rewrite(original)
    assert report.replaced == 1
    program._validate()
    assert program.graph_signature.user_outputs == original.graph_signature.user_outputs
    torch.testing.assert_close(program.module()(q, k, v), original.module()(q, k, v))


def test_inputs_named_like_python_builtins_keep_their_names() -> None:
    class Named(nn.Module):
        def forward(self, input: Tensor, max: Tensor, id: Tensor) -> Tensor:
            return torch.softmax(input @ max.transpose(-1, -2) / 3.0, dim=-1) @ id

    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    program, report = attnpass.rewrite(torch.export.export(Named(), (q, k, v)))
    assert report.replaced == 1
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"] == ["input", "max", "id"]
    torch.testing.assert_close(program.module()(q, k, v), Named()(q, k, v))


def test_rewriting_twice_replaces_nothing_more() -> None:
    once, _ = attnpass.rewrite(dynamic(Attention()))
    twice, report = attnpass.rewrite(once)
    assert report.replaced == 0
    assert [str(node.target) for node in twice.graph.nodes] == [str(node.target) for node in once.graph.nodes]


def test_no_note_of_this_package_stays_in_the_graph() -> None:
    program, _ = attnpass.rewrite(dynamic(Attention()))
    for graph in graphs(program.graph_module):
        for node in graph.nodes:
            assert not [key for key in node.meta if "attnpass" in str(key)]


def test_new_nodes_carry_the_metadata_that_saving_needs() -> None:
    program, _ = attnpass.rewrite(dynamic(Attention()))
    (node,) = [node for node in program.graph.nodes if node.target is SDPA]
    assert {"val", "stack_trace", "nn_module_stack", "torch_fn"} <= set(node.meta)


def test_a_buffer_that_the_program_updates_is_still_updated() -> None:
    class Counting(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x) + self.calls

    program, report = attnpass.rewrite(dynamic(Counting()))
    assert report.replaced == 1
    module = program.module()
    first, second = module(x := x_of()), module(x)
    torch.testing.assert_close(second, first + 1)


def test_a_program_with_preserved_module_signatures_unflattens() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x) + 1

    model = Model().eval()
    x = x_of()
    original = torch.export.export(model, (x,), preserve_module_call_signature=("attention",))
    program, report = attnpass.rewrite(original)
    assert report.replaced == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch inserts its own attributes before they exist
        unflattened = torch.export.unflatten(program)
    torch.testing.assert_close(unflattened(x), model(x))


# -- saving, decomposing, compiling ------------------------------------------------------------------------------------

LOAD = """
import sys, torch
sys.modules["attnpass"] = None  # importing it would fail
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), expected)
"""


def test_a_saved_program_loads_in_a_fresh_process_without_this_package(tmp_path: Path) -> None:
    model = Attention()
    program, report = attnpass.rewrite(dynamic(model))
    assert report.replaced == 1
    saved, data = tmp_path / "program.pt2", tmp_path / "data.pt"
    torch.export.save(program, saved)
    x = x_of(5, 3)
    torch.save((x, model(x).detach()), data)
    command = [sys.executable, "-c", LOAD, str(saved), str(data)]
    subprocess.run(command, check=True, cwd=tmp_path)


def test_a_loaded_program_is_rewritten_like_a_fresh_one(tmp_path: Path) -> None:
    model = Attention()
    torch.export.save(dynamic(model), tmp_path / "program.pt2")
    program, report = attnpass.rewrite(torch.export.load(tmp_path / "program.pt2"))
    assert report.replaced == 1
    for x in (x_of(3, 9), x_of(1, 1)):
        torch.testing.assert_close(program.module()(x), model(x))


def test_a_decomposed_program_is_rewritten() -> None:
    model = Attention()
    decomposed = dynamic(model).run_decompositions()
    program, report = attnpass.rewrite(decomposed)
    assert report.replaced == 1, report.misses
    program._validate()
    x = x_of(3, 9)
    torch.testing.assert_close(program.module()(x), model(x))


AOT = """
import sys, torch
program = torch.export.export(torch.nn.ReLU(), (torch.ones(3),))
package = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
torch._inductor.aoti_load_package(package)
"""


@pytest.mark.slow
def test_a_rewritten_program_compiles_with_aot_inductor(tmp_path: Path) -> None:
    works = subprocess.run([sys.executable, "-c", AOT, str(tmp_path / "relu.pt2")], capture_output=True, check=False)
    if works.returncode:
        pytest.skip(f"AOTInductor itself does not work here: a program of one relu ends with {works.returncode}")
    model = Attention()
    program, report = attnpass.rewrite(dynamic(model))
    assert report.replaced == 1
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    x = x_of(3, 9)
    torch.testing.assert_close(compiled(x), model(x))


# -- graphs inside graphs ----------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """An attention inside whatever `call` puts around it."""

    def __init__(self, call: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = Attention()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.attention, x)


def no_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        y = f(x)
    return y + x


def autocast(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = f(x)
    return y.float() + x


def autocast_in_no_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = f(x)
    return y.float() + x


def cond(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, f, torch.sin, (x,))


def while_loop(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop as loop

    _, y = loop(lambda i, y: i < 3, lambda i, y: (i + 1, f(y) + y), (torch.tensor(0), x))
    return y


def mapped(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    from torch._higher_order_ops.map import map as map_

    return map_(lambda row: f(row.unsqueeze(0)).squeeze(0), x)


def checkpointed(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("call", "nested", "tolerance"),
    [
        (no_grad, True, 1e-5),
        (autocast, True, 1e-2),  # bfloat16 inside
        (autocast_in_no_grad, True, 1e-2),
        (cond, True, 1e-5),
        (while_loop, True, 1e-5),
        (mapped, True, 1e-5),
        (checkpointed, False, 1e-5),  # export writes its body into the graph
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_attention_in_a_nested_graph_is_replaced(call: Any, nested: bool, tolerance: float) -> None:
    model = Nested(call).eval()
    x = x_of()
    original = torch.export.export(model, (x,))
    text = str(original)
    program, report = attnpass.rewrite(original)
    assert report.replaced == 1, (report.misses, report.failures)
    assert fused(program) == 1
    assert softmaxes(program) == 0
    assert str(original) == text
    assert (report.sites[0].graph != "program") == nested
    for one in (x, -x, x_of()):
        torch.testing.assert_close(program.module()(one), model(one), rtol=tolerance, atol=tolerance)


def test_a_region_that_is_called_repeatedly_is_one_graph() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        @torch.compiler.nested_compile_region
        def block(self, x: Tensor) -> Tensor:
            return self.attention(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(self.block(x)))

    model = Repeated().eval()
    x = x_of()
    program, report = attnpass.rewrite(torch.export.export(model, (x,), strict=True))
    assert softmaxes(program) == 0
    assert fused(program) == report.replaced == len(report.sites)
    torch.testing.assert_close(program.module()(x), model(x))


def test_attention_under_autocast_is_described_in_the_dtype_it_runs_in() -> None:
    _, report = attnpass.rewrite(torch.export.export(Nested(autocast).eval(), (x_of(),)))
    assert report.sites[0].spec.dtype == "bfloat16"


def test_attention_under_no_grad_in_the_body_needs_no_gradient_but_in_a_branch_it_does() -> None:
    _, without = attnpass.rewrite(torch.export.export(Nested(no_grad), (x_of(),)))
    _, within = attnpass.rewrite(torch.export.export(Nested(cond), (x_of(),)))
    assert not without.sites[0].spec.grad
    assert within.sites[0].spec.grad


def test_softmax_under_vmap_is_a_miss() -> None:
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: torch.softmax(row @ row.mT / 3.0, dim=-1) @ row)(x)

    program, report = attnpass.rewrite(torch.export.export(Mapped(), (torch.randn(2, 3, 8, WIDTH),)))
    assert [miss.reason.code for miss in report.misses] == ["functorch"]
    assert report.sites == ()
    assert fused(program) == 0


def test_a_body_called_under_two_states_is_decided_but_not_rewritten() -> None:
    original = torch.export.export(Nested(no_grad).eval(), (x_of(),))
    call = next(n for n in original.graph.nodes if "wrap_with_set_grad_enabled" in str(n.target))
    with original.graph.inserting_after(call):
        again = original.graph.call_function(call.target, (True, *call.args[1:]))
    again.meta.update(call.meta)
    program, report = attnpass.rewrite(original)
    assert fused(program) == 0
    (site,) = report.sites
    assert not site.replaced
    assert site.reason is not None
    assert site.reason.code == "mixed_state"


# -- GraphModules ------------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 3.0, dim=-1) @ v


def switching(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        first = plain(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plain(first, k, v)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("described", [True, False], ids=["with_values", "without_values"])
def test_a_graph_module_is_rewritten(mode: str, described: bool) -> None:
    inputs = tuple(torch.randn(3, 2, 4, 5, 8).unbind(0))
    gm = make_fx(switching, pre_dispatch=True, tracing_mode=mode)(*inputs)
    if not described:
        for node in gm.graph.nodes:
            node.meta.clear()
    code = gm.code
    new, report = attnpass.rewrite(gm, example_inputs=None if described else inputs)
    assert report.replaced == 2, (report.misses, report.failures)
    assert gm.code == code
    assert fused(new) == 2
    torch.testing.assert_close(new(*inputs), switching(*inputs), rtol=2e-2, atol=2e-2)


def test_a_symbolic_graph_module_runs_at_other_sizes() -> None:
    gm = make_fx(plain, pre_dispatch=True, tracing_mode="symbolic")(*torch.randn(3, 2, 4, 5, 8).unbind(0))
    new, report = attnpass.rewrite(gm)
    assert report.replaced == 1
    inputs = torch.randn(3, 3, 6, 7, 8).unbind(0)
    torch.testing.assert_close(new(*inputs), plain(*inputs))


def test_the_module_of_a_program_is_rewritten_with_its_checks_and_weights() -> None:
    model = Attention()
    module = dynamic(model).module()
    new, report = attnpass.rewrite(module)
    assert report.replaced == 1
    assert new.qkv.weight is module.qkv.weight
    x = x_of(3, 9)
    torch.testing.assert_close(new(x), model(x))
    with pytest.raises(AssertionError, match="Guard failed"):
        new(torch.randn(2, 8, WIDTH + 1))
    torch.testing.assert_close(module(x), model(x))


def test_values_are_propagated_into_nested_graphs() -> None:
    module = torch.export.export(Nested(no_grad).eval(), (x := x_of(),)).module()
    for graph in graphs(module):
        for node in graph.nodes:
            node.meta.pop("val", None)
    new, report = attnpass.rewrite(module, example_inputs=(x,))
    assert report.replaced == 1, report.misses
    torch.testing.assert_close(new(x), module(x))


def test_a_graph_module_without_shapes_asks_for_example_inputs() -> None:
    gm = make_fx(plain, pre_dispatch=True)(*torch.randn(3, 2, 4, 5, 8).unbind(0))
    for node in gm.graph.nodes:
        node.meta.clear()
    with pytest.raises(AttnpassError, match=r"pass example_inputs=\("):
        attnpass.rewrite(gm)
    with pytest.raises(AttnpassError, match="does not run on the example inputs"):
        attnpass.rewrite(gm, example_inputs=tuple(torch.randn(3, 2, 4, 5, 8).unbind(0))[:2])


def test_propagation_leaves_grad_mode_alone() -> None:
    def off(x: Tensor) -> Tensor:
        torch._C._set_grad_enabled(False)
        return plain(x, x, x)

    with torch.enable_grad():
        gm = make_fx(off, pre_dispatch=True)(torch.randn(2, 4, 5, 8))
    torch.set_grad_enabled(True)
    attnpass.rewrite(gm)
    assert torch.is_grad_enabled()


def dynamo_graph() -> GraphModule:
    caught: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        caught.append(gm)
        return gm.forward

    torch.compile(plain, backend=backend)(*torch.randn(3, 2, 4, 5, 8).unbind(0))
    return caught[0]


@pytest.mark.parametrize(
    "make",
    [dynamo_graph, lambda: torch.fx.symbolic_trace(plain), lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))],
    ids=["dynamo", "symbolic_trace", "call_module"],
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_graph_of_python_calls_is_refused_with_advice(make: Callable[[], GraphModule]) -> None:
    with pytest.raises(AttnpassError, match=r"no ATen operation.*torch\.export"):
        attnpass.rewrite(make(), example_inputs=tuple(torch.randn(3, 2, 4, 5, 8).unbind(0)))


@pytest.mark.parametrize("what", [Attention(), 3, plain], ids=["module", "number", "function"])
def test_what_is_no_program_is_refused_with_advice(what: Any) -> None:
    with pytest.raises(AttnpassError, match="export it first"):
        attnpass.rewrite(what)


# -- all or nothing ----------------------------------------------------------------------------------------------------


def same_code(one: ExportedProgram, other: ExportedProgram) -> bool:
    return one.graph_module.code == other.graph_module.code


def test_a_failing_pass_leaves_its_graph_as_it_was_and_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return no_grad(self.attention, self.attention(x))

    real = pipeline.run

    def failing(graph: Graph, *, name: str, **options: Any) -> Any:
        outcome = real(graph, name=name, **options)
        if name == "program":
            raise ValueError("something broke\nsecond line")
        return outcome

    monkeypatch.setattr(pipeline, "run", failing)
    model = Two().eval()
    program, report = attnpass.rewrite(torch.export.export(model, (x := x_of(),)))
    assert fused(program) == 1
    assert softmaxes(program) == 1
    assert report.replaced == 1
    (failure,) = report.failures
    assert (failure.graph, failure.line) == ("program", "ValueError: something broke")
    assert "in failing\n" in failure.text  # the traceback
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_rewrite_that_would_need_a_new_guard_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.run

    def guarding(graph: Graph, **options: Any) -> Any:
        outcome = real(graph, **options)
        size = next(n.meta["val"].shape[0] for n in graph.nodes if n.name == "x")
        bool(size < 1000)  # a guard on a symbolic size
        return outcome

    original = dynamic(Attention())
    monkeypatch.setattr(pipeline, "run", guarding)
    program, report = attnpass.rewrite(original)
    assert same_code(program, original)
    assert report.replaced == 0
    assert report.sites[0].reason is not None
    assert report.sites[0].reason.code == "failed"
    assert "new condition on sizes" in report.failures[0].text


def test_a_program_that_does_not_validate_is_put_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    original = dynamic(Attention())
    validate, calls = ExportedProgram._validate, []

    def refusing(program: ExportedProgram) -> None:
        calls.append(program)
        if fused(program):
            raise RuntimeError("not valid")
        validate(program)

    monkeypatch.setattr(ExportedProgram, "_validate", refusing)
    program, report = attnpass.rewrite(original)
    assert calls
    assert same_code(program, original)
    assert report.replaced == 0
    assert report.sites[0].reason is not None
    assert report.sites[0].reason.code == "verify_failed"
    assert [failure.stage for failure in report.failures] == ["validate"]


def test_sweeping_erases_only_what_lost_its_readers() -> None:
    graph = Graph()
    a = graph.placeholder("a")
    scores, weights, out = (graph.call_function(torch.relu, (node,)) for node in (a, a, a))
    weights.args, out.args = (scores,), (weights,)
    bystander = graph.call_function(torch.relu, (a,))  # dead as well, but nobody's to erase
    new = graph.call_function(torch.tanh, (a,))
    graph.output((new, scores))
    replacement = pipeline.Replacement(site="s", output=out, fused=new, dead=(a, scores, weights, out))
    name = out.name
    exported.sweep(graph, (replacement,), frozenset({name}))
    assert list(graph.nodes)[:-1] == [a, scores, bystander, new]
    assert new.name == name


# -- audit -------------------------------------------------------------------------------------------------------------


def test_auditing_a_program_says_what_rewriting_does_and_changes_nothing() -> None:
    original = dynamic(Nested(no_grad).eval())
    text = str(original)
    audited = attnpass.audit(original)
    assert str(original) == text
    _, rewritten = attnpass.rewrite(original)
    assert audited.sites == rewritten.sites
    assert audited.misses == rewritten.misses


def test_auditing_a_graph_module_takes_its_arguments_as_example_inputs() -> None:
    inputs = tuple(torch.randn(3, 2, 4, 5, 8).unbind(0))
    gm = make_fx(plain, pre_dispatch=True)(*inputs)
    for node in gm.graph.nodes:
        node.meta.clear()
    assert attnpass.audit(gm, *inputs).replaced == 1


def test_auditing_a_program_takes_no_arguments() -> None:
    with pytest.raises(AttnpassError, match="without arguments"):
        attnpass.audit(dynamic(Attention()), x_of())


def test_the_policy_is_honoured() -> None:
    program, report = attnpass.rewrite(dynamic(Attention()), policy=Policy(fuel=0))
    assert report.replaced == 0
    assert fused(program) == 0
    assert [site.reason.code for site in report.sites if site.reason] == ["fuel"]


def test_every_softmax_is_in_the_report_once() -> None:
    class Routed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            gate = torch.softmax(x.mean(1), dim=-1)
            return super().forward(x) * gate[:, None]

    original = torch.export.export(Routed().eval(), (x_of(),))
    report = attnpass.audit(original)
    assert len(report.sites) + len(report.misses) == softmaxes(original) == 2
    ids = [entry.id for entry in (*report.sites, *report.misses)]
    assert len(set(ids)) == len(ids)
    assert dataclasses.is_dataclass(report)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_graph_that_says_which_inputs_need_gradients_is_believed(mode: str) -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    gm = make_fx(biased, pre_dispatch=True, tracing_mode=mode)(*torch.randn(3, 2, 4, 5, 8), torch.randn(5, 5))
    told = attnpass.rewrite(gm)[1].sites[0]
    assert not told.replaced, "nothing says that the bias needs no gradient, which no kernel for the CPU gives"
    gm.graph.find_nodes(op="placeholder")[0].meta["val"].requires_grad_()
    (site,) = attnpass.rewrite(gm)[1].sites
    assert site.replaced
    assert site.spec.grad
    assert not site.spec.bias[0].grad


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_graph_that_does_not_say_which_inputs_need_gradients_may_need_all(grad: bool) -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # the backward of a fused call reads its result, which is written into here
        return ((q @ k.mT).softmax(-1) @ v).mul_(2.0)

    inputs = tuple(torch.randn(3, 2, 4, 5, 8).requires_grad_().unbind(0))
    gm = make_fx(written, pre_dispatch=True)(*(x.detach() for x in inputs))
    with torch.set_grad_enabled(grad):
        new, report = attnpass.rewrite(gm)
    assert report.replaced == 1
    assert report.sites[0].spec.grad == grad
    if grad:
        for mine, true in zip(*(torch.autograd.grad(f(*inputs).sum(), inputs) for f in (new, written)), strict=True):
            torch.testing.assert_close(mine, true)
