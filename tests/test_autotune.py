"""Timing kernels on the spot: what is run, in which order kernels come then, and what is kept on disk.

A busy machine turns the order of two times round, so these tests count operators where the clock would tell: what is
timed is really run, and more work is always more. The clock itself has a test of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

import attnpass
from attnpass import autotune, choose
from attnpass.capture.dynamo import backend
from attnpass.graph import Builder
from attnpass.kernels.native import Native
from attnpass.ledger import Decision
from attnpass.site import Call

aten = torch.ops.aten


class Roundabout(Native):
    """The same function, after a long way."""

    name = "roundabout"

    def emit(self, b: Builder, call: Call) -> Node:
        out = super().emit(b, call)
        for _ in range(200):
            out = b.call(aten.neg.default, b.call(aten.neg.default, out))
        return out


class Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(step: Callable[[], None]) -> float:
    with Counter() as counter:
        step()
    return 1.0 + counter.count  # compiled code may have none


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(autotune, "_cpu_us", operators)
    monkeypatch.setenv("ATTNPASS_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "kernels", lambda: (Roundabout(), Native()))
    attnpass.reset()
    yield
    attnpass.reset()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.1).softmax(-1) @ v


def operands(length: int = 256, *, grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, 4, length, 32, requires_grad=grad) for _ in range(3)]


def tuned(given: list[Tensor], *, dynamic: bool | None = None) -> Decision:
    torch._dynamo.reset()
    attnpass.reset()
    options = {"autotune": True, "inner": "eager"}
    out = torch.compile(attention, backend=backend, options=options, dynamic=dynamic)(*given)
    torch.testing.assert_close(out, attention(*given))
    report = attnpass.report()
    assert not report.failures, report.failures
    (site,) = report.sites
    return site


def kept(folder: Path) -> dict[str, float]:
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {entry["kernel"]: entry["us"] for entry in found}


def test_the_faster_one_is_taken_and_what_was_measured_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tuned(operands())
    assert site.kernel == "native"
    assert {v.kernel for v in site.verdicts if v.timed} == {"roundabout", "native"}
    times = kept(tmp_path)
    assert times.keys() == {"roundabout", "native", "original"}
    assert times["native"] < times["roundabout"]
    shown = capsys.readouterr().err
    assert "timing roundabout for q 2x4x256x32" in shown
    assert "(3 of 3)" in shown


def test_what_is_kept_is_not_timed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(operands())
    before = {path: path.read_text() for path in tmp_path.glob("*.json")}
    capsys.readouterr()
    assert tuned(operands()).kernel == "native"
    assert "timing" not in capsys.readouterr().err
    assert {path: path.read_text() for path in tmp_path.glob("*.json")} == before
    tuned(operands(128))  # another case
    assert len(list(tmp_path.glob("*.json"))) == 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"us": "fast"}', '{"us": -1}', '{"us": NaN}', "\x00\xff"])
def test_a_file_that_says_nothing_is_timed_anew(tmp_path: Path, text: str) -> None:
    tuned(operands())
    for path in tmp_path.glob("*.json"):
        path.write_text(text)
    assert tuned(operands()).kernel == "native"
    assert kept(tmp_path)["native"] > 0


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ATTNPASS_CACHE", str(blocked))
    assert tuned(operands()).kernel == "native"


def test_the_original_stays_where_it_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "kernels", lambda: (Roundabout(),))
    site = tuned(operands(16))
    assert not site.replaced
    assert site.reason is not None
    assert site.reason.code == "not_profitable"


def test_what_was_asked_for_is_not_timed(tmp_path: Path) -> None:
    options = {"autotune": True, "inner": "eager", "kernel": "native"}
    torch.compile(attention, backend=backend, options=options)(*operands())
    assert attnpass.report().sites[0].kernel == "native"
    assert not list(tmp_path.glob("*.json"))


def test_a_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(part: autotune.Cut, site: object, compiled: bool) -> float:
        raise RuntimeError("no")

    monkeypatch.setattr(autotune, "_timed_aside", broken)
    site = tuned(operands())
    assert site.replaced
    assert not any(v.timed for v in site.verdicts)
    assert not list(tmp_path.glob("*.json"))


def test_a_forward_and_a_backward_are_timed_where_gradients_are_asked_for(tmp_path: Path) -> None:
    tuned(operands())
    forward = kept(tmp_path)["original"]
    for path in tmp_path.glob("*.json"):
        path.unlink()
    given = operands(grad=True)
    assert tuned(given).kernel == "native"
    assert all(x.grad is None for x in given)
    assert kept(tmp_path)["original"] > forward


def test_symbolic_lengths_are_timed_as_they_were_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuned(operands(), dynamic=True).replaced
    assert "could not be timed" not in capsys.readouterr().err


def test_random_numbers_stay_as_they_were() -> None:
    given = operands()
    state = torch.get_rng_state()
    tuned(given)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_clock_counts_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 2_000 <= autotune._cpu_us(lambda: time.sleep(0.002)) < 1_000_000


def test_through_inductor(tmp_path: Path) -> None:
    given = operands()
    out = torch.compile(attention, backend=backend, options={"autotune": True})(*given)
    torch.testing.assert_close(out, attention(*given))
    assert kept(tmp_path).keys() == {"roundabout", "native", "original"}
