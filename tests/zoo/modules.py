"""Modules of torch itself, small whole models, existing fused calls, and regions with a state of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Built, Miss, Site, T, case, keep, noise, plain, qkv, with_bias, with_keep
from tests.zoo.heads import repeat_kv

ROOT = 8**-0.5
CALLED = {"replaced": False, "reason": "already_fused"}


# -- existing calls --------------------------------------------------------------------------------------------------


@plain("existing-call", Site(scale=ROOT, **CALLED))
def a_fused_call(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v)


@plain(
    "existing-call", Site(scale=0.3, dense=True, empty_rows="zero", **CALLED), inputs=with_keep(2, 1, 5, 7, empty=True)
)
def a_fused_call_with_a_dense_mask(q: T, k: T, v: T, keep: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)


@plain("existing-call", Site(scale=ROOT, bias=((1, 3, 5, 7),), empty_rows="zero", **CALLED), inputs=with_bias(3, 5, 7))
def a_fused_call_with_a_bias(q: T, k: T, v: T, bias: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@plain("trap 6", Site(scale=ROOT, causal=0, **CALLED))
def a_fused_call_that_is_causal_from_the_top_left(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@plain(
    "existing-call",
    Site(scale=6**-0.5, q=(3, 8, 5, 6), k=(3, 2, 7, 6), v=(3, 2, 7, 6), groups=4, **CALLED),
    inputs=lambda: qkv(batch=3, heads=8, width=6, kv_heads=2),
)
def a_fused_call_with_grouped_heads(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# -- torch's modules -------------------------------------------------------------------------------------------------


class MHA(nn.Module):
    """nn.MultiheadAttention on (batch, length, 24), 3 heads."""

    def __init__(self, *, weights: bool, average: bool = True, returned: bool = True, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 3, batch_first=True, **options)
        self.weights, self.average, self.returned = weights, average, returned

    def forward(self, x: T, y: T, **masks: T) -> Any:
        out, p = self.attn(x, y, y, need_weights=self.weights, average_attn_weights=self.average, **masks)
        return (out, p) if self.returned and self.weights else out


class MaskedMHA(MHA):
    def forward(self, x: T, y: T, attn_mask: T, padding: T) -> Any:  # type: ignore[override]
        return super().forward(x, y, attn_mask=attn_mask, key_padding_mask=padding)


def two() -> tuple[T, T]:
    return noise(2, 5, 24, seed=1), noise(2, 7, 24, seed=2)


MERGED = {"q": (2, 3, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 8)}


@case("baddbmm", Site(scale=ROOT, replaced=False, reason="weights_used", **MERGED))
def multihead_attention_that_returns_its_weights() -> Built:
    return MHA(weights=True), two()


@case("weights-used", Site(scale=ROOT, replaced=False, reason="weights_used", **MERGED))
def multihead_attention_that_returns_the_weights_of_each_head() -> Built:
    return MHA(weights=True, average=False), two()


@case("baddbmm", Site(scale=ROOT, **MERGED))
def multihead_attention_whose_weights_nobody_reads() -> Built:
    return MHA(weights=True, returned=False), two()


@case("existing-call", Site(scale=ROOT, **CALLED))
def multihead_attention_without_weights() -> Built:
    return MHA(weights=False), two()


@case("baddbmm", Site(scale=ROOT, empty_rows="nan", **MERGED, key_padding=True, dense=True, ungraded=True))
def multihead_attention_with_both_masks() -> Built:
    return MaskedMHA(weights=True, returned=False), (*two(), ~keep(5, 7), ~keep(2, 7, seed=6))


@case("baddbmm", Site(scale=ROOT, q=(2, 3, 5, 8), k=(2, 3, 9, 8), v=(2, 3, 9, 8)))
def multihead_attention_with_bias_and_zero_keys() -> Built:
    return MHA(weights=True, returned=False, add_bias_kv=True, add_zero_attn=True), two()


@case(
    "dropout",
    Site(scale=ROOT, dropout=0.1, replaced=False, reason="no_kernel", **MERGED),
    train=True,
    reference="eager",
)
def multihead_attention_in_training() -> Built:
    return MHA(weights=True, returned=False, dropout=0.1), two()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: T, y: T) -> T:
        return F.multi_head_attention_forward(
            x, y, y, 24, 3, self.in_proj.weight, self.in_proj.bias, None, None, False, 0.0,
            self.out_proj.weight, self.out_proj.bias, training=self.training, need_weights=True,
        )[0]  # fmt: skip


@case("modules", Site(scale=ROOT, **MERGED))
def the_functional_form_of_multihead_attention() -> Built:
    return Functional(), tuple(x.detach().transpose(0, 1).requires_grad_() for x in two())


@case("modules", Site(scale=ROOT, q=(2, 3, 7, 8), **CALLED))
def a_transformer_encoder_layer() -> Built:
    return nn.TransformerEncoderLayer(24, 3, 32, 0.0, batch_first=True), (noise(2, 7, 24, seed=1),)


@case("modules", Site(scale=ROOT, q=(2, 3, 5, 8), k=(2, 3, 5, 8), v=(2, 3, 5, 8), **CALLED), Site(scale=ROOT, **CALLED))
def a_transformer_decoder_layer() -> Built:
    return nn.TransformerDecoderLayer(24, 3, 32, 0.0, batch_first=True), two()


# -- small models ----------------------------------------------------------------------------------------------------


def eager_attention_forward(q: T, k: T, v: T, mask: T | None, scaling: float, groups: int, p: float = 0.0) -> T:
    """The shared function of transformers."""
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    weights = torch.matmul(q, k.transpose(2, 3)) * scaling
    if mask is not None:
        weights = weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=p, training=p > 0)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def rotate(x: T) -> T:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    angle = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.1, 0.01]).repeat(2)
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


class Llama(nn.Module):
    """A decoder layer as transformers writes it: rotary positions, grouped heads, causal and padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 48, bias=False), nn.Linear(24, 12), nn.Linear(24, 12)
        self.o, self.norm = nn.Linear(48, 24, bias=False), nn.RMSNorm(24)

    def forward(self, x: T, attention_mask: T) -> T:
        batch, length, _ = x.shape
        h = self.norm(x)
        q, k, v = (p(h).view(batch, length, -1, 6).transpose(1, 2) for p in (self.q, self.k, self.v))
        at = torch.arange(length)
        allowed = (at[None, :] <= at[:, None])[None, None] & attention_mask.bool()[:, None, None, :]
        mask = torch.where(allowed, torch.tensor(0.0, dtype=x.dtype), torch.finfo(x.dtype).min)
        out = eager_attention_forward(rotate(q), rotate(k), v, mask, 6**-0.5, 4)
        return x + self.o(out.reshape(batch, length, -1))


