"""flash-attn 2 and 3 as they are installed: every feature and shape against float64, forward and backward."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnpass.kernels.flash import Flash, FlashVarlen
from attnpass.kernels.flash3 import Flash3, Flash3Hub, FlashVarlen3
from attnpass.kernels.flash_base import FlashKernel
from attnpass.kernels.flash_ops import define
from attnpass.spec import AttentionSpec, BiasSpec, MaskSpec
from tests.flex_cases import BY_NAME, Attention, Case, inputs
from tests.kernels.matrix import (
    FEATURES,
    Problem,
    Through,
    complaints,
    flash_operation,
    given,
    held_to_float64,
    problems,
)
from tests.kernels.test_flash import alibi, capped_alibi, capped_window, padded

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]

KINDS: tuple[type[FlashKernel], ...] = (Flash, FlashVarlen, Flash3, FlashVarlen3)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
ALIKE = tuple((width, width) for width in (8, 32, 72, 96, 128, 160, 192, 256))
UNLIKE = ((192, 128), (136, 104), (64, 256), (64, 512))
PROBLEMS = list(dict.fromkeys(problems(widths=ALIKE + UNLIKE)))


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def here(kind: type[FlashKernel]) -> FlashKernel:
    kernel = kind()
    missing = kernel.available()
    if missing is not None:
        pytest.skip(missing.text)
    return kernel


def spec(problem: Problem, dtype: torch.dtype) -> AttentionSpec:
    """The problem as the pass would state it, bounds counted from the first query and the first key."""
    ahead = problem.keys - problem.queries
    left, right = problem.left, problem.right
    mask = MaskSpec(
        causal=None if right is None or left is not None else right + ahead,
        window=None if left is None else (left - ahead, None if right is None else right + ahead),
        key_padding=bool(problem.padding),
    )
    slopes = BiasSpec(shape=(1, problem.heads, problem.queries, problem.keys), dtype="float32")
    return AttentionSpec(
        q=(problem.batch, problem.heads, problem.queries, problem.width),
        k=(problem.batch, problem.kv_heads, problem.keys, problem.width),
        v=(problem.batch, problem.kv_heads, problem.keys, problem.v_width or problem.width),
        dtype=str(dtype).removeprefix("torch."),
        device="cuda",
        scale=problem.scale,
        groups=problem.heads // problem.kv_heads,
        mask=mask,
        bias=(slopes,) if problem.alibi else (),
        softcap=problem.softcap or None,
        sink=problem.sink,
        grad=problem.grad,
        deterministic=problem.deterministic,
    )


def accepted(kernel: FlashKernel, problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem, without its backward where there is none; what the kernel refuses is skipped with its reasons."""
    found = list(kernel.refusals(spec(problem, dtype)))
    if problem.grad and found:
        forward = replace(problem, grad=False)
        if not list(kernel.refusals(spec(forward, dtype))):
            return forward
    if found:
        pytest.skip("; ".join(reason.text for reason in found))
    return problem


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@by_kind
def test_bfloat16(kind: type[FlashKernel], problem: Problem) -> None:
    kernel = here(kind)
    problem = accepted(kernel, problem, torch.bfloat16)
    assert not complaints(flash_operation(kernel), problem, "cuda", torch.bfloat16)


@pytest.mark.parametrize("problem", FEATURES, ids=lambda problem: problem.name)
@by_kind
def test_float16(kind: type[FlashKernel], problem: Problem) -> None:
    kernel = here(kind)
    problem = accepted(kernel, problem, torch.float16)
    assert not complaints(flash_operation(kernel), problem, "cuda", torch.float16)


@by_kind
def test_what_is_declared_is_accepted(kind: type[FlashKernel]) -> None:
    """Only a soft cap may be missing from a build: otherwise the tests before this one would skip all there is."""
    kernel = here(kind)
    for problem in FEATURES:
        if (problem.padding and not kernel.can.key_padding) or (problem.alibi and not kernel.can.alibi):
            continue
        found = [reason.text for reason in kernel.refusals(spec(problem, torch.bfloat16))]
        assert not found or (problem.softcap and issubclass(kind, Flash3)), (problem.name, found)


