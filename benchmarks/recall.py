"""How much of the attention in real models is found, and how much of it replaced, beside inductor's own matcher.

    python -m benchmarks.recall --suite transformers [--suite timm ...] [--only NAME] [--limit N]
                                [--inductor | --inductor-from FILE] [--front dynamo|export]
                                [--json FILE] [--write] [--expected] [--every N] [--check]

Every model is built from a tiny random configuration (tests/models) and runs in a worker process: a model that fails,
hangs or crashes is a line in the table, not the end of the run. `there` is counted by an oracle that does not know the
pass (tests/models/oracle.py). `--write` puts the tables into docs/recall.md, `--expected` the decisions into
tests/models/expected.json, and `--check` compares them with it: a model of which less is found or replaced than is
written there makes the run fail.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import multiprocessing
import multiprocessing.connection
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.models.harness import Result
from tests.models.suites import SUITES, expected, find, write_expected

PAGE = Path(__file__).parents[1] / "docs" / "recall.md"


class Worker:
    """A process that runs one case after another; it is started afresh after a hang or a crash."""

    def __init__(self, front: str, *, inductor: bool, timeout: float) -> None:
        self.front, self.inductor, self.timeout = front, inductor, timeout
        self.process: Any = None
        self.pipe: Any = None

    def run(self, suite: str, name: str) -> Result:
        """The result, whatever happens."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other, self.front, self.inductor), daemon=True)
            self.process.start()
            other.close()
        self.pipe.send((suite, name))
        try:
            if self.pipe.poll(self.timeout):
                return Result(**self.pipe.recv())
            problem = f"not done in {self.timeout:.0f} s"
        except EOFError:
            problem = "the process died"
        self.stop()
        return Result(suite=suite, name=name, front=self.front, problem=problem)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(pipe: multiprocessing.connection.Connection, front: str, inductor: bool) -> None:
    """The worker's side: results travel as plain dictionaries."""
    import logging
    import warnings

    from tests.models.harness import run

    warnings.simplefilter("ignore")  # the models', not ours
    logging.disable(logging.WARNING)
    while True:
        try:
            suite, name = pipe.recv()
        except EOFError:
            return
        try:
            result = run(dataclasses.replace(find(suite, name), front=front), inductor=inductor)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error).strip()[:160]}"
            result = Result(suite=suite, name=name, front=front, problem=text.replace("\n", " "))
        pipe.send(dataclasses.asdict(result))


def names_of(suite: str, only: list[str], limit: int | None, every: int = 1) -> list[str]:
    names = [case.name for case in SUITES[suite]()]
    if unknown := [name for name in only if name not in names]:
        raise SystemExit(f"no model {unknown[0]!r} in suite {suite!r}; there are {', '.join(names)}")
    return [name for name in names if not only or name in only][::every][:limit]


def measure(suites: list[str], arguments: argparse.Namespace) -> list[Result]:
    """Run every case, one line of progress each."""
    worker = Worker(arguments.front, inductor=arguments.inductor, timeout=arguments.timeout)
    results = []
    try:
        for suite in suites:
            names = names_of(suite, arguments.only, arguments.limit, arguments.every)
            for number, name in enumerate(names, 1):
                result = worker.run(suite, name)
                results.append(result)
                print(f"[{suite} {number}/{len(names)}] {line(result)}", file=sys.stderr, flush=True)
                if arguments.json:  # after each, so that an interrupted run leaves what it has
                    arguments.json.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")
    finally:
        worker.stop()
    return results


def take_inductor(results: list[Result], file: Path) -> None:
    """Inductor's matches, which no change of this package changes."""
    known = {(r["suite"], r["name"]): r["inductor"] for r in json.loads(file.read_text())}
    for result in results:
        result.inductor = known.get((result.suite, result.name))


def line(result: Result) -> str:
    if result.problem:
        return f"{result.name}: {result.problem}"
    accuracy = "" if result.accurate else f"  DIFFERS from eager: {result.error:.1e}, gradients {result.grad_error}"
    notes = ", ".join(f"{code} {count}" for code, count in (result.misses | result.left).items())
    return (
        f"{result.name}: {result.sites} of {result.there} sites, {result.replaced} replaced, "
        f"{result.seconds:.1f} s{'  (' + notes + ')' if notes else ''}{accuracy}"
    )


