"""The walk from a softmax inwards to the product of queries and keys.

    argument of softmax = factor * inner + terms collected so far

A :class:`Inner` is one step of that equation: the node reached, what its dimensions are, and everything collected
outside it. Each operation has one small rule (scores.py) that turns a step into the next; an operation without a rule
refuses, so nothing is ever crossed that is not understood. Where both operands of a sum contain a product (position
biases made from the queries), each is tried; the one whose product pairs queries with all keys is the score, the
other stays a term.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import dtype_text, same, tensor
from attnpass.recognize import products, views
from attnpass.recognize.axes import Axes, atoms
from attnpass.recognize.inner import Inner
from attnpass.recognize.ops import describe, is_scalar_node, number, op_name
from attnpass.recognize.products import Product
from attnpass.recognize.purity import Effects
from attnpass.recognize.ranges import greatest, holds
from attnpass.recognize.values import levels
from attnpass.recognize.views import shape_of
from attnpass.shape_readers import data_inputs
from attnpass.site import Add, Dim, Factor, Layout, Placed
from attnpass.spec import BLURS

_MAX_FORKS = 32  # nested sums of products: far more than any model has, and a bound for hostile graphs


@dataclass(frozen=True, kw_only=True)
class Found:
    """The walk's end: the product, and which operand holds the keys."""

    at: Inner
    product: Product
    q: Node
    k: Node
    q_layout: Layout
    k_layout: Layout


@dataclass(frozen=True)
class Sink:
    """A column that was appended to the scores: the softmax runs over `whole`, the keys are `keys`."""

    whole: Dim
    keys: Dim
    first: bool  # the sink is the first column (else the last)


Rule = Callable[["Walker", Inner], "Inner | Found"]
RULES: dict[str, Rule] = {}


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for operations by their ATen name (in-place forms included)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


