"""Which axes of an attention play which part: queries, keys, widths by the two products, batch and heads by choice.

Canonical form is (batch, heads, length, width). Which of the outer axes count as batch and which as heads is free in
mathematics; it is chosen so that no mask has to be copied out, and else as the original has it. Axes on which neither
k nor v depends are groups: the query heads that share one key/value head, put last among the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnpass.errors import Refuse
from attnpass.recognize.axes import Axes, atoms
from attnpass.recognize.operands import Candidate, fewest_axes
from attnpass.recognize.ops import describe
from attnpass.recognize.softmax import Anchor
from attnpass.recognize.walk import Found, Walker
from attnpass.recognize.weights import Outwards
from attnpass.site import Atom, Dim, Layer, Layout, Roles


@dataclass(frozen=True, kw_only=True)
class Named:
    """The axes that the two products name, and the operands' layouts in them."""

    over: Dim  # the keys, in their order
    queries: Dim
    width: frozenset[Atom]
    q: Layout
    k: Layout
    v: Layout

    @property
    def keys(self) -> frozenset[Atom]:
        return frozenset(self.over)

    def resolved(self, axes: Axes) -> Named:
        """The same in the finest atoms: reading further back may have cut axes."""
        return Named(
            over=axes.resolve_dim(self.over),
            queries=axes.resolve_dim(self.queries),
            width=frozenset(axes.resolve_dim(tuple(self.width))),
            q=axes.resolve(self.q),
            k=axes.resolve(self.k),
            v=axes.resolve(self.v),
        )


def name_axes(anchor: Anchor, found: Found, out: Outwards, w: Walker) -> Named:
    """What is paired, compared and summed; Refuse where it is not attention's way of doing so."""
    axes = w.axes
    product, v_layout, _ = out.products[0]
    named = Named(
        over=w.over,
        queries=(),
        width=frozenset(found.product.contracted),
        q=found.q_layout,
        k=found.k_layout,
        v=v_layout,
    ).resolved(axes)
    if not named.keys:
        raise Refuse("single_key", anchor.node)
    queries = _queries(axes.resolve(found.at.layout), atoms(named.k), named.keys)
    summed = set(axes.resolve_dim(product.contracted))
    if summed != named.keys:
        mixes = not summed & (named.keys | set(queries))
        raise Refuse("mixes_heads" if mixes else "softmax_not_over_keys", product.node, op=describe(product.node))
    if atoms(named.v) & frozenset(queries):
        # what was taken for k is a score tensor itself, multiplied with weights over heads
        mixed = bool(atoms(named.k) - named.keys - named.width - atoms(named.v)) and w.has_product(found.k)
        raise Refuse("mixes_heads" if mixed else "values_depend_on_query", product.node, op=describe(found.at.node))
    return Named(over=named.over, queries=queries, width=named.width, q=named.q, k=named.k, v=named.v)


def _queries(layout: Layout, in_k: frozenset[Atom], keys: frozenset[Atom]) -> tuple[Atom, ...]:
    """The query axis: the last axes of the score on which k does not depend, as many as there are key axes.

    Earlier axes of that kind are query heads that share their keys. Any choice is sound (rows are independent); this
    one is what every known spelling means.
    """
    free = [dim for dim in layout if dim and not set(dim) & in_k]
    count = sum(1 for dim in layout if set(dim) & keys)
    return tuple(a for dim in free[-count:] for a in dim)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The axes that are neither queries nor keys."""

    group: tuple[Atom, ...]  # q depends on them, k and v do not
    rest: tuple[Atom, ...]
    usual: int  # where the original's dimensions cut `rest` into batch and heads


def outer_axes(
    scores: Layout, named: Named, qs: list[Candidate], ks: list[Candidate], vs: list[Candidate], w: Walker
) -> Outer:
    """Batch and heads, and which of them are heads that share keys and values."""
    axes = w.axes
    dims = _outer(axes.resolve(scores), named.keys, named.queries, w, axes)
    every = [a for dim in dims for a in dim if a not in named.queries]
    shared = fewest_axes(ks, axes) | fewest_axes(vs, axes)
    first = set(dims[0]) if len(dims) > 1 else set()
    q_atoms = fewest_axes(qs, axes)
    group = tuple(a for a in every if a not in shared and a in q_atoms and a not in first)
    rest = tuple(a for a in every if a not in group)
    usual = 1 if len(dims) == 1 else len([a for dim in dims[:-1] for a in dim if a in rest])
    return Outer(group=group, rest=rest, usual=usual)


def assign_roles(
    anchor: Anchor,
    named: Named,
    outer: Outer,
    layers: tuple[Layer, ...],
    qs: list[Candidate],
    ks: list[Candidate],
    axes: Axes,
) -> Roles:
    """The part of every axis; Refuse where q or k has one without."""
    every = {*outer.rest, *outer.group}
    v_own = _ordered(named.v, atoms(named.v) - named.keys - every)
    _every_axis_has_a_role(anchor, axes, qs, {*every, *named.queries, *named.width}, set(v_own))
    _every_axis_has_a_role(anchor, axes, ks, {*every, *named.keys, *named.width}, set(v_own))
    cut = _cut(list(outer.rest), list(outer.group), outer.usual, [atoms(layer.placed.layout) for layer in layers])
    return Roles(
        batch=outer.rest[:cut],
        heads=(*outer.rest[cut:], *outer.group),
        group=outer.group,
        queries=named.queries,
        keys=_ordered((named.over,), named.keys),
        width=_ordered(named.q, named.width),
        v_width=v_own,
    )


def _outer(scores: Layout, keys: frozenset[Atom], queries: tuple[Atom, ...], w: Walker, axes: Axes) -> list[Dim]:
    """The dimensions of the scores that are neither queries nor keys, those of size one included."""
    whole = set(axes.resolve_dim(w.sink.whole)) if w.sink is not None else set()
    inner = keys | whole | set(queries)
    # a dimension may hold heads and, for a single query, what serves as queries: only the former are outer
    dims = [tuple(a for a in dim if a not in inner) for dim in scores if not dim or set(dim) - inner]
    if not queries and () in dims:  # a single query: one of the dimensions of size one is its own, the last
        del dims[len(dims) - 1 - dims[::-1].index(())]
    return dims


def _every_axis_has_a_role(
    anchor: Anchor, axes: Axes, found: list[Candidate], roles: set[Atom], v_own: set[Atom]
) -> None:
    """What q or k depends on is a batch, head, query, key or width axis, and none of the values' own."""
    used = {a for c in found for a in atoms(axes.resolve(c.placed.layout))}
    if used - roles or used & v_own:
        raise Refuse("axes_mixed", anchor.node, op="the product", detail="an axis has no role")


def _cut(rest: list[Atom], group: list[Atom], usual: int, masks: list[frozenset[Atom]]) -> int:
    """Where the outer axes are cut into batch and heads: as few masks as possible that depend on part of one."""

    def copied(at: int) -> int:
        sides = (set(rest[:at]), {*rest[at:], *group})
        return sum(bool(side & mask) and not side <= mask for mask in masks for side in sides)

    return min(range(len(rest) + 1), key=lambda at: (copied(at), abs(at - usual)))


def _ordered(layout: Layout, wanted: frozenset[Atom]) -> tuple[Atom, ...]:
    return tuple(a for dim in layout for a in dim if a in wanted)
