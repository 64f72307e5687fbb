"""Random programs that make masks: lists of small instructions on tensors that broadcast to (S, S)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

Instruction = tuple[Any, ...]
INTS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMBERS = (-1e9, float("-inf"), -3.4028234663852886e38, 0.0, 1.0, -1.0, 0.5, 2.0)

small = st.integers(-4, 6)
pick = st.integers(0, 30)

INSTRUCTIONS: st.SearchStrategy[Instruction] = st.one_of(
    st.tuples(st.sampled_from(["add", "sub", "mul", "minimum", "maximum"]), pick, pick),
    st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), pick, pick),
    st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), pick, st.just("number"), small),
    st.tuples(st.sampled_from(["and", "or", "xor", "logical_and", "logical_or"]), pick, pick),
    st.tuples(st.sampled_from(["plus", "times", "rsub", "floordiv", "mod"]), pick, small),
    st.tuples(st.sampled_from(["tril", "triu", "tril_", "triu_"]), pick, small),
    st.tuples(st.sampled_from(["not", "neg", "abs", "t", "flip", "cumsum", "diff", "double_view", "sign"]), pick),
    st.tuples(st.just("cast"), pick, st.sampled_from([torch.bool, *INTS, *FLOATS])),
    st.tuples(st.sampled_from(["where", "masked_fill", "masked_fill_"]), pick, pick, st.sampled_from(NUMBERS)),
    st.tuples(st.just("scale"), pick, st.sampled_from(NUMBERS)),
    st.tuples(st.sampled_from(["clamp", "clamp_min"]), pick, small, small),
    st.tuples(st.sampled_from(["shift", "roll", "cat", "set_slice", "set_select"]), pick, st.integers(0, 3)),
    st.tuples(st.sampled_from(["index_rows", "gather", "take"]), pick, pick),
)
PROGRAMS = st.lists(INSTRUCTIONS, min_size=1, max_size=12)


class Tensors:
    """What a program has made so far, after the tensors it begins with, which are made when they are first used."""

    def __init__(self, x: Tensor) -> None:
        n = x.shape[0]
        self._made: list[Tensor | Callable[[], Tensor]] = [
            lambda: torch.arange(n)[:, None],
            lambda: torch.arange(n)[None],
            lambda: torch.ones(n, n),
            lambda: torch.ones(n, n, dtype=torch.bool),
            lambda: torch.eye(n),
            lambda: x[None],  # data
            lambda: x[:, None],
            lambda: torch.full((n, n), float("-inf")),
            lambda: torch.arange(n, dtype=torch.int32)[None],
        ]

    def latest(self, back: int) -> Tensor:
        """The one that was made `back` steps ago."""
        at = -1 - back % len(self._made)
        tensor = self._made[at]
        if not isinstance(tensor, Tensor):
            tensor = self._made[at] = tensor()
        return tensor

    def add(self, tensor: Tensor) -> None:
        self._made.append(tensor)


def run(program: Sequence[Instruction], x: Tensor) -> Tensor:
    """What a program makes last; instructions that do not apply are skipped."""
    tensors = Tensors(x)
    for name, first, *rest in program:
        value = apply(name, tensors.latest(first), rest, tensors, x.shape[0])
        if value is not None:
            tensors.add(value)
    return tensors.latest(0)


def apply(name: str, a: Tensor, rest: list[Any], tensors: Tensors, n: int) -> Tensor | None:
    """One instruction."""
    if name in _BINARY:
        other: Any = rest[1] if rest[0] == "number" else tensors.latest(rest[0])
        return _BINARY[name](a, other) if _suits(name, a, other) else None
    if name in _UNARY:
        if a.dtype == torch.bool and name in ("neg", "abs", "cumsum", "diff", "sign"):
            a = a.long()
        if a.dtype.is_floating_point and name in ("cumsum", "not"):
            return None
        return _UNARY[name](a)
    return _OTHER[name](a, rest, tensors, n)


def _suits(name: str, a: Tensor, b: Any) -> bool:
    dtypes = [t.dtype for t in (a, b) if isinstance(t, Tensor)]
    if name in ("and", "or", "xor"):
        return all(d == torch.bool for d in dtypes)
    return not (name == "sub" and any(d == torch.bool for d in dtypes))


def _divide(f: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def g(a: Tensor, rest: list[Any], tensors: Tensors, n: int) -> Tensor | None:
        if a.dtype == torch.bool or a.dtype.is_floating_point or rest[0] == 0:
            return None
        return f(a, rest[0])

    return g


def _whole(a: Tensor, n: int) -> Tensor:
    return a.expand(n, n)


def _set_slice(a: Tensor, rest: list[Any], tensors: Tensors, n: int) -> Tensor:
    out = _whole(a, n).clone()
    out[:, rest[0] :] = 0
    return out


def _set_select(a: Tensor, rest: list[Any], tensors: Tensors, n: int) -> Tensor:
    out = _whole(a, n).clone()
    out[rest[0]] = 1
    out[:, -1].fill_(0)
    return out


def _in_place(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def g(a: Tensor, rest: list[Any], tensors: Tensors, n: int) -> Tensor:
        out = _whole(a, n).clone()
        f(out, rest, tensors)
        return out

    return g


def _mask(rest: list[Any], tensors: Tensors) -> Tensor:
    mask = tensors.latest(rest[0])
    return mask if mask.dtype == torch.bool else mask != 0


def _fill(a: Tensor, number: float) -> float:
    if a.dtype.is_floating_point:
        return number if abs(number) <= torch.finfo(a.dtype).max or number == float("-inf") else 0.0
    return int(number) if abs(number) < 100 else 1


def _where(a: Tensor, rest: list[Any], tensors: Tensors, n: int) -> Tensor:
    return torch.where(_mask(rest, tensors), a, rest[1] if a.dtype.is_floating_point else 3)


def _take(a: Tensor, rest: list[Any], tensors: Tensors, n: int) -> Tensor:
    at = torch.arange(n).flip(0)[:, None].expand(n, n)
    return torch.take_along_dim(_whole(a, n), at, dim=rest[0] % 2)


_BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul,
    "minimum": lambda a, b: torch.minimum(a, b), "maximum": lambda a, b: torch.maximum(a, b),
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "logical_and": torch.logical_and, "logical_or": torch.logical_or,
}  # fmt: skip
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "not": lambda a: ~a,
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "t": lambda a: a.transpose(0, 1),
    "flip": lambda a: a.flip(1),
    "cumsum": lambda a: a.cumsum(-1),
    "diff": lambda a: torch.diff(a, dim=1, prepend=a[:, :1]),
    "double_view": lambda a: a.reshape(-1).view(a.shape),
}
_OTHER: dict[str, Callable[..., Tensor | None]] = {
    "plus": lambda a, rest, tensors, n: a + rest[0],
    "times": lambda a, rest, tensors, n: a * rest[0],
    "rsub": lambda a, rest, tensors, n: None if a.dtype == torch.bool else rest[0] - a,
    "floordiv": _divide(torch.floor_divide),
    "mod": _divide(torch.remainder),
    "tril": lambda a, rest, tensors, n: _whole(a, n).tril(rest[0]),
    "triu": lambda a, rest, tensors, n: _whole(a, n).triu(rest[0]),
    "tril_": _in_place(lambda out, rest, tensors: out.tril_(rest[0])),
    "triu_": _in_place(lambda out, rest, tensors: out.triu_(rest[0])),
    "cast": lambda a, rest, tensors, n: (
        None if a.dtype.is_floating_point and rest[0] in INTS else a.to(rest[0])
    ),  # converting infinities to integers is undefined
    "where": _where,
    "masked_fill": lambda a, rest, tensors, n: a.masked_fill(_mask(rest, tensors), _fill(a, rest[1])),
    "masked_fill_": _in_place(lambda out, rest, tensors: out.masked_fill_(_mask(rest, tensors), _fill(out, rest[1]))),
    "scale": lambda a, rest, tensors, n: a * rest[0],
    "clamp": lambda a, rest, tensors, n: None if a.dtype == torch.bool else a.clamp(min(rest), max(rest)),
    "clamp_min": lambda a, rest, tensors, n: None if a.dtype == torch.bool else a.clamp(min=rest[0]),
    "shift": lambda a, rest, tensors, n: torch.nn.functional.pad(_whole(a, n)[:, : n - rest[0]], (rest[0], 0)),
    "roll": lambda a, rest, tensors, n: torch.roll(_whole(a, n), rest[0], 1),
    "cat": lambda a, rest, tensors, n: torch.cat([_whole(a, n)[:, rest[0] :], _whole(a, n)[:, : rest[0]]], 1),
    "set_slice": _set_slice,
    "set_select": _set_select,
    "index_rows": lambda a, rest, tensors, n: _whole(a, n)[torch.arange(n)[:, None], -1 - torch.arange(n)[None]],
    "gather": lambda a, rest, tensors, n: torch.gather(_whole(a, n), 1, torch.arange(n).flip(0)[None].expand(n, n)),
    "take": _take,
}
