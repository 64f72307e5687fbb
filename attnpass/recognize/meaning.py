"""What masks and biases collected on the way mean: facts for the spec, assumptions, and obstacles.

A fill of -inf removes a key. A finite fill leaves it with a weight that is nothing beside an ordinary score, unless
every key of a row is filled: then all are equal and the answer is the mean of the values. How much is "nothing":

    lowest finite number of the dtype, or below -1e30     no score that is a number can be outweighed
    -1e8 and below                                         assumed, and said so
    above (-10000 ...)                                     weak: ordinary scores may be outweighed; the site is kept
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnpass.graph import State, dtype_text, size_text, tensor
from attnpass.reasons import Reason, reason
from attnpass.recognize.axes import Axes
from attnpass.recognize.gradients import asked
from attnpass.recognize.ops import number_in
from attnpass.recognize.purity import Effects
from attnpass.recognize.values import levels, of_dtype
from attnpass.site import Add, Factor, Fill, Layer, Roles, dominates
from attnpass.spec import ASSUMED, BLURS, CERTAIN, BiasSpec, EmptyRow, MaskSpec, Size

NO_GRADIENT = "no gradient is asked of a query that a bias masks entirely"


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """The layers in the words of a spec."""

    mask: MaskSpec
    bias: tuple[BiasSpec, ...]
    empty: EmptyRow
    in_order: bool  # masks of several kinds: what a row without a key gives follows from their order
    assumptions: tuple[str, ...] = ()
    obstacles: tuple[Reason, ...] = ()


def describe_layers(
    layers: tuple[Layer, ...],
    effects: Effects,
    dtype: torch.dtype,
    roles: Roles,
    axes: Axes,
    state: State,
    *,
    grad: bool,
    floored: bool,
    low: EmptyRow | None = EmptyRow.MEAN,
    bears: float = math.inf,
) -> Meaning:
    """Facts about all masks and biases of one site.

    `low`: what this softmax makes of a row of very low numbers; `bears`: what may be added to a row without a change.
    """
    fills = [layer for layer in layers if isinstance(layer, Fill)]
    adds = [layer for layer in layers if isinstance(layer, Add)]
    assumptions: list[str] = []
    obstacles: list[Reason] = []
    for fill in {f.value: f for f in fills}.values():
        if fill.lowest or fill.value <= CERTAIN:
            continue
        if fill.value <= ASSUMED:
            assumptions.append(f"scores stay far above the mask's fill of {fill.value:g} wherever a query has a key")
        else:
            obstacles.append(reason("weak_fill", fill=f"{fill.value:g}"))
    lowest = _lowest(adds, effects)
    in_order = bool(fills) and (len({f.value for f in fills}) > 1 or (bool(adds) and not lowest > BLURS))
    empty = _empty(fills, lowest, floored=floored)
    deep = bool(adds) and lowest <= BLURS
    if bears < math.inf and not sum(_seen(layer, effects) for layer in adds) <= bears:
        obstacles.append(reason("lost_scores"))
    # beside a fill of -inf there may be rows of that and of finite ones
    finite = any(math.isfinite(f.value) for f in fills)
    if low is not EmptyRow.MEAN and (finite or deep or empty is EmptyRow.MEAN):
        if low is None or in_order or deep:
            obstacles.append(reason("empty_rows", detail="this spelling of softmax has no simple one there"))
        else:
            empty = low
    blurred = (bool(adds) and empty is not EmptyRow.IMPOSSIBLE) or len({f.additive for f in fills}) > 1
    if grad and blurred:
        assumptions.append(NO_GRADIENT)
    return Meaning(
        mask=MaskSpec(dense=bool(fills)),
        bias=tuple(_bias(layer, effects, dtype, roles, axes, state) for layer in adds),
        empty=empty,
        in_order=in_order,
        assumptions=tuple(assumptions),
        obstacles=tuple(obstacles),
    )


def _lowest(adds: list[Add], effects: Effects) -> float:
    """The lowest that all terms together may be; -inf where that is unknown."""
    total = 0.0
    for layer in adds:
        found = levels(layer.tensor.node, effects)
        val = tensor(layer.tensor.node)
        if found is None or val is None or not layer.factor.is_number:
            return -math.inf
        total += min(0.0, *(v * layer.factor.number for v in found))
        if val.is_floating_point() and number_in(total, val.dtype) == -math.inf:
            return -math.inf
    return total


def _seen(layer: Add, effects: Effects) -> float:
    """The most that a term may add to the scores of keys that it does not mask; infinite where that is unknown."""
    node = layer.tensor.node
    found, val = levels(node, effects), tensor(node)
    if found is None or val is None or not layer.factor.is_number:
        return math.inf
    numbers = [v * layer.factor.number for v in found]
    return max(abs(v) for v in (0.0, *numbers) if not dominates(v, val.dtype))


def _empty(fills: list[Fill], lowest: float, *, floored: bool) -> EmptyRow:
    """What a row without any key gives."""
    never = EmptyRow.MEAN if floored else EmptyRow.NAN
    if any(f.value == -math.inf for f in fills) or lowest == -math.inf:
        return never
    # beside a fill that is finite, or a bias that swallows scores, all keys weigh the same
    return EmptyRow.MEAN if fills or lowest <= BLURS else EmptyRow.IMPOSSIBLE


def as_fills(layers: tuple[Layer, ...], effects: Effects, dtype: torch.dtype, *, grad: bool) -> tuple[Layer, ...]:
    """Additive masks as fills, where adding them in a fused kernel would not do.

    In float16 even the lowest number leaves a score readable beside it, once a kernel adds the two in float32. Where
    gradients are needed, kernels keep log-sum-exp instead of probabilities: for a row of finfo.min alone it swallows
    the number of keys, so that the backward takes every probability for 1. A tensor that holds only 0 and a fill says
    which keys it keeps, so the mask can be taken from that; beside other fills that also makes them of one kind.
    """
    if not layers or (len(layers) == 1 and dtype != torch.float16 and not grad):
        return layers
    # Masked twice by addition is masked lower than once, which a fill cannot tell; so there may be one such mask only,
    # innermost, and what is filled over it must be the same number.
    *outer, last = layers
    inner = _as_fill(last, effects) if isinstance(last, Add) else last
    if isinstance(inner, Add) or any(isinstance(layer, Add) or layer.value != inner.value for layer in outer):
        return layers
    return (*outer, inner)


def _as_fill(layer: Add, effects: Effects) -> Layer:
    found = levels(layer.tensor.node, effects)
    val = tensor(layer.tensor.node)
    if found is None or val is None or len(found) != 2 or 0.0 not in found or layer.factor != Factor():
        return layer
    fill = min(found)
    if not dominates(fill, val.dtype):
        return layer
    lowest = val.is_floating_point() and fill == torch.finfo(val.dtype).min
    return Fill(layer.tensor, off=True, value=fill, dtype=val.dtype, lowest=lowest, additive=True)


def _bias(layer: Add, effects: Effects, dtype: torch.dtype, roles: Roles, axes: Axes, state: State) -> BiasSpec:
    node = layer.tensor.node
    val = tensor(node)
    assert val is not None
    own = {a for dim in layer.tensor.layout for a in dim}
    shape: list[Size] = []
    for part in (roles.batch, roles.heads, roles.queries, roles.keys):
        size = axes.dim_size(tuple(a for a in part if a in own))
        shape.append(size_text(size))
    found = levels(node, effects) if layer.factor.is_number else None
    few = found is not None and all(_survives(v * layer.factor.number, dtype) for v in found)
    fits = torch.promote_types(val.dtype, dtype) == dtype
    # bias.float() beside scores in float32: what was widened can be narrowed again, its sign may change
    signed = layer.factor.is_number and abs(layer.factor.number) == 1
    exact = few or fits or (signed and of_dtype(node, dtype, effects))
    return BiasSpec(shape=tuple(shape), dtype=dtype_text(val.dtype), grad=asked(node, state), exact=exact)


def _survives(v: float, dtype: torch.dtype) -> bool:
    """The narrower dtype holds the number, or both are masks: beyond its range it becomes its lowest number."""
    return number_in(v, dtype) == v or (v <= CERTAIN and torch.finfo(dtype).min <= CERTAIN)
