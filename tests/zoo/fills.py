"""What the masked-out scores are filled with, and what a row answers that has no key left."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.case import Built, Miss, Site, T, case, keep, noise, plain, qkv, with_bias, with_keep

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
EMPTY = with_keep(2, 1, 5, 7, empty=True)


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=EMPTY, grad=False)
def a_row_without_keys_is_nan_under_minus_infinity(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~keep, -INF).softmax(-1) @ v


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="mean"), inputs=EMPTY)
def a_row_without_keys_is_the_mean_under_the_lowest_number(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1) @ v


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="mean", assumed=True), inputs=EMPTY)
def a_row_without_keys_is_the_mean_under_minus_a_billion(q: T, k: T, v: T, keep: T) -> T:
    return torch.where(keep, q @ k.mT * 0.3, -1e9).softmax(-1) @ v


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="zero"), inputs=EMPTY)
def a_row_without_keys_is_zero_in_a_safe_softmax(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return torch.ops.aten._safe_softmax(scores, -1) @ v


@plain(
    "trap 7",
    Site(scale=0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), torch.zeros(2, 1, 5, 7).masked_fill(~keep(2, 1, 5, 7, empty=True), -INF)),
    grad=False,
)
def a_row_without_keys_is_nan_under_an_added_mask_of_data(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


@plain(
    "trap 7",
    Site(scale=0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    grad=False,  # the declared assumption is about just this
    inputs=lambda: (*qkv(), torch.zeros(2, 1, 5, 7).masked_fill(~keep(2, 1, 5, 7, empty=True), LOWEST)),
)
def a_row_without_keys_is_the_mean_under_an_added_mask_of_data(q: T, k: T, v: T, mask: T) -> T:
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=EMPTY, grad=False)
def an_added_mask_of_minus_infinity(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3 + torch.where(keep, 0.0, -INF)).softmax(-1) @ v


@plain("hf-eager", Site(scale=0.3, dense=True, empty_rows="mean"), inputs=EMPTY)
def an_added_mask_of_the_lowest_number(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3 + torch.where(keep, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


@plain(
    "hf-eager",
    Site(scale=0.3, dense=True, empty_rows="mean", dtype="bfloat16", softmax_dtype="float32"),
    inputs=lambda: (*qkv(dtype=torch.bfloat16), keep(2, 1, 5, 7, empty=True)),
)
def an_added_mask_of_the_lowest_number_in_bfloat16(q: T, k: T, v: T, keep: T) -> T:
    mask = torch.where(keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    scores = q @ k.mT * 0.3 + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@plain(
    "trap 3",
    Site(scale=0.3, dense=True, empty_rows="nan", dtype="bfloat16", softmax_dtype="bfloat16"),
    inputs=lambda: (*qkv(dtype=torch.bfloat16), keep(2, 1, 5, 7, empty=True)),
    reference="eager",
    grad=False,
)
def the_float32_minimum_becomes_minus_infinity_in_bfloat16(q: T, k: T, v: T, keep: T) -> T:
    mask = torch.where(keep, 0.0, LOWEST).to(q.dtype)
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


@plain(
    "hf-eager",
    Site(scale=0.3, bias=((2, 1, 1, 7),)),
    inputs=lambda: (*qkv(), keep(2, 7).long()),
)
def an_added_mask_made_from_integers(q: T, k: T, v: T, mask: T) -> T:
    # whatever integers these are, the sum is what it is; that they cannot be infinite is not used
    extended = (1.0 - mask[:, None, None, :].to(q.dtype)) * -10000.0
    return (q @ k.mT * 0.3 + extended).softmax(-1) @ v


@plain(
    "trap 5",
    Site(scale=30.0, bias=((2, 1, 1, 7),), empty_rows="impossible"),
    inputs=lambda: (*qkv(), keep(2, 7)),
)
def a_weak_added_mask_under_large_scores_is_exact(q: T, k: T, v: T, mask: T) -> T:
    extended = (1.0 - mask[:, None, None, :].to(q.dtype)) * -1000.0
    return (q @ k.mT * 30.0 + extended).softmax(-1) @ v


@plain("trap 5", Site(scale=0.3, dense=True, empty_rows="mean", replaced=False, reason="weak_fill"), inputs=EMPTY)
def a_fill_of_minus_ten_thousand_is_weak(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~keep, -1e4).softmax(-1) @ v


@plain(
    "trap 5",
    Site(scale=1000.0, dense=True, empty_rows="mean", replaced=False, reason="weak_fill"),
    inputs=EMPTY,
)
def a_weak_fill_is_outweighed_by_large_scores(q: T, k: T, v: T, keep: T) -> T:
    return torch.where(keep, q @ k.mT * 1000.0, torch.tensor(-1e4)).softmax(-1) @ v


@plain("trap 5", Site(scale=0.3, dense=True, empty_rows="mean", replaced=False, reason="weak_fill"), inputs=EMPTY)
def a_fill_of_zero_masks_nothing(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~keep, 0.0).softmax(-1) @ v


@plain("trap 5", Site(scale=3e-7, dense=True, empty_rows="mean", replaced=False, reason="weak_fill"), inputs=EMPTY)
def a_strong_fill_is_weak_after_scaling(q: T, k: T, v: T, keep: T) -> T:
    return ((q @ k.mT * 0.3).masked_fill(~keep, -1e9) * 1e-6).softmax(-1) @ v


@plain("trap 5", Site(scale=8**-0.5, dense=True, empty_rows="mean"), inputs=EMPTY)
def the_lowest_number_scaled_down_still_masks(q: T, k: T, v: T, keep: T) -> T:
    return ((q @ k.mT).masked_fill(~keep, torch.finfo(q.dtype).min) / 8**0.5).softmax(-1) @ v


@plain("trap 5", Miss("fill_not_constant"), inputs=with_keep(2, 1, 5, 7))
def minus_infinity_under_a_negative_scale(q: T, k: T, v: T, keep: T) -> T:
    # the filled keys are the only ones that count, and the answer is NaN
    return ((q @ k.mT).masked_fill(~keep, -INF) * -0.3).softmax(-1) @ v


@plain("trap 5", Miss("fill_not_constant"), inputs=with_keep(2, 1, 5, 7))
def a_fill_of_plus_infinity(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3).masked_fill(~keep, INF).softmax(-1) @ v


@plain("trap 5", Miss("fill_not_constant"), inputs=lambda: (*qkv(), keep(5, 7), torch.tensor(-1e9)))
def a_fill_that_is_an_input(q: T, k: T, v: T, keep: T, fill: T) -> T:
    return torch.where(keep, q @ k.mT * 0.3, fill).softmax(-1) @ v


@plain(
    "filled-masks",
    Site(scale=0.3, dense=True, empty_rows="mean", dtype="bfloat16", softmax_dtype="float32"),
    inputs=lambda: (*qkv(dtype=torch.bfloat16), keep(2, 1, 5, 7, empty=True)),
)
def the_lowest_bfloat16_before_a_float32_softmax(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@plain(
    "filled-masks",
    Site(scale=0.3, dense=True, empty_rows="mean", dtype="bfloat16", softmax_dtype="float32"),
    inputs=lambda: (*qkv(dtype=torch.bfloat16), keep(2, 1, 5, 7, empty=True)),
)
def the_lowest_float32_after_the_cast(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).float().masked_fill(~keep, LOWEST)
    return scores.softmax(-1).to(v.dtype) @ v


@plain(
    "added-terms",
    Site(scale=0.3, dense=True, bias=((1, 3, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*with_bias(3, 5, 7)(), keep(2, 1, 5, 7, empty=True)),
)
def a_bias_inside_a_finite_fill(q: T, k: T, v: T, bias: T, keep: T) -> T:
    return (q @ k.mT * 0.3 + bias).masked_fill(~keep, LOWEST).softmax(-1) @ v


@plain(
    "added-terms",
    Site(scale=0.3, dense=True, bias=((1, 3, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*with_bias(3, 5, 7)(), keep(2, 1, 5, 7, empty=True)),
)
def a_bias_outside_a_finite_fill(q: T, k: T, v: T, bias: T, keep: T) -> T:
    # in a row without keys the bias is swallowed by the lowest number: still the mean
    return ((q @ k.mT * 0.3).masked_fill(~keep, LOWEST) + bias).softmax(-1) @ v


@plain(
    "trap 7",
    Site(scale=0.3, dense=True, bias=((1, 3, 5, 7),), empty_rows="nan", replaced=False, reason="weak_fill"),
    inputs=lambda: (*with_bias(3, 5, 7)(), keep(2, 1, 5, 7, empty=True)),
)
def a_bias_outside_a_weak_fill(q: T, k: T, v: T, bias: T, keep: T) -> T:
    return ((q @ k.mT * 0.3).masked_fill(~keep, -30.0) + bias).softmax(-1) @ v


@plain(
    "trap 7",
    Site(scale=0.3, dense=True, empty_rows="nan", key_padding=True),
    inputs=lambda: (*qkv(), keep(2, 1, 5, 7, empty=True), keep(2, 1, 1, 7, seed=11)),
    grad=False,
)
def two_masks_with_unlike_fills(q: T, k: T, v: T, one: T, two: T) -> T:
    # a row with no key in either mask is the mean over the keys that only the finite fill took
    scores = (q @ k.mT * 0.3).masked_fill(~one, LOWEST)
    return scores.masked_fill(~two, -INF).softmax(-1) @ v


@plain("trap 7", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=EMPTY, grad=False, reference="eager")
def the_lowest_number_scaled_up_and_down_again(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (scores * 4.0 * 0.25).softmax(-1) @ v


@plain("trap 7", Miss("unknown_arguments"), inputs=lambda: (*qkv(), noise(3, 5, 7, seed=5, grad=False)), grad=False)
def a_bias_scaled_up_and_down_again(q: T, k: T, v: T, bias: T) -> T:
    return ((q @ k.mT * 0.3 + bias) * 4.0 * 0.25).softmax(-1) @ v


def with_two_masks() -> tuple[T, T, T, T, T]:
    return (*qkv(), keep(2, 1, 5, 7), keep(2, 1, 5, 7, seed=11))


# -- multiplied masks of openai-gpt ------------------------------------------------------------------------------------


class OpenaiGpt(nn.Module):
    """openai-gpt: the triangle is a buffer of floats, so that nothing but its name says that it holds 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, q: T, k: T, v: T) -> T:
        w = torch.matmul(q, k.transpose(-2, -1)) * 8**-0.5
        b = self.bias[:, :, : w.size(-2), : w.size(-1)]
        w = w * b + -1e4 * (1 - b)
        return w.softmax(-1) @ v


