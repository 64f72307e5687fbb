"""torch's own kernels one by one, for users who want one of them and no other.

    native_flash       aten._scaled_dot_product_flash_attention, on the CPU ..._flash_attention_for_cpu
    native_efficient   aten._scaled_dot_product_efficient_attention
    native_cudnn       aten._scaled_dot_product_cudnn_attention
    native_math        aten._scaled_dot_product_attention_math, the unfused definition

The operation in the graph is the choice: ``sdpa_kernel`` and the switches for all of torch are no part of what a
compiled graph is cached under. ``native`` leaves the choice to torch and is as fast, so the first two are taken where
it refuses (live dropout that would go to cuDNN), the others only where they are named.

What ``scaled_dot_product_attention`` does around an operation is done here in the graph: heads are repeated, widths
padded, masks turned into what is added, in q's dtype. (A mask of bool, or of another float type, is read as if it were
of q's dtype, without an error: pytorch#191612 for cuDNN; torch 2.13 does so on the CPU too.)

All of them are differentiable as they stand. None is asked for its log-sum-exp: rows without a key are answered from
the mask.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Node

from attnpass.graph import Builder, tensor
from attnpass.kernels.base import Capabilities
from attnpass.kernels.native import (
    CUDNN_DROPOUT,
    HALF,
    MASK_TOO_LARGE,
    OfTorch,
    mask_too_large,
    reads_mask,
    worth_padding,
)
from attnpass.kernels.operands import (
    ALIGNED,
    heads_repeated,
    keys_contiguous,
    loadable,
    narrowed,
    one_width,
    rows_contiguous,
    upright,
    widened,
)
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec, Size, is_causal

aten = torch.ops.aten
_GRID = 65535  # blocks along the second and third axis of a CUDA grid
_HALF_TYPES = frozenset(HALF)


class _Named(OfTorch):
    """One operation of torch."""

    def emit(self, b: Builder, call: Call) -> Node:
        q, scale = upright(b, call)
        q, k, v = (rows_contiguous(b, node) for node in (q, call.k, call.v))
        if not self.shares_heads(call.spec):
            k, v = (heads_repeated(b, node, call.groups) for node in (k, v))
        out = b.call(operator.getitem, self._call(b, replace(call, scale=scale), q, k, v, _added(b, call)), 0)
        return narrowed(b, out, call.spec.v_width)

    @abstractmethod
    def _call(self, b: Builder, call: Call, q: Node, k: Node, v: Node, mask: Node | None) -> Node:
        """The operation, whose first result is that of attention."""


class NativeMath(_Named):
    """The definition: all scores come to be. To compare with, and for what no fused kernel computes."""

    name = "native_math"
    only_by_name = True
    can = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=_HALF_TYPES | {"float32", "float64"},
        unlike_widths=True,
        groups=True,
        causal=True,
        dense_mask=True,
        bias_gradient=True,
        dropout=True,
        backward=True,
        deterministic=True,
    )

    def shares_heads(self, spec: AttentionSpec) -> bool:
        return False  # it would copy them itself

    def _call(self, b: Builder, call: Call, q: Node, k: Node, v: Node, mask: Node | None) -> Node:
        rest = (mask, float(call.dropout), call.causal, None)
        return b.call(aten._scaled_dot_product_attention_math.default, q, k, v, *rest, scale=call.scale)


class _Fused(_Named):
    """One of torch's own fused kernels."""

    oldest = (8, 0)  # the compute capability that it needs

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        if spec.device != "cuda":
            return
        capability = _capability()
        if capability is not None and capability < self.oldest:
            needed = ".".join(map(str, self.oldest))
            yield reason("unavailable", detail=f"needs a GPU of compute capability {needed} or above")
        for size, name in ((spec.q[0], "batch rows"), (spec.q[1], "heads")):
            if isinstance(size, int) and size > _GRID:
                yield reason("no_form", detail=f"more than {_GRID} {name}")


