"""Masks: keep-masks and added masks, every polarity and place; which fill means what is in fills.py."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.case import Built, Miss, Site, T, case, keep, noise, plain, qkv, with_bias, with_keep

INF = float("inf")
SELF = {"q": (2, 3, 7, 8)}  # seven queries on seven keys


def square() -> tuple[T, T, T]:
    return qkv(queries=7)


# -- keep-masks ----------------------------------------------------------------------------------------------------


@plain("filled-masks", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 1, 5, 7))
def masked_fill_where_the_mask_is_off(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~keep, -INF).softmax(-1) @ v


@plain("filled-masks", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=lambda: (*qkv(), ~keep(5, 7)))
def masked_fill_where_the_mask_is_on(q: T, k: T, v: T, off: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(off, -INF).softmax(-1) @ v


@plain("filled-masks", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 3, 5, 7))
def where_keeps_the_scores(q: T, k: T, v: T, keep: T) -> T:
    return torch.where(keep, q @ k.mT * 0.3, -INF).softmax(-1) @ v


@plain("filled-masks", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=lambda: (*qkv(), ~keep(2, 3, 5, 7)))
def where_drops_the_scores(q: T, k: T, v: T, off: T) -> T:
    return torch.where(off, torch.tensor(-INF), q @ k.mT * 0.3).softmax(-1) @ v


@plain("filled-masks", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(1, 3, 5, 7))
def where_with_a_full_tensor_as_the_fill(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    return torch.where(keep, scores, torch.full_like(scores, -INF)).softmax(-1) @ v


@plain(
    "inductor patterns 15, 17, 20",
    Site(scale=0.3, dense=True, empty_rows="nan"),
    inputs=lambda: (*qkv(), keep(2, 1, 5, 7).long()),
)
def an_integer_mask_compared_with_zero(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(mask == 0, -INF).softmax(-1) @ v


@plain(
    "inductor patterns 15, 17, 20",
    Site(scale=0.3, dense=True, empty_rows="nan"),
    inputs=lambda: (*qkv(), (~keep(2, 1, 5, 7)).long()),
)
def an_integer_mask_compared_with_one(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(mask == 1, -INF).softmax(-1) @ v


@plain(
    "diffusers#12605",
    Site(scale=0.3, empty_rows="nan", key_padding=True),
    inputs=lambda: (*qkv(), keep(2, 7)),
)
def a_key_padding_mask(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~keep[:, None, None, :], -INF).softmax(-1) @ v


@plain(
    "filled-masks", Site(scale=0.3, empty_rows="nan", key_padding=True), inputs=lambda: (*qkv(), keep(2, 7), keep(2, 5))
)
def a_mask_over_queries_and_keys_by_an_outer_and(q: T, k: T, v: T, key: T, query: T) -> T:
    # a padded query keeps key 1 here only because its own row is padded with True there
    mask = key[:, None, None, :] & (query[:, None, :, None] | True)
    return (q @ k.mT * 0.3).masked_fill(mask.logical_not(), -INF).softmax(-1) @ v


@plain("filled-masks", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=lambda: (*qkv(), torch.tensor([1, 1, 1])))
def whole_heads_switched_off(q: T, k: T, v: T, on: T) -> T:
    return (q @ k.mT * 0.3).masked_fill((on == 0)[:, None, None], -INF).softmax(-1) @ v


class CausalBuffer(nn.Module):
    """nanoGPT: a lower triangle kept as a buffer and cut to size."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("tril", torch.tril(torch.ones(1, 1, 16, 16)).to(dtype))

    def forward(self, q: T, k: T, v: T) -> T:
        length = q.size(2)
        scores = q @ k.transpose(-2, -1) * 8**-0.5
        scores = scores.masked_fill(self.tril[:, :, :length, :length] == 0, -INF)
        return scores.softmax(-1) @ v


