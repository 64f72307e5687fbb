"""What the user allows and prefers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnpass.errors import AttnpassError


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Options of the pass; every field is also a key of ``torch.compile(..., options={...})``."""

    strict: bool = False  # every assumption becomes a refusal
    fuel: int | None = None  # rewrite only the first n sites of each graph (for bisection)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """A policy from plain options; an unknown name or a wrong type is an error that says so."""
        import difflib

        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in options.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(fields))}"
                raise AttnpassError(f"unknown option {name!r}{hint}")
            if name == "strict" and not isinstance(value, bool):
                raise AttnpassError(f"option 'strict' is True or False, not {value!r}")
            if name == "fuel" and not (value is None or (isinstance(value, int) and value >= 0)):
                raise AttnpassError(f"option 'fuel' is None or a number of sites, not {value!r}")
        return cls(**dict(options))
