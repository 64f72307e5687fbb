"""The generator of attention programs, a few hundred draws of it; `make fuzz` draws 20,000 with other seeds."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fuzz.campaign import as_file, judged_here, run, shrunk
from tests.fuzz.damages import DAMAGES
from tests.fuzz.kernels import KERNELS, register
from tests.fuzz.programs import Cap, Mask, Program, Scale, Shape
from tests.fuzz.source import source
from tests.fuzz.spelled import CALLS

FOLDER = Path(os.environ.get("ATTNPASS_FUZZ_FOLDER", "build/fuzz"))
SHARE = 0.99
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _left_as_it_was(fresh_dynamo: None) -> Iterator[None]:
    """No kernel of ours stays registered."""
    import attnpass

    register()
    yield
    for kernel in KERNELS:
        attnpass.unregister_kernel(kernel.name)
    attnpass.reset()


def test_random_programs_compute_the_same_and_whole_ones_are_replaced() -> None:
    """About 50 s: the one test that takes this long and is run each time."""
    tally = run(300, seed=0, folder=FOLDER)
    print(tally.words())
    assert not tally.wrong, tally.words()
    assert tally.share >= SHARE, tally.words()
    assert tally.whole >= 100, "the draws are not what they should be: " + tally.words()
    assert tally.damaged >= 50, tally.words()


@pytest.mark.gpu
def test_random_programs_compute_the_same_on_cuda() -> None:
    tally = run(300, seed=1, device="cuda", inductor_every=4, folder=FOLDER)
    print(tally.words())
    assert not tally.wrong, tally.words()
    assert tally.share >= SHARE, tally.words()


# -- the generator itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_program_is_a_program(name: str) -> None:
    damage = DAMAGES[name]
    shape = dataclasses.replace(Program().shape, **dict.fromkeys(("batch", "kv_heads", "queries", "keys"), 4))
    if "DK" in damage.equal:
        shape = dataclasses.replace(shape, width=4)
    program = Program(shape=shape, steps=(Scale(), Mask()), damage=name)
    text = source(program)
    assert text != source(dataclasses.replace(program, damage=None))
    judged = judged_here(program, "cpu")
    assert judged.invalid is None
    assert not judged.wrong


@pytest.mark.parametrize("form", CALLS)
def test_a_call_with_a_mask_is_a_program(form: str) -> None:
    """What is added may not be told by its meaning where a query may have no key."""
    program = Program(
        steps=(Mask("padding", fill="min"),), called=form, empty=True, front="compile", kernel="fuzz_functions"
    )
    judged = judged_here(program, "cpu")
    assert not judged.wrong
    assert judged.kernels == (("fuzz_functions",) if form.startswith("boolean") else ())


FOUND = {
    # infinity times the zero of a mask is no number, so this is not where(mask, scores, fill)
    "an infinite fill inside a multiplied mask": Program(
        steps=(Mask("window", apply="add where"), Mask("window", apply="multiplied", fill="-1e9")),
        damage="mask reversed",
    ),
    # the gradient through a row without a key, which additive masks let through, was that of scores without a cap
    "a cap under an added mask that leaves rows empty": Program(
        shape=Shape(queries=5, keys=3, width=4),
        grad=True,
        steps=(Cap(3.0), Mask("given", apply="add where", fill="min")),
        empty=True,
        kernel="fuzz_tensor",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str) -> None:
    assert not judged_here(FOUND[name], "cpu").wrong


def test_scores_of_a_multiplied_mask_may_be_asked_for_their_form() -> None:
    program = Program(steps=(Mask("padding", apply="multiplied", fill="-1e9"),), extras=("scores are measured",))
    assert judged_here(program, "cpu").replaced == 1


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the whole generator is for: a kernel that forgets its mask is found, by the results alone."""
    monkeypatch.setattr(type(KERNELS[0]), "emit", _forgetful)
    program = Program(steps=(Scale(), Mask("window")), kernel="fuzz_tensor", grad=True, out="flatten")
    judged = judged_here(program, "cpu")
    assert any("output 0" in text for text in judged.wrong)
    smaller = shrunk(program, lambda p: bool(judged_here(p, "cpu").wrong))
    assert [type(step) for step in smaller.steps] == [Mask]
    assert smaller.out == "plain"
    assert not smaller.grad


def _forgetful(self: object, b: object, call: object) -> object:
    from tests.fuzz.kernels import PlainTensor

    scores, v = PlainTensor._scores(self, b, call)  # type: ignore[arg-type]
    return PlainTensor._finished(self, b, call, b.call(torch.ops.aten.softmax.int, scores, -1), v)  # type: ignore


def test_a_saved_program_runs_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "found.py"
    path.write_text(as_file(Program(steps=(Scale(), Mask())), "an example"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "replaced 1 of 1 sites by native" in done.stdout
    assert done.stdout.splitlines()[-1] == "right"
