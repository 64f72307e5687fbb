"""Bugs that users of attention matchers have met, as programs of a few lines: each by the number it has there.

A program is registered under its number, with what plain inductor did with it (``plain``) and what has to happen here
(``here``). The words under each are ours; threads and reproductions are where the number says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Plain = Literal["wrong", "raises", "misses", ""]  # "": the bug is another tool's
Here = Literal["replaced", "right"]  # "right": whatever becomes of the site


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One program."""

    number: str
    case: str  # where a number has several
    program: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    plain: Plain
    here: Here
    dynamic: bool | None
    tolerance: float
    gradients: bool

    @property
    def name(self) -> str:
        return f"{self.number} {self.case}".strip()


BUGS: list[Bug] = []


def bug(
    number: str,
    make: Callable[[], tuple[Any, ...]],
    *,
    case: str = "",
    plain: Plain = "",
    here: Here = "replaced",
    dynamic: bool | None = None,
    tolerance: float = 2e-5,
    gradients: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a program; `gradients`: with those of q, k and v."""

    def add(program: Callable[..., Any]) -> Callable[..., Any]:
        BUGS.append(
            Bug(
                number=number,
                case=case,
                program=program,
                make=make,
                plain=plain,
                here=here,
                dynamic=dynamic,
                tolerance=tolerance,
                gradients=gradients,
            )
        )
        return program

    return add


def three(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(shape, generator=made).to(dtype) for _ in range(3))
    return q, k, v


def heads_first(*tensors: Tensor) -> Sequence[Tensor]:
    return [tensor.permute(0, 2, 1, 3) for tensor in tensors]


def causal(length: int, fill: float = -float("inf"), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((length, length), fill, dtype=dtype).triu(1)


# -- silently wrong ----------------------------------------------------------------------------------------------------


@bug("pytorch#195320", lambda: three(1, 8, 8, 16), plain="wrong")
def permuted_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are brought to (batch, heads, width, keys) by one permutation; it was read as a transposition of the last
    two dimensions, so heads and keys changed places where they are as many.
    """
    q, v = heads_first(q, v)
    return ((q @ k.permute(0, 2, 3, 1)) * 0.25).softmax(dim=-1) @ v


@bug("pytorch#196468", lambda: three(2, 4, 16, 16), case="over queries", plain="wrong", here="right")
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The dimension of the softmax was not looked at."""
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-2) @ v


@bug("pytorch#196468", lambda: three(2, 4, 16, 16), case="over heads", plain="wrong", here="right")
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, over heads."""
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=1) @ v


@bug("pytorch#174049", lambda: (*three(1, 16, 4, 64), torch.zeros(1, 1, 16, 16)), plain="wrong", tolerance=4e-4)
def unusual_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scores are divided by a number that is not the root of the width; the usual scale was taken instead."""
    q, k, v = heads_first(q, k, v)
    return (torch.matmul(q, k.transpose(-2, -1)).div(1 / math.sqrt(8)) + mask).softmax(dim=-1).matmul(v)


@bug("coremltools#2650", lambda: (*three(12, 4, 49, 32), torch.randn(1, 4, 49, 49) * 0.02))
def many_batches(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The fused kernel was wrong from the tenth batch on (windows of an image, with a learned bias)."""
    return torch.softmax(q @ k.transpose(-2, -1) * 32**-0.5 + bias, dim=-1) @ v


@bug("openxla/xla#11717", lambda: (*three(2, 4, 16, 16), torch.ones(16, 16).tril()), here="right")
def multiplied_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scores times a mask of zeros and ones: what is masked has the score 0, not minus infinity."""
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25 * mask, dim=-1) @ v


# -- crashes -----------------------------------------------------------------------------------------------------------


@bug("pytorch#195589", lambda: (*three(2, 1, 1, 4, 8), three(8, 32)[0]), case="five dimensions", plain="raises")
@bug("pytorch#195589", lambda: (*three(2, 1, 4, 8), three(8, 32)[0]), case="four dimensions", plain="raises")
def flattened_into_a_linear(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """A view takes dimensions away in front of a linear layer: inductor then multiplied a tensor of more than two
    dimensions as a matrix.
    """
    out = torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5, dim=-1) @ v
    return F.linear(out.view(2, 1, 32), weight)


@bug(
    "pytorch#191203",
    lambda: (*three(1, 2, 8, 8), causal(8, -1e9), torch.tensor(0.5)),
    plain="raises",
)
def scale_in_a_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """The scale is a tensor without dimensions; the fused call wants a number."""
    return F.softmax(q @ k.transpose(-2, -1) / scale + mask, dim=-1) @ v


@bug("pytorch#191260", lambda: (three(8, 16, 32)[0], three(16, 8, 32)[1], three(8, 16, 32)[2]), plain="raises")
def permuted_key_of_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys come as (keys, batch, width); any permutation was taken for the usual one, and shapes did not fit."""
    return torch.bmm(torch.bmm(q, k.permute(1, 2, 0)).softmax(dim=-1), v)


