"""What is added to the scores or bends them: position biases, ALiBi, windows, soft caps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import Built, Miss, Site, T, case, keep, noise, plain, qkv, with_bias, with_keep

INF = float("inf")
CAPPED = Site(scale=0.3, softcap=5.0, replaced=False, reason="no_kernel")


# -- biases --------------------------------------------------------------------------------------------------------


class T5(nn.Module):
    """A trainable table of buckets, permuted to (1, heads, queries, keys), and a mask added to it first."""

    def __init__(self, *, trained: bool, masked: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3)
        self.table.weight.requires_grad_(trained)
        self.masked = masked

    def forward(self, q: T, k: T, v: T) -> T:
        distance = torch.arange(k.size(2))[None, :] - torch.arange(q.size(2))[:, None]
        bias = self.table(distance.clamp(-4, 4) + 4).permute([2, 0, 1]).unsqueeze(0)
        if self.masked:
            bias = bias + torch.where(distance <= 2, 0.0, torch.finfo(q.dtype).min)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        return F.softmax(scores.float(), dim=-1).type_as(scores) @ v


@case("trap 10", Site(scale=1.0, bias=((1, 3, 5, 7),), empty_rows="nan", replaced=False, reason="no_kernel"))
def t5_bias_that_needs_a_gradient() -> Built:
    return T5(trained=True, masked=False), qkv()


@case("added-terms", Site(scale=1.0, bias=((1, 3, 5, 7),), empty_rows="nan", causal=2))
def t5_bias_that_is_frozen() -> Built:
    return T5(trained=False, masked=True), qkv()


@case(
    "pytorch#163252",
    Site(scale=1.0, q=(1, 3, 5, 8), k=(1, 3, 7, 8), v=(1, 3, 7, 8), bias=((1, 3, 5, 7),), empty_rows="nan", causal=2),
)
def t5_at_batch_one() -> Built:
    return T5(trained=False, masked=True), qkv(batch=1)


@plain(
    "stablehlo-coreml#89",
    Site(scale=0.3, bias=((1, 3, 5, 7), (2, 1, 5, 7)), empty_rows="nan"),
    inputs=lambda: (*with_bias(3, 5, 7)(), noise(2, 1, 5, 7, seed=6, grad=False)),
)
def two_added_terms(q: T, k: T, v: T, bias: T, mask: T) -> T:
    return (q @ k.mT * 0.3 + bias + mask).softmax(-1) @ v


@plain(
    "added-terms",
    Site(scale=0.3, bias=((1, 3, 5, 7), (2, 1, 5, 7), (1, 1, 1, 7)), empty_rows="nan"),
    inputs=lambda: (*with_bias(3, 5, 7)(), noise(2, 1, 5, 7, seed=6, grad=False), noise(7, seed=7, grad=False)),
)
def three_added_terms_on_both_sides(q: T, k: T, v: T, bias: T, mask: T, keys: T) -> T:
    return (keys + (mask + (q @ k.mT * 0.3 + bias))).softmax(-1) @ v


@plain(
    "added-terms",
    Site(scale=0.3, bias=((2, 3, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*with_bias(3, 5, 7)(), noise(2, 1, 5, 7, seed=6, grad=False)),
)
def terms_added_to_each_other_first(q: T, k: T, v: T, bias: T, mask: T) -> T:
    return (q @ k.mT * 0.3 + (bias + mask)).softmax(-1) @ v


class SwinWindows(nn.Module):
    """swin: a bias for each head, and a mask for each window added through a 5-D view."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(5))
        self.register_buffer("bias", table)
        mask = torch.zeros(4, 7, 7)
        mask[2:, :, :3] = -100.0
        self.register_buffer("mask", mask)

    def forward(self, q: T, k: T, v: T) -> T:
        scores = (q * 8**-0.5) @ k.transpose(-2, -1)
        scores = scores + self.bias.unsqueeze(0)
        windows, heads, length, _ = scores.shape
        scores = scores.view(windows // 4, 4, heads, length, length) + self.mask.unsqueeze(1).unsqueeze(0)
        return scores.view(-1, heads, length, length).softmax(dim=-1) @ v


@case(
    "added-terms",
    Site(
        scale=8**-0.5,
        q=(8, 3, 7, 8),
        k=(8, 3, 7, 8),
        v=(8, 3, 7, 8),
        bias=((4, 1, 7, 7), (1, 3, 7, 7)),
        empty_rows="nan",
    ),
)
def swin_window_mask_through_a_five_dimensional_view() -> Built:
    # the mask is one for each of the four windows of an image, two images: its own batch size is four
    return SwinWindows(), qkv(batch=8, queries=7)


@plain(
    "alibi",
    Site(scale=0.3, bias=((1, 3, 1, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), torch.tensor([0.5, 0.25, 0.125])),
)
def alibi_from_slopes(q: T, k: T, v: T, slopes: T) -> T:
    alibi = slopes[:, None, None] * torch.arange(7)
    return (q @ k.mT * 0.3 + alibi).softmax(-1) @ v


@plain(
    "alibi",
    Site(scale=0.3, q=(2, 3, 7, 8), bias=((1, 3, 7, 7),), empty_rows="nan", causal=0),
    inputs=lambda: (*qkv(queries=7), torch.tensor([0.5, 0.25, 0.125])),
)
def mpt_alibi_and_a_causal_fill(q: T, k: T, v: T, slopes: T) -> T:
    distance = torch.arange(7) - torch.arange(7)[:, None]
    scores = q @ k.mT * 0.3 + slopes[:, None, None] * distance
    off = torch.ones(7, 7, dtype=torch.bool).triu(1)
    return scores.masked_fill(off, torch.finfo(q.dtype).min).softmax(-1) @ v


@plain(
    "trap 10",
    Site(scale=0.3, bias=((1, 3, 5, 7),), empty_rows="nan", replaced=False, reason="no_kernel"),
    inputs=with_bias(3, 5, 7, grad=True),
)
def an_input_bias_that_needs_a_gradient(q: T, k: T, v: T, bias: T) -> T:
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


# -- biases made from the queries --------------------------------------------------------------------------------------


@plain(
    "bias-from-query",
    Miss("two_score_tensors"),
    inputs=lambda: (*qkv(grad=False), noise(5, 7, 8, seed=5, grad=False)),
)
def a_relative_position_bias_made_from_the_queries(q: T, k: T, v: T, r: T) -> T:
    # shaw et al.: both products have the axes of scores; either could be the score and the other a dense bias
    return (q @ k.mT * 0.3 + torch.einsum("bhqd,qkd->bhqk", q, r)).softmax(-1) @ v


class SamDecomposed(nn.Module):
    """sam: the bias is a sum over rows and columns of an image of 2 x 4, both made from q."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rel_h", torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("rel_w", torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(2)))

    def forward(self, q: T, k: T, v: T) -> T:
        scores = (q * 0.3) @ k.transpose(-2, -1)
        r_q = q.reshape(6, 2, 4, 8)
        rel_h = torch.einsum("bhwc,hkc->bhwk", r_q, self.rel_h)
        rel_w = torch.einsum("bhwc,wkc->bhwk", r_q, self.rel_w)
        scores = scores.view(6, 2, 4, 2, 4) + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
        return scores.view(6, 8, 8).softmax(-1) @ v


@case(
    "bias-from-query",
    Site(
        scale=0.3, q=(6, 1, 8, 8), k=(6, 1, 8, 8), v=(6, 1, 8, 8), bias=((6, 1, 8, 4), (6, 1, 8, 2)), empty_rows="nan"
    ),
)
def sam_decomposed_relative_positions() -> Built:
    return SamDecomposed(), tuple(noise(6, 8, 8, seed=i, grad=False) for i in (1, 2, 3))


@plain("bias-from-query", Miss("two_score_tensors"), inputs=lambda: (*qkv(), noise(2, 3, 7, 8, seed=5)))
def content_and_position_products_of_the_same_form(q: T, k: T, v: T, r: T) -> T:
    # xlnet, conformer before the shift: two products that both pair queries with keys
    return ((q @ k.mT + q @ r.mT) * 0.3).softmax(-1) @ v


def shift(x: T) -> T:
    """The relative shift of Transformer-XL."""
    batch, heads, queries, keys = x.shape
    return F.pad(x, (1, 0)).view(batch, heads, keys + 1, queries)[:, :, 1:].view(batch, heads, queries, keys)


@plain(
    "bias-from-query",
    Site(scale=0.3, q=(2, 3, 7, 8), bias=((2, 3, 7, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(queries=7, grad=False), noise(3, 7, 8, seed=5, grad=False)),
)
def transformer_xl_with_the_relative_shift(q: T, k: T, v: T, r: T) -> T:
    return ((q @ k.mT + shift(q @ r.mT)) * 0.3).softmax(-1) @ v


@plain(
    "bias-from-query",
    Site(scale=0.3, q=(2, 3, 7, 8), bias=((2, 3, 7, 7),), empty_rows="nan", replaced=False, reason="no_kernel"),
    inputs=lambda: (*qkv(queries=7), noise(3, 7, 8, seed=5)),
)
def transformer_xl_in_training(q: T, k: T, v: T, r: T) -> T:
    return ((q @ k.mT + shift(q @ r.mT)) * 0.3).softmax(-1) @ v


@plain(
    "bias-from-query",
    Site(scale=0.3, bias=((2, 3, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(grad=False), noise(3, 9, 8, seed=5, grad=False)),
)
def deberta_disentangled_positions(q: T, k: T, v: T, r: T) -> T:
    # content to position: a product with nine distances, gathered to the keys
    distance = (torch.arange(5)[:, None] - torch.arange(7)).clamp(-4, 4) + 4
    c2p = torch.gather(q @ r.mT, -1, distance.expand(2, 3, 5, 7))
    return (q @ k.mT * 0.3 + c2p * 0.3).softmax(-1) @ v


@plain("bias-from-query", Miss("mutated"), inputs=lambda: (*qkv(grad=False), noise(2, 3, 4, 6, seed=5, grad=False)))
def mvitv2_adds_in_place_to_a_slice_of_the_scores(q: T, k: T, v: T, rel: T) -> T:
    scores = q @ k.mT * 0.3
    scores[:, :, 1:, 1:] += rel
    return scores.softmax(-1) @ v


# -- soft caps -------------------------------------------------------------------------------------------------------


@plain("TensorRT-LLM#4789", CAPPED)
def a_softcap(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    scores = scores / 5.0
    scores = torch.tanh(scores)
    scores = scores * 5.0
    return scores.softmax(-1) @ v


@plain("softcap", CAPPED)
def a_softcap_commuted(q: T, k: T, v: T) -> T:
    return (5.0 * ((q * 0.3) @ k.mT).mul(1 / 5.0).tanh()).softmax(-1) @ v


@plain(
    "softcap",
    Site(scale=0.3, softcap=5.0, dense=True, empty_rows="mean", replaced=False, reason="no_kernel"),
    inputs=with_keep(2, 1, 5, 7),
)
def gemma2_softcap_and_then_a_mask(q: T, k: T, v: T, keep: T) -> T:
    scores = torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0
    return (scores + torch.where(keep, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


@plain("softcap", Site(scale=3.0, softcap=5.0, replaced=False, reason="no_kernel"))
def a_softcap_whose_two_numbers_differ(q: T, k: T, v: T) -> T:
    # 5 * tanh(x / 0.5) is a cap of 5 on a scale ten times larger
    return (torch.tanh(q @ k.mT * 0.3 / 0.5) * 5.0).softmax(-1) @ v


@plain("softcap", Miss("term_inside_softcap"), inputs=with_keep(2, 1, 5, 7))
def a_mask_inside_a_softcap_masks_nothing(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return (torch.tanh(scores / 5.0) * 5.0).softmax(-1) @ v


@plain("softcap", Miss("term_inside_softcap"), inputs=with_bias(3, 5, 7))
def a_bias_inside_a_softcap(q: T, k: T, v: T, bias: T) -> T:
    return (torch.tanh((q @ k.mT * 0.3 + bias) / 5.0) * 5.0).softmax(-1) @ v


class CapBuffer(nn.Module):
    """gemma3n: the cap is a 0-d buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cap", torch.tensor(5.0))

    def forward(self, q: T, k: T, v: T) -> T:
        return (torch.tanh(q @ k.mT * 0.3 / self.cap) * self.cap).softmax(-1) @ v


@case("softcap", Miss("nonlinear_scores"))
def a_softcap_held_in_a_buffer() -> Built:
    # its value is data: no kernel could be given it as a number
    return CapBuffer(), qkv()


@plain("softcap", Miss("nonlinear_scores"))
def a_negative_softcap(q: T, k: T, v: T) -> T:
    return (-3.0 * torch.tanh(q @ k.mT * 0.3 / 3.0)).softmax(-1) @ v


@plain("softcap", Miss("nonlinear_scores"))
def two_softcaps(q: T, k: T, v: T) -> T:
    return (torch.tanh(torch.tanh(q @ k.mT * 0.3) * 2.0) * 5.0).softmax(-1) @ v


@plain("softcap", Miss("unknown_op"))
def scores_through_a_sigmoid(q: T, k: T, v: T) -> T:
    return (torch.sigmoid(q @ k.mT * 0.3) * 5.0).softmax(-1) @ v


@plain("softcap", Miss("unknown_op"))
def scores_through_relu(q: T, k: T, v: T) -> T:
    return F.relu(q @ k.mT * 0.3).softmax(-1) @ v


@plain("softcap", Miss("nonlinear_scores"))
def scores_clamped(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).clamp(min=-1.0, max=1.0).softmax(-1) @ v


# -- one more key, rows that are shifted -----------------------------------------------------------------------------


@plain("sink-column", Site(scale=0.3, k=(2, 3, 8, 8), v=(2, 3, 8, 8)))
def zero_attention_is_one_more_key(q: T, k: T, v: T) -> T:
    # add_zero_attn of nn.MultiheadAttention
    zero = torch.zeros(2, 3, 1, 8)
    k, v = torch.cat((k, zero), dim=2), torch.cat((v, zero), dim=2)
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("filled-masks", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=lambda: (*qkv(), keep(2, 1, 5, 7)))
def a_softmax_of_masked_scores_whose_rows_are_shifted(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v