@case("multiplied-mask", Miss("score_weights"))
def openai_gpt_with_a_buffer_of_floats() -> Built:
    return OpenaiGpt(), qkv()


@plain("multiplied-mask", Site(scale=0.3, replaced=False, reason="weak_fill", causal=0))
def openai_gpt_with_a_proved_triangle(q: T, k: T, v: T) -> T:
    b = torch.tril(torch.ones(5, 7))
    return (q @ k.mT * 0.3 * b + -1e4 * (1 - b)).softmax(-1) @ v


@plain("multiplied-mask", Site(scale=0.3, dense=True, empty_rows="mean", assumed=True), inputs=EMPTY)
def a_multiplied_mask_from_booleans(q: T, k: T, v: T, keep: T) -> T:
    b = keep.to(q.dtype)
    return (q @ k.mT * 0.3 * b - 1e9 * (1 - b)).softmax(-1) @ v


@plain(
    "multiplied-mask",
    Miss("score_weights"),
    inputs=with_two_masks,
)
def a_multiplied_mask_whose_halves_differ(q: T, k: T, v: T, one: T, two: T) -> T:
    b, c = one.to(q.dtype), two.to(q.dtype)
    return (q @ k.mT * 0.3 * b - 1e9 * (1 - c)).softmax(-1) @ v


