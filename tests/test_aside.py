"""Work beside a compilation: it may compile, backwards included, and nobody else may meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import convert_frame

from attnpass.aside import aside

SOON, LONG = 0.2, 60.0
LOCK = convert_frame.compile_lock


def ends(scenario: Callable[[], Any]) -> Any:
    """What a scenario returns; one that hangs fails, and leaves nothing locked."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(scenario()), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_frame, "compile_lock", threading.RLock())
        thread.start()
        thread.join(LONG)
    assert found, "it hangs"
    return found[0]


def compile_something() -> int:
    with convert_frame.compile_lock:
        return threading.get_ident()


class Compiles(torch.autograd.Function):
    """Its backward is compiled when it is first needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        compile_something()
        return grad * 2


def backward() -> Tensor:
    x = torch.ones(3, requires_grad=True)
    Compiles.apply(x).sum().backward()
    assert x.grad is not None
    return x.grad


def test_work_may_compile_while_the_compilation_waits_for_it() -> None:
    def scenario() -> bool:
        held = convert_frame.compile_lock
        with convert_frame.compile_lock:
            others = {aside(compile_something), aside(lambda: aside(compile_something))}
            assert compile_something() == threading.get_ident()
        return threading.get_ident() not in others and convert_frame.compile_lock is held

    assert ends(scenario)


def test_a_backward_in_a_thread_of_autograd_may_compile_too() -> None:
    def scenario() -> list[float]:
        found: list[Tensor] = []

        def work() -> None:  # as on CUDA, where another thread than the one that asks for it runs a backward
            thread = threading.Thread(target=lambda: found.append(backward()))
            thread.start()
            thread.join()

        with convert_frame.compile_lock:
            aside(work)
        return found[0].tolist()

    assert ends(scenario) == [2.0, 2.0, 2.0]


def test_nobody_else_compiles_meanwhile() -> None:
    def scenario() -> list[str]:
        order: list[str] = []

        def other() -> None:
            with convert_frame.compile_lock:
                order.append("somebody else")

        def work() -> None:
            somebody.start()
            somebody.join(SOON)
            order.append("the work")

        somebody = threading.Thread(target=other)
        with convert_frame.compile_lock:
            aside(work)
            order.append("the compilation")
        somebody.join()
        return order

    assert ends(scenario) == ["the work", "the compilation", "somebody else"]


def test_backwards_that_compile_take_turns_with_the_work() -> None:
    def scenario() -> list[str]:
        order: list[str] = []

        def other() -> None:
            backward()
            order.append("a backward")

        def work() -> None:
            with convert_frame.compile_lock:
                somebody.start()
                somebody.join(SOON)
                order.append("the work")
            somebody.join()

        somebody = threading.Thread(target=other)
        with convert_frame.compile_lock:
            aside(work)
        return order

    assert ends(scenario) == ["the work", "a backward"]


def test_where_nothing_is_compiled_the_lock_is_the_lock() -> None:
    def scenario() -> bool:
        held = convert_frame.compile_lock
        return aside(lambda: convert_frame.compile_lock is held)

    assert ends(scenario)


def test_what_the_work_raises_is_raised_and_the_lock_is_back() -> None:
    def fails() -> None:
        raise ValueError("no")

    with convert_frame.compile_lock, pytest.raises(ValueError, match="no"):
        aside(fails)
    assert convert_frame.compile_lock is LOCK


TUNED = """
import torch

@torch.compile(backend="attnpass", options={"autotune": True})
def attention(q, k, v):
    return torch.softmax(q @ k.mT / 8, -1) @ v

given = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]
attention(*given).sum().backward()
print("tuned", all(x.grad is not None for x in given))
"""


def test_kernels_are_timed_for_training_behind_inductor(tmp_path: Path) -> None:
    """torch's own lock: its first backward is compiled while the compilation of the whole waits for the timing."""
    env = os.environ | {"ATTNPASS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", TUNED], env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert "tuned True" in done.stdout, done.stderr[-2000:]
    assert "could not be timed" not in done.stderr
    assert list(tmp_path.glob("*.json"))