def padded(dtype: torch.dtype = torch.float32) -> tuple[T, T]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3], mask[1, -2:] = 0, 0
    return noise(3, 7, 24, seed=1, dtype=dtype), mask


LLAMA = {"scale": 6**-0.5, "q": (3, 8, 7, 6), "k": (3, 2, 7, 6), "v": (3, 2, 7, 6), "groups": 4}


@case("hf-eager", Site(empty_rows="mean", **LLAMA, causal=0, key_padding=True))
def a_llama_layer() -> Built:
    return Llama(), padded()


@case("hf-eager", Site(empty_rows="mean", dtype="bfloat16", **LLAMA, causal=0, key_padding=True))
def a_llama_layer_in_bfloat16() -> Built:
    return Llama().bfloat16(), padded(torch.bfloat16)


class Block(nn.Module):
    """nanoGPT's block."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(24, 72), nn.Linear(24, 24), nn.LayerNorm(24)
        self.mlp, self.drop = (
            nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)),
            nn.Dropout(0.1),
        )
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: T) -> T:
        batch, length, width = x.size()
        q, k, v = self.qkv(self.norm(x)).split(width, dim=2)
        q, k, v = (t.view(batch, length, 3, width // 3).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        att = self.drop(F.softmax(att, dim=-1))
        x = x + self.proj((att @ v).transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.mlp(x)


GPT = Site(scale=ROOT, q=(2, 3, 7, 8), dense=True, empty_rows="nan")


class GPT2Layers(nn.Module):
    """Two blocks and a classifier that ends in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(24, 9)

    def forward(self, x: T) -> T:
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -1]).softmax(-1)


@case("modules", GPT, GPT, Miss("projected_scores"), held=True)
def two_gpt_blocks_and_a_classifier() -> Built:
    return GPT2Layers(), (noise(2, 7, 24, seed=1),)


# -- states ----------------------------------------------------------------------------------------------------------


def attend(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("states", Site(scale=0.3, dtype="bfloat16", softmax_dtype="bfloat16"))
def an_autocast_region(q: T, k: T, v: T) -> T:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return attend(q, k, v)


@plain("states", Site(scale=0.3), inputs=lambda: qkv(grad=True))
def a_region_without_gradients(q: T, k: T, v: T) -> T:
    with torch.no_grad():
        out = attend(q, k, v)
    return out + q


@plain("states", Miss("graph_output"), alike="the region is a graph of its own only under export")
def only_the_weights_are_made_without_gradients(q: T, k: T, v: T) -> T:
    with torch.no_grad():
        p = (q @ k.mT * 0.3).softmax(-1)
    return p @ v


@plain("states", Miss("no_product_after"))
def weights_are_detached(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1).detach() @ v


@plain("states", Miss("unknown_op"))
def scores_are_detached(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).detach().softmax(-1) @ v


@plain("states", Site(scale=0.3))
def keys_are_detached(q: T, k: T, v: T) -> T:
    return (q @ k.detach().mT * 0.3).softmax(-1) @ v


@plain("states", Site(scale=0.3), export=False)
def an_activation_checkpoint(q: T, k: T, v: T) -> T:
    return checkpoint(attend, q, k, v, use_reentrant=False) + q  # type: ignore[no-any-return]


@plain("states", Site(scale=0.3), Site(scale=0.5), inputs=lambda: (*qkv(grad=False), torch.tensor(True)))
def both_branches_of_a_condition(q: T, k: T, v: T, choice: T) -> T:
    def yes(q: T, k: T, v: T) -> T:
        return (q @ k.mT * 0.3).softmax(-1) @ v

    def no(q: T, k: T, v: T) -> T:
        return (q @ k.mT * 0.5).softmax(-1) @ v

    return torch.cond(choice, yes, no, (q, k, v))  # type: ignore[no-any-return]


@plain("states", Miss("functorch"), inputs=lambda: qkv(grad=False))
def attention_under_vmap(q: T, k: T, v: T) -> T:
    return torch.vmap(attend)(q, k, v)
