"""In-place operations, aliases and second readers: what may be crossed, and what must stop the pass."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.case import Built, Miss, Site, T, case, keep, noise, plain, qkv, with_bias, with_keep

INF = float("inf")
USED = Site(scale=0.3, replaced=False, reason="weights_used")


# -- operands written ------------------------------------------------------------------------------------------------


@plain("trap 2", Miss("mutated"), inputs=lambda: qkv(grad=False))
def queries_written_between_product_and_softmax(q: T, k: T, v: T) -> T:
    q = q.clone()
    scores = q @ k.mT * 0.3
    q.add_(1.0)
    return scores.softmax(-1) @ v + q


@plain("trap 2", Miss("mutated"), inputs=lambda: qkv(grad=False))
def keys_written_through_a_view_between_the_products(q: T, k: T, v: T) -> T:
    k = k.clone()
    row = k[:, :, 0]
    scores = q @ k.mT * 0.3
    row.mul_(2.0)
    return scores.softmax(-1) @ v + k.sum()


@plain("trap 2", Site(scale=0.3), inputs=lambda: qkv(grad=False))
def queries_written_after_the_attention(q: T, k: T, v: T) -> T:
    q = q.clone()
    out = (q @ k.mT * 0.3).softmax(-1) @ v
    q.add_(1.0)
    return out + q


@plain("trap 2", Site(scale=0.3))
def queries_written_before_the_attention(q: T, k: T, v: T) -> T:
    q = q.clone()
    q.add_(1.0)
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("in-place", Miss("mutated"))
def keys_written_before_they_are_read_through_an_older_view(q: T, k: T, v: T) -> T:
    # harmless, but to know that takes tracking of memory through views: refused
    k = k.clone()
    kt = k.mT
    k.mul_(2.0)
    return (q @ kt * 0.3).softmax(-1) @ v


@plain("in-place", Site(scale=0.3))
def values_written_before_the_second_product(q: T, k: T, v: T) -> T:
    v = v.clone()
    p = (q @ k.mT * 0.3).softmax(-1)
    v.add_(1.0)
    return p @ v


class Cache(nn.Module):
    """A static key/value cache: new keys are written into a buffer, then the whole buffer is read."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(8)))
        self.register_buffer("values", torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(9)))
        self.late = late

    def forward(self, q: T, k: T, v: T) -> T:
        at = torch.tensor([2])
        if not self.late:
            self.keys.index_copy_(2, at, k)
            self.values.index_copy_(2, at, v)
        scores = q @ self.keys.mT * 0.3
        if self.late:
            self.keys.index_copy_(2, at, k)
        return scores.softmax(-1) @ self.values


def step() -> tuple[T, T, T]:
    return tuple(noise(2, 3, 1, 8, seed=i, grad=False) for i in (1, 2, 3))  # type: ignore[return-value]


@case("in-place", Site(scale=0.3, q=(2, 3, 1, 8)))
def a_cache_written_before_it_is_read() -> Built:
    return Cache(), step()


@case("trap 2", Miss("mutated"))
def a_cache_written_between_the_products() -> Built:
    return Cache(late=True), step()


