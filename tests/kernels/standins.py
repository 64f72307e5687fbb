"""Functions that keep the documented contracts of flash-attn 2 and 3 and compute plainly, on any device.

They implement what the packages say, not what this one would like: layouts, required alignment, defaults, bounds from
the end of both, what a negative bound means, their own log-sum-exp, tensors that are written in place, and memory that
nobody writes. They refuse what the packages refuse.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpass.kernels import late

INF = math.inf


@dataclass(frozen=True, kw_only=True)
class Said:
    """One call's numbers, bounds already as the kernel takes them: None is none."""

    scale: float
    left: int | None
    right: int | None
    softcap: float
    slopes: Tensor | None = None
    dropout: float = 0.0
    seed: int = 0


def scores(q: Tensor, k: Tensor, said: Said) -> tuple[Tensor, Tensor]:
    """Of one batch row, (length, heads, width): masked scores in float64, and how they change with the product."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    x = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * said.scale
    slope = torch.full_like(x, said.scale)
    if said.softcap > 0:
        tanh = (x / said.softcap).tanh()
        x, slope = said.softcap * tanh, slope * (1 - tanh**2)
    i = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0], device=q.device)[None]
    if said.slopes is not None:
        x = x - said.slopes[:, None, None] * (i - j).abs()
    off = torch.zeros_like(x, dtype=torch.bool)
    if said.right is not None:
        off |= j > i + said.right
    if said.left is not None:
        off |= j < i - said.left
    return x.masked_fill(off, -INF), slope


def kept(x: Tensor, said: Said) -> Tensor:
    if said.dropout == 0.0:
        return torch.ones_like(x)
    g = torch.Generator(x.device).manual_seed(said.seed)
    return (torch.rand(x.shape, generator=g, device=x.device) >= said.dropout) / (1 - said.dropout)


def one_forward(q: Tensor, k: Tensor, v: Tensor, said: Said, empty: float) -> tuple[Tensor, Tensor]:
    x, _ = scores(q, k, said)
    lse = x.logsumexp(-1)
    p = x.softmax(-1).nan_to_num(0.0) * kept(x, said)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    out = torch.einsum("hij,jhd->ihd", p, v.double()).to(q.dtype)
    return out, lse.masked_fill(lse == -INF, empty).float()


def one_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, said: Said
) -> tuple[Tensor, Tensor, Tensor]:
    """From probabilities made anew as exp(score - lse), and from what softmax subtracts as rowsum(dout * out)."""
    groups = q.shape[1] // k.shape[1]
    x, slope = scores(q, k, said)
    finite = lse.double().masked_fill(lse.isinf(), INF)
    p, z = (x - finite[..., None]).exp(), kept(x, said)
    wide_k, wide_v = (y.repeat_interleave(groups, 1).double() for y in (k, v))
    dp = torch.einsum("ihd,jhd->hij", dout.double(), wide_v) * z
    ds = p * (dp - (dout.double() * out.double()).sum(-1).T[..., None]) * slope
    dq = torch.einsum("hij,jhd->ihd", ds, wide_k)
    dk = torch.einsum("hij,ihd->jhd", ds, q.double()).unflatten(1, (k.shape[1], groups)).sum(2)
    dv = torch.einsum("hij,ihd->jhd", p * z, dout.double()).unflatten(1, (k.shape[1], groups)).sum(2)
    return dq, dk, dv


def spans(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Iterator[tuple[Any, Any, int]]:
    """Where each batch row's queries and keys are."""
    if cu_q is None or cu_k is None:
        yield from ((b, b, b) for b in range(q.shape[0]))
        return
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.is_contiguous()
    assert cu_k.is_contiguous()
    for b in range(cu_q.shape[0] - 1):
        yield slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1])), b


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, said: Said, empty: float
) -> tuple[Tensor, Tensor]:
    loadable(q, k, v)
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=q.dtype, device=q.device)
    shape = (q.shape[1], q.shape[0]) if cu_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(shape, math.nan, device=q.device)
    for at, keys, _ in spans(q, k, cu_q, cu_k):
        out[at], found = one_forward(q[at], k[keys], v[keys], said, empty)
        lse[at if cu_q is None else (slice(None), at)] = found
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    given: tuple[Tensor, Tensor, Tensor],
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    said: Said,
) -> None:
    loadable(dout, q, k, v, out)
    assert lse.is_contiguous()  # rows are found by their length alone
    for x, like in zip(given, (q, k, v), strict=True):
        assert x.shape == like.shape
        assert x.stride(-1) == 1
        x.fill_(math.nan)  # what is not written is anything
    dq, dk, dv = given
    for at, keys, _ in spans(q, k, cu_q, cu_k):
        told = lse[at if cu_q is None else (slice(None), at)]
        found = one_backward(dout[at], q[at], k[keys], v[keys], out[at], told, said)
        dq[at], dk[keys], dv[keys] = (x.to(q.dtype) for x in found)


