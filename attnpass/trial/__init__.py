"""Trying a replacement: the original and the fused call of each site, both run and both held to float64.

    pair.py        one site as two small modules over the same leaves
    inputs.py      what they are run on: real values, and made-up ones that are hard on attention
    reference.py   the original's arithmetic in float64
    compare.py     errors, and when one is worse than the other
    examine.py     all of it, site by site
    verdict.py     what it does to the decisions

Only done on request (``verify=True``): no compilation without it imports this package.
"""

from attnpass.trial.examine import Examiner, Real, Tried, Watch
from attnpass.trial.inputs import Given
from attnpass.trial.pair import Built, Pair, Side
from attnpass.trial.verdict import CLEAN, built_sites, judged

__all__ = ["CLEAN", "Built", "Examiner", "Given", "Pair", "Real", "Side", "Tried", "Watch", "built_sites", "judged"]
