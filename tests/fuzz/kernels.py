"""Plain kernels that stand in for those of GPUs, so that what is written for such kernels is tried everywhere.

    fuzz_tensor      takes one mask tensor; a soft cap, gradients of biases
    fuzz_forms       takes bounds, slopes, padded keys, a sink, as flash-attn and its kind do
    fuzz_functions   FlexAttention's own operation, run as it stands: functions of a score and its index

They compute in float32 from narrow operands, as fused kernels do, in operations that autograd knows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch.fx import Node

import attnpass
from attnpass.graph import Builder, tensor
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.kernels.flex import Flex
from attnpass.reasons import Reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec

aten = torch.ops.aten
_ANY = {
    "devices": frozenset({"cpu", "cuda"}),
    "dtypes": frozenset({"float16", "bfloat16", "float32", "float64"}),
    "unlike_widths": True,
    "groups": True,
    "causal": True,
    "softcap": True,
    "backward": True,
    "deterministic": True,
}


class _Plain(Kernel):
    """Scores, softmax and values, one after the other."""

    only_by_name = True

    def _scores(self, b: Builder, call: Call) -> tuple[Node, Node]:
        """Capped scores and values in float32, key/value heads repeated."""
        wide = torch.float64 if call.spec.dtype == "float64" else torch.float32
        q, k, v = (b.call(aten.to.dtype, node, wide) for node in (call.q, call.k, call.v))
        if call.groups > 1:
            k, v = (b.call(aten.repeat_interleave.self_int, node, call.groups, 1) for node in (k, v))
        s = b.call(aten.matmul.default, q, b.call(aten.transpose.int, k, -1, -2))
        s = b.call(aten.mul.Tensor, s, call.scale)
        cap = call.spec.softcap
        if cap is not None:
            s = b.call(aten.mul.Tensor, b.call(aten.tanh.default, b.call(aten.div.Tensor, s, cap)), cap)
        return s, v

    def _finished(self, b: Builder, call: Call, p: Node, v: Node) -> Node:
        dtype = tensor(call.v).dtype  # type: ignore[union-attr]
        return b.call(aten.to.dtype, b.call(aten.matmul.default, p, v), dtype)


class PlainTensor(_Plain):
    """One boolean or added mask."""

    name = "fuzz_tensor"
    can = Capabilities(**_ANY, dense_mask=True, bias_gradient=True)  # type: ignore[arg-type]

    def emit(self, b: Builder, call: Call) -> Node:
        s, v = self._scores(b, call)
        if call.causal:
            ones = b.call(aten.ones_like.default, s, dtype=torch.bool)
            s = b.call(aten.where.ScalarOther, b.call(aten.tril.default, ones), s, -math.inf)
        if call.mask is not None:
            boolean = tensor(call.mask).dtype == torch.bool  # type: ignore[union-attr]
            s = (
                b.call(aten.where.ScalarOther, call.mask, s, -math.inf)
                if boolean
                else b.call(aten.add.Tensor, s, call.mask)
            )
        return self._finished(b, call, b.call(aten.softmax.int, s, -1), v)


class PlainForms(_Plain):
    """Bounds counted from the end, slopes, padded keys, a sink."""

    name = "fuzz_forms"
    takes = "forms"
    can = Capabilities(**_ANY, window=True, key_padding=True, alibi=True, sink=True)  # type: ignore[arg-type]

    def gives_lse(self, spec: AttentionSpec) -> bool:
        return True

    def emit(self, b: Builder, call: Call) -> Node:
        return self.emit_with_lse(b, call)[0]

    def emit_with_lse(self, b: Builder, call: Call) -> tuple[Node, Node]:
        s, v = self._scores(b, call)
        forms = call.forms
        assert forms is not None
        ones = b.call(aten.ones_like.default, s)

        def behind(dim: int) -> Node:
            """How many come after each, along this dimension."""
            turned = b.call(aten.flip.default, b.call(aten.cumsum.default, ones, dim), [dim])
            return b.call(aten.sub.Tensor, turned, 1.0)

        ahead = b.call(aten.sub.Tensor, behind(-2), behind(-1))  # j - (i + keys - queries)
        if forms.slopes is not None:
            slopes = b.call(aten.view.default, forms.slopes, [1, -1, 1, 1])
            s = b.call(aten.add.Tensor, s, b.call(aten.mul.Tensor, ahead, slopes))
        if forms.right is not None:
            s = b.call(aten.where.ScalarOther, b.call(aten.le.Scalar, ahead, forms.right), s, -math.inf)
        if forms.left is not None:
            s = b.call(aten.where.ScalarOther, b.call(aten.ge.Scalar, ahead, -forms.left), s, -math.inf)
        if forms.keys is not None:
            s = b.call(aten.where.ScalarOther, forms.keys, s, -math.inf)
        keys = s
        if forms.sink is not None:
            column = b.call(aten.slice.Tensor, b.call(aten.zeros_like.default, s), -1, 0, 1)
            sink = b.call(aten.add.Tensor, column, b.call(aten.to.dtype, forms.sink, tensor(s).dtype))  # type: ignore[union-attr]
            keys = b.call(aten.cat.default, [s, sink], -1)
        lse = b.call(aten.logsumexp.default, keys, [-1], True)
        hollow = b.call(aten.eq.Scalar, lse, -math.inf)
        p = b.call(aten.exp.default, b.call(aten.sub.Tensor, s, b.call(aten.where.ScalarSelf, hollow, 0.0, lse)))
        return self._finished(b, call, p, v), b.call(aten.squeeze.dim, lse, -1)


class Functions(Flex):
    """What is written for FlexAttention, without the limits of the code that inductor writes for the CPU."""

    name = "fuzz_functions"
    only_by_name = True
    can = dataclasses.replace(Flex.can, dtypes=frozenset({"float16", "bfloat16", "float32"}))

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from (r for r in super().refusals(spec) if r.code not in ("kernel_bug", "head_width"))

    def cost(self, spec: AttentionSpec) -> float | None:
        return None


KERNELS = (PlainTensor(), PlainForms(), Functions())


def register() -> None:
    """Make them known, once."""
    known = {kernel.name for kernel in attnpass.kernels.kernels()}
    for kernel in KERNELS:
        if kernel.name not in known:
            attnpass.register_kernel(kernel)
