"""Huawei's Ascend: ``torch_npu.npu_fusion_attention``, of the package torch-npu.

Called as the operation that it registers, ``npu::npu_fusion_attention``, which has its own gradients:

    layout         BNSD, (batch, heads, length, width); `head_num` are q's, k and v may have fewer
    atten_mask     bool, **True: the key is not seen**; every dimension but the heads' and the batch's in full
    sparse_mode    0: the mask is all there is; 2: causal from the first of both, by a mask of 2048 x 2048 that is
                   always the same
    scale          1.0 where none is given
    keep_prob      one minus the probability of dropout

**Verified by contract only**: nothing of this has run on an Ascend. Its calls are held to the schema of the wheel
(tests/kernels/contracts) and their numbers to a function that does what it documents.

Limits: no biases. What it adds to the scores is multiplied by the scale as well, and dividing by it first would round.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import Builder, is_one, tensor
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.kernels.late import imported, version_of
from attnpass.kernels.operands import rows_contiguous
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec

aten = torch.ops.aten
_INSTALL = "pip install torch-npu, which needs CANN"
_CAUSAL = 2048  # the side of the mask that stands for all causal ones
_MOST_HEADS = 256


class NativeNpu(Kernel):
    """``torch_npu.npu_fusion_attention``."""

    name = "native_npu"
    verified = "contract"
    only_by_name = True  # what never ran is not taken unasked
    can = Capabilities(
        devices=frozenset({"npu"}),
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        max_width=768,
        unlike_widths=True,
        groups=True,
        causal=True,
        dense_mask=True,
        dropout=True,
        backward=True,
    )

    def available(self) -> Reason | None:
        found = imported("torch_npu", "torch_npu", _INSTALL)
        missing = found if isinstance(found, str) else None
        if missing is None and not hasattr(torch.ops.npu, "npu_fusion_attention"):
            missing = "this torch_npu has no npu_fusion_attention"
        if missing is None and not found.npu.is_available():  # type: ignore[union-attr]
            missing = "there is no NPU"
        return None if missing is None else reason("unavailable", detail=missing)

    def version(self) -> str:
        return version_of("torch-npu")

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        if spec.bias:
            yield reason("no_form", detail="a bias that is not multiplied by the scale")
        qk, v = spec.qk_width, spec.v_width
        if isinstance(qk, int) and isinstance(v, int) and v > qk:
            yield reason("unlike_widths")
        if not isinstance(spec.q[1], int) or spec.q[1] > _MOST_HEADS:
            yield reason("no_form", detail=f"more than {_MOST_HEADS} heads")

    def emit(self, b: Builder, call: Call) -> Node:
        q, k, v = (rows_contiguous(b, node) for node in (call.q, call.k, call.v))
        heads = call.spec.q[1]
        given = {
            "atten_mask": _causal(b, q) if call.causal else _off(b, call),
            "scale": call.scale,
            "keep_prob": 1.0 - call.dropout,
            "sparse_mode": 2 if call.causal else 0,
        }
        results = b.call(torch.ops.npu.npu_fusion_attention.default, q, k, v, heads, "BNSD", **given)
        return b.call(operator.getitem, results, 0)


def _causal(b: Builder, q: Node) -> Node:
    val = tensor(q)
    assert val is not None
    ones = b.call(aten.ones.default, [_CAUSAL, _CAUSAL], dtype=torch.bool, device=val.device)
    return b.call(aten.triu.default, ones, 1)


def _off(b: Builder, call: Call) -> Node | None:
    """Where a key is not seen, in one of the shapes that it takes: one mask for all, or one for each row or head."""
    val = tensor(call.mask) if call.mask is not None else None
    if call.mask is None or val is None:
        return None
    if val.dtype is not torch.bool:
        raise Refuse("no_form", detail="a mask that is added to the scores")
    shape: list[int | Node] = [-1, -1, b.size(call.q, 2), b.size(call.k, 2)]
    if not is_one(val.shape[1]):
        shape[0] = b.size(call.q, 0)
    whole = b.call(aten.expand.default, b.call(aten.logical_not.default, call.mask), shape)
    return b.call(aten.contiguous.default, whole)
