"""Keys that are seen moved to the front, for kernels that take sequences of several lengths in one tensor.

    keys     x . x x | . . x .          which are seen, two batch rows of four
    order    0 2 3 6 | 1 4 5 7          their places in (batch * keys); those that nobody sees come last
    ends     0 3 4                      where the keys of each batch row begin, and the last one's end

The order of the keys that are seen stays, so any padding will do: left, right, in between, whole batch rows. It is a
permutation, its size does not depend on the data, nothing waits for the GPU, and the gradients go back the same way.
Both are made once for all sites that read the same mask.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from attnpass.graph import Builder, Shared, value

aten = torch.ops.aten

_MEMO = "attnpass_packed"


def packed(b: Builder, keys: Node, k: Node) -> tuple[Node, Node]:
    """`order` (int64) and `ends` (int32) of keys broadcastable to (batch, 1, 1, keys), for this k."""
    made: Shared = keys.meta.setdefault(_MEMO, Shared())
    shape = value(k).shape
    return made.all((str(shape[0]), str(shape[2])), b, lambda: _packed(b, keys, k), lambda pair: pair)


def _packed(b: Builder, keys: Node, k: Node) -> tuple[Node, Node]:
    batch, length = (b.size(k, dim) for dim in (0, 2))
    seen = b.call(aten.reshape.default, b.call(aten.expand.default, keys, [batch, 1, 1, length]), [batch, length])
    unseen = b.call(aten.reshape.default, b.call(aten.logical_not.default, seen), [-1])
    # sorting bool is not done everywhere; the order of equals stays
    ranks = b.call(aten.to.dtype, unseen, torch.uint8)
    order = b.call(operator.getitem, b.call(aten.sort.stable, ranks, stable=True, dim=0), 1)
    counts = b.call(aten.cumsum.default, b.call(aten.sum.dim_IntList, seen, [1]), 0)
    ends = b.call(aten.constant_pad_nd.default, b.call(aten.to.dtype, counts, torch.int32), [1, 0])
    return order, ends
