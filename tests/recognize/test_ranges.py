"""Masks that are finite where they are made and infinite after a cast of the scores to a dtype of less range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnpass
from attnpass.capture.dynamo import backend

Masking = Callable[[Tensor, Tensor], Tensor]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def low(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def by_hand(x: Tensor) -> Tensor:
    return (x - x.logsumexp(-1, keepdim=True)).exp()


MASKINGS: dict[str, Masking] = {
    "filled": lambda s, keep: s.masked_fill(~keep, low(s)),
    "where": lambda s, keep: torch.where(keep, s, low(s)),
    "added": lambda s, keep: s + torch.zeros_like(keep, dtype=s.dtype).masked_fill(~keep, low(s)),
    "multiplied": lambda s, keep: s + (1.0 - keep.to(s.dtype)) * low(s),
    "floored": lambda s, keep: s.masked_fill(~keep, float("-inf")).clamp_min(low(s)),
    "scaled afterwards": lambda s, keep: s.masked_fill(~keep, low(s) / 4) * 2.0,
}
CASTS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "softmax(dtype)": lambda s, dtype: s.softmax(-1, dtype=dtype),
    "to": lambda s, dtype: s.to(dtype).softmax(-1),
    "there and back": lambda s, dtype: s.to(dtype).float().softmax(-1),
    "log_softmax": lambda s, dtype: s.log_softmax(-1, dtype=dtype).exp(),
    "by hand": lambda s, dtype: by_hand(s.to(dtype)),
}


def compared(
    masking: Masking, cast: Callable[[Tensor, torch.dtype], Tensor], wide: torch.dtype, dtype: torch.dtype
) -> str:
    """Eager and compiled results have NaN in the same places; whether the site was replaced, or why not."""

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return cast(masking(q @ k.mT * 0.1, keep), dtype).to(v.dtype) @ v

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 16, dtype=F64, generator=g).to(wide) for _ in range(3))
    keep = torch.rand(2, 1, 8, 8, generator=g) > 0.5
    keep[0, 0, 3] = False
    expected = attention(q, k, v, keep)
    found = torch.compile(attention, backend=backend, options={"inner": "eager"})(q, k, v, keep)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2, equal_nan=True)
    report = attnpass.report()
    if report.misses:
        return report.misses[0].reason.code
    (site,) = report.sites
    return "replaced" if site.replaced else site.reason.code if site.reason else ""


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize(("wide", "narrow"), [(F64, F32), (F32, F16)], ids=str)
def test_what_overflows_is_no_mean(masking: str, cast: str, wide: torch.dtype, narrow: torch.dtype) -> None:
    compared(MASKINGS[masking], CASTS[cast], wide, narrow)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize(("wide", "narrow"), [(F32, BF16), (BF16, F16)], ids=str)  # the first by rounding alone
def test_half_types(masking: str, wide: torch.dtype, narrow: torch.dtype) -> None:
    compared(MASKINGS[masking], CASTS["to"], wide, narrow)


@pytest.mark.parametrize("masking", ["filled", "where"])
def test_a_fill_that_overflows_is_minus_infinity(masking: str) -> None:
    assert compared(MASKINGS[masking], CASTS["to"], F32, F16) == "replaced"
    assert attnpass.report().sites[0].spec.empty_rows == "nan"


@pytest.mark.parametrize("masking", ["added", "multiplied"])
def test_what_is_added_and_overflows_is_refused(masking: str) -> None:
    assert compared(MASKINGS[masking], CASTS["to"], F32, F16) == "overflows"


@pytest.mark.parametrize(("wide", "narrow"), [(BF16, F32), (F16, F32), (F16, BF16), (F32, F32)], ids=str)
@pytest.mark.parametrize("masking", ["filled", "added"])
def test_a_cast_to_no_less_range_changes_nothing(masking: str, wide: torch.dtype, narrow: torch.dtype) -> None:
    assert compared(MASKINGS[masking], CASTS["softmax(dtype)"], wide, narrow) == "replaced"
    assert attnpass.report().sites[0].spec.empty_rows == "mean"
