"""From what the two walks found to a :class:`~attnpass.site.Site`: one named step after the other.

name the axes (roles.py) -> read q, k, v further back (operands.py) -> give every axis its role (roles.py)
-> choose where to read -> who else reads (readers.py) -> what the masks mean (meaning.py) -> the spec
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import State, dtype_text, size_text, state_of, tensor
from attnpass.reasons import Reason, reason
from attnpass.recognize.axes import Axes, atoms
from attnpass.recognize.gradients import asked
from attnpass.recognize.meaning import Meaning, as_fills, describe_layers
from attnpass.recognize.operands import Candidate, Reach, candidates, cheapest
from attnpass.recognize.ops import describe, op_name
from attnpass.recognize.purity import Effects
from attnpass.recognize.readers import escaping
from attnpass.recognize.roles import Named, assign_roles, name_axes, outer_axes
from attnpass.recognize.softmax import Anchor
from attnpass.recognize.walk import Found, Walker
from attnpass.recognize.weights import Outwards
from attnpass.site import Atom, Factor, Fill, Layer, Layout, Placed, Roles, Site
from attnpass.spec import AttentionSpec, EmptyRow, Size


@dataclass(frozen=True, kw_only=True)
class Place:
    """The graph around a site, as far as assembling it needs."""

    effects: Effects
    live: set[Node]
    default: State

    @cached_property
    def sums_exponentials(self) -> bool:
        """There is a log-sum-exp that something needs."""
        return any(op_name(node) == "logsumexp" for node in self.live)

    @cached_property
    def picks_kernels(self) -> bool:
        """The program tells torch itself, by a context manager, which of its kernels to take."""
        return any(getattr(node.target, "__name__", "") == "_sdpa_kernel" for node in self.effects.position)


def assemble(anchor: Anchor, scores: Layout, found: Found, out: Outwards, w: Walker, place: Place) -> Site:
    """The site, or Refuse."""
    axes, effects = w.axes, place.effects
    product, _, v_node = out.products[0]
    result = out.result or product.node
    named = name_axes(anchor, found, out, w)
    state = _one_state(found, anchor, result, out.crossed, place)
    reach = Reach(axes=axes, effects=effects, stop=effects.position[result], state=state, default=place.default)
    operands = _operands(named, found, out, reach)
    named = named.resolved(axes)
    qs, ks, vs, dtype = operands.qs, operands.ks, operands.vs, operands.dtype
    outer = outer_axes(scores, named, qs, ks, vs, w)
    sources = (found.q, found.k, v_node, *(() if found.at.sink is None else (found.at.sink.node,)))
    grad = any(asked(x, state) for x in sources)
    layers = as_fills(tuple(_resolved(layer, axes) for layer in found.at.layers), effects, dtype, grad=grad)
    roles = assign_roles(anchor, named, outer, layers, qs, ks, axes)
    q = cheapest(qs, (roles.batch, roles.heads, roles.queries, roles.width), axes)
    k = cheapest(_with_axes(ks, roles.group, axes), (roles.batch, roles.shared, roles.keys, roles.width), axes)
    v = cheapest(_with_axes(vs, roles.group, axes), (roles.batch, roles.shared, roles.keys, roles.v_width), axes)
    scale = _scale(found, q.scale * k.scale, axes)
    if not math.isfinite(scale.number):
        raise Refuse("unknown_arguments", anchor.node, op="the scale", detail="no finite number")
    sink = None if found.at.sink is None else Placed(found.at.sink.node, axes.resolve(found.at.sink.layout))
    beside = [layer.placed for layer in layers] + ([] if sink is None else [sink])
    _readable([q.placed, k.placed, v.placed], beside, [p for p, _ in scale.tensors], anchor, reach, grad=grad)
    region = {*found.at.seen, *anchor.parts, anchor.node, *out.crossed}
    kept = {p.node for p in (q.placed, k.placed, v.placed, *beside, *(p for p, _ in scale.tensors))}
    form, others = escaping(region, result, kept, effects, place.live)
    low, bears = (EmptyRow.MEAN, math.inf) if found.at.centred else (anchor.low, w.bears)
    masks = describe_layers(
        layers,
        effects,
        dtype,
        roles,
        axes,
        state,
        grad=grad,
        floored=found.at.floor is not None,
        low=low,
        bears=bears,
    )
    spec = _spec(roles, axes, dtype, scale, found, out, masks, anchor, grad=grad, weights_used=bool(others))
    spec = dataclasses.replace(spec, inference=state.inference)
    return Site(
        anchor=anchor.node,
        output=result,
        output_layout=axes.resolve(out.out_layout),
        q=_final(q, axes),
        k=_final(k, axes),
        v=_final(v, axes),
        sizes=axes.size,
        roles=roles,
        scale=scale,
        layers=layers,
        in_order=masks.in_order,
        floor=found.at.floor,
        hollow=EmptyRow.ZERO if sink is not None and out.result is None else anchor.empty,
        softcap=found.at.softcap,
        sink=sink,
        dropout=out.dropout,
        spec=spec,
        region=tuple(sorted(region, key=effects.position.__getitem__)),
        form_readers=form,
        other_readers=others,
        state=state,
        assumptions=(*masks.assumptions, *(STREAM if out.dropout != 0.0 else ())),
        obstacles=(*masks.obstacles, *_hollow(masks, anchor, out), *_used(others, out)),
        output_written=effects.written(result),
        trail=tuple(describe(node) for node in found.at.seen),
    )


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """Where q, k and v may be read, and the dtype in which the fused call computes."""

    qs: list[Candidate]
    ks: list[Candidate]
    vs: list[Candidate]
    dtype: torch.dtype


def _operands(named: Named, found: Found, out: Outwards, reach: Reach) -> _Operands:
    product, _, v_node = out.products[0]
    qs = candidates(found.q, named.q, found.product.inner, reach)
    ks = candidates(found.k, named.k, found.product.inner, reach)
    vs = candidates(v_node, named.v, product.inner, reach)
    dtype = _dtype(qs, ks, vs, found.product.node, product.node)
    # a factor on v would have to be put back on the output
    vs = [c for c in vs if c.scale == 1.0]
    return _Operands(qs=_of_dtype(qs, dtype), ks=_of_dtype(ks, dtype), vs=_of_dtype(vs, dtype), dtype=dtype)


def _scale(found: Found, folded: float, axes: Axes) -> Factor:
    """The factor of q.k: what the walk collected and what was folded out of the operands."""
    cap = found.at.softcap  # what the walk collected inside of it has been divided by it; a symbolic one it took out
    scale = found.at.factor.times(Factor(folded * (cap if isinstance(cap, float | int) else 1.0)))
    tensors = tuple((Placed(p.node, axes.resolve(p.layout)), power) for p, power in scale.tensors)
    return dataclasses.replace(scale, tensors=tensors)


def _readable(
    operands: list[Placed], beside: list[Placed], factors: list[Placed], anchor: Anchor, reach: Reach, *, grad: bool
) -> None:
    """All is on one device, and masks, sinks and factors still hold what they held when the fused call reads them."""
    effects = reach.effects
    for extra in (*beside, *factors):
        if not effects.unchanged(extra.node, effects.position[extra.node], reach.until(grad)):
            raise Refuse("mutated", extra.node, what=extra.node.name)
    _same_device([*operands, *beside], anchor)


STREAM = ("dropout draws from another random stream than the original",)


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


def _with_axes(found: list[Candidate], group: tuple[Atom, ...], axes: Axes) -> list[Candidate]:
    """For shared heads only the candidates that are not repeated yet will do."""
    fitting = [c for c in found if not atoms(axes.resolve(c.placed.layout)) & set(group)]
    fewest = min(len(atoms(axes.resolve(c.placed.layout))) for c in fitting)
    return [c for c in fitting if len(atoms(axes.resolve(c.placed.layout))) == fewest] if group else fitting


def _final(candidate: Candidate, axes: Axes) -> Placed:
    return Placed(candidate.placed.node, axes.resolve(candidate.placed.layout))


def _resolved(layer: Layer, axes: Axes) -> Layer:
    placed = Placed(layer.placed.node, axes.resolve(layer.placed.layout))
    if isinstance(layer, Fill):
        return dataclasses.replace(layer, mask=placed)
    factor = dataclasses.replace(
        layer.factor,
        tensors=tuple((Placed(p.node, axes.resolve(p.layout)), power) for p, power in layer.factor.tensors),
    )
    return dataclasses.replace(layer, tensor=placed, factor=factor)


def _hollow(masks: Meaning, anchor: Anchor, out: Outwards) -> tuple[Reason, ...]:
    """Beside a sink a query without any key gets zero; scaled by the share of its keys, NaN stays NaN."""
    if out.result is None or masks.empty is not EmptyRow.NAN or anchor.empty is EmptyRow.ZERO:
        return ()
    return (reason("empty_rows", detail="it is no number there, and beside a sink zero"),)


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
        name = _scalar_text(node)
        parts.append(name if power > 0 else f"1/{name}")
    for placed, power in scale.tensors:
        val = tensor(placed.node)
        shape = "x".join(str(size_text(s)) for s in val.shape) if val is not None else ""
        parts.append(f"tensor[{shape}]" if power > 0 else f"1/tensor[{shape}]")
    return " * ".join(parts)


def _scalar_text(node: Node) -> str:
    val = node.meta.get("val")
    return str(val.node.expr) if isinstance(val, torch.SymInt | torch.SymFloat) else node.name


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
    p, cap = out.dropout, found.at.softcap
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
        softcap=_scalar_text(cap) if isinstance(cap, Node) else cap,
        sink=found.at.sink is not None,
        empty_rows=masks.empty if anchor.empty != "zero" or masks.empty != "nan" else anchor.empty,
        grad=grad,
        weights_used=weights_used,
    )


def _softmax_dtype(anchor: Anchor, probabilities: torch.Tensor) -> torch.dtype:
    return probabilities.dtype
