"""Functions that keep the documented contracts of xformers, aiter, torch_npu and torch_xla, and of torch below its own
variable-length attention; they compute plainly, on any device.

As in standins.py they do what the packages say, with their own layouts, defaults and conventions, and refuse what the
packages refuse. Nothing of ours is used in them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpass.kernels import late
from tests.kernels.standins import INF, Said, backward, forward, loadable, said_to_2


def modules(patch: pytest.MonkeyPatch, **found: dict[str, Any] | None) -> None:
    """Modules by their dotted names (with __ for each dot) and what is in them; None: it cannot be imported."""
    for name, inside in found.items():
        dotted = name.replace("__", ".")
        module = None if inside is None else ModuleType(dotted)
        for key, value in (inside or {}).items():
            setattr(module, key, value)
        patch.setitem(sys.modules, dotted, module)
    late.imported.cache_clear()


# -- torch below torch.nn.attention.varlen -----------------------------------------------------------------------------


def _bounds(q: Tensor, most: tuple[int, int], causal: bool, scale: float, window: dict[str, int]) -> Said:
    left, right = window["window_size_left"], window["window_size_right"]
    return said_to_2(q, *most, 0.0, scale, causal, left, right, 0.0, None, 0)


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    **rest: Any,
) -> tuple[Tensor, ...]:
    assert dropout_p == 0.0
    assert scale is not None
    out, lse = forward(
        query, key, value, cum_seq_q, cum_seq_k, _bounds(query, (max_q, max_k), is_causal, scale, rest), INF
    )
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return out, lse, state, query.new_empty(0), query.new_empty(0)


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    **rest: Any,
) -> tuple[Tensor, ...]:
    assert dropout_p == 0.0
    assert scale is not None
    assert rng_state.dtype == torch.uint64
    said = _bounds(query, (max_q, max_k), is_causal, scale, rest)
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    backward(grad_out, query, key, value, out, logsumexp, grads, cum_seq_q, cum_seq_k, said)  # type: ignore[arg-type]
    return grads


@contextmanager
def flash_of_torch() -> Iterator[None]:
    """Both operations for the CPU, called through torch's own schemas, which are those of CUDA."""
    library = torch.library.Library("aten", "IMPL")
    for function in (_flash_attention_forward, _flash_attention_backward):
        library.impl(function.__name__, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


# -- xformers ----------------------------------------------------------------------------------------------------------


class LowerTriangularFromBottomRightMask:
    """The last query sees up to the last key."""

    def __init__(self) -> None:
        self.bounds = (None, 0)


class LowerTriangularFromBottomRightLocalAttentionMask:
    """The same, and no key whose distance is `_window_size` or more."""

    def __init__(self, _window_size: int) -> None:
        assert _window_size > 0
        self.bounds = (_window_size - 1, 0)


class LocalAttentionFromBottomRightMask:
    """q - window_left <= k + s <= q + window_right, with s = num_queries - num_keys."""

    def __init__(self, window_left: int, window_right: int) -> None:
        if window_left < 0 or window_right < 0:
            raise ValueError("Invalid window value")
        self.bounds = (window_left, window_right)


def _said_to_xformers(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float, scale: float | None) -> Said:
    """Inputs.validate_inputs"""
    if p != 0.0:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")
    batch, _, heads, width = query.shape
    if key.shape != (batch, key.shape[1], heads, width) or value.shape[:3] != key.shape[:3]:
        raise ValueError("Incompatible shapes for attention inputs")
    loadable(query, key, value)
    left, right = (None, None) if attn_bias is None else attn_bias.bounds
    return Said(scale=width**-0.5 if scale is None else scale, left=left, right=right, softcap=0.0)


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    said = _said_to_xformers(query, key, value, attn_bias, p, scale)
    out, lse = forward(query, key, value, None, None, said, INF)
    # cutlass rounds the number of queries up to 32
    return out, torch.nn.functional.pad(lse, (0, -query.shape[1] % 32), value=math.nan)


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> tuple[Tensor, ...]:
    said = _said_to_xformers(query, key, value, attn_bias, p, scale)
    assert lse.shape[:2] == (query.shape[0], query.shape[2])
    assert lse.shape[2] >= query.shape[1]
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    backward(grad, query, key, value, output, lse[..., : query.shape[1]], grads, None, None, said)  # type: ignore[arg-type]
    return grads


def xformers(patch: pytest.MonkeyPatch, **library: Any) -> None:
    """Put it in the place of the package; `library` is what its module of compiled code says of itself."""
    masks = ModuleType("xformers.ops.fmha.attn_bias")
    for kind in (
        LowerTriangularFromBottomRightMask,
        LowerTriangularFromBottomRightLocalAttentionMask,
        LocalAttentionFromBottomRightMask,
    ):
        setattr(masks, kind.__name__, kind)
    fmha = ModuleType("xformers.ops.fmha")
    fmha.attn_bias = masks  # type: ignore[attr-defined]
    for function in (memory_efficient_attention_forward_requires_grad, memory_efficient_attention_backward):
        setattr(fmha, function.__name__, function)
    known = {"_built_with_cuda": True, "_cpp_library_load_exception": None} | library
    modules(patch, xformers={"__path__": []}, xformers__ops={"fmha": fmha}, xformers___cpp_lib=known)


# -- aiter -------------------------------------------------------------------------------------------------------------


def _said_to_aiter(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window: Any, slopes: Any
) -> Said:
    """Query i attends to keys between i + seqlen_k - seqlen_q - window[0] and ... + window[1]; -1 is infinite."""
    assert dropout_p == 0.0
    loadable(q, k, v)
    assert q.shape[2] % k.shape[2] == 0
    assert max(q.shape[3], v.shape[3]) <= 256
    if slopes is not None:
        assert slopes.dtype == torch.float32
    left, right = (None if bound == -1 else bound for bound in window)
    right = 0 if causal else right
    if left == 0 and not right:
        left = right = None  # what it looks for is a bound above zero
    return Said(scale=softmax_scale, left=left, right=right, softcap=0.0, slopes=slopes)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    bias=None,
    alibi_slopes=None,
    deterministic=True,
    return_lse=False,
    return_attn_probs=False,
    how_v3_bf16_cvt=1,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
):
    assert bias is None
    assert return_lse or not torch.is_grad_enabled() or not q.requires_grad
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    said = _said_to_aiter(q, k, v, dropout_p, scale, causal, window_size, alibi_slopes)
    out, lse = forward(q, k, v, None, None, said, math.nan)  # of an empty row nothing is documented
    return (out, lse) if return_lse else out


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dbias,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    bias,
    alibi_slopes,
    deterministic,
    rng_state=None,
    is_v3_atomic_fp32=True,
    how_v3_bf16_cvt=1,
):
    assert deterministic, "the other one takes a causal mask from the first of both"
    window = (window_size_left, window_size_right)
    said = _said_to_aiter(q, k, v, dropout_p, softmax_scale, causal, window, alibi_slopes)
    backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), None, None, said)
    return torch.empty(0)


