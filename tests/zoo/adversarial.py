"""Cases made to fool the pass: each is a way in which a matcher that is almost right computes something else."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.case import Built, Miss, Site, T, case, keep, noise, plain, qkv, with_keep

INF = float("inf")
USED = {"replaced": False, "reason": "weights_used"}


def cube() -> tuple[T, T, T]:
    """All axes of size four."""
    return noise(4, 4, 4, 4, seed=1), noise(4, 4, 4, 4, seed=2), noise(4, 4, 4, 4, seed=3)


# -- a factor or a term that must not get lost -----------------------------------------------------------------------


@plain("trap 10", Miss("probabilities_changed"), inputs=lambda: (*cube(), noise(4, 1, 1, seed=4)))
def a_gate_on_weights_that_stand_at_the_right(q: T, k: T, v: T, gate: T) -> T:
    return v.mT @ ((k @ q.mT * 0.3).softmax(-2) * gate)


@plain("trap 10", Miss("probabilities_changed"), inputs=lambda: (*cube(), noise(4, 1, 1, seed=4)))
def a_gate_on_weights_of_equal_sizes(q: T, k: T, v: T, gate: T) -> T:
    return ((q @ k.mT * 0.3).softmax(-1) * gate) @ v


@plain("trap 10", Miss("probabilities_changed"), inputs=lambda: (*cube(), noise(4, 4, 4, 4, seed=4)))
def a_term_on_weights_of_equal_sizes(q: T, k: T, v: T, term: T) -> T:
    return ((q @ k.mT * 0.3).softmax(-1) + term) @ v


@plain(
    "trap 10",
    Site(scale=0.3, q=(4, 4, 4, 4), k=(4, 4, 4, 4), v=(4, 4, 4, 4)),
    inputs=lambda: (*cube(), noise(4, 1, 1, seed=4)),
)
def a_gate_on_the_output(q: T, k: T, v: T, gate: T) -> T:
    return ((q @ k.mT * 0.3).softmax(-1) @ v) * gate


@plain("trap 10", Site(scale=0.3))
def a_number_on_the_values(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ (v * 0.5)


@plain("trap 10", Miss("probabilities_changed"))
def a_number_on_the_weights(q: T, k: T, v: T) -> T:
    return ((q @ k.mT * 0.3).softmax(-1) * 0.5) @ v


@plain("trap 10", Site(scale=0.0))
def a_scale_of_zero(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.0).softmax(-1) @ v


@plain("trap 10", Site(scale=0.3, bias=((1, 1, 1, 1),), empty_rows="nan", **USED), inputs=lambda: qkv(grad=False))
def the_largest_score_of_all_taken_away(q: T, k: T, v: T) -> T:
    # one number for the whole tensor: it would cancel, but it is read off the scores
    scores = q @ k.mT * 0.3
    return (scores - scores.max()).softmax(-1) @ v


@plain("trap 10", Site(scale=0.3, bias=((2, 3, 1, 7),), empty_rows="nan", **USED), inputs=lambda: qkv(grad=False))
def the_largest_score_of_each_key_taken_away(q: T, k: T, v: T) -> T:
    # not constant along the softmax: a bias made from the scores
    scores = q @ k.mT * 0.3
    return (scores - scores.amax(dim=-2, keepdim=True)).softmax(-1) @ v


@plain(
    "trap 10",
    Site(scale=0.3, q=(2, 3, 7, 8), bias=((2, 3, 1, 7),), empty_rows="nan", **USED),
    inputs=lambda: qkv(queries=7, grad=False),
)
def the_largest_score_of_each_query_taken_away_from_the_keys(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    return (scores - scores.amax(dim=-1).unsqueeze(-2)).softmax(-1) @ v


@plain("trap 10", Site(scale=0.3, dense=True, empty_rows="nan", **USED))
def top_k_attention_masks_by_its_own_scores(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    least = scores.topk(3, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -INF).softmax(-1) @ v


@plain("trap 10", Miss("fill_not_constant"), inputs=with_keep(2, 1, 5, 7), grad=False)
def a_fill_of_nan(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~keep, float("nan")).softmax(-1) @ v


@plain(
    "trap 5",
    Site(scale=0.3, dense=True, empty_rows="mean", dtype="float16"),
    inputs=lambda: (*qkv(dtype=torch.float16), keep(2, 1, 5, 7, empty=True)),
)
def the_lowest_float16_before_a_float32_softmax(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@plain(
    "trap 5",
    Site(scale=0.3, dense=True, empty_rows="mean", dtype="float16", replaced=False, reason="weak_fill"),
    inputs=lambda: (*qkv(dtype=torch.float16), keep(2, 1, 5, 7, empty=True)),
)
def the_lowest_float16_in_float32_scores(q: T, k: T, v: T, keep: T) -> T:
    # -65504 is the lowest number of another dtype: scores in float32 may well be below it
    scores = (q.float() @ k.float().mT * 0.3).masked_fill(~keep, -65504.0)
    return scores.softmax(-1).to(v.dtype) @ v


# -- broadcasting ------------------------------------------------------------------------------------------------------


@plain(
    "trap 10",
    Site(scale=0.3, dense=True, empty_rows="nan"),
    inputs=lambda: (*qkv(batch=1)[:2], qkv()[2], keep(2, 1, 5, 7)),
)
def a_mask_with_more_rows_than_the_scores(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~keep, -INF).softmax(-1) @ v


@plain(
    "trap 10",
    Site(scale=0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(batch=1), noise(2, 1, 5, 7, seed=5, grad=False)),
)
def a_bias_with_more_rows_than_anything_else(q: T, k: T, v: T, bias: T) -> T:
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


@plain(
    "trap 10",
    Site(scale=0.3, q=(1, 3, 5, 8), k=(1, 3, 7, 8), v=(1, 3, 7, 16)),
    inputs=lambda: (*qkv(batch=1)[:2], qkv()[2]),
)
def values_with_more_rows_than_the_weights(q: T, k: T, v: T) -> T:
    # two sets of values for the same weights are one set of twice the width
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("trap 10", Site(scale=0.3), inputs=lambda: (noise(2, 1, 5, 8, seed=1), *qkv()[1:]))
def queries_shared_by_all_heads(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("trap 10", Site(scale=0.3), inputs=lambda: (*qkv()[:2], noise(2, 1, 7, 8, seed=3)))
def only_the_values_are_shared_by_all_heads(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("trap 10", Site(scale=0.3, q=(2, 3, 1, 8)), inputs=lambda: qkv(queries=1))
def a_single_query(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


# -- layouts of the output ---------------------------------------------------------------------------------------------


@plain("views", Site(scale=0.3))
def the_output_is_viewed_as_if_contiguous(q: T, k: T, v: T) -> T:
    out = (q @ k.mT * 0.3).softmax(-1) @ v
    return out.view(6, 5, 8) + out.view(-1)[0]


@plain("views", Site(scale=0.3))
def the_output_is_read_by_strides(q: T, k: T, v: T) -> T:
    out = (q @ k.mT * 0.3).softmax(-1) @ v
    return torch.as_strided(out, (2, 5, 8), (120, 8, 1), 40)


@plain("views", Site(scale=0.3))
def an_einsum_output_is_viewed_as_if_contiguous(q: T, k: T, v: T) -> T:
    p = (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", p, v).flatten(2)


@plain("views", Site(scale=0.3), inputs=lambda: qkv(grad=False))
def the_output_is_written_through_a_view(q: T, k: T, v: T) -> T:
    out = (q @ k.mT * 0.3).softmax(-1) @ v
    out.view(-1)[::2].mul_(3.0)
    return out


# -- gradients and writes ----------------------------------------------------------------------------------------------


@plain("states", Miss("graph_input"), alike="the region is a graph of its own only under export")
def scores_scaled_without_gradients(q: T, k: T, v: T) -> T:
    # no gradient reaches q and k in the original, so none may in a fused call
    scores = q @ k.mT
    with torch.no_grad():
        scores = scores * 0.3
    return scores.softmax(-1) @ v


@plain("trap 2", Miss("mutated"), inputs=lambda: (*qkv(grad=False), noise(2, 1, 5, 7, seed=5, grad=False)))
def the_bias_is_written_after_it_was_added(q: T, k: T, v: T, bias: T) -> T:
    bias = bias.clone()
    p = (q @ k.mT * 0.3 + bias).softmax(-1)
    bias.zero_()
    return p @ v + bias.sum()


@plain("trap 2", Miss("mutated"), inputs=lambda: (*qkv(grad=False), torch.tensor(0.3)))
def the_scale_is_written_after_it_was_used(q: T, k: T, v: T, scale: T) -> T:
    scale = scale.clone()
    p = (q @ k.mT * scale).softmax(-1)
    scale.mul_(9.0)
    return p @ v + scale


@plain("trap 2", Site(scale=0.3, **USED), inputs=lambda: qkv(grad=False))
def the_scores_are_written_after_the_softmax(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    p = scores.softmax(-1)
    scores.zero_()
    return p @ v


@plain("trap 2", Miss("mutated"), inputs=lambda: qkv(grad=False))
def the_keys_are_overwritten_by_the_weights(q: T, k: T, v: T) -> T:
    k = k.clone()
    p = (q @ k.mT * 0.3).softmax(-1)
    k.copy_(p.mean(2).unsqueeze(-1).expand(2, 3, 7, 8))
    return p @ v + k.sum()


@plain("trap 2", Site(scale=0.3, **USED))
def values_made_from_the_weights(q: T, k: T, v: T) -> T:
    p = (q @ k.mT * 0.3).softmax(-1)
    return p @ (v + p.mean(2).unsqueeze(-1))


class OutputIsBuffer(nn.Module):
    """The attention reads a buffer that the very next statement writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(3)))

    def forward(self, q: T, k: T) -> T:
        out = (q @ k.mT * 0.3).softmax(-1) @ self.state
        self.state.mul_(0.5)
        return out + self.state.mean()


