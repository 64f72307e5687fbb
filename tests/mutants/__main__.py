"""`make mutants`: break the pass in one way after the other, and see that the tests of that row notice.

    python -m tests.mutants             all rows
    python -m tests.mutants TEXT ...    those whose name or file holds one of these texts

    copy the tree ── tests of all rows, unbroken: must pass ── for each row: break, run its tests, mend

Nothing but one text of a copied package differs. This process imports torch once and forks for every run; the package
and the tests are imported in the fork, from the copy, which is checked. Exit status 1 when a mutant survives.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch._dynamo  # imported here once, and not again in each fork

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 300  # seconds for one run: a mutant that does not end is noticed, too
_PASSED, _FAILED, _STRANGE = 0, 1, 70  # exit status of pytest, and of a fork that did not get that far


def main(chosen: Sequence[str]) -> int:
    rows = [m for m in MUTANTS if not chosen or any(text in m.name or text in m.file for text in chosen)]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        home = prepared(Path(folder))
        for tests in together(rows):
            status, seconds, words = run(home, tests)
            print(
                f"{'unbroken':>10}  {seconds:4.0f} s  {'passes' if status == _PASSED else 'FAILS'}  {tests[0]}",
                flush=True,
            )
            if status != _PASSED:
                print(words, "\nthese tests do not pass as it is, so that they fail would say nothing")
                return 2
        survived = [mutant for at, mutant in enumerate(rows) if not killed(home, mutant, f"{at + 1}/{len(rows)}")]
    print(f"\n{len(rows) - len(survived)} of {len(rows)} mutants killed")
    for mutant in survived:
        print(f"survived: {mutant.name} ({mutant.file}); tests: {' '.join(mutant.tests)}")
    return int(bool(survived))


def prepared(folder: Path) -> Path:
    """A copy of all that the tests need; the package in it is what they import."""
    for name in ("attnpass", "tests", "examples", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder.resolve()


def together(rows: Sequence[Mutant]) -> Iterator[tuple[str, ...]]:
    """The tests of all rows, a file at a time."""
    chosen: dict[tuple[str, ...], list[str]] = {}
    for mutant in rows:
        files = tuple(arg for arg in mutant.tests if arg.endswith(".py"))
        chosen.setdefault(files, []).append(mutant.tests[-1] if "-k" in mutant.tests else "")
    for files, texts in chosen.items():
        either = " or ".join(f"({text})" for text in dict.fromkeys(texts))
        yield files if "" in texts else (*files, "-k", either)


def mutated(text: str, mutant: Mutant) -> str:
    """The file with the mutation; an error where its text does not stand there exactly once."""
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.name}: its text stands {found} times in {mutant.file}; mend the table")
    return text.replace(mutant.old, mutant.new)


def killed(home: Path, mutant: Mutant, place: str) -> bool:
    """The tests of the row fail on the mutant."""
    path = home / "attnpass" / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutated(original, mutant), encoding="utf-8")
    try:
        status, seconds, words = run(home, mutant.tests)
    finally:
        path.write_text(original, encoding="utf-8")
    noticed = status == _FAILED
    first = re.search(r"^FAILED (.*?)( - |$)", words, re.MULTILINE)
    by = f"  by {first[1]}" if first else ""
    print(f"{place:>10}  {seconds:4.0f} s  {'killed  ' if noticed else 'SURVIVED'}  {mutant.name}{by}", flush=True)
    if status not in (_PASSED, _FAILED):  # no test has failed: what broke is no evidence
        print(words)
    return noticed


def run(home: Path, tests: Sequence[str]) -> tuple[int, float, str]:
    """pytest's exit status, seconds, and its last words."""
    started = time.monotonic()
    with tempfile.TemporaryFile(dir=home) as output:
        child = os.fork()
        if child == 0:
            _in_fork(home, tests, output.fileno())
        status = _waited(child)
        output.seek(0)
        words = output.read().decode(errors="replace")[-3000:]
    return status, time.monotonic() - started, words


def _waited(child: int) -> int:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else _FAILED  # a crash is noticed
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return _FAILED


def _in_fork(home: Path, tests: Sequence[str], output: int) -> None:
    """Run the tests of the copy and end; never returns."""
    status = _STRANGE
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(home)
        os.environ |= {
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
            "PYTHONPATH": str(home),
        }
        sys.dont_write_bytecode = True  # two versions of a file within one second look alike
        sys.path[:] = [str(home), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, home))]
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "attnpass")]:
            del sys.modules[name]
        import attnpass

        if not Path(attnpass.__file__).resolve().is_relative_to(home):
            raise ImportError(f"attnpass is imported from {attnpass.__file__}, not from {home}")
        status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
