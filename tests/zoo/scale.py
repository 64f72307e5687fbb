"""The scale, in every place and form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from tests.zoo.case import TEXT, Built, Miss, Site, T, case, half, noise, plain, qkv, with_bias


@plain("mul-softmax", Site(scale=0.3))
def scores_times_a_number(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("mul-softmax", Site(scale=0.3))
def a_number_times_scores(q: T, k: T, v: T) -> T:
    return (0.3 * (q @ k.mT)).softmax(-1) @ v


@plain("div", Site(scale=8**-0.5))
def scores_over_the_root_of_the_width(q: T, k: T, v: T) -> T:
    return F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1)), dim=-1) @ v


@plain("div", Site(scale=1 / 3))
def scores_over_an_integer(q: T, k: T, v: T) -> T:
    return F.softmax(torch.div(q @ k.mT, 3), dim=-1) @ v


@plain("mul-softmax", Site(scale=1.0))
def no_scale_at_all(q: T, k: T, v: T) -> T:
    return (q @ k.mT).softmax(-1) @ v


@plain("scaled-query", Site(scale=0.3))
def query_times_a_number(q: T, k: T, v: T) -> T:
    q = q * 0.3
    return (q @ k.mT).softmax(-1) @ v


@plain("scaled-query", Site(scale=0.3))
def key_times_a_number(q: T, k: T, v: T) -> T:
    return (q @ (0.3 * k).mT).softmax(-1) @ v


@plain("scaled-query", Site(scale=0.3))
def transposed_key_times_a_number(q: T, k: T, v: T) -> T:
    return (q @ (k.mT * 0.3)).softmax(-1) @ v


@plain("scaled-query", Site(scale=1 / 2.5))
def query_over_a_number(q: T, k: T, v: T) -> T:
    return ((q / 2.5) @ k.mT).softmax(-1) @ v


@plain("tt-mlir#6335", Site(scale=8**-0.5))
def both_operands_by_the_fourth_root(q: T, k: T, v: T) -> T:
    root = q.size(-1) ** -0.25
    return ((q * root) @ (k * root).mT).softmax(-1) @ v


@plain("scaled-query", Site(scale=0.125))
def scale_split_between_query_and_scores(q: T, k: T, v: T) -> T:
    return ((q * 0.5) @ k.mT * 0.25).softmax(-1) @ v


@plain("pytorch#174049", Site(scale=2.5))
def a_scale_that_is_not_the_usual_one(q: T, k: T, v: T) -> T:
    return torch.mul(q @ k.mT, 2.5).softmax(-1) @ v


@plain("trap 10", Site(scale=-0.3))
def a_negative_scale(q: T, k: T, v: T) -> T:
    return (q @ k.mT * -0.3).softmax(-1) @ v


@plain("trap 10", Site(scale=-0.5))
def softmin_is_a_softmax_of_minus_scores(q: T, k: T, v: T) -> T:
    return F.softmin(q @ k.mT * 0.5, dim=-1) @ v


@plain("pytorch#191203", Site(scale=0.3))
def scale_as_a_tensor_made_on_the_spot(q: T, k: T, v: T) -> T:
    return (q @ k.mT * torch.tensor(0.3)).softmax(-1) @ v


@plain("pytorch#191203", Site(scale=8**-0.5))
def scores_over_the_root_of_a_filled_tensor(q: T, k: T, v: T) -> T:
    # gpt2 of transformers
    return (q @ k.mT / torch.full([], v.size(-1) ** 0.5, dtype=q.dtype)).softmax(-1) @ v


@plain("pytorch#191203", Site(scale=8**-0.5))
def scores_over_torch_sqrt_of_a_tensor(q: T, k: T, v: T) -> T:
    # deberta of transformers
    return (q @ k.mT / torch.sqrt(torch.tensor(q.size(-1), dtype=torch.float))).softmax(-1) @ v


class Scaled(nn.Module):
    """The scale is a tensor that the module owns."""

    def __init__(self, shape: tuple[int, ...], *, learned: bool, on: str = "scores", divide: bool = False) -> None:
        super().__init__()
        value = 0.3 + 0.1 * torch.rand(shape, generator=torch.Generator().manual_seed(9))
        if learned:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)
        self.on, self.divide = on, divide

    def forward(self, q: T, k: T, v: T) -> T:
        if self.on == "query":
            return ((q * self.scale) @ k.mT).softmax(-1) @ v
        scores = q @ k.mT
        scores = scores / self.scale if self.divide else self.scale * scores
        return scores.softmax(-1) @ v


@case("pytorch#191203", Site(scale=TEXT))
def scale_as_a_buffer() -> Built:
    return Scaled((), learned=False), qkv()


@case("learned-scale", Site(scale=TEXT))
def scale_as_a_learned_scalar() -> Built:
    return Scaled((), learned=True), qkv()


@case("learned-scale", Site(scale=TEXT))
def a_learned_temperature_divides() -> Built:
    return Scaled((1,), learned=True, divide=True), qkv()


@case("learned-scale", Site(scale=TEXT))
def a_learned_scale_of_shape_one_one_one_one() -> Built:
    return Scaled((1, 1, 1, 1), learned=True), qkv()


@case("learned-scale", Site(scale=TEXT))
def a_learned_scale_for_each_head() -> Built:
    return Scaled((3, 1, 1), learned=True), qkv()


@case("learned-scale", Site(scale=TEXT))
def each_head_divided_by_a_buffer() -> Built:
    return Scaled((1, 3, 1, 1), learned=False, divide=True), qkv()


@case("learned-scale", Site(scale=1.0))
def a_learned_gain_on_the_query_is_part_of_the_query() -> Built:
    return Scaled((8,), learned=True, on="query"), qkv()


@case("learned-scale", Site(scale=TEXT))
def a_temperature_for_each_query() -> Built:
    return Scaled((5, 1), learned=True), qkv()


@case("learned-scale", Site(scale=TEXT))
def a_weight_for_each_key_before_the_softmax() -> Built:
    return Scaled((7,), learned=True), qkv()


@case("pytorch#195412", Miss("score_weights"))
def a_weight_for_each_score() -> Built:
    return Scaled((5, 7), learned=True), qkv()


class Cosine(nn.Module):
    """swinv2: normalised queries and keys, a clamped exponential for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(3, 1, 1)) * torch.tensor([[[0.5]], [[1.0]], [[3.0]]]))

    def forward(self, q: T, k: T, v: T, bias: T) -> T:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=math.log(1 / 0.01)).exp()
        return F.softmax(scores + bias.unsqueeze(0), dim=-1) @ v


