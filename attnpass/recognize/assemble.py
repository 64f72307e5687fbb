"""From what the two walks found to a :class:`~attnpass.site.Site`: roles of the axes, places to read, the spec.

Canonical form is (batch, heads, length, width). Which of the outer axes count as batch and which as heads is free in
mathematics; it is chosen so that no mask has to be copied out, and else as the original has it. Axes on which neither
k nor v depends are groups: the query heads that share one key/value head, put last among the heads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import State, dtype_text, size_text, state_of, tensor
from attnpass.reasons import Reason, reason
from attnpass.recognize.axes import Axes, atoms
from attnpass.recognize.meaning import Meaning, as_fills, describe_layers
from attnpass.recognize.operands import Candidate, Reach, candidates, fewest_axes
from attnpass.recognize.ops import describe
from attnpass.recognize.purity import Effects
from attnpass.recognize.softmax import Anchor
from attnpass.recognize.walk import Found, Walker
from attnpass.recognize.weights import Outwards
from attnpass.site import Atom, Dim, Factor, Fill, Layer, Layout, Placed, Roles, Site
from attnpass.spec import AttentionSpec, EmptyRow, Size


@dataclass(frozen=True, kw_only=True)
class Place:
    """The graph around a site, as far as assembling it needs."""

    effects: Effects
    live: set[Node]
    default: State


def assemble(anchor: Anchor, scores: Layout, found: Found, out: Outwards, w: Walker, place: Place) -> Site:
    """The site, or Refuse."""
    axes, effects = w.axes, place.effects
    product, v_layout, v_node = out.products[0]
    over = axes.resolve_dim(w.over)
    keys, width = frozenset(over), frozenset(axes.resolve_dim(found.product.contracted))
    if not keys:
        raise Refuse("single_key", anchor.node)
    q_layout, k_layout = axes.resolve(found.q_layout), axes.resolve(found.k_layout)
    score_layout = axes.resolve(found.at.layout)
    queries = _queries(score_layout, atoms(k_layout), keys)
    summed = set(axes.resolve_dim(product.contracted))
    if summed != keys:
        mixes = not summed & (keys | set(queries))
        raise Refuse("mixes_heads" if mixes else "softmax_not_over_keys", product.node, op=describe(product.node))
    v_layout = axes.resolve(v_layout)
    if atoms(v_layout) & frozenset(queries):
        # what was taken for k is a score tensor itself, multiplied with weights over heads
        mixed = bool(atoms(k_layout) - keys - width - atoms(v_layout)) and w.has_product(found.k)
        raise Refuse("mixes_heads" if mixed else "values_depend_on_query", product.node, op=describe(found.at.node))
    state = _one_state(found, anchor, product.node, out.crossed, place)

    reach = Reach(axes=axes, effects=effects, stop=effects.position[product.node], state=state, default=place.default)
    qs = candidates(found.q, q_layout, found.product.inner, reach)
    ks = candidates(found.k, k_layout, found.product.inner, reach)
    vs = candidates(v_node, v_layout, product.inner, reach)
    # reading further back may have cut axes finer: from here on everything is said in the finest
    over, queries = axes.resolve_dim(over), axes.resolve_dim(queries)
    keys, width = frozenset(over), frozenset(axes.resolve_dim(tuple(width)))
    q_layout, v_layout = axes.resolve(q_layout), axes.resolve(v_layout)
    dtype = _dtype(qs, ks, vs, found.product.node, product.node)
    # a factor on v would have to be put back on the output
    vs = [c for c in vs if c.scale == 1.0]
    qs, ks, vs = (_of_dtype(c, dtype) for c in (qs, ks, vs))

    outer = _outer(axes.resolve(scores), keys, queries, w, axes)
    batch_atoms = [a for dim in outer for a in dim if a not in queries]
    without = (fewest_axes(ks, axes), fewest_axes(vs, axes))
    first = set(outer[0]) if len(outer) > 1 else set()
    q_atoms = fewest_axes(qs, axes)
    group = [a for a in batch_atoms if a not in without[0] | without[1] and a in q_atoms and a not in first]
    rest = [a for a in batch_atoms if a not in group]
    grad = any(x.meta.get("attnpass_grad", False) for x in (found.q, found.k, v_node))
    layers = as_fills(tuple(_resolved(layer, axes) for layer in found.at.layers), effects, dtype, grad=grad)
    usual = 1 if len(outer) == 1 else len([a for dim in outer[:-1] for a in dim if a in rest])
    cut = _cut(rest, group, usual, [atoms(layer.placed.layout) for layer in layers])
    v_own = _ordered(v_layout, atoms(v_layout) - keys - set(batch_atoms))
    _every_axis_has_a_role(anchor, axes, qs, {*batch_atoms, *queries, *width}, set(v_own))
    _every_axis_has_a_role(anchor, axes, ks, {*batch_atoms, *keys, *width}, set(v_own))
    roles = Roles(
        batch=tuple(rest[:cut]),
        heads=(*rest[cut:], *group),
        group=tuple(group),
        queries=queries,
        keys=_ordered((over,), keys),
        width=_ordered(q_layout, width),
        v_width=v_own,
    )
    q = _best(qs, (roles.batch, roles.heads, roles.queries, roles.width), axes)
    k = _best(_with_axes(ks, group, axes), (roles.batch, roles.shared, roles.keys, roles.width), axes)
    v = _best(_with_axes(vs, group, axes), (roles.batch, roles.shared, roles.keys, roles.v_width), axes)
    scale = found.at.factor.times(Factor(q.scale * k.scale * anchor.base * (found.at.softcap or 1.0)))
    scale = dataclasses.replace(
        scale, tensors=tuple((Placed(p.node, axes.resolve(p.layout)), power) for p, power in scale.tensors)
    )
    kept = {x.placed.node for x in (q, k, v)} | {layer.placed.node for layer in layers}
    kept |= {x.node for x, _ in scale.tensors}
    others = _escaping([*found.at.seen, *anchor.parts], kept, anchor, out, place)
    low = EmptyRow.MEAN if found.at.centred else anchor.low
    masks = describe_layers(layers, effects, dtype, roles, axes, grad=grad, floored=found.at.floored, low=low)
    spec = _spec(roles, axes, dtype, scale, found, out, masks, anchor, grad=grad, weights_used=bool(others))
    spec = dataclasses.replace(spec, inference=state.inference)
    for extra in (*(layer.placed for layer in layers), *(p for p, _ in scale.tensors)):
        if not effects.unchanged(extra.node, effects.position[extra.node], reach.until(grad)):
            raise Refuse("mutated", extra.node, what=extra.node.name)
    obstacles = (*masks.obstacles, *_used(others, out))
    _same_device([q.placed, k.placed, v.placed, *(layer.placed for layer in layers)], anchor)
    trail = tuple(describe(node) for node in found.at.seen)
    region = {*found.at.seen, *anchor.parts, anchor.node, *out.crossed}
    return Site(
        anchor=anchor.node,
        output=product.node,
        output_layout=axes.resolve(out.out_layout),
        q=_final(q, axes),
        k=_final(k, axes),
        v=_final(v, axes),
        sizes=axes.size,
        roles=roles,
        scale=scale,
        layers=layers,
        in_order=masks.in_order,
        floored=found.at.floored,
        softcap=found.at.softcap,
        sink=found.at.sink,
        dropout=out.dropout,
        spec=spec,
        region=tuple(sorted(region, key=effects.position.__getitem__)),
        other_readers=others,
        state=state,
        assumptions=(*masks.assumptions, *(_STREAM if out.dropout != 0.0 else ())),
        obstacles=obstacles,
        output_written=effects.written(product.node),
        trail=trail,
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


_STREAM = ("dropout draws from another random stream than the original",)


def _queries(layout: Layout, in_k: frozenset[Atom], keys: frozenset[Atom]) -> tuple[Atom, ...]:
    """The query axis: the last axes of the score on which k does not depend, as many as there are key axes.

    Earlier axes of that kind are query heads that share their keys. Any choice is sound (rows are independent); this
    one is what every known spelling means.
    """
    free = [dim for dim in layout if dim and not set(dim) & in_k]
    count = sum(1 for dim in layout if set(dim) & keys)
    return tuple(a for dim in free[-count:] for a in dim)


def _one_state(found: Found, anchor: Anchor, product: Node, crossed: list[Node], place: Place) -> State:
    states = {state_of(node, place.default) for node in (*found.at.seen, found.product.node, *crossed, product)}
    states.add(state_of(anchor.node, place.default))
    if len(states) != 1:
        raise Refuse("mixed_state", anchor.node)
    state = states.pop()
    if state.functorch:
        raise Refuse("functorch", anchor.node)
    return state


def _dtype(qs: list[Candidate], ks: list[Candidate], vs: list[Candidate], first: Node, second: Node) -> torch.dtype:
    """The dtype that the fused call computes in: never narrower than what the original's products read.

    A widening cast in front of the first product may be undone when the probabilities are narrowed again for the
    second: a fused kernel forms scores and softmax in float32 from narrow operands, exactly as those casts did.
    """
    low, high = tensor(first), tensor(second)
    assert low is not None
    assert high is not None
    # under autocast the product itself narrows its operands
    scores = _narrower(low.dtype, torch.promote_types(qs[0].dtype, ks[0].dtype))
    values = _narrower(high.dtype, vs[0].dtype)
    if scores == values:
        return values
    if torch.promote_types(scores, values) == scores:
        narrow = scores == torch.float32 and all(any(c.dtype == values for c in found) for found in (qs, ks))
        return values if narrow else scores
    if torch.promote_types(scores, values) == values:
        return values
    raise Refuse("mixed_dtypes", second, detail=f"{dtype_text(scores)} and {dtype_text(values)}")


def _narrower(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if torch.promote_types(a, b) == b else b


def _of_dtype(found: list[Candidate], dtype: torch.dtype) -> list[Candidate]:
    """The candidates of this dtype; where there are none, those that have to be cast."""
    return [c for c in found if c.dtype == dtype] or [c for c in found if c.dtype == found[0].dtype]


def _cut(rest: list[Atom], group: list[Atom], usual: int, masks: list[frozenset[Atom]]) -> int:
    """Where the outer axes are cut into batch and heads: as few masks as possible that depend on part of one."""

    def copied(at: int) -> int:
        sides = (set(rest[:at]), {*rest[at:], *group})
        return sum(bool(side & mask) and not side <= mask for mask in masks for side in sides)

    return min(range(len(rest) + 1), key=lambda at: (copied(at), abs(at - usual)))


def _with_axes(found: list[Candidate], group: list[Atom], axes: Axes) -> list[Candidate]:
    """For shared heads only the candidates that are not repeated yet will do."""
    fitting = [c for c in found if not atoms(axes.resolve(c.placed.layout)) & set(group)]
    fewest = min(len(atoms(axes.resolve(c.placed.layout))) for c in fitting)
    return [c for c in fitting if len(atoms(axes.resolve(c.placed.layout))) == fewest] if group else fitting


def _best(found: list[Candidate], target: Layout, axes: Axes) -> Candidate:
    """The candidate that folds most scalings and needs the least rearranging; the deepest of equals.

    A free view is well spent on dropping a multiplication of the whole operand, a copy is not.
    """

    def cost(c: Candidate) -> tuple[bool, int, int, int]:
        effort = _effort(axes.resolve(c.placed.layout), target)
        return effort > _FREE, -c.folded, effort, -c.depth

    return min(found, key=cost)


_FREE = 3  # up to here only views are needed


def _effort(layout: Layout, target: Layout) -> int:
    if layout == target:
        return 0
    have, want = [d for d in layout if d], [d for d in target if d]
    if have == want:
        return 1
    if sorted(have) == sorted(want):
        return 2
    # cut through a dimension, or worse, merge (which may copy)
    pieces = {a for d in have for a in d}
    return 3 if all(d in have or len(d) == 1 for d in want if set(d) <= pieces) else 4


def _final(candidate: Candidate, axes: Axes) -> Placed:
    return Placed(candidate.placed.node, axes.resolve(candidate.placed.layout))


def _ordered(layout: Layout, wanted: frozenset[Atom]) -> tuple[Atom, ...]:
    return tuple(a for dim in layout for a in dim if a in wanted)


def _resolved(layer: Layer, axes: Axes) -> Layer:
    placed = Placed(layer.placed.node, axes.resolve(layer.placed.layout))
    if isinstance(layer, Fill):
        return dataclasses.replace(layer, mask=placed)
    factor = dataclasses.replace(
        layer.factor,
        tensors=tuple((Placed(p.node, axes.resolve(p.layout)), power) for p, power in layer.factor.tensors),
    )
    return dataclasses.replace(layer, tensor=placed, factor=factor)


def _escaping(seen: list[Node], kept: set[Node], anchor: Anchor, out: Outwards, place: Place) -> tuple[Node, ...]:
    """Live readers of scores or probabilities that outlive the region, or feed what the fused call reads."""
    region = {*seen, *anchor.parts, anchor.node, *out.crossed}
    inner = region - {out.products[0][0].node}
    found: dict[Node, None] = {}
    for node in inner:
        for user in node.users:
            if user in place.live and user not in region and _leaves(user, region, kept, place.live):
                found[user] = None
    return tuple(sorted(found, key=place.effects.position.__getitem__))


def _leaves(node: Node, region: set[Node], kept: set[Node], live: set[Node]) -> bool:
    stack, seen = [node], {node}
    while stack:
        here = stack.pop()
        if here.op == "output" or here in kept or len(seen) > 32:
            return True
        for user in here.users:
            if user in region or user in seen or user not in live:
                continue
            seen.add(user)
            stack.append(user)
        if not here.users:  # a live node without readers has an effect
            return True
    return False


def _used(others: tuple[Node, ...], out: Outwards) -> tuple[Reason, ...]:
    if not others:
        return ()
    code = "weights_used" if out.dropout == 0.0 else "weights_used_dropout"
    return (reason(code, op=describe(others[0])),)


def _same_device(placed: list[Placed], anchor: Anchor) -> None:
    # a 0-d tensor may live on the CPU beside anything, as torch itself allows
    tensors = [t for t in (tensor(p.node) for p in placed) if t is not None and t.dim() > 0]
    if len({t.device for t in tensors}) > 1:
        raise Refuse("mixed_devices", anchor.node)


def scale_text(scale: Factor) -> float | str:
    if scale.is_number:
        return scale.number
    parts: list[str] = [] if math.isclose(scale.number, 1.0) else [f"{scale.number:.6g}"]
    for node, power in scale.scalars:
        val = node.meta.get("val")
        name = str(val.node.expr) if isinstance(val, torch.SymInt | torch.SymFloat) else node.name
        parts.append(name if power > 0 else f"1/{name}")
    for placed, power in scale.tensors:
        val = tensor(placed.node)
        shape = "x".join(str(size_text(s)) for s in val.shape) if val is not None else ""
        parts.append(f"tensor[{shape}]" if power > 0 else f"1/tensor[{shape}]")
    return " * ".join(parts)


def _spec(
    roles: Roles,
    axes: Axes,
    dtype: torch.dtype,
    scale: Factor,
    found: Found,
    out: Outwards,
    masks: Meaning,
    anchor: Anchor,
    *,
    grad: bool,
    weights_used: bool,
) -> AttentionSpec:
    def size(part: tuple[Atom, ...]) -> Size:
        return size_text(axes.dim_size(part))

    probabilities = tensor(anchor.node)
    first = tensor(found.q)
    assert probabilities is not None
    assert first is not None
    batch, heads, shared = size(roles.batch), size(roles.heads), size(roles.shared)
    groups: Any = axes.dim_size(roles.group)
    p = out.dropout
    return AttentionSpec(
        q=(batch, heads, size(roles.queries), size(roles.width)),
        k=(batch, shared, size(roles.keys), size(roles.width)),
        v=(batch, shared, size(roles.keys), size(roles.v_width)),
        dtype=dtype_text(dtype),
        device=first.device.type,
        scale=scale_text(scale),
        groups=int(groups) if not isinstance(groups, torch.SymInt) else 0,
        mask=masks.mask,
        bias=masks.bias,
        softmax_dtype=dtype_text(_softmax_dtype(anchor, probabilities)),
        dropout=p if isinstance(p, int | float) else str(p),
        softcap=found.at.softcap,
        sink=found.at.sink is not None,
        empty_rows=masks.empty if anchor.empty != "zero" or masks.empty != "nan" else anchor.empty,
        grad=grad,
        weights_used=weights_used,
    )


def _softmax_dtype(anchor: Anchor, probabilities: torch.Tensor) -> torch.dtype:
    return probabilities.dtype
