"""What was compiled in this process: one report for each graph, in the order in which the graphs came.

A process that compiles for ever keeps the last thousand of them; the report says how many it has forgotten.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading

from torch._guards import CompileContext

from attnpass.ledger import Report, merge

_KEPT = 1000

_lock = threading.Lock()
_numbers = itertools.count()
_reports: dict[int, Report] = {}
_attempts: dict[int, tuple[object, int]] = {}  # which attempt at which compilation a graph belongs to
_forgotten = 0


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
    global _forgotten
    with _lock:
        _reports[number] = report
        while len(_reports) > _KEPT:
            oldest = min(_reports)
            del _reports[oldest]
            _forgotten += 1
        while len(_attempts) > _KEPT:
            del _attempts[min(_attempts)]


def report() -> Report:
    """All graphs since the last reset, as one."""
    with _lock:
        whole = merge(_reports[number] for number in sorted(_reports))
    if not _forgotten:
        return whole
    note = f"only the last {_KEPT} graphs are told of; {_forgotten} before them are forgotten"
    return dataclasses.replace(whole, notes=(*whole.notes, note))


def reset() -> None:
    """Forget all graphs; numbers start anew."""
    global _numbers, _forgotten
    with _lock:
        _forgotten = 0
        _reports.clear()
        _attempts.clear()
        _numbers = itertools.count()
