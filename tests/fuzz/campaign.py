"""Many programs in a row: draw, judge, count, shrink what fails, save it as a file that shows it by itself.

A failure does not end a run: it is made smaller by putting plain defaults back field by field, saved, and the next
program is drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import linecache
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.fuzz import judge as judging
from tests.fuzz import kernels
from tests.fuzz.draw import PROGRAMS, settled
from tests.fuzz.judge import How, Judged
from tests.fuzz.programs import Program
from tests.fuzz.promise import limit
from tests.fuzz.source import source
from tests.zoo import numbers

CHUNK = 250  # draws of one seed
TRIES = 60  # runs spent on making one failure smaller
MODULES: tuple[ModuleType, ...] = (numbers, kernels, judging)  # what a saved program is judged by
SHRUNK = 10  # failures that are made smaller; the rest is saved as drawn


@dataclass
class Tally:
    """What came of all draws."""

    drawn: int = 0
    whole: int = 0  # programs that must be replaced
    replaced: int = 0  # ... and were
    damaged: int = 0
    damaged_replaced: int = 0
    limited: Counter[str] = field(default_factory=Counter)  # whole, but within a documented limit
    fronts: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    ungraded: int = 0  # gradients not compared, by a declared assumption
    invalid: Counter[str] = field(default_factory=Counter)  # do not run by themselves, or cannot be traced
    upstream: int = 0  # the compiler behind the pass is as wrong without it
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def share(self) -> float:
        return self.replaced / self.whole if self.whole else 1.0

    def add(self, other: Tally) -> None:
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif f.name == "seconds":
                self.seconds = max(mine, theirs)
            else:
                setattr(self, f.name, mine + theirs)

    def words(self) -> str:
        lines = [
            f"{self.drawn} programs in {self.seconds:.0f} s ({self.drawn / max(self.seconds, 1e-9):.1f} a second)",
            f"  whole      {self.whole}, replaced {self.replaced} ({self.share:.2%})",
            f"  limited    {sum(self.limited.values())} whole programs within a documented limit",
            f"  damaged    {self.damaged}, replaced {self.damaged_replaced}",
            f"  invalid    {sum(self.invalid.values())} do not run by themselves, or torch cannot trace them",
            f"  ungraded   {self.ungraded} whose gradients a declared assumption leaves open",
            f"  upstream   {self.upstream} that the compiler behind the pass gets wrong without it",
            f"  fronts     {_counted(self.fronts)}",
            f"  kernels    {_counted(self.kernels)}",
            f"  wrong      {len(self.wrong)}",
            *(f"    {text}" for text in self.wrong),
            f"  missed     {len(self.missed)}",
            *(f"    {text}" for text in self.missed),
        ]
        return "\n".join(lines)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


def run(
    count: int,
    seed: int,
    *,
    device: str = "cpu",
    inductor_every: int | None = None,
    folder: Path | None = None,
    say: Callable[[Tally], None] | None = None,
) -> Tally:
    """Draw and judge `count` programs; every so many of those that are compiled go through inductor."""
    tally, started = Tally(), time.perf_counter()
    compiled = 0
    for program in _drawn(count, seed):
        if inductor_every is not None and program.front == "compile":
            compiled += 1
            # inductor's code for FlexAttention on the CPU is wrong for heads this narrow; the real kernel refuses them
            fit = program.dropout != "live" and program.kernel != "fuzz_functions"
            if compiled % inductor_every == 0 and fit:
                program = dataclasses.replace(program, inner="inductor")
        _one(program, tally, device, folder)
        tally.seconds = time.perf_counter() - started
        if say is not None:
            say(tally)
    return tally


def _drawn(count: int, seed: int) -> Iterator[Program]:
    """Programs of this seed; drawn a chunk at a time, so that one is judged where no tool looks on."""
    for start in range(0, count, CHUNK):
        yield from _chunk(min(CHUNK, count - start), seed * 100_003 + start)


def _chunk(size: int, seed: int) -> list[Program]:
    programs: list[Program] = []

    @seeded(seed)
    @settings(
        max_examples=size,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(PROGRAMS)
    def collect(program: Program) -> None:
        programs.append(program)

    collect()
    return programs


def _one(program: Program, tally: Tally, device: str, folder: Path | None) -> None:
    judged = judged_here(program, device)
    tally.drawn += 1
    tally.fronts[program.front if program.front != "compile" else f"compile, {program.inner}"] += 1
    if judged.invalid is not None:
        tally.invalid[judged.invalid[:100]] += 1
        return
    tally.kernels.update(judged.kernels)
    tally.ungraded += judged.ungraded
    if judged.wrong and not judged.ours:
        tally.upstream += 1
        return
    if judged.wrong:
        smaller = program
        if len(tally.wrong) < SHRUNK:
            smaller = shrunk(program, lambda p: bool((found := judged_here(p, device)).wrong and found.ours))
        tally.wrong.append(_told(smaller, judged_here(smaller, device).wrong, "wrong", folder))
        return
    why = limit(program, device)
    if why == "damaged":
        tally.damaged += 1
        tally.damaged_replaced += judged.replaced > 0
    elif why is not None:
        tally.limited[why] += 1
    else:
        tally.whole += 1
        tally.replaced += judged.replaced == 1
        if judged.replaced != 1:
            smaller = program
            if len(tally.missed) < SHRUNK:
                smaller = shrunk(program, lambda p: _missed(p, device))
            tally.missed.append(_told(smaller, judged_here(smaller, device).reasons, "missed", folder))


def _missed(program: Program, device: str) -> bool:
    judged = judged_here(program, device)
    return limit(program, device) is None and not judged.invalid and not judged.wrong and judged.replaced != 1


def how(program: Program) -> How:
    """How a program is run."""
    return How(
        grad=program.grad,
        front=program.front,
        inner=program.inner,
        kernel=program.kernel,
        dynamic=program.dynamic,
        drops=program.dropout == "live",
        narrow="bfloat16" if program.autocast else program.dtype,
        added=max([1.0, *(1e4 for mask in program.masks if mask.fill == "-10000"), *map(abs, program.numbers)]),
    )


def judged_here(program: Program, device: str) -> Judged:
    """Judge a program; what raises although eager code does not is wrong, too."""
    text = source(program)
    name = f"<program {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    namespace: dict[str, Any] = {}
    try:
        exec(compile(text, name, "exec"), namespace)
        return judging.judge(namespace, how(program), device)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Judged(wrong=(f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})",))
    finally:
        linecache.cache.pop(name, None)


# -- making a failure smaller -----------------------------------------------------------------------------------------


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The program with as many plain defaults as it takes to fail still."""
    tries = 0
    progress = True
    while progress and tries < TRIES:
        progress = False
        for smaller in _smaller(program):
            tries += 1
            if tries > TRIES:
                break
            try:
                text_differs = source(smaller) != source(program) or how(smaller) != how(program)
            except Exception:
                continue  # parts that need one another
            if not text_differs or fails(smaller):
                program, progress = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """Everything that is one step plainer and still a program that could have been drawn."""
    for smaller in _plainer(program):
        if settled(smaller) == smaller:
            yield smaller