def loadable(*tensors: Tensor) -> None:
    """The last dimension contiguous, and all else at multiples of the sixteen bytes that one instruction loads."""
    for x in tensors:
        assert x.dtype == tensors[0].dtype
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0
        assert all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
        assert x.shape[-1] % 8 == 0


# -- flash-attn 2 ------------------------------------------------------------------------------------------------------


def said_to_2(
    q: Tensor,
    most_queries: int,
    most_keys: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    seed: int,
) -> Said:
    """csrc/flash_attn/flash_api.cpp, from the check of its arguments to ``set_params_fprop``."""
    assert q.shape[-1] <= 256
    assert not (softcap > 0 and dropout_p > 0), "Softcapping does not support dropout for now"
    assert 0 <= dropout_p < 1
    left, right = window_size_left, window_size_right
    left = -1 if left >= most_keys else left
    right = -1 if right >= most_keys else right
    if most_queries == 1 and alibi_slopes is None:
        causal = False
    right = 0 if causal else right
    if left < 0 <= right:
        left = most_keys
    if right < 0 <= left:
        right = most_keys
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        assert alibi_slopes.is_contiguous()
        assert alibi_slopes.shape == (q.shape[-2],)
    return Said(
        scale=softmax_scale,
        left=None if left < 0 else left,
        right=None if right < 0 else right,
        softcap=softcap,
        slopes=alibi_slopes,
        dropout=dropout_p,
        seed=seed,
    )


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert q.shape[-1] == v.shape[-1]
    seed = int(torch.randint(2**31, ())) if dropout_p else 0
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, seed)
    out, lse = forward(q, k, v, None, None, said_to_2(q, q.shape[1], k.shape[1], *numbers), INF)
    # as torch::empty_like(q) would lay it out
    return torch.empty_like(q).copy_(out), lse, q.new_empty(0), torch.tensor([seed, 0], device=q.device)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert q.shape[-1] == v.shape[-1]
    seed = int(torch.randint(2**31, ())) if dropout_p else 0
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, seed)
    said = said_to_2(q, max_seqlen_q, max_seqlen_k, *numbers)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, said, INF)
    return out, lse, q.new_empty(0), torch.tensor([seed, 0], device=q.device)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    assert rng_state is not None
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    said = said_to_2(q, q.shape[1], k.shape[1], *numbers, int(rng_state[0]))
    backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), None, None, said)
    return softmax_lse


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    assert rng_state is not None
    numbers = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    said = said_to_2(q, max_seqlen_q, max_seqlen_k, *numbers, int(rng_state[0]))
    backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), cu_seqlens_q, cu_seqlens_k, said)
    return softmax_lse