def aiter(patch: pytest.MonkeyPatch) -> None:
    """Put it in the place of the package."""
    inside = {"__path__": [], "flash_attn_func": flash_attn_func}
    below = {"_flash_attn_backward": _flash_attn_backward}
    modules(patch, aiter=inside, aiter__ops={"__path__": []}, aiter__ops__mha=below)


# -- torch_npu ---------------------------------------------------------------------------------------------------------


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    *rest: Any,
    **others: Any,
) -> tuple[Any, ...]:
    """Dropout(Softmax(Mask(scale * (pse + query @ key), atten_mask)), keep_prob) @ value, with True for masked out."""
    assert input_layout == "BNSD"
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    assert head_num == heads
    assert heads % key.shape[1] == 0
    assert key.shape == (batch, key.shape[1], keys, width)
    assert value.shape[3] <= width
    assert pse is None
    assert pre_tockens == next_tockens == 2147483647
    if sparse_mode == 2:
        assert atten_mask is not None
        assert atten_mask.shape == (2048, 2048)
        off = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(1)
    else:
        assert sparse_mode == 0
        off = torch.zeros(queries, keys, dtype=torch.bool, device=query.device)
        if atten_mask is not None:
            assert atten_mask.dtype == torch.bool
            assert atten_mask.is_contiguous()
            assert tuple(atten_mask.shape) in (
                (batch, heads, queries, keys),
                (batch, 1, queries, keys),
                (1, 1, queries, keys),
                (queries, keys),
            )
            off = atten_mask
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    p = (query @ k.mT * scale).masked_fill(off, -INF).float().softmax(-1)
    p = torch.nn.functional.dropout(p, 1 - keep_prob)
    kept = query.new_zeros((batch, heads, queries, 8), dtype=torch.float32)
    return (p @ v.float()).to(query.dtype), kept, kept.clone(), query.new_empty(0), 0, 0, 0


