"""Work in a thread of its own: nothing of the compilation that it is part of is seen or changed by it.

    the compilation    ── holds Dynamo's lock ── waits for the work ──────────────────────── goes on
    the work                                        forward ── backward ── ...
    one of autograd's (CUDA)                                      └── compiles what is missing

Inductor compiles a backward when it is first needed, under the lock that Dynamo holds for the whole of a compilation.
The thread that does so would wait for the compilation, and that for the work: for ever. So while the holder of the lock
does nothing but wait, another lock stands in for it, for the work and for whatever runs a backward (which thread of
autograd's runs that of the work cannot be told). Everybody else is kept out as before.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def aside(work: Callable[..., T], *args: Any) -> T:
    """What `work` returns or raises."""
    with _lent() as lent, concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_entered, lent, work, *args).result()


class _Lent:
    """A lock in place of one whose holder waits."""

    def __init__(self, held: Any) -> None:
        self.held = held
        self.own = threading.RLock()
        self.worker: int | None = None
        self._taken = threading.local()  # by this thread, innermost last

    def __enter__(self) -> None:
        ahead = threading.get_ident() == self.worker or _in_backward()
        lock = self.own if ahead else self.held
        lock.__enter__()
        self._locks().append(lock)

    def __exit__(self, *raised: object) -> None:
        self._locks().pop().__exit__(*raised)

    def _locks(self) -> list[Any]:
        if not hasattr(self._taken, "locks"):
            self._taken.locks = []
        locks: list[Any] = self._taken.locks
        return locks

    def _is_owned(self) -> bool:
        """As a lock of Python tells it: work aside may itself have work aside."""
        return threading.get_ident() == self.worker or bool(self._locks())


@contextlib.contextmanager
def _lent() -> Iterator[_Lent | None]:
    """The lock that stands in for Dynamo's, if this thread holds that one."""
    from torch._dynamo import convert_frame

    held: Any = getattr(convert_frame, "compile_lock", None)
    is_owned = getattr(held, "_is_owned", None)  # of every reentrant lock of Python's
    if is_owned is None or not is_owned():
        yield None
        return
    lent = _Lent(held)
    # every place that takes it reads it from that module when it does so
    setattr(convert_frame, "compile_lock", lent)  # noqa: B010  (of another type)
    try:
        yield lent
    finally:
        setattr(convert_frame, "compile_lock", held)  # noqa: B010


def _entered(lent: _Lent | None, work: Callable[..., T], *args: Any) -> T:
    if lent is not None:
        lent.worker = threading.get_ident()
    return work(*args)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
