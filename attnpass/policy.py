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
    trust_buffers: bool = False  # exported programs: buffers will go on holding the masks that they hold now
    fuel: int | None = None  # rewrite only the first n sites of each graph (for bisection)
    empty_rows: str = "exact"  # "dont_care": what a query without any key gets may be anything, NaN included

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
            if name in ("strict", "trust_buffers") and not isinstance(value, bool):
                raise AttnpassError(f"option {name!r} is True or False, not {value!r}")
            if name == "fuel" and not (value is None or (isinstance(value, int) and value >= 0)):
                raise AttnpassError(f"option 'fuel' is None or a number of sites, not {value!r}")
            if name == "empty_rows" and value not in ("exact", "dont_care"):
                raise AttnpassError(f"option 'empty_rows' is 'exact' or 'dont_care', not {value!r}")
        return cls(**dict(options))
