"""Corners of broadcasting, dtypes, layouts and letters, where each step is allowed but only just."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from tests.zoo.case import TEXT, Built, Miss, Site, T, case, half, keep, noise, plain, qkv, with_keep

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


# -- masks and biases over fewer axes ----------------------------------------------------------------------------------


@plain(
    "trap 7",
    Site(scale=0.3, dense=True, empty_rows="nan"),
    inputs=lambda: (*qkv(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()),
    grad=False,
)
def a_mask_over_queries_alone_with_minus_infinity(q: T, k: T, v: T, on: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~on[:, None, :, None], -INF).softmax(-1) @ v


@plain(
    "trap 7",
    Site(scale=0.3, dense=True, empty_rows="mean"),
    inputs=lambda: (*qkv(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()),
)
def a_mask_over_queries_alone_with_the_lowest_number(q: T, k: T, v: T, on: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~on[:, None, :, None], LOWEST).softmax(-1) @ v


@plain(
    "trap 7",
    Site(scale=0.3, dense=True, empty_rows="mean"),
    inputs=lambda: (*qkv(), torch.tensor(True)),
)
def a_mask_of_a_single_truth_value(q: T, k: T, v: T, off: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(off, LOWEST).softmax(-1) @ v


@plain(
    "added-terms",
    Site(scale=0.3, bias=((2, 1, 5, 1),), empty_rows="nan"),
    inputs=lambda: (*qkv(), noise(2, 1, 5, 1, seed=5, grad=False)),
)
def a_bias_over_queries_alone_cancels(q: T, k: T, v: T, bias: T) -> T:
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


@plain("added-terms", Site(scale=0.3, bias=((2, 1, 5, 7),)), inputs=with_keep(2, 1, 5, 7))
def a_boolean_that_is_added_counts_one(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3 + keep).softmax(-1) @ v


@plain(
    "added-terms",
    Site(scale=0.3, bias=((2, 1, 1, 7),)),
    inputs=lambda: (*qkv(), torch.arange(14).view(2, 1, 1, 7)),
)
def integers_that_are_added(q: T, k: T, v: T, bias: T) -> T:
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


@plain(
    "learned-scale",
    Site(scale=TEXT, bias=((1, 3, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), noise(3, 5, 7, seed=5, grad=False), noise(3, 1, 1, seed=6, grad=False)),
)
def a_bias_and_then_a_scale_for_each_head(q: T, k: T, v: T, bias: T, scale: T) -> T:
    return ((q @ k.mT + bias) * scale).softmax(-1) @ v


@plain(
    "learned-scale",
    Miss("fill_not_constant"),
    inputs=lambda: (*qkv(), keep(2, 1, 5, 7), noise(3, 1, 1, seed=6)),
)
def a_mask_and_then_a_scale_that_may_be_negative(q: T, k: T, v: T, keep: T, scale: T) -> T:
    return ((q @ k.mT).masked_fill(~keep, -INF) * scale).softmax(-1) @ v


@plain(
    "learned-scale",
    Site(scale=TEXT, q=(3, 8, 5, 6), k=(3, 2, 7, 6), v=(3, 2, 7, 6), groups=4),
    inputs=lambda: (*qkv(batch=3, heads=8, width=6, kv_heads=2), noise(7, seed=6)),
)
def a_weight_for_each_key_under_grouped_heads(q: T, k: T, v: T, w: T) -> T:
    k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
    return (q @ k.mT * w).softmax(-1) @ v


@plain(
    "learned-scale",
    Site(scale=TEXT, q=(3, 8, 5, 6), k=(3, 2, 7, 6), v=(3, 2, 7, 6), groups=4),
    inputs=lambda: (*qkv(batch=3, heads=8, width=6, kv_heads=2), noise(8, 1, 1, seed=6)),
)
def a_scale_for_each_query_head_under_grouped_heads(q: T, k: T, v: T, w: T) -> T:
    k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
    return (q @ k.mT * w).softmax(-1) @ v


class DynamicCausal(nn.Module):
    """nanoGPT with a batch and a length that change."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: T) -> T:
        batch, length, width = x.size()
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (t.view(batch, length, 3, width // 3).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * 8**-0.5
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, -INF).softmax(-1)
        return (att @ v).transpose(1, 2).contiguous().view(batch, length, width)


@case(
    "pytorch#111190",
    Site(scale=8**-0.5, q=(TEXT, 3, TEXT, 8), k=(TEXT, 3, TEXT, 8), v=(TEXT, 3, TEXT, 8), dense=True, empty_rows="nan"),
    other_sizes=lambda: (noise(5, 9, 24, seed=2),),
    held=True,
)
def a_causal_buffer_cut_to_a_dynamic_length() -> Built:
    return DynamicCausal(), (noise(4, 7, 24, seed=1),), ({0: Dim.DYNAMIC, 1: Dim("length", max=15)},)


# -- dtypes ------------------------------------------------------------------------------------------------------------


@plain("casts", Site(scale=0.3, softmax_dtype="float64"))
def a_softmax_in_double_precision(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).double().softmax(-1).float() @ v


@plain("trap 3", Site(scale=300.0, dtype="float64", softmax_dtype="float64"))
def scores_in_double_precision(q: T, k: T, v: T) -> T:
    # large scores need it: a narrower kernel would lose digits that the original has
    return (q.double() @ k.double().mT * 300.0).softmax(-1).float() @ v


@plain("casts", Site(scale=0.3, dtype="float32", softmax_dtype="float32"), inputs=half)
def everything_widened_and_left_wide(q: T, k: T, v: T) -> T:
    return (q.float() @ k.float().mT * 0.3).softmax(-1) @ v.float()


@plain("casts", Site(scale=0.3, dtype="float32", softmax_dtype="float32"), inputs=half)
def weights_kept_wide_for_the_values(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).float().softmax(-1) @ v.float()


@plain("casts", Site(scale=0.3, dtype="float32", softmax_dtype="float32"), inputs=half)
def queries_changed_in_float32(q: T, k: T, v: T) -> T:
    # rotary positions in float32: only v is narrow
    q, k = q.float().cos(), k.float().cos()
    return (q @ k.mT * 0.3).softmax(-1).to(v.dtype) @ v


@plain("casts", Site(scale=0.3, dtype="bfloat16", softmax_dtype="float32"), inputs=half)
def queries_scaled_in_float32(q: T, k: T, v: T) -> T:
    return ((q.float() * 0.3) @ k.float().mT).softmax(-1).to(v.dtype) @ v


@plain("casts", Site(scale=0.3))
def operands_rounded_to_bfloat16_and_widened_again(q: T, k: T, v: T) -> T:
    # a narrowing cast changes numbers: it stays
    return (q.bfloat16().float() @ k.mT * 0.3).softmax(-1) @ v


# -- letters -----------------------------------------------------------------------------------------------------------


@plain(
    "einsum",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 1, 7, 6), v=(3, 1, 7, 6), groups=8),
    inputs=lambda: (noise(3, 8, 5, 6, seed=1), noise(3, 7, 6, seed=2), noise(3, 7, 6, seed=3)),
)
def einsum_with_keys_that_know_no_heads(q: T, k: T, v: T) -> T:
    return torch.einsum("bhqk,bkd->bhqd", (torch.einsum("bhqd,bkd->bhqk", q, k) * 0.3).softmax(-1), v)