def flash_2(patch: pytest.MonkeyPatch, version: str = "2.8.3") -> None:
    """Put it in the place of the package."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = version  # type: ignore[attr-defined]
    for function in (
        _flash_attn_forward,
        _flash_attn_varlen_forward,
        _flash_attn_backward,
        _flash_attn_varlen_backward,
    ):
        setattr(interface, function.__name__, function)
    patch.setitem(sys.modules, "flash_attn", package)
    patch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    late.imported.cache_clear()


# -- flash-attn 3 ------------------------------------------------------------------------------------------------------

# as its compiled library registers them (of November 2025)
FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None, "
    "Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, "
    "int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, "
    "Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, "
    "Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None, "
    "int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BWD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None, "
    "Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1, "
    "float softcap = 0.0, bool deterministic = False, int sm_margin = 0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)
NO_SOFTCAP = "This flash attention build does not support tanh softcapping."


def said_to_3(q: Tensor, v: Tensor, most_queries: int, most_keys: int, given: dict[str, Any]) -> Said:
    """hopper/flash_api.cpp; the build that is stood in for has no soft cap."""
    width, v_width = q.shape[-1], v.shape[-1]
    assert width <= 256
    assert width == v_width or (128 < width <= 192 and 96 < v_width <= 128) or (width <= 64 and v_width <= 512)
    left, right = given.get("window_size_left", -1), given.get("window_size_right", -1)
    if given.get("softcap", 0.0) != 0.0:
        raise RuntimeError(NO_SOFTCAP)
    left = -1 if left >= most_keys - 1 else left
    right = -1 if right >= most_queries - 1 else right
    right = 0 if given.get("is_causal", False) else right
    scale = given.get("softmax_scale")
    return Said(
        scale=width**-0.5 if scale is None else scale,
        left=None if left < 0 else left,
        right=None if right < 0 else right,
        softcap=0.0,
    )


def fwd(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, ...]:
    cu_q, cu_k = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
    most = (given["max_seqlen_q"], given["max_seqlen_k"]) if cu_q is not None else (q.shape[1], k.shape[1])
    assert given.get("num_splits") == 1
    out, lse = forward(q, k, v, cu_q, cu_k, said_to_3(q, v, *most, given), -INF)
    return out, lse, q.new_empty(0), q.new_empty(0)


def bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, **given: Any
) -> tuple[Tensor, ...]:
    dq, dk, dv = (given[name] for name in ("dq", "dk", "dv"))
    cu_q, cu_k = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
    most = (given["max_seqlen_q"], given["max_seqlen_k"]) if cu_q is not None else (q.shape[1], k.shape[1])
    assert max(q.shape[-1], v.shape[-1]) <= 256
    backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), cu_q, cu_k, said_to_3(q, v, *most, given))
    return dq, dk, dv, *(q.new_empty(0) for _ in range(5))


def register(library: torch.library.Library) -> None:
    """The schemas of the real library, so that torch checks each call against them."""
    for schema, function in ((FWD, fwd), (BWD, bwd)):
        library.define(schema)
        names = [argument.name for argument in torch._C.parse_schema(schema).arguments]
        library.impl(schema.partition("(")[0], functools.partial(_named, function, names), "CompositeExplicitAutograd")


def _named(function: Any, names: list[str], *args: Any) -> Any:
    """What torch gives by position, by name."""
    return function(**{name: arg for name, arg in zip(names, args, strict=False) if arg is not None})


@functools.cache
def _registered() -> torch.library.Library:
    # under another name: the real library may be loaded in the same process
    library = torch.library.Library("standin_for_flash_attn_3", "DEF")
    register(library)
    return library


def flash_3(patch: pytest.MonkeyPatch) -> None:
    """Put it in the place of the compiled library."""
    _registered()
    patch.setattr(torch.ops, "flash_attn_3", torch.ops.standin_for_flash_attn_3, raising=False)
    for name in ("flash_attn_3", "flash_attn_3._C"):
        patch.setitem(sys.modules, name, ModuleType(name))
    late.imported.cache_clear()
