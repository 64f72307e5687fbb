"""Scores and probabilities that something reads for their shape, dtype or device alone: no reader of theirs."""

from __future__ import annotations

import torch
from torch.export import Dim

from tests.zoo.case import TEXT, Miss, Site, T, keep, noise, packed, plain, qkv, with_keep

INF = float("inf")


@plain("form-readers", Site(scale=0.3, q=(2, 3, 7, 8), causal=0), inputs=lambda: qkv(queries=7))
def a_triangle_of_ones_like_the_scores(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -INF).softmax(-1) @ v


LENGTH = Dim("length", min=2, max=64)


@plain(
    "form-readers",
    Site(scale=0.3, q=(2, 3, TEXT, 8), k=(2, 3, TEXT, 8), v=(2, 3, TEXT, 8), causal=0),
    inputs=lambda: qkv(queries=7),
    dynamic=({2: LENGTH}, {2: LENGTH}, {2: LENGTH}),
    other_sizes=lambda: qkv(queries=5, keys=5),
)
def a_triangle_of_ones_like_scores_of_any_length(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -INF).softmax(-1) @ v


def weights(*shape: int) -> T:
    """Numbers that are neither masks nor learned."""
    return noise(*shape, seed=6, grad=False)


@plain("form-readers", Site(scale=0.3, bias=((2, 3, 5, 7),), empty_rows="nan"), inputs=lambda: (*qkv(), weights(5, 7)))
def a_bias_brought_to_the_dtype_and_shape_of_the_scores(q: T, k: T, v: T, bias: T) -> T:
    scores = q @ k.mT * 0.3
    return (scores + (bias.type_as(scores).expand_as(scores) * 2.0)).softmax(-1) @ v


@plain("form-readers", Site(scale=0.3, bias=((1, 1, 5, 7),), empty_rows="nan"), inputs=lambda: (*qkv(), weights(5, 7)))
def a_bias_with_the_dtype_of_the_scores(q: T, k: T, v: T, bias: T) -> T:
    scores = q @ k.mT * 0.3
    return (bias.double().type_as(scores) + scores).softmax(-1) @ v


@plain(
    "form-readers",
    Site(scale=0.3, dense=True, empty_rows="nan"),
    inputs=lambda: (*qkv(grad=False), keep(2, 1, 5, 7, empty=True)),
)
def zeros_like_the_scores_filled_in_place(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    bias = torch.zeros_like(scores).masked_fill_(~keep, -INF)
    return (scores + bias).softmax(-1) @ v


@plain(
    "form-readers",
    Site(scale=0.3, dense=True, empty_rows="mean"),
    inputs=with_keep(2, 1, 5, 7, empty=True),
)
def a_choice_between_zeros_like_the_scores_and_a_fill(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    return (torch.where(keep, torch.zeros_like(scores), -1e30) + scores).softmax(-1) @ v


@plain("form-readers", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=lambda: (*qkv(grad=False), keep(5, 7)))
def new_zeros_of_the_scores(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    bias = scores.new_zeros(5, 7)
    bias.masked_fill_(~keep, -INF)
    return (scores + bias).softmax(-1) @ v


def heads_last() -> tuple[T, T, T, T]:
    """q, k, v with the heads behind the length, and a bias that has the scores' shape."""
    return *packed(), weights(2, 3, 5, 7)


@plain("form-readers", Site(scale=0.3, bias=((2, 3, 5, 7),), empty_rows="nan"), inputs=heads_last)
def memory_like_that_of_the_scores_is_written_into(q: T, k: T, v: T, bias: T) -> T:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    held = torch.empty_like(scores)
    held.copy_(bias)
    return torch.einsum("bhqk,bkhd->bqhd", (scores + held).softmax(-1), v)


@plain("form-readers", Site(scale=0.3))
def ones_like_the_probabilities_are_returned(q: T, k: T, v: T) -> tuple[T, T]:
    p = (q @ k.mT * 0.3).softmax(-1)
    return p @ v, torch.ones_like(p).cumsum(-1)


def merged() -> tuple[T, T, T]:
    """q, k, v with batch and heads in one dimension."""
    q, k, v = qkv(queries=7)
    return q.detach(), k.detach(), v.detach()


BATCH = Dim("batch", min=2, max=64)


@plain(
    "form-readers",
    Site(scale=0.3, q=(TEXT, 3, 7, 8), k=(TEXT, 3, 7, 8), v=(TEXT, 3, 7, 8), causal=0),
    inputs=merged,
    dynamic=({0: BATCH}, {0: BATCH}, {0: BATCH}),
    other_sizes=lambda: qkv(batch=4, queries=7, grad=False),
)
def ones_like_scores_of_merged_batch_and_heads(q: T, k: T, v: T) -> T:
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    scores = torch.bmm(q, k.mT) * 0.3
    mask = torch.ones_like(scores).tril() == 0
    return torch.bmm(scores.masked_fill(mask, -INF).softmax(-1), v).view(-1, 3, 7, 8)


USED = Site(scale=0.3, replaced=False, reason="weights_used")


@plain("form-readers", USED)
def a_view_of_the_scores_is_read_by_elements(q: T, k: T, v: T) -> tuple[T, T]:
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v, scores.new_zeros(5, 7) + scores[0, 0]


@plain("form-readers", USED, inputs=lambda: (*qkv(), weights(2, 3, 5, 7)))
def the_scores_take_the_shape_of_another_and_are_returned(q: T, k: T, v: T, other: T) -> tuple[T, T]:
    # view_as reads the form of its second operand, but the elements of its first
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v, scores.view_as(other)


@plain("form-readers", Miss("no_product_after"), inputs=lambda: (*qkv(), weights(2, 3, 5, 7)))
def the_values_meet_a_tensor_of_the_form_of_the_weights(q: T, k: T, v: T, other: T) -> tuple[T, T]:
    p = (q @ k.mT * 0.3).softmax(-1)
    return other.double().type_as(p) @ v, p.amax(-1)
