"""What the user allows and prefers: one frozen value, checked and brought into one form where it is made.

    kernel    kernels in order of preference; what they cannot serve goes to the next best
    rules     the same for some sites; the first rule that matches a site speaks for it, then `kernel` does
    the rest  what may be assumed, approximated, replaced

Nothing here looks at a graph or at the machine. Where a policy comes from when none is given: ``ambient.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from attnpass.errors import AttnpassError
from attnpass.ledger import Where
from attnpass.names import CANONICAL, KEEP, canonical
from attnpass.spec import AttentionSpec

Names = str | Sequence[str]
"""One kernel, or several in order of preference; ``"keep"`` at the end: rather leave the site than take another."""

Match = str | Callable[[AttentionSpec], bool]
"""Which sites: a glob over module paths, a source line (``"gpt.py:41"``), or a predicate on the spec."""

_SOURCE = re.compile(r"(?P<file>.+):(?P<line>\d+)$")


@dataclass(frozen=True)
class Rule:
    """What is preferred for some sites."""

    match: Match
    kernel: Names

    def __post_init__(self) -> None:
        if not callable(self.match) and not (isinstance(self.match, str) and self.match):
            raise AttnpassError(
                "a rule is for a module ('encoder.*'), a source line ('gpt.py:41') or a predicate on the spec, "
                f"not {self.match!r}"
            )
        object.__setattr__(self, "kernel", _preference(self.kernel, f"the rule for {_shown(self.match)}"))

    def fits(self, where: Where, spec: AttentionSpec) -> bool:
        """This rule is for the site at this place, with this meaning; raises what a predicate raises."""
        if callable(self.match):
            return bool(self.match(spec))
        source = _SOURCE.match(self.match)
        if source is not None:
            wanted = PurePath(source["file"]).parts
            return (
                where.file is not None
                and PurePath(where.file).parts[-len(wanted) :] == wanted
                and where.line == int(source["line"])
            )
        # a rule for a module is for all that is inside it: softmax is often a module of its own
        parts = (where.module or "").split(".")
        return any(fnmatch.fnmatchcase(".".join(parts[:n]), self.match) for n in range(1, len(parts) + 1))

    def __str__(self) -> str:
        return _shown(self.match)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Options of the pass; every field is also a key of ``torch.compile(..., options={...})``."""

    kernel: Names | None = None  # None: the one that is expected to be fastest
    rules: Mapping[Match, Names] | Sequence[Rule] = ()
    strict_kernel: bool = False  # an error where a site does not get a kernel that was asked for
    allow_approximate: bool = False  # kernels that compute in fewer bits than their inputs have
    autotune: bool = False  # time the kernels that would serve, once for each case, in place of expecting
    min_gain: float = 0.0  # share of the expected time that has to be saved; kernels asked for by name need not
    verify: bool = False  # try every replaced site against float64, and put back what is worse than the original
    strict: bool = False  # every assumption becomes a refusal
    trust_buffers: bool = False  # exported programs: buffers will go on holding the masks that they hold now
    fuel: int | None = None  # rewrite only the first n sites of each graph (for bisection)
    empty_rows: str = "exact"  # "dont_care": what a query without any key gets may be anything, NaN included

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise AttnpassError(f"option {field.name!r} is True or False, not {value!r}")
        if not (self.fuel is None or (_is_number(self.fuel, int) and self.fuel >= 0)):
            raise AttnpassError(f"option 'fuel' is None or a number of sites, not {self.fuel!r}")
        if not (_is_number(self.min_gain, int | float) and math.isfinite(self.min_gain) and self.min_gain < 1):
            raise AttnpassError(f"option 'min_gain' is a share below 1, such as 0.1, not {self.min_gain!r}")
        if self.empty_rows not in ("exact", "dont_care"):
            raise AttnpassError(f"option 'empty_rows' is 'exact' or 'dont_care', not {self.empty_rows!r}")
        object.__setattr__(self, "rules", _rules(self.rules))
        if self.kernel is not None:
            names = _preference(self.kernel, "option 'kernel'")
            object.__setattr__(self, "kernel", names[0] if len(names) == 1 else names)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """A policy from plain options; an unknown name or a wrong type is an error that says so."""
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(fields))}"
                raise AttnpassError(f"unknown option {name!r}{hint}")
        return cls(**options)

    def each_rule(self) -> tuple[Rule, ...]:
        """The rules, the first one first."""
        assert isinstance(self.rules, tuple)
        return self.rules

    def asked(self, where: Where, spec: AttentionSpec) -> tuple[str, ...]:
        """The kernels asked for at this site, in order, perhaps with ``"keep"`` at the end; empty: whatever is best."""
        for rule in self.each_rule():
            if rule.fits(where, spec):
                return tuple(rule.kernel)
        return (self.kernel,) if isinstance(self.kernel, str) else tuple(self.kernel or ())


def _preference(value: Any, whose: str) -> tuple[str, ...]:
    """Canonical names; a text may hold several, with commas between them."""
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise AttnpassError(f"{whose} is the name of a kernel or a list of names, not {value!r}")
    try:
        names = tuple(dict.fromkeys(_canonical(name) for name in given if name.strip()))
    except AttnpassError as error:
        raise AttnpassError(f"{whose}: {error}") from None
    if not names:
        raise AttnpassError(f"{whose} names no kernel")
    if KEEP in names[:-1]:
        raise AttnpassError(f"{whose}: nothing can come after 'keep'")
    return names


def _canonical(name: str) -> str:
    try:
        return canonical(name)
    except AttnpassError:
        # one that somebody has registered: only now, because kernels import torch
        from attnpass.kernels import kernels

        return canonical(name, (kernel.name for kernel in kernels() if kernel.name not in CANONICAL))


def _rules(given: Any) -> tuple[Rule, ...]:
    if isinstance(given, Mapping):
        return tuple(Rule(match, names) for match, names in given.items())
    if isinstance(given, Sequence) and all(isinstance(rule, Rule) for rule in given):
        return tuple(given)
    raise AttnpassError(
        "option 'rules' says which sites get which kernel, {'encoder.*': 'flash', 'gpt.py:41': 'keep'}, "
        f"not {given!r}"
    )


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(match: Match) -> str:
    return repr(match) if isinstance(match, str) else getattr(match, "__name__", repr(match))
