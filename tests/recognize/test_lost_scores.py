"""What is added may be so great that scores are lost beside it: then softmax sees it, though it is one for all keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import attnpass
from attnpass.ledger import Report
from tests.zoo.numbers import complaints, run, truth

Change = Callable[[Tensor], Tensor]
INF = math.inf
MIN = torch.finfo(torch.float32).min
FIRST = torch.arange(8) < 3
UPPER = torch.ones(8, 8).triu(1) == 1


class Attention(nn.Module):
    def __init__(self, change: Callable[..., Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        return self.change(q @ k.mT * 0.3, *more).softmax(-1).to(v.dtype) @ v


def given(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, 2, 2, 8, 16, generator=torch.Generator().manual_seed(0)).to(dtype))


def rewritten(change: Callable[..., Tensor], dtype: torch.dtype, *more: Tensor) -> Report:
    """The report; what was made of the program is held to float64."""
    module, args = Attention(change), (*given(dtype), *more)
    new, report = attnpass.rewrite(export(module, args))
    found = run(new.module(), args, grad=False)
    assert not complaints(found, run(module, args, grad=False), truth(module, args, grad=False))
    return report


GREAT: dict[str, Change] = {
    "a number": lambda s: s + 1e38,
    "a number, subtracted": lambda s: s - 7e4,
    "a number that is scaled down again": lambda s: (s + 1e30) * 1e-29,
    "an alpha": lambda s: torch.add(s, 3.0, alpha=1e30),
    "a number for some keys": lambda s: s + torch.where(FIRST, 1e30, 0.0).to(s.dtype),
    "a number that a lower one takes away": lambda s: (
        s - 1e30 * FIRST.to(s.dtype) + torch.where(FIRST, 1e30, 0.0).to(s.dtype)
    ),
    "plus infinity for some queries": lambda s: s + torch.where(FIRST[:, None], INF, 0.0).to(s.dtype),
    "plus infinity for some keys": lambda s: s + torch.where(FIRST, INF, 0.0).to(s.dtype),
    "minus infinity, subtracted": lambda s: s - torch.where(FIRST, -INF, 0.0).to(s.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", GREAT)
def test_what_is_great_is_refused(form: str, dtype: torch.dtype) -> None:
    (miss,) = rewritten(GREAT[form], dtype).misses
    assert miss.reason.code == "lost_scores"


@pytest.mark.parametrize("change", [lambda s: s + 100.0, lambda s: 5e4 - (7.0 - s)])
def test_an_ordinary_number_is_none(change: Change) -> None:
    (site,) = rewritten(change, torch.float32).sites
    assert site.replaced
    assert not site.spec.bias


def test_a_row_that_is_scaled_down_again() -> None:
    rewritten(lambda s: (s + torch.where(FIRST[:, None], 1e38, 0.0)) * 1e-35, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_data_may_hold_anything(bad: float, dtype: torch.dtype) -> None:
    bias = torch.zeros(8, 8, dtype=dtype)
    bias[1, 2] = bias[4] = bad
    (site,) = rewritten(lambda s, bias: s + bias, dtype, bias).sites
    assert site.replaced


class Ordinary(torch.fx.Interpreter):
    """As a kernel computes it that answers every query with numbers, which is up to the kernel and the processor."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        return out.nan_to_num() if "scaled_dot_product" in str(target) else out


@pytest.mark.parametrize("bad", [INF, -INF])
def test_infinite_rows_of_data_are_no_numbers_whatever_a_kernel_makes_of_them(bad: float) -> None:
    bias = torch.zeros(8, 8)
    bias[4] = bad
    module, args = Attention(lambda s, bias: s + bias), (*given(torch.float32), bias)
    program, report = attnpass.rewrite(export(module, args))
    assert report.replaced == 1
    mine, plain = Ordinary(program.module()).run(*args), module(*args)
    assert torch.equal(mine.isnan(), plain.isnan())
    assert mine[:, :, 4].isnan().all()


@pytest.mark.parametrize("scale", [INF, -INF, math.nan])
def test_a_scale_that_is_no_number_is_refused(scale: float) -> None:
    assert not rewritten(lambda s: s * scale, torch.bfloat16).replaced


def test_scales_that_are_too_great_together_are_refused() -> None:
    assert not rewritten(lambda s: s * 1e200 * 1e200, torch.float64).replaced


def from_maximum(s: Tensor) -> Tensor:
    return s - s.amax(-1, keepdim=True)


