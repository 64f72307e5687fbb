"""The zoo: one table of cases that drives recognition, refusal, numerics and docs/zoo.md.

    scale masks fills spellings products heads terms sinks effects forms lookalikes calls modules corners
    adversarial: the cases
    case.py       what a case is                    idioms.py     where the cases come from
    judge.py      expectations against reports      numbers.py    errors against float64
    __main__.py   docs/zoo.md

Sizes are tiny and all different, masks irregular, batches odd: what is confused shows.
"""

from __future__ import annotations

from tests.zoo import (  # noqa: F401  importing a theme puts its cases on the table
    adversarial,
    calls,
    corners,
    effects,
    fills,
    forms,
    heads,
    lookalikes,
    masks,
    modules,
    products,
    scale,
    sinks,
    spellings,
    terms,
)
from tests.zoo.case import TABLE, Case

CASES: tuple[Case, ...] = tuple(TABLE)
