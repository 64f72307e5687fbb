"""The table of mutants fits the package as it is: each text stands once, and what comes of it is still Python."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.__main__ import mutated
from tests.mutants.table import MUTANTS, Mutant

PACKAGE = Path(__file__).resolve().parent.parent.parent / "attnpass"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made(mutant: Mutant) -> None:
    before = (PACKAGE / mutant.file).read_text(encoding="utf-8")
    after = mutated(before, mutant)
    assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before)), "it changes nothing"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_of_a_mutant_are_there(mutant: Mutant) -> None:
    files = [arg for arg in mutant.tests if arg.endswith(".py")]
    assert files
    assert all((PACKAGE.parent / file).exists() for file in files)


def test_there_are_many_in_every_part() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30
    parts = Counter(mutant.file.split("/")[0].removesuffix(".py") for mutant in MUTANTS)
    assert parts.keys() >= {"recognize", "prove", "masks", "kernels", "emit", "capture", "verify", "choose", "policy"}
