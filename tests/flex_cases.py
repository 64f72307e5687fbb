"""Attention whose mask, bias or soft cap FlexAttention takes as a function: what its tests on CPU and GPU share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

INF = math.inf
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """One attention as hand-written code; `exact`: torch itself would list the same blocks."""

    name: str
    attention: Callable[..., Tensor]
    grad: bool = True  # its gradient is a number, and is compared
    empty: bool = False  # some queries see no key
    exact: bool = True


class Attention(nn.Module):
    """A case, or several, as a module of q, k, v, pad, ids, sinks and a dense mask."""

    def __init__(self, *cases: Case) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.attention(*inputs) for case in self.cases)


def inputs(
    length: int = 200,
    width: int = 32,
    *,
    queries: int | None = None,
    v_width: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
) -> tuple[Tensor, ...]:
    """q, k, v, pad, ids, sinks, dense; the second batch row is padded on the left beyond the first block of keys."""
    g = torch.Generator().manual_seed(0)
    queries = queries or length

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype).requires_grad_(grad)

    pad = torch.arange(length) >= torch.tensor([[37], [150]]).clamp(max=length - 1)
    ids = torch.randint(0, 4, (2, length), generator=g).sort().values
    dense = torch.rand((2, 1, queries, length), generator=g) < 0.5
    dense[0, 0, min(3, queries - 1)] = False
    return (
        noise(2, heads, queries, width),
        noise(2, kv_heads, length, width),
        noise(2, kv_heads, length, v_width or width),
        pad,
        ids,
        noise(heads),
        dense,
    )


# -- pieces ------------------------------------------------------------------------------------------------------------


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ repeated(k, q).mT * SCALE


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Key and value heads as transformers repeats them."""
    batch, heads, length, width = x.shape
    times = q.shape[1] // heads
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def capped(x: Tensor, cap: float = 5.0) -> Tensor:
    return torch.tanh(x / cap) * cap


def grid(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of queries, the last of which is that of the last key, and of keys."""
    queries, keys = q.shape[2], k.shape[2]
    i = torch.arange(queries, device=q.device) + (keys - queries)
    return i[:, None], torch.arange(keys, device=q.device)[None]


def masked(x: Tensor, keep: Tensor) -> Tensor:
    return x + torch.where(keep, 0.0, torch.finfo(x.dtype).min).to(x.dtype)


def weighted(x: Tensor, v: Tensor, q: Tensor) -> Tensor:
    return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(v.dtype) @ repeated(v, q)


# -- cases -------------------------------------------------------------------------------------------------------------


def cap_alone(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    return weighted(capped(scores(q, k)), v, q)


def causal(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k), j <= i), v, q)


def window(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    # something pointwise follows: inductor would like to fuse it
    return weighted(masked(capped(scores(q, k)), (j <= i) & (j > i - 50)), v, q).sin() * 2


def prefix(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(scores(q, k).masked_fill(~((j <= i) | (j < 40)), -INF), v, q)


def chunks(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k), (j <= i) & (i // 64 == j // 64)), v, q)


def documents(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    same = ids[:, None, -q.shape[2] :, None] == ids[:, None, None, :]
    return weighted(masked(scores(q, k), (j <= i) & same), v, q)


def limits(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, *rest: Tensor) -> Tensor:
    """A window of 50 that ends at a position of the query's own, which is data."""
    i, j = grid(q, k)
    end = i + 20 * ids[:, None, : q.shape[2], None] - 30
    return weighted(masked(scores(q, k), (j <= end) & (j > end - 50)), v, q)


def padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k), (j <= i) & pad[:, None, None, :]), v, q)


def padded_and_capped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(capped(scores(q, k)), (j <= i) & pad[:, None, None, :]), v, q)


