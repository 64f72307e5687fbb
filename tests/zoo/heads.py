"""Shared key/value heads, unlike widths, and which axes count as heads."""

from __future__ import annotations

import torch
from torch.export import Dim

from tests.zoo.case import TEXT, Miss, Site, T, keep, noise, plain, qkv

# eight query heads share two key/value heads; every size differs from every other
GROUPED = Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 2, 7, 6), v=(3, 2, 7, 6), groups=4)
# with five axes in the graph, the key/value heads count as batch: the same function
SPLIT = Site(scale=0.3, q=(6, 4, 5, 6), k=(6, 1, 7, 6), v=(6, 1, 7, 6), groups=4)


def grouped() -> tuple[T, T, T]:
    return qkv(batch=3, heads=8, width=6, kv_heads=2)


def repeat_kv(x: T, n: int) -> T:
    """As transformers writes it."""
    batch, heads, length, width = x.shape
    if n == 1:
        return x
    x = x[:, :, None, :, :].expand(batch, heads, n, length, width)
    return x.reshape(batch, heads * n, length, width)


@plain("repeat-kv", GROUPED, inputs=grouped)
def repeat_kv_by_expand_and_reshape(q: T, k: T, v: T) -> T:
    k, v = repeat_kv(k, 4), repeat_kv(v, 4)
    return (torch.matmul(q, k.transpose(2, 3)) * 0.3).softmax(-1) @ v


@plain("repeat-kv", GROUPED, inputs=grouped)
def repeat_kv_by_repeat_interleave(q: T, k: T, v: T) -> T:
    k, v = k.repeat_interleave(4, dim=1), v.repeat_interleave(4, dim=1)
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("repeat-kv", SPLIT, inputs=grouped)
def grouped_heads_by_einsum(q: T, k: T, v: T) -> T:
    q = q.view(3, 2, 4, 5, 6)
    p = (torch.einsum("bkgqd,bksd->bkgqs", q, k) * 0.3).softmax(-1)
    return torch.einsum("bkgqs,bksd->bkgqd", p, v).reshape(3, 8, 5, 6)


@plain("repeat-kv", SPLIT, inputs=grouped)
def grouped_heads_by_broadcasting(q: T, k: T, v: T) -> T:
    q = q.view(3, 2, 4, 5, 6)
    p = (q @ k.unsqueeze(2).mT * 0.3).softmax(-1)
    return (p @ v.unsqueeze(2)).reshape(3, 8, 5, 6)


@plain("repeat-kv", GROUPED, inputs=grouped)
def grouped_heads_with_flat_scores(q: T, k: T, v: T) -> T:
    scores = torch.einsum("bkgqd,bksd->bkgqs", q.unflatten(1, (2, 4)), k).flatten(1, 2) * 0.3
    return torch.einsum("bkgqs,bksd->bkgqd", scores.softmax(-1).unflatten(1, (2, 4)), v).flatten(1, 2)


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(6, 1, 4, 6), k=(6, 1, 7, 6), v=(6, 1, 7, 6)),
    inputs=lambda: qkv(batch=3, heads=8, queries=1, width=6, kv_heads=2),
)
def one_new_token_with_grouped_heads_and_flat_scores(q: T, k: T, v: T) -> T:
    # the flat axis holds heads and their groups; with one query, the groups are what is left to be the queries
    scores = torch.einsum("bkgqd,bksd->bkgqs", q.unflatten(1, (2, 4)), k).flatten(1, 2) * 0.3
    return torch.einsum("bkgqs,bksd->bkgqd", scores.softmax(-1).unflatten(1, (2, 4)), v).flatten(1, 2)


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 2, 7, 6), v=(3, 2, 7, 6), groups=4, dense=True, empty_rows="nan"),
    inputs=lambda: (*grouped(), keep(3, 1, 5, 7)),
)
def repeat_kv_under_a_mask(q: T, k: T, v: T, keep: T) -> T:
    k, v = repeat_kv(k, 4), repeat_kv(v, 4)
    return (q @ k.mT * 0.3).masked_fill(~keep, -float("inf")).softmax(-1) @ v


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 2, 7, 6), v=(3, 2, 7, 6), groups=4, bias=((1, 8, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*grouped(), noise(8, 5, 7, seed=5, grad=False)),
)
def grouped_heads_with_a_bias_for_each_query_head(q: T, k: T, v: T, bias: T) -> T:
    q = q.unflatten(1, (2, 4))
    scores = q @ k.unsqueeze(2).mT * 0.3 + bias.view(2, 4, 5, 7)
    return (scores.softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(3, 8, TEXT, 6), k=(3, 2, TEXT, 6), v=(3, 2, TEXT, 6), groups=4),
    inputs=grouped,
    dynamic=({2: Dim.AUTO},) * 3,
    other_sizes=lambda: qkv(batch=3, heads=8, width=6, kv_heads=2, queries=9, keys=13),
)
def repeat_kv_with_dynamic_lengths(q: T, k: T, v: T) -> T:
    k, v = repeat_kv(k, 4), repeat_kv(v, 4)
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 2, 7, 6), v=(3, 2, 7, 6), groups=4),
    inputs=grouped,
)
def key_heads_tiled_instead_of_interleaved(q: T, k: T, v: T) -> T:
    # head h reads key head h % 2, not h // 4: grouped as well, but the query heads come in another order
    k, v = k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1)
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 8, 7, 6), v=(3, 8, 7, 6)),
    inputs=lambda: (*grouped(), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])),
)
def key_heads_picked_by_an_index(q: T, k: T, v: T, pick: T) -> T:
    return (q @ k[:, pick].mT * 0.3).softmax(-1) @ v[:, pick]


