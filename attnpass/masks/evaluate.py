"""An expression as a dense tensor, at given sizes: what every check and every property test compares with.

Integers are int64, reals float64 (each operation in between is rounded to its own dtype, so nothing is lost), indices
are broadcast against each other. The branch of a decision that is not taken may read outside its tensor, so coordinates
are clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnpass.masks.expr import (
    And,
    Atom,
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
)

_REAL: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "rsub": torch.rsub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
}
_BOOL: dict[str, Callable[..., Tensor]] = {
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "isnan": torch.isnan,
}


class Evaluator:
    """Values of expressions for fixed indices, sizes and tensors."""

    def __init__(
        self, indices: Mapping[str, Tensor], sizes: Mapping[str, int], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self.indices = indices
        self.sizes = sizes
        self.tensors = tensors or {}
        self._memo: dict[Expr, Tensor] = {}

    def __call__(self, e: Value | Atom) -> Tensor:
        if e not in self._memo:
            self._memo[e] = self._compute(e)
        return self._memo[e]

    def _compute(self, e: Any) -> Tensor:
        if isinstance(e, Poly):
            out = torch.zeros((), dtype=torch.int64)
            for mono, c in e.terms:
                term = torch.tensor(c)
                for atom in mono:
                    term = term * self(atom)
                out = out + term
            return out
        if isinstance(e, Var):
            return self.indices[e.name]
        if isinstance(e, Sym):
            return torch.tensor(self.sizes[e.name])
        if isinstance(e, Div):
            return torch.div(self(e.p), self(e.q), rounding_mode="floor")
        if isinstance(e, Mod):
            return torch.remainder(self(e.p), self(e.q))
        if isinstance(e, BConst):
            return torch.tensor(e.value)
        if isinstance(e, Ge):
            return self(e.p) >= 0
        if isinstance(e, Eq):
            return self(e.p) == 0
        if isinstance(e, Not):
            return ~self(e.a)
        if isinstance(e, And | Or):
            out = self(e.args[0])
            for arg in e.args[1:]:
                out = out & self(arg) if isinstance(e, And) else out | self(arg)
            return out
        if isinstance(e, Const):
            return torch.tensor(e.value, dtype=torch.float64)
        if isinstance(e, Int):
            return self(e.p).to(torch.float64)
        if isinstance(e, If):
            return torch.where(self(e.cond), self(e.a), self(e.b))
        if isinstance(e, Load):
            return self._load(e)
        assert isinstance(e, Fn)
        return self._call(e)

    def _load(self, e: Load) -> Tensor:
        tensor = self.tensors[e.source]
        at = tuple(self(p).clamp(0, n - 1) for p, n in zip(e.at, tensor.shape, strict=True))
        out = tensor[at] if at else tensor
        return out if e.kind == "bool" else out.to(torch.int64 if e.kind == "int" else torch.float64)

    def _call(self, e: Fn) -> Tensor:
        if e.name in _BOOL:
            return _BOOL[e.name](*(self(a) for a in e.args))
        dtype = getattr(torch, e.dtype)
        if e.name == "to":
            out = self(e.args[0]).to(dtype)
        elif e.name in ("minimum", "maximum"):
            out = _REAL[e.name](*(self(a).to(dtype) for a in e.args))
        else:
            # a constant takes part as a Python number does: in the precision that the operation computes in
            args = [a.value if isinstance(a, Const) else self(a).to(dtype) for a in e.args]
            if not isinstance(args[0], Tensor):
                args[0] = torch.tensor(args[0], dtype=dtype)
            out = _REAL[e.name](*args).to(dtype)
        return out.to(torch.int64 if e.kind == "int" else torch.float64)


def dense_indices(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """One range per index, shaped to broadcast against the others in the order given."""
    rank = len(sizes)
    return {
        name: torch.arange(n).reshape([-1 if k == at else 1 for k in range(rank)])
        for at, (name, n) in enumerate(sizes.items())
    }