@plain(
    "einsum",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 1, 7, 6), v=(3, 1, 7, 6), groups=8),
    inputs=lambda: qkv(batch=3, heads=8, width=6, kv_heads=1),
)
def einsum_broadcasts_a_single_key_head(q: T, k: T, v: T) -> T:
    return torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3).softmax(-1), v)


@plain(
    "einsum",
    Site(scale=0.3, q=(2, 3, 5, 8), k=(2, 3, 7, 8), v=(2, 3, 7, 12)),
    inputs=lambda: (noise(2, 3, 5, 2, 4, seed=1), noise(2, 3, 7, 2, 4, seed=2), noise(2, 3, 7, 4, 3, seed=3)),
)
def einsum_with_two_letters_for_each_width(q: T, k: T, v: T) -> T:
    p = (torch.einsum("bhqxy,bhkxy->bhqk", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhqk,bhkuw->bhquw", p, v)


@plain("einsum", Miss("unknown_arguments"), inputs=lambda: (noise(2, 3, 5, 8, 4, seed=1), *qkv()[1:]))
def einsum_that_sums_an_axis_of_one_operand(q: T, k: T, v: T) -> T:
    return (torch.einsum("bhqde,bhkd->bhqk", q, k) * 0.3).softmax(-1) @ v


@plain(
    "einsum",
    Miss("unknown_arguments"),
    inputs=lambda: (noise(2, 5, 5, 8, seed=1), noise(2, 5, 7, 8, seed=2), noise(2, 5, 7, 8, seed=3)),
)
def einsum_that_takes_a_diagonal(q: T, k: T, v: T) -> T:
    # each head keeps only the query of its own number
    p = (torch.einsum("bqqd,bqkd->bqk", q, k) * 0.3).softmax(-1)
    return torch.einsum("bqk,bqkd->bqd", p, v)


@plain(
    "baddbmm",
    Miss("mutated"),
    inputs=lambda: (
        noise(6, 5, 8, seed=1),
        noise(6, 7, 8, seed=2),
        noise(6, 7, 8, seed=3),
        noise(6, 5, 7, seed=4, grad=False),
    ),
)
def baddbmm_in_place(q: T, k: T, v: T, bias: T) -> T:
    # the bias is gone once the product is there: a fused call comes too late to read it
    scores = bias.clone()
    scores.baddbmm_(q, k.mT, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v)


@plain(
    "not-attention",
    Miss("projected_scores"),
    inputs=lambda: (noise(5, 8, seed=1), noise(7, 8, seed=2), noise(7, 8, seed=3)),
)
def keys_passed_as_the_weight_of_a_linear_layer(q: T, k: T, v: T) -> T:
    # two activations for once, but nothing tells it from a projection
    return F.linear(q * 0.3, k).softmax(-1) @ v


# -- shapes that change between the products ---------------------------------------------------------------------------


@plain("blocks", Miss("unknown_op"))
def some_keys_cut_off_after_the_product(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3)[..., :5].softmax(-1) @ v[:, :, :5]


@plain("blocks", Miss("probabilities_changed"), inputs=lambda: (*qkv()[:2], noise(2, 3, 9, 8, seed=3)))
def weights_padded_for_more_values(q: T, k: T, v: T) -> T:
    return F.pad((q @ k.mT * 0.3).softmax(-1), (2, 0)) @ v


@plain("blocks", Miss("unknown_op"))
def keys_turned_round_after_the_product(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).flip(-1).softmax(-1) @ v


@plain("blocks", Miss("probabilities_changed"))
def weights_rolled_along_the_keys(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1).roll(1, -1) @ v


@plain("views", Miss("unknown_op"), inputs=lambda: (*qkv(heads=1)[:2], qkv()[2]))
def one_map_expanded_for_all_heads(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1).expand(2, 3, 5, 7) @ v


@plain(
    "trap 1",
    Site(scale=0.3, q=(4, 4, 4, 4), k=(4, 4, 4, 4), v=(4, 4, 4, 4)),
    inputs=lambda: (noise(4, 4, 4, 4, seed=1), noise(4, 4, 4, 4, seed=2), noise(4, 4, 4, 4, seed=3)),
    alike="torch.compile graphs in which a tensor changes its shape in place are left alone",
)
def scores_transposed_in_place(q: T, k: T, v: T) -> T:
    # keys attend to queries then: q and k have changed places
    scores = q @ k.mT * 0.3
    scores.transpose_(-1, -2)
    return scores.softmax(-1) @ v


# -- one new token, and batches of one: axes without an atom -----------------------------------------------------------

DECODED = {"q": (3, 8, 1, 6), "k": (3, 2, 7, 6), "v": (3, 2, 7, 6), "groups": 4}


def decoding() -> tuple[T, T, T]:
    return qkv(batch=3, heads=8, queries=1, width=6, kv_heads=2)


@plain("einsum", Site(scale=0.3, q=(2, 3, 1, 8)), inputs=lambda: qkv(queries=1))
def one_new_token_by_einsum(q: T, k: T, v: T) -> T:
    p = (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", p, v).reshape(2, 1, 24)


@plain("repeat-kv", Site(scale=0.3, **DECODED), inputs=decoding)
def one_new_token_with_repeated_heads(q: T, k: T, v: T) -> T:
    k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
    return ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).reshape(3, 1, 48)


@plain("repeat-kv", Site(scale=0.3, q=(6, 1, 4, 6), k=(6, 1, 7, 6), v=(6, 1, 7, 6)), inputs=decoding)
def one_new_token_with_heads_grouped_by_einsum(q: T, k: T, v: T) -> T:
    # with one query, the heads of a group may as well be the queries
    p = (torch.einsum("bkgqd,bksd->bkgqs", q.view(3, 2, 4, 1, 6), k) * 0.3).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", p, v).reshape(3, 8, 1, 6).transpose(1, 2)


@plain("repeat-kv", Site(scale=0.3, q=(6, 1, 4, 6), k=(6, 1, 7, 6), v=(6, 1, 7, 6)), inputs=decoding)
def one_new_token_with_heads_grouped_by_broadcasting(q: T, k: T, v: T) -> T:
    p = (q.view(3, 2, 4, 1, 6) @ k.unsqueeze(2).mT * 0.3).softmax(-1)
    return (p @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2).reshape(3, 1, 48)


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(2, 4, 5, 6), k=(2, 1, 7, 6), v=(2, 1, 7, 6), groups=4),
    inputs=lambda: qkv(batch=1, heads=8, width=6, kv_heads=2),
)
def grouped_heads_at_batch_one(q: T, k: T, v: T) -> T:
    p = (torch.einsum("bkgqd,bksd->bkgqs", q.unflatten(1, (2, 4)), k) * 0.3).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", p, v).flatten(1, 2).transpose(1, 2).reshape(1, 5, 48)


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(1, 1, 8, 6), k=(1, 1, 7, 6), v=(1, 1, 7, 6)),
    inputs=lambda: qkv(batch=1, heads=8, queries=1, width=6, kv_heads=1),
)
def one_new_token_for_one_key_head_at_batch_one(q: T, k: T, v: T) -> T:
    p = (torch.einsum("bkgqd,bksd->bkgqs", q.unflatten(1, (1, 8)), k) * 0.3).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", p, v).flatten(1, 2).view(8, 1, 6)


