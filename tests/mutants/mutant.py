"""One way of breaking the pass, and how its row says which tests must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One way of breaking the pass."""

    name: str
    file: str  # below attnpass/
    old: str
    new: str
    tests: tuple[str, ...]


def zoo(*cases: str) -> tuple[str, ...]:
    """The cases of the zoo whose names hold these texts, through torch.export."""
    chosen = " or ".join(cases)
    return ("tests/test_zoo.py", "-k", f"TestExportedProgram and not twice and ({chosen})")


def compiled(*cases: str) -> tuple[str, ...]:
    return ("tests/test_zoo.py", "-k", f"torch_compile and ({' or '.join(cases)})")


def only(file: str, *names: str) -> tuple[str, ...]:
    return (f"tests/{file}", *(("-k", " or ".join(names)) if names else ()))
