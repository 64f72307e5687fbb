"""What ``attnpass kernels`` shows: which kernels run on this machine, which do not and why, and what each can do.

    native  torch 2.13.0
        cpu, cuda; float16, bfloat16, float32, float64; heads of any width
        causal, masks, shared heads, ...

The tables are those that the kernels themselves go by (:class:`attnpass.Capabilities`), so nothing is said twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnpass.kernels import Capabilities, Kernel

_WORDS = {
    "dense_mask": "masks",
    "key_padding": "padding",
    "alibi": "ALiBi",
    "softcap": "soft cap",
    "sink": "sinks",
    "groups": "shared heads",
    "unlike_widths": "unlike widths",
    "bias_gradient": "bias gradient",
}
_APART = ("approximate",)  # not a strength: said in a line of its own
_INDENT = 8


def row(kernel: Kernel) -> dict[str, Any]:
    """One kernel as JSON holds it."""
    missing = kernel.available()
    can = kernel.can
    return {
        "kernel": kernel.name,
        "available": missing is None,
        "version": kernel.version() if missing is None else "",
        "reason": None if missing is None else {"code": missing.code, "text": missing.text},
        "devices": sorted(can.devices),
        "dtypes": sorted(can.dtypes, key=_bits),
        "widths": {"most": can.max_width, "multiple": can.width_multiple},
        "masks_as": kernel.takes,
        "supports": {name: getattr(can, name) for name in _flags(can)},
        "only_by_name": kernel.only_by_name,
        "verified": kernel.verified,
    }


def shown(rows: Sequence[dict[str, Any]]) -> RenderableType:
    """All kernels, those that can run first."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    wide = max((len(row["kernel"]) for row in rows), default=0)
    parts: list[RenderableType] = []
    for title, here in (("run here", True), ("do not run here", False)):
        chosen = [row for row in rows if row["available"] is here]
        if chosen:
            parts += [Text(""), Text(title, style="bold")]
        for row in chosen:
            name = (f"  {row['kernel'].ljust(wide)}  ", "green" if here else "yellow")
            parts.append(_hanging(name, row["version"] if here else row["reason"]["text"]))
            parts += [Padding(Text(line, style=style), (0, 0, 0, _INDENT), expand=False) for line, style in _lines(row)]
    return Group(*parts[1:])


def _hanging(name: tuple[str, str], text: str) -> RenderableType:
    """A name, and a text that goes on below itself."""
    from rich.table import Table
    from rich.text import Text

    line = Table.grid()
    line.add_column(no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(Text(*name), Text(text))
    return line


def _lines(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    most, multiple = row["widths"]["most"], row["widths"]["multiple"]
    width = "any width" if most is None else f"width up to {most}"
    width += f", multiples of {multiple}" if multiple > 1 else ""
    if row["devices"]:
        yield f"{', '.join(row['devices'])}; {', '.join(row['dtypes'])}; heads of {width}", ""
    words = [_WORDS.get(name, name) for name, able in row["supports"].items() if able and name not in _APART]
    if row["masks_as"] == "functions":
        words = ["masks as functions" if word == "masks" else word for word in words]
    if words:
        yield ", ".join(words), "dim"
    notes = [
        *(["approximate: only with allow_approximate"] if row["supports"]["approximate"] else []),
        *(["only where it is named"] if row["only_by_name"] else []),
        *(["tested against its documentation, not on hardware"] if row["verified"] == "contract" else []),
    ]
    if notes:
        yield "; ".join(notes), "magenta"


def _flags(can: Capabilities) -> list[str]:
    return [field.name for field in dataclasses.fields(can) if isinstance(field.default, bool)]


def _bits(dtype: str) -> tuple[int, str]:
    return int("".join(letter for letter in dtype if letter.isdigit()) or 0), dtype
