"""Ways of breaking the pass on purpose, and the tests that must notice each.

A row replaces one text, which stands exactly once in its file, by another; ``tests`` are arguments of pytest that take
seconds. The rows are spread over all stages: what is recognised, what memory holds, what masks mean, which kernel may
serve, what is written, what is checked, what is chosen.
"""

from __future__ import annotations

from tests.mutants.finding import MEMORY, RECOGNIZE
from tests.mutants.mutant import Mutant
from tests.mutants.replacing import CHOICE, EMIT, KERNELS, MASKS

__all__ = ["MUTANTS", "Mutant"]

MUTANTS = (*RECOGNIZE, *MEMORY, *MASKS, *KERNELS, *EMIT, *CHOICE)
