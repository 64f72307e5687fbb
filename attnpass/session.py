"""What was compiled in this process: one report for each graph, in the order in which the graphs came."""

from __future__ import annotations

import itertools
import threading

from torch._guards import CompileContext

from attnpass.ledger import Report, merge

_lock = threading.Lock()
_numbers = itertools.count()
_reports: dict[int, Report] = {}
_attempts: dict[int, tuple[object, int]] = {}  # which attempt at which compilation a graph belongs to


def reserve() -> int:
    """The number of the next graph; graphs may be compiled by several threads, and finish in any order.

    Dynamo may throw a compilation away and start it anew (when it learns that a number has to be a tensor, say): what
    an earlier attempt left is then forgotten, because it never ran.
    """
    number = next(_numbers)
    context = CompileContext.try_get()
    if context is not None and context.compile_id is not None:
        with _lock:
            for older, (compilation, attempt) in list(_attempts.items()):
                if compilation == context.compile_id and attempt < context.attempt:
                    _reports.pop(older, None)
                    del _attempts[older]
            _attempts[number] = (context.compile_id, context.attempt)
    return number


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
        _attempts.clear()
        _numbers = itertools.count()
