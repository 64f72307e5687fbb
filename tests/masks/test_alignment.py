"""More keys than queries, or fewer: offsets, known and unknown, and which rows can be without a key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, arange

from attnpass.spec import MaskSpec
from tests.masks.harness import oblong
from tests.masks.spellings import INF, Spelling

TOP: dict[str, Spelling] = {
    "arange": lambda x, y, q, k: arange(q)[:, None] >= arange(k),
    "tril": lambda x, y, q, k: torch.ones(q, k).tril().bool(),
    "triu": lambda x, y, q, k: torch.full((q, k), -INF).triu(1),
}
BOTTOM: dict[str, Spelling] = {
    "arange": lambda x, y, q, k: arange(q)[:, None] + (k - q) >= arange(k),
    "positions": lambda x, y, q, k: arange(k - q, k)[:, None] >= arange(k),
    "tril with a diagonal": lambda x, y, q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q),
    "the last rows": lambda x, y, q, k: torch.ones(k, k, dtype=torch.bool).tril()[k - q : k, :k],
    "from the end": lambda x, y, q, k: (k - 1 - arange(k)) >= (q - 1 - arange(q))[:, None],
    "flipped": lambda x, y, q, k: torch.ones(q, k).triu().flip(0).flip(1).bool(),
    "full": lambda x, y, q, k: torch.full((q, k), -INF).triu(k - q + 1),
}


@pytest.mark.parametrize("name", TOP)
def test_top_left(name: str) -> None:
    for queries, keys in ((5, 12), (12, 5)):
        proof = oblong(TOP[name], queries, keys)
        assert proof.spec == MaskSpec(causal=0), proof.steps
        assert proof.empty_rows == "impossible"
        assert proof.check.startswith("agreed")
    dynamic = oblong(TOP[name], dynamic=True)
    assert dynamic.spec == MaskSpec(causal=0)
    assert dynamic.empty_rows == "impossible"


@pytest.mark.parametrize("name", BOTTOM)
def test_bottom_right(name: str) -> None:
    proof = oblong(BOTTOM[name], 5, 12)
    assert proof.spec == MaskSpec(causal=7), proof.steps
    assert proof.empty_rows == "impossible"
    assert proof.check.startswith("agreed")


@pytest.mark.parametrize("name", [n for n in BOTTOM if n != "the last rows"])
def test_bottom_right_of_unknown_lengths(name: str) -> None:
    """With fewer keys than queries the first rows are empty, so of unknown lengths nothing is said."""
    proof = oblong(BOTTOM[name], dynamic=True)
    offset = proof.structure.upper
    assert offset == proof.frame.keys - proof.frame.queries
    assert proof.spec.causal == repr(offset)
    assert proof.empty_rows == "unknown"
    assert proof.check.startswith("agreed")


def test_rows_before_the_first_key_are_empty() -> None:
    proof = oblong(BOTTOM["arange"], 12, 5)
    assert proof.spec == MaskSpec(causal=-7)
    assert proof.empty_rows == "possible"


def test_a_window_that_leaves_the_keys_behind_empties_rows() -> None:
    def make(x: Tensor, y: Tensor, q: int, k: int) -> Tensor:
        return (arange(q)[:, None] >= arange(k)) & (arange(q)[:, None] - arange(k) < 3)

    assert oblong(make, 5, 12).empty_rows == "impossible"
    assert oblong(make, 12, 5).empty_rows == "possible"
    assert oblong(make, 7, 5).empty_rows == "impossible"
    assert oblong(make, 12, 5).spec == MaskSpec(causal=0, window=(2, None))


def test_a_past_of_known_length() -> None:
    def make(x: Tensor, y: Tensor, q: int, k: int) -> Tensor:
        return arange(q)[:, None] + 100 >= arange(k)

    assert oblong(make, dynamic=True).spec == MaskSpec(causal=100)
    assert oblong(make).spec == MaskSpec()  # twelve keys, all of them in the past


def test_one_query_sees_everything() -> None:
    proof = oblong(BOTTOM["arange"], 1, 12)
    assert proof.spec == MaskSpec()


def test_a_window_aligned_with_the_last_keys() -> None:
    def make(x: Tensor, y: Tensor, q: int, k: int) -> Tensor:
        d = arange(q)[:, None] + (k - q) - arange(k)
        return (d >= 0) & (d < 4)

    assert oblong(make, 5, 12).spec == MaskSpec(causal=7, window=(-4, None))
    proof = oblong(make, dynamic=True)
    assert proof.spec.causal == repr(proof.frame.keys - proof.frame.queries)
    assert proof.structure.lower == proof.frame.queries - proof.frame.keys + 3


def test_padding_on_the_left_may_empty_a_row_and_a_first_key_that_stays_may_not() -> None:
    def padded(x: Tensor, y: Tensor, q: int, k: int) -> Tensor:
        return (arange(q)[:, None] >= arange(k)) & (y > 0)[:, None, None, :]

    def kept(x: Tensor, y: Tensor, q: int, k: int) -> Tensor:
        return (arange(q)[:, None] >= arange(k)) & ((y > 0)[:, None, None, :] | (arange(k) == 0))

    assert oblong(padded, 12, 12).empty_rows == "possible"
    assert oblong(kept, 12, 12).empty_rows == "impossible"