class NativeFlash(_Fused):
    """On CUDA torch's build of flash-attn 2; on the CPU a kernel of torch's own under the same name."""

    name = "native_flash"
    can = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=_HALF_TYPES | {"float32", "float64"},  # all of them on the CPU alone
        unlike_widths=True,  # by padding
        groups=True,
        causal=True,
        dense_mask=True,  # on the CPU alone
        dropout=True,  # on CUDA alone
        backward=True,
        deterministic=True,
    )

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        if spec.qk_width != spec.v_width and not worth_padding(spec):
            yield reason("unlike_widths")
        if spec.device == "cpu":
            if spec.dropout != 0.0:
                yield reason("dropout", detail="on the CPU")
            return
        if spec.dtype not in HALF:
            yield reason("dtype", dtype=spec.dtype)
        if spec.bias or not (spec.mask.empty or is_causal(spec)):
            yield reason("dense_mask")
        elif not spec.mask.empty and spec.queries != spec.keys:
            # its diagonal ends at the last key, the flag's starts at the first
            yield reason("no_form", detail="a diagonal that starts at the first of a different number of keys")
        width = _widest(spec)
        if width is None or width > 256:
            yield reason("head_width", detail=str(width or "a symbolic size"))
        elif width > 192 and spec.grad and _small_shared_memory():
            yield reason("head_width", detail=f"{width} with a backward on this GPU")

    def _call(self, b: Builder, call: Call, q: Node, k: Node, v: Node, mask: Node | None) -> Node:
        q, k, v = one_width(b, q, k, v)
        given = (float(call.dropout), call.causal)
        if call.spec.device == "cpu":
            target = aten._scaled_dot_product_flash_attention_for_cpu.default
            return b.call(target, q, k, v, *given, attn_mask=mask, scale=call.scale)
        q, k, v = (widened(b, node, ALIGNED) for node in (q, k, v))
        return b.call(aten._scaled_dot_product_flash_attention.default, q, k, v, *given, False, scale=call.scale)


class NativeEfficient(_Fused):
    """torch's build of the cutlass kernel of xformers: any width, any mask, float32 too."""

    name = "native_efficient"
    oldest = (5, 0)
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=_HALF_TYPES | {"float32"},
        unlike_widths=True,
        groups=True,
        causal=True,
        dense_mask=True,
        bias_gradient=True,
        dropout=True,
        backward=True,
        deterministic=True,  # under torch's switch its backward does not split the keys
    )

    def available(self) -> Reason | None:
        return None if torch.cuda.is_available() else reason("unavailable", detail="needs a CUDA device")

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        if _widest(spec) is None:
            yield reason("head_width", detail="a symbolic size")
        if reads_mask(spec) and mask_too_large(spec):
            yield reason("kernel_bug", detail=MASK_TOO_LARGE)
        capability = _capability()
        if spec.dtype == "bfloat16" and capability is not None and capability < (8, 0):
            yield reason("dtype", dtype=spec.dtype)

    def shares_heads(self, spec: AttentionSpec) -> bool:
        return False

    def _call(self, b: Builder, call: Call, q: Node, k: Node, v: Node, mask: Node | None) -> Node:
        q, k, v = (loadable(b, widened(b, node, ALIGNED)) for node in (q, k, v))
        if mask is not None:
            rows = _rows_aligned(b, call, mask)
            mask = b.call(aten.expand.default, rows, [*(b.size(q, dim) for dim in range(3)), b.size(k, 2)])
        rest = (_differentiated(call.spec), float(call.dropout), call.causal)
        target = aten._scaled_dot_product_efficient_attention.default
        return b.call(target, q, k, v, mask, *rest, scale=call.scale)