def _plainer(program: Program) -> Iterator[Program]:
    for at in range(len(program.steps)):
        yield dataclasses.replace(program, steps=program.steps[:at] + program.steps[at + 1 :])
    for f in dataclasses.fields(program):
        if f.name not in ("steps", "shape") and getattr(program, f.name) != f.default:
            yield dataclasses.replace(program, **{f.name: f.default})
    for f in dataclasses.fields(program.shape):
        if getattr(program.shape, f.name) != f.default:
            yield dataclasses.replace(program, shape=dataclasses.replace(program.shape, **{f.name: f.default}))


# -- saving -----------------------------------------------------------------------------------------------------------


def _told(program: Program, texts: tuple[str, ...], kind: str, folder: Path | None) -> str:
    said = f"{program!r}: {'; '.join(texts)}"
    if folder is None:
        return said
    text = as_file(program, said)
    path = folder / f"{kind}_{hashlib.sha256(text.encode()).hexdigest()[:10]}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return f"{path}: {'; '.join(texts)}"


def as_file(program: Program, said: str) -> str:
    """A file that needs attnpass and nothing of its tests."""
    head = f'''"""Found by attnpass's generator of programs. Run it to see.

{said}
"""'''
    parts = [head, "from __future__ import annotations", _plain(source(program))]
    for module in MODULES:
        parts.append(f"# -- from {module.__name__} " + "-" * 60)
        parts.append(_plain(inspect.getsource(module)))
    parts.append(f'if __name__ == "__main__":\n    raise SystemExit(main(globals(), {how(program)!r}))\n')
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """Without what may stand only at the beginning of a file, and without imports of the tests."""
    lines = text.splitlines()
    return "\n".join(x for x in lines if not x.startswith(("from __future__", "from tests."))).strip() + "\n"
