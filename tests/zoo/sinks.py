"""Attention sinks: a score beside the keys that has no value, as a column or as a scale of the result."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.zoo.case import Miss, Site, T, keep, noise, plain, qkv

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
SINK = Site(scale=0.3, sink=True, replaced=False, reason="no_kernel")
NONE = Site(scale=0.3, replaced=False, reason="weights_used")
READ = Site(scale=0.3, sink=True, replaced=False, reason="weights_used")


def with_sink() -> tuple[T, T, T, T]:
    return (*qkv(), noise(3, seed=5))


def with_sink_and_mask() -> tuple[T, T, T, T, T]:
    return (*with_sink(), keep(2, 1, 5, 7))


# -- a column beside the scores ----------------------------------------------------------------------------------------


@plain("sink-column", SINK, inputs=with_sink)
def gpt_oss_sink(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    combined = torch.cat([scores, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return combined.softmax(dim=-1)[..., :-1] @ v


@plain("openvino#31838", SINK, inputs=with_sink)
def a_sink_without_the_row_maximum(q: T, k: T, v: T, sinks: T) -> T:
    sinks = sinks.view(1, 3, 1, 1).expand(2, 3, 5, 1)
    return torch.cat((q @ k.mT * 0.3, sinks), dim=-1).softmax(-1)[..., :7] @ v


@plain("sink-column", SINK, inputs=with_sink)
def a_sink_as_the_first_column(q: T, k: T, v: T, sinks: T) -> T:
    sinks = sinks.view(1, 3, 1, 1).expand(2, 3, 5, 1)
    return torch.cat((sinks, q @ k.mT * 0.3), dim=-1).softmax(-1)[..., 1:] @ v


@plain(
    "sink-column",
    Site(scale=0.3, sink=True, bias=((2, 1, 5, 7),), empty_rows="nan", replaced=False, reason="no_kernel"),
    inputs=lambda: (*with_sink(), noise(2, 1, 5, 7, seed=6, grad=False)),
)
def a_sink_beside_masked_scores(q: T, k: T, v: T, sinks: T, mask: T) -> T:
    scores = q @ k.mT * 0.3 + mask
    combined = torch.cat([scores, sinks.view(1, 3, 1, 1).expand(2, 3, 5, 1)], dim=-1)
    return combined.softmax(-1)[..., :-1] @ v


@plain("sink-column", Miss("probabilities_changed"), inputs=with_sink)
def the_wrong_column_cut_off_after_a_sink(q: T, k: T, v: T, sinks: T) -> T:
    combined = torch.cat([q @ k.mT * 0.3, sinks.view(1, 3, 1, 1).expand(2, 3, 5, 1)], dim=-1)
    return combined.softmax(-1)[..., 1:] @ v


@plain("sink-column", Miss("unknown_arguments"), inputs=lambda: (*qkv(), noise(3, 2, seed=5)))
def two_sink_columns(q: T, k: T, v: T, sinks: T) -> T:
    combined = torch.cat([q @ k.mT * 0.3, sinks.view(1, 3, 1, 2).expand(2, 3, 5, 2)], dim=-1)
    return combined.softmax(-1)[..., :-2] @ v


@plain(
    "sink-column",
    Site(scale=0.3, sink=True, bias=((1, 1, 5, 1),), replaced=False, reason="no_kernel"),
    inputs=with_sink,
)
def a_sink_beside_scores_that_are_raised_by_row(q: T, k: T, v: T, sinks: T) -> T:
    # without the sink no softmax could see it
    scores = q @ k.mT * 0.3 + torch.arange(5)[:, None]
    return torch.cat([scores, sinks.view(1, 3, 1, 1).expand(2, 3, 5, 1)], dim=-1).softmax(-1)[..., :-1] @ v


# -- a scale of the result by log-sum-exp ------------------------------------------------------------------------------


def share(scores: T, sinks: T) -> T:
    """What the keys leave of a weight of one, (batch, heads, queries, 1)."""
    return torch.sigmoid(torch.logsumexp(scores, dim=-1, keepdim=True) - sinks.view(1, 3, 1, 1))


@plain("sink-lse", SINK, inputs=with_sink)
def a_sink_by_log_sum_exp(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v * share(scores, sinks)


@plain(
    "sink-lse",
    Site(scale=0.3, sink=True, dense=True, empty_rows="zero", replaced=False, reason="no_kernel"),
    inputs=with_sink_and_mask,
)
def granite_sink_by_log_sum_exp(q: T, k: T, v: T, sinks: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    scores = scores + torch.where(keep, 0.0, LOWEST)
    lse = torch.logsumexp(scores, dim=-1)
    scale = (lse - sinks.view(1, -1, 1)).to(torch.float32).sigmoid()
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    out = F.dropout(weights, p=0.1, training=False) @ v
    return (out * scale.unsqueeze(-1).to(out.dtype)).transpose(1, 2).contiguous()


@plain(
    "sink-lse",
    Site(scale=0.3, sink=True, dtype="bfloat16", replaced=False, reason="no_kernel"),
    inputs=lambda: (*qkv(dtype=torch.bfloat16), noise(3, seed=5, dtype=torch.bfloat16)),
)
def a_sink_by_log_sum_exp_of_scores_that_are_not_cast(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    out = scores.float().softmax(-1).to(v.dtype) @ v
    return share(scores, sinks).to(out.dtype) * out


@plain("sink-lse", SINK, inputs=with_sink)
def a_sink_by_log_sum_exp_after_heads_are_moved(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    out = (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
    return (out * share(scores, sinks).transpose(1, 2)).flatten(2)


@plain("sink-lse", SINK, inputs=with_sink)
def a_sink_by_log_sum_exp_of_merged_heads(q: T, k: T, v: T, sinks: T) -> T:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.mT) * 0.3
    lse = torch.special.logsumexp(scores, dim=2)
    return torch.bmm(scores.softmax(-1), v) * torch.sigmoid(torch.rsub(sinks.repeat(2)[:, None], lse))[:, :, None]


@plain("sink-lse", SINK, inputs=lambda: (*qkv(), noise(2, 1, 5, 1, seed=5)))
def a_sink_for_each_query(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v * torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks)


@plain("sink-lse", SINK, inputs=with_sink)
def a_sink_by_log_sum_exp_in_place(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    scale = torch.logsumexp(scores, dim=-1, keepdim=True)
    scale = (scale - sinks.view(1, 3, 1, 1)).sigmoid_()
    return (scores.softmax(-1) @ v).mul_(scale)


@plain(
    "sink-lse",
    Site(scale=0.3, softcap=5.0, sink=True, replaced=False, reason="no_kernel"),
    inputs=with_sink,
)
def a_sink_by_log_sum_exp_of_capped_scores(q: T, k: T, v: T, sinks: T) -> T:
    scores = torch.tanh(q @ k.mT * (0.3 / 5.0)) * 5.0
    return scores.softmax(-1) @ v * share(scores, sinks)


@plain(
    "sink-lse",
    Site(scale=0.3, sink=True, dense=True, empty_rows="nan", replaced=False, reason="empty_rows"),
    inputs=with_sink_and_mask,
    grad=False,
)
def a_sink_by_log_sum_exp_of_rows_of_minus_infinity(q: T, k: T, v: T, sinks: T, keep: T) -> T:
    # a column beside them would make zero of such a row; here it stays what it is
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return scores.softmax(-1) @ v * share(scores, sinks)


@plain("sink-lse", NONE, inputs=with_sink)
def a_share_the_wrong_way_round(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v * torch.sigmoid(sinks.view(1, 3, 1, 1) - torch.logsumexp(scores, -1, keepdim=True))


@plain(
    "sink-lse",
    Site(scale=0.3, q=(2, 3, 7, 8), replaced=False, reason="weights_used"),
    inputs=lambda: (*qkv(queries=7), noise(3, seed=5)),
)
def a_log_sum_exp_over_the_queries(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    lse = torch.logsumexp(scores, dim=-2)[..., None]
    return scores.softmax(-1) @ v * torch.sigmoid(lse - sinks.view(1, 3, 1, 1))


@plain(
    "sink-lse",
    Site(scale=0.3, dense=True, empty_rows="mean", replaced=False, reason="weights_used"),
    inputs=with_sink_and_mask,
)
def a_log_sum_exp_of_scores_before_the_mask(q: T, k: T, v: T, sinks: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.masked_fill(~keep, LOWEST).softmax(-1) @ v * share(scores, sinks)


@plain("sink-lse", NONE, inputs=with_sink)
def a_log_sum_exp_of_scores_that_were_raised_afterwards(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    return (scores + 1.0).softmax(-1) @ v * share(scores, sinks)


@plain("sink-lse", NONE, inputs=with_sink)
def a_log_sum_exp_of_scores_that_are_raised(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3 + 1.0
    return scores.softmax(-1) @ v * share(scores, sinks)


@plain("sink-lse", NONE, inputs=with_sink)
def a_log_sum_exp_that_is_doubled(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    return scores.softmax(-1) @ v * torch.sigmoid(lse * 2 - sinks.view(1, 3, 1, 1))


@plain("sink-lse", NONE, inputs=with_sink)
def a_sink_that_is_subtracted_twice(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    return scores.softmax(-1) @ v * torch.sigmoid(torch.sub(lse, sinks.view(1, 3, 1, 1), alpha=2))


@plain("sink-lse", NONE, inputs=lambda: (*qkv(), noise(3, 1, 8, seed=5)))
def a_sink_for_each_column_of_the_values(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v * torch.sigmoid(torch.logsumexp(scores, dim=-1, keepdim=True) - sinks)


@plain(
    "sink-lse",
    Site(scale=0.3, q=(2, 3, 3, 8), replaced=False, reason="weights_used"),
    inputs=lambda: (*qkv(queries=3), noise(3, seed=5)),
)
def a_share_of_the_wrong_head(q: T, k: T, v: T, sinks: T) -> T:
    # as many queries as heads: nothing but the axes tells
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v * share(scores, sinks).transpose(1, 2)


@plain("sink-lse", NONE, inputs=lambda: (*with_sink(), noise(2, 3, 5, 8, seed=6)))
def a_share_of_something_else(q: T, k: T, v: T, sinks: T, other: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v + other * share(scores, sinks)


@plain("sink-lse", READ, inputs=with_sink)
def a_share_that_is_read_twice(q: T, k: T, v: T, sinks: T) -> tuple[T, T]:
    scores = q @ k.mT * 0.3
    scale = share(scores, sinks)
    return scores.softmax(-1) @ v * scale, scale


@plain("sink-lse", READ, inputs=with_sink)
def a_result_that_is_read_before_it_is_scaled(q: T, k: T, v: T, sinks: T) -> tuple[T, T]:
    scores = q @ k.mT * 0.3
    out = scores.softmax(-1) @ v
    return out, out * share(scores, sinks)


@plain("sink-lse", NONE, inputs=with_sink)
def a_result_that_is_scaled_twice(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    out = scores.softmax(-1) @ v
    return out * share(scores, sinks) + out * share(scores, sinks * 2)


@plain("sink-lse", NONE, inputs=with_sink)
def scores_that_change_between_softmax_and_log_sum_exp(q: T, k: T, v: T, sinks: T) -> T:
    scores = q @ k.mT * 0.3
    weights = (scores * 1.0).softmax(-1)
    scores = scores.add_(torch.arange(7.0))
    return weights @ v * share(scores, sinks)


@plain("sink-lse", READ, inputs=with_sink)
def a_column_and_a_share(q: T, k: T, v: T, sinks: T) -> T:
    scores = torch.cat([q @ k.mT * 0.3, sinks.view(1, 3, 1, 1).expand(2, 3, 5, 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v * share(scores, sinks)