class Counter(nn.Module):
    """A buffer that the model updates on every call, beside the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, q: T, k: T, v: T) -> T:
        self.calls += 1
        out = (q @ k.mT * 0.3).softmax(-1) @ v
        self.mean.mul_(0.9).add_(out.detach().mean((0, 1, 2)), alpha=0.1)
        return out


@case("trap 1", Site(scale=0.3))
def buffers_updated_beside_the_attention() -> Built:
    return Counter(), qkv()


# -- scores and masks written ------------------------------------------------------------------------------------------


@plain("trap 2", Miss("mutated"))
def part_of_the_scores_set(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    scores[..., 3:] = -1e9
    return scores.softmax(-1) @ v


@plain("trap 2", Miss("mutated"), inputs=lambda: qkv(queries=7))
def the_diagonal_of_the_scores_filled(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    scores.diagonal(dim1=-2, dim2=-1).fill_(-INF)
    return scores.softmax(-1) @ v


@plain("trap 1", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 1, 5, 7))
def a_fill_in_place_whose_result_is_not_used(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT
    scores.mul_(0.3)
    torch.Tensor.masked_fill_(scores, ~keep, -INF)
    return torch.softmax(scores, -1) @ v


@plain("trap 1", Miss("unknown_op"), inputs=lambda: qkv(grad=False))
def scores_written_by_an_out_argument(q: T, k: T, v: T) -> T:
    # the product is read before torch.mul writes the scaled scores over it
    scores = q @ k.mT
    torch.mul(scores, 0.3, out=scores)
    return scores.softmax(-1) @ v


@plain("trap 2", Miss("mutated"), inputs=with_keep(2, 1, 5, 7))
def scores_masked_through_a_flat_alias(q: T, k: T, v: T, keep: T) -> T:
    scores = q @ k.mT * 0.3
    scores.view(6, 5, 7).masked_fill_(~keep.expand(2, 3, 5, 7).reshape(6, 5, 7), -INF)
    return scores.softmax(-1) @ v


@plain("trap 2", Miss("mutated"), inputs=lambda: (*qkv(grad=False), keep(2, 1, 5, 7)))
def the_mask_is_written_after_it_was_used(q: T, k: T, v: T, keep: T) -> T:
    mask = ~keep
    p = (q @ k.mT * 0.3).masked_fill(mask, -INF).softmax(-1)
    mask.logical_not_()
    return p @ v + mask.sum()


@plain("trap 2", Miss("mutated"))
def the_weights_are_written_in_place(q: T, k: T, v: T) -> T:
    p = (q @ k.mT * 0.3).softmax(-1).clone()
    p[..., 0] = 0.0
    return p @ v


@plain("in-place", Site(scale=0.3))
def the_output_is_written_in_place(q: T, k: T, v: T) -> T:
    out = (q @ k.mT * 0.3).softmax(-1) @ v
    out.add_(1.0).mul_(0.5)
    return out


@plain("in-place", Site(scale=0.3), inputs=lambda: (*qkv(grad=False), torch.zeros(2, 3, 5, 8)))
def the_output_is_copied_into_an_input(q: T, k: T, v: T, into: T) -> T:
    into.copy_((q @ k.mT * 0.3).softmax(-1) @ v)
    return into * 2


@plain("in-place", Site(scale=0.3, dense=True, empty_rows="nan"), inputs=with_keep(2, 1, 5, 7))
def scores_scaled_and_masked_by_a_chain_in_place(q: T, k: T, v: T, keep: T) -> T:
    return (q @ k.mT).mul_(0.3).masked_fill_(keep.logical_not(), -INF).softmax(-1) @ v


# -- scores copied over ------------------------------------------------------------------------------------------------

BIASED = Site(scale=0.3, bias=((2, 3, 5, 7),), empty_rows="nan")


@plain("in-place", BIASED, inputs=with_bias(2, 3, 5, 7))
def the_whole_of_the_scores_set_to_their_sum_with_a_bias(q: T, k: T, v: T, bias: T) -> T:
    # mvitv2 without a class token: the slice that is set is everything
    scores = q @ k.mT * 0.3
    scores[:, :, 0:, 0:] = scores[:, :, 0:, 0:] + bias
    return scores.softmax(-1) @ v


@plain("in-place", Site(scale=0.3))
def the_scores_are_copied_into_memory(q: T, k: T, v: T) -> T:
    held = torch.zeros(2, 3, 5, 7, dtype=q.dtype).copy_(q @ k.mT)
    return (held * 0.3).softmax(-1) @ v


@plain("in-place", Site(scale=0.3, k=(2, 3, 7, 8)), inputs=lambda: (*qkv(heads=1)[:2], qkv()[2]))
def the_scores_of_one_head_are_copied_into_three(q: T, k: T, v: T) -> T:
    held = torch.zeros(2, 3, 5, 7, dtype=q.dtype)
    held.copy_(q @ k.mT * 0.3)
    return held.softmax(-1) @ v


@plain("in-place", Miss("mutated"))
def the_scores_are_copied_into_part_of_memory(q: T, k: T, v: T) -> T:
    held = torch.zeros(2, 3, 5, 9, dtype=q.dtype)
    held[..., 1:8].copy_(q @ k.mT * 0.3)
    return held[..., 1:8].softmax(-1) @ v


# -- second readers ----------------------------------------------------------------------------------------------------


@plain("weights-used", USED)
def the_weights_are_returned(q: T, k: T, v: T) -> tuple[T, T]:
    p = (q @ k.mT * 0.3).softmax(-1)
    return p @ v, p


@plain("weights-used", USED)
def the_weights_are_averaged_over_heads(q: T, k: T, v: T) -> tuple[T, T]:
    p = (q @ k.mT * 0.3).softmax(-1)
    return p @ v, p.mean(1)


@plain("trap 10", USED)
def the_scores_are_returned(q: T, k: T, v: T) -> tuple[T, T]:
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v, scores


@plain("trap 10", USED)
def the_raw_product_has_a_second_reader(q: T, k: T, v: T) -> tuple[T, T]:
    product = q @ k.mT
    return (product * 0.3).softmax(-1) @ v, product.amax(dim=-1)


@plain(
    "weights-used",
    Site(scale=0.3, dense=True, empty_rows="nan", replaced=False, reason="weights_used"),
    inputs=with_keep(2, 1, 5, 7),
)
def the_masked_scores_are_ranked(q: T, k: T, v: T, keep: T) -> tuple[T, T]:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -INF)
    return scores.softmax(-1) @ v, scores.topk(2, dim=-1).indices


@plain("weights-used", USED, inputs=lambda: (*qkv(), noise(2, 3, 7, 8, seed=6)))
def the_weights_meet_two_sets_of_values(q: T, k: T, v: T, w: T) -> tuple[T, T]:
    p = (q @ k.mT * 0.3).softmax(-1)
    return p @ v, p @ w


@plain("weights-used", USED, inputs=lambda: (*qkv(), noise(5, 7, 8, seed=6)))
def relative_values_are_added(q: T, k: T, v: T, r: T) -> T:
    # shaw et al.: a second term with values for each pair of positions
    p = (q @ k.mT * 0.3).softmax(-1)
    return p @ v + torch.einsum("bhqk,qkd->bhqd", p, r)


@plain("weights-used", Site(scale=0.3))
def the_shape_of_the_scores_is_no_reader(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    return (scores.softmax(-1) @ v) * scores.shape[-1] + scores.size(2)


@plain("weights-used", Site(scale=0.3))
def weights_computed_for_nobody(q: T, k: T, v: T) -> T:
    p = (q @ k.mT * 0.3).softmax(-1)
    p.mean(1)
    return p @ v


@plain("weights-used", Miss("graph_output"), inputs=lambda: qkv()[:2])
def only_the_weights_are_returned(q: T, k: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1)


# -- dropout -----------------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Dropout on the probabilities, the scores, or both."""

    def __init__(self, p: float = 0.1, *, scores: bool = False, twice: bool = False, weights: bool = False) -> None:
        super().__init__()
        self.drop, self.scores, self.twice, self.weights = nn.Dropout(p), scores, twice, weights

    def forward(self, q: T, k: T, v: T) -> T | tuple[T, T]:
        s = q @ k.mT * 0.3
        if self.scores:
            return self.drop(s).softmax(-1) @ v
        p = self.drop(s.softmax(-1))
        if self.twice:
            p = self.drop(p)
        return (p @ v, p) if self.weights else p @ v