@case("trap 2", Site(scale=0.3), grad=False)
def values_written_right_after_the_attention() -> Built:
    return OutputIsBuffer(), qkv()[:2]


@plain("trap 2", Miss("mutated"), inputs=lambda: qkv(queries=7, grad=False))
def queries_and_keys_share_memory_and_one_is_written(q: T, k: T, v: T) -> T:
    q = q.clone()
    k = q.view(2, 3, 7, 8)
    scores = q @ k.mT * 0.3
    k.add_(1.0)
    return scores.softmax(-1) @ v + q


@plain("dropout", Site(scale=0.3, dropout=0.3, replaced=False, reason="no_kernel"), reference="eager", grad=False)
def dropout_written_in_place(q: T, k: T, v: T) -> T:
    return torch.nn.functional.dropout((q @ k.mT * 0.3).softmax(-1), 0.3, inplace=True) @ v


@plain("dropout", Site(scale=0.3), reference="eager")
def a_random_number_after_the_attention_is_the_same(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v + torch.rand(8)


# -- arithmetic on sizes -----------------------------------------------------------------------------------------------


@plain(
    "trap 3",
    Miss("axes_mixed"),
    inputs=lambda: (noise(1, 4, 6, 8, seed=1), noise(1, 4, 6, 8, seed=2), noise(1, 4, 6, 8, seed=3)),
)
def heads_and_keys_exchanged_by_a_reshape(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.reshape(1, 6, 6, 4).softmax(-1).reshape(1, 4, 6, 6) @ v


@plain(
    "trap 3",
    Miss("mixes_heads"),
    inputs=lambda: (noise(4, 4, 4, 4, seed=1), noise(4, 4, 4, 4, seed=2), noise(4, 4, 4, 4, seed=3)),
)
def weights_transposed_after_the_softmax(q: T, k: T, v: T) -> T:
    # what is summed over are the heads
    return (q @ k.mT * 0.3).softmax(-1).permute(0, 2, 1, 3).mT @ v


@plain("trap 3", Miss("values_depend_on_query"), inputs=cube)
def heads_and_queries_exchanged_after_the_softmax(q: T, k: T, v: T) -> T:
    # weights (b, q, h, k) meet values whose heads are the old queries
    return (q @ k.mT * 0.3).softmax(-1).transpose(1, 2) @ v


@plain(
    "trap 3",
    Site(scale=0.3, dense=True, empty_rows="nan", q=(4, 4, 4, 4), k=(4, 4, 4, 4), v=(4, 4, 4, 4)),
    inputs=lambda: (*cube(), keep(4, 4, 4, 4)),
)
def a_mask_transposed_in_every_axis(q: T, k: T, v: T, keep: T) -> T:
    mask = keep.permute(1, 0, 2, 3)
    return (q @ k.mT * 0.3).masked_fill(~mask, -INF).softmax(-1) @ v


@plain(
    "trap 3",
    Site(scale=0.3, bias=((4, 1, 4, 4),), empty_rows="nan", q=(4, 4, 4, 4), k=(4, 4, 4, 4), v=(4, 4, 4, 4)),
    inputs=lambda: (*cube(), noise(4, 1, 4, 4, seed=5, grad=False)),
)
def a_bias_for_each_batch_on_transposed_scores(q: T, k: T, v: T, bias: T) -> T:
    # the bias is over (keys, queries)
    return (k @ q.mT * 0.3 + bias).softmax(-2).mT @ v


# -- rows without keys, once more: found by random programs ------------------------------------------------------------

EMPTY = with_keep(2, 1, 5, 7, empty=True)


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="mean", assumed=True), inputs=EMPTY)
def a_fill_in_place_and_then_the_row_maximum_taken_away(q: T, k: T, v: T, keep: T) -> T:
    # in a row without keys the maximum is the fill itself, and what is left is zero, not the scores
    scores = q @ k.mT * 0.3
    scores.masked_fill_(~keep, -1e9)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="mean", assumed=True), inputs=EMPTY, spelled=1)
