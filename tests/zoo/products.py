"""The two products, in every spelling and orientation, and the views around them."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim

from tests.zoo.case import TEXT, Built, Miss, Site, T, case, keep, noise, packed, plain, qkv, with_bias

MERGED = Site(scale=0.3, q=(6, 1, 5, 8), k=(6, 1, 7, 8), v=(6, 1, 7, 8))


def three() -> tuple[T, T, T]:
    """Batch and heads merged from the start."""
    return noise(6, 5, 8, seed=1), noise(6, 7, 8, seed=2), noise(6, 7, 8, seed=3)


@plain("baddbmm", MERGED, inputs=three)
def bmm_of_three_dimensional_operands(q: T, k: T, v: T) -> T:
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.3).softmax(-1), v)


@plain("baddbmm", MERGED, inputs=three)
def baddbmm_of_an_empty_tensor_with_beta_zero(q: T, k: T, v: T) -> T:
    # diffusers' AttnProcessor
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(dim=-1), v)


@plain(
    "alibi",
    Site(scale=0.3, q=(6, 1, 5, 8), k=(6, 1, 7, 8), v=(6, 1, 7, 8), bias=((6, 1, 1, 7),), empty_rows="nan"),
    inputs=lambda: (*three(), noise(6, 1, 7, seed=4, grad=False)),
)
def bloom_alibi_by_baddbmm_with_beta(q: T, k: T, v: T, alibi: T) -> T:
    return alibi.baddbmm(q, k.mT, beta=1.0, alpha=0.3).softmax(-1) @ v


@plain(
    "baddbmm",
    Site(scale=0.3, q=(6, 1, 5, 8), k=(6, 1, 7, 8), v=(6, 1, 7, 8), bias=((1, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*three(), noise(1, 5, 7, seed=4, grad=False)),
)
def baddbmm_with_a_fractional_beta(q: T, k: T, v: T, bias: T) -> T:
    return torch.bmm(torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.3).softmax(-1), v)


@plain("baddbmm", MERGED, inputs=lambda: (*three(), torch.full((6, 5, 7), float("nan"))))
def baddbmm_with_beta_zero_ignores_nan(q: T, k: T, v: T, junk: T) -> T:
    return torch.bmm(torch.baddbmm(junk, q, k.mT, beta=0, alpha=0.3).softmax(-1), v)


@plain(
    "views",
    Site(scale=0.3, q=(1, 1, 5, 8), k=(1, 1, 7, 8), v=(1, 1, 7, 8)),
    inputs=lambda: tuple(x[0].detach().requires_grad_() for x in three()),
)
def no_batch_and_no_heads(q: T, k: T, v: T) -> T:
    return torch.mm((q.mm(k.t()) * 0.3).softmax(1), v)


@plain(
    "views",
    Site(scale=0.3),
    inputs=lambda: (*packed(),),
)
def batch_and_heads_merged_by_a_view(q: T, k: T, v: T) -> T:
    # fairseq, bart: (b, l, h, d) -> (b * h, l, d)
    q, k, v = (x.transpose(1, 2).reshape(6, -1, 8) for x in (q, k, v))
    out = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.3).softmax(-1), v)
    return out.view(2, 3, 5, 8).transpose(1, 2).reshape(2, 5, 24)


@plain(
    "added-terms",
    Site(scale=0.3, bias=((2, 1, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*packed(), noise(2, 1, 5, 7, seed=5, grad=False)),
)
def a_mask_added_between_two_views(q: T, k: T, v: T, mask: T) -> T:
    # opt, bart: split the merged axis, add, merge again
    q, k, v = (x.transpose(1, 2).reshape(6, -1, 8) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * 0.3
    scores = (scores.view(2, 3, 5, 7) + mask).view(6, 5, 7)
    return torch.bmm(scores.softmax(-1), v).view(2, 3, 5, 8).transpose(1, 2).reshape(2, 5, 24)


@plain("einsum", Site(scale=0.3))
def einsum_heads_first(q: T, k: T, v: T) -> T:
    return torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3).softmax(-1), v)


@plain("einsum", Site(scale=0.3), inputs=packed)
def einsum_length_first(q: T, k: T, v: T) -> T:
    return torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3).softmax(-1), v)


@plain("einsum", Site(scale=0.3))
def einsum_with_spaces_and_an_ellipsis(q: T, k: T, v: T) -> T:
    p = (torch.einsum("... i d, ... j d -> ... i j", q, k) * 0.3).softmax(dim=-1)
    return torch.einsum("... i j, ... j d -> ... i d", p, v)


@plain("einsum", Site(scale=0.3))
def einsum_in_upper_case(q: T, k: T, v: T) -> T:
    return torch.einsum("BHTS,BHSD->BHTD", torch.einsum("BHTD,BHSD->BHTS", q * 0.3, k).softmax(-1), v)


@plain("einsum", Site(scale=0.3))
def einsum_with_misleading_letters(q: T, k: T, v: T) -> T:
    # the letters say nothing: k stands for queries, q for keys, b for the width
    return torch.einsum("dhkq,dhqb->dhkb", (torch.einsum("dhkb,dhqb->dhkq", q, k) * 0.3).softmax(-1), v)


@plain("einsum", Site(scale=0.3))
def einsum_with_its_operands_swapped(q: T, k: T, v: T) -> T:
    p = (torch.einsum("bhkd,bhqd->bhqk", k, q) * 0.3).softmax(-1)
    return torch.einsum("bhkd,bhqk->bhqd", v, p)


@plain(
    "einsum",
    Site(scale=0.3, q=(1, 1, 5, 8), k=(1, 1, 7, 8), v=(1, 1, 7, 8)),
    inputs=lambda: tuple(x.detach()[0, 0].requires_grad_() for x in qkv()),
)
def einsum_without_an_arrow(q: T, k: T, v: T) -> T:
    # the result's letters come in alphabetical order: the scores are (keys, queries)
    return torch.einsum("ab,ac", torch.einsum("bd,ad", q, k).mul(0.3).softmax(0), v)


@plain(
    "einsum",
    Site(scale=0.3),
    inputs=lambda: tuple(x.detach().permute(1, 0, 2, 3).contiguous().requires_grad_() for x in packed()),
)
def einsum_as_in_xlnet(q: T, k: T, v: T) -> T:
    # (length, batch, heads, width); the softmax runs over the second axis
    scores = torch.einsum("ibnd,jbnd->ijbn", q, k) * 0.3
    return torch.einsum("ijbn,jbnd->ibnd", scores.softmax(dim=1), v)


@plain("einsum", Site(scale=0.3), inputs=packed)
def einsum_with_heads_after_the_keys(q: T, k: T, v: T) -> T:
    return torch.einsum("bqkh,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bqkh", q, k) * 0.3).softmax(2), v)


@plain("einsum", Site(scale=0.3))
def einsum_and_matmul(q: T, k: T, v: T) -> T:
    return (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1) @ v


@plain("einsum", Site(scale=0.3))
def matmul_and_einsum(q: T, k: T, v: T) -> T:
    return torch.einsum("bhij,bhjd->bihd", (q @ k.mT * 0.3).softmax(-1), v).reshape(2, 5, 24)


@plain("einsum", Site(scale=0.3, q=(2, 3, 1, 8)), inputs=lambda: (noise(2, 3, 8, seed=1), *qkv()[1:]))
def einsum_of_a_single_query_without_an_axis(q: T, k: T, v: T) -> T:
    return torch.einsum("bhk,bhkd->bhd", (torch.einsum("bhd,bhkd->bhk", q, k) * 0.3).softmax(-1), v)


@plain("einsum", Miss("not_a_query_key_product"), inputs=lambda: qkv(queries=7))
def einsum_of_matching_positions_only(q: T, k: T, v: T) -> T:
    # each query meets its own key: a softmax over positions, no attention
    p = (torch.einsum("bhtd,bhtd->bht", q, k) * 0.3).softmax(-1)
    return torch.einsum("bht,bhtd->bhd", p, v)


@plain("einsum", Miss("values_depend_on_query"), inputs=lambda: (*qkv()[:2], noise(2, 3, 5, 7, 8, seed=3)))
def einsum_with_values_for_each_query(q: T, k: T, v: T) -> T:
    p = (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhqk,bhqkd->bhqd", p, v)


@plain("einsum", Miss("no_product_before"), inputs=lambda: (*qkv(), noise(5, 7, seed=5)))
def einsum_of_three_operands(q: T, k: T, v: T, w: T) -> T:
    return torch.einsum("bhqd,bhkd,qk->bhqk", q, k, w).softmax(-1) @ v


@plain("einsum", Site(scale=0.3))
def products_spelled_as_multiply_and_sum(q: T, k: T, v: T) -> T:
    p = ((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * 0.3).softmax(-1)
    return (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


# -- orientation and permutation ---------------------------------------------------------------------------------------


def cube() -> tuple[T, T, T]:
    """All axes of size four: nothing can be told apart by size."""
    return noise(4, 4, 4, 4, seed=1), noise(4, 4, 4, 4, seed=2), noise(4, 4, 4, 4, seed=3)


CUBE = Site(scale=0.3, q=(4, 4, 4, 4), k=(4, 4, 4, 4), v=(4, 4, 4, 4))


@plain("pytorch#195320", CUBE, inputs=cube)
def keys_that_are_not_transposed(q: T, k: T, v: T) -> T:
    # equal sizes let this run; it is attention to the *columns* of k
    return (q @ k * 0.3).softmax(-1) @ v


@plain("pytorch#195320", CUBE, inputs=cube)
def keys_permuted_but_not_transposed(q: T, k: T, v: T) -> T:
    # length and heads of k change places as well
    return (q @ k.permute(0, 2, 3, 1) * 0.3).softmax(-1) @ v


@plain("pytorch#195320", CUBE, inputs=cube)
def keys_permuted_across_the_batch(q: T, k: T, v: T) -> T:
    return (q @ k.permute(1, 0, 3, 2) * 0.3).softmax(-1) @ v


@plain("trap 3", CUBE, inputs=cube)
def values_permuted_across_heads_and_length(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v.permute(0, 2, 1, 3)


@plain("trap 3", CUBE, inputs=cube)
def values_transposed(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v.mT


@plain("pytorch#191260", Site(scale=0.3))
def permute_with_negative_dimensions(q: T, k: T, v: T) -> T:
    return (q @ k.permute(0, 1, -1, -2) * 0.3).softmax(-1) @ v


@plain("pytorch#119911", Site(scale=0.3, q=(1, 3, 5, 8), k=(1, 3, 7, 8), v=(1, 3, 7, 8)), inputs=lambda: qkv(batch=1))
def clones_at_batch_one(q: T, k: T, v: T) -> T:
    kt = k.permute(0, 1, 3, 2).contiguous().clone()
    return torch.matmul((q.clone() @ kt * 0.3).softmax(-1).clone(), v.clone(memory_format=torch.contiguous_format))


@plain(
    "coremltools#2650",
    Site(scale=0.3, q=(11, 3, 5, 8), k=(11, 3, 7, 8), v=(11, 3, 7, 8)),
    inputs=lambda: qkv(batch=11),
)
def a_batch_of_eleven(q: T, k: T, v: T) -> T:
    return torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3).softmax(-1), v)


@plain(
    "pytorch#195589",
    Site(scale=0.3, q=(8, 3, 5, 6), k=(8, 3, 7, 6), v=(8, 3, 7, 6)),
    inputs=lambda: (noise(2, 4, 3, 5, 6, seed=1), noise(2, 4, 3, 7, 6, seed=2), noise(2, 4, 3, 7, 6, seed=3)),
)
def five_dimensional_operands(q: T, k: T, v: T) -> T:
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


@plain(
    "pytorch#111190",
    Site(scale=8**-0.5, q=(TEXT, 3, TEXT, 8), k=(TEXT, 3, TEXT, 8), v=(TEXT, 3, TEXT, 8)),
    inputs=lambda: qkv(batch=4, queries=7),
    dynamic=({0: Dim.AUTO, 2: Dim.AUTO},) * 3,
    other_sizes=lambda: qkv(batch=5, queries=11, keys=11),
)
def batch_and_length_are_dynamic(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


@plain(
    "pytorch#111190",
    Site(scale=8**-0.5, q=(TEXT, 3, TEXT, 8), k=(TEXT, 3, TEXT, 8), v=(TEXT, 3, TEXT, 8), causal=0),
    inputs=lambda: tuple(x.detach() for x in packed(batch=4, length=6)[:1]),
    dynamic=({0: Dim.AUTO, 1: Dim.AUTO},),
    other_sizes=lambda: tuple(x.detach() for x in packed(batch=5, length=9)[:1]),
)
def dynamic_sizes_through_merged_views_and_a_causal_mask(x: T) -> T:
    batch, length, heads, width = x.shape
    q = x.transpose(1, 2).reshape(batch * heads, length, width)
    scores = torch.bmm(q, q.transpose(1, 2)) * 8**-0.5
    off = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    scores = scores.view(batch, heads, length, length).masked_fill(off, float("-inf"))
    p = scores.softmax(-1).view(batch * heads, length, length)
    return torch.bmm(p, q).view(batch, heads, length, width).transpose(1, 2).flatten(2)


class PackedProjection(nn.Module):
    """timm: one projection, unbind, the scale on q."""

    def __init__(self, split: str, norm: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.split = nn.Linear(24, 72), nn.Linear(24, 24), split
        self.q_norm: nn.Module = nn.LayerNorm(8) if norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(8) if norm else nn.Identity()

    def forward(self, x: T) -> T:
        batch, length, width = x.shape
        if self.split == "unbind":
            q, k, v = self.qkv(x).reshape(batch, length, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.split == "chunk":
            q, k, v = (t.view(batch, length, 3, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        else:
            q, k, v = (t.view(batch, length, 3, 8).transpose(1, 2) for t in self.qkv(x).split(24, dim=2))
        q, k = self.q_norm(q) * 8**-0.5, self.k_norm(k)
        out = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


def tokens() -> tuple[T]:
    return (noise(2, 7, 24, seed=1),)


PACKED = Site(scale=8**-0.5, q=(2, 3, 7, 8))


@case("scaled-query", PACKED)
def timm_packed_qkv_with_unbind() -> Built:
    return PackedProjection("unbind"), tokens()


@case("scaled-query", PACKED)
def timm_packed_qkv_with_normalised_queries_and_keys() -> Built:
    return PackedProjection("unbind", norm=True), tokens()


@case("views", PACKED)
def packed_qkv_with_chunk() -> Built:
    return PackedProjection("chunk"), tokens()


@case("views", PACKED)
def packed_qkv_with_split() -> Built:
    return PackedProjection("split"), tokens()


@plain("views", Site(scale=0.3, q=(2, 3, 7, 8)), inputs=lambda: qkv(queries=7)[:1])
def queries_keys_and_values_are_one_tensor(x: T) -> T:
    return (x @ x.mT * 0.3).softmax(-1) @ x


@plain(
    "views",
    Site(scale=0.3, q=(2, 1, 5, 8), k=(2, 1, 7, 8), v=(2, 1, 7, 8)),
    inputs=lambda: tuple(x.detach()[:2].requires_grad_() for x in three()),
)
def one_head_and_no_axis_for_it(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("views", Site(scale=0.3), inputs=lambda: tuple(x.detach().flatten(2).requires_grad_() for x in packed()))
def heads_split_off_by_unflatten_and_moved(q: T, k: T, v: T) -> T:
    q, k, v = (x.unflatten(-1, (3, 8)).movedim(2, 1) for x in (q, k, v))
    return ((q @ k.swapaxes(-1, -2) * 0.3).softmax(-1) @ v).movedim(1, 2).flatten(2)


@plain(
    "views",
    Miss("axes_mixed"),
    inputs=lambda: (noise(2, 6, 5, 8, seed=1), noise(2, 6, 5, 8, seed=2), noise(2, 6, 5, 8, seed=3)),
)
def a_view_that_tears_queries_and_heads(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    return scores.reshape(2, 5, 6, 5).softmax(-1).reshape(2, 15, 2, 5) @ v[:, :1]


@plain("added-terms", Site(scale=0.3, bias=((2, 3, 5, 7),), empty_rows="nan"), inputs=with_bias(2, 3, 5, 7))
def a_bias_through_a_view_of_the_scores(q: T, k: T, v: T, bias: T) -> T:
    return ((q @ k.mT * 0.3).flatten(0, 1) + bias.reshape(6, 5, 7)).unflatten(0, (2, 3)).softmax(-1) @ v


@plain(
    "filled-masks",
    Site(scale=0.3, q=(6, 1, 5, 8), k=(6, 1, 7, 8), v=(6, 1, 7, 8), dense=True, empty_rows="nan"),
    inputs=lambda: (*three(), keep(2, 5, 7)),
)
def a_mask_repeated_for_merged_heads(q: T, k: T, v: T, keep: T) -> T:
    off = ~keep.repeat_interleave(3, dim=0)
    return torch.bmm((torch.bmm(q, k.mT) * 0.3).masked_fill(off, float("-inf")).softmax(-1), v)
