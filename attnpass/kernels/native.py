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
from attnpass.kernels.operands import heads_repeated, keys_contiguous, narrowed, one_width, rows_contiguous
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec, is_causal

aten = torch.ops.aten

_HALF = {"bfloat16", "float16"}


class Native(Kernel):
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
    )

    def version(self) -> str:
        return torch.__version__

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        for bias in spec.bias:
            if not bias.exact and self.compute_dtype(spec) == spec.dtype:
                yield reason("bias_precision", detail=bias.dtype, dtype=spec.dtype)
        unfused = _cpu(spec) if spec.device == "cpu" else _cuda(spec) if spec.device == "cuda" else ()
        for detail in unfused:
            yield reason("no_fused_form", detail=detail)

    def compute_dtype(self, spec: AttentionSpec) -> str:
        # on the CPU float32 is as fast as the half types, so a wide bias can be added in full
        wide = spec.device == "cpu" and all(b.exact or b.dtype == "float32" for b in spec.bias)
        return "float32" if wide and spec.dtype in _HALF and not all(b.exact for b in spec.bias) else spec.dtype

    def shares_heads(self, spec: AttentionSpec) -> bool:
        if spec.device != "cuda":
            return True
        # Of torch's kernels on CUDA only flash shares heads wherever it runs, and only without a mask: it takes half
        # types, one width, and one length where the mask is causal.
        plain = not spec.bias and (spec.mask.empty or (is_causal(spec) and spec.queries == spec.keys))
        return plain and spec.dtype in _HALF and spec.qk_width == spec.v_width

    def cost(self, spec: AttentionSpec) -> float | None:
        return rated_us(spec, self.name)

    def emit(self, b: Builder, call: Call) -> Node:
        q, k, v = (rows_contiguous(b, node) for node in (call.q, call.k, call.v))
        mask = call.mask
        extra: dict[str, object] = {"scale": call.scale}
        if call.groups > 1:
            if self.shares_heads(call.spec):
                extra["enable_gqa"] = True
            else:
                k, v = (heads_repeated(b, node, call.groups) for node in (k, v))
        if call.spec.device == "cpu":
            q, k, v = one_width(b, q, k, v)
        else:
            mask = keys_contiguous(b, call)
        rest = (mask, float(call.dropout), call.causal)
        out = b.call(aten.scaled_dot_product_attention.default, q, k, v, *rest, **extra)
        return narrowed(b, out, call.spec.v_width)


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
    masked = bool(spec.bias) or not (spec.mask.empty or is_causal(spec))
    multiple = 8 if spec.dtype in _HALF else 4
    for width in {spec.qk_width, spec.v_width}:
        # flash pads odd widths by itself; the kernels for masks, float32 and unlike widths do not
        padded = spec.dtype in _HALF and not masked and spec.qk_width == spec.v_width
        if not isinstance(width, int):
            yield f"heads of the symbolic width {width} on CUDA"
        elif width > 256 if padded else width % multiple:
            yield f"heads of width {width} on CUDA"