@case("dropout", Site(scale=0.3))
def dropout_in_evaluation() -> Built:
    return Dropout(), qkv()


@case("dropout", Site(scale=0.3, dropout=0.1, replaced=False, reason="no_kernel"), train=True, reference="eager")
def dropout_in_training() -> Built:
    return Dropout(), qkv()


@case("dropout", Site(scale=0.3), train=True)
def dropout_of_probability_zero_in_training() -> Built:
    return Dropout(0.0), qkv()


@case("dropout", Miss("nonlinear_scores"), train=True, reference="eager")
def dropout_on_the_scores_in_training() -> Built:
    return Dropout(scores=True), qkv()


@case("dropout", Site(scale=0.3))
def dropout_on_the_scores_in_evaluation() -> Built:
    return Dropout(scores=True), qkv()


@case("dropout", Miss("probabilities_changed"), train=True, reference="eager")
def dropout_twice_in_training() -> Built:
    return Dropout(twice=True), qkv()


@case(
    "dropout",
    Site(scale=0.3, dropout=0.1, replaced=False, reason="weights_used_dropout"),
    train=True,
    reference="eager",
)
def dropped_weights_are_returned() -> Built:
    return Dropout(weights=True), qkv()


@plain("dropout", Site(scale=0.3, dropout=0.2, replaced=False, reason="no_kernel"), reference="eager")
def dropout_that_never_sleeps(q: T, k: T, v: T) -> T:
    return torch.nn.functional.dropout((q @ k.mT * 0.3).softmax(-1), 0.2) @ v


@plain("dropout", Miss("probabilities_changed"), reference="eager")
def dropout_of_whole_heads(q: T, k: T, v: T) -> T:
    return torch.nn.functional.dropout2d((q @ k.mT * 0.3).softmax(-1), 0.5, training=True) @ v


@plain(
    "dropout",
    Site(scale=0.3, dense=True, empty_rows="mean", assumed=True),
    inputs=lambda: qkv(grad=False),
    reference="eager",
)
def keys_dropped_by_a_random_mask(q: T, k: T, v: T) -> T:
    # DropKey: an ordinary mask that happens to be random
    off = torch.rand(2, 3, 5, 7) < 0.2
    return (q @ k.mT * 0.3).masked_fill(off, -1e12).softmax(-1) @ v