def padded_by_infinity(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(capped(scores(q, k)).masked_fill(~((j <= i) & pad[:, None, None, :]), -INF), v, q)


def sink(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor | None = None
) -> Tensor:
    i, j = grid(q, k)
    x = masked(scores(q, k), (j <= i) & (j > i - 50))
    x = torch.cat([x, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], -1)
    return weighted_without_last((x - x.max(-1, keepdim=True).values), v, q)


def sink_and_padding(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor | None = None
) -> Tensor:
    i, j = grid(q, k)
    x = masked(scores(q, k), (j <= i) & pad[:, None, None, :])
    return weighted_without_last(torch.cat([x, sinks.view(1, -1, 1, 1).expand(*x.shape[:3], 1)], -1), v, q)


def sink_and_slopes(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor | None = None
) -> Tensor:
    # a slope of the keys alone: without the sink it would be the same as one of the distance
    i, j = grid(q, k)
    x = masked(scores(q, k) + computed_slopes(q) * 0.05 * j, j <= i)
    return weighted_without_last(torch.cat([x, sinks.view(1, -1, 1, 1).expand(*x.shape[:3], 1)], -1), v, q)


def sink_by_lse(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor | None = None
) -> Tensor:
    i, j = grid(q, k)
    return scaled(masked(capped(scores(q, k)), (j <= i) & (j > i - 50)), v, q, sinks)


def sink_by_lse_and_padding(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor | None = None
) -> Tensor:
    i, j = grid(q, k)
    return scaled(masked(scores(q, k), (j <= i) & pad[:, None, None, :]), v, q, sinks)


def scaled(x: Tensor, v: Tensor, q: Tensor, sinks: Tensor) -> Tensor:
    """A sink as granite has it: the result is scaled by what the keys leave of a weight of one."""
    share = (torch.logsumexp(x, dim=-1) - sinks.view(1, -1, 1)).float().sigmoid()
    return (weighted(x, v, q) * share.unsqueeze(-1).to(v.dtype)).transpose(1, 2).contiguous()


def weighted_without_last(x: Tensor, v: Tensor, q: Tensor) -> Tensor:
    return x.softmax(-1, dtype=torch.float32)[..., :-1].to(v.dtype) @ repeated(v, q)


def slopes(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    heads = torch.arange(1, q.shape[1] + 1, device=q.device).view(1, -1, 1, 1)
    return weighted(masked(capped(scores(q, k)) + (j - i) * heads, j <= i), v, q)


def dense_mask(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor) -> Tensor:
    return weighted(capped(scores(q, k)).masked_fill(~dense, -1e30), v, q)


def computed_slopes(q: Tensor) -> Tensor:
    """The slopes of ALiBi as models compute them in their forward."""
    powers = torch.arange(1, q.shape[1] + 1, device=q.device, dtype=torch.int32)
    return torch.pow(torch.tensor(0.5, device=q.device), powers).view(-1, 1, 1)


def slopes_computed(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k) + computed_slopes(q) * (j - i), j <= i), v, q)


def slopes_and_padding(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k) + computed_slopes(q) * (j - i), (j <= i) & pad[:, None, None, :]), v, q)


def slopes_as_data(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor | None = None
) -> Tensor:
    i, j = grid(q, k)
    bias = sinks.abs().view(-1, 1, 1) * (j - i)
    return weighted((scores(q, k) + bias).masked_fill(j > i, -INF), v, q)


def relative(q: Tensor, k: Tensor) -> Tensor:
    """A bias (heads, queries, keys) by distance, read from a table: a piece of k, to have one."""
    i, j = grid(q, k)
    table = k[0, 0, :33, : q.shape[1]]
    return table[(j - i).clamp(-16, 16) + 16].permute(2, 0, 1)


def table(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    return weighted(scores(q, k) + relative(q, k), v, q)


def table_and_padding(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k) + relative(q, k), (j <= i) & pad[:, None, None, :]), v, q)


CASES = (
    Case("cap_alone", cap_alone),
    Case("causal", causal),
    Case("window", window),
    Case("prefix", prefix),
    Case("chunks", chunks),
    Case("documents", documents, exact=False),
    Case("limits", limits, empty=True, exact=False),
    Case("padded", padded, empty=True, exact=False),
    Case("padded_and_capped", padded_and_capped, grad=False, empty=True, exact=False),
    Case("padded_by_infinity", padded_by_infinity, grad=False, empty=True, exact=False),
    Case("sink", sink),
    Case("sink_and_padding", sink_and_padding, empty=True, exact=False),
    Case("sink_and_slopes", sink_and_slopes),
    Case("sink_by_lse", sink_by_lse),
    Case("sink_by_lse_and_padding", sink_by_lse_and_padding, empty=True, exact=False),
    Case("slopes", slopes),
    Case("slopes_computed", slopes_computed),
    Case("slopes_and_padding", slopes_and_padding, empty=True, exact=False),
    Case("slopes_as_data", slopes_as_data, grad=False),
    Case("table", table, grad=False),
    Case("table_and_padding", table_and_padding, grad=False, empty=True, exact=False),
    Case("dense_mask", dense_mask, empty=True, exact=False),
)
BY_NAME = {case.name: case for case in CASES}
