# ruff: noqa: E501  (one spelling a line reads better than a wrapped one)
"""One table: the same masks as people write them. Each function gets (x, S), x of shape (batch, S), or the sizes of an
oblong one, and returns a mask or bias that broadcasts to (batch, heads, queries, keys)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, arange

INF = float("inf")
MIN = torch.finfo(torch.float32).min
Spelling = Callable[..., Tensor]


def _grid(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool)


def _filled(x: Tensor, n: int) -> Tensor:
    mask = torch.full((n, n), MIN)
    at = arange(n)
    mask.masked_fill_(at < (at + 1).view(n, 1), 0)
    return mask[None, None].expand(x.shape[0], 1, n, n)


def _filled_where(x: Tensor, n: int) -> Tensor:
    mask = torch.zeros(n, n)
    mask[_grid(n).triu(1)] = -INF
    return mask


def _triu_in_place(x: Tensor, n: int) -> Tensor:
    mask = torch.empty(n, n).fill_(-INF)
    mask.triu_(1)
    return mask


def _vmapped(x: Tensor, n: int) -> Tensor:
    row = torch.vmap(lambda i, j: j <= i, in_dims=(None, 0))
    return torch.vmap(row, in_dims=(0, None))(arange(n), arange(n))


CAUSAL: dict[str, Spelling] = {
    "tril of ones": lambda x, n: torch.tril(torch.ones(n, n)).bool(),
    "tril of bools": lambda x, n: _grid(n).tril(),
    "arange, rows first": lambda x, n: arange(n)[:, None] >= arange(n)[None],
    "arange, columns first": lambda x, n: arange(n)[None, :] <= arange(n)[:, None],
    "x[:, None] >= x[None]": lambda x, n: (p := arange(n)).unsqueeze(1) >= p.unsqueeze(0),
    "not triu": lambda x, n: ~torch.triu(torch.ones(n, n), diagonal=1).bool(),
    "triu == 0": lambda x, n: torch.triu(torch.ones(n, n), diagonal=1) == 0,
    "triu transposed": lambda x, n: torch.triu(torch.ones(n, n)).transpose(0, 1) > 0,
    "full(-inf).triu(1)": lambda x, n: torch.full((n, n), -INF).triu(1),
    "full(-inf).triu_(1)": _triu_in_place,
    "masked_fill of zeros": lambda x, n: torch.zeros(n, n).masked_fill(_grid(n).triu(1), MIN),
    "masked_fill_ of a full": _filled,
    "index assignment": _filled_where,
    "where": lambda x, n: torch.where(_grid(n).tril(), 0.0, -INF),
    "where over a tensor": lambda x, n: torch.where(_grid(n).tril(), torch.zeros((), dtype=x.dtype), MIN),
    "(1 - mask) * min": lambda x, n: (1.0 - torch.tril(torch.ones(n, n))) * MIN,
    "(mask - 1) * 1e9": lambda x, n: (_grid(n).tril().float() - 1.0) * 1e9,
    "rsub": lambda x, n: torch.rsub(torch.tril(torch.ones(n, n)), 1) * -1e9,
    "log of tril by where": lambda x, n: torch.where(torch.tril(torch.ones(n, n)) == 0, float("-inf"), 0.0),
    "cumsum of ones": lambda x, n: torch.ones(n, n).cumsum(0) >= torch.ones(n, n).cumsum(1),
    "cumsum of eye": lambda x, n: torch.eye(n).cumsum(0).bool(),
    "positions by cumsum": lambda x, n: (p := torch.ones(n, dtype=torch.long).cumsum(0) - 1)[None] <= p[:, None],
    "sliced from a larger one": lambda x, n: torch.tril(torch.ones(n + 9, n + 9)).bool()[:n, :n],
    "sliced, 4-D": lambda x, n: torch.tril(torch.ones(n + 9, n + 9)).view(1, 1, n + 9, n + 9)[:, :, :n, :n] == 1,
    "difference below zero": lambda x, n: (arange(n)[None] - arange(n)[:, None]).clamp(min=0) == 0,
    "float positions": lambda x, n: arange(n, dtype=torch.float32)[None] <= arange(n, dtype=torch.float32)[:, None],
    "int32 positions": lambda x, n: arange(n, dtype=torch.int32)[None] < arange(1, n + 1, dtype=torch.int32)[:, None],
    "strictly less, or equal": lambda x, n: (arange(n)[None] < arange(n)[:, None]) | torch.eye(n, dtype=torch.bool),
    "flipped twice": lambda x, n: _grid(n).triu().flip(0).flip(1),
    "vmap": _vmapped,
    "and of a trivial one": lambda x, n: _grid(n) & _grid(n).tril() & (arange(n) >= 0),
    "tril twice": lambda x, n: _grid(n).tril(3).tril(),
    "gathered rows": lambda x, n: _grid(n).tril()[arange(n)[:, None], arange(n)[None]],
    "index_select": lambda x, n: torch.index_select(_grid(n).tril(), 0, arange(n)),
    "flat and viewed": lambda x, n: (lambda f: f % n <= f // n)(arange(n * n)).view(n, n),
    "the old bias, added twice": lambda x, n: torch.full((n, n), -INF).triu(1) + torch.full((n, n), -INF).triu(2),
}  # fmt: skip

W = 4  # these windows see the query itself and the three keys before it
WINDOW: dict[str, Spelling] = {
    "and of two comparisons": lambda x, n: (arange(n)[None] <= arange(n)[:, None]) & (arange(n)[None] > arange(n)[:, None] - W),
    "difference in a range": lambda x, n: (lambda d: (d >= 0) & (d < W))(arange(n)[:, None] - arange(n)[None]),
    "causal minus lower triangle": lambda x, n: (torch.tril(torch.ones(n, n)) - torch.tril(torch.ones(n, n), -W)).bool(),
    "causal xor lower triangle": lambda x, n: _grid(n).tril() ^ _grid(n).tril(-W),
    "causal and not lower triangle": lambda x, n: _grid(n).tril() & ~_grid(n).tril(-W),
    "triu of tril": lambda x, n: torch.ones(n, n).tril().triu(1 - W).bool(),
    "product of triangles": lambda x, n: (torch.ones(n, n).tril() * torch.ones(n, n).triu(1 - W)) != 0,
    "two added masks": lambda x, n: torch.full((n, n), -INF).triu(1) + torch.full((n, n), -INF).tril(-W),
    "where inside where": lambda x, n: torch.where(_grid(n).triu(1), MIN, torch.where(_grid(n).tril(-W), MIN, 0.0)),
    "masked_fill twice": lambda x, n: torch.zeros(n, n).masked_fill(_grid(n).triu(1), -INF).masked_fill(_grid(n).tril(-W), -INF),
    "minimum of two masks": lambda x, n: torch.minimum(torch.full((n, n), MIN).triu(1), torch.full((n, n), MIN).tril(-W)),
    "not (future or past)": lambda x, n: ~(_grid(n).triu(1) | _grid(n).tril(-W)),
    "band by abs": lambda x, n: (2 * (arange(n)[:, None] - arange(n)[None]) - 3).abs() <= 3,
    "clamped distance": lambda x, n: (lambda d: d.clamp(0, W - 1) == d)(arange(n)[:, None] - arange(n)[None]),
    "(1 - a * b) * min": lambda x, n: (1 - torch.ones(n, n).tril() * torch.ones(n, n).triu(1 - W)) * MIN,
    "sliced from a larger one": lambda x, n: (_grid(n + 7).tril() & _grid(n + 7).triu(1 - W))[7:, 7:],
}  # fmt: skip

TWO_SIDED: dict[str, Spelling] = {
    "abs": lambda x, n: (arange(n)[:, None] - arange(n)[None]).abs() <= 3,
    "abs, strict": lambda x, n: torch.abs(arange(n)[None] - arange(n)[:, None]) < 4,
    "not far": lambda x, n: ~((arange(n)[:, None] - arange(n)[None]).abs() > 3),
    "two comparisons": lambda x, n: (lambda d: (d <= 3) & (d >= -3))(arange(n)[:, None] - arange(n)[None]),
    "chained and": lambda x, n: (arange(n)[None] + 3 >= arange(n)[:, None]) & (arange(n)[:, None] + 3 >= arange(n)[None]),
    "triangles": lambda x, n: torch.ones(n, n).tril(3).triu(-3).bool(),
    "triangles, xor": lambda x, n: _grid(n).tril(3) ^ _grid(n).tril(-4),
    "difference of triangles": lambda x, n: (torch.ones(n, n).tril(3) - torch.ones(n, n).tril(-4)) > 0.5,
    "two added masks": lambda x, n: torch.full((n, n), -INF).triu(4) + torch.full((n, n), -INF).tril(-4),
    "where": lambda x, n: torch.where((arange(n)[:, None] - arange(n)).abs() > 3, MIN, 0.0),
    "maximum of differences": lambda x, n: torch.maximum(arange(n)[:, None] - arange(n), arange(n) - arange(n)[:, None]) <= 3,
    "squared distance by product": lambda x, n: ~(_grid(n).triu(4) | _grid(n).triu(4).t()),
    "clamp": lambda x, n: (lambda d: d == d.clamp(-3, 3))(arange(n)[None] - arange(n)[:, None]),
}  # fmt: skip

PREFIX: dict[str, Spelling] = {
    "or": lambda x, n: (arange(n)[None] <= arange(n)[:, None]) | (arange(n)[None] < 3),
    "or, swapped": lambda x, n: (arange(n) < 3)[None, :] | _grid(n).tril(),
    "not (future and beyond)": lambda x, n: ~((arange(n)[None] > arange(n)[:, None]) & (arange(n)[None] >= 3)),
    "columns set": lambda x, n: _set(_grid(n).tril(), lambda m: m[:, :3].fill_(True)),
    "columns set, float": lambda x, n: _set(torch.full((n, n), -INF).triu(1), lambda m: m[:, :3].zero_()),
    "columns assigned": lambda x, n: _assigned(torch.full((n, n), MIN).triu(1)),
    "where": lambda x, n: torch.where(arange(n) < 3, True, _grid(n).tril()),
    "masked_fill": lambda x, n: torch.full((n, n), -INF).triu(1).masked_fill(arange(n) < 3, 0.0),
    "cat of columns": lambda x, n: torch.cat([torch.ones(n, 3), torch.ones(n, n).tril()[:, 3:]], dim=1).bool(),
    "maximum": lambda x, n: torch.maximum(_grid(n).tril().int(), (arange(n) < 3).int()) == 1,
    "sum of both": lambda x, n: (_grid(n).tril().float() + (arange(n) < 3).float()) > 0,
    "product of the negations": lambda x, n: 1 - (1 - torch.ones(n, n).tril()) * (arange(n) >= 3).float() == 1,
    "padded triangle": lambda x, n: torch.nn.functional.pad(torch.ones(n, n).tril()[:, 3:], (3, 0), value=1.0) != 0,
}  # fmt: skip


def _set(mask: Tensor, f: Callable[[Tensor], object]) -> Tensor:
    f(mask)
    return mask


def _assigned(mask: Tensor) -> Tensor:
    mask[:, 0:3] = 0
    return mask


C = 4
CHUNK: dict[str, Spelling] = {
    "floor division": lambda x, n: arange(n)[:, None] // C == arange(n)[None] // C,
    "div floor": lambda x, n: torch.div(arange(n), C, rounding_mode="floor")[:, None].eq(torch.div(arange(n), C, rounding_mode="floor")),
    "div trunc": lambda x, n: (lambda c: c[:, None] == c)(torch.div(arange(n), C, rounding_mode="trunc")),
    "floor of a quotient": lambda x, n: (lambda c: c[:, None] == c)((arange(n) / C).floor()),
    "truncated quotient": lambda x, n: (lambda c: c[:, None] == c)((arange(n) / C).long()),
    "remainder taken off": lambda x, n: (lambda c: c[:, None] == c)(arange(n) - arange(n) % C),
    "difference is zero": lambda x, n: (arange(n)[:, None] // C - arange(n)[None] // C) == 0,
    "not unequal": lambda x, n: ~(arange(n)[:, None] // C != arange(n)[None] // C),
    "two comparisons": lambda x, n: (lambda c: (c[:, None] <= c) & (c[:, None] >= c))(arange(n) // C),
    "shifted right": lambda x, n: (lambda c: c[:, None] == c)(arange(n) >> 2),
    "abs of the difference": lambda x, n: (arange(n)[:, None] // C - arange(n)[None] // C).abs() < 1,
    "float chunks": lambda x, n: (lambda c: c[:, None] == c)(torch.floor_divide(arange(n, dtype=torch.float32), C)),
    "added floats": lambda x, n: torch.where(arange(n)[:, None] // C == arange(n) // C, 0.0, -INF),
    "division twice": lambda x, n: (lambda c: c[:, None] == c)(arange(n) // 2 // 2),
    "doubled": lambda x, n: (lambda c: c[:, None] == c)((2 * arange(n)) // (2 * C)),
}  # fmt: skip
CHUNK_STATIC: dict[str, Spelling] = {  # of tables that need a known number of chunks
    "kron of eye": lambda x, n: torch.kron(torch.eye(3), torch.ones(C, C)).bool(),
    "repeat_interleave": lambda x, n: (lambda c: c[:, None] == c)(arange(3).repeat_interleave(C)),
    "block table": lambda x, n: torch.eye(3, dtype=torch.bool)[arange(n)[:, None] // C, arange(n)[None] // C],
    "expanded eye": lambda x, n: torch.eye(3, dtype=torch.bool)[:, None, :, None].expand(3, C, 3, C).reshape(12, 12),
    "repeated twice": lambda x, n: torch.eye(3).repeat_interleave(C, 0).repeat_interleave(C, 1) > 0,
}  # fmt: skip

DOCUMENT: dict[str, Spelling] = {
    "equal ids": lambda x, n: x.long()[:, None, :, None] == x.long()[:, None, None, :],
    "equal ids, swapped": lambda x, n: (ids := x.long()).unsqueeze(1).unsqueeze(2) == ids.unsqueeze(1).unsqueeze(3),
    "difference is zero": lambda x, n: (x.int()[:, None, :, None] - x.int()[:, None, None, :]).eq(0),
    "not unequal": lambda x, n: ~x.long()[:, None, :, None].ne(x.long()[:, None, None, :]),
    "logical not": lambda x, n: torch.logical_not(x.long()[:, None, :, None] != x.long()[:, None, None, :]),
    "ids by cumsum": lambda x, n: (lambda d: d[:, None, :, None] == d[:, None, None])((x.long() == 0).cumsum(-1)),
    "ids by cumsum of diff": lambda x, n: _packed(x.long()),
    "gathered": lambda x, n: _gathered(x.long(), n),
    "where": lambda x, n: torch.where(x.long()[:, None, :, None] == x.long()[:, None, None], 0.0, -INF),
    "(1 - same) * min": lambda x, n: (1 - (x.long()[:, None, :, None] == x.long()[:, None, None]).float()) * MIN,
    "masked_fill": lambda x, n: torch.zeros(1, 1, n, n).masked_fill(x.long()[:, None, :, None] != x.long()[:, None, None], -INF),
    "with a shift of both": lambda x, n: (x.int() + 1)[:, None, :, None] == (x.int() + 1)[:, None, None],
    "both ways": lambda x, n: (lambda a, b: (a <= b) & (a >= b))(x.int()[:, None, :, None], x.int()[:, None, None]),
    "chunks of left-padded rows": lambda x, n: _padded_chunks(x.long(), n),
}  # fmt: skip


def _packed(positions: Tensor) -> Tensor:
    first = positions[:, :1] - 1
    ids = (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)
    return ids[:, None, :, None] == ids[:, None, None, :]


def _gathered(ids: Tensor, n: int) -> Tensor:
    rows = arange(ids.shape[0])[:, None, None, None]
    return ids[rows, arange(n)[None, None, :, None]] == ids[rows, arange(n)[None, None, None, :]]


def _padded_chunks(x: Tensor, n: int) -> Tensor:
    left = (x.cumsum(-1) == 0).sum(-1)
    b = arange(x.shape[0])[:, None, None, None]
    i, j = arange(n)[:, None], arange(n)
    return (j - left[b]) // C == (i - left[b]) // C


PADDING: dict[str, Spelling] = {
    "bool, 4-D": lambda x, n: x.bool()[:, None, None, :],
    "compared with zero": lambda x, n: (x != 0)[:, None, None, :],
    "above zero": lambda x, n: (x > 0).unsqueeze(1).unsqueeze(2),
    "equal to one": lambda x, n: x.long().eq(1).view(-1, 1, 1, n),
    "(1 - m) * min": lambda x, n: (1.0 - x.bool()[:, None, None, :].to(x.dtype)) * MIN,
    "expanded": lambda x, n: x.bool()[:, None, None, :].expand(-1, 1, n, n),
    "masked_fill of zeros": lambda x, n: torch.zeros(x.shape).masked_fill(x == 0, -INF)[:, None, None, :],
    "where": lambda x, n: torch.where(x[:, None, None, :] > 0, 0.0, -INF),
    "not of a padding flag": lambda x, n: ~(x == 0)[:, None, None, :],
    "with a true row": lambda x, n: x.bool()[:, None, None, :] & torch.ones(n, 1, dtype=torch.bool),
    "gathered by batch and key": lambda x, n: x.bool()[arange(x.shape[0])[:, None, None, None], arange(n)],
    "keys below a length": lambda x, n: arange(n) < x[:, 0].long()[:, None, None, None],
    "keys below a length, float": lambda x, n: torch.where(arange(n) >= x[:, :1].int()[:, :, None, None], -INF, 0.0),
    "bool times -1e9": lambda x, n: (~x.bool())[:, None, None, :].float() * -1e9,
    "bools subtracted from one": lambda x, n: (1 - x.bool().float())[:, None, None, :] * torch.finfo(torch.float32).min,
}  # fmt: skip

NOTHING: dict[str, Spelling] = {
    "ones": lambda x, n: _grid(n),
    "zeros added": lambda x, n: torch.zeros(n, n),
    "(1 - ones) * min": lambda x, n: (1.0 - torch.ones(n, n)) * MIN,
    "q >= 0": lambda x, n: (arange(n) >= 0)[:, None].expand(n, n),
    "within the length": lambda x, n: arange(n)[None] < n,
    "eye or not eye": lambda x, n: torch.eye(n, dtype=torch.bool) | ~torch.eye(n, dtype=torch.bool),
    "packed test of arange": lambda x, n: _packed(arange(n)[None].expand(x.shape[0], -1)),
    "where of trues": lambda x, n: torch.where(_grid(n), 0.0, -INF),
    "masked_fill of nothing": lambda x, n: torch.zeros(n, n).masked_fill(torch.zeros(n, n, dtype=torch.bool), -INF),
    "lower or upper": lambda x, n: _grid(n).tril() | _grid(n).triu(),
    "arange equals itself": lambda x, n: (arange(n) == arange(n))[None],
    "one document": lambda x, n: (d := torch.zeros(n, dtype=torch.long))[:, None] == d,
    "full(-inf).triu(n)": lambda x, n: torch.full((n, n), -INF).triu(n),
    "distance below the length": lambda x, n: (arange(n)[:, None] - arange(n)).abs() < n,
}  # fmt: skip

EVERYTHING: dict[str, Spelling] = {
    "zeros": lambda x, n: torch.zeros(n, n, dtype=torch.bool),
    "not ones": lambda x, n: ~_grid(n),
    "full(-inf)": lambda x, n: torch.full((n, n), -INF),
    "full(min)": lambda x, n: torch.full((n, n), MIN),
    "ones * -1e9": lambda x, n: torch.ones(n, n) * -1e9,
    "(1 - zeros) * min": lambda x, n: (1 - torch.zeros(n, n)) * MIN,
    "beyond the length": lambda x, n: arange(n)[None] >= n,
    "lower and upper": lambda x, n: _grid(n).tril(-1) & _grid(n).triu(),
    "causal and its negation": lambda x, n: _grid(n).tril() & ~_grid(n).tril(),
    "negative positions": lambda x, n: (arange(n) < 0)[:, None],
    "tril of nothing": lambda x, n: _grid(n).tril(-n),
    "where of falses": lambda x, n: torch.where(torch.zeros(n, n, dtype=torch.bool), 0.0, -INF),
}  # fmt: skip


def _slopes() -> Tensor:
    return torch.tensor([0.5, 0.25])[None, :, None, None]


ALIBI: dict[str, Spelling] = {
    "slope * (j - i)": lambda x, n: _slopes() * (arange(n)[None] - arange(n)[:, None]),
    "(j - i) * slope": lambda x, n: (arange(n)[None] - arange(n)[:, None]) * _slopes(),
    "slope * -(i - j)": lambda x, n: _slopes() * -(arange(n)[:, None] - arange(n)[None]),
    "-slope * (i - j)": lambda x, n: -_slopes() * (arange(n)[:, None] - arange(n)[None]),
    "keys only (bloom)": lambda x, n: _slopes() * arange(n),
    "from the last key (mpt)": lambda x, n: arange(1 - n, 1) * _slopes(),
    "positions by cumsum (falcon)": lambda x, n: _slopes() * (torch.ones(n, dtype=torch.long).cumsum(0) - 1),
    "float distances": lambda x, n: _slopes() * (arange(n).float()[None] - arange(n).float()[:, None]),
    "slopes by pow": lambda x, n: torch.pow(torch.tensor(0.5), arange(1, 3)).view(1, 2, 1, 1) * arange(n),
    "slopes by exp2": lambda x, n: torch.exp2(-(arange(2) + 1.0))[:, None, None] * (arange(n) - arange(n)[:, None]),
    "clamped to the past": lambda x, n: _slopes() * (arange(n)[None] - arange(n)[:, None]) + 0.0,
    "-|i - j|": lambda x, n: -(arange(n)[None] - arange(n)[:, None]).abs() * _slopes(),
    "|i - j| * -slope": lambda x, n: (arange(n)[None] - arange(n)[:, None]).abs() * -_slopes(),
    "slopes made contiguous": lambda x, n: _slopes().expand(1, 2, 1, n).contiguous() * arange(n),
}  # fmt: skip


def _bucket(d: Tensor) -> Tensor:
    far = 2 + (torch.log(d.abs().float() / 2 + 1e-6) / 3 * 2).to(torch.long)
    return (d > 0).long() * 4 + torch.where(d.abs() < 2, d.abs(), far.clamp(max=3))


RELATIVE: dict[str, Spelling] = {
    "table by clamped distance": lambda x, n: x[0][(arange(n)[None] - arange(n)[:, None]).clamp(-3, 3) + 3],
    "table by distance": lambda x, n: torch.nn.functional.pad(x[0], (0, n))[arange(n)[None] - arange(n)[:, None] + n - 1],
    "embedding of buckets (T5)": lambda x, n: torch.nn.functional.embedding(_bucket(arange(n)[None] - arange(n)[:, None]), x.t()[:, :2].reshape(-1, 2)).permute(2, 0, 1)[None],
    "negative indices": lambda x, n: x[0][(arange(n)[None] - arange(n)[:, None]).clamp(-2, 2)],
    "index_select": lambda x, n: torch.index_select(x[0], 0, ((arange(n)[None] - arange(n)[:, None]).clamp(-3, 3) + 3).view(-1)).view(n, n),
    "take along": lambda x, n: torch.take_along_dim(x[:1].expand(n, -1), (arange(n)[None] - arange(n)[:, None]).clamp(0, 3), 1),
    "gather": lambda x, n: torch.gather(x[:1].expand(n, -1), 1, (arange(n)[None] - arange(n)[:, None]).clamp(0, 3)),
    "by equality of neighbours": lambda x, n: torch.where(arange(n)[None] == arange(n)[:, None], 0.5, 0.0),
    "decay by exp": lambda x, n: torch.exp((arange(n)[None] - arange(n)[:, None]).float()),
    "squared distance": lambda x, n: (lambda d: d * d * 0.25)((arange(n)[None] - arange(n)[:, None]).float()),
    "log distance": lambda x, n: torch.log((arange(n)[None] - arange(n)[:, None]).abs().float() + 1),
    "per head": lambda x, n: torch.stack([x[0], x[1]])[:, (arange(n)[None] - arange(n)[:, None]).clamp(-3, 3) + 3],
    "parity of the distance": lambda x, n: ((arange(n)[None] - arange(n)[:, None]) % 2).float(),
}  # fmt: skip
