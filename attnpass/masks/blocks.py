"""Which blocks of queries and keys a mask keeps, from its closed forms: nothing over queries x keys ever comes to be.

    j <= i + c,  blocks of 128        keys ->
                                      queries  full  part  none  none
                                        |      full  full  part  none
                                        v      full  full  full  part

A kernel that takes the mask as a function skips the blocks that keep nothing, applies the function in the partial ones,
and does without it in the full ones. Each conjunct of the mask is judged by itself, at the corners of the block:

    upper and lower bounds, prefix, chunks    exactly, from the first and last position of the block
    key padding                               exactly, by a reduction over each block of keys
    documents                                 by the least and greatest id of the block: never too few
    limits                                    exactly, by the least and greatest of the block's queries
    everything else                           may keep something, never keeps all

A block that every conjunct may keep is computed, though no single pair need satisfy them all: too many partial blocks
cost time only. A block is full only where every conjunct keeps all of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnpass.graph import Builder
from attnpass.masks.expr import TRUE, ZERO, Poly
from attnpass.masks.frame import Frame
from attnpass.masks.render import Renderer, SizeNodes, in_graph
from attnpass.masks.sizes import Sizes
from attnpass.masks.structure import Document, Limit, Structure

aten = torch.ops.aten
Thing = Any  # a node or a tensor: whatever `call` takes and gives
BLOCK = 128
_COMPARED = 1 << 22  # comparisons of blocks with one another that take less than a sort: up to 20,000 queries and keys


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Booleans over (batch, 1, query blocks, key blocks), of size one where nothing depends on the axis."""

    some: Thing  # False: no pair of the block is kept
    full: Thing | None  # True: all pairs of the block are kept; None: that is known of no block


