"""Existing fused calls that are told more than they need: repeated heads, masks of known structure; and those left."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from tests.zoo.case import TEXT, Built, Site, T, case, keep, noise, plain, qkv
from tests.zoo.heads import grouped, repeat_kv

INF = float("inf")
ROOT = 8**-0.5
CALLED: dict[str, Any] = {"replaced": False, "reason": "already_fused"}
WHOLE: dict[str, Any] = {"q": (3, 8, 5, 6), "k": (3, 8, 7, 6), "v": (3, 8, 7, 6), "scale": 6**-0.5}
GROUPED: dict[str, Any] = {**WHOLE, "k": (3, 2, 7, 6), "v": (3, 2, 7, 6), "groups": 4}
attend = F.scaled_dot_product_attention


def triangle(queries: int = 5, keys: int = 7, diagonal: int = 0) -> T:
    return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal)


# -- repeated heads --------------------------------------------------------------------------------------------------


@plain("repeat-kv", Site(**GROUPED), inputs=grouped)
def a_call_behind_repeat_kv(q: T, k: T, v: T) -> T:
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4))


@plain("repeat-kv", Site(**GROUPED), inputs=grouped)
def a_call_behind_repeat_interleave(q: T, k: T, v: T) -> T:
    return attend(q, k.repeat_interleave(4, 1).contiguous(), v.repeat_interleave(4, dim=1))


@plain("repeat-kv", Site(**GROUPED, causal=0), inputs=grouped)
def a_causal_call_behind_repeat_kv(q: T, k: T, v: T) -> T:
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), is_causal=True)


@plain("repeat-kv", Site(**GROUPED), inputs=lambda: (grouped()[0].detach(), *packed_keys()))
def a_call_behind_repeat_kv_of_transposed_keys(q: T, k: T, v: T) -> T:
    return attend(q, repeat_kv(k.transpose(1, 2), 4), repeat_kv(v.transpose(1, 2), 4))


def packed_keys() -> tuple[T, T]:
    return noise(3, 7, 2, 6, seed=2), noise(3, 7, 2, 6, seed=3)


@plain("repeat-kv", Site(**GROUPED), inputs=grouped)
def a_grouped_call_whose_heads_were_repeated_before(q: T, k: T, v: T) -> T:
    return attend(q, repeat_kv(k, 2), repeat_kv(v, 2), enable_gqa=True)


@plain("repeat-kv", Site(**{**GROUPED, "k": (3, 1, 7, 6), "v": (3, 1, 7, 6), "groups": 8}), inputs=lambda: one_head(6))
def a_call_with_one_head_expanded(q: T, k: T, v: T) -> T:
    return attend(q, k.expand(3, 8, 7, 6), v.expand(3, 8, 7, 6))


def one_head(width: int) -> tuple[T, T, T]:
    return qkv(batch=3, heads=8, width=width, kv_heads=1)


LENGTH = Dim("length", min=3, max=64)


def both(length: int) -> tuple[T, T]:
    """Queries, and keys and values in one tensor: nothing else says that these two are of one length."""
    return noise(3, 8, length, 6, seed=1), noise(2, 3, 2, length, 6, seed=2)


@plain(
    "repeat-kv",
    Site(scale=6**-0.5, q=(3, 8, TEXT, 6), k=(3, 2, TEXT, 6), v=(3, 2, TEXT, 6), groups=4, causal=0),
    inputs=lambda: both(7),
    dynamic=({2: LENGTH}, {3: LENGTH}),
    other_sizes=lambda: both(11),
)
def a_call_of_any_length_behind_repeat_kv(q: T, kv: T) -> T:
    mask = torch.ones(q.shape[2], kv.shape[3], dtype=torch.bool).tril()
    return attend(q, repeat_kv(kv[0], 4), repeat_kv(kv[1], 4), mask)


@plain("repeat-kv", Site(**WHOLE, **CALLED), inputs=grouped)
def a_call_with_tiled_heads(q: T, k: T, v: T) -> T:
    # query head h reads head h % 2, which no fused call says
    return attend(q, k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1))


@plain("repeat-kv", Site(**WHOLE, **CALLED), inputs=grouped)
def a_call_with_repeated_keys_and_tiled_values(q: T, k: T, v: T) -> T:
    return attend(q, repeat_kv(k, 4), v.repeat(1, 4, 1, 1))


@plain("existing-call", Site(**{**GROUPED, **CALLED, "scale": 0.3}), inputs=grouped)
def a_grouped_call_is_left(q: T, k: T, v: T) -> T:
    return attend(q, k, v, scale=0.3, enable_gqa=True)


@plain(
    "existing-call",
    Site(**{**GROUPED, **CALLED, "k": (3, 1, 7, 6), "v": (3, 1, 7, 6), "groups": 8}),
    inputs=lambda: one_head(6),
)
def a_call_with_one_head_broadcast_is_left(q: T, k: T, v: T) -> T:
    return attend(q, k, v)


# -- ... under masks that stay ---------------------------------------------------------------------------------------


def with_mask(*shape: int) -> tuple[T, T, T, T]:
    return *grouped(), keep(*shape, empty=True)


DENSE: dict[str, Any] = {**GROUPED, "dense": True, "empty_rows": "zero"}


@plain("trap 7", Site(**DENSE), inputs=lambda: with_mask(3, 1, 5, 7))
def a_call_behind_repeat_kv_under_a_mask(q: T, k: T, v: T, mask: T) -> T:
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), mask)


@plain("trap 7", Site(**DENSE), inputs=lambda: (*grouped(), keep(3, 1, 5, 7, empty=True)[0, 0]))
def a_call_behind_repeat_kv_under_a_mask_for_all(q: T, k: T, v: T, mask: T) -> T:
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), mask)


@plain(
    "trap 7",
    Site(**DENSE),
    inputs=lambda: with_mask(3, 1, 5, 7),
)
def a_call_behind_repeat_kv_under_a_bias(q: T, k: T, v: T, mask: T) -> T:
    # gradients of the row without a key are those of torch's kernel, whatever one thinks of them
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), torch.where(mask, 0.0, -INF))


@plain("trap 7", Site(**DENSE, **CALLED), inputs=lambda: with_mask(8, 5, 7))
def a_call_with_a_mask_that_only_the_unfused_form_takes(q: T, k: T, v: T, mask: T) -> T:
    # another kernel may answer a row without a key otherwise
    return attend(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), mask)


@plain("trap 7", Site(**DENSE, **CALLED), inputs=lambda: with_mask(3, 1, 5, 7))
def a_masked_call_of_columns_that_lie_apart(q: T, k: T, v: T, mask: T) -> T:
    # nor does the fused form for the CPU read queries whose last axis is not the inner one
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), mask)


@plain(
    "trap 10",
    Site(**GROUPED, **CALLED, bias=((3, 1, 5, 7),), empty_rows="zero"),
    inputs=lambda: (*grouped(), noise(3, 1, 5, 7, seed=5)),
)
def a_call_behind_repeat_kv_under_a_bias_that_needs_a_gradient(q: T, k: T, v: T, bias: T) -> T:
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), bias)


@plain(
    "dropout",
    Site(**GROUPED, **CALLED, dropout=0.25),
    inputs=grouped,
    reference="eager",
)
def a_call_behind_repeat_kv_with_dropout(q: T, k: T, v: T) -> T:
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), dropout_p=0.25)


# -- masks of known structure ----------------------------------------------------------------------------------------


@plain("existing-call", Site(scale=ROOT, causal=0))
def a_call_with_a_lower_triangle(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle())


@plain("existing-call", Site(scale=ROOT, q=(2, 3, 9, 8), causal=0), inputs=lambda: qkv(queries=9))
def a_call_with_a_lower_triangle_and_fewer_keys(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle(9))


@plain("existing-call", Site(scale=ROOT, causal=0))
def a_call_with_minus_infinity_above_the_diagonal(q: T, k: T, v: T) -> T:
    return attend(q, k, v, torch.full((5, 7), -INF).triu(1))


@plain("existing-call", Site(scale=ROOT, causal=0))
def a_call_with_the_lowest_number_above_the_diagonal(q: T, k: T, v: T) -> T:
    lowest = torch.finfo(q.dtype).min
    return attend(q, k, v, torch.zeros(1, 1, 5, 7, dtype=q.dtype).masked_fill(~triangle(), lowest))


@plain("existing-call", Site(scale=ROOT), inputs=qkv)
def a_call_with_a_mask_of_ones(q: T, k: T, v: T) -> T:
    return attend(q, k, v, torch.ones(2, 1, 5, 7, dtype=torch.bool))


@plain("existing-call", Site(scale=ROOT), inputs=qkv)
def a_call_with_a_bias_of_zeros(q: T, k: T, v: T) -> T:
    return attend(q, k, v, torch.zeros(5, 7))


@plain("repeat-kv", Site(**GROUPED, causal=0), inputs=grouped)
def a_call_with_a_triangle_behind_repeat_kv(q: T, k: T, v: T) -> T:
    return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), triangle())


@plain("repeat-kv", Site(**GROUPED, causal=0), inputs=grouped)
def a_grouped_call_with_a_triangle(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle(), enable_gqa=True)


@plain(
    "existing-call",
    Site(**{**GROUPED, "k": (3, 4, 7, 6), "v": (3, 4, 7, 6), "groups": 2}, causal=0),
    inputs=lambda: (*grouped()[:2], noise(3, 4, 7, 6, seed=3)),
)
def a_grouped_call_with_more_value_heads_and_a_triangle(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle(), enable_gqa=True)


@plain("trap 6", Site(scale=ROOT, causal=2, **CALLED))
def a_call_that_is_causal_from_the_bottom_right(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle(diagonal=2))


@plain("trap 7", Site(scale=ROOT, causal=-1, empty_rows="zero", **CALLED))
def a_call_that_sees_only_the_past(q: T, k: T, v: T) -> T:
    # the first query has no key, which is_causal cannot say
    return attend(q, k, v, triangle(diagonal=-1))


@plain("existing-call", Site(scale=ROOT, causal=0, window=(2, None), **CALLED))
def a_call_with_a_window(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle() & ~triangle(diagonal=-3))


@plain(
    "existing-call",
    Site(scale=ROOT, key_padding=True, empty_rows="zero", **CALLED),
    inputs=lambda: (*qkv(), keep(2, 7).long()),
)
def a_call_with_key_padding(q: T, k: T, v: T, mask: T) -> T:
    return attend(q, k, v, mask[:, None, None, :] != 0)


@plain(
    "existing-call",
    Site(scale=ROOT, bias=((1, 1, 5, 7),), empty_rows="zero", **CALLED),
    inputs=lambda: (*qkv(), given()),
)
def a_call_with_a_mask_from_outside(q: T, k: T, v: T, mask: T) -> T:
    return attend(q, k, v, mask)


def given() -> T:
    """A causal mask in this run; nothing in the graph says so."""
    return torch.zeros(5, 7).masked_fill(~triangle(), -INF)


# -- ranks and broadcasting ------------------------------------------------------------------------------------------


@plain("existing-call", Site(scale=ROOT, q=(1, 1, 5, 8), k=(1, 1, 7, 8), v=(1, 1, 7, 8), causal=0))
def a_call_on_matrices(q: T, k: T, v: T) -> T:
    return attend(q[0, 0], k[0, 0], v[0, 0], triangle())


@plain("existing-call", Site(scale=ROOT, q=(1, 6, 5, 8), k=(1, 6, 7, 8), v=(1, 6, 7, 8), causal=0))
def a_call_of_three_axes(q: T, k: T, v: T) -> T:
    return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), triangle())


@plain("existing-call", Site(scale=ROOT, q=(6, 1, 5, 8), k=(6, 1, 7, 8), v=(6, 1, 7, 8), causal=0))
def a_call_of_five_axes(q: T, k: T, v: T) -> T:
    return attend(q[:, :, None], k[:, :, None], v[:, :, None], triangle())


@plain(
    "existing-call",
    Site(**{**GROUPED, "k": (3, 1, 7, 6), "v": (3, 1, 7, 6), "groups": 8}, causal=0),
    inputs=lambda: one_head(6),
)
def a_call_with_one_head_broadcast_and_a_triangle(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle())


@plain("existing-call", Site(scale=ROOT, causal=0), inputs=lambda: (qkv()[0], *(x[:1] for x in qkv(grad=False)[1:])))
def a_call_with_keys_of_one_batch_and_a_triangle(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle())


@plain("unlike-widths", Site(scale=ROOT, v=(2, 3, 7, 10), causal=0), inputs=lambda: qkv(v_width=10))
def a_call_with_wider_values_and_a_triangle(q: T, k: T, v: T) -> T:
    return attend(q, k, v, triangle())


@plain("existing-call", Site(scale=ROOT, q=(2, 3, 1, 8)), inputs=lambda: qkv(queries=1))
def a_call_for_one_query_that_sees_all(q: T, k: T, v: T) -> T:
    at = torch.arange(7)
    return attend(q, k, v, at[None, :] <= at[-1:, None])


# -- writes ----------------------------------------------------------------------------------------------------------


@plain("trap 2", Site(**WHOLE, **CALLED), inputs=grouped)
def a_call_whose_keys_are_written_after_they_were_repeated(q: T, k: T, v: T) -> T:
    k, v = k * 1, v * 1
    ks, vs = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
    k.add_(1.0)
    v.add_(1.0)
    return attend(q, ks, vs) + k.sum()


@plain("trap 2", Site(**WHOLE, **CALLED), inputs=grouped)
def a_call_whose_repeated_keys_are_written(q: T, k: T, v: T) -> T:
    ks, vs = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
    ks[:, 1:].mul_(2.0)
    vs.add_(1.0)
    return attend(q, ks, vs)


@plain("trap 2", Site(**WHOLE, **CALLED), inputs=grouped)
def a_call_whose_keys_are_written_before_the_backward(q: T, k: T, v: T) -> T:
    # the backward of the call would read them as they are then
    k, v = k * 1, v * 1
    out = attend(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))
    k.add_(1.0)
    v.add_(1.0)
    return out + (k + v).sum()


@plain("trap 2", Site(scale=ROOT, dense=True, **CALLED))
def a_call_whose_mask_is_written(q: T, k: T, v: T) -> T:
    mask = triangle()
    mask[2:, 3] = q[0, 0, 2:, 0] > 0
    return attend(q, k, v, mask)


@plain("in-place", Site(scale=ROOT, causal=0))
def a_call_whose_mask_is_written_later(q: T, k: T, v: T) -> T:
    mask = triangle()
    out = attend(q, k, v, mask)
    mask.fill_(True)
    return out + mask.sum()


# -- dtypes and states -----------------------------------------------------------------------------------------------


@plain(
    "casts",
    Site(**{**WHOLE, "dtype": "float32"}, **CALLED),
    inputs=lambda: qkv(batch=3, heads=8, width=6, kv_heads=2, dtype=torch.bfloat16),
)
def a_call_on_widened_operands(q: T, k: T, v: T) -> T:
    # the call was asked for float32: its operands are not read in bfloat16, nor without their repetition then
    return attend(q.float(), k.repeat_interleave(4, 1).float(), v.repeat_interleave(4, 1).float())


@case("states", Site(**{**WHOLE, "k": (3, 2, 7, 6), "v": (3, 2, 7, 6)}, groups=4, causal=0, dtype="bfloat16"))
def a_call_in_bfloat16() -> Built:
    class Attention(nn.Module):
        def forward(self, q: T, k: T, v: T) -> T:
            return attend(q, repeat_kv(k, 4), repeat_kv(v, 4), triangle())

    return Attention(), qkv(batch=3, heads=8, width=6, kv_heads=2, dtype=torch.bfloat16)


@case("states", Site(**WHOLE, **CALLED))
def a_call_under_autocast() -> Built:
    class Attention(nn.Module):
        def forward(self, q: T, k: T, v: T) -> T:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return attend(q, repeat_kv(k, 4), repeat_kv(v, 4))

    return Attention(), grouped()