@case("learned-scale", Site(scale=TEXT, bias=((1, 3, 5, 7),), empty_rows="nan"))
def swinv2_cosine_attention_with_a_bias() -> Built:
    return Cosine(), with_bias(3, 5, 7)()


def qk(**sizes: int) -> tuple[T, T]:
    return qkv(**sizes)[:2]


@plain(
    "pytorch#194444",
    Site(q=(2, 3, 5, TEXT), k=(2, 3, 7, TEXT), v=(2, 3, 7, TEXT), scale=TEXT),
    inputs=qk,
    dynamic=({3: Dim.AUTO}, {3: Dim.AUTO}),
    other_sizes=lambda: qk(width=12),
)
def a_symbolic_scale(q: T, k: T) -> T:
    return (q @ k.mT * q.size(-1) ** -0.5).softmax(-1) @ k


@plain(
    "pytorch#194444",
    Site(q=(2, 3, 5, TEXT), k=(2, 3, 7, TEXT), v=(2, 3, 7, TEXT), scale=TEXT),
    inputs=qk,
    dynamic=({3: Dim.AUTO}, {3: Dim.AUTO}),
    other_sizes=lambda: qk(width=12),
)
def scores_over_a_symbolic_root(q: T, k: T) -> T:
    return (q @ k.mT / q.size(-1) ** 0.5).softmax(-1) @ k


@plain(
    "pytorch#194444",
    Site(q=(2, 3, TEXT, 8), k=(2, 3, TEXT, 8), v=(2, 3, TEXT, 8), scale=TEXT),
    dynamic=({2: Dim.AUTO},) * 3,
    other_sizes=lambda: qkv(queries=4, keys=9),
)
def a_scale_that_depends_on_the_length(q: T, k: T, v: T) -> T:
    return ((q * 2.0) @ k.mT / k.size(2) ** 0.5).softmax(-1) @ v


@plain("in-place", Site(scale=0.3))
def scores_times_a_number_in_place(q: T, k: T, v: T) -> T:
    scores = q @ k.mT
    scores *= 0.3
    return scores.softmax(-1) @ v


@plain("in-place", Site(scale=8**-0.5))
def scores_divided_in_place_by_name(q: T, k: T, v: T) -> T:
    scores = torch.matmul(q, k.mT)
    scores.div_(math.sqrt(8))
    return scores.softmax(-1) @ v


@plain("scaled-query", Site(scale=0.3))
def a_uniform_constant_changes_nothing(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3 - 4.0).softmax(-1) @ v


@plain("scaled-query", Site(scale=0.3))
def scale_by_a_power_of_the_width(q: T, k: T, v: T) -> T:
    return (q @ k.mT).mul(0.09**0.5).softmax(-1) @ v


@plain("casts", Site(scale=8**-0.5, dtype="bfloat16", softmax_dtype="float32"), inputs=half)
def scale_after_the_cast_to_float32(q: T, k: T, v: T) -> T:
    scores = (q @ k.mT).float() * (q.size(-1) ** -0.5)
    return scores.softmax(-1).to(q.dtype) @ v


@plain("trap 10", Miss("nonlinear_scores"))
def scores_times_scores(q: T, k: T, v: T) -> T:
    scores = q @ k.mT
    return (scores * scores).softmax(-1) @ v


@plain("trap 10", Miss("unknown_op"))
def a_number_over_the_scores(q: T, k: T, v: T) -> T:
    return (1.0 / ((q @ k.mT).abs() + 1.0)).softmax(-1) @ v


@plain("pytorch#179578", Site(scale=8**-0.5, dtype="bfloat16", softmax_dtype="bfloat16"), inputs=half)
def everything_in_bfloat16(q: T, k: T, v: T) -> T:
    return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v


@plain(
    "learned-scale",
    Site(scale=TEXT, q=(2, 3, 5, 8)),
    inputs=lambda: (*qkv(), noise(2, 3, 5, 1, seed=6)),
)
def a_temperature_computed_from_the_input(q: T, k: T, v: T, t: T) -> T:
    return ((q @ k.mT) * t.sigmoid()).softmax(-1) @ v