def lost(results: list[Result]) -> list[str]:
    """What tests/models/expected.json promises and these results do not hold, one line each."""
    lines = []
    for result in results:
        wanted, found = expected().get(f"{result.suite}/{result.name}", {}), result.decisions()
        if result.problem:
            lines.append(f"{result.suite}/{result.name}: {result.problem}")
        elif not result.accurate:
            lines.append(f"{result.suite}/{result.name}: differs from eager by {result.error:.1e}")
        for what in ("there", "sites", "replaced", "replaced_training"):
            if not result.problem and found.get(what, 0) < wanted.get(what, 0):
                reasons = ", ".join(f"{code} {n}" for code, n in (result.misses | result.left).items())
                lines.append(
                    f"{result.suite}/{result.name}: {what} {found.get(what, 0)}, not {wanted[what]} ({reasons})"
                )
    return lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """The sums of one suite over the models that ran."""

    suite: str
    models: int
    failed: int
    there: int
    sites: int
    named: int  # there, not taken for a site, with a reason that is in the catalogue
    replaced: int
    replaced_training: int
    inductor: int | None
    inaccurate: int


def totals(suite: str, results: list[Result]) -> Totals:
    mine = [result for result in results if result.suite == suite]
    ran = [result for result in mine if not result.problem]
    counts = [result.inductor for result in ran]
    return Totals(
        suite=suite,
        models=len(ran),
        failed=len(mine) - len(ran),
        there=sum(result.there for result in ran),
        sites=sum(result.sites for result in ran),
        named=sum(max(0, result.there - result.sites) for result in ran),
        replaced=sum(result.replaced for result in ran),
        replaced_training=sum(result.replaced_training or 0 for result in ran),
        inductor=None if None in counts else sum(count for count in counts if count is not None),
        inaccurate=sum(not result.accurate for result in ran),
    )


def share(part: int | None, whole: int) -> str:
    if part is None:
        return "not counted"
    return f"{part} ({100 * part / whole:.0f} %)" if whole else str(part)


