"""Benchmarks are prepared side by side, measured one at a time, and outlive a process that ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.apart import measured


def prepare(task: tuple[str, str]) -> Callable[[], float]:
    name, folder = task
    Path(folder, name).touch()
    if name == "raises":
        raise ValueError("no such form\nat all")
    if name == "ends":
        os._exit(3)
    if name == "ends while it waits":
        threading.Timer(0.02, os._exit, (4,)).start()

    def measure() -> float:
        if name == "fails later":
            raise RuntimeError("out of memory")
        assert len(list(Path(folder).iterdir())) == 6, "measured before all were prepared"
        busy = Path(folder, "busy")
        busy.touch(exist_ok=False)  # nothing else is measured meanwhile
        time.sleep(0.05)
        busy.unlink()
        return time.monotonic()

    return measure


def test_measured_one_at_a_time_in_rounds(tmp_path: Path) -> None:
    names = ("a", "raises", "b", "ends", "ends while it waits", "fails later")
    a, raises, b, ends, waits, later = measured(prepare, [(name, str(tmp_path)) for name in names], rounds=2)
    assert not a.failure
    assert not b.failure
    assert a.results[0] < b.results[0] < a.results[1] < b.results[1]
    assert raises.failure == "ValueError: no such form"
    assert ends.failure == "its process ended with status 3"
    assert waits.failure == "its process ended with status 4"
    assert later.failure == "RuntimeError: out of memory"
    assert not raises.results + ends.results + later.results
