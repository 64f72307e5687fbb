"""Every spelling of softmax, and the axis it runs over."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import Built, Miss, Site, T, case, half, noise, plain, qkv, with_keep


def square() -> tuple[T, T, T]:
    return qkv(queries=7)


@plain("openvino#31413", Site(scale=0.3))
def softmax_over_axis_three(q: T, k: T, v: T) -> T:
    return torch.softmax(q @ k.mT * 0.3, dim=3) @ v


class WithModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)

    def forward(self, q: T, k: T, v: T) -> T:
        return torch.matmul(self.dropout(self.softmax(q @ k.mT * 0.3)), v)


@case("mul-softmax", Site(scale=0.3))
def softmax_as_a_module() -> Built:
    return WithModules(), qkv()


@plain("mul-softmax", Site(scale=0.3))
def softmax_of_the_special_functions(q: T, k: T, v: T) -> T:
    return torch.special.softmax(q @ k.mT * 0.3, -1) @ v


@plain("exp-sum", Site(scale=0.3), spelled=1)
def exp_over_sum(q: T, k: T, v: T) -> T:
    e = torch.exp(q @ k.mT * 0.3)
    return (e / e.sum(-1, keepdim=True)) @ v


@plain("exp-sum", Site(scale=0.3), spelled=1)
def exp_minus_row_max_over_sum(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return (e / torch.sum(e, dim=-1, keepdim=True)) @ v


@plain("exp-sum", Site(scale=0.3), spelled=1)
def exp_minus_max_values_over_unsqueezed_sum(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    e = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return (e / e.sum(-1).unsqueeze(-1)) @ v


@plain("exp-sum", Site(scale=0.3), spelled=1)
def exp_minus_detached_max(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.3
    e = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


@plain("exp-sum", Site(scale=0.3), spelled=1)
def exp_minus_logsumexp(q: T, k: T, v: T) -> T:
    # reformer
    scores = q @ k.mT * 0.3
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


@plain("exp-sum", Site(scale=0.3), spelled=1)
def exp_of_log_softmax(q: T, k: T, v: T) -> T:
    return F.log_softmax(q @ k.mT * 0.3, dim=-1).exp() @ v


@plain("exp-sum", Site(scale=0.3 * 0.6931471805599453), spelled=1)
def powers_of_two_over_their_sum(q: T, k: T, v: T) -> T:
    e = torch.exp2(q @ k.mT * 0.3)
    return (e / e.sum(-1, keepdim=True)) @ v


@plain(
    "exp-sum",
    Site(scale=0.3 * 0.6931471805599453, bias=((2, 3, 5, 7),), empty_rows="nan"),
    inputs=lambda: (*qkv(), noise(2, 3, 5, 7, seed=5, grad=False)),
    spelled=1,
)
def powers_of_two_of_biased_scores(q: T, k: T, v: T, bias: T) -> T:
    # the base belongs to the bias as well
    scores = q @ k.mT * 0.3 + bias
    e = torch.exp2(scores - scores.amax(dim=-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@plain(
    "exp-sum",
    Site(scale=0.3, dense=True, empty_rows="nan"),
    inputs=with_keep(2, 1, 5, 7, empty=True),
    spelled=1,
    grad=False,
)
def masked_fill_and_exp_minus_max(q: T, k: T, v: T, keep: T) -> T:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, -float("inf"))
    e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@plain("exp-sum", Miss("softmax_not_over_keys"), inputs=square, spelled=1)
def exp_over_the_sum_of_the_wrong_axis(q: T, k: T, v: T) -> T:
    e = torch.exp(q @ k.mT * 0.3)
    return (e / e.sum(-2, keepdim=True)) @ v


@plain("exp-sum")
def exp_over_one_plus_sum_is_another_function(q: T, k: T, v: T) -> T:
    # "softmax off by one": nothing to report, because no softmax is there
    e = torch.exp(q @ k.mT * 0.3)
    return (e / (1.0 + e.sum(-1, keepdim=True))) @ v


@plain("exp-sum")
def exp_over_the_sum_of_other_scores_is_no_softmax(q: T, k: T, v: T) -> T:
    return (torch.exp(q @ k.mT * 0.3) / torch.exp(q @ k.mT * 0.4).sum(-1, keepdim=True)) @ v


@plain("exp-sum", inputs=square)
def exp_with_a_sum_broadcast_along_the_wrong_axis_is_no_softmax(q: T, k: T, v: T) -> T:
    e = torch.exp(q @ k.mT * 0.3)
    return (e / e.sum(-1).unsqueeze(-2)) @ v


@plain("exp-sum", inputs=with_keep(2, 1, 5, 7))
def exp_times_mask_over_its_sum(q: T, k: T, v: T, keep: T) -> T:
    # masked attention without a softmax in it; not known as a spelling, so nothing is claimed about it
    e = torch.exp(q @ k.mT * 0.3) * keep
    return (e / e.sum(-1, keepdim=True)) @ v


@plain("exp-sum")
def sigmoid_attention_has_no_softmax(q: T, k: T, v: T) -> T:
    return torch.sigmoid(q @ k.mT * 0.3) @ v


@plain("exp-sum")
def a_log_softmax_alone_is_a_loss(q: T, k: T, v: T) -> T:
    return F.log_softmax(q @ k.mT * 0.3, dim=-1) @ v


@plain("transposed", Site(scale=0.3), inputs=qkv)
def scores_transposed_and_softmax_over_dim_minus_two(q: T, k: T, v: T) -> T:
    return (k @ q.mT * 0.3).softmax(-2).mT @ v


@plain("transposed", Site(scale=0.3))
def values_times_transposed_weights(q: T, k: T, v: T) -> T:
    return (v.mT @ (q @ k.mT * 0.3).softmax(-1).mT).mT


@plain("transposed", Site(scale=0.3))
def values_times_weights_that_were_never_transposed(q: T, k: T, v: T) -> T:
    return v.mT @ (k @ q.mT * 0.3).softmax(dim=-2)


@plain(
    "transposed",
    Site(scale=0.3),
    inputs=lambda: (noise(2, 3, 8, 5, seed=1), noise(2, 3, 8, 7, seed=2), noise(2, 3, 8, 7, seed=3)),
)
def convolutional_layout_with_channels_first(q: T, k: T, v: T) -> T:
    # efficientvit, shvit: (batch, heads, width, height * width)
    attn = (q.transpose(-2, -1) @ k * 0.3).softmax(dim=-1)
    return v @ attn.transpose(-2, -1)


@plain("pytorch#196468", Miss("softmax_not_over_keys"), inputs=square)
def softmax_over_queries(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(dim=-2) @ v


@plain("trap 3", Miss("softmax_not_over_keys"), inputs=square)
def weights_summed_over_queries(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(dim=-1).mT @ v


@plain("trap 3", Miss("not_a_query_key_product"), inputs=square)
def softmax_over_heads(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(dim=1) @ v


@plain("trap 3", Miss("not_a_query_key_product"), inputs=square)
def softmax_over_the_batch(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(dim=0) @ v


@plain(
    "views",
    Site(scale=0.3, q=(2, 3, 35, 8), k=(2, 3, 35, 8), v=(2, 3, 35, 8)),
    inputs=lambda: (noise(2, 3, 8, 5, 7, seed=1), noise(2, 3, 8, 5, 7, seed=2), noise(2, 3, 8, 5, 7, seed=3)),
)
def keys_are_the_pixels_of_an_image(q: T, k: T, v: T) -> T:
    # botnet: scores over (h, w), flattened for the softmax
    scores = torch.einsum("bnchw,bncxy->bnhwxy", q, k) * 0.3
    attn = scores.flatten(4).softmax(-1).view(scores.shape)
    return torch.einsum("bnhwxy,bncxy->bnhwc", attn, v)


@plain("trap 10", Miss("no_product_after"), Miss("unknown_op"))
def softmax_of_a_softmax(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1).softmax(-1) @ v


@plain("casts", Site(scale=0.3, dtype="bfloat16", softmax_dtype="float32"), inputs=half)
def softmax_in_float32_and_back(q: T, k: T, v: T) -> T:
    return F.softmax(q @ k.mT * 0.3, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@plain("TensorRT-LLM#4370", Site(scale=0.3, dtype="bfloat16", softmax_dtype="float32"), inputs=half)
def scores_cast_to_float32_before_the_softmax(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).float().softmax(-1).type_as(q) @ v


@plain("TensorRT-LLM#4370", Site(scale=0.3, dtype="bfloat16", softmax_dtype="float32"), inputs=half)
def operands_cast_to_float32_before_the_product(q: T, k: T, v: T) -> T:
    return (q.float() @ k.float().mT * 0.3).softmax(-1).to(v.dtype) @ v


@plain(
    "trap 3",
    Site(scale=0.3, dtype="float32", softmax_dtype="bfloat16"),
)
def a_softmax_in_lower_precision_than_its_operands(q: T, k: T, v: T) -> T:
    # the fused form is closer to the truth than the original
    return (q @ k.mT * 0.3).to(torch.bfloat16).softmax(-1).to(v.dtype) @ v


@plain("casts", Site(scale=0.3, dtype="float64", softmax_dtype="float64"), inputs=lambda: qkv(dtype=torch.float64))
def everything_in_float64(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("casts", Site(scale=0.3, dtype="float16", softmax_dtype="float32"), inputs=lambda: qkv(dtype=torch.float16))
def float16_with_a_float32_softmax(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1, dtype=torch.float32).half() @ v


@plain(
    "casts",
    Site(scale=0.3, dtype="float32", softmax_dtype="float32"),
    inputs=lambda: (*qkv(dtype=torch.bfloat16)[:2], qkv()[2]),
)
def narrow_queries_and_wide_values(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).float().softmax(-1) @ v


@plain(
    "casts",
    Miss("not_floating"),
    inputs=lambda: (torch.randint(0, 4, (2, 3, 5, 8)), torch.randint(0, 4, (2, 3, 7, 8)), qkv()[2]),
)
def scores_of_integers(q: T, k: T, v: T) -> T:
    return (q @ k.mT).softmax(-1, dtype=torch.float32) @ v


@plain("casts", Miss("unknown_op"), reference="eager")
def scores_rounded_to_integers(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).to(torch.int32).float().softmax(-1) @ v


@plain("trap 10", Miss("unknown_op"), inputs=lambda: (*(x.to(torch.complex64) for x in qkv(grad=False)[:2]), qkv()[2]))
def the_real_part_of_complex_scores(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).real.softmax(-1) @ v


@plain("trap 10", Miss("single_key"), inputs=lambda: qkv(keys=1))
def a_single_key(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("trap 10", Miss("empty_tensor"), inputs=lambda: qkv(queries=0))
def no_queries(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("trap 10", Miss("empty_tensor"), inputs=lambda: qkv(keys=0))
def no_keys(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("trap 10", Site(scale=0.3, q=(1, 1, 1, 8), k=(1, 1, 7, 8), v=(1, 1, 7, 8)), inputs=lambda: qkv(1, 1, 1))
def every_axis_but_the_keys_of_size_one(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v


@plain("trap 10", Site(scale=0.3, q=(2, 3, 5, 1), k=(2, 3, 7, 1), v=(2, 3, 7, 1)), inputs=lambda: qkv(width=1))
def heads_of_width_one(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.3).softmax(-1) @ v