def a_fill_in_place_and_then_a_softmax_by_hand(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    scores.masked_fill_(~keep, -1e9)
    e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@plain("trap 7", Site(scale=0.6, dense=True, empty_rows="nan"), inputs=EMPTY, grad=False, reference="eager")
def the_lowest_number_scaled_up_is_minus_infinity(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (scores * 2.0).softmax(-1) @ v


@plain(
    "trap 7",
    Site(scale=0.6, dense=True, bias=((1, 3, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(grad=False), keep(2, 1, 5, 7, empty=True), noise(3, 5, 7, seed=5, grad=False)),
    reference="eager",
)
def the_lowest_number_scaled_up_under_a_bias(q: T, k: T, v: T, keep: T, bias: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (scores * 2.0 + bias).softmax(-1) @ v


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=EMPTY, spelled=1, grad=False)
def exp_over_sum_of_a_finite_fill_is_nan(q: T, k: T, v: T, keep: T) -> T:
    # without the row maximum every exponential of such a row is zero
    e = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(torch.float32).min).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@plain(
    "trap 7",
    Site(scale=0.3, dense=True, empty_rows="mean", replaced=False, reason="empty_rows"),
    inputs=EMPTY,
    spelled=1,
)
def exp_minus_logsumexp_of_a_finite_fill_is_no_mean(q: T, k: T, v: T, keep: T) -> T:
    # log-sum-exp of a row of the lowest number is that number: each weight is one, and the answer the sum of values
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(torch.float32).min)
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


TWO_FILLS = Site(scale=0.3, causal=0, dense=True, empty_rows="nan", replaced=False, reason="empty_rows")


@plain("trap 7", TWO_FILLS, inputs=EMPTY, spelled=1)
def exp_minus_logsumexp_of_two_fills_is_no_mean(q: T, k: T, v: T, keep: T) -> T:
    # found by random programs: the same for a row of minus infinity and the lowest number
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(torch.float32).min)
    scores = scores.masked_fill(torch.ones(5, 7).triu(1) == 1, float("-inf"))
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


@plain("trap 7", TWO_FILLS, inputs=EMPTY, spelled=1)
def exp_without_a_maximum_of_two_fills_is_no_mean(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(torch.float32).min)
    weights = scores.masked_fill(torch.ones(5, 7).triu(1) == 1, float("-inf")).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


@plain(
    "trap 7",
    Site(scale=0.3, dense=True, bias=((2, 1, 5, 1),), empty_rows="nan", assumed=True),
    inputs=lambda: (*qkv(grad=False), keep(2, 1, 5, 7, empty=True), torch.full((2, 1, 5, 1), 1e9)),
)
def a_bias_as_large_as_the_fill(q: T, k: T, v: T, keep: T, bias: T) -> T:
    return ((q @ k.mT * 0.3).masked_fill(~keep, -1e9) + bias).softmax(-1) @ v