@by_kind
def test_a_deterministic_backward_gives_the_same_bits(kind: type[FlashKernel]) -> None:
    kernel = here(kind)
    padding = "holes" if kernel.can.key_padding else ""
    problem = Problem(batch=1, heads=8, kv_heads=2, queries=2048, keys=2048, deterministic=True, padding=padding)
    x, runs = given(problem, "cuda", torch.bfloat16), []
    for _ in range(3):
        out, _ = flash_operation(kernel)(problem, x)
        runs.append(torch.autograd.grad(out, x.leaves, torch.ones_like(out)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@by_kind
def test_a_cuda_graph_holds_it(kind: type[FlashKernel]) -> None:
    """Captured with its backward, replayed with other numbers, other padding too; nothing waits for the GPU."""
    kernel = here(kind)
    problem = Problem(batch=3, kv_heads=2, queries=70, keys=200, padding="holes" if kernel.can.key_padding else "")
    problem = replace(problem, right=None if problem.padding else 0)
    operation = flash_operation(kernel)
    x, other = (given(replace(problem, padding=pad), "cuda", torch.bfloat16) for pad in (problem.padding, "left"))
    other = other if problem.padding else given(problem, "cuda", torch.bfloat16)
    with torch.no_grad():
        for leaf in other.leaves:
            leaf.mul_(0.5)

    def step() -> tuple[Tensor, ...]:
        out, _ = operation(problem, x)
        # of the autograd graph nothing stays: its nodes belong to the stream they were made on
        return out.detach(), *torch.autograd.grad(out, x.leaves, torch.ones_like(out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that it is a prototype
                torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for mine, theirs in zip(x.leaves, other.leaves, strict=True):
            mine.copy_(theirs)
        if x.seen is not None and other.seen is not None:
            x.seen.copy_(other.seen)
    graph.replay()
    torch.cuda.synchronize()
    found = [y.clone() for y in captured]
    for mine, fresh in zip(found, step(), strict=True):
        torch.testing.assert_close(mine, fresh, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [Flash, FlashVarlen], ids=lambda kind: kind.name)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(kind: type[FlashKernel], p: float) -> None:
    """Values that are the unit matrix show the probabilities, from which the gradients are computed by hand."""
    kernel = here(kind)
    size, scale = 128, 0.2
    q, k, w = (torch.randn(2, 4, size, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    order = ends = None
    if kernel.can.key_padding:
        order = torch.arange(2 * size, device="cuda")
        ends = torch.tensor([0, size, 2 * size], dtype=torch.int32, device="cuda")

    def call(v: Tensor) -> Tensor:
        torch.manual_seed(1)
        found: Tensor = define(kernel.vendor)(q, k, v, None, None, order, ends, scale, -1, -1, 0.0, p, False)[0]
        return found

    unit = torch.eye(size, device="cuda", dtype=torch.bfloat16).expand(2, 4, size, size)
    keep = (call(unit) != 0).double()
    share = float(keep.mean())
    assert abs(share - (1 - p)) < 0.01  # it rounds to 1/255
    assert torch.equal(call(w), call(w))
    exact = [x.detach().double().requires_grad_() for x in (q, k, w)]
    by_hand = (torch.softmax(exact[0] @ exact[1].mT * scale, -1) * keep / (1 - p)) @ exact[2]
    out = call(w)
    assert relative(out, by_hand) < 0.01
    weight = torch.randn_like(by_hand)
    mine = torch.autograd.grad(out, (q, k, w), weight.to(out.dtype))
    for name, a, b in zip("qkv", mine, torch.autograd.grad(by_hand, exact, weight), strict=True):
        assert relative(a, b) < 0.02, name


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


# -- through the pass --------------------------------------------------------------------------------------------------

SITES = [
    *((Flash, BY_NAME[name]) for name in ("cap_alone", "causal", "window", "sink")),
    *((Flash, case) for case in (Case("alibi", alibi), Case("capped_alibi", capped_alibi))),
    (Flash, Case("capped_window", capped_window)),
    (FlashVarlen, Case("padded", padded)),
    *((Flash3, BY_NAME[name]) for name in ("causal", "sink")),
    (FlashVarlen3, Case("padded", padded)),
]


@pytest.mark.parametrize(("kind", "case"), SITES, ids=lambda x: x.name)
def test_a_model_computes_the_same(kind: type[FlashKernel], case: Case) -> None:
    kernel = here(kind)
    through = Through(module := Attention(case), kernel)
    x = on_cuda(600)
    assert not held_to_float64(module, x, through, grad=True)
    assert [site.kernel for site in through.sites] == [kind.name], through.reasons


def on_cuda(length: int) -> tuple[Tensor, ...]:
    given = inputs(length, 64, dtype=torch.bfloat16, grad=True)
    return tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in given)


@pytest.mark.parametrize("kind", [FlashVarlen, FlashVarlen3], ids=lambda kind: kind.name)
def test_layers_compiled_by_inductor_for_all_lengths(kind: type[FlashKernel]) -> None:
    class Layers(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
            for _ in range(2):
                q = q + padded(q, k, v, pad)
            return q

    kernel = here(kind)
    through = Through(module := Layers(), kernel, inner="inductor", dynamic=None)
    for length in (600, 350, 512):
        q, k, v, _, *rest = on_cuda(length)
        pad = torch.arange(length, device="cuda") >= torch.tensor([[37], [300]], device="cuda")
        assert not held_to_float64(module, (q, k, v, pad, *rest), through, grad=True)
    assert [site.kernel for site in through.sites] == [kind.name] * 4, through.reasons


# -- the Hub -----------------------------------------------------------------------------------------------------------


def test_a_local_kernel_in_place_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FlashAttention-3 as it is installed, laid out as the repository on the Hub is."""
    here(Flash3)
    build = tmp_path / "build" / "torch-cuda"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("import torch, flash_attn_3._C\nops = torch.ops.flash_attn_3\n")
    (build / "metadata.json").write_text(
        '{"name": "flash-attn3", "id": "_x_1", "version": 1, "license": "BSD-3-Clause", "python-depends": [], '
        '"backend": {"type": "cuda"}}'
    )
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn3={tmp_path}")
    kernel = here(Flash3Hub)
    for problem in (Problem(right=0, kv_heads=2, sink=True), Problem(left=40, right=0)):
        problem = accepted(kernel, problem, torch.bfloat16)
        assert not complaints(flash_operation(kernel), problem, "cuda", torch.bfloat16)
