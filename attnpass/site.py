"""A site: one attention computation as it lies in one ATen graph, and the fused call that would replace it.

A :class:`Site` joins a spec with nodes, so it lives only as long as its graph is being worked on; what is kept is the
ledger's Decision. Tensors are described by *layouts*: every axis of the computation is an atom, every dimension of a
tensor an ordered tuple of atoms (empty for a dimension of size one). Two tensors agree where their atoms agree; no
dimension is ever identified by its size or position alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from attnpass.graph import State, tensor
from attnpass.reasons import Reason
from attnpass.spec import ASSUMED, AttentionSpec, EmptyRow

Atom = int
Dim = tuple[Atom, ...]
Layout = tuple[Dim, ...]


@dataclass(frozen=True)
class Placed:
    """A tensor of the graph and what each of its dimensions is."""

    node: Node
    layout: Layout


@dataclass(frozen=True)
class Factor:
    """A product of numbers, symbolic scalars and tensors, each with the power +1 or -1."""

    number: float = 1.0
    scalars: tuple[tuple[Node, int], ...] = ()  # SymFloat / SymInt nodes
    tensors: tuple[tuple[Placed, int], ...] = ()

    def times(self, other: Factor) -> Factor:
        return Factor(
            self.number * other.number,
            self.scalars + other.scalars,
            self.tensors + other.tensors,
        )

    @property
    def is_number(self) -> bool:
        return not self.scalars and not self.tensors


@dataclass(frozen=True)
class Add:
    """``factor * tensor`` is added to the scores."""

    tensor: Placed
    factor: Factor
    dtype: torch.dtype  # of the sum

    @property
    def placed(self) -> Placed:
        return self.tensor


def dominates(value: float, dtype: torch.dtype) -> bool:
    """A number that takes a key's weight away beside ordinary scores."""
    return value <= ASSUMED or (dtype.is_floating_point and value <= torch.finfo(dtype).min)


@dataclass(frozen=True)
class Fill:
    """Where ``mask`` is `off`, the score is replaced by ``value``."""

    mask: Placed
    off: bool  # the truth value of the mask at which the fill applies
    value: float
    dtype: torch.dtype  # of the scores that it fills
    lowest: bool = False  # the fill is the lowest finite number of the scores' dtype: no score can be below it
    additive: bool = False  # was written as an addition, through which gradients still reach the scores

    @property
    def placed(self) -> Placed:
        return self.mask


Layer = Add | Fill


@dataclass(frozen=True)
class Floor:
    """Scores are clamped from below at the lowest finite number."""

    number: float
    at_it: float  # the share of a gradient that passes a score which lies there: maximum shares it with the number

    def passes(self, score: float) -> float:
        """The share of a gradient that goes on to this score."""
        if score == self.number:
            return self.at_it
        return 1.0 if score > self.number else 0.0


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which atoms play which part."""

    batch: tuple[Atom, ...]  # canonical batch axes, then ...
    heads: tuple[Atom, ...]  # ... canonical head axes, query order: key/value heads first, group last
    group: tuple[Atom, ...]  # the trailing part of `heads` on which neither k nor v depends
    queries: tuple[Atom, ...]
    keys: tuple[Atom, ...]
    width: tuple[Atom, ...]  # contracted between q and k
    v_width: tuple[Atom, ...]

    @property
    def shared(self) -> tuple[Atom, ...]:
        """The head axes that k and v have: without the group."""
        return self.heads[: len(self.heads) - len(self.group)]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One recognised attention."""

    anchor: Node  # the softmax, or the existing fused call
    output: Node  # the node whose value the fused call yields
    output_layout: Layout
    q: Placed
    k: Placed
    v: Placed
    sizes: dict[Atom, Any]  # int or SymInt
    roles: Roles
    scale: Factor
    layers: tuple[Layer, ...]  # outermost first, as they were met from the softmax inwards
    in_order: bool = False  # the layers have to be evaluated one after the other, as the original does
    floor: Floor | None = None  # the original clamps its scores
    hollow: EmptyRow = EmptyRow.NAN  # what the original's softmax makes of a row of -inf
    causal: bool = False  # an existing call says so by itself: j <= i, counted from the start of both
    softcap: float | Node | None  # a node: a symbolic scalar
    sink: Placed | None
    dropout: float | Node  # live probability; 0.0 in evaluation
    spec: AttentionSpec
    region: tuple[Node, ...]  # everything between q, k, v and output, in graph order
    form_readers: tuple[Node, ...] = ()  # nodes outside that read the shape, dtype or device of scores and no more
    other_readers: tuple[Node, ...] = ()  # nodes outside that read scores or probabilities
    state: State = field(default_factory=State)
    output_written: bool = False  # something later writes into the output in place
    assumptions: tuple[str, ...] = ()
    obstacles: tuple[Reason, ...] = ()  # why no kernel whatever may replace it
    waived: bool = False  # the user does not care what a query without any key gets
    existing_call: bool = False  # the anchor is a scaled_dot_product_attention call
    trail: tuple[str, ...] = field(default=())

    @property
    def device(self) -> torch.device:
        """Where all of it is computed."""
        q = tensor(self.q.node)
        assert q is not None
        return q.device

    @property
    def flows(self) -> float:
        """The share of a gradient that reaches the scores of a row without a key: all of it where all its masks were
        written as additions, but for what a clamp keeps back.
        """
        fills = [layer for layer in self.layers if isinstance(layer, Fill)]
        if not self.spec.grad or not all(fill.additive for fill in fills):
            return 0.0
        # a score is swallowed by what is added, so the sum is that number itself
        return 1.0 if self.floor is None else min((self.floor.passes(fill.value) for fill in fills), default=1.0)

    @property
    def bent(self) -> bool:
        """The gradient that reaches the scores of a row without a key goes on through a soft cap, which is not linear:
        what answers such rows (layers.py) does not have it.
        """
        return self.rows is EmptyRow.MEAN and self.sink is None and self.flows > 0 and self.softcap is not None

    @property
    def rows(self) -> EmptyRow:
        """What has to be answered where a query has no key: spec.empty_rows, unless that is waived."""
        return EmptyRow.IMPOSSIBLE if self.waived else self.spec.empty_rows