@plain("multiplied-mask", Miss("score_weights"), inputs=lambda: (*qkv(), noise(5, 7, seed=12, grad=False).sigmoid()))
def a_soft_gate_in_the_form_of_a_multiplied_mask(q: T, k: T, v: T, b: T) -> T:
    return (q @ k.mT * 0.3 * b + -1e4 * (1 - b)).softmax(-1) @ v


@plain("multiplied-mask", Site(scale=0.3, dense=True, empty_rows="mean", assumed=True), inputs=EMPTY)
def a_multiplied_mask_that_is_cast_twice(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT * 0.3 * keep.to(q.dtype) - 1e9 * (1 - keep.to(q.dtype))).softmax(-1) @ v


@plain("multiplied-mask", Miss("fill_not_constant"), inputs=with_two_masks, grad=False)
def infinity_times_zero_is_no_number(q: T, k: T, v: T, one: T, two: T) -> T:
    # found by random programs: not where(b, scores, -1e9), because -inf * 0 is NaN
    b = two.to(q.dtype)
    return ((q @ k.mT * 0.3).masked_fill(~one, -INF) * b - 1e9 * (1 - b)).softmax(-1) @ v


@plain("multiplied-mask", Miss("fill_not_constant"), inputs=with_two_masks, grad=False)
def infinity_between_two_factors_times_zero_is_no_number(q: T, k: T, v: T, one: T, two: T) -> T:
    # found by random programs
    b = two.to(q.dtype)
    filled = (q @ k.mT * 0.3).masked_fill(~one, torch.finfo(q.dtype).min) * 2.0 * 0.5
    return (filled * b - 1e9 * (1 - b)).softmax(-1) @ v


