"""Every program of the corpus: shown as it was met, with plain inductor, and as it has to be, through the pass."""

from __future__ import annotations

from pathlib import Path

import pytest

import attnpass
from tests.field_bugs.corpus import BUGS, Bug
from tests.plain import error, plain_is_wrong, plain_misses, plain_raises, with_gradients

NAMES = [bug.name for bug in BUGS]


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.plain], ids=lambda bug: bug.name)
def test_plain_inductor_has_it(bug: Bug) -> None:
    args = bug.make()
    if bug.plain == "wrong":
        plain_is_wrong(bug.program, args)
    elif bug.plain == "raises":
        plain_raises(bug.program, args)
    else:
        plain_misses(bug.program, args, dynamic=bug.dynamic)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_it_is_not_here(bug: Bug) -> None:
    program = with_gradients(bug.program) if bug.gradients else bug.program
    # what inductor only missed needs no inductor behind the pass
    options = {"inner": "inductor" if bug.plain in ("wrong", "raises") else "aot_eager"}
    assert error(program, bug.make(), "attnpass", dynamic=bug.dynamic, options=options) < bug.tolerance
    report = attnpass.report()
    assert not report.failures
    assert report.sites or report.misses
    if bug.here == "replaced":
        assert report.replaced == len(report.sites)
        assert not report.misses


def test_each_says_what_went_wrong_there() -> None:
    assert all(bug.program.__doc__ for bug in BUGS)
    assert len(set(NAMES)) == len(NAMES)


def test_the_page_has_them_all() -> None:
    page = (Path(__file__).parent / "README.md").read_text()
    assert all(f"| {bug.number} |" in page for bug in BUGS)
