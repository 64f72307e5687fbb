"""Whole models as people write them by hand: one small class each, in the spelling of a well-known repository.

The last ones are look-alikes, which must be left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.case import Case, Inputs, noise, redraw, tokens

BATCH, LENGTH, WIDTH, HEADS, DEPTH = 3, 11, 32, 4, 2
HEAD = WIDTH // HEADS


class MinGPTAttention(nn.Module):
    """Karpathy's: a triangular buffer, masked_fill with -inf, softmax, dropout, product."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(c, dim=2)
        k = k.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        q = q.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        v = v.view(b, t, HEADS, c // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.drop(F.softmax(att, dim=-1))
        return self.out((att @ v).transpose(1, 2).contiguous().view(b, t, c))


class ViTAttention(nn.Module):
    """lucidrains' ViT: chunk, rearrange, an nn.Softmax module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.attend = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, HEADS, HEAD).permute(0, 2, 1, 3) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attn = self.attend(torch.matmul(q, k.transpose(-1, -2)) * HEAD**-0.5)
        return self.out(torch.matmul(attn, v).permute(0, 2, 1, 3).reshape(b, n, -1))


class EinsumAttention(nn.Module):
    """Mesh-style einsum with heads in the middle, causal by a comparison of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, HEADS, HEAD) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / HEAD**0.5
        position = torch.arange(n, device=x.device)
        scores = torch.where(position[:, None] >= position[None, :], scores, torch.finfo(scores.dtype).min)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(b, n, WIDTH)


class GroupedRopeAttention(nn.Module):
    """Llama's own code: rotary positions, repeated key/value heads, a -inf triangle that is added, float softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = _rotate(self.q(x).view(b, n, HEADS, HEAD))
        k = _rotate(self.k(x).view(b, n, HEADS // 2, HEAD))
        v = self.v(x).view(b, n, HEADS // 2, HEAD)
        k, v = (t[:, :, :, None, :].expand(b, n, HEADS // 2, 2, HEAD).reshape(b, n, HEADS, HEAD) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD)
        scores = scores + torch.full((n, n), float("-inf"), device=x.device).triu(1)
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        return torch.matmul(scores, v).transpose(1, 2).contiguous().view(b, n, -1)


def _rotate(x: Tensor) -> Tensor:
    n, half = x.shape[1], x.shape[-1] // 2
    angle = torch.arange(n)[:, None] * torch.arange(1, half + 1)[None, :] * 0.1
    cos, sin = angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class AlibiAttention(nn.Module):
    """Position slopes per head, added in a product by baddbmm over merged batch and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).reshape(3, b * HEADS, n, HEAD).unbind(0)
        slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
        distance = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        bias = (slopes[:, None, None] * distance).repeat(b, 1, 1)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=HEAD**-0.5)
        scores = scores.masked_fill((distance > 0)[None], -10000.0)
        out = torch.bmm(scores.softmax(-1), v)
        return out.view(b, HEADS, n, HEAD).transpose(1, 2).reshape(b, n, WIDTH)


class ExpSumAttention(nn.Module):
    """A softmax spelled out: minus row maximum, exp, sum, divide."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = torch.bmm(q, k.transpose(1, 2)) * WIDTH**-0.5
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return torch.bmm(weights / weights.sum(-1, keepdim=True), v)


class CrossAttention(nn.Module):
    """Perceiver: learned latents ask, the sequence answers; the output is transposed by the product itself."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(5, WIDTH))
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(self.latents).view(1, 5, HEADS, HEAD).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * HEAD**-0.5).softmax(-1)
        answer = (v.mT @ attention.mT).permute(0, 3, 1, 2).reshape(b, 5, WIDTH)
        return x + answer.mean(1, keepdim=True)


class SoftcapSinkAttention(nn.Module):
    """Scores capped by tanh and a learned sink column."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.sink = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.tanh(q @ k.mT * HEAD**-0.5 / 2.0) * 2.0
        scores = torch.cat([scores, self.sink.view(1, -1, 1, 1).expand(b, -1, n, -1)], dim=-1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).reshape(b, n, WIDTH)


class TalkingHeads(nn.Module):
    """Heads mixed on both sides of the softmax: no fused form."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.before((q @ k.mT * HEAD**-0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (weights @ v).transpose(1, 2).reshape(b, n, WIDTH)


class Differential(nn.Module):
    """The difference of two maps meets the values: no fused form."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q1, q2, k1, k2 = self.qk(x).chunk(4, -1)
        first, second = ((q @ k.mT * WIDTH**-0.5).softmax(-1) for q, k in ((q1, k1), (q2, k2)))
        return (first - 0.3 * second) @ self.v(x)


class LinearAttention(nn.Module):
    """Queries and keys are normalised apart; the product comes afterwards: not softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v)


class Router(nn.Module):
    """A mixture of experts: softmax over experts of a linear layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4), nn.Parameter(torch.zeros(4, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bte,btf,efg->btg", self.gate(x).softmax(-1), x, self.experts)


class Blocks(nn.Module):
    """Pre-norm residual blocks around one kind of attention."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, WIDTH)
        self.attention = nn.ModuleList(kind() for _ in range(DEPTH))
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for attend, norm, mlp in zip(self.attention, self.norm, self.mlp, strict=True):
            x = x + attend(norm(x))
            x = x + F.gelu(mlp(x))
        return x


def convolutional() -> tuple[nn.Module, Inputs]:
    return _SelfAttention2d(), {"*": (noise(BATCH, WIDTH, 5, 3),)}


class _SelfAttention2d(nn.Module):
    """SAGAN: 1x1 convolutions, flattened pictures, the product transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Conv2d(WIDTH, 8, 1), nn.Conv2d(WIDTH, 8, 1)
        self.v, self.gamma = nn.Conv2d(WIDTH, WIDTH, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q = self.q(x).view(b, -1, h * w).permute(0, 2, 1)
        attention = torch.softmax(torch.bmm(q, self.k(x).view(b, -1, h * w)), dim=-1)
        out = torch.bmm(self.v(x).view(b, c, h * w), attention.permute(0, 2, 1))
        return self.gamma * out.view(b, c, h, w) + x


_KINDS: dict[str, Any] = {
    "mingpt": MinGPTAttention,
    "vit": ViTAttention,
    "einsum_causal": EinsumAttention,
    "llama": GroupedRopeAttention,
    "alibi": AlibiAttention,
    "exp_sum": ExpSumAttention,
    "perceiver": CrossAttention,
    "softcap_sink": SoftcapSinkAttention,
    "talking_heads": TalkingHeads,
    "differential": Differential,
    "linear_attention": LinearAttention,
    "router": Router,
}


def _case(name: str) -> Case:
    def build() -> tuple[nn.Module, Inputs]:
        torch.manual_seed(0)
        model, inputs = convolutional() if name == "sagan" else (Blocks(_KINDS[name]), {"ids": tokens(BATCH, LENGTH)})
        return redraw(model.eval()), inputs

    return Case(suite="handwritten", name=name, build=build)


def cases() -> list[Case]:
    """All models."""
    return [_case(name) for name in (*_KINDS, "sagan")]
