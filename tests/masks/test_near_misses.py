"""Masks that look like a closed form and are not: nothing is claimed that is not so."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, arange
from torch.export import Dim

from attnpass.spec import MaskSpec
from tests.masks.harness import Table, analyse, oblong, square, traced
from tests.masks.spellings import INF, MIN, Spelling

BOTH = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def causal(n: int) -> Tensor:
    return arange(n)[:, None] >= arange(n)


NOT_CAUSAL: dict[str, tuple[Spelling, MaskSpec]] = {
    "strictly below the diagonal": (lambda x, n: torch.ones(n, n).tril(-1).bool(), MaskSpec(causal=-1)),
    "> instead of >=": (lambda x, n: arange(n)[:, None] > arange(n), MaskSpec(causal=-1)),
    "one above the diagonal": (lambda x, n: torch.full((n, n), -INF).triu(2), MaskSpec(causal=1)),
    "triu(0)": (lambda x, n: torch.full((n, n), -INF).triu(0), MaskSpec(causal=-1)),
    "anti-causal": (lambda x, n: torch.ones(n, n).triu().bool(), MaskSpec(window=(0, None))),
    "the diagonal alone": (lambda x, n: torch.eye(n).bool(), MaskSpec(causal=0, window=(0, None))),
    "transposed by mistake": (lambda x, n: torch.ones(n, n).tril().t().bool(), MaskSpec(window=(0, None))),
}
DENSE: dict[str, Spelling] = {
    "causal for the first batch row only": lambda x, n: causal(n) | (arange(3) > 0)[:, None, None, None],
    "causal for the second head only": lambda x, n: causal(n) | (arange(2) != 1)[:, None, None],
    "every second key": lambda x, n: (arange(n)[:, None] * arange(n)) % 2 == 0,
    "twice the slope": lambda x, n: 2 * arange(n)[:, None] >= arange(n),
    "anti-diagonal": lambda x, n: arange(n)[:, None] + arange(n) < n,
    "causal or a data flag": lambda x, n: causal(n) | (x[:, None, None, :] > 0),
    "positions from data": lambda x, n: x.long()[:, None, None, :] <= x.long()[:, None, :, None],
    "queries switched off by data": lambda x, n: (x > 0)[:, None, :, None].expand(-1, 1, n, n),
    "prefix of each row's own length": lambda x, n: causal(n) | (arange(n) < x[:, :1].long()[:, :, None, None]),
    "chunks causal among themselves": lambda x, n: arange(n)[:, None] // 4 >= arange(n) // 4,
    "ids of the next query": lambda x, n: x.long().roll(1, 1)[:, None, :, None] < x.long()[:, None, None, :],
    "random": lambda x, n: torch.rand(n, n) > 0.5,
    "a mask that is data": lambda x, n: x[:, None, :, None] * x[:, None, None] > 0,
    "upside down": lambda x, n: causal(n).flip(0),
}  # fmt: skip


@cache
def table(which: str, dynamic: bool) -> Table:
    makes = DENSE if which == "dense" else {name: make for name, (make, _) in NOT_CAUSAL.items()}
    return Table(makes, dynamic=dynamic)


@BOTH
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_another_diagonal_is_not_the_causal_one(name: str, dynamic: bool) -> None:
    spec = NOT_CAUSAL[name][1]
    proof = table("not causal", dynamic).proof(name)
    assert proof.check.startswith("agreed")
    assert proof.spec == spec


@BOTH
@pytest.mark.parametrize("name", DENSE)
def test_what_is_no_closed_form_stays_dense(name: str, dynamic: bool) -> None:
    proof = table("dense", dynamic).proof(name)
    assert not proof.check.startswith("disagreed"), proof.steps
    assert proof.spec.dense, proof.steps
    assert proof.spec.causal is None
    assert proof.spec.window is None
    assert proof.spec.prefix is None


def test_a_window_longer_than_the_traced_length_is_still_a_window() -> None:
    def make(x: Tensor, n: int) -> Tensor:
        return causal(n) & (arange(n) > arange(n)[:, None] - 4096)

    assert square(make, 128, dynamic=True).spec == MaskSpec(causal=0, window=(4095, None))
    assert square(make, 128).spec == MaskSpec(causal=0)  # at this length, known, it is none
    assert square(make, 4097).spec == MaskSpec(causal=0, window=(4095, None))
    assert square(make, 4096).spec == MaskSpec(causal=0)


def test_a_chunk_as_long_as_the_traced_length_is_still_a_chunk() -> None:
    def make(x: Tensor, n: int) -> Tensor:
        return causal(n) & (arange(n)[:, None] // 16 == arange(n) // 16)

    assert square(make, 16, dynamic=True).spec == MaskSpec(causal=0, chunk=16)
    assert square(make, 16).spec == MaskSpec(causal=0)
    assert square(make, 17).spec == MaskSpec(causal=0, chunk=16)


def test_a_prefix_longer_than_the_traced_length_is_still_a_prefix() -> None:
    def make(x: Tensor, n: int) -> Tensor:
        return causal(n) | (arange(n) < 100)

    assert square(make, 12, dynamic=True).spec == MaskSpec(causal=0, prefix=100)
    assert square(make, 12).spec == MaskSpec()


def test_a_buffer_is_data_although_it_holds_a_causal_mask() -> None:
    held = torch.ones(64, 64, dtype=torch.bool).tril()
    x = torch.zeros(3, 12)
    t = traced(lambda x, held: held[: x.shape[1], : x.shape[1]], x, held=held)
    proof = analyse(t)
    assert proof.spec == MaskSpec(dense=True)
    assert [load.source for _, load in proof.loads] == ["b_held"]
    assert repr(proof.loads[0][1]) == "b_held[i, j]"


@pytest.mark.parametrize("fill", [-1e4, -100.0, -65504.0, -1e7])
def test_a_weak_fill_in_float32_is_a_bias_and_no_mask(fill: float) -> None:
    proof = square(lambda x, n: torch.full((n, n), fill).triu(1))
    assert proof.spec == MaskSpec()
    assert proof.fills == ()
    assert proof.biases[0].values == (fill, 0.0)


def test_the_lowest_number_of_float16_is_a_mask() -> None:
    proof = square(lambda x, n: torch.full((n, n), -65504.0, dtype=torch.float16).triu(1))
    assert proof.spec == MaskSpec(causal=0)
    assert proof.fills == (-65504.0,)


def test_a_fill_that_ordinary_scores_do_not_reach_is_a_mask_and_an_assumption() -> None:
    proof = square(lambda x, n: torch.full((n, n), -1e9).triu(1))
    assert proof.spec == MaskSpec(causal=0)
    assert proof.fills == (-1e9,)
    assert any("-1e+09" in text for text in proof.assumptions)
    assert not square(lambda x, n: torch.full((n, n), MIN).triu(1)).assumptions


def test_two_fills_are_told_apart() -> None:
    proof = square(lambda x, n: torch.full((n, n), MIN).triu(1) + torch.full((n, n), MIN).triu(3))
    assert proof.spec == MaskSpec(causal=0)
    assert proof.fills == (-INF, MIN)  # twice the lowest number is minus infinity


def test_infinity_minus_infinity_is_no_mask() -> None:
    def make(x: Tensor, n: int) -> Tensor:
        return torch.full((n, n), -INF) - (x[0] - INF)

    proof = square(make)
    assert proof.keep.key == "true"
    assert not proof.check.startswith("disagreed")


@BOTH
def test_masks_that_keep_everything_but_an_end_are_no_causal_masks(dynamic: bool) -> None:
    proof = oblong(lambda x, y, q, k: (arange(k) < q)[None].expand(q, k), dynamic=dynamic)
    assert proof.spec == MaskSpec(key_padding=True)  # keys below a number that is the same for all queries


def test_int8_positions_wrap_around() -> None:
    proof = square(lambda x, n: (arange(n).to(torch.int8)[:, None] * 20) >= (arange(n).to(torch.int8) * 20), 12)
    assert not proof.check.startswith("disagreed")
    assert proof.spec.causal is None


def test_half_positions_are_exact_up_to_2048_only() -> None:
    def make(x: Tensor, n: int) -> Tensor:
        return arange(n).half()[:, None] >= arange(n).half()

    assert square(make, 2000).spec == MaskSpec(causal=0)
    assert square(make, 3000).spec.causal is None
    assert square(make, dynamic=True).spec.causal is None


def test_float_positions_of_unknown_length_are_an_assumption() -> None:
    x = torch.zeros(3, 12)

    def make(x: Tensor) -> Tensor:
        return arange(x.shape[1]).float()[:, None] >= arange(x.shape[1]).float()

    unbounded = analyse(traced(make, x, dynamic=({1: Dim("S")},)))
    assert unbounded.spec == MaskSpec(causal=0)
    assert any("float32" in text for text in unbounded.assumptions)
    assert not analyse(traced(make, x, dynamic=({1: Dim("S", max=1 << 20)},))).assumptions


def test_large_multiples_of_positions_are_not_taken_to_be_exact() -> None:
    def make(x: Tensor, n: int) -> Tensor:
        return (arange(n).float() * 1e6 * 1e6)[:, None] >= (arange(n).float() * 1e6 + 0.5) * 1e6

    for dynamic in (False, True):
        proof = square(make, dynamic=dynamic)
        assert not proof.check.startswith("disagreed")
        assert proof.spec.causal is None
