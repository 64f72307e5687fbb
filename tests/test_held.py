"""Masks that a model keeps in a buffer: proved from what the buffer holds, and watched at every call."""

from __future__ import annotations

import math
import timeit
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import attnpass
from attnpass import cli
from attnpass.capture.dynamo import backend
from attnpass.capture.held import Held, Watched, guarded

LENGTH, WIDTH, HEADS = 48, 32, 4
SDPA = "scaled_dot_product_attention"


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    attnpass.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attnpass: ")  # a graph that runs uncompiled
        yield
    attnpass.reset()


def lower_triangle(n: int = LENGTH) -> Tensor:
    return torch.ones(n, n).tril().view(1, 1, n, n)


class Attention(nn.Module):
    """One layer; `masked(scores, buffer)` with the buffer cut to (1, 1, queries, keys)."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor], bias: Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        self.past = 0  # the first queries are left out
        self.masked = masked
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("bias", bias, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(x).split(width, dim=2))
        q = q[:, :, self.past :]
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        scores = self.masked(scores, self.bias[:, :, self.past : length, :length])
        out = F.softmax(scores, dim=-1) @ v
        return out.transpose(1, 2).reshape(batch, length - self.past, width)


def _nanogpt(scores: Tensor, bias: Tensor) -> Tensor:
    return scores.masked_fill(bias == 0, float("-inf"))


def _gptj(scores: Tensor, bias: Tensor) -> Tensor:
    lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    return torch.where(bias, scores, lowest)


def _added(scores: Tensor, bias: Tensor) -> Tensor:
    return scores + bias


STYLES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "nanoGPT": (_nanogpt, lower_triangle()),
    "nanoGPT, uint8": (_nanogpt, lower_triangle().to(torch.uint8)),
    "GPT-J": (_gptj, lower_triangle().bool()),
    "added -inf": (_added, torch.full((1, 1, LENGTH, LENGTH), -math.inf).triu(1)),
    "added lowest": (_added, (1 - lower_triangle()) * torch.finfo(torch.float32).min),
}


def make(style: str = "nanoGPT", *, persistent: bool = True) -> Attention:
    masked, bias = STYLES[style]
    torch.manual_seed(0)
    return Attention(masked, bias.clone(), persistent=persistent)


def sample(length: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))


class Counting:
    """An inner backend that runs graphs as they are, and counts the calls of those with and without a dense mask."""

    def __init__(self) -> None:
        self.causal = 0
        self.dense = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        causal = [n.args[5] for n in gm.graph.nodes if n.op == "call_function" and SDPA in str(n.target)] == [True]

        def run(*args: Any) -> Any:
            self.causal += causal
            self.dense += not causal
            return gm.forward(*args)

        return run

    @property
    def counts(self) -> tuple[int, int]:
        counts = self.causal, self.dense
        self.causal = self.dense = 0
        return counts


def same(compiled: Any, model: nn.Module, x: Tensor) -> None:
    """Results and gradients are those of the model."""
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    found = []
    for one in (compiled, model):
        model.zero_grad()
        one(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


# -- proved ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_a_causal_mask_in_a_buffer_is_proved(style: str, persistent: bool) -> None:
    model, inner = make(style, persistent=persistent), Counting()
    compiled = torch.compile(model, backend=backend, options={"inner": inner})
    with torch.no_grad():
        torch.testing.assert_close(compiled(sample()), model(sample()), atol=1e-5, rtol=1e-4)
    assert inner.counts == (1, 0)
    same(compiled, model, sample())
    site = attnpass.report().sites[0]
    assert site.replaced
    assert site.spec.mask.causal == 0
    assert not site.assumptions  # it is checked
    assert any("the buffer bias holds" in line and "checked at every call" in line for line in site.proofs)


def test_sizes_may_vary() -> None:
    model, inner = make(), Counting()
    compiled = torch.compile(model, backend=backend, options={"inner": inner}, dynamic=True)
    for length, batch in ((12, 2), (20, 3), (47, 5)):
        same(compiled, model, sample(length, batch))
    causal, dense = inner.counts
    assert causal
    assert not dense


def test_queries_may_begin_later() -> None:
    model, inner = make("GPT-J"), Counting()
    model.past = 5
    same(torch.compile(model, backend=backend, options={"inner": inner}), model, sample())
    assert attnpass.report().sites[0].spec.mask.causal == 5


def test_no_mask_at_all_in_a_buffer_of_ones() -> None:
    model = make()
    model.bias.fill_(1)
    same(torch.compile(model, backend=backend, options={"inner": "eager"}), model, sample())
    assert attnpass.report().sites[0].spec.mask.empty


def test_what_has_no_closed_form_stays_data() -> None:
    model, inner = make(), Counting()
    model.bias[0, 0, 40, 3] = 0  # far outside of what this call reads
    same(torch.compile(model, backend=backend, options={"inner": inner}), model, sample())
    assert attnpass.report().sites[0].spec.mask.dense
    assert not inner.counts[0]


def test_parameters_and_arguments_are_no_buffers() -> None:
    model = make("added -inf")
    mask = model.bias
    del model.bias
    model.bias = nn.Parameter(mask, requires_grad=False)
    torch.compile(model, backend=backend, options={"inner": "eager"})(sample())
    site = attnpass.report().sites[0]
    assert site.spec.mask.causal is None


# -- watched -----------------------------------------------------------------------------------------------------------


def _other(model: Attention) -> Tensor:
    return model.bias.mT.contiguous()


def _in_place(model: Attention) -> None:
    model.bias.copy_(_other(model))


def _one_element(model: Attention) -> None:
    model.bias[0, 0, 5, 2] = model.bias[0, 0, 2, 5]


def _inference_mode(model: Attention) -> None:
    with torch.inference_mode():
        model.bias[0, 0, 5, 2] = model.bias[0, 0, 2, 5]


def _through_a_view(model: Attention) -> None:
    model.bias.view(-1)[1] = model.bias.view(-1)[LENGTH]


def _load(model: Attention) -> None:
    model.load_state_dict({**model.state_dict(), "bias": _other(model)})


def _load_assign(model: Attention) -> None:
    model.load_state_dict({**model.state_dict(), "bias": _other(model)}, assign=True)


def _exchange(model: Attention) -> None:
    model.bias = _other(model)


def _exchange_data(model: Attention) -> None:
    model.bias.data = _other(model)


def _inference_tensor(model: Attention) -> None:
    with torch.inference_mode():
        model.bias = _other(model)


CHANGES = (
    _in_place,
    _one_element,
    _inference_mode,
    _through_a_view,
    _load,
    _load_assign,
    _exchange,
    _exchange_data,
    _inference_tensor,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("style", ["nanoGPT", "added lowest"])
def test_a_changed_mask_is_seen(style: str, change: Callable[[Attention], None]) -> None:
    model, inner = make(style), Counting()
    compiled = torch.compile(model, backend=backend, options={"inner": inner})
    with torch.no_grad():
        compiled(sample())
        assert inner.counts == (1, 0)
        before = model(sample())
        change(model)
        for _ in range(2):
            torch.testing.assert_close(compiled(sample()), model(sample()), atol=1e-5, rtol=1e-4)
        assert inner.counts == (0, 2)
        assert not torch.allclose(model(sample()), before)


def test_compiling_anew_reads_anew() -> None:
    """Also what was written without being counted."""
    model = make()
    with torch.no_grad():
        for _ in range(2):
            compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
            torch.testing.assert_close(compiled(sample()), model(sample()), atol=1e-5, rtol=1e-4)
            model.bias.data.copy_(_other(model))
            torch._dynamo.reset()


def test_the_same_mask_anew_is_known_again() -> None:
    model, inner = make(), Counting()
    compiled = torch.compile(model, backend=backend, options={"inner": inner})
    with torch.no_grad():
        compiled(sample())
        model.bias.fill_(1)
        compiled(sample())
        model.bias = lower_triangle()
        compiled(sample())
        model.load_state_dict(make().state_dict())
        compiled(sample())
    assert inner.counts == (3, 1)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_both_graphs_compile_and_train(inner: str) -> None:
    model = make()
    compiled = torch.compile(model, backend=backend, options={"inner": inner})
    same(compiled, model, sample())
    model.bias[0, 0, :, 0] = 1
    model.bias[0, 0, 0, 1] = 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        same(compiled, model, sample())
        model.bias.copy_(lower_triangle())
        same(compiled, model, sample())


def test_the_other_graph_keeps_its_sizes_symbolic() -> None:
    model = make()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    same(compiled, model, sample(12, 3))
    model.bias[0, 0, 0, 1] = 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, batch in ((21, 3), (22, 5), (9, 2)):
            same(compiled, model, sample(length, batch))


def test_other_dtypes_are_other_graphs() -> None:
    model = make("added -inf")
    compiled = torch.compile(model, backend=backend, options={"inner": "aot_eager"})
    same(compiled, model, sample())
    model.double()
    same(compiled, model, sample().double())


def test_models_that_share_compiled_code() -> None:
    one, two, three, inner = make(), make(), make(), Counting()
    two.bias.copy_(torch.ones(LENGTH, LENGTH).tril(3))

    def run(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(run, backend=backend, options={"inner": inner})
    with torch.no_grad():
        for model in (one, two, three, two, one):
            torch.testing.assert_close(compiled(model, sample()), run(model, sample()), atol=1e-5, rtol=1e-4)
    assert inner.counts == (3, 2)
    assert len(attnpass.report().sites) == 1


def test_layers_with_a_buffer_each() -> None:
    model, inner = nn.Sequential(make(), make(), make("GPT-J")), Counting()
    compiled = torch.compile(model, backend=backend, options={"inner": inner})
    same(compiled, model, sample())
    assert attnpass.report().replaced == len(attnpass.report().sites)
    model[2].bias[0, 0, 0, 1] = True
    same(compiled, model, sample())


def test_a_model_that_writes_its_own_mask() -> None:
    class Writing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            self.bias[0, 0, 0, 1] += 1
            return super().forward(x)

    masked, bias = STYLES["nanoGPT"]
    torch.manual_seed(0)
    model, twin = Writing(masked, bias.clone()), Writing(masked, bias.clone())
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend=backend, options={"inner": "aot_eager"})
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(sample()), twin(sample()), atol=1e-5, rtol=1e-4)
    assert model.bias[0, 0, 0, 1] == 3


def test_auditing_sees_what_compiling_does() -> None:
    report = attnpass.audit(make(), sample())
    assert report.sites[0].spec.mask.causal == 0


# -- what the check costs, and keeps -----------------------------------------------------------------------------------


def _check(tensor: Tensor) -> tuple[Callable[..., Any], list[str]]:
    ran: list[str] = []
    run = guarded(lambda *_: ran.append("proved"), lambda *_: ran.append("other"), [Watched(Held("bias", tensor, 1))])
    return run, ran


def test_the_check_is_cheap() -> None:
    tensor = lower_triangle(1024)
    run = guarded(lambda *_: None, lambda *_: None, [Watched(Held("bias", tensor, 0))])
    bare = min(timeit.repeat(lambda: (lambda *_: None)(tensor), number=1000, repeat=20))
    spent = min(timeit.repeat(lambda: run(tensor), number=1000, repeat=20))
    assert (spent - bare) / 1000 < 5e-6


def test_a_mask_that_is_written_before_every_call_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpass.capture import held

    tensor = lower_triangle(8)
    run, ran = _check(tensor)
    reads: list[Any] = []
    real = held.form_of
    monkeypatch.setattr(held, "form_of", lambda t: reads.append(t) or real(t))
    for _ in range(1000):
        tensor.copy_(lower_triangle(8))
        run(None, tensor)
    assert len(reads) < 200
    assert ran[0] == "proved"
    assert ran[-1] == "other"


def test_nothing_is_kept_alive() -> None:
    import gc
    import weakref

    tensor = lower_triangle(8)
    run, ran = _check(tensor)
    other = lower_triangle(8)
    run(None, other)
    gone = weakref.ref(other), weakref.ref(tensor)
    del other, tensor
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert ran == ["proved"]


def test_a_tensor_that_cannot_be_read_is_not_trusted() -> None:
    run, ran = _check(lower_triangle(8))
    run(None, lower_triangle(8).to("meta"))
    run(None, lower_triangle(8).to_sparse())
    with torch.inference_mode():
        run(None, lower_triangle(8))
    run(None, None)
    assert ran == ["other"] * 4


# -- exported programs -------------------------------------------------------------------------------------------------


def exported(model: nn.Module, *, dynamic: bool = False) -> ExportedProgram:
    shapes = ({1: Dim("T", min=2, max=LENGTH - 1)},) if dynamic else None
    return export(model, (sample(),), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_of_a_program_are_data(persistent: bool, dynamic: bool) -> None:
    model = make(persistent=persistent)
    program, report = attnpass.rewrite(exported(model, dynamic=dynamic))
    assert report.replaced
    assert report.sites[0].spec.mask.dense
    torch.testing.assert_close(program.module()(sample()), model(sample()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("style", ["nanoGPT", "added -inf"])
def test_buffers_of_a_program_may_be_trusted(style: str, persistent: bool, dynamic: bool) -> None:
    model = make(style, persistent=persistent)
    policy = attnpass.Policy(trust_buffers=True)
    source = exported(model, dynamic=dynamic)
    program, report = attnpass.rewrite(source, policy=policy)
    site = report.sites[0]
    assert site.replaced
    assert site.spec.mask.causal == 0
    assert any("the buffer bias holds" in line for line in site.assumptions)
    assert "the buffer bias holds" in str(report)
    calls = [node for node in program.graph.nodes if SDPA in str(node.target)]
    assert [node.args[3:6] for node in calls] == [(None, 0.0, True)]
    torch.testing.assert_close(program.module()(sample()), model(sample()), atol=1e-5, rtol=1e-4)
    assert attnpass.audit(source, policy=policy).sites[0].spec.mask.causal == 0


def test_strict_trusts_no_buffer() -> None:
    policy = attnpass.Policy(trust_buffers=True, strict=True)
    _, report = attnpass.rewrite(exported(make()), policy=policy)
    assert report.sites[0].spec.mask.dense


def test_a_buffer_that_the_program_writes_is_not_trusted() -> None:
    class Writing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.bias.add_(1)
            return out

    masked, bias = STYLES["nanoGPT"]
    _, report = attnpass.rewrite(exported(Writing(masked, bias.clone())), policy=attnpass.Policy(trust_buffers=True))
    assert all(site.spec.mask.causal is None for site in report.sites)


def test_trusting_is_true_or_false() -> None:
    with pytest.raises(attnpass.AttnpassError, match="trust_buffers"):
        attnpass.Policy.from_options({"trust_buffers": "yes"})


@pytest.mark.parametrize("trust", [False, True])
def test_trusting_from_the_command_line(trust: bool, tmp_path: Path) -> None:
    torch.export.save(exported(make()), tmp_path / "in.pt2")
    flags = ["--trust-buffers"] if trust else []
    assert cli.main(["rewrite", str(tmp_path / "in.pt2"), str(tmp_path / "out.pt2"), "-q", *flags]) == 0
    graph = torch.export.load(tmp_path / "out.pt2").graph
    (call,) = [node for node in graph.nodes if SDPA in str(node.target)]
    assert (call.args[5:6] == (True,)) == trust
