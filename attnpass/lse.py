"""What a kernel's log-sum-exp answers: an attention sink, and which rows have no key.

    sink        one more score s in the sum, whose value counts for nothing:  out * sigmoid(lse - s)
    empty row   lse = -inf

Both are exact, and gradients flow through both: to the sink as well.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from attnpass.graph import Builder, tensor

aten = torch.ops.aten


def sunk(b: Builder, out: Node, lse: Node, sink: Node) -> Node:
    """The result with a sink beside the keys; `sink` broadcasts to (batch, heads, queries, 1)."""
    val = tensor(out)
    assert val is not None
    wide = b.call(aten.unsqueeze.default, lse, -1)
    share = b.call(aten.sigmoid.default, b.call(aten.sub.Tensor, wide, sink))
    return b.call(aten.to.dtype, b.call(aten.mul.Tensor, out, share), val.dtype)


def alive(b: Builder, lse: Node) -> Node:
    """Where a query sees a key, (batch, heads, queries, 1). NaN among its scores is no lack of keys."""
    return b.call(aten.unsqueeze.default, b.call(aten.ne.Scalar, lse, -math.inf), -1)
