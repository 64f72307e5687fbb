"""A proved mask, its bias and a sink as the arguments that flash-attn and its kind have for them.

    j <= i + c,  i - l <= j     left, right: counted from the query's own position, i + keys - queries
    pad[b, j]                   which keys any query sees
    slope[h] * j                ALiBi, where no key is ahead of the query
    sink[h]                     one more score, which has no value

Nothing over queries and keys comes to be. Whatever is not exactly one of these is an obstacle, and the site goes to
another kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from attnpass.functions import obstacles as unexpressed
from attnpass.graph import Builder, Shared
from attnpass.kernels import Kernel
from attnpass.masks import AddedTerm
from attnpass.masks.expr import TRUE, Poly
from attnpass.prove import Proved
from attnpass.reasons import Reason, reason
from attnpass.site import Forms
from attnpass.spec import EmptyRow
from attnpass.structured import rendered

aten = torch.ops.aten


@dataclass(frozen=True)
class _Bounds:
    """How far a query sees, from its own position; None: without a bound."""

    left: int | None = None
    right: int | None = None


def obstacles(proved: Proved, kernel: Kernel) -> Iterator[Reason]:
    """Why a site cannot be said in the arguments of this kernel."""
    site, proof = proved.site, proved.proof
    if proof is not None or not proved.expressed:
        yield from unexpressed(proved)
        if not proved.expressed or proof is None:
            return
    bounds = _bounds(proved)
    if isinstance(bounds, str):
        yield reason("no_form", detail=bounds)
        return
    bounded = bounds != _Bounds()
    if bounds not in (_Bounds(), _Bounds(right=0)) and not kernel.can.window:
        yield reason("no_form", detail="a window, or a diagonal that does not end at the last key")
    if proof is not None:
        if proof.structure.keys != TRUE and bounded:
            # the keys that are seen are moved together, so positions are not what they were
            yield reason("no_form", detail="padded keys besides a causal mask or a window")
        if proof.biases and (
            len(proof.biases) > 1
            or _steepness(proved, proof.biases[0]) is None
            or bounds.right != 0
            or not isinstance(site.spec.q[1], int)
        ):
            yield reason("no_form", detail="a bias that is not ALiBi over the keys behind the query")
        if proof.biases and site.sink is not None:
            # slopes say by how much a bias grows with each key; what it is at the first of them, a sink sees
            yield reason("no_form", detail="a bias beside a sink")
    unanswered = site.rows is not EmptyRow.IMPOSSIBLE and site.sink is None
    if unanswered and not kernel.gives_lse(site.spec):
        yield reason("empty_rows", detail="0")
    if unanswered and site.dropout != 0.0:
        yield reason("empty_rows", detail="without its dropout")


def forms(b: Builder, proved: Proved, shared: Shared, sink: Node | None) -> Forms:
    """The arguments of a site that has no obstacles."""
    bounds, proof = _bounds(proved), proved.proof
    assert isinstance(bounds, _Bounds)
    if proof is None:
        return Forms(left=bounds.left, right=bounds.right, sink=sink)
    seen, place = proof.structure.keys, (proof.frame.lengths, proved.site.device)
    keys = slopes = None
    if seen != TRUE:
        keys = shared.get(("keys", seen, *place), b, lambda: rendered(b, proved, seen))
    if proof.biases:
        added = proof.biases[0]
        key = ("slopes", added.bias.value, added.term.factor, *place)
        slopes = shared.get(key, b, lambda: _slopes(b, proved, added))
    return Forms(left=bounds.left, right=bounds.right, slopes=slopes, keys=keys, sink=sink)


def _bounds(proved: Proved) -> _Bounds | str:
    """The bounds of a mask, or what it is that has none such."""
    site, proof = proved.site, proved.proof
    if proof is None:
        # a call that says by itself that it is causal counts from the start of both
        if not site.causal:
            return _Bounds()
        return _Bounds(right=0) if site.spec.queries == site.spec.keys else "a diagonal that starts at the first key"
    structure, frame = proof.structure, proof.frame
    numberless = structure.documents or structure.limits or structure.residual != TRUE
    if structure.prefix is not None or structure.chunk is not None or numberless:
        return "a prefix, chunks, documents, limits that are data or a mask without proved structure"
    ahead = frame.keys - frame.queries
    sides: list[int | None] = []
    for bound in (
        None if structure.lower is None else structure.lower + ahead,
        None if structure.upper is None else structure.upper - ahead,
    ):
        size = None if bound is None else bound.value
        if bound is not None and (size is None or size < 0):
            # kernels read a negative number as "no bound"
            return "a diagonal that does not end at the last key by a known number"
        sides.append(size)
    return _Bounds(*sides)


def _steepness(proved: Proved, added: AddedTerm) -> Poly | None:
    """By how much a bias's distance grows with each key, where it is linear in the key; else None."""
    proof = proved.proof
    assert proof is not None
    alibi, j = added.bias.alibi, proof.frame.var("j")
    if alibi is None or not isinstance(alibi.distance, Poly) or j is None:
        return None
    parts = alibi.distance.split(j)
    # the rest is the same for a whole row of scores, which softmax does not see
    return None if parts is None or parts[0].value is None else parts[0]


def _slopes(b: Builder, proved: Proved, added: AddedTerm) -> Node:
    """One slope for each head, in float32."""
    alibi, steepness = added.bias.alibi, _steepness(proved, added)
    assert alibi is not None
    assert steepness is not None
    wide = rendered(b, proved, alibi.slope, torch.float32)
    heads = proved.site.spec.q[1]
    assert isinstance(heads, int)
    flat = b.call(aten.reshape.default, b.call(aten.expand.default, wide, [1, heads, 1, 1]), [heads])
    factor = (steepness.value or 0) * added.term.factor
    return flat if factor == 1.0 else b.call(aten.mul.Tensor, flat, factor)
