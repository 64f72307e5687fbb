"""Expressions back to operations: a dense tensor in the graph, or a function of index scalars for FlexAttention.

    dense(expr, ...)      one tensor that broadcasts to (batch, heads, queries, keys); axes it does not depend on are 1
    Renderer(call, ...)   the same for any way of calling operations: nodes of a graph, or tensors right away

One renderer serves both: it is given a function that calls an ATen operation (``Builder.call`` in a graph, the
operation itself in a mask function), the indices as whatever that function takes, and where sizes and opaque tensors
come from. Floats are computed in the dtypes they were computed in before. Reads are clamped to their tensor where it is
not proved that they stay inside, because both branches of a decision are computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from attnpass.errors import Refuse
from attnpass.graph import Builder
from attnpass.masks.expr import (
    And,
    BConst,
    Const,
    Div,
    Eq,
    Expr,
    Fn,
    Ge,
    If,
    Int,
    Load,
    Mod,
    Not,
    Or,
    Poly,
    Sym,
    Value,
    Var,
    variables,
)
from attnpass.masks.frame import NAMES, Frame
from attnpass.masks.ranges import nonneg
from attnpass.masks.sizes import Sizes

aten = torch.ops.aten
Thing = Any  # a node, a tensor, a number: whatever `call` takes and gives
_POINTWISE: dict[str, Any] = {
    "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor,
    "rsub": aten.rsub.Scalar, "neg": aten.neg.default, "abs": aten.abs.default, "exp": aten.exp.default,
    "log": aten.log.default, "sqrt": aten.sqrt.default, "floor": aten.floor.default, "ceil": aten.ceil.default,
    "trunc": aten.trunc.default, "minimum": aten.minimum.default, "maximum": aten.maximum.default,
}  # fmt: skip
_COMPARED: dict[str, tuple[Any, Any]] = {
    "lt": (aten.lt.Tensor, aten.lt.Scalar),
    "le": (aten.le.Tensor, aten.le.Scalar),
    "eq": (aten.eq.Tensor, aten.eq.Scalar),
}
_MIRRORED = {"lt": aten.gt.Scalar, "le": aten.ge.Scalar, "eq": aten.eq.Scalar}


@dataclass(frozen=True)
class _Number:
    """Something that is the same for all indices: a Python number or a symbolic one."""

    value: Thing


class Renderer:
    """Calls the operations that compute an expression."""

    def __init__(
        self,
        call: Callable[..., Thing],
        *,
        indices: Mapping[str, Thing],
        size: Callable[[Sym], Thing],
        tensor: Callable[[str], Thing],
        extents: Callable[[str], tuple[Poly, ...]],
        device: torch.device,
        scalar: Callable[..., Thing] | None = None,
        rank: int = 0,
    ) -> None:
        self.call = call
        self.scalar = scalar or (lambda op, *args: op(*args))  # arithmetic of sizes
        self.indices = indices
        self.size = size
        self.tensor = tensor
        self.extents = extents
        self.device = device
        self.rank = rank  # of the indices
        self._memo: dict[Expr, Thing] = {}

    def __call__(self, e: Value, dtype: torch.dtype = torch.bool) -> Thing:
        """The tensor of an expression; reals and integers in this dtype."""
        if isinstance(e, If):
            return self._tree(e, dtype)
        out = self._get(e)
        if isinstance(out, _Number):
            return self.call(aten.scalar_tensor.default, out.value, dtype=dtype, device=self.device)
        return out if dtype == torch.bool else self.call(aten.to.dtype, out, dtype)

    def _get(self, e: Expr) -> Thing:
        if e not in self._memo:
            self._memo[e] = self._make(e)
        return self._memo[e]

    def _make(self, e: Expr) -> Thing:
        if isinstance(e, Poly):
            return self._poly(e)
        if isinstance(e, Var):
            return self.indices[e.name]
        if isinstance(e, Sym):
            return _Number(self.size(e))
        if isinstance(e, Div | Mod):
            return self._quotient(e)
        if isinstance(e, Load):
            return self._load(e)
        if isinstance(e, BConst | Const):
            return _Number(e.value)
        if isinstance(e, Int):
            return self._get(e.p)
        if isinstance(e, Ge | Eq):
            return self._sign(e)
        if isinstance(e, Not):
            return self.call(aten.logical_not.default, self(e.a))
        if isinstance(e, And | Or):
            join = aten.logical_and.default if isinstance(e, And) else aten.logical_or.default
            out = self(e.args[0])
            for arg in e.args[1:]:
                out = self.call(join, out, self(arg))
            return out
        assert isinstance(e, Fn)
        return self._pointwise(e)

    # --- integers ---------------------------------------------------------------------------------------------------

    def _poly(self, p: Poly) -> Thing:
        number: Thing = 0
        total: Thing = None
        for mono, c in p.terms:
            scale: Thing = c
            part: Thing = None
            for atom in mono:
                factor = self._get(atom)
                if isinstance(factor, _Number):
                    scale = factor.value if scale == 1 else self.scalar(operator.mul, scale, factor.value)
                else:
                    part = factor if part is None else self.call(aten.mul.Tensor, part, factor)
            if part is None:
                number = scale if number == 0 else self.scalar(operator.add, number, scale)
                continue
            if isinstance(scale, int) and scale == -1 and total is not None:
                total = self.call(aten.sub.Tensor, total, part)
                continue
            part = part if isinstance(scale, int) and scale == 1 else self.call(aten.mul.Tensor, part, scale)
            total = part if total is None else self.call(aten.add.Tensor, total, part)
        if total is None:
            return _Number(number)
        return total if isinstance(number, int) and number == 0 else self.call(aten.add.Tensor, total, number)

    def _quotient(self, e: Div | Mod) -> Thing:
        p, q = self._get(e.p), self._get(e.q)
        if isinstance(p, _Number) and isinstance(q, _Number):
            return _Number(self.scalar(operator.floordiv if isinstance(e, Div) else operator.mod, p.value, q.value))
        p = self._tensor(p, torch.int64)
        by = q.value if isinstance(q, _Number) else q
        if isinstance(e, Mod):
            return self.call(aten.remainder.Scalar if isinstance(q, _Number) else aten.remainder.Tensor, p, by)
        mode = aten.div.Scalar_mode if isinstance(q, _Number) else aten.div.Tensor_mode
        return self.call(mode, p, by, rounding_mode="floor")

    def _sign(self, e: Ge | Eq) -> Thing:
        """left >= right, with what is subtracted on the right."""
        left = Poly({m: c for m, c in e.p.terms if c > 0})
        right = -Poly({m: c for m, c in e.p.terms if c < 0})
        a, b = self._get(left), self._get(right)
        is_ge = isinstance(e, Ge)
        if isinstance(a, _Number) and not isinstance(b, _Number):
            return self.call(aten.le.Scalar if is_ge else aten.eq.Scalar, b, a.value)
        a = self._tensor(a, torch.int64)
        if isinstance(b, _Number):
            return self.call(aten.ge.Scalar if is_ge else aten.eq.Scalar, a, b.value)
        return self.call(aten.ge.Tensor if is_ge else aten.eq.Tensor, a, b)

    # --- everything else --------------------------------------------------------------------------------------------

    def _tensor(self, x: Thing, dtype: torch.dtype) -> Thing:
        if isinstance(x, _Number):
            return self.call(aten.scalar_tensor.default, x.value, dtype=dtype, device=self.device)
        return x

    def _load(self, e: Load) -> Thing:
        out = self.tensor(e.source)
        if e.at:
            at = []
            for p, n in zip(e.at, self.extents(e.source), strict=True):
                inside = nonneg(p) and nonneg(n - 1 - p)
                k = self._index(self._get(p))
                if not inside:
                    last = self._get(n - 1)
                    k = self.call(aten.clamp.default, k, 0, last.value if isinstance(last, _Number) else last)
                at.append(k)
            out = self.call(aten.index.Tensor, out, at)
        return self.call(aten.to.dtype, out, torch.int64) if e.kind == "int" and e.dtype != "int64" else out

    def _index(self, x: Thing) -> Thing:
        # of the rank of all other indices: fake tensors and real ones disagree on indices without dimensions
        if isinstance(x, _Number) and self.rank:
            return self.call(aten.full.default, [1] * self.rank, x.value, dtype=torch.int64, device=self.device)
        return self._tensor(x, torch.int64)

    def _tree(self, e: Value, dtype: torch.dtype) -> Thing:
        """A decision, in the dtype of the whole, which holds all of its leaves exactly."""
        if not isinstance(e, If):
            return self(e, dtype)
        return self.call(aten.where.self, self(e.cond), self._tree(e.a, dtype), self._tree(e.b, dtype))

    def _pointwise(self, e: Fn) -> Thing:
        args = [self._get(a) for a in e.args]
        if e.name in _COMPARED:
            return self._compared(e.name, *args)
        if e.name == "isnan":
            return self.call(aten.isnan.default, args[0])
        dtype: torch.dtype = getattr(torch, e.dtype)
        things = [
            x.value if isinstance(x, _Number) and at > 0 and e.name in ("add", "sub", "mul", "div", "rsub")
            else self(a, dtype)
            for at, (x, a) in enumerate(zip(args, e.args, strict=True))
        ]  # fmt: skip
        return things[0] if e.name == "to" else self.call(_POINTWISE[e.name], *things)

    def _compared(self, name: str, a: Thing, b: Thing) -> Thing:
        if isinstance(a, _Number) and not isinstance(b, _Number):
            return self.call(_MIRRORED[name], b, a.value)
        a = self._tensor(a, torch.float64)
        if isinstance(b, _Number):
            return self.call(_COMPARED[name][1], a, b.value)
        return self.call(_COMPARED[name][0], a, b)


# --- into a graph ------------------------------------------------------------------------------------------------


def dense(
    e: Value,
    b: Builder,
    frame: Frame,
    sizes: Sizes,
    nodes: Mapping[str, Node],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bool,
) -> Node:
    """One tensor of four dimensions, of size one along the axes that the expression does not depend on."""
    find = SizeNodes(b, sizes)
    names = variables(e)
    indices: dict[str, Node] = {}
    for at, name in enumerate(NAMES):
        if name in names:
            n = find.poly(frame.lengths[at])
            node = b.call(aten.arange.default, n, device=device)
            shape = [1, 1, 1, 1]
            shape[at] = -1
            indices[name] = b.call(aten.reshape.default, node, shape)
    out = in_graph(find, nodes, indices, device=device, rank=4)(e, dtype)
    if out.meta["val"].dim() < 4:  # it depends on no index at all
        out = b.call(aten.reshape.default, out, [1, 1, 1, 1])
    made: Node = out
    return made


def in_graph(
    find: SizeNodes, nodes: Mapping[str, Node], indices: Mapping[str, Thing], *, device: torch.device, rank: int = 0
) -> Renderer:
    """A renderer that inserts nodes where `find` does; `nodes` are the tensors that are read."""
    return Renderer(
        find.b.call,
        indices=indices,
        size=find,
        tensor=nodes.__getitem__,
        extents=find.extents(nodes),
        device=device,
        scalar=find.scalar,
        rank=rank,
    )


class SizeNodes:
    """Nodes that yield symbolic sizes, made where a tensor of the graph has them."""

    def __init__(self, b: Builder, sizes: Sizes) -> None:
        self.b = b
        self.sizes = sizes
        self._made: dict[str, int | Node] = {}

    def __call__(self, sym: Sym) -> int | Node:
        if sym.name not in self._made:
            self._made[sym.name] = self._find(self.b.graph, self.sizes.exprs[sym.name])
        return self._made[sym.name]

    def _find(self, graph: Graph, expr: Any) -> Node:
        node: Node
        for node in graph.nodes:
            if node is self.b.before:
                break
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt) and val.node.expr == expr:
                return node
            for d, n in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
                if isinstance(n, torch.SymInt) and n.node.expr == expr:
                    return self.b.call(aten.sym_size.int, node, d)
        raise Refuse("no_size", detail=expr)

    def scalar(self, op: Callable[..., Any], *args: Any) -> Any:
        return self.b.call(op, *args) if any(isinstance(a, Node) for a in args) else op(*args)

    def extents(self, nodes: Mapping[str, Node]) -> Callable[[str], tuple[Poly, ...]]:
        """The shapes of tensors, by the name of the source."""
        return lambda source: tuple(self.sizes.poly(n) for n in nodes[source].meta["val"].shape)

    def poly(self, p: Poly) -> int | Node:
        """A polynomial of sizes as a number or a node."""
        render = Renderer(
            self.b.call,
            indices={},
            size=self,
            tensor=lambda name: None,
            extents=lambda name: (),
            device=torch.device("cpu"),
            scalar=self.scalar,
        )
        out = render._get(p)
        assert isinstance(out, _Number)
        value: int | Node = out.value
        return value


def mask_function(
    e: Value, sizes: Mapping[str, int], tensors: Mapping[str, torch.Tensor], *, device: torch.device
) -> Callable[..., torch.Tensor]:
    """What FlexAttention calls: (b, h, query, key) as tensors without dimensions -> whether the key is seen."""

    def keep(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        def extents(source: str) -> tuple[Poly, ...]:
            return tuple(Poly({(): n}) for n in tensors[source].shape)

        render = Renderer(
            lambda op, *args, **kwargs: op(*args, **kwargs),
            indices={"b": b, "h": h, "i": i, "j": j},
            size=lambda sym: sizes[sym.name],
            tensor=tensors.__getitem__,
            extents=extents,
            device=device,
        )
        out: torch.Tensor = render(e)
        if not variables(e):
            out = torch.logical_and(out, j >= 0)  # even a constant has to be mapped over
        return out

    return keep
