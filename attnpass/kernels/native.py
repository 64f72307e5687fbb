"""torch's own scaled_dot_product_attention: always there, differentiable, and what inductor and AOTInductor know.

The call leaves the choice among torch's kernels to torch. What is refused here is every spec for which that choice
would be the unfused form: nothing would be gained. Sources: torch's own eligibility checks (sdp_utils), which differ
between CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from attnpass.cost import native_us
from attnpass.graph import Builder, is_one, tensor
from attnpass.kernels.base import Capabilities, Kernel
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
        return native_us(spec)

    def emit(self, b: Builder, call: Call) -> Node:
        q, k, v = (_rows_contiguous(b, node) for node in (call.q, call.k, call.v))
        shared = call.groups > 1
        if shared and not self.shares_heads(call.spec):
            # the kernels that torch would take do not share heads on CUDA; an expanded copy is still far smaller
            # than the scores
            k, v = (b.call(aten.repeat_interleave.self_int, node, call.groups, 1) for node in (k, v))
            shared = False
        mask = _keys_contiguous(b, call)
        extra = {"scale": call.scale}
        if shared:
            extra["enable_gqa"] = True
        width = call.spec.v_width
        if call.spec.device == "cpu":
            q, k, v = _one_width(b, q, k, v)
        rest = (mask, float(call.dropout), call.causal)
        out = b.call(aten.scaled_dot_product_attention.default, q, k, v, *rest, **extra)
        val = tensor(out)
        assert val is not None
        padded = isinstance(width, int) and val.shape[-1] != width  # a symbolic width is never padded
        return b.call(aten.slice.Tensor, out, -1, 0, width) if padded else out


def _keys_contiguous(b: Builder, call: Call) -> Node | None:
    """On CUDA a mask has to be laid out along the keys, also where it is the same for all of them."""
    val = tensor(call.mask) if call.mask is not None else None
    keys = tensor(call.k)
    if call.mask is None or val is None or keys is None or call.spec.device == "cpu" or not is_one(val.shape[-1]):
        return call.mask
    size: int | Node = call.spec.keys if isinstance(call.spec.keys, int) else b.call(aten.sym_size.int, call.k, 2)
    wide = b.call(aten.expand.default, call.mask, [-1, -1, -1, size])
    return b.call(aten.contiguous.default, wide)


def _one_width(b: Builder, q: Node, k: Node, v: Node) -> tuple[Node, Node, Node]:
    """Zeros appended to the narrower: they add nothing to a score, and the columns they make are cut off again."""
    tk, tv = tensor(k), tensor(v)
    assert tk is not None
    assert tv is not None
    if not isinstance(tk.shape[-1], int) or not isinstance(tv.shape[-1], int):
        return q, k, v
    more = tv.shape[-1] - tk.shape[-1]
    if more > 0:
        return b.call(aten.constant_pad_nd.default, q, [0, more]), b.call(aten.constant_pad_nd.default, k, [0, more]), v
    return (q, k, b.call(aten.constant_pad_nd.default, v, [0, -more])) if more else (q, k, v)


def _rows_contiguous(b: Builder, node: Node) -> Node:
    # the fused forms want the last dimension contiguous; without it torch silently takes the unfused one
    val = tensor(node)
    assert val is not None
    last = val.stride(-1)
    return node if isinstance(last, int) and last == 1 else b.call(aten.contiguous.default, node)


def _cpu(spec: AttentionSpec) -> Iterator[str]:
    if spec.qk_width != spec.v_width and not _worth_padding(spec):
        yield f"keys of width {spec.qk_width} with values of width {spec.v_width} on the CPU"
    if spec.dropout != 0.0:
        yield "dropout on the CPU"
    if any(bias.grad for bias in spec.bias) and not spec.inference:
        yield "a bias that needs a gradient on the CPU"


def _worth_padding(spec: AttentionSpec) -> bool:
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