class NativeCudnn(_Fused):
    """cuDNN's attention, which torch itself takes on Hopper."""

    name = "native_cudnn"
    only_by_name = True
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=_HALF_TYPES,
        unlike_widths=True,
        groups=True,
        causal=True,
        dense_mask=True,
        dropout=True,
        backward=True,
    )

    def available(self) -> Reason | None:
        if not torch.cuda.is_available() or torch.version.hip is not None:
            return reason("unavailable", detail="needs a CUDA device")
        if _cudnn() < 90000:
            return reason("unavailable", detail=f"needs cuDNN 9 or above; this is {_cudnn()}")
        return None

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        width = _widest(spec)
        if width is None or (width > 128 and not ((spec.qk_width, spec.v_width) == (192, 128) and _takes_192())):
            yield reason("head_width", detail=f"{spec.qk_width} and {spec.v_width}")
        if spec.deterministic and not spec.grad:
            yield reason("not_deterministic")  # torch keeps from it then, also without a backward
        if spec.keys == 1:
            yield reason("no_form", detail="a single key")
        if spec.dropout != 0.0:
            yield reason("kernel_bug", detail=CUDNN_DROPOUT)
        if reads_mask(spec) and spec.grad and (not isinstance(spec.keys, int) or spec.keys % 128 == 64):
            detail = f"with a mask over {spec.keys} keys the gradient of q can be NaN (pytorch#196678)"
            yield reason("kernel_bug", detail=detail)

    def shares_heads(self, spec: AttentionSpec) -> bool:
        return False

    def _call(self, b: Builder, call: Call, q: Node, k: Node, v: Node, mask: Node | None) -> Node:
        q, k, v = (widened(b, node, ALIGNED) for node in (q, k, v))
        rest = (_differentiated(call.spec), float(call.dropout), call.causal, False)
        return b.call(aten._scaled_dot_product_cudnn_attention.default, q, k, v, mask, *rest, scale=call.scale)


def _differentiated(spec: AttentionSpec) -> bool:
    return spec.grad or any(bias.grad for bias in spec.bias)


def _widest(spec: AttentionSpec) -> int | None:
    """The greater width; None where one is symbolic."""
    widths: tuple[Size, Size] = (spec.qk_width, spec.v_width)
    return max(w for w in widths if isinstance(w, int)) if all(isinstance(w, int) for w in widths) else None


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _small_shared_memory() -> bool:
    """GPUs on which the backward of flash-attn 2 does not fit for wide heads: 8.6 to 8.9, and 12."""
    capability = _capability()
    return capability is not None and ((8, 6) <= capability <= (8, 9) or capability >= (12, 0))


def _takes_192() -> bool:
    """cuDNN has keys of width 192 with values of width 128 on Hopper and Blackwell."""
    capability = _capability()
    return _cudnn() >= 91100 and capability is not None and capability[0] in (9, 10)


def _cudnn() -> int:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version or 0


def _added(b: Builder, call: Call) -> Node | None:
    """The mask as what is added to the scores, in q's dtype, laid out along the keys where it has to be."""
    mask = call.mask if call.spec.device == "cpu" else keys_contiguous(b, call)
    val, q = tensor(mask) if mask is not None else None, tensor(call.q)
    if mask is None or val is None or q is None:
        return None
    if val.dtype is torch.bool:
        zero = b.call(aten.scalar_tensor.default, 0.0, dtype=q.dtype, device=q.device)
        return b.call(aten.where.ScalarOther, mask, zero, -math.inf)
    return mask if val.dtype == q.dtype else b.call(aten.to.dtype, mask, q.dtype)


def _rows_aligned(b: Builder, call: Call, mask: Node) -> Node:
    """A mask whose rows begin at multiples of eight elements: keys are appended, and cut off by a view."""
    val = tensor(mask)
    assert val is not None
    aligned = all(isinstance(s, int) and s % ALIGNED == 0 for s in val.stride()[:-1])
    if aligned and isinstance(val.storage_offset(), int) and val.storage_offset() % ALIGNED == 0:
        return mask
    keys = b.size(call.k, 2)
    if isinstance(keys, int):
        over: int | Node = -keys % ALIGNED
    else:  # one column at least: whether there is any to cut off would be a condition on the length
        over = b.call(operator.sub, ALIGNED, b.call(operator.mod, keys, ALIGNED))
    if over == 0:
        return b.call(aten.clone.default, mask, memory_format=torch.contiguous_format)
    padded = b.call(aten.constant_pad_nd.default, mask, [0, over])
    return b.call(aten.slice.Tensor, padded, -1, 0, keys)