@plain("filled-masks", Site(scale=0.3, key_padding=True, empty_rows="nan"))
def a_mask_read_from_data_at_a_fixed_place(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(v[0, 0, :, 0] > 9, -INF).softmax(-1) @ v


@case("filled-masks", Site(scale=8**-0.5, dense=True, empty_rows="nan", **SELF), held=True)
def a_causal_buffer_of_floats() -> Built:
    return CausalBuffer(torch.float32), square()


@case("filled-masks", Site(scale=8**-0.5, dense=True, empty_rows="nan", **SELF), held=True)
def a_causal_buffer_of_bools() -> Built:
    return CausalBuffer(torch.bool), square()


@plain("filled-masks", Site(scale=0.3, **SELF, causal=0), inputs=square)
def causal_by_triu_of_ones(q: T, k: T, v: T) -> T:
    off = torch.triu(torch.ones(7, 7, dtype=torch.bool, device=q.device), diagonal=1)
    return (q @ k.mT * 0.3).masked_fill(off, -INF).softmax(-1) @ v


@plain("trap 6", Site(scale=0.3, causal=2))
def causal_from_the_bottom_right(q: T, k: T, v: T) -> T:
    # five new queries at the end of seven keys: SDPA's own is_causal would be another mask
    rows, cols = torch.arange(2, 7)[:, None], torch.arange(7)
    return (q @ k.mT * 0.3).masked_fill(cols > rows, -INF).softmax(-1) @ v


@plain("trap 6", Site(scale=0.3, causal=0))
def causal_from_the_top_left(q: T, k: T, v: T) -> T:
    return torch.where(torch.ones(5, 7).tril().bool(), q @ k.mT * 0.3, -INF).softmax(-1) @ v


@plain("trap 4", Site(scale=0.3, **SELF, causal=0), inputs=square)
def a_window_wider_than_the_sequence(q: T, k: T, v: T) -> T:
    i, j = torch.arange(7)[:, None], torch.arange(7)
    return (q @ k.mT * 0.3).masked_fill((j > i) | (j <= i - 4096), -INF).softmax(-1) @ v


@plain("TensorRT-LLM#4585", Site(scale=0.3, **SELF, causal=0, window=(2, None)), inputs=square)
def a_window_is_not_a_causal_mask(q: T, k: T, v: T) -> T:
    i, j = torch.arange(7)[:, None], torch.arange(7)
    return (q @ k.mT * 0.3).masked_fill(~((j <= i) & (j > i - 3)), -INF).softmax(-1) @ v


@plain("trap 8", Site(scale=0.3, dense=True, **SELF), inputs=square, reference="eager", grad=False)
def indices_compared_as_floats(q: T, k: T, v: T) -> T:
    # above 2**24 neighbours become equal: this is a causal mask only in name
    i = torch.arange(7, dtype=torch.float32)[:, None] + 2.0**24
    j = torch.arange(7, dtype=torch.float32) + 2.0**24
    return (q @ k.mT * 0.3).masked_fill(j > i, -INF).softmax(-1) @ v


@plain(
    "trap 8",
    Site(scale=0.3, empty_rows="nan", key_padding=True),
    inputs=lambda: (*qkv(), keep(2, 7)),
)
def a_mask_gathered_with_a_negative_index(q: T, k: T, v: T, keep: T) -> T:
    wrapped = keep[:, torch.arange(7) - 3]
    return (q @ k.mT * 0.3).masked_fill(~wrapped[:, None, None], -INF).softmax(-1) @ v


@plain(
    "filled-masks",
    Site(scale=0.3, dense=True, empty_rows="nan", key_padding=True),
    inputs=lambda: (*qkv(), keep(5, 7), keep(2, 7)),
)
def two_masks_one_after_the_other(q: T, k: T, v: T, one: T, two: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~one, -INF)
    return torch.where(two[:, None, None], scores, -INF).softmax(-1) @ v


@plain("trap 3", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 1, 5, 7))
def the_same_mask_filled_twice(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return scores.masked_fill(keep.logical_not(), -INF).softmax(-1) @ v


@plain("in-place", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 1, 5, 7))
def masked_fill_in_place(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    scores.masked_fill_(~keep, -INF)
    return scores.softmax(-1) @ v


@plain("in-place", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 3, 5, 7))
def scores_set_by_a_boolean_index(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    scores[~keep] = -INF
    return scores.softmax(-1) @ v


@plain("filled-masks", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 1, 5, 7))
def masked_before_it_is_scaled(q: T, k: T, v: T, keep: T) -> T:
    return ((q @ k.mT).masked_fill(~keep, -INF) * 0.3).softmax(-1) @ v


# -- added masks -----------------------------------------------------------------------------------------------------


def additive(*shape: int, low: float = -INF, empty: bool = False, dtype: torch.dtype = torch.float32) -> T:
    return torch.zeros(shape, dtype=dtype).masked_fill(~keep(*shape, empty=empty), low)


@plain(
    "hf-eager",
    Site(scale=0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), additive(2, 1, 5, 7)),
)
def scores_plus_a_mask(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


@plain(
    "pytorch#195782",
    Site(scale=0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), additive(2, 1, 5, 7)),
)
def a_mask_plus_scores(q: T, k: T, v: T, mask: T) -> T:
    return (mask + q @ k.mT * 0.3).softmax(-1) @ v


