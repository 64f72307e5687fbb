"""Equal sites together, so that a model of 80 layers reads like a model of one.

    layers.0.attn, layers.1.attn, ... (same source line, spec, decision)   ->   80x layers.*.attn

Two sites are equal when a user would do the same about both: same place up to the numbers in the module path, same
meaning, same outcome with the same reasons. Misses are equal when they are spelled alike (shape_hash), stopped for the
same reason and come from the same source line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Generic, TypeVar

from attnpass.ledger import Decision, Miss, Where

_NUMBER = re.compile(r"^\d+$")
Entry = TypeVar("Entry", Decision, Miss)
_MOST_RANGES = 4  # `{0,5,9,14..31}` still reads; a longer list is shortened


@dataclass(frozen=True)
class Group(Generic[Entry]):
    """Equal entries, in the order of the report, and the pattern that their module paths share."""

    module: str
    members: tuple[Entry, ...]

    @property
    def first(self) -> Entry:
        return self.members[0]


def group_sites(sites: Iterable[Decision]) -> list[Group[Decision]]:
    """Groups of equal sites, by first appearance."""
    return _grouped(
        list(sites),
        lambda site: (
            _skeleton(site.where),
            site.where.file,
            site.where.line,
            site.spec,
            site.replaced,
            site.kernel,
            site.asked,
            site.reason,
            site.verdicts,
            site.assumptions,
            site.proofs,
        ),
    )


def group_misses(misses: Iterable[Miss]) -> list[Group[Miss]]:
    """Groups of equal misses, by first appearance."""
    return _grouped(
        list(misses),
        lambda miss: (miss.shape_hash, miss.reason, miss.where.file, miss.where.line),
    )


def _grouped(entries: list[Entry], key: Callable[[Entry], Hashable]) -> list[Group[Entry]]:
    groups: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    # where a pattern is shared by several groups (every other layer has a window, say), "*" would hide which is which
    seen: dict[str, int] = {}
    for members in groups.values():
        for name in {_skeleton(member.where) for member in members}:
            seen[name] = seen.get(name, 0) + 1
    return [
        Group(pattern([name_of(m.where) for m in members], exact=seen[_skeleton(members[0].where)] > 1), tuple(members))
        for members in groups.values()
    ]


def name_of(where: Where) -> str:
    """The module's path, or whatever else names the place."""
    return where.module or where.cls or "(no module)"


def pattern(paths: Sequence[str], *, exact: bool = False) -> str:
    """One text for several module paths: the numbers that differ as ``*``, or listed where `exact` asks for it."""
    unique = list(dict.fromkeys(paths))
    if len(unique) == 1:
        return unique[0]
    split = [path.split(".") for path in unique]
    if len({len(parts) for parts in split}) > 1:
        return f"{unique[0]} and {len(unique) - 1} other{'s' if len(unique) > 2 else ''}"
    columns = list(zip(*split, strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    out = []
    for column in columns:
        if len(set(column)) == 1:
            out.append(column[0])
        elif exact and len(varying) == 1 and all(_NUMBER.match(part) for part in column):
            out.append("{" + _ranges(sorted({int(part) for part in column})) + "}")
        else:
            out.append("*")
    return ".".join(out)


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0..2,5``; a steady step reads ``0,2,..,30``."""
    if len(numbers) > 3:
        steps = {b - a for a, b in pairwise(numbers)}
        if len(steps) == 1 and steps != {1}:
            return f"{numbers[0]},{numbers[1]},..,{numbers[-1]}"
    runs = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        values = [number for _, number in run]
        if len(values) > 2:
            runs.append(f"{values[0]}..{values[-1]}")
        else:
            runs += [str(value) for value in values]
    if len(runs) > _MOST_RANGES:
        runs = [*runs[: _MOST_RANGES - 1], "..", runs[-1]]
    return ",".join(runs)


def _skeleton(where: Where) -> str:
    return ".".join("*" if _NUMBER.match(part) else part for part in name_of(where).split("."))
