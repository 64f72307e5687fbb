"""What was compiled in this process: one report for each graph, in the order in which the graphs came."""

from __future__ import annotations

import itertools
import threading

from attnpass.ledger import Report, merge

_lock = threading.Lock()
_numbers = itertools.count()
_reports: dict[int, Report] = {}


def reserve() -> int:
    """The number of the next graph; graphs may be compiled by several threads, and finish in any order."""
    return next(_numbers)


def record(number: int, report: Report) -> None:
    """Keep what became of a graph."""
    with _lock:
        _reports[number] = report


def report() -> Report:
    """All graphs since the last reset, as one."""
    with _lock:
        return merge(_reports[number] for number in sorted(_reports))


def reset() -> None:
    """Forget all graphs; numbers start anew."""
    global _numbers
    with _lock:
        _reports.clear()
        _numbers = itertools.count()
