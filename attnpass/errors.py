"""The two exceptions of this package.

:class:`AttnpassError` is for the user: a wrong option, a file that is no program, a model that cannot be captured.
:class:`Refuse` never reaches the user: any rule may raise it from any depth, and the driver that called the rule
turns it into a ledger entry.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import Node


class AttnpassError(Exception):
    """Something the user can mend; the text says what and how."""


class Refuse(Exception):
    """This site is left as it is: the code of a reason in the catalogue, the node where it was met, and details."""

    def __init__(self, code: str, node: Node | None = None, **details: Any) -> None:
        super().__init__(code)
        self.code = code
        self.node = node
        self.details = details


def first_line(error: Exception) -> str:
    """An exception in one line, for the ledger."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_INNERMOST = 40  # frames of a traceback: of a recursion without end the last ones tell as much as all of them


def traced(error: Exception) -> str:
    """An exception with its traceback, for the ledger: innermost frames only, and no more than a page or two."""
    return "".join(traceback.format_exception(error, limit=-_INNERMOST, chain=False)).rstrip()