@plain(
    "in-place",
    Site(scale=0.3, bias=((1, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), additive(5, 7)),
)
def scores_plus_a_mask_in_place(q: T, k: T, v: T, mask: T) -> T:
    scores = q @ k.mT * 0.3
    scores += mask
    return scores.softmax(-1) @ v


@plain(
    "trap 3",
    Site(scale=0.3, bias=((2, 1, 5, 7), (2, 1, 5, 7)), empty_rows="nan"),
    inputs=lambda: (*qkv(), noise(2, 1, 5, 7, seed=7, grad=False)),
)
def a_mask_added_twice_counts_twice(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3 + mask + mask).softmax(-1) @ v


@plain(
    "hf-eager",
    Site(scale=0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), noise(2, 1, 5, 7, seed=7, grad=False)),
)
def a_bias_taken_away(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3 - mask).softmax(-1) @ v


@plain(
    "hf-eager",
    Site(scale=-0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), noise(2, 1, 5, 7, seed=7, grad=False)),
)
def scores_taken_away_from_a_bias(q: T, k: T, v: T, mask: T) -> T:
    return (mask - q @ k.mT * 0.3).softmax(-1) @ v


@plain(
    "hf-eager",
    Site(scale=0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), noise(2, 1, 5, 7, seed=7, grad=False)),
)
def a_bias_added_with_alpha(q: T, k: T, v: T, mask: T) -> T:
    return torch.add(q @ k.mT * 0.3, mask, alpha=2.5).softmax(-1) @ v


@plain(
    "hf-eager",
    Site(scale=0.15, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), noise(2, 1, 5, 7, seed=7, grad=False)),
)
def a_bias_added_before_it_is_scaled(q: T, k: T, v: T, mask: T) -> T:
    return ((q @ k.mT * 0.3 + mask) / 2).softmax(-1) @ v


@plain(
    "diffusers#12605",
    Site(scale=0.3, bias=((2, 1, 1, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), additive(2, 1, 1, 7, low=-10000.0)),
)
def bert_extended_attention_mask(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


@plain(
    "pytorch#195784",
    Site(scale=8**-0.5, dtype="bfloat16", softmax_dtype="float32", bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(dtype=torch.bfloat16), additive(2, 1, 5, 7)),
)
def a_float32_mask_on_half_precision_scores(q: T, k: T, v: T, mask: T) -> T:
    # whether SDPA may take this mask depends on its values, which nobody knows: the repair makes -inf exact, and a
    # float32 mask is passed on as such
    scores = q @ k.mT * 8**-0.5 + mask
    return scores.softmax(-1).to(v.dtype) @ v


@plain("pytorch#195412", Miss("score_weights"), inputs=lambda: (*qkv(), keep(5, 7).float()))
def scores_multiplied_by_a_mask(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3 * mask).softmax(-1) @ v


@plain("openxla/xla#11717", Miss("score_weights"), inputs=with_keep(5, 7))
def a_boolean_mask_that_multiplies_is_no_mask(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3 * keep).softmax(-1) @ v


@plain("openxla/xla#11717", Miss("unknown_op"), inputs=square)
def the_lower_triangle_of_scores_is_no_mask(q: T, k: T, v: T) -> T:
    # what is cut away is zero, not minus infinity
    return torch.tril(q @ k.mT * 0.3).softmax(-1) @ v


@plain("trap 10", Miss("fill_not_constant"), inputs=lambda: (*qkv(), keep(5, 7), noise(3, 1, 1, seed=8)))
def a_learned_fill_for_each_head(q: T, k: T, v: T, keep: T, fill: T) -> T:
    return torch.where(keep, q @ k.mT * 0.3, fill).softmax(-1) @ v


@plain("trap 10", Miss("two_score_tensors"), inputs=with_keep(5, 7))
def a_choice_between_two_products(q: T, k: T, v: T, keep: T) -> T:
    return torch.where(keep, q @ k.mT * 0.3, q @ v.mT * 0.2).softmax(-1) @ v


@plain(
    "added-terms",
    Site(scale=0.3, bias=((1, 3, 5, 7),), empty_rows="nan", key_padding=True),
    inputs=lambda: (*with_bias(3, 5, 7)(), keep(2, 1, 1, 7)),
)
def a_bias_and_then_a_mask(q: T, k: T, v: T, bias: T, keep: T) -> T:
    return (q @ k.mT * 0.3 + bias).masked_fill(~keep, -INF).softmax(-1) @ v


@plain(
    "added-terms",
    Site(scale=0.3, bias=((1, 3, 5, 7),), empty_rows="nan", key_padding=True),
    inputs=lambda: (*with_bias(3, 5, 7)(), keep(2, 1, 1, 7)),
)
def a_mask_and_then_a_bias(q: T, k: T, v: T, bias: T, keep: T) -> T:
    return ((q @ k.mT * 0.3).masked_fill(~keep, -INF) + bias).softmax(-1) @ v