class Judge:
    """Judges conjuncts by calling operations: nodes of a graph, or tensors right away, as Renderer does."""

    def __init__(
        self,
        call: Callable[..., Thing],
        frame: Frame,
        *,
        number: Callable[[Poly], Thing],
        scalar: Callable[..., Thing],
        renderer: Callable[[Mapping[str, Thing]], Renderer],
        device: torch.device,
        size: int = BLOCK,
    ) -> None:
        self.call = call
        self.frame = frame
        self.number = number
        self.scalar = scalar
        self.renderer = renderer
        self.device = device
        self.size = size
        self._ends: dict[str, tuple[Thing, Thing]] = {}

    def __call__(self, structure: Structure) -> Judged:
        parts: list[Judged] = []
        if structure.upper is not None:
            parts.append(self._upper(structure.upper, structure.prefix))
        if structure.lower is not None:
            parts.append(self._lower(structure.lower))
        if structure.chunk is not None:
            parts.append(self._chunk(structure.chunk))
        if structure.keys != TRUE:
            parts.append(self._keys(structure))
        parts += [self._document(document) for document in structure.documents]
        parts += [self._limit(limit) for limit in structure.limits]
        parts += [self._there(axis) for axis in ("i", "j") if not parts or not self._even(axis)]
        shape = [-1, -1, self.count("i"), self.count("j")]
        some = self._all([part.some for part in parts], shape)
        full = self._all([part.full for part in parts], shape) if structure.residual == TRUE else None
        return Judged(some=some, full=full)

    def _all(self, judgements: list[Thing], shape: list[Thing]) -> Thing:
        out = judgements[0]
        for one in judgements[1:]:
            out = self._both(out, one)
        return self.call(aten.expand.default, out, shape)

    # -- positions -----------------------------------------------------------------------------------------------------

    def length(self, axis: str) -> Thing:
        return self.number(self.frame.queries if axis == "i" else self.frame.keys)

    def count(self, axis: str) -> Thing:
        """How many blocks: the last one may be short, and for a symbolic length there is one more, which keeps nothing.

        So they are never one, and nothing has to be assumed of the length.
        """
        length = self.length(axis)
        more = self.size - 1 if isinstance(length, int) else 2 * self.size - 1
        return self.scalar(operator.floordiv, self.scalar(operator.add, length, more), self.size)

    def ends(self, axis: str) -> tuple[Thing, Thing]:
        """The first and the last position of each block."""
        if axis not in self._ends:
            blocks = self.call(aten.arange.default, self.count(axis), device=self.device)
            blocks = self.call(aten.reshape.default, blocks, [1, 1, -1, 1] if axis == "i" else [1, 1, 1, -1])
            first = self.call(aten.mul.Tensor, blocks, self.size)
            last = self._inside(self.call(aten.add.Tensor, first, self.size - 1), axis)
            self._ends[axis] = (first, last)
        return self._ends[axis]

    def _inside(self, positions: Thing, axis: str) -> Thing:
        """A short block's last position stands for those beyond it: that changes no "any" and no "all"."""
        return self.call(aten.clamp.default, positions, None, self.scalar(operator.sub, self.length(axis), 1))

    def _positions(self, axis: str) -> Thing:
        """All positions of all blocks, the positions of one block along the last dimension."""
        total = self.scalar(operator.mul, self.count(axis), self.size)
        positions = self.call(aten.arange.default, total, device=self.device)
        return self.call(aten.reshape.default, self._inside(positions, axis), [1, 1, -1, self.size])

    def _even(self, axis: str) -> bool:
        """Known to be made of whole blocks."""
        length = self.length(axis)
        return isinstance(length, int) and length % self.size == 0

    def _there(self, axis: str) -> Judged:
        # a short block is never full, as torch has it: kernels look at the end of a tensor in partial blocks
        (first, _), length = self.ends(axis), self.length(axis)
        some = self.call(aten.lt.Scalar, first, length)
        beyond = self.call(aten.add.Tensor, first, self.size)
        return Judged(some=some, full=self.call(aten.le.Scalar, beyond, length))

    # -- conjuncts -----------------------------------------------------------------------------------------------------

    def _upper(self, offset: Poly, prefix: Poly | None) -> Judged:
        # j - i is least between the first key and the last query, greatest between the last key and the first query
        (i0, i1), (j0, j1) = self.ends("i"), self.ends("j")
        some, full = self._le(j0, self._plus(i1, offset)), self._le(j1, self._plus(i0, offset))
        if prefix is not None:
            # a pair that neither allows lies furthest out at the last key and the first query
            limit = self.number(prefix)
            some = self.call(aten.logical_or.default, some, self.call(aten.lt.Scalar, j0, limit))
            full = self.call(aten.logical_or.default, full, self.call(aten.lt.Scalar, j1, limit))
        return Judged(some=some, full=full)

    def _lower(self, offset: Poly) -> Judged:
        (i0, i1), (j0, j1) = self.ends("i"), self.ends("j")
        return Judged(some=self._le(self._plus(i0, -offset), j1), full=self._le(self._plus(i1, -offset), j0))

    def _chunk(self, size: Poly) -> Judged:
        # the chunks of a block's positions follow one another without a gap
        by = self.number(size)
        return self._ranges(*(tuple(self._divided(end, by) for end in self.ends(axis)) for axis in ("i", "j")))

    def _keys(self, structure: Structure) -> Judged:
        render = self.renderer({"b": self._batch(), "j": self._positions("j")})
        keep = render(structure.keys)
        some, full = (self.call(op, keep, -1) for op in (aten.any.dim, aten.all.dim))
        return Judged(some=self.call(aten.unsqueeze.default, some, 2), full=self.call(aten.unsqueeze.default, full, 2))

    def _document(self, document: Document) -> Judged:
        return self._ranges(self._extremes(document.query, "i"), self._extremes(document.key, "j"))

    def _limit(self, limit: Limit) -> Judged:
        (least, most), (j0, j1) = self._extremes(limit.end, "i"), self.ends("j")
        if limit.upper:
            return Judged(some=self._le(j0, most), full=self._le(j1, least))
        return Judged(some=self._le(least, j1), full=self._le(most, j0))

    def _extremes(self, expr: Poly, axis: str) -> tuple[Thing, Thing]:
        """The least and the greatest of an integer over (b, axis) in each block of that axis."""
        render = self.renderer({"b": self._batch(), axis: self._positions(axis)})
        numbers = render(expr, torch.int64)
        least, most = (self.call(op, numbers, [-1]) for op in (aten.amin.default, aten.amax.default))
        along = 3 if axis == "i" else 2
        return self.call(aten.unsqueeze.default, least, along), self.call(aten.unsqueeze.default, most, along)

    def _ranges(self, query: tuple[Thing, ...], key: tuple[Thing, ...]) -> Judged:
        """Some number of one range may be in the other; all numbers of both are one and the same."""
        some = self._both(self._le(query[0], key[1]), self._le(key[0], query[1]))
        full = self._both(self._le(query[1], key[0]), self._le(key[1], query[0]))
        return Judged(some=some, full=full)

    # -- operations ----------------------------------------------------------------------------------------------------

    def _batch(self) -> Thing:
        n = self.number(self.frame.lengths[0])
        return self.call(aten.reshape.default, self.call(aten.arange.default, n, device=self.device), [-1, 1, 1, 1])

    def _plus(self, x: Thing, offset: Poly) -> Thing:
        return x if offset == ZERO else self.call(aten.add.Tensor, x, self.number(offset))

    def _divided(self, x: Thing, by: Thing) -> Thing:
        return self.call(aten.div.Scalar_mode, x, by, rounding_mode="floor")

    def _le(self, a: Thing, b: Thing) -> Thing:
        return self.call(aten.le.Tensor, a, b)

    def _both(self, a: Thing, b: Thing) -> Thing:
        return self.call(aten.logical_and.default, a, b)