@dataclass(frozen=True, kw_only=True)
class BlockLists:
    """Which blocks of queries and keys are computed, as torch lists them: int32, how many of each row and which.

    `part` apply the mask's function, `full` do without it; `rows` go by query blocks over (batch, 1, query blocks, key
    blocks), `columns` by key blocks, for a backward.
    """

    size: int
    part_rows: tuple[Node, Node]
    full_rows: tuple[Node, Node] | None
    part_columns: tuple[Node, Node]
    full_columns: tuple[Node, Node] | None


@dataclass(frozen=True, kw_only=True)
class Functions:
    """A mask and what is done to scores, as functions of one score and its index: nodes that yield graph modules."""

    score: Node  # (score, b, h, i, j, *score_reads) -> score, after the scale and before the mask
    score_reads: tuple[Node, ...]
    keep: Node  # (b, h, i, j, *keep_reads) -> bool
    keep_reads: tuple[Node, ...]
    blocks: BlockLists


@dataclass(frozen=True, kw_only=True)
class Forms:
    """A mask, a bias and a sink as the arguments that many kernels have for them.

    Query i stands at i + keys - queries: positions are counted from the end of both, so that the last query stands at
    the last key.
    """

    left: int | None = None  # how many keys behind it a query sees; None: all
    right: int | None = None  # ... and ahead of it
    slopes: Node | None = None  # ALiBi, float32 (heads,): a key n behind the query has the bias -n * slope
    keys: Node | None = None  # bool, broadcastable to (batch, 1, 1, keys): False where no query sees the key
    sink: Node | None = None  # broadcastable to (batch, heads, queries, 1)

    @property
    def causal(self) -> bool:
        """Bounded by the query's own position and by nothing else."""
        return self.right == 0 and self.left is None

    @property
    def window(self) -> bool:
        """Bounded otherwise."""
        return not self.causal and (self.left is not None or self.right is not None)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a kernel is given to emit: canonical (batch, heads, length, width) nodes, ready to be read."""

    q: Node
    k: Node  # heads not repeated: groups query heads share one
    v: Node
    mask: Node | None = None  # None, a bool keep-mask, or an additive float bias, broadcastable to (batch, heads, q, k)
    causal: bool = False  # query i sees the keys up to i; then there is no mask besides
    scale: float | Node
    dropout: float = 0.0
    groups: int
    spec: AttentionSpec
    functions: Functions | None = None  # for a kernel that takes them: they are the mask, the biases and the soft cap
    forms: Forms | None = None  # for a kernel that takes them: they are the mask, the bias and the sink
