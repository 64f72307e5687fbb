"""Limits: each query sees the keys up to, or from, a position that is data (behind a cache of unknown length)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, arange
from torch.export import Dim

from attnpass.masks import MaskProof
from attnpass.spec import MaskSpec
from tests.masks.harness import BATCH, HEADS, analyse, traced

QUERIES, KEYS = 5, 12
Make = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # of length [], positions [q], starts [batch, q], queries


def proof(make: Make, *, dynamic: bool = False, batch: int = BATCH) -> MaskProof:
    x = torch.zeros(QUERIES)
    given = (x, torch.tensor(3), arange(QUERIES), torch.ones(batch, QUERIES, dtype=torch.int32))
    size = {0: Dim("Q", min=4, max=64)}
    shapes: Any = (size, {}, size, {1: size[0]}) if dynamic else None
    one = traced(lambda x, n, at, first: make(n, at, first, x.shape[0]), *given, dynamic=shapes)
    found = analyse(one, batch=batch)
    assert found.check.startswith("agreed"), found.steps
    return found


def column(x: Tensor) -> Tensor:
    return x[..., :, None]


LIMITS: dict[str, Make] = {
    "behind a length": lambda n, at, first, q: arange(KEYS) <= column(arange(q) + n),
    "behind the number of keys": lambda n, at, first, q: arange(KEYS) < column(arange(q)) + n,
    "up to given positions": lambda n, at, first, q: arange(KEYS) <= column(at),
    "up to positions of each row": lambda n, at, first, q: arange(KEYS) <= column(first)[:, None],
    "from given positions": lambda n, at, first, q: arange(KEYS) >= column(at),
    "a window behind a length": lambda n, at, first, q: (
        (arange(KEYS) <= column(arange(q) + n)) & (arange(KEYS) > column(arange(q) + n - 4))
    ),
    "the length is written afterwards": lambda n, at, first, q: _written_afterwards(n, q),
    "the length is written before": lambda n, at, first, q: arange(KEYS) <= column(arange(q) + n.add_(2)),
}


def _written_afterwards(length: Tensor, queries: int) -> Tensor:
    """As StaticCache does: the mask is of the length before this step, the cache counts on."""
    keep = arange(KEYS) <= column(arange(queries) + length)
    length.add_(queries)
    return keep


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_a_closed_form(name: str, dynamic: bool) -> None:
    found = proof(LIMITS[name], dynamic=dynamic)
    assert found.spec == MaskSpec(limited=True), found.steps
    assert found.empty_rows == "possible"  # data may say anything


def test_a_length_that_is_written_later_is_not_read_itself() -> None:
    """The mask may be written out after all else: by then the length is another one."""
    ((node, _),) = proof(LIMITS["the length is written afterwards"]).loads
    assert node.op == "call_function", node


NO_LIMITS: dict[str, Make] = {
    "its own for each key": lambda n, at, first, q: arange(KEYS) <= column(arange(q)) + n * (arange(KEYS) % 3),
    "its own for each pair": lambda n, at, first, q: arange(KEYS) <= torch.outer(at, arange(KEYS)),
    "its own for each head": lambda n, at, first, q: arange(KEYS) <= (column(at) + arange(HEADS)[:, None, None]),
    "twice the key": lambda n, at, first, q: 2 * arange(KEYS) <= column(at),
    "times the key": lambda n, at, first, q: n * arange(KEYS) <= column(at),
    "one of two": lambda n, at, first, q: (arange(KEYS) <= column(at)) | (arange(KEYS) == n),
    "not one key": lambda n, at, first, q: arange(KEYS) != column(at),
    "no data": lambda n, at, first, q: arange(KEYS) <= 2 * column(arange(q)),
}


@pytest.mark.parametrize("name", NO_LIMITS)
def test_what_is_no_limit_stays_dense(name: str) -> None:
    found = proof(NO_LIMITS[name])
    assert found.spec == MaskSpec(dense=True), found.steps


def test_the_same_for_all_queries_is_key_padding() -> None:
    found = proof(lambda n, at, first, q: (arange(KEYS) < n).expand(q, KEYS))
    assert found.spec == MaskSpec(key_padding=True)


def test_a_known_diagonal_beside_a_limit() -> None:
    found = proof(lambda n, at, first, q: (arange(KEYS) <= column(arange(q) + n)) & (arange(KEYS) <= column(arange(q))))
    assert found.spec == MaskSpec(causal=0, limited=True)


def test_bytes_are_never_negative_so_the_first_key_is_seen() -> None:
    found = proof(lambda n, at, first, q: arange(KEYS) <= column(arange(q) + n.to(torch.uint8)))
    assert found.spec == MaskSpec(limited=True)
    assert found.empty_rows == "impossible", found.steps