@plain(
    "trap 10",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 8, 7, 6), v=(3, 8, 7, 6)),
    inputs=lambda: (*grouped()[:2], noise(3, 8, 7, 6, seed=3)),
)
def only_the_keys_are_shared(q: T, k: T, v: T) -> T:
    return (q @ repeat_kv(k, 4).mT * 0.3).softmax(-1) @ v


@plain(
    "trap 10",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 4, 7, 6), v=(3, 4, 7, 6), groups=2),
    inputs=grouped,
)
def keys_and_values_repeated_in_unlike_ways(q: T, k: T, v: T) -> T:
    # head 4 a + 2 b + c reads key head a and value head c: only b is shared by both
    return (q @ repeat_kv(k, 4).mT * 0.3).softmax(-1) @ v.repeat(1, 4, 1, 1)


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 1, 7, 6), v=(3, 1, 7, 6), groups=8),
    inputs=lambda: qkv(batch=3, heads=8, width=6, kv_heads=1),
)
def one_key_head_by_broadcasting(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(3, 8, 5, 6), k=(3, 1, 7, 6), v=(3, 1, 7, 6), groups=8),
    inputs=lambda: qkv(batch=3, heads=8, width=6, kv_heads=1),
)
def one_key_head_by_expand(q: T, k: T, v: T) -> T:
    k, v = k.expand(3, 8, 7, 6), v.expand_as(k.expand(3, 8, 7, 6))
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain(
    "repeat-kv",
    Site(scale=0.3, q=(3, 1, 40, 6), k=(3, 1, 7, 6), v=(3, 1, 7, 6)),
    inputs=lambda: (noise(3, 8, 5, 6, seed=1), noise(3, 7, 6, seed=2), noise(3, 7, 6, seed=3)),
)
def one_key_head_by_merging_heads_into_queries(q: T, k: T, v: T) -> T:
    # gpt_bigcode: the heads become more queries
    scores = torch.bmm(q.reshape(3, 40, 6), k.mT) * 0.3
    p = scores.view(3, 8, 5, 7).softmax(-1).view(3, 40, 7)
    return torch.bmm(p, v).view(3, 8, 5, 6)


