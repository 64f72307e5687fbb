"""Biases of float data as functions: exact whatever the data hold, and as fast as other biases while they are tame.

    tame     every number that the biases read is below masks.bias.TAME; asked of the tables themselves, of nothing
             over queries and keys

                                       while tame              otherwise
    mask                               the proved one          keeps all keys
    blocks that are computed           those that it keeps     all
    score of a key that is kept        score + biases          the same
    ... that is masked                 never looked at         what the original's fills and biases make of it
    a row without a key                as proved               one of -inf alone: as the original's softmax answers it

One set of functions does both: `tame` is a tensor of one element, which the mask and the lists of blocks read, so
nothing waits for its value. Limits: no gradients, no float16 (prove.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.fx import Node

from attnpass.graph import Builder, Shared, tensor
from attnpass.layers import FLOOR
from attnpass.masks import AddedTerm
from attnpass.masks.bias import TAME
from attnpass.masks.expr import Value
from attnpass.prove import Proved
from attnpass.structured import mask_key, rendered, written

aten = torch.ops.aten
Thing = Any  # a node of a graph, or of a function


def tameness(b: Builder, proved: Proved, shared: Shared) -> Node | None:
    """Whether the data are tame; None where that makes no difference, because nothing is masked."""
    known, proof = proved.while_tame, proved.proof
    if known is None or proof is None or proof.nothing_masked:
        return None
    nodes = tuple(proof.nodes[source] for source in known.sources)

    def make() -> Node:
        out: Node | None = None
        for node in nodes:
            # NaN is not below anything
            small = b.call(aten.all.default, b.call(aten.lt.Scalar, b.call(aten.abs.default, node), TAME))
            out = small if out is None else b.call(aten.logical_and.default, out, small)
        assert out is not None
        return out

    return shared.get(("tame", nodes), b, make)


def unless(call: Callable[..., Thing], tame: Thing | None, keep: Thing) -> Thing:
    """The mask, which keeps all keys where the data are not tame."""
    return keep if tame is None else call(aten.logical_or.default, keep, call(aten.logical_not.default, tame))


def addend(call: Callable[..., Thing], render: Callable[[Value, torch.dtype], Thing], added: AddedTerm) -> Thing:
    """What one bias adds to a score, in the dtype that it has."""
    bias = render(added.bias.value, _dtype(added))
    return bias if added.term.factor == 1.0 else call(aten.mul.Tensor, bias, added.term.factor)


def stepped(
    call: Callable[..., Thing],
    render: Callable[[Value, torch.dtype], Thing],
    proved: Proved,
    score: Thing,
) -> Thing:
    """A score, in float32, with all that the original adds to it or fills it with, one after the other.

    What is lower or higher than kernels can compute with (they change the base of the exponential) is brought nearer
    without changing the order of scores: the greatest of them still counts alone, and infinities stay.
    """
    known, proof = proved.while_tame, proved.proof
    assert known is not None
    assert proof is not None
    for step in known.steps:
        if not isinstance(step, AddedTerm):
            score = call(aten.where.ScalarOther, render(proof.keep, torch.bool), score, step)
            continue
        before = score
        if not step.droppable:  # else it is the same for a whole row of scores
            score = call(aten.add.Tensor, score, addend(call, render, step))
        if step.masking:
            filled = call(aten.add.Tensor, before, proof.fills[0])
            score = call(aten.where.self, render(proof.keep, torch.bool), score, filled)
    ordinary = call(aten.clamp.default, score, FLOOR, -FLOOR)
    # half of each: exactly the score where that is ordinary
    score = call(aten.add.Tensor, call(aten.mul.Tensor, score, 0.5), call(aten.mul.Tensor, ordinary, 0.5))
    if proved.site.spec.device == "cpu":
        # the operation leaves NaN out of the sum there (torch 2.13), but not infinity, which makes NaN of a row as well
        score = call(aten.where.ScalarOther, call(aten.eq.Tensor, score, score), score, math.inf)
    return score


def rows_with_a_key(b: Builder, proved: Proved, shared: Shared) -> Node:
    """Where some key of a query is neither masked nor has a score of minus infinity, (batch, heads, queries, 1).

    What is reduced is written out only for that, which a compiler makes one loop of.
    """
    tame = tameness(b, proved, shared)

    def make() -> Node:
        zero = b.call(aten.scalar_tensor.default, 0.0, dtype=torch.float32, device=proved.site.device)
        score = stepped(b.call, lambda e, dtype: rendered(b, proved, e, dtype), proved, zero)
        there = b.call(aten.ne.Scalar, score, -math.inf)
        seen = b.call(aten.logical_and.default, there, unless(b.call, tame, written(b, proved)))
        return b.call(aten.any.dim, seen, -1, True)

    return shared.get(("tame rows", *mask_key(proved), *score_key(proved)), b, make)


def score_key(proved: Proved) -> tuple[Hashable, ...]:
    """Equal for the sites of a graph whose scores are changed by the same function, soft cap and sink aside."""
    known, proof = proved.while_tame, proved.proof
    assert proof is not None
    steps = proof.biases if known is None else known.steps
    what = (s if not isinstance(s, AddedTerm) else (s.bias.value, s.term.factor, s.masking, _dtype(s)) for s in steps)
    return (*what, *(() if known is None else (proof.keep, proof.fills)))


def _dtype(added: AddedTerm) -> torch.dtype:
    val = tensor(added.term.node)
    assert val is not None
    return val.dtype
