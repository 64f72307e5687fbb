"""What a site is tried on.

    real            the values that it has when the model is run on its example inputs
    random          q, k, v normal; masks as they are
    huge            scores in the thousands: softmax becomes a choice, and rounding of scores shows
    ties            all scores of a row equal
    masks_off       the first row of every mask that is an input holds its lowest value: rows without a key, where the
    masks_on        model permits them; or its highest; or
    masks_random    any of its values anywhere
    padding_nan     q, k, v normal, but keys that no query sees are NaN
    padding_inf     ... or infinite. (A value like that makes the original itself NaN: nothing times NaN is NaN)

Where no values are known (a graph inside another, a program without example inputs) masks hold ones, and `real` is left
out. Nothing is written to: every run gets copies, with the strides of the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnpass import graph
from attnpass.graph import tensor, value
from attnpass.trial.pair import Pair, Untried

Values = Mapping[Node, Any]  # of the leaves of a pair

REAL, RANDOM, HUGE, TIES = "real", "random", "huge", "ties"
MASKS_OFF, MASKS_ON, MASKS_RANDOM = "masks_off", "masks_on", "masks_random"
PADDING = ("padding_nan", "padding_inf")
KINDS = (REAL, RANDOM, HUGE, TIES, MASKS_OFF, MASKS_ON, MASKS_RANDOM, *PADDING)

SCORES = 1000.0  # what the largest scores of `huge` come to
_MASKING = -1e4  # a float mask holds numbers like this
_INDEXING = ("embedding", "gather", "index", "index_select", "take", "scatter")


@dataclass(frozen=True)
class Given:
    """One set of values, and how it is looked at."""

    kind: str
    values: Values
    grad: bool = True


def copied(x: Any, *, grad: bool = False) -> Any:
    """The same numbers at the same strides in memory of their own."""
    if not isinstance(x, Tensor):
        return x
    with torch.no_grad():
        new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        length = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        # with what lies between its elements, and what several of them share
        new.as_strided((length,), (1,)).copy_(x.detach().as_strided((length,), (1,), x.storage_offset()))
    return new.requires_grad_(grad and x.is_floating_point())


def made_up(pair: Pair, known: Mapping[str, Tensor]) -> dict[Node, Any]:
    """Values where the real ones are not known."""
    if not pair.whole:
        raise Untried("what its mask is made from is not known here")
    return {node: _made_up(node, known, pair.site.device) for node in pair.leaves}


def _made_up(node: Node, known: Mapping[str, Tensor], device: torch.device) -> Any:
    if node.name in known:
        return known[node.name]
    fake = tensor(node)
    if fake is None:
        return hint(value(node))
    shape, strides = [hint(n) for n in fake.shape], [hint(n) for n in fake.stride()]
    length = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    if fake.is_floating_point():
        g = torch.Generator(fake.device).manual_seed(1)
        flat = torch.randn(length, dtype=fake.dtype, device=fake.device, generator=g)
    elif fake.dtype != torch.bool and device.type != "cpu":
        raise Untried("integers that its mask is made from are not known here")  # a wrong index stops a GPU
    else:
        flat = torch.ones(length, dtype=fake.dtype, device=fake.device)
    return flat.as_strided(shape, strides)


def hint(size: Any) -> Any:
    """The number that a symbol stood for when it was traced."""
    known = graph.hint(size)
    if known is None:
        raise Untried(f"nothing is known of the size {size}")
    return known


def hard(pair: Pair, base: Values, unseen: Callable[[Values], Tensor | None]) -> Iterator[Given]:
    """The made-up kinds; `unseen` tells which elements of k nothing in the result depends on, if any."""
    device = pair.site.device
    g = torch.Generator(device).manual_seed(0)
    normal = {node: _normal(base[node], g) if node in pair.operands else base[node] for node in pair.leaves}
    yield Given(RANDOM, normal)
    if not pair.kernel.can.approximate:
        q = pair.site.q.node
        yield Given(HUGE, normal | {q: filled(normal[q], normal[q] * _stretch(pair))})
    k = pair.site.k.node
    yield Given(TIES, normal | {k: filled(normal[k], 0.5)})
    masked = [normal]
    for kind in (MASKS_OFF, MASKS_ON, MASKS_RANDOM):
        other = {node: new for node in pair.data if (new := _varied(pair, node, base[node], kind, g)) is not None}
        if other:
            masked.append(normal | other)
            yield Given(kind, masked[-1])
    for values in masked:
        where = unseen(values)
        if where is not None:
            for kind, number in zip(PADDING, (math.nan, math.inf), strict=True):
                dirty = {k: filled(values[k], values[k].masked_fill(where, number))}
                yield Given(kind, {**values, **dirty}, grad=False)
            return


def _normal(like: Tensor, g: torch.Generator) -> Tensor:
    # drawn in float32 on every device, so that equal seeds give equal numbers in all types
    return filled(like, torch.randn(like.shape, generator=g, device=g.device).to(like.dtype))


def filled(like: Tensor, content: Tensor | float) -> Tensor:
    """A tensor of this form that holds something else. What is expanded holds it once."""
    new: Tensor = copied(like)
    once = tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for n, s in zip(new.shape, new.stride(), strict=True))
    new[once] = content[once] if isinstance(content, Tensor) else content
    return new


def _stretch(pair: Pair) -> float:
    """What takes q from ordinary scores to huge ones."""
    spec = pair.site.spec
    width = spec.qk_width if isinstance(spec.qk_width, int) else 64
    scale = abs(spec.scale) if isinstance(spec.scale, float | int) and spec.scale else width**-0.5
    factor = float(SCORES / (5 * scale * width**0.5))  # a product of normal vectors comes to five deviations at most
    return factor**0.5 if pair.site.q.node is pair.site.k.node else factor


def _varied(pair: Pair, node: Node, now: Any, kind: str, g: torch.Generator) -> Tensor | None:
    """A mask with other content of the kind that it has; None where it is no mask."""
    bounds = _bounds(pair, node, now) if isinstance(now, Tensor) and now.numel() else None
    if bounds is None:
        return None
    low, high = bounds
    if kind == MASKS_RANDOM:
        at = torch.rand(now.shape, generator=g, device=g.device).to(now.device)
        if now.dtype == torch.bool or now.is_floating_point():
            return filled(now, torch.where(at < 0.5, low, high).to(now.dtype))
        return filled(now, (low + (at * (high - low + 1)).floor()).to(now.dtype))
    new: Tensor = filled(now, now)
    row = new[:1] if new.dim() and new.stride(0) else new[tuple(slice(0, 1 if s == 0 else None) for s in new.stride())]
    row.fill_(low if kind == MASKS_OFF else high)
    return new


def _bounds(pair: Pair, node: Node, now: Tensor) -> tuple[float, float] | None:
    if now.dtype == torch.bool:
        return 0, 1
    if now.is_complex() or isinstance(node.meta.get("val"), torch.nn.Parameter):
        return None
    low, high = float(now.min()), float(now.max())
    if now.is_floating_point():
        return (low, high if high > _MASKING else 0.0) if low <= _MASKING else None
    if low == high and low in (0, 1) and now.device.type == "cpu" and not _indexes(pair, node):
        return 0, 1  # a padding mask of a batch without padding
    return (low, high) if low < high else None


def _indexes(pair: Pair, node: Node) -> bool:
    for side in (pair.original, pair.replacement):
        for read, twin in zip(side.reads, side.module.graph.nodes, strict=False):
            if read is node and any(_name(user) in _INDEXING and user.args[0] is not twin for user in twin.users):
                return True
    return False


def _name(node: Node) -> str:
    target = node.target
    return target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else ""
