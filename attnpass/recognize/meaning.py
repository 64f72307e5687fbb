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

from attnpass.graph import dtype_text, size_text, tensor
from attnpass.reasons import Reason, reason
from attnpass.recognize.axes import Axes
from attnpass.recognize.ops import number_in
from attnpass.recognize.purity import Effects
from attnpass.recognize.values import levels
from attnpass.site import Add, Factor, Fill, Layer, Roles
from attnpass.spec import BiasSpec, EmptyRow, MaskSpec, Size

CERTAIN = -1e30
ASSUMED = -1e8


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """The layers in the words of a spec."""

    mask: MaskSpec
    bias: tuple[BiasSpec, ...]
    empty: EmptyRow
    assumptions: tuple[str, ...] = ()
    obstacles: tuple[Reason, ...] = ()


def describe_layers(
    layers: tuple[Layer, ...], effects: Effects, dtype: torch.dtype, roles: Roles, axes: Axes
) -> Meaning:
    """Facts about all masks and biases of one site."""
    fills = [layer for layer in layers if isinstance(layer, Fill)]
    bias = tuple(_bias(layer, effects, dtype, roles, axes) for layer in layers if isinstance(layer, Add))
    assumptions: list[str] = []
    obstacles: list[Reason] = []
    for fill in {f.value: f for f in fills}.values():
        if fill.lowest or fill.value <= CERTAIN:
            continue
        if fill.value <= ASSUMED:
            assumptions.append(f"scores stay far above the mask's fill of {fill.value:g} wherever a query has a key")
        else:
            obstacles.append(reason("weak_fill", fill=f"{fill.value:g}"))
    if dtype == torch.float16 and any(isinstance(a, Add) and levels(a.tensor.node, effects) is None for a in layers):
        assumptions.append("no query is masked entirely by a float16 bias")
    empty = _empty(layers, fills, effects)
    if empty is None:
        obstacles.append(reason("mixed_fills"))
        empty = EmptyRow.MEAN
    return Meaning(
        mask=MaskSpec(dense=bool(fills)),
        bias=bias,
        empty=empty,
        assumptions=tuple(assumptions),
        obstacles=tuple(obstacles),
    )


def _empty(layers: tuple[Layer, ...], fills: list[Fill], effects: Effects) -> EmptyRow | None:
    """What a row without any key gives; None when masks of several kinds make it none of the known answers."""
    values = {f.value for f in fills}
    if len(values) > 1:
        return None
    if values == {-math.inf}:
        return EmptyRow.NAN
    if values:
        outermost_fill = next(i for i, layer in enumerate(layers) if isinstance(layer, Fill))
        innermost_fill = max(i for i, layer in enumerate(layers) if isinstance(layer, Fill))
        outside = [layer for layer in layers[:innermost_fill] if isinstance(layer, Add)]
        if not outside:
            return EmptyRow.MEAN
        # an additive term outside a finite fill tells filled keys apart; exact only where the fill swallows scores
        return EmptyRow.MEAN if next(iter(values)) <= CERTAIN and outermost_fill >= 0 else None
    lowest = 0.0
    for layer in layers:
        assert isinstance(layer, Add)
        found = levels(layer.tensor.node, effects)
        if found is None or not layer.factor.is_number:
            return EmptyRow.NAN
        lowest += min(0.0, *(v * layer.factor.number for v in found))
    val = tensor(layers[0].tensor.node) if layers and isinstance(layers[0], Add) else None
    if val is not None and val.is_floating_point() and number_in(lowest, val.dtype) == -math.inf:
        return EmptyRow.NAN
    bottom = val is not None and val.is_floating_point() and lowest <= torch.finfo(val.dtype).min
    return EmptyRow.MEAN if lowest <= ASSUMED or bottom else EmptyRow.IMPOSSIBLE


def as_fills(layers: tuple[Layer, ...], effects: Effects, dtype: torch.dtype) -> tuple[Layer, ...]:
    """Additive masks as fills, where the kernel's dtype is too short for them to swallow a score.

    In float16 even the lowest number leaves a score readable beside it, once a kernel adds the two in float32. A tensor
    that holds only 0 and a fill says which keys it keeps, so the mask can be taken from that.
    """
    if dtype != torch.float16:
        return layers
    return tuple(_as_fill(layer, effects) if isinstance(layer, Add) else layer for layer in layers)


def _as_fill(layer: Add, effects: Effects) -> Layer:
    found = levels(layer.tensor.node, effects)
    val = tensor(layer.tensor.node)
    if found is None or val is None or len(found) != 2 or 0.0 not in found or layer.factor != Factor():
        return layer
    fill = min(found)
    lowest = val.is_floating_point() and fill == torch.finfo(val.dtype).min
    if not lowest and fill > ASSUMED:
        return layer
    return Fill(layer.tensor, off=True, value=fill, lowest=lowest)


def _bias(layer: Add, effects: Effects, dtype: torch.dtype, roles: Roles, axes: Axes) -> BiasSpec:
    node = layer.tensor.node
    val = tensor(node)
    assert val is not None
    own = {a for dim in layer.tensor.layout for a in dim}
    shape: list[Size] = []
    for part in (roles.batch, roles.heads, roles.queries, roles.keys):
        size = axes.dim_size(tuple(a for a in part if a in own))
        shape.append(size_text(size))
    grad = bool(node.meta.get("attnpass_grad", False))
    found = levels(node, effects) if layer.factor.is_number else None
    few = found is not None and all(_survives(v * layer.factor.number, dtype) for v in found)
    fits = torch.promote_types(val.dtype, dtype) == dtype
    return BiasSpec(shape=tuple(shape), dtype=dtype_text(val.dtype), grad=grad, exact=few or fits)


def _survives(v: float, dtype: torch.dtype) -> bool:
    """The narrower dtype holds the number, or both are masks: beyond its range it becomes its lowest number."""
    return number_in(v, dtype) == v or (v <= CERTAIN and torch.finfo(dtype).min <= CERTAIN)