def judged(
    structure: Structure,
    b: Builder,
    frame: Frame,
    sizes: Sizes,
    nodes: Mapping[str, Node],
    *,
    device: torch.device,
) -> Judged:
    """The same in a graph; `nodes` are the tensors that the mask reads."""
    find = SizeNodes(b, sizes)

    def renderer(indices: Mapping[str, Thing]) -> Renderer:
        return in_graph(find, nodes, indices, device=device)

    judge = Judge(b.call, frame, number=find.poly, scalar=find.scalar, renderer=renderer, device=device)
    return judge(structure)


def listed(
    call: Callable[..., Thing], blocks: Thing, shape: Sequence[Any], device: torch.device
) -> tuple[Thing, Thing]:
    """Per row of blocks, how many are marked and which: their numbers first, in order. Behind them is any number of a
    block, which counts for nothing.
    """
    many = call(aten.sum.dim_IntList, blocks, [-1], dtype=torch.int32)
    if all(isinstance(size, int) for size in shape) and math.prod(shape) * shape[-1] <= _COMPARED:
        which = _compared(call, blocks, shape[-1], device)
    else:
        marks = call(aten.to.dtype, blocks, torch.int32)
        which = call(aten.argsort.stable, marks, stable=True, dim=-1, descending=True)
    first, second = (call(aten.contiguous.default, call(aten.to.dtype, x, torch.int32)) for x in (many, which))
    return first, second


def _compared(call: Callable[..., Thing], blocks: Thing, count: int, device: torch.device) -> Thing:
    """The block of a rank is as far in as there are blocks up to which no more than that are marked.

    Two sums that a compiler makes a loop of each, with all that the marks come from; a sort is several kernels and a
    call that it does not look into, which one token behind a cache waits for.
    """
    at = call(aten.arange.default, count, device=device)
    ahead = call(aten.unsqueeze.default, at, -1)
    upto = call(aten.logical_and.default, call(aten.unsqueeze.default, blocks, -2), call(aten.le.Tensor, at, ahead))
    marked = call(aten.sum.dim_IntList, upto, [-1], dtype=torch.int32)
    before = call(aten.le.Tensor, call(aten.unsqueeze.default, marked, -2), ahead)
    return call(aten.clamp.default, call(aten.sum.dim_IntList, before, [-1], dtype=torch.int32), None, count - 1)