@bug("pytorch#194444", lambda: three(2, 4, 16, 32), plain="misses", dynamic=True)
def scale_from_a_symbolic_width(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With symbolic sizes the root of the width is a symbolic number. First inductor crashed, then it let go of the
    fusion.
    """
    return torch.softmax(q @ k.transpose(-2, -1) / q.size(-1) ** 0.5, dim=-1) @ v


# -- missed ------------------------------------------------------------------------------------------------------------


@bug("pytorch#195412", lambda: (*three(2, 16, 4, 16), causal(16)), plain="misses")
def multiplied_scale_and_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Known with a division by 3, unknown with a multiplication by a third."""
    q, k, v = heads_first(q, k, v)
    return (torch.matmul(q, k.transpose(-2, -1)).mul(1 / 3) + mask).softmax(dim=-1).matmul(v)


@bug(
    "pytorch#195782",
    lambda: (*three(2, 16, 4, 16), torch.randn(1, 1, 1, 16)),
    plain="misses",
)
def mask_plus_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The mask stands on the left of the sum."""
    q, k, v = heads_first(q, k, v)
    return (mask + torch.matmul(q, k.transpose(-2, -1)).div(3.0)).softmax(dim=-1).matmul(v)


@bug(
    "pytorch#195784",
    lambda: (*three(1, 4, 2, 8, dtype=torch.float16), torch.randn(1, 1, 4, 4)),
    plain="misses",
    tolerance=4e-3,
    gradients=False,
)
def wide_mask_for_narrow_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Half precision with a mask in single precision."""
    q, k, v = heads_first(q, k, v)
    scores = q @ k.permute(0, 1, 3, 2) + mask
    return F.dropout(scores.float().softmax(-1).to(q.dtype), p=0.1, training=False) @ v


def _padded(batch: int) -> tuple[Any, ...]:
    keep = torch.ones(batch, 1, 1, 24)
    keep[..., 20:] = 0
    return (*three(batch, 4, 24, 16), keep)


@bug("pytorch#119911", lambda: _padded(1), case="batch of one", plain="misses", gradients=False)
@bug("pytorch#119911", lambda: _padded(3), case="batch of three", plain="misses", gradients=False)
def with_and_without_clones(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Whether a batch of one or of several is traced decides whether there are copies in the graph, and with them
    whether the pattern fits; this one (BERT by hand) never did.
    """
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    return torch.matmul(F.dropout(F.softmax(scores.masked_fill(keep == 0, -1e9), dim=-1), 0.1, False), v)


@bug("pytorch#111190", lambda: three(2, 16, 4, 16), plain="misses", dynamic=True)
def symbolic_sizes_in_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With symbolic sizes there are more nodes in the graph, which compute sizes, and the pattern did not fit."""
    q, k, v = heads_first(q, k, v)
    batch, heads, length, width = q.shape
    scores = torch.bmm(q.reshape(batch * heads, length, width), k.reshape(batch * heads, length, width).transpose(1, 2))
    weights = scores.view(batch, heads, length, length).mul(0.25).softmax(dim=-1)
    return torch.bmm(weights.view(batch * heads, length, length), v.reshape(batch * heads, length, width)).view(q.shape)


@bug("pytorch#163252", lambda: (*three(1, 16, 4, 16), torch.randn(1, 4, 16, 16)), plain="misses", gradients=False)
def t5_with_a_batch_of_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T5 adds its bias in place and returns keys and values; with a batch of one it was not known."""
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v), k, v


@bug("openvino#31413", lambda: three(2, 4, 16, 16), plain="misses")
def last_dimension_by_its_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last of four dimensions is called 3, not -1."""
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25, dim=3), v)