def summary(suites: list[str], results: list[Result]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for suite in suites:
        t = totals(suite, results)
        rows.append((
            suite, str(t.models), str(t.there), share(t.sites, t.there), share(t.replaced, t.there),
            share(t.replaced_training, t.there), share(t.inductor, t.there), str(t.inaccurate), str(t.failed),
        ))  # fmt: skip
    return rows


HEAD = (
    "suite", "models", "there", "found", "replaced", "replaced in training", "inductor's fuse_attention", "inaccurate",
    "did not run",
)  # fmt: skip


def show(suites: list[str], results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD, title="attention found and replaced")
    for row in summary(suites, results):
        table.add_row(*row)
    Console().print(table)


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n" + body + "\n"


def page(suites: list[str], results: list[Result], command: str) -> str:
    """docs/recall.md."""
    today = datetime.date.today().isoformat()
    sections = [_INTRODUCTION.format(command=command, date=today, versions=_versions())]
    sections.append(markdown(HEAD, summary(suites, results)))
    reasons: collections.Counter[str] = collections.Counter()
    left: collections.Counter[str] = collections.Counter()
    for result in results:
        reasons.update(result.misses)
        left.update(result.left)
    sections.append("## Why a softmax was no site\n\nAll softmaxes, those that are no attention included.\n")
    sections.append(markdown(("reason", "softmaxes"), [(f"`{code}`", str(n)) for code, n in reasons.most_common()]))
    sections.append("## Why a site was left as it is, in inference\n")
    sections.append(markdown(("reason", "sites"), [(f"`{code}`", str(n)) for code, n in left.most_common()]))
    for suite in suites:
        rows = [_row(result) for result in results if result.suite == suite]
        sections.append(f"## {suite}\n")
        sections.append(markdown(_ROW_HEAD, rows))
    return "\n".join(sections)


_ROW_HEAD = ("model", "there", "found", "replaced", "in training", "inductor", "error", "gradient error", "remarks")


def _row(result: Result) -> tuple[str, ...]:
    if result.problem:
        return (result.name, *[""] * 7, f"did not run: {result.problem.replace('|', '/')}")
    remarks = [f"{count} no site: `{code}`" for code, count in result.misses.items()]
    remarks += [f"{count} left: `{code}`" for code, count in result.left.items()]
    if result.own_error is not None or result.own_grad_error is not None:
        own = ["unknown" if v is None else f"{v:.0e}" for v in (result.own_error, result.own_grad_error)]
        remarks.append(f"eager itself is {own[0]} and {own[1]} from float64")
    if not result.accurate:
        remarks.append("**differs from eager**")
    return (
        result.name, str(result.there), str(result.sites), str(result.replaced), _text(result.replaced_training),
        _text(result.inductor), f"{result.error:.0e}", "" if result.grad_error is None else f"{result.grad_error:.0e}",
        "; ".join(remarks),
    )  # fmt: skip


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def _versions() -> str:
    import importlib.metadata

    names = ("torch", "transformers", "timm", "diffusers", "torchvision")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


_INTRODUCTION = """# How much is found

Written by {command} on {date} with
{versions}, on a CPU, float32.

One model per architecture, randomly initialised from a tiny configuration with every feature on: fewer key/value heads
than heads, windows shorter than the sequence, soft caps set, odd batch and lengths, padding on both sides; transformers
with their eager attention, timm with fused attention off, diffusers with the vanilla processor.

- *there*: softmaxes in one eager run that lie between two products of activations and that the outputs depend on,
  counted by an oracle that does not know the pass. Forms without any fused equivalent that fit this (a difference of
  two maps, a gate after the softmax) are counted too; talking heads, which mix heads by a linear layer, are not.
- *found*: sites in the report; *replaced*: those that became a fused call in inference, and in training.
- *inductor's fuse_attention*: matches of inductor's own patterns on the same model's inference graphs (AOTAutograd,
  decompositions and joint-graph passes run as in a real compilation, only code generation is left out).
- *error*: the largest difference of outputs (or of parameter gradients) from eager, relative to the largest element of
  the tensor. A model is *inaccurate* when it is further from eager than rounding explains (2e-5 in outputs, 1e-3 in
  gradients) *and* more than four times further than eager itself is from float64. Outputs are compared with padding on
  both sides, gradients without padding on the left: a loss over queries that see no key is not compared.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recall", description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", action="append", choices=list(SUITES), help="may be repeated; all by default")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this model (may be repeated)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N models of each suite")
    parser.add_argument("--front", choices=("dynamo", "export"), default="dynamo")
    parser.add_argument("--inductor", action="store_true", help="count inductor's own matches too")
    parser.add_argument(
        "--inductor-from", type=Path, metavar="FILE", help="take inductor's matches from an earlier run's --json"
    )
    parser.add_argument("--timeout", type=float, default=180.0, metavar="SECONDS", help="for each model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--write", action="store_true", help="write docs/recall.md")
    parser.add_argument("--expected", action="store_true", help="write the decisions to tests/models/expected.json")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth model of each suite")
    parser.add_argument("--check", action="store_true", help="fail where less is found than expected.json says")
    arguments = parser.parse_args(argv)
    suites = arguments.suite or list(SUITES)
    results = measure(suites, arguments)
    if arguments.inductor_from:
        take_inductor(results, arguments.inductor_from)
    show(suites, results)
    if arguments.write:
        command = shlex.join(["python", "-m", "benchmarks.recall", *(sys.argv[1:] if argv is None else argv)])
        PAGE.write_text(page(suites, results, f"`{command}`"))
    if arguments.expected:
        write_expected({f"{r.suite}/{r.name}": r.decisions() for r in results if not r.problem})
    if arguments.check:
        lines = lost(results)
        print("\n".join(lines) or f"{len(results)} models: all that is written down is found", flush=True)
        return 1 if lines else 0
    return 1 if any(result.problem or not result.accurate for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
