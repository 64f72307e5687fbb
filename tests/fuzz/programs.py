"""A program as plain data: what is drawn, shrunk and printed. :mod:`tests.fuzz.source` turns one into Python.

Every field has a plain default, so that shrinking a failing program means putting defaults back one by one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes. Query heads are kv_heads * groups."""

    batch: int = 2
    kv_heads: int = 3
    groups: int = 1
    queries: int = 5
    keys: int = 7
    width: int = 8
    v_width: int = 8

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups


@dataclass(frozen=True)
class Scale:
    """A factor, and how it is written (a key of ``source.SCALES``)."""

    form: str = "mul"
    value: float = 0.3


@dataclass(frozen=True)
class Mask:
    """A keep-mask: which keys, how that is spelled, how it is applied to the scores, and with which fill."""

    kind: str = "causal"
    spelling: int = 0
    apply: str = "masked_fill"
    fill: str = "-inf"


@dataclass(frozen=True)
class Bias:
    """Numbers that are added to the scores."""

    kind: str = "relative"
    form: str = "add"


@dataclass(frozen=True)
class Cap:
    """A soft cap."""

    value: float = 3.0


@dataclass(frozen=True)
class ToFloat:
    """The scores are cast to float32."""


@dataclass(frozen=True)
class Floor:
    """The scores are clamped at the lowest number of their dtype (a key of ``masks.FLOORS``)."""

    form: str = "clamp_min"


@dataclass(frozen=True)
class Number:
    """A plain number is added to all scores."""

    value: float = 0.5


Step = Scale | Mask | Bias | Cap | ToFloat | Floor | Number


@dataclass(frozen=True, kw_only=True)
class Program:
    """One attention, from its inputs to its result."""

    shape: Shape = Shape()
    dtype: str = "float32"
    grad: bool = False
    literal: bool = False  # sizes are written as numbers, not read from the inputs
    layout: str = "bhsd"  # how the inputs come
    heads: str = "none"  # how shared key/value heads are spelled
    product: str = "matmul"
    product_scale: float = 1.0  # of baddbmm
    order: str = "bhqk"  # of the scores that an einsum makes
    letters: str = "bhqkde"  # of the einsums: batch, heads, queries, keys, width, value width
    q_scale: Scale | None = None
    k_scale: Scale | None = None
    upcast: bool = False  # q and k are cast to float32 before their product
    steps: tuple[Step, ...] = ()
    sink: str | None = None
    softmax: str = "F.softmax"
    dropout: str | None = None
    pv: str = "matmul"
    out: str = "plain"
    extras: tuple[str, ...] = ()
    autocast: bool = False
    empty: bool = False  # padding may leave queries without any key
    damage: str | None = None
    called: str | None = None  # as a call of torch's own, with masks in this form (a key of ``spelled.CALLS``)
    dynamic: str | None = None  # which sizes are symbolic
    front: str = "graph"
    inner: str = "eager"  # behind the torch.compile front
    kernel: str | None = None  # asked for by name
    seed: int = 0  # of the numbers in the inputs

    @property
    def masks(self) -> tuple[Mask, ...]:
        return tuple(step for step in self.steps if isinstance(step, Mask))

    @property
    def biases(self) -> tuple[Bias, ...]:
        return tuple(step for step in self.steps if isinstance(step, Bias))

    @property
    def numbers(self) -> tuple[float, ...]:
        return tuple(step.value for step in self.steps if isinstance(step, Number))

    @property
    def cap(self) -> Cap | None:
        return next((step for step in self.steps if isinstance(step, Cap)), None)

    def __repr__(self) -> str:
        """Only what is not the default."""
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        said = [f"{name}={getattr(self, name)!r}" for name in plain if getattr(self, name) != plain[name]]
        return f"Program({', '.join(said)})"
