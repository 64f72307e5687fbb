"""What looks like attention and is none, or is attention of a kind that no fused kernel computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import Built, Miss, Site, T, case, keep, noise, plain, qkv, with_keep


def square() -> tuple[T, T, T]:
    return qkv(queries=7)


def tokens() -> tuple[T]:
    return (noise(2, 7, 24, seed=1),)


class Lambda(nn.Module):
    """Layers by name and a function of them: for look-alikes that need weights."""

    def __init__(self, forward: object, **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: T) -> T:
        return self.function(self, *args)  # type: ignore[operator,no-any-return]


# -- between softmax and values --------------------------------------------------------------------------------------


@plain("changed-weights", Miss("probabilities_changed"), inputs=lambda: (*qkv(), noise(3, 1, 1, seed=5)))
def a_gate_on_the_weights(q: T, k: T, v: T, gate: T) -> T:
    return ((q @ k.mT * 0.3).softmax(-1) * gate.sigmoid()) @ v


@plain("changed-weights", Miss("probabilities_changed"), inputs=lambda: (*qkv(), noise(5, 7, seed=5)))
def convit_mixes_the_weights_with_positions(q: T, k: T, v: T, position: T) -> T:
    # position weights come from outside here, so that there is one softmax
    return (0.7 * (q @ k.mT * 0.3).softmax(-1) + 0.3 * position) @ v


@plain("changed-weights", Miss("probabilities_changed"))
def weights_normalised_again(q: T, k: T, v: T) -> T:
    p = (q @ k.mT * 0.3).softmax(-1) + 1e-3
    return (p / p.sum(-1, keepdim=True)) @ v


@plain("changed-weights", Miss("probabilities_changed"), inputs=with_keep(2, 1, 5, 7))
def weights_multiplied_by_a_mask(q: T, k: T, v: T, keep: T) -> T:
    return ((q @ k.mT * 0.3).softmax(-1) * keep) @ v


@plain("changed-weights", Miss("probabilities_changed"), inputs=with_keep(2, 1, 5, 7, empty=True), grad=False)
def cpmant_fills_weights_with_zero(q: T, k: T, v: T, keep: T) -> T:
    p = (q @ k.mT * 0.3).masked_fill(~keep, -float("inf")).softmax(-1)
    return p.masked_fill(~keep, 0.0) @ v


@plain("tt-mlir#6335", Miss("probabilities_changed"), inputs=with_keep(2, 1, 5, 7, empty=True), grad=False)
def nan_weights_replaced_by_zero(q: T, k: T, v: T, keep: T) -> T:
    # a guard for rows without keys; the best of tools would see a softmax that answers zero there
    return torch.nan_to_num((q @ k.mT * 0.3).masked_fill(~keep, -float("inf")).softmax(-1), 0.0) @ v


@plain(
    "changed-weights",
    *2 * (Miss("probabilities_changed"),),
    inputs=lambda: (*qkv(), noise(2, 3, 5, 8, seed=5), noise(2, 3, 7, 8, seed=6)),
)
def differential_attention_subtracts_two_maps(q: T, k: T, v: T, q2: T, k2: T) -> T:
    return ((q @ k.mT * 0.3).softmax(-1) - 0.8 * (q2 @ k2.mT * 0.3).softmax(-1)) @ v


@plain(
    "changed-weights",
    *2 * (Site(scale=0.3),),
    inputs=lambda: (*qkv(), noise(2, 3, 5, 8, seed=5), noise(2, 3, 7, 8, seed=6)),
)
def diffllama_subtracts_after_the_values(q: T, k: T, v: T, q2: T, k2: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v - 0.8 * ((q2 @ k2.mT * 0.3).softmax(-1) @ v)


@plain("changed-weights", Miss("probabilities_changed"))
def weights_squared(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1).pow(2) @ v


@plain(
    "changed-weights",
    Miss("probabilities_changed"),
    inputs=lambda: (noise(6, 5, 8, seed=1), noise(6, 7, 8, seed=2), noise(6, 7, 8, seed=3), noise(6, 5, 8, seed=4)),
)
def values_joined_with_a_residual_by_baddbmm(q: T, k: T, v: T, r: T) -> T:
    return torch.baddbmm(r, (torch.bmm(q, k.mT) * 0.3).softmax(-1), v)


@plain("trap 3", Miss("not_a_query_key_product"), inputs=lambda: square()[:2])
def weights_multiplied_with_themselves(q: T, k: T) -> T:
    p = (q @ k.mT * 0.3).softmax(-1)
    return p @ p


# -- mixed heads -----------------------------------------------------------------------------------------------------


def talking(module: nn.Module, q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    if hasattr(module, "before"):
        scores = module.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    p = scores.softmax(-1)
    if hasattr(module, "after"):
        p = module.after(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return p @ v


@case("talking-heads", Miss("mixes_heads"))
def cait_mixes_heads_before_the_softmax() -> Built:
    return Lambda(talking, before=nn.Linear(3, 3)), qkv()


@case("talking-heads", Miss("mixes_heads"))
def cait_mixes_heads_after_the_softmax() -> Built:
    return Lambda(talking, after=nn.Linear(3, 3)), qkv()


@case("talking-heads", Miss("mixes_heads"))
def a_convolution_over_heads() -> Built:
    return Lambda(lambda m, q, k, v: m.mix(q @ k.mT * 0.3).softmax(-1) @ v, mix=nn.Conv2d(3, 3, 1)), qkv()


@plain("talking-heads", Miss("mixes_heads"), inputs=lambda: (*qkv(), noise(3, 3, seed=5)))
def deepvit_mixes_heads_by_einsum_after_the_softmax(q: T, k: T, v: T, w: T) -> T:
    p = (q @ k.mT * 0.3).softmax(-1)
    return torch.einsum("bhij,hg->bgij", p, w) @ v


@plain("talking-heads", Miss("mixes_heads"), inputs=lambda: (*qkv(), noise(3, 3, seed=5)))
def heads_mixed_by_einsum_before_the_softmax(q: T, k: T, v: T, w: T) -> T:
    return torch.einsum("bhij,hg->bgij", q @ k.mT * 0.3, w).softmax(-1) @ v


# -- no attention ----------------------------------------------------------------------------------------------------


def route(module: nn.Module, x: T) -> T:
    weights, index = module.gate(x).softmax(-1).topk(2, dim=-1)
    experts = torch.stack([module.a(x), module.b(x), module.c(x)], dim=-2)
    picked = torch.gather(experts, -2, index.unsqueeze(-1).expand(*index.shape, 24))
    return (weights.unsqueeze(-1) * picked).sum(-2)


@case("not-attention", Miss("projected_scores"))
def a_router_of_a_mixture_of_experts() -> Built:
    layers = {name: nn.Linear(24, 24) for name in "abc"}
    return Lambda(route, gate=nn.Linear(24, 3), **layers), tokens()


@case("not-attention", Miss("projected_scores"))
def a_classifier() -> Built:
    return Lambda(lambda m, x: m.head(x.mean(1)).softmax(-1), head=nn.Linear(24, 9)), tokens()


@case("not-attention", Miss("projected_scores"))
def a_soft_mixture_of_all_experts() -> Built:
    def forward(m: nn.Module, x: T) -> T:
        experts = torch.stack([m.a(x), m.b(x)], dim=-2)
        return torch.einsum("bte,bted->btd", m.gate(x).softmax(-1), experts)

    return Lambda(forward, gate=nn.Linear(24, 2), a=nn.Linear(24, 24), b=nn.Linear(24, 24)), tokens()


def sample(module: nn.Module, x: T, image: T) -> T:
    where = module.offsets(x).view(2, 7, 4, 2).tanh()
    weights = module.weights(x).softmax(-1)
    found = F.grid_sample(image, where, align_corners=False)
    return (found * weights.unsqueeze(1)).sum(-1).mT


@case("not-attention", Miss("projected_scores"))
def deformable_attention_samples_an_image() -> Built:
    return Lambda(sample, offsets=nn.Linear(24, 8), weights=nn.Linear(24, 4)), (*tokens(), noise(2, 6, 9, 5, seed=2))


@plain("not-attention", Miss("no_product_before"), inputs=lambda: (noise(2, 7, 6, seed=1), noise(9, 6, seed=2)))
def a_codebook_by_distances(x: T, book: T) -> T:
    return (-torch.cdist(x, book.expand(2, 9, 6))).softmax(-1) @ book


@plain(
    "not-attention",
    Miss("probabilities_changed"),
    inputs=square,
)
def sinkhorn_normalises_rows_and_columns(q: T, k: T, v: T) -> T:
    p = (q @ k.mT * 0.3).softmax(-1)
    p = p / p.sum(-2, keepdim=True)
    p = p / p.sum(-1, keepdim=True)
    return p @ v


@case("not-attention", Miss("projected_scores"))
def attention_pooling_over_the_sequence() -> Built:
    return Lambda(lambda m, x: (m.score(x).softmax(1) * x).sum(1), score=nn.Linear(24, 1)), tokens()


@case("not-attention", Miss("projected_scores"))
def additive_attention_of_bahdanau() -> Built:
    def forward(m: nn.Module, x: T) -> T:
        scores = m.v(torch.tanh(m.a(x).unsqueeze(2) + m.b(x).unsqueeze(1))).squeeze(-1)
        return scores.softmax(-1) @ x

    return Lambda(forward, a=nn.Linear(24, 6), b=nn.Linear(24, 6), v=nn.Linear(6, 1)), tokens()


@plain(
    "not-attention",
    Miss("no_product_before"),
    inputs=lambda: (noise(2, 7, 1, seed=1), noise(2, 7, 1, seed=2), noise(2, 7, 8, seed=3)),
)
def graph_attention_adds_two_scores(a: T, b: T, v: T) -> T:
    return F.leaky_relu(a + b.mT).softmax(-1) @ v


@case("not-attention", *2 * (Miss("projected_scores"),))
def efficient_attention_with_two_softmaxes() -> Built:
    # softmax on q and on k separately: a linear attention
    def forward(m: nn.Module, x: T) -> T:
        return m.q(x).softmax(-1) @ (m.k(x).softmax(1).mT @ x)

    return Lambda(forward, q=nn.Linear(24, 6), k=nn.Linear(24, 6)), tokens()


@case("not-attention", Miss("projected_scores"))
def external_attention_over_learned_units() -> Built:
    return Lambda(lambda m, x: m.values(m.keys(x).softmax(1)), keys=nn.Linear(24, 6), values=nn.Linear(6, 24)), tokens()


@plain(
    "not-attention",
    Miss("probabilities_changed"),
    inputs=lambda: (noise(2, 4, 8, seed=1), noise(2, 7, 8, seed=2), noise(2, 7, 8, seed=3)),
)
def slot_attention_normalises_over_slots_and_then_over_inputs(q: T, k: T, v: T) -> T:
    p = (k @ q.mT * 0.3).softmax(-1)
    p = p / p.sum(dim=-2, keepdim=True)
    return p.mT @ v


@plain(
    "not-attention",
    Miss("softmax_not_over_keys"),
    inputs=lambda: (noise(2, 4, 8, seed=1), noise(2, 7, 8, seed=2), noise(2, 7, 8, seed=3)),
)
def groupvit_assigns_inputs_to_groups(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(dim=-2) @ v


@plain("not-attention", Miss("graph_output"), inputs=lambda: (noise(5, 8, seed=1), noise(7, 8, seed=2)))
def contrastive_scores_of_images_and_texts(image: T, text: T) -> T:
    return (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).t() * 0.3).softmax(-1)


@plain("not-attention", Miss("no_product_after"))
def the_best_key_is_picked(q: T, k: T, v: T) -> T:
    best = (q @ k.mT * 0.3).softmax(-1).argmax(-1, keepdim=True)
    return torch.gather(v, 2, best.expand(-1, -1, -1, 8))


@plain("not-attention", Miss("graph_input"), inputs=lambda: (noise(2, 3, 5, 7, seed=1), qkv()[2]))
def scores_that_come_from_outside(scores: T, v: T) -> T:
    return scores.softmax(-1) @ v


@plain(
    "not-attention",
    Site(scale=0.3, q=(1, 2, 5, 6), k=(1, 1, 9, 6), v=(1, 1, 9, 6), groups=2),
    inputs=lambda: (noise(2, 5, 6, seed=1), noise(9, 6, seed=2)),
)
def a_codebook_by_products_is_attention_to_its_entries(x: T, book: T) -> T:
    # hopfield: keys and values are one table that knows neither batch nor heads
    return (x @ book.t() * 0.3).softmax(-1) @ book


@plain("not-attention")
def linear_attention_has_no_softmax(q: T, k: T, v: T) -> T:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)


@plain("not-attention", Miss("softmax_not_over_keys"), inputs=lambda: (*qkv(), keep(2, 3, 5)))
def weights_summed_without_values(q: T, k: T, v: T, query: T) -> T:
    p = (q @ k.mT * 0.3).softmax(-1)
    return (p * query.unsqueeze(-1)).sum(-2) + v.sum()
