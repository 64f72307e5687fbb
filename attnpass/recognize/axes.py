"""Exact bookkeeping of axes: which dimension of which tensor is which axis of the computation.

Every axis is an *atom* with a size. A dimension of a tensor is an ordered tuple of atoms, major first: ``(h, d)`` for
heads and width merged, ``()`` for a dimension of size one. Views only regroup or reorder atoms; where a reshape cuts
through an atom, the atom is refined into two for good (every layout that names it is read through :meth:`resolve`).

Two dimensions are the same axis only if their atoms are the same, never because their sizes happen to be equal.
Sizes are compared by proof only; a size that cannot be proved to divide refuses the site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnpass.errors import Refuse
from attnpass.graph import is_one, plain, same
from attnpass.site import Atom, Dim, Layout


class Axes:
    """The atoms of one site's region."""

    def __init__(self) -> None:
        self.size: dict[Atom, Any] = {}
        self._parts: dict[Atom, Dim] = {}

    def new(self, size: Any) -> Dim:
        """A new axis; an axis of size one carries nothing and has no atom."""
        if is_one(size):
            return ()
        atom = len(self.size)
        self.size[atom] = plain(size)
        return (atom,)

    def of_shape(self, shape: Sequence[Any]) -> Layout:
        """One new axis for each dimension."""
        return tuple(self.new(size) for size in shape)

    def resolve_dim(self, dim: Dim) -> Dim:
        """The dimension in atoms that have not been refined further."""
        if not any(atom in self._parts for atom in dim):
            return dim
        out: list[Atom] = []
        for atom in dim:
            parts = self._parts.get(atom)
            out.extend((atom,) if parts is None else self.resolve_dim(parts))
        return tuple(out)

    def resolve(self, layout: Layout) -> Layout:
        return tuple(self.resolve_dim(dim) for dim in layout)

    def dim_size(self, dim: Dim) -> Any:
        """The number of elements along a dimension."""
        total: Any = 1
        for atom in self.resolve_dim(dim):
            total = total * self.size[atom]
        return total

    def split(self, atom: Atom, major: Any) -> tuple[Dim, Dim]:
        """Refine an atom into a part of size `major` and the rest; refuses unless `major` is proved to divide."""
        size = self.size[atom]
        minor = size // major
        # allowed because the two parts enumerate exactly the atom's elements when major * minor == size
        if not same(major * minor, size):
            raise Refuse("axes_mixed", op="reshape", detail=f"{major} is not proved to divide {size}")
        parts = (self.new(major), self.new(minor))
        self._parts[atom] = parts[0] + parts[1]
        return parts

    def unify(self, mark: Dim, known: Dim) -> None:
        """Identify a dimension made of new atoms with a known one of the same extent."""
        mark, known = self.resolve_dim(mark), self.resolve_dim(known)
        if mark == known:
            return
        # only a whole, unrefined new atom can stand for a known dimension; anything else would cut axes blindly
        if len(mark) != 1 or not same(self.size[mark[0]], self.dim_size(known)) or mark[0] in known:
            raise Refuse("axes_mixed", op="product", detail="an axis of size one meets a longer one")
        self._parts[mark[0]] = known

    def regroup(self, layout: Layout, shape: Sequence[Any]) -> Layout:
        """The layout after a reshape to `shape`: elements keep their order, so the flat list of atoms is cut anew."""
        flat = [atom for dim in self.resolve(layout) for atom in dim]
        flat.reverse()  # the next atom is popped from the end
        out: list[Dim] = []
        for size in shape:
            dim: list[Atom] = []
            rest: Any = size  # still to be covered by atoms
            while not is_one(rest):
                if not flat:
                    raise Refuse("axes_mixed", op="reshape", detail="sizes do not match")
                atom = flat.pop()
                have = self.size[atom]
                if same(have, rest):
                    dim.append(atom)
                    rest = 1
                elif self._divides(have, rest):
                    dim.append(atom)
                    rest = rest // have
                else:
                    major, minor = self.split(atom, rest)
                    dim.extend(major)
                    flat.extend(reversed(minor))
                    rest = 1
            out.append(tuple(dim))
        if flat:
            raise Refuse("axes_mixed", op="reshape", detail="sizes do not match")
        return tuple(out)

    @staticmethod
    def _divides(part: Any, whole: Any) -> bool:
        """`part` is a proper divisor of `whole`, proved."""
        if isinstance(part, int) and isinstance(whole, int):
            return part < whole and whole % part == 0
        return same((whole // part) * part, whole)

    def align(self, layout: Layout, shape: Sequence[Any], out_shape: Sequence[Any]) -> Layout:
        """The layout of an operand of `shape` that is broadcast against a result of `out_shape` and `layout`."""
        offset = len(out_shape) - len(shape)
        if offset < 0:
            raise Refuse("axes_mixed", op="broadcast", detail="an operand has more axes than the result")
        dims: list[Dim] = []
        for index, size in enumerate(shape):
            full = out_shape[offset + index]
            if same(size, full):
                dims.append(layout[offset + index])
            elif is_one(size):
                dims.append(())
            else:
                raise Refuse("axes_mixed", op="broadcast", detail=f"{size} against {full}")
        return self.resolve(tuple(dims))


def atoms(layout: Layout) -> frozenset[Atom]:
    """All atoms that a tensor depends on."""
    return frozenset(atom for dim in layout for atom in dim)