OF_A_KEY = torch.arange(8) != 1
WEIGHED: dict[str, Change] = {
    "a number": lambda s: (s + 0.5) * OF_A_KEY.to(s.dtype),
    "a number, by a learned weight": lambda s: (s - 2.0) * torch.linspace(0.5, 1.5, 8),
    "the maximum": lambda s: from_maximum(s) * OF_A_KEY.to(s.dtype),
    "the maximum, divided": lambda s: from_maximum(s) / torch.linspace(0.5, 1.5, 8),
}


@pytest.mark.parametrize("form", WEIGHED)
def test_what_is_one_for_a_row_is_not_once_keys_are_weighed(form: str) -> None:
    rewritten(WEIGHED[form], torch.float32)


@pytest.mark.parametrize("change", [lambda s: s + 0.5, from_maximum])
def test_what_is_one_for_a_row_stays_that_where_rows_are_weighed(change: Change) -> None:
    assert rewritten(lambda s: change(s) * torch.linspace(0.5, 1.5, 8)[:, None], torch.float32).replaced == 1


class Bare(Attention):
    """Softmax without its maximum: what is added may carry every exponential beyond the range of numbers."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        weights = self.change(q @ k.mT * 0.3).exp()
        return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        (lambda s: s - 30000.0, False),
        (lambda s: s - 1e4 * torch.ones(8, 8), False),
        (lambda s: s - 1e4 * UPPER, False),
        (lambda s: from_maximum(s - 1e4 * UPPER), True),
        (lambda s: s - 1.0 * UPPER, True),
        (lambda s: (s - 3.0) * 100.0, False),
        (lambda s: from_maximum(s) - 200.0, False),
        (lambda s: s - 3.0, True),
        (lambda s: (s - 200.0) * 0.1, True),
        # found by random programs: a mask that leaves every query a key says nothing about what else is added
        (lambda s: s + torch.where(UPPER, MIN, 0.0) - 1e4 * torch.ones(8, 8), False),
        (lambda s: s + torch.where(FIRST[:, None], -1e6, 0.0), False),
        (lambda s: s + 200.0 * UPPER, False),
        (lambda s: s + 20.0 * UPPER + 20.0 * torch.ones(8, 8), False),
        (lambda s: s + torch.where(UPPER, MIN, 0.0), True),
        (lambda s: from_maximum(s - 200.0), True),
    ],
)
def test_a_number_added_to_bare_exponentials(change: Change, fine: bool) -> None:
    module, args = Bare(change), given(torch.float32)
    new, report = attnpass.rewrite(export(module, args))
    torch.testing.assert_close(new.module()(*args), module(*args), equal_nan=True)
    assert report.replaced == fine


AFTER_A_FLOOR: dict[str, Change] = {
    "filled with minus infinity": lambda s: s.clamp_min(MIN).masked_fill(UPPER, -INF),
    "lowered": lambda s: s.clamp_min(MIN) + torch.where(FIRST[:, None], MIN, 0.0),
    "scaled": lambda s: s.clamp_min(MIN) * 2.0,
}


@pytest.mark.parametrize("form", AFTER_A_FLOOR)
def test_a_floor_that_is_not_the_last_step_is_refused(form: str) -> None:
    # found by random programs: the rows that the floor has kept from minus infinity come to it after all
    masked = torch.where(FIRST[:, None], -INF, 0.0)
    (miss,) = rewritten(lambda s: AFTER_A_FLOOR[form](s + masked), torch.float32).misses
    assert miss.reason.code == "nonlinear_scores"


def lowered(s: Tensor, *lows: float) -> Tensor:
    """Numbers added in float32, each sum cast to the dtype of the scores again."""
    for low in lows:
        s = (s + torch.where(FIRST[:, None], low, 0.0)).to(s.dtype)
    return s


def masked(s: Tensor, *lows: float) -> Tensor:
    for low in lows:
        s = s + torch.where(FIRST[:, None], low, 0.0).to(s.dtype)
    return s


SCALED_DOWN: dict[str, Change] = {
    "by a number": lambda s: masked(s, MIN, MIN / 2) * 0.5,
    "by a division": lambda s: masked(s, MIN / 2, MIN) / 8,
    "by a tensor": lambda s: masked(s, MIN, MIN / 2) * torch.tensor([0.25, 0.5]).view(2, 1, 1),
    "beside a fill": lambda s: masked(s.masked_fill(FIRST[:, None], MIN), MIN / 2) * 0.5,
    "in two steps": lambda s: masked(masked(s, MIN) * 0.5, MIN) * 0.5,
    "from data": lambda s: (masked(s, MIN) + s.new_zeros(8).masked_fill(s[0, 0, 0] > 9.0, MIN)) * 0.5,
}


@pytest.mark.parametrize("form", SCALED_DOWN)
def test_sums_that_are_infinite_before_they_are_scaled_down_are_refused(form: str) -> None:
    # found by random programs: each number alone, scaled down, is finite, and so is their sum
    (miss,) = rewritten(SCALED_DOWN[form], torch.float32).misses
    assert miss.reason.code == "overflows_between"


@pytest.mark.parametrize(
    "change",
    [
        lambda s: masked(s, -1e30, -1e30) * 0.5,
        lambda s: masked(s, -1e30, -INF) * 0.5,
        lambda s: masked(s, MIN) * 0.5,
        lambda s: masked(masked(s, MIN) * 0.5, MIN),
    ],
)
def test_sums_that_stay_finite_are_not(change: Change) -> None:
    assert rewritten(change, torch.float32).replaced == 1


WIDENED: dict[str, Change] = {
    "added in float32": lambda s: masked(s, HALF_MIN).float() + torch.where(UPPER, MIN, 0.0),
    "filled in float32": lambda s: masked(s, HALF_MIN).float().masked_fill(UPPER, MIN),
    "scaled in between": lambda s: (masked(s, HALF_MIN) * 0.5).float().masked_fill(UPPER, MIN),
    "from data": lambda s: (s + s[0, 0, 0].exp()).float().masked_fill(UPPER, MIN),
    "scaled down": lambda s: masked(s, HALF_MIN) * 0.5,
    "scaled down, negated": lambda s: -(masked(s, HALF_MIN) / -2.0),
    "scaled by a tensor": lambda s: masked(s, HALF_MIN) * torch.tensor([0.5, 1.0]).half().view(2, 1, 1),
    "scaled down from data": lambda s: (s + s[0, 0, 0].exp()) * 0.5,
}


@pytest.mark.parametrize("form", WIDENED)
def test_scores_that_are_lost_in_float16_alone_are_refused(form: str) -> None:
    # found by random programs
    (miss,) = rewritten(WIDENED[form], torch.float16).misses
    assert miss.reason.code == "lost_scores"


@pytest.mark.parametrize("change", [lambda s: masked(s, HALF_MIN), lambda s: masked(s, -100.0) * 0.5])
def test_scores_that_are_lost_in_float16_and_known_to_be_are_not(change: Change) -> None:
    assert rewritten(change, torch.float16).replaced == 1


HALF_MIN = torch.finfo(torch.float16).min
CAST: dict[str, Callable[[Tensor], Tensor]] = {
    "twice": lambda s: lowered(s, -4e4, -4e4),
    "filled and lowered": lambda s: lowered(s.masked_fill(UPPER, torch.finfo(s.dtype).min), -4e4),
    "filled in between": lambda s: lowered(lowered(s, -4e4).masked_fill(UPPER, -4e4), -4e4),
    "inside and outside of a cast": lambda s: (s.float() + torch.where(FIRST, -4e4, 0.0)).half() - 4e4 * UPPER.half(),
    "to the lowest number": lambda s: lowered(s, HALF_MIN if s.dtype is torch.float16 else torch.finfo(s.dtype).min),
}


@pytest.mark.parametrize("form", CAST)
def test_sums_that_a_cast_to_half_precision_changes_are_refused(form: str) -> None:
    assert not rewritten(CAST[form], torch.float16).replaced


FILLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lowered in float32": lambda s, gone: (
        s.masked_fill(gone, torch.finfo(s.dtype).min) - torch.where(FIRST[:, None], INF, 0.0)
    ).to(s.dtype),
    "masked in float32": lambda s, gone: s.masked_fill(gone, torch.finfo(s.dtype).min).float().masked_fill(UPPER, -INF),
}


@pytest.mark.parametrize("form", FILLED)
def test_rows_of_the_lowest_half_are_rows_without_scores_whatever_is_added(form: str) -> None:
    # found by random programs: what is added in float32 beside the lowest float16 is still told apart, a fill is not
    gone = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    gone[0, :, 5] = True

    assert rewritten(FILLED[form], torch.float16, gone).replaced == 1