@plain("multiplied-mask", Miss("score_weights"), inputs=EMPTY, grad=False)
def zero_times_an_infinite_fill_is_no_number(q: T, k: T, v: T, keep: T) -> T:
    b = keep.to(q.dtype)
    return (q @ k.mT * 0.3 * b + (1 - b) * -INF).softmax(-1) @ v


@plain("multiplied-mask", Miss("score_weights"), inputs=lambda: (*with_two_masks(), noise(5, 7, seed=5, grad=False)))
def a_bias_that_may_be_infinite_inside_a_multiplied_mask(q: T, k: T, v: T, one: T, two: T, bias: T) -> T:
    b = two.to(q.dtype)
    return ((q @ k.mT * 0.3 + bias) * b - 1e9 * (1 - b)).softmax(-1) @ v


# -- torch's safe softmax written out: rows of nothing but -inf are zero ---------------------------------------------

ZEROED = Site(scale=0.3, dense=True, empty_rows="zero")


@plain("safe-softmax", ZEROED, inputs=EMPTY, reference="eager")
def rows_of_infinity_cleared_by_where(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    p = scores.softmax(-1)
    return torch.where((scores == -INF).all(-1, keepdim=True), torch.zeros_like(p), p) @ v


@plain("safe-softmax", ZEROED, inputs=EMPTY, reference="eager")
def rows_of_infinity_cleared_the_other_way_round(q: T, k: T, v: T, keep: T) -> T:
    scores = torch.where(keep, q @ k.mT * 0.3, -INF)
    p = scores.float().softmax(-1)
    return torch.where(torch.any(~scores.isneginf(), -1, True), p, 0.0) @ v


@plain("safe-softmax", ZEROED, inputs=EMPTY, reference="eager")
def rows_of_infinity_cleared_by_a_fill(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return scores.softmax(-1).masked_fill(torch.any(scores != -INF, -1, True).logical_not(), 0.0) @ v


CHANGED = Miss("probabilities_changed")


@plain("safe-softmax", CHANGED, inputs=EMPTY, reference="eager")
def rows_with_any_infinity_cleared(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return scores.softmax(-1).masked_fill((scores == -INF).any(-1, keepdim=True), 0.0) @ v


@plain("safe-softmax", CHANGED, inputs=EMPTY, reference="eager")
def columns_of_infinity_cleared(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return scores.softmax(-1).masked_fill((scores == -INF).all(-2, keepdim=True), 0.0) @ v


@plain("safe-softmax", CHANGED, inputs=with_keep(2, 1, 5, 7))
def rows_of_low_scores_cleared(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -1e30)
    return scores.softmax(-1).masked_fill((scores <= 0).all(-1, keepdim=True), 0.0) @ v


@plain("safe-softmax", CHANGED, inputs=with_keep(2, 1, 5, 7))
def rows_of_the_unmasked_scores_cleared(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    p = scores.masked_fill(~keep, -INF).softmax(-1)
    return p.masked_fill((scores == -INF).all(-1, keepdim=True), 0.0) @ v


@plain("safe-softmax", CHANGED, inputs=with_keep(2, 1, 5, 7))
def rows_other_than_infinity_cleared(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    p = scores.softmax(-1)
    return torch.where((scores == -INF).all(-1, keepdim=True), p, 0.0) @ v


@plain("safe-softmax", CHANGED, inputs=EMPTY, reference="eager")
def rows_of_infinity_set_to_one(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return scores.softmax(-1).masked_fill((scores == -INF).all(-1, keepdim=True), 1.0) @ v
