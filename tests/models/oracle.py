"""How much attention there is in a model, found without the pass: taint on the tensors of one eager run.

    product of two activations -> "score" -> elementwise, views -> softmax -> "prob" -> elementwise, views -> product

A softmax that is reached by a score and reaches a product is one site *there*. Tags belong to storages, so in-place
operations and views carry them. A product with a parameter (a linear layer, a convolution) ends a tag: a router, or
talking heads, which have no fused form, are not counted. The count is of executed softmaxes, loops included.
A softmax over a single key is none either: it is always one.
Limits: products spelled as multiply-and-sum are not seen, and `exp` counts as a softmax only between two products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_FACTORS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.baddbmm: (1, 2), aten.addmm: (1, 2), aten.dot: (0, 1)}
_SOFTMAX = {aten._softmax}
# what a call of scaled_dot_product_attention becomes; its unfused form alone uses _safe_softmax
_CALLS = {
    aten._safe_softmax, aten._scaled_dot_product_attention_math, aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}  # fmt: skip
_END = {
    aten.convolution, aten.native_layer_norm, aten.native_batch_norm, aten.native_group_norm, aten.embedding,
    aten.addmv, aten.mv, aten.topk, aten.max, aten.argmax, aten.argmin, aten.sum, aten.mean, aten.amax, aten.amin,
    aten.logsumexp, aten._fused_rms_norm, aten._log_softmax, aten.var_mean, aten.linalg_vector_norm,
}  # fmt: skip

Tag = int  # 0: a score; n > 0: the probabilities of the n-th softmax


class Oracle(TorchDispatchMode):
    """Watches one eager run; `there()`, `softmaxes` and `existing` are its answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.softmaxes = 0
        self.existing = 0  # calls of scaled_dot_product_attention
        self._sites: set[Tag] = set()
        self._count = 0
        self._scored: set[Tag] = set()
        self._behind: dict[int, frozenset[Tag]] = {}  # the softmaxes that a tensor was computed from
        self._tags: dict[int, frozenset[Tag]] = {}
        self._alive: list[Tensor] = []  # a freed storage's address would be used again
        self._weights = {_key(p) for p in (*model.parameters(), *model.buffers())}

    def there(self, outputs: Any) -> int:
        """The number of sites that `outputs` were computed from; what nobody reads is no part of any graph."""
        read = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        return len(self._sites & self._all_behind(read))

    def _all_behind(self, tensors: list[Tensor]) -> frozenset[Tag]:
        return frozenset().union(*(self._behind.get(_key(tensor), frozenset()) for tensor in tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = func.overloadpacket
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tags = frozenset().union(*(self._of(tensor) for tensor in read))
        if op in _CALLS:
            self.existing += 1
            tags = frozenset()
        elif op in _SOFTMAX:
            self.softmaxes += 1
            tags = self._softmax(tags if args[0].shape[args[1]] > 1 else frozenset())
        elif op is aten.exp and 0 in tags:
            tags = self._softmax(tags)
        elif op in _FACTORS:
            tags = self._product([args[i] for i in _FACTORS[op]])
        elif op in _END:
            tags = frozenset()
        behind = self._all_behind(read) | {tag for tag in tags if tag}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._alive.append(tensor)
                self._tags[_key(tensor)] = tags
                self._behind[_key(tensor)] = behind
        return out

    def _of(self, tensor: Tensor) -> frozenset[Tag]:
        return self._tags.get(_key(tensor), frozenset())

    def _softmax(self, tags: frozenset[Tag]) -> frozenset[Tag]:
        self._count += 1
        if 0 in tags:
            self._scored.add(self._count)
        return frozenset({self._count})

    def _product(self, factors: list[Tensor]) -> frozenset[Tag]:
        if any(_key(factor) in self._weights for factor in factors):
            return frozenset()
        probs = {tag for factor in factors for tag in self._of(factor) if tag}
        self._sites |= probs & self._scored
        return frozenset() if probs else frozenset({0})


def _key(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor without storage (inside vmap, for instance)
        return id(tensor)
