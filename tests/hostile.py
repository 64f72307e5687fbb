"""Graphs that nobody would write, of any size, made by hand: only the pass meets them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten


class Maker:
    """One attention, and what a case puts around it; values are shared, as making them costs most."""

    def __init__(self, length: int = 64) -> None:
        self.length = length
        self.graph = Graph()
        self.mode = FakeTensorMode()
        with self.mode:
            self.heads, self.scores = torch.empty(2, 4, length, 32), torch.empty(2, 4, length, length)
            self.row, self.keep = torch.empty(length, dtype=torch.int64), torch.empty(length, length, dtype=torch.bool)
            self.column, self.turned = self.row.unsqueeze(1), self.heads.transpose(0, 1)
        self.q, self.k, self.v = (self.given(name, self.heads) for name in "qkv")

    def given(self, name: str, value: Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, value: Tensor | None, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        if value is None:
            with self.mode:
                value = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args), **kwargs)
        node.meta["val"] = value
        return node

    def grid(self) -> tuple[Node, Node]:
        columns = self.call(self.row, aten.arange.default, self.length, device=torch.device("cpu"), pin_memory=False)
        return self.call(self.column, aten.unsqueeze.default, columns, 1), columns

    def product(self, q: Node) -> Node:
        turned = self.call(None, aten.transpose.int, self.k, -1, -2)
        return self.call(self.scores, aten.mul.Tensor, self.call(self.scores, aten.matmul.default, q, turned), 0.125)

    def masked(self, scores: Node, keep: Node) -> Node:
        gone = self.call(self.keep, aten.logical_not.default, keep)
        return self.call(self.scores, aten.masked_fill.Scalar, scores, gone, -math.inf)

    def weighted(self, scores: Node) -> Node:
        weights = self.call(self.scores, aten.softmax.int, scores, -1)
        return self.call(self.heads, aten.matmul.default, weights, self.v)

    def done(self, *outputs: Node) -> GraphModule:
        self.graph.output(outputs)
        return GraphModule(torch.nn.Module(), self.graph)


Case = Callable[[Maker, int], GraphModule]


def chain_before(m: Maker, n: int) -> GraphModule:
    q = m.q
    for _ in range(n):
        q = m.call(m.heads, aten.add.Tensor, q, 1.0)
    return m.done(m.weighted(m.product(q)))


def chain_behind(m: Maker, n: int) -> GraphModule:
    out = m.weighted(m.product(m.q))
    for _ in range(n):
        out = m.call(m.heads, aten.add.Tensor, out, 1.0)
    return m.done(out)


def chain_in_place(m: Maker, n: int) -> GraphModule:
    out = m.weighted(m.product(m.q))
    for _ in range(n):
        out = m.call(m.heads, aten.add_.Tensor, out, 1.0)
    return m.done(out)


def chain_of_factors(m: Maker, n: int) -> GraphModule:
    scores = m.product(m.q)
    for _ in range(n):
        scores = m.call(m.scores, aten.mul.Tensor, scores, 1.0)
    return m.done(m.weighted(scores))


def nested_views(m: Maker, n: int) -> GraphModule:
    q = m.q
    for _ in range(n // 2):
        q = m.call(m.turned, aten.transpose.int, q, 0, 1)
        q = m.call(m.heads, aten.transpose.int, q, 0, 1)
    return m.done(m.weighted(m.product(q)))


def users_of_an_operand(m: Maker, n: int) -> GraphModule:
    others = [m.call(m.heads, aten.add.Tensor, m.q, float(i)) for i in range(n)]
    return m.done(m.weighted(m.product(m.q)), *others)


def users_of_the_result(m: Maker, n: int) -> GraphModule:
    out = m.weighted(m.product(m.q))
    return m.done(*(m.call(m.heads, aten.add.Tensor, out, float(i)) for i in range(n)))


def layers(m: Maker, n: int) -> GraphModule:
    x = m.q
    for _ in range(n):
        x = m.weighted(m.product(x))
    return m.done(x)


def softmaxes(m: Maker, n: int) -> GraphModule:
    scores = m.product(m.q)
    for _ in range(n):
        scores = m.call(m.scores, aten.softmax.int, scores, -1)
    return m.done(scores)


def masks_that_imply_one_another(m: Maker, n: int) -> GraphModule:
    rows, columns = m.grid()
    keep = m.call(m.keep, aten.ge.Tensor, rows, columns)
    for i in range(n):
        shifted = m.call(m.column, aten.add.Tensor, rows, i + 1)
        keep = m.call(m.keep, aten.logical_and.default, m.call(m.keep, aten.ge.Tensor, shifted, columns), keep)
    return m.done(m.weighted(m.masked(m.product(m.q), keep)))


def masks_that_do_not(m: Maker, n: int) -> GraphModule:
    rows, columns = m.grid()
    keep = m.call(m.keep, aten.ge.Tensor, rows, columns)
    apart = m.call(None, aten.sub.Tensor, rows, columns)
    for i in range(n):
        keep = m.call(m.keep, aten.logical_and.default, keep, m.call(m.keep, aten.ne.Scalar, apart, i + 1))
    return m.done(m.weighted(m.masked(m.product(m.q), keep)))


def masks_that_are_data(m: Maker, n: int) -> GraphModule:
    scores = m.product(m.q)
    for i in range(n):
        scores = m.masked(scores, m.given(f"mask{i}", m.keep))
    return m.done(m.weighted(scores))


def biases(m: Maker, n: int) -> GraphModule:
    scores = m.product(m.q)
    for i in range(n):
        scores = m.call(m.scores, aten.add.Tensor, scores, m.given(f"bias{i}", m.scores))
    return m.done(m.weighted(scores))


def chain_of_positions(m: Maker, n: int) -> GraphModule:
    rows, columns = m.grid()
    for _ in range(n):
        rows = m.call(m.column, aten.add.Tensor, rows, 0)
    return m.done(m.weighted(m.masked(m.product(m.q), m.call(m.keep, aten.ge.Tensor, rows, columns))))


CASES: dict[str, tuple[Case, int]] = {  # with the size that the long test takes
    "a chain before": (chain_before, 20_000),
    "a chain behind": (chain_behind, 20_000),
    "a chain in place": (chain_in_place, 20_000),
    "a chain of factors": (chain_of_factors, 20_000),
    "nested views": (nested_views, 20_000),
    "users of an operand": (users_of_an_operand, 10_000),
    "users of the result": (users_of_the_result, 10_000),
    "layers": (layers, 1_000),
    "softmaxes": (softmaxes, 2_000),
    "masks that imply one another": (masks_that_imply_one_another, 2_000),
    "masks that do not": (masks_that_do_not, 2_000),
    "masks that are data": (masks_that_are_data, 2_000),
    "biases": (biases, 2_000),
    "a chain of positions": (chain_of_positions, 20_000),
}
