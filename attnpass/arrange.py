"""Bringing a tensor from the layout it has to the layout a kernel wants, with as few operations as it takes.

    have  (b*h) i d      want  b h i d       one reshape
    have  b i h d        want  b h i d       one permute
    have  b h i d        want  b h i d       nothing

Only three kinds of operation are ever written: a reshape that splits, one permute, a reshape that merges (with squeeze,
unsqueeze and expand for axes that one side does not have). The last may copy; where axes are merged is chosen so that
it rarely does.

What a reshape leaves whole keeps the size that its own tensor tells: another that is equal to it only by a guard would
make torch ask, while it works out strides, whether the one divides the other, and that question is a new guard.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import Builder, same, tensor
from attnpass.site import Atom, Dim, Layout, Placed

aten = torch.ops.aten


class Sizes:
    """The size of an axis as a graph can use it: a number, or a node that yields it."""

    def __init__(self, b: Builder, sizes: dict[Atom, Any], sources: list[Node]) -> None:
        self.b = b
        self.sizes = sizes
        self.sources = sources
        self._made: dict[Atom, Node] = {}

    def atom(self, atom: Atom) -> int | Node:
        size = self.sizes[atom]
        if isinstance(size, int):
            return size
        if atom not in self._made:
            self._made[atom] = self._find(size)
        return self._made[atom]

    def _find(self, size: Any) -> Node:
        # any dimension proved to be of this size will do; else one that is a known multiple of it
        for source in self.sources:
            val = tensor(source)
            for dim, extent in enumerate(val.shape if val is not None else ()):
                if same(extent, size):
                    return self.b.call(aten.sym_size.int, source, dim)
        for source in self.sources:
            val = tensor(source)
            for dim, extent in enumerate(val.shape if val is not None else ()):
                for times in {s for s in self.sizes.values() if isinstance(s, int)}:
                    if same(extent, size * times):
                        whole = self.b.call(aten.sym_size.int, source, dim)
                        return self.b.call(operator.floordiv, whole, times)
        raise Refuse("no_size", detail=size)

    def dim(self, dim: Dim) -> int | Node:
        known = 1
        total: Node | None = None
        for atom in dim:
            size = self.atom(atom)
            if isinstance(size, int):
                known *= size
            else:
                total = size if total is None else self.b.call(operator.mul, total, size)
        if total is None:
            return known
        return total if known == 1 else self.b.call(operator.mul, total, known)


def arrange(b: Builder, placed: Placed, target: Layout, sizes: Sizes, *, expand: bool) -> Node:
    """The tensor with dimensions `target`; axes it does not have are expanded, or left at size one."""
    have = {a for dim in placed.layout for a in dim}
    # without expanding, an axis that the tensor does not have is a dimension of size one
    if placed.layout == tuple(want if expand or have & set(want) else () for want in target):
        return placed.node
    node, dims = _split(b, placed, target, sizes)
    # drop dimensions of size one, then put the rest in the target's order
    keep = [dim for dim in dims if dim]
    if len(keep) != len(dims):
        node = b.call(aten.squeeze.dims, node, [at for at, dim in enumerate(dims) if not dim])
    order = {atom: i for i, atom in enumerate(a for dim in target for a in dim)}
    wanted = sorted(keep, key=lambda dim: order[dim[0]])
    if wanted != keep:
        node = b.call(aten.permute.default, node, [keep.index(dim) for dim in wanted])
    return _merge(b, node, wanted, target, have, sizes, expand=expand)


def _split(b: Builder, placed: Placed, target: Layout, sizes: Sizes) -> tuple[Node, list[Dim]]:
    """Cut every dimension whose atoms do not stay together."""
    runs = {dim for want in target for dim in _runs(want)}
    cut = [[dim] if dim in runs or len(dim) < 2 else [(atom,) for atom in dim] for dim in placed.layout]
    dims = [dim for parts in cut for dim in parts]
    if len(dims) == len(placed.layout):
        return placed.node, dims
    shape: list[int | Node] = []
    for at, parts in enumerate(cut):
        shape += [b.size(placed.node, at)] if len(parts) == 1 else [sizes.dim(dim) for dim in parts]
    return b.call(aten.reshape.default, placed.node, shape), dims


def _runs(dim: Dim) -> list[Dim]:
    return [dim[i:j] for i in range(len(dim)) for j in range(i + 1, len(dim) + 1)]


def _merge(
    b: Builder, node: Node, dims: list[Dim], target: Layout, have: set[Atom], sizes: Sizes, *, expand: bool
) -> Node:
    """Lay the ordered pieces into the target's dimensions."""
    # first one dimension for each piece and each missing axis that has to be there
    pieces: list[Dim] = []
    missing: list[bool] = []
    for want in target:
        present = [dim for dim in dims if dim[0] in want]
        fill = bool(want) and (expand or bool(present))
        if not present and not fill:
            pieces.append(())
            missing.append(False)
            continue
        rest = list(want)
        while rest:
            piece = next((dim for dim in present if dim[0] == rest[0]), None)
            if piece is None:
                pieces.append((rest[0],))
                missing.append(True)
                del rest[0]
            else:
                pieces.append(piece)
                missing.append(False)
                del rest[: len(piece)]
    for at, piece in enumerate(pieces):
        if missing[at] or not piece:
            node = b.call(aten.unsqueeze.default, node, at)
    if any(missing):
        shape = [sizes.dim(piece) if missing[at] else -1 for at, piece in enumerate(pieces)]
        node = b.call(aten.expand.default, node, shape)
    if len(pieces) != len(target):
        full = [want if expand or any(a in have for a in want) else () for want in target]
        node = b.call(aten.reshape.default, node, [sizes.dim(want) for want in full])
    return node
