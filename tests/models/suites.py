"""All suites by name, and what is expected of every model in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models import diffusers_cases, handwritten_cases, timm_cases, torch_cases, transformers_cases
from tests.models.case import Case

SUITES: dict[str, Callable[[], list[Case]]] = {
    "transformers": transformers_cases.cases,
    "timm": timm_cases.cases,
    "diffusers": diffusers_cases.cases,
    "torch": torch_cases.cases,
    "handwritten": handwritten_cases.cases,
}

EXPECTED = Path(__file__).with_name("expected.json")


def find(suite: str, name: str) -> Case:
    """The case of this name; a KeyError names the ones there are."""
    by_name = {case.name: case for case in SUITES[suite]()}
    if name not in by_name:
        raise KeyError(f"no model {name!r} in suite {suite!r}; there are {', '.join(by_name)}")
    return by_name[name]


def expected() -> dict[str, dict[str, Any]]:
    """What the pass makes of each model, by "suite/name"."""
    loaded: dict[str, dict[str, Any]] = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    return loaded


def write_expected(new: dict[str, dict[str, Any]]) -> None:
    """Replace these entries, one model a line, so that a change of behaviour is one line of a diff."""
    entries = sorted((expected() | new).items())
    lines = (f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in entries)
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
