"""Bugs of kernels and of those who call them: an argument that is dropped, a number that is misread."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnpass
from attnpass.capture.dynamo import backend
from attnpass.kernels import Kernel, kernels
from attnpass.spec import AttentionSpec, BiasSpec, MaskSpec
from tests.field_bugs.corpus import three
from tests.plain import compiled, distance, eager, error, with_gradients


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


# -- every kernel ------------------------------------------------------------------------------------------------------

SHAPE = (2, 4, 64, 64)
MASKED: dict[str, dict[str, Any]] = {
    "a mask": {"mask": MaskSpec(dense=True)},
    "a bias": {"bias": (BiasSpec(shape=(1, 4, 64, 64), dtype="float16"),)},
}


@pytest.mark.parametrize("what", MASKED)
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_diffusers_12605_a_mask_is_never_dropped(kernel: Kernel, what: str) -> None:
    """A mask was given to a kernel that has no argument for one, and attention was computed without it. Here a kernel
    that does not declare masks refuses; those that do are compared with eager results elsewhere (tests/kernels).
    """
    device = "cuda" if "cuda" in kernel.can.devices else min(kernel.can.devices)
    plain = AttentionSpec(q=SHAPE, k=SHAPE, v=SHAPE, dtype="float16", device=device, scale=0.125)
    masked = dataclasses.replace(plain, **MASKED[what])
    more = [refusal.code for refusal in kernel.refusals(masked)]
    for refusal in kernel.refusals(plain):
        more.remove(refusal.code)
    if what == "a bias" and kernel.can.alibi:
        return  # takes slopes; a bias that is none is refused where the call is written
    assert more or kernel.can.dense_mask or kernel.takes == "functions"


# -- torch's own -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
def test_pytorch_152028_attention_with_a_row_that_sees_nothing(need_weights: bool) -> None:
    """nn.MultiheadAttention gives NaN or zeros for a query without any key, depending on whether weights are asked
    for. What it gives eagerly is what it has to give compiled.
    """
    attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
    q, k, v = three(2, 4, 8)
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -float("inf"))
    mask[0] = -float("inf")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, attn_mask=mask, need_weights=need_weights)

    assert distance(compiled(run, (q, k, v), backend), eager(run, (q, k, v))) < 1e-5
    assert not attnpass.report().failures


def test_pytorch_191612_a_mask_in_more_bits_than_the_queries() -> None:
    """A mask in single precision was read as if it were in half precision: other numbers, no error."""
    q, k, v = three(2, 4, 32, 64, dtype=torch.float16)
    mask = torch.randn(2, 1, 32, 32)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1) * 0.125).float() + mask.to(q.device)
        return torch.softmax(scores, dim=-1).to(q.dtype) @ v

    assert error(masked, (q, k, v), backend) < 4e-3
    assert attnpass.report().replaced == 1


def test_pytorch_179578_the_fused_result_drifts_no_further_than_the_original() -> None:
    """One head of width 256, four layers: the fused kernel sums in another order. Its error is compared with float64,
    not with the original, which has one as well.
    """
    narrow = nn.ModuleList(nn.ModuleList(nn.Linear(256, 256) for _ in range(4)) for _ in range(4))
    wide = copy.deepcopy(narrow).double()
    x = torch.randn(2, 48, 256)

    def model(x: Tensor, layers: Any) -> Tensor:
        for q, k, v, out in layers:
            scores = torch.matmul(q(x), k(x).transpose(-2, -1)).div(16.0)
            x = x + out(F.dropout(scores.softmax(dim=-1), p=0.0).matmul(v(x)))
        return x

    with torch.no_grad():
        exact = model(x.double(), wide)
        original = distance(model(x, narrow).double(), exact)
        fused = distance(compiled(lambda x: model(x, narrow), (x,), backend).double(), exact)
    assert attnpass.report().replaced == 4
    assert fused < 2 * original + 1e-6


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [tensor.cuda().to(dtype) for tensor in three(*shape)]


@pytest.mark.gpu
def test_pytorch_196678_gradients_under_a_mask() -> None:
    """cuDNN gives NaN as the gradient of q for a mask over 64 keys more than a multiple of 128."""
    keep = torch.rand(2, 1, 192, 192, device="cuda") > 0.3
    keep[..., 0] = True

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1) * 0.125).masked_fill(~keep, -float("inf"))
        return torch.softmax(scores, dim=-1) @ v

    for options in ({}, {"kernel": "native_cudnn"}):
        assert error(with_gradients(masked), on_gpu(2, 4, 192, 64), backend, options=options) < 5e-2


@pytest.mark.gpu
def test_pytorch_191612_with_cudnn() -> None:
    """The same as above, where it was found: on the kernel that SDPA takes first on this GPU."""
    mask = torch.randn(2, 1, 128, 128, device="cuda")

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.transpose(-2, -1) * 0.125).float() + mask, dim=-1).to(q.dtype) @ v

    for options in ({}, {"kernel": "native_cudnn"}):
        assert error(masked, on_gpu(2, 4, 128, 64), backend, options=options) < 2e-2


@pytest.mark.gpu
def test_transformers_46960_shared_heads_of_512_do_not_cost_a_matrix_of_scores() -> None:
    """Heads of width 512 that share keys: SDPA has no fused kernel for them where heads are shared, and silently takes
    one that writes all scores down.
    """
    q, k, v = on_gpu(1, 8, 4096, 512)
    k, v = k[:, :2].contiguous(), v[:, :2].contiguous()

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))
        scores = q @ k.transpose(-2, -1) * 512**-0.5
        at = torch.arange(q.shape[2], device=q.device)
        scores = scores.masked_fill(at[None, :] > at[:, None], -float("inf"))
        return torch.softmax(scores, dim=-1) @ v

    with torch.no_grad():
        run = torch.compile(grouped, backend=backend)
        wanted, got = grouped(q, k, v), run(q, k, v)
        assert distance(got, wanted) < 3e-2
        if not attnpass.report().replaced:
            pytest.skip("no kernel here takes heads of this width; the report says so")
        del wanted, got
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(q, k, v)
        assert torch.cuda.max_memory_allocated() - before < 8 * 4096 * 4096 * 2