@bug("TensorRT-LLM#4789", lambda: three(2, 4, 32, 16), plain="misses", here="right", gradients=False)
def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2 sends its scores through a tanh; then no attention was found, and the model ran without a cache."""
    scores = torch.tanh(q @ k.transpose(-2, -1) * 0.25 / 50.0) * 50.0
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@bug("TensorRT-LLM#4585", lambda: three(2, 4, 32, 16), plain="misses")
def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A causal mask that also ends: only the last eight keys are seen."""
    at = torch.arange(q.shape[2], device=q.device)
    keep = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - 8)
    scores = (q @ k.transpose(-2, -1) * 0.25).masked_fill(~keep, torch.finfo(q.dtype).min)
    return torch.softmax(scores, dim=-1) @ v


@bug("TensorRT-LLM#4313", lambda: (*three(2, 16, 4, 24), three(2, 16, 1, 8)[1]), plain="misses")
def latent_attention(q: Tensor, k: Tensor, v: Tensor, rotated: Tensor) -> Tensor:
    """Keys are wider than values: a part of each head's own, and a rotated one that all heads share."""
    keys = torch.cat([k[..., :16], rotated.expand(2, 16, 4, 8)], dim=-1)
    q, keys, values = heads_first(q, keys, v[..., :16])
    scores = torch.matmul(q, keys.transpose(2, 3)) * 24**-0.5 + causal(16).to(q.device)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), values)


def _narrow() -> tuple[Any, ...]:
    return three(2, 4, 32, 16, dtype=torch.bfloat16)


@bug("TensorRT-LLM#4370", _narrow, case="inside", plain="misses", tolerance=2e-2, gradients=False)
def cast_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Where the scores are cast moved with a release of transformers, and no attention was found: by the softmax."""
    return F.softmax(q @ k.transpose(2, 3) * 0.25, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@bug("TensorRT-LLM#4370", _narrow, case="before", plain="misses", tolerance=2e-2, gradients=False)
def cast_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same: before it."""
    return F.softmax((q @ k.transpose(2, 3) * 0.25).float(), dim=-1).to(v.dtype) @ v


@bug("TensorRT-LLM#4370", _narrow, case="behind", plain="misses", tolerance=2e-2, gradients=False)
def cast_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same: keys and values are widened, the result is narrowed."""
    out = F.softmax(q.float() @ k.float().transpose(2, 3) * 0.25, dim=-1) @ v.float()
    return out.to(q.dtype)


@bug("openvino#31838", lambda: (*three(2, 4, 32, 16), torch.randn(4)), plain="misses", here="right", gradients=False)
def attention_sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """gpt-oss: one more column of scores, which belongs to no key, takes a part of the probability."""
    scores = q @ k.transpose(-2, -1) * 0.25 + causal(32).to(q.device)
    scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(2, -1, 32, 1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1)[..., :-1] @ v


# -- drift: what a new release of a library made of the same model -----------------------------------------------------


@bug("tt-mlir#6335", lambda: three(2, 4, 32, 16), case="scale in two halves", plain="misses")
def scale_in_two_halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With a new torch the scale stood in both operands, as its root, and the mask was added within the product."""
    root = 16**-0.25
    shape = (8, 32, 16)
    scores = torch.baddbmm(
        causal(32).to(q.device), (q * root).reshape(shape), (k * root).reshape(shape).transpose(1, 2)
    )
    return (F.softmax(scores, dim=-1) @ v.reshape(shape)).view(q.shape)


@bug(
    "tt-mlir#6335", lambda: (*three(2, 4, 32, 16), _holes()), case="rows without a key", plain="misses", gradients=False
)
def zeros_for_rows_without_a_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """... and what has no key at all was set to zero behind the softmax."""
    scores = q @ k.transpose(-2, -1) * 0.25 + mask
    empty = (scores == -float("inf")).all(dim=-1, keepdim=True)
    return torch.where(empty, 0.0, F.softmax(scores, dim=-1)) @ v


def _holes() -> Tensor:
    mask = causal(32)
    mask[5] = -float("inf")
    return mask
