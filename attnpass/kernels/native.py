"""torch's own scaled_dot_product_attention: always there, differentiable, and what inductor and AOTInductor know.

The call leaves the choice among torch's kernels to torch. What is refused here is every spec for which that choice
would be the unfused form: nothing would be gained. Sources: torch's own eligibility checks (sdp_utils), which differ
between CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from attnpass.cost import rated_us
from attnpass.graph import Builder
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.kernels.operands import (
    heads_repeated,
    keys_contiguous,
    loadable,
    narrowed,
    one_width,
    rows_contiguous,
    upright,
)
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec, is_causal

aten = torch.ops.aten

HALF = {"bfloat16", "float16"}


class OfTorch(Kernel):
    """What all kernels that come with torch have in common."""

    def version(self) -> str:
        return torch.__version__

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        for bias in spec.bias:
            if not bias.exact and self.compute_dtype(spec) == spec.dtype:
                yield reason("bias_precision", detail=bias.dtype, dtype=spec.dtype)

    def compute_dtype(self, spec: AttentionSpec) -> str:
        # on the CPU float32 is as fast as the half types, so a wide bias can be added in full
        wide = spec.device == "cpu" and all(b.exact or b.dtype == "float32" for b in spec.bias)
        return "float32" if wide and spec.dtype in HALF and not all(b.exact for b in spec.bias) else spec.dtype

    def cost(self, spec: AttentionSpec) -> float | None:
        return rated_us(spec, self.name)


class Native(OfTorch):
    """``aten.scaled_dot_product_attention``."""

    name = "native"
    can = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        unlike_widths=True,
        groups=True,
        causal=True,
        dense_mask=True,
        bias_gradient=True,
        dropout=True,
        backward=True,
        deterministic=True,  # torch takes others of its kernels then
    )

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        unfused = _cpu(spec) if spec.device == "cpu" else _cuda(spec) if spec.device == "cuda" else ()
        for detail in unfused:
            yield reason("no_fused_form", detail=detail)
        if spec.device == "cuda" and spec.dropout != 0.0 and spec.dtype in HALF and _prefers_cudnn():
            yield reason("kernel_bug", detail=CUDNN_DROPOUT)
        if spec.device == "cuda" and reads_mask(spec) and mask_too_large(spec):
            yield reason("kernel_bug", detail=MASK_TOO_LARGE)

    def shares_heads(self, spec: AttentionSpec) -> bool:
        if spec.device != "cuda":
            return True
        # Of torch's kernels on CUDA only flash shares heads wherever it runs, and only without a mask: it takes half
        # types, one width, and one length where the mask is causal.
        plain = not spec.bias and (spec.mask.empty or (is_causal(spec) and spec.queries == spec.keys))
        return plain and spec.dtype in HALF and spec.qk_width == spec.v_width

    def emit(self, b: Builder, call: Call) -> Node:
        q, scale = upright(b, call)
        q, k, v = (rows_contiguous(b, node) for node in (q, call.k, call.v))
        mask = call.mask
        extra: dict[str, object] = {"scale": scale}
        if call.groups > 1:
            if self.shares_heads(call.spec):
                extra["enable_gqa"] = True
            else:
                k, v = (heads_repeated(b, node, call.groups) for node in (k, v))
        if call.spec.device == "cpu":
            q, k, v = one_width(b, q, k, v)
        else:
            q, k, v = (loadable(b, node) for node in (q, k, v))
            mask = keys_contiguous(b, call)
        rest = (mask, float(call.dropout), call.causal)
        out = b.call(aten.scaled_dot_product_attention.default, q, k, v, *rest, **extra)
        return narrowed(b, out, call.spec.v_width)


def reads_mask(spec: AttentionSpec) -> bool:
    """It is given a tensor over queries and keys."""
    return bool(spec.bias) or not (spec.mask.empty or is_causal(spec))


# Seen on an H200 with cuDNN 9.19: of each eight queries the four even ones drop the same keys, and so do the four odd.
CUDNN_DROPOUT = "cuDNN, which torch takes on this GPU, drops much the same keys for neighbouring queries"


def _prefers_cudnn() -> bool:
    """Torch puts cuDNN first on Hopper and Blackwell."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


MASK_TOO_LARGE = "its efficient form reads other rows of a mask of more than 2**32 (pytorch#187227)"


def mask_too_large(spec: AttentionSpec) -> bool:
    """More elements for one head than that form counts."""
    return isinstance(spec.queries, int) and isinstance(spec.keys, int) and spec.queries * spec.keys > 2**32


def _cpu(spec: AttentionSpec) -> Iterator[str]:
    if spec.qk_width != spec.v_width and not worth_padding(spec):
        yield f"keys of width {spec.qk_width} with values of width {spec.v_width} on the CPU"
    if spec.dropout != 0.0:
        yield "dropout on the CPU"
    if any(bias.grad for bias in spec.bias) and not spec.inference:
        yield "a bias that needs a gradient on the CPU"


def worth_padding(spec: AttentionSpec) -> bool:
    """The CPU's fused form needs one width; padding the narrower is cheap as long as it is not much narrower."""
    a, b = spec.qk_width, spec.v_width
    return isinstance(a, int) and isinstance(b, int) and max(a, b) <= 2 * min(a, b)


def _cuda(spec: AttentionSpec) -> Iterator[str]:
    if spec.dtype == "float64":
        yield "float64 on CUDA"
    masked = reads_mask(spec)
    multiple = 8 if spec.dtype in HALF else 4
    for width in {spec.qk_width, spec.v_width}:
        # flash pads odd widths by itself; the kernels for masks, float32 and unlike widths do not
        padded = spec.dtype in HALF and not masked and spec.qk_width == spec.v_width
        if not isinstance(width, int):
            yield f"heads of the symbolic width {width} on CUDA"
        elif width > 256 if padded else width % multiple:
            yield f"heads of width {width} on CUDA"
