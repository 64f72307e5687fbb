"""What takes long to prepare and is measured in a moment: prepared side by side, measured one at a time.

    process 1   prepare ------------| waits          | measure |         | measure |
    process 2   prepare --| waits                              | measure |         | measure |

Each task has a process of its own. Nothing is measured before the last of a group is prepared, so nothing else runs
meanwhile; and a group is measured in rounds, so that whatever slows the machine down slows all of it alike.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from attnpass.errors import first_line

Task = TypeVar("Task")
Result = TypeVar("Result")
Measure = Callable[[], Result]


@dataclass(frozen=True)
class Measured(Generic[Task, Result]):
    """What the rounds of one task gave; what went wrong if one of them failed."""

    task: Task
    results: tuple[Result, ...]
    failure: str = ""


def measured(
    prepare: Callable[[Task], Measure[Result]], group: Sequence[Task], *, rounds: int = 1
) -> Iterator[Measured[Task, Result]]:
    """`prepare`, a function of a module, is called in each task's process and returns what measures."""
    # compilers start workers of their own
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(group))))
    children = [_Child(prepare, task) for task in group]
    for child in children:
        child.hear()  # that it is prepared
    found: list[list[Result]] = [[] for _ in children]
    for _ in range(rounds):
        for child, results in zip(children, found, strict=True):
            child.tell()
            results += child.hear()
    for child, results in zip(children, found, strict=True):
        child.end()
        yield Measured(child.task, tuple(results), child.failure)


class _Child(Generic[Task, Result]):
    """The other end of one process. A failure is kept, and nothing is asked of it any more."""

    def __init__(self, prepare: Callable[[Task], Measure[Result]], task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.task, self.failure = task, ""
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, task), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self) -> None:
        if not self.failure:
            with contextlib.suppress(ConnectionError):  # it has ended while it waited: hear() finds out
                self._connection.send(None)

    def hear(self) -> list[Result]:
        if self.failure:
            return []
        try:
            kind, what = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            kind, what = "failed", f"its process ended with status {self._process.exitcode}"
        if kind == "failed":
            self.failure = what
        return [what] if kind == "measured" else []

    def end(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, prepare: Callable[[Any], Measure[Any]], task: Any) -> None:
    try:
        measure = prepare(task)
        connection.send(("prepared", None))
        while True:
            connection.recv()
            connection.send(("measured", measure()))
    except EOFError:
        pass  # nothing more is asked
    except Exception as error:  # one task that fails is a result, too
        connection.send(("failed", first_line(error)[:200]))