@contextmanager
def npu(patch: pytest.MonkeyPatch, schema: str) -> Iterator[None]:
    """The package and its operation, by the schema that the real one registers; it is differentiable as that is."""
    library = torch.library.Library("npu", "FRAGMENT")
    library.define(schema)
    library.impl("npu_fusion_attention", npu_fusion_attention, "CompositeImplicitAutograd")
    device = ModuleType("torch_npu.npu")
    device.is_available = lambda: True  # type: ignore[attr-defined]
    modules(patch, torch_npu={"npu": device})
    try:
        yield
    finally:
        library._destroy()


# -- torch_xla ---------------------------------------------------------------------------------------------------------

_MASK_VALUE = -0.7 * torch.finfo(torch.float32).max


def _pad_to_block_size(x: Tensor | None, dim: int, fill: float) -> Tensor | None:
    more = 0 if x is None else -x.shape[dim] % min(512, x.shape[dim])
    if x is None or not more:
        return x
    shape = list(x.shape)
    shape[dim] = more
    return torch.cat([x, torch.full(shape, fill, dtype=x.dtype, device=x.device)], dim)


def _xla_scores(q: Tensor, k: Tensor, ab: Tensor | None, causal: bool, sm_scale: float) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * sm_scale
    if ab is not None:
        s = s + ab.double()
    if causal:
        s = s + torch.ones(s.shape[-2:], dtype=torch.bool).triu(1) * _MASK_VALUE
    return s


def fa_custom_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    q_segment_ids: Tensor,
    kv_segment_ids: Tensor,
    sm_scale: float,
    ab: Tensor | None,
    partition_spec: str,
    mesh: str,
    ctx_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert q.shape == k.shape == v.shape
    assert partition_spec == mesh == "None"
    assert len(ctx_grad) == 10
    assert ab is None or ab.shape == (*q.shape[:3], k.shape[2])
    full = [None if x is None else x.clone() for x in (q, k, v, ab)]
    wide = [_pad_to_block_size(x, 2, 0.0) for x in (k, v)]
    ab = None if ab is None else _pad_to_block_size(ab, 3, torch.finfo(ab.dtype).min)
    s = _xla_scores(q, wide[0], ab, causal, sm_scale)  # type: ignore[arg-type]
    m = s.amax(-1)
    p = (s - m[..., None]).exp()
    l = p.sum(-1)  # noqa: E741
    o = (torch.einsum("bhij,bhjd->bhid", p, wide[1].double()) / l[..., None]).to(q.dtype)  # type: ignore[union-attr]
    residuals = (l.float(), m.float()) if any(ctx_grad[:3]) else (None, None)
    return (o, *full[:3], *residuals, full[3])  # type: ignore[return-value]


def fa_custom_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    l: Tensor,  # noqa: E741
    m: Tensor,
    q_segment_ids: Tensor | None,
    kv_segment_ids: Tensor | None,
    ab: Tensor | None,
    causal: bool,
    sm_scale: float,
    partition_spec: str,
    mesh: str,
    q_full_shape: list[int],
    kv_full_shape: list[int],
    ab_full_shape: list[int] | None,
    ctx_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert all(x.is_contiguous() for x in (grad_output, q, k, v, o, l, m))
    assert all(ctx_grad[:3])
    assert not any(ctx_grad[3:])
    p = (_xla_scores(q, k, ab, causal, sm_scale) - m[..., None].double()).exp() / l[..., None].double()
    dp = torch.einsum("bhid,bhjd->bhij", grad_output.double(), v.double())
    ds = p * (dp - (o.double() * grad_output.double()).sum(-1)[..., None]) * sm_scale
    dq = torch.einsum("bhij,bhjd->bhid", ds, k.double())
    dk = torch.einsum("bhij,bhid->bhjd", ds, q.double())
    dv = torch.einsum("bhij,bhid->bhjd", p, grad_output.double())
    # whole blocks alone: what is left over is not written
    size = q.shape[2]
    dq[:, :, size - size % min(1024, size) :] = math.nan
    for x in (dk, dv):
        x[:, :, size - size % min(512, size) :] = math.nan
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None  # type: ignore[return-value]


def xla(patch: pytest.MonkeyPatch, *, device: str = "TPU") -> None:
    """The package; its two operations are registered as it registers them, once."""
    if not hasattr(torch.ops.xla, "fa_custom_forward"):
        for function in (fa_custom_forward, fa_custom_backward):
            torch.library.custom_op(f"xla::{function.__name__}", function, mutates_args=())
    modules(
        patch,
        torch_xla={"__path__": []},
        torch_xla__runtime={"device_type": lambda: device},
        torch_xla__experimental={"__path__": []},
        torch_xla__experimental__custom_kernel={},
        jax={},
    )