@plain("in-place", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 1, 5, 7))
def a_fill_in_place_on_an_einsum(q: T, k: T, v: T, keep: T) -> T:
    scores = torch.einsum("bhqd,bhkd->bhqk", q * 0.3, k)
    scores.masked_fill_(~keep, -INF)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


# -- two masks of unlike kinds: found by random programs ---------------------------------------------------------------


def two_masks(dtype: torch.dtype = torch.float32, grad: bool = True) -> tuple[T, T, T, T, T]:
    """One leaves rows without keys, the other does not; together they mask some keys twice."""
    return (*qkv(dtype=dtype, grad=grad), keep(2, 1, 5, 7, empty=True), keep(2, 1, 5, 7, seed=11))


@plain(
    "trap 7",
    Site(scale=0.3, dense=True, empty_rows="nan", ungraded=True),
    inputs=lambda: (*two_masks()[:4], keep(2, 1, 5, 7, empty=True, seed=11)),
    grad=False,
)
def a_fill_of_minus_infinity_and_an_added_lowest_number(q: T, k: T, v: T, one: T, two: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~one, -INF)
    return (scores + torch.where(two, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


@plain(
    "trap 3",
    Site(scale=0.3, empty_rows="nan", dtype="bfloat16", dense=True),
    inputs=lambda: two_masks(torch.bfloat16, grad=False),
    reference="eager",
)
def the_lowest_number_added_by_two_masks_in_float32(q: T, k: T, v: T, one: T, two: T) -> T:
    # where both mask, the sum is -inf; a row of both kinds is the mean over the keys that only one of them masks
    scores = (q @ k.mT * 0.3).float()
    scores = scores + torch.where(one, 0.0, LOWEST) + torch.where(two, 0.0, LOWEST)
    return scores.softmax(-1).to(v.dtype) @ v


@plain("trap 3", Site(scale=0.3, empty_rows="mean", dense=True, ungraded=True, assumed=True), inputs=two_masks)
def two_added_masks_of_unlike_fills(q: T, k: T, v: T, one: T, two: T) -> T:
    # a row without keys is the mean over those that the weaker of the two masks
    scores = q @ k.mT * 0.3 + torch.where(one, 0.0, -1e9)
    return (scores + torch.where(two, 0.0, LOWEST)).softmax(-1) @ v