@plain(
    "views",
    Site(scale=0.3),
    inputs=lambda: (*qkv()[:1], noise(3, 7, 8, seed=2), noise(3, 7, 8, seed=3)),
)
def keys_shared_by_the_whole_batch(q: T, k: T, v: T) -> T:
    # learned keys: the batch is an axis that k and v do not have
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain(
    "TensorRT-LLM#4313",
    Site(scale=0.3, q=(2, 3, 5, 12), k=(2, 3, 7, 12), v=(2, 3, 7, 6)),
    inputs=lambda: qkv(width=12, v_width=6),
)
def values_narrower_than_keys(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain(
    "unlike-widths",
    Site(scale=0.3, q=(2, 3, 5, 8), k=(2, 3, 7, 8), v=(2, 3, 7, 10)),
    inputs=lambda: qkv(v_width=10),
)
def values_wider_than_keys(q: T, k: T, v: T) -> T:
    return torch.einsum("bhqk,bhkv->bqhv", (q @ k.mT * 0.3).softmax(-1), v)


@plain(
    "unlike-widths",
    Site(scale=0.3, q=(2, 3, 5, 12), k=(2, 3, 7, 12), v=(2, 3, 7, 6)),
    inputs=lambda: (
        noise(2, 3, 5, 8, seed=1),
        noise(2, 3, 5, 4, seed=6),
        noise(2, 3, 7, 8, seed=2),
        noise(2, 1, 7, 4, seed=7),
        noise(2, 3, 7, 6, seed=3),
    ),
)
def latent_attention_with_a_shared_rotary_part(q: T, q_rot: T, k: T, k_rot: T, v: T) -> T:
    # deepseek: the rotary part of the keys is one for all heads
    q = torch.cat((q, q_rot), dim=-1)
    k = torch.cat((k, k_rot.expand(2, 3, 7, 4)), dim=-1)
    return (torch.matmul(q, k.transpose(2, 3)) * 0.3).softmax(-1) @ v


@plain(
    "unlike-widths",
    Miss("two_score_tensors"),
    inputs=lambda: (
        noise(2, 3, 5, 8, seed=1),
        noise(2, 3, 5, 4, seed=6),
        noise(2, 3, 7, 8, seed=2),
        noise(2, 1, 7, 4, seed=7),
        noise(2, 3, 7, 6, seed=3),
    ),
)
def latent_attention_as_a_sum_of_two_products(q: T, q_rot: T, k: T, k_rot: T, v: T) -> T:
    # the same function; it would need the two widths joined
    return ((q @ k.mT + q_rot @ k_rot.mT) * 0.3).softmax(-1) @ v


@plain("views", *3 * (Site(scale=0.3, q=(2, 1, 5, 8), k=(2, 1, 7, 8), v=(2, 1, 7, 8)),))
def one_head_after_the_other_in_a_loop(q: T, k: T, v: T) -> T:
    outs = [(q[:, h] @ k[:, h].mT * 0.3).softmax(-1) @ v[:, h] for h in range(3)]
    return torch.cat(outs, dim=-1)


@plain("channels", Site(scale=1.0, q=(2, 3, 8, 5), k=(2, 3, 8, 5), v=(2, 3, 8, 5)), inputs=lambda: qkv(keys=5))
def channels_attend_to_channels(q: T, k: T, v: T) -> T:
    # xcit without its temperature: softmax over d x d, mathematically attention with channels in place of tokens
    q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    return ((q @ k.transpose(-2, -1)).softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(2, 5, 24)


@plain(
    "channels",
    Site(scale=TEXT, q=(2, 3, 8, 5), k=(2, 3, 8, 5), v=(2, 3, 8, 5)),
    inputs=lambda: (*qkv(keys=5), noise(3, 1, 1, seed=6)),
)
def channels_attend_to_channels_with_a_temperature(q: T, k: T, v: T, temperature: T) -> T:
    q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
    attn = (torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT) * temperature
    return (attn.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(2, 5, 24)


@plain(
    "blocks",
    Site(scale=0.3, q=(6, 4, 5, 8), k=(6, 4, 5, 8), v=(6, 4, 5, 8)),
    inputs=lambda: (noise(2, 3, 20, 8, seed=1), noise(2, 3, 20, 8, seed=2), noise(2, 3, 20, 8, seed=3)),
)
def attention_inside_chunks(q: T, k: T, v: T) -> T:
    # longformer, led: each chunk of five attends to itself
    q, k, v = (x.view(2, 3, 4, 5, 8) for x in (q, k, v))
    p = (torch.einsum("bhcxd,bhcyd->bhcxy", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhcxy,bhcyd->bhcxd", p, v).reshape(2, 3, 20, 8)


@plain(
    "blocks",
    Miss("two_score_tensors"),
    inputs=lambda: (*qkv(), noise(2, 3, 4, 8, seed=6), noise(2, 3, 4, 8, seed=7)),
)
def scores_of_two_blocks_side_by_side(q: T, k: T, v: T, far_k: T, far_v: T) -> T:
    # big_bird, longt5: local and global scores joined before the softmax
    p = torch.cat((q @ k.mT * 0.3, q @ far_k.mT * 0.3), dim=-1).softmax(-1)
    return p[..., :7] @ v + p[..., 7:] @ far_v


@plain(
    "blocks",
    Site(scale=0.3, q=(2, 3, 1, 8), k=(2, 3, 4, 8), v=(2, 3, 4, 8)),
    inputs=lambda: (noise(2, 3, 8, seed=1), noise(2, 3, 4, 8, seed=2), noise(2, 3, 4, 8, seed=3)),
)
def one_query_on_a_gathered_neighbourhood(q: T, k: T, v: T) -> T:
    scores = (q.unsqueeze(-2) @ k.mT).squeeze(-2) * 0.3
    return (scores.softmax(-1).unsqueeze(-2) @ v).squeeze(-2)


@plain(
    "blocks",
    Site(scale=0.3, q=(6, 5, 1, 8), k=(6, 5, 4, 8), v=(6, 5, 4, 8)),
    inputs=lambda: (noise(2, 3, 5, 8, seed=1), noise(2, 3, 5, 4, 8, seed=2), noise(2, 3, 5, 4, 8, seed=3)),
)
def neighbourhood_attention_by_einsum(q: T, k: T, v: T) -> T:
    # every query has keys and values of its own: attention with one query, and the positions are more batch
    p = (torch.einsum("bhqd,bhqnd->bhqn", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhqn,bhqnd->bhqd", p, v)
