"""The axes of the scores, (b, h, i, j), and where each dimension of a mask lies on them.

An axis may be made of several atoms (a batch of windows, blocks of queries); a dimension of a tensor may be one atom or
several merged. Both are index computations: the atoms of an axis are quotients and remainders of its index, and a
dimension's index is put together from its atoms'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnpass.masks.division import divmod_
from attnpass.masks.expr import ZERO, Poly, Var
from attnpass.masks.sizes import Sizes, index
from attnpass.site import Atom, Placed, Roles

NAMES = ("b", "h", "i", "j")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One index per axis of the scores, and its length."""

    b: Poly
    h: Poly
    i: Poly
    j: Poly
    lengths: tuple[Poly, Poly, Poly, Poly]

    @property
    def axes(self) -> tuple[Poly, Poly, Poly, Poly]:
        return (self.b, self.h, self.i, self.j)

    @property
    def queries(self) -> Poly:
        return self.lengths[2]

    @property
    def keys(self) -> Poly:
        return self.lengths[3]

    def var(self, name: str) -> Var | None:
        """The index variable of an axis; None where the axis has one position only."""
        axis = self.axes[NAMES.index(name)]
        atoms = axis.atoms()
        return next((a for a in atoms if isinstance(a, Var)), None)


def frame(sizes: Sizes, batch: Any, heads: Any, queries: Any, keys: Any) -> Frame:
    """The frame of scores of this shape."""
    lengths = tuple(n if isinstance(n, Poly) else sizes.length(n) for n in (batch, heads, queries, keys))
    b, h, i, j = (index(name, n) for name, n in zip(NAMES, lengths, strict=True))
    return Frame(b=b, h=h, i=i, j=j, lengths=lengths)  # type: ignore[arg-type]


def broadcast(frame_: Frame, shape: tuple[Poly, ...]) -> tuple[Poly, ...]:
    """The index of a tensor that broadcasts against the scores: its last dimensions are theirs."""
    axes, lengths = frame_.axes, frame_.lengths
    skip = len(axes) - len(shape)
    if skip < 0:
        raise ValueError("more dimensions than the scores have")
    out = []
    for at, n in enumerate(shape):
        if n.value == 1:
            out.append(ZERO)
        elif n == lengths[skip + at]:
            out.append(axes[skip + at])
        else:
            raise ValueError(f"a dimension of size {n!r} against {lengths[skip + at]!r}")
    return tuple(out)


def of_site(sizes: Sizes, roles: Roles, extents: Mapping[Atom, Any]) -> tuple[Frame, dict[Atom, Poly]]:
    """The frame of a site, and the index of each of its atoms."""
    groups = (roles.batch, roles.heads, roles.queries, roles.keys)
    for atom in (a for group in groups for a in group):
        sizes.length(extents[atom])
    lengths = []
    for group in groups:
        n = Poly({(): 1})
        for atom in group:
            n = n * sizes.poly(extents[atom])
        lengths.append(n)
    b, h, i, j = (index(name, n) for name, n in zip(NAMES, lengths, strict=True))
    out: dict[Atom, Poly] = {}
    for group, axis in zip(groups, (b, h, i, j), strict=True):
        rest = axis
        for atom in reversed(group[1:]):
            rest, out[atom] = divmod_(rest, sizes.poly(extents[atom]))
        if group:
            out[group[0]] = rest
    return Frame(b=b, h=h, i=i, j=j, lengths=(lengths[0], lengths[1], lengths[2], lengths[3])), out


def placed_index(
    placed: Placed, sizes: Sizes, extents: Mapping[Atom, Any], atoms: Mapping[Atom, Poly]
) -> tuple[Poly, ...]:
    """The index of a placed tensor."""
    out = []
    for dim in placed.layout:
        at = ZERO
        for atom in dim:
            at = at * sizes.poly(extents[atom]) + atoms[atom]
        out.append(at)
    return tuple(out)