class Walker:
    """One softmax's walk: the graph's effects, the atoms, and the axis that the softmax runs over."""

    def __init__(
        self, effects: Effects, axes: Axes, over: Dim, lookahead: dict[Node, bool], *, bears: float = math.inf
    ) -> None:
        self.effects = effects
        self.axes = axes
        self.over = over
        self.bears = bears  # what a softmax that takes no maximum away can bear to have added to every score
        self.sink: Sink | None = None
        self._lookahead = lookahead

    # -- reading arguments ---------------------------------------------------------------------------------------
    def read(self, reader: Node, arg: Any) -> Node:
        """The node whose value `reader` sees in this tensor argument."""
        if not isinstance(arg, Node) or tensor(arg) is None:
            raise Refuse("unknown_arguments", reader, op=op_name(reader), detail="not a tensor")
        return self.effects.value_at(arg, reader)

    def number(self, arg: Any) -> float | None:
        return number(arg, self.effects.written)

    def factor_of(self, at: Inner, arg: Any, power: int) -> Factor:
        """A multiplier of the scores: a number, a symbolic scalar, or a tensor that does not pair queries and keys."""
        known = self.number(arg)
        if known is not None:
            if power < 0 and known == 0:
                raise Refuse("unknown_arguments", at.node, op=op_name(at.node), detail="division by zero")
            number = 1 / known if power < 0 else known
            if not math.isfinite(number):
                raise Refuse("unknown_arguments", at.node, op=op_name(at.node), detail="a scale that is not finite")
            return Factor(number)
        if is_scalar_node(arg):
            return Factor(scalars=((arg, power),))
        source = self.read(at.node, arg)
        placed = self.place(at, source)
        val = tensor(source)
        if val is None or not val.is_floating_point():
            raise Refuse("score_weights", at.node)
        return Factor(tensors=((placed, power),))

    def same_for_a_row(self, factor: Factor) -> bool:
        """The factor is one number for all keys of a query: what is one number for a row stays that, multiplied."""
        keys = set(self.axes.resolve_dim(self.over))
        return not any(atoms(placed.layout) & keys for placed, _ in factor.tensors)

    def place(self, at: Inner, source: Node) -> Placed:
        """An operand broadcast against the step's node."""
        return Placed(source, self.axes.align(at.layout, shape_of(source), shape_of(at.node)))

    def add_term(self, at: Inner, term: Any, factor: Any) -> Inner:
        """`factor * term` is added to the scores at this step: collect it, or show that it changes nothing."""
        if at.softcap is not None:
            raise Refuse("term_inside_softcap", at.node)
        size = self.factor_of(at, factor, 1)
        known = self.number(term)
        if at.weighed and not (known is not None and math.isfinite(known)):
            # what is added may be infinite, and infinity times zero is no number
            raise Refuse("score_weights", at.node)
        if (known is not None and math.isfinite(known)) or is_scalar_node(term):
            self._changes_nothing(at, math.inf if known is None or not size.is_number else known * size.number)
            return at
        top = at.largest(1.0, torch.float64)
        if top > max(1.0, abs(at.factor.number)) * (1 + 1e-6):
            # a low number that is added may be -inf in between, and stays it
            raise Refuse("unknown_arguments", at.node, op=op_name(at.node), detail="scaled up and down again")
        own = tensor(at.node)
        assert own is not None
        layer = Add(self.term(at, self.read(at.node, term)), at.factor.times(size), own.dtype)
        values = levels(layer.tensor.node, self.effects)
        held = values if layer.factor.is_number else None
        if held is not None and not all(v * layer.factor.number < -BLURS for v in held):
            # nor is it the same if a low number takes it away again before or after it meets the scores
            raise Refuse("lost_scores", at.node)
        low = -math.inf  # what may be added here; -inf itself is no sum that has become so
        if values is not None and size.is_number:
            low = min((v * size.number for v in values if math.isfinite(v)), default=0.0)
        if own.dtype is torch.float16 and low <= BLURS and (at.beyond_half or at.shrinks):
            # a row of float16's lowest number has lost its scores, which a kernel that adds all in float32 still sees,
            # unless it is known by that number; nor is it once that is scaled down
            raise Refuse("lost_scores", at.node)
        at = at.lower(-low, own.dtype)
        wide = at.narrows(own.dtype)
        if wide and not self._survives(at, layer, held):
            raise Refuse("overflows", at.node, dtype=dtype_text(at.narrowest))
        lowest = min((v * layer.factor.number for v in held or () if math.isfinite(v)), default=0.0)
        return dataclasses.replace(at, layers=(*at.layers, layer), wide=wide, lowered=at.lowered + min(lowest, 0.0))

    def _changes_nothing(self, at: Inner, number: float) -> None:
        """Or Refuse. softmax(x + c) == softmax(x) for one finite number c, but not once x is lost beside it."""
        if at.sink is not None:
            raise Refuse("unknown_arguments", at.node, op=op_name(at.node), detail="a constant beside a sink")
        if not abs(number) < -BLURS:
            raise Refuse("lost_scores", at.node)
        if not self.same_for_a_row(at.factor):
            raise Refuse("unknown_arguments", at.node, op=op_name(at.node), detail="what a factor over keys weighs")
        beyond = not at.factor.is_number or abs(number * at.factor.number) > self.bears
        if not at.centred and self.bears < math.inf and beyond:
            raise Refuse("lost_scores", at.node)

    def _survives(self, at: Inner, layer: Add, held: Collection[float] | None) -> bool:
        """A cast further out makes no infinity of a finite number that is added, alone or with what else is: a row of
        them would be NaN and not the mean. Nor does it lose scores beside it that a kernel would still see.
        """
        val, half = tensor(layer.tensor.node), at.narrowest is torch.float16
        assert val is not None
        if held is None:
            alone = not at.layers and layer.factor == Factor()
            return alone and greatest(val.dtype) <= torch.finfo(at.narrowest).max
        numbers = [(v, v * layer.factor.number) for v in held if math.isfinite(v)]
        if half and any(low <= BLURS for _, low in numbers):
            return False
        return all(holds(at.narrowest, v, low) and at.survives(low) for v, low in numbers)

    def term(self, at: Inner, source: Node) -> Placed:
        """A mask or bias broadcast against the step's node, read before it was expanded: smaller, and no longer tied
        to the tensor whose shape it was given.
        """
        placed = self.place(at, source)
        while op_name(placed.node) in views.LIKE_ANOTHER and isinstance(placed.node.args[0], Node):
            before = self.effects.value_at(placed.node.args[0], placed.node)
            placed = Placed(before, views.backward(placed.node, placed.layout, self.axes))
        return placed

    # -- deciding which operand is the score -----------------------------------------------------------------------
    def has_product(self, arg: Any) -> bool:
        """A product can be reached from here by operations that have rules (a look ahead, not a proof)."""
        if not isinstance(arg, Node):
            return False
        stack = [arg]
        path: list[Node] = []
        while stack:
            node = stack[-1]
            if node in self._lookahead:
                stack.pop()
                continue
            if products.is_product(node):
                self._lookahead[node] = True
                stack.pop()
                continue
            if op_name(node) not in RULES:
                self._lookahead[node] = False
                stack.pop()
                continue
            inputs = [a for a in data_inputs(node) if tensor(a) is not None]
            todo = [a for a in inputs if a not in self._lookahead]
            if todo:
                stack.extend(todo)
                path.append(node)
                continue
            self._lookahead[node] = any(self._lookahead[a] for a in inputs)
            stack.pop()
        return self._lookahead[arg]

    def fork(self, at: Inner, arms: list[Inner]) -> Found:
        """Walk several candidates for the score; exactly one may succeed."""
        if at.forks >= _MAX_FORKS:
            raise Refuse("two_score_tensors", at.node)
        found: list[Found] = []
        refused: list[Refuse] = []
        before = (self.over, self.sink)
        after = before
        for arm in arms:
            self.over, self.sink = before
            try:
                found.append(self.walk(dataclasses.replace(arm, forks=at.forks + 1)))
                after = (self.over, self.sink)
            except Refuse as why:
                refused.append(why)
        self.over, self.sink = after
        if len(found) == 1:
            return found[0]
        if found:
            raise Refuse("two_score_tensors", at.node)
        raise refused[0]

    # -- the walk ----------------------------------------------------------------------------------------------------
    def walk(self, at: Inner) -> Found:
        """To the product, or Refuse."""
        while True:
            if products.is_product(at.node):
                return self._finish(at)
            step = RULES.get(op_name(at.node))
            if step is None:
                raise self.stopped(at)
            after = step(self, at)
            if isinstance(after, Found):
                return after
            at = after

    def stopped(self, at: Inner) -> Refuse:
        """Why the walk cannot go on from here."""
        name = op_name(at.node)
        if name == "python:getitem" and isinstance(at.node.args[0], Node):
            source = at.node.args[0]
            opaque = not isinstance(source.target, torch._ops.OpOverload)
            return Refuse("graph_input" if opaque else "no_product_before", at.node, op=describe(source))
        if at.node.op in ("placeholder", "get_attr"):
            return Refuse("graph_input", at.node, op=describe(at.node))
        blocking = self._blocking(at.node)
        deeper = blocking is not None
        if name in RULES:  # a known operation, but none of its operands leads to a product by known ones
            if blocking is None:
                outside = self._from_outside(at.node)
                if outside is not None:
                    return Refuse("graph_input", outside, op=describe(outside))
                return Refuse("no_product_before", at.node, op=describe(at.node))
            return Refuse("unknown_op", blocking, op=describe(blocking))
        if name in ("linear", "addmm", "conv2d", "conv1d", "convolution"):
            mixes = any(self._is_rearranged_product(arg) for arg in at.node.all_input_nodes)
            return Refuse("mixes_heads" if mixes else "projected_scores", at.node, op=describe(at.node))
        return Refuse("unknown_op" if deeper else "no_product_before", at.node, op=describe(at.node))

    def _blocking(self, start: Node) -> Node | None:
        """The nearest operation without a rule behind which a product lies at once; for reasons only."""
        level, seen = [start], {start}
        for _ in range(6):
            for node in level:
                if op_name(node) not in RULES and any(self.has_product(arg) for arg in node.all_input_nodes):
                    return node
            level = [a for n in level for a in n.all_input_nodes if a not in seen and tensor(a) is not None]
            seen.update(level)
        return None

    def _from_outside(self, start: Node) -> Node | None:
        """The input of the graph that `start` has its scores from, if it is one of the same size; for reasons only."""
        node: Node | None = start
        for _ in range(16):
            if node is None or node.op in ("placeholder", "get_attr"):
                return node
            if op_name(node) not in RULES:
                return None
            alike = (a for a in data_inputs(node) if tensor(a) is not None and _as_large(a, start))
            node = next(alike, None)
        return None

    @staticmethod
    def _is_rearranged_product(node: Node) -> bool:
        """A product behind nothing but views and scalings: what a layer mixes is scores, not activations."""
        crossed = views.VIEWS | views.CASTS | {"mul", "div"}
        while op_name(node) in crossed and isinstance(node.args[0], Node):
            node = node.args[0]
        return products.is_product(node)

    def _finish(self, at: Inner) -> Found:
        product = products.read(at.node, at.layout, self.axes)
        if product.extra is not None and self.has_product(product.extra) and product.alpha == 0:
            raise Refuse("unknown_arguments", at.node, op=op_name(at.node), detail="alpha is 0")
        over = set(self.axes.resolve_dim(self.over))
        in_a = over & atoms(self.axes.resolve(product.a_layout))
        in_b = over & atoms(self.axes.resolve(product.b_layout))
        if in_a and in_b:
            raise Refuse("not_a_query_key_product", at.node, detail="both operands carry the key axis")
        if (in_a or in_b) != over:
            raise Refuse("not_a_query_key_product", at.node, detail="no operand carries the whole key axis")
        a, b = self.read(product.inner, product.a), self.read(product.inner, product.b)
        factor = at.factor.times(self.factor_of(at, product.alpha, 1))
        if isinstance(at.softcap, Node):
            factor = _uncapped(factor, at.softcap, at.node)
        layers = at.layers
        if product.extra is not None:
            layers = self.add_term(at, product.extra, product.beta).layers
        at = dataclasses.replace(at, factor=factor, layers=layers)
        seen = (*at.seen, at.node) if product.inner is at.node else (*at.seen, at.node, product.inner)
        at = dataclasses.replace(at, seen=seen)
        if in_b:
            return Found(at=at, product=product, q=a, k=b, q_layout=product.a_layout, k_layout=product.b_layout)
        return Found(at=at, product=product, q=b, k=a, q_layout=product.b_layout, k_layout=product.a_layout)


def _uncapped(factor: Factor, cap: Node, product: Node) -> Factor:
    """The scale s of cap * tanh(s * q.k / cap). That is the same scalar, so nothing has to be known of its value."""
    rest = tuple(one for one in factor.scalars if one[0] is not cap)
    if [power for node, power in factor.scalars if node is cap] != [-1]:
        raise Refuse("nonlinear_scores", product, op="tanh")
    return dataclasses.replace(factor, scalars=rest)


def _as_large(a: Node, b: Node) -> bool:
    size_a, size_b = tensor(a), tensor(b)
    return size_a is not None and size_b is not None and same(size_a.numel(), size_b.numel())
