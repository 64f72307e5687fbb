"""A bias that was cast to float32 for a sum in float32: a fused kernel of half precision takes it as it was before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.recognize.test_lost_scores import rewritten

Change = Callable[[Tensor, Tensor], Tensor]
HALF = (torch.float16, torch.bfloat16)


EXACT: dict[str, Change] = {
    "added": lambda s, table: s.float() + table.float(),
    "subtracted": lambda s, table: s.float() - table.float(),
    "in front of what is added to": lambda s, table: table.float() - (-s.float()),
    "its sign changed": lambda s, table: s.float() + (-table.float()),
    "a view of it": lambda s, table: s.float() + table.float().mT[None, None],
    "by way of the scores' dtype": lambda s, table: (w := s.float()) + table.to(w.dtype),
    "in two steps": lambda s, table: s.double() + table.float().double(),
    "few numbers": lambda s, table: s.float() + torch.where(table > 0, 0.25, -3.0),
}
ROUNDED: dict[str, Change] = {
    "scaled": lambda s, table: s.float() + table.float() * 1.1,
    "scaled by an alpha": lambda s, table: torch.add(s.float(), table.float(), alpha=1.1),
    "whole numbers": lambda s, table: s.float() + (table * 5000).long().float(),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form", EXACT | ROUNDED)
def test_only_what_was_widened_is_exact(form: str, dtype: torch.dtype) -> None:
    (site,) = rewritten((EXACT | ROUNDED)[form], dtype, torch.randn(8, 8).to(dtype)).sites
    assert site.replaced, site.reason
    (bias,) = site.spec.bias
    assert bias.dtype != str(dtype).removeprefix("torch.")
    assert bias.exact is (form in EXACT)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_nor_is_what_the_other_half_type_held(dtype: torch.dtype) -> None:
    """Neither of the two holds all numbers of the other."""
    (other,) = set(HALF) - {dtype}
    for change in (EXACT["added"], lambda s, table: s.float() + table.to(other).float()):
        table = torch.randn(8, 8).to(other if change is EXACT["added"] else dtype)
        (site,) = rewritten(change, dtype, table).sites
        (bias,) = site.spec.bias
        assert not bias.exact
