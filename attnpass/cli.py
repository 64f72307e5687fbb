"""The command line: ``attnpass audit | rewrite | verify | bisect | kernels | reasons | demo``.

    stdout    the result: a report, a table, or JSON with --json
    stderr    progress (on a terminal only), and one line when something is wrong
    status    0 fine, 1 nothing replaced, 2 an error; `verify` and `bisect` have further ones

Whatever a user can get wrong is an :class:`AttnpassError` with one line that says what and what to do; anything else is
a defect of this package and says so, in one line as well.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attnpass
from attnpass import cli_files, cli_kernels, cli_verify
from attnpass.ambient import from_text
from attnpass.errors import AttnpassError

if TYPE_CHECKING:
    from rich.table import Table

    from attnpass.ledger import Report

FINE, NOTHING_REPLACED, ERROR, INTERRUPTED = 0, 1, 2, 130
_PIPE_WIDTH = 160  # where no terminal tells how wide a table may be


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on its own code; ours are in the report
            status: int = options.run(options)
        sys.stdout.flush()
        return status
    except AttnpassError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `attnpass kernels | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except Exception as error:
        return _complain(f"unexpected {cli_files.first_line(error)}{cli_files.place(error)}; please report it")


def _complain(text: str, status: int = ERROR) -> int:
    print(f"attnpass: {' '.join(text.split())}", file=sys.stderr)
    return status


# -- commands ----------------------------------------------------------------------------------------------------------


def _audit(options: argparse.Namespace) -> int:
    return _show(_of_target(options, attnpass.audit, "auditing"), options)


def _of_target(options: argparse.Namespace, look: Callable[..., Report], doing: str) -> Report:
    """What `look` says of the model or the program that is named."""
    _import_also(options.imports)
    if cli_files.is_factory(options.target):
        with _quietly(), _progress(options, f"making {options.target}"):
            made = cli_files.make(options.target)
        with _quietly(), _progress(options, f"capturing and {doing}"), _policy(options):
            return look(made.model, *made.args, **made.kwargs)
    _need_file(options.target)
    with _quietly(), _progress(options, f"loading {options.target}"):
        program = cli_files.load(options.target).program
    with _quietly(), _progress(options, doing), _policy(options):
        return look(program)


def _verify(options: argparse.Namespace) -> int:
    report = _of_target(options, attnpass.verify, "trying every replaced site")
    _write_html(report, options)
    if options.json:
        print(report.to_json())
    elif not options.quiet:
        _print(cli_verify.shown(report))
    return cli_verify.status(report)


def _bisect(options: argparse.Namespace) -> int:
    _import_also(options.imports)
    if not cli_files.is_factory(options.target):
        raise AttnpassError(
            f"{options.target!r} is not {cli_files.FACTORY_FORM}; a model is run as it is and rewritten"
        )
    with _quietly(), _progress(options, f"making {options.target}"):
        made = cli_files.make(options.target)
    search = {"inner": options.inner, "gradients": options.gradients, "tolerance": options.tolerance}
    with _quietly(), _progress(options, "running the model with more and fewer sites replaced"), _policy(options):
        found = attnpass.bisect(made.model, *made.args, output=options.output, **search, **made.kwargs)
    if options.json:
        print(json.dumps(cli_verify.bisection_row(found), indent=2, allow_nan=False))
    elif not options.quiet:
        _print(cli_verify.bisection(found))
    return cli_verify.bisection_status(found)


def _rewrite(options: argparse.Namespace) -> int:
    _import_also(options.imports)
    cli_files.check_output(options.output)
    if cli_files.is_factory(options.source):
        with _quietly(), _progress(options, f"exporting {options.source}"):
            loaded = cli_files.Loaded(cli_files.export(cli_files.make(options.source), options.source))
    else:
        _need_file(options.source)
        with _quietly(), _progress(options, f"loading {options.source}"):
            loaded = cli_files.load(options.source)
    with _quietly(), _progress(options, "rewriting"), _policy(options):
        program, report = attnpass.rewrite(loaded.program)
    with _quietly(), _progress(options, f"writing {options.output}"):
        cli_files.save(cli_files.Loaded(program, loaded.extra), options.output)
    return _show(report, options)


def _write_html(report: Report, options: argparse.Namespace) -> None:
    if options.html is not None:
        from attnpass.report.html import to_html

        cli_files.write_text(options.html, to_html(report))


def _show(report: Report, options: argparse.Namespace) -> int:
    _write_html(report, options)
    if options.json:
        print(report.to_json())
    elif not options.quiet and sys.stdout.isatty():
        from attnpass.report.text import to_rich

        _print(to_rich(report))
    elif not options.quiet:
        print(report)
    return FINE if report.replaced else NOTHING_REPLACED


def _kernels(options: argparse.Namespace) -> int:
    from attnpass.kernels import kernels

    rows = [cli_kernels.row(kernel) for kernel in kernels()]
    if options.json:
        print(json.dumps(rows, indent=2))
    elif not options.quiet:
        _print(cli_kernels.shown(rows))
    return FINE


def _reasons(options: argparse.Namespace) -> int:
    from attnpass.reasons import CATALOGUE

    if options.code is not None and options.code not in CATALOGUE:
        near = difflib.get_close_matches(options.code, CATALOGUE, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`attnpass reasons` lists them"
        raise AttnpassError(f"no reason has the code {options.code!r}; {hint}")
    chosen = {code: entry for code, entry in CATALOGUE.items() if options.code in (None, code)}
    if options.json:
        rows = [
            {"code": code, "kind": entry.kind, "text": entry.text, "advice": entry.advice}
            for code, entry in chosen.items()
        ]
        print(json.dumps(rows, indent=2))
    elif not options.quiet:
        table = _table("code", "kind", "text", "what it means, what to do")
        for code, entry in chosen.items():
            table.add_row(code, entry.kind, _escape(entry.text), _escape(entry.advice))
        _print(table)
    return FINE


def _demo(options: argparse.Namespace) -> int:
    from attnpass import demo

    return demo.main(json_output=options.json, quiet=options.quiet)


# -- helpers -----------------------------------------------------------------------------------------------------------


def _policy(options: argparse.Namespace) -> contextlib.AbstractContextManager[attnpass.Policy]:
    """What the options say; of what they do not speak, the environment does."""
    said: dict[str, Any] = {}
    if options.policy is not None:
        try:
            said |= from_text(options.policy)
            attnpass.Policy.from_options(said)
        except AttnpassError as error:
            raise AttnpassError(f"--policy: {error}") from error
    if options.kernel is not None:
        said["kernel"] = options.kernel
    if getattr(options, "trust_buffers", False):
        said["trust_buffers"] = True
    return attnpass.policy(**said)


def _import_also(names: Sequence[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise AttnpassError(f"--import {name} failed: {cli_files.first_line(error)}") from error


def _need_file(target: str) -> None:
    if not os.path.exists(target) and not target.endswith(".pt2"):
        raise AttnpassError(f"{target!r} is neither a .pt2 file nor {cli_files.FACTORY_FORM}")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep stdout for the result: what models and torch print meanwhile goes to stderr, torch's logs nowhere."""
    import logging

    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _progress(options: argparse.Namespace, doing: str) -> Iterator[None]:
    if options.quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{_escape(doing)} ..."):
        yield


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(what: Any) -> None:
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
    console.print(what)


# -- arguments ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and JSON")
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import this module first: one that defines operators which the program uses",
    )
    models.add_argument(
        "--kernel", metavar="NAMES", help="kernels in order of preference, with commas; `attnpass kernels` lists them"
    )
    models.add_argument(
        "--policy", metavar="JSON", help="""further options, or a file of them: '{"rules": {"*.cross_attn": "keep"}}'"""
    )
    page = argparse.ArgumentParser(add_help=False)
    page.add_argument("--html", metavar="FILE", help="write the report as one self-contained page, too")

    parser = argparse.ArgumentParser(
        prog="attnpass",
        description=attnpass.__doc__.partition("\n")[0] if attnpass.__doc__ else None,
        epilog="exit status: 0 fine, 1 nothing replaced, 2 an error",
    )
    parser.add_argument("--version", action="version", version=f"attnpass {attnpass.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    audit = commands.add_parser(
        "audit", parents=[common, models, page], help="say what would become of every softmax, and why"
    )
    audit.add_argument(
        "target", metavar="MODEL", help=f"model.pt2, or {cli_files.FACTORY_FORM} that returns (model, args[, kwargs])"
    )
    audit.set_defaults(run=_audit)

    verify = commands.add_parser(
        "verify",
        parents=[common, models, page],
        help="try every replacement beside its original, both against float64",
        description="Run every replaced site both ways, on the real inputs and on harder ones, and hold both to "
        "float64. Exit status: 0 all are fine, 1 nothing would be replaced, 2 an error, 3 a site is worse than its "
        "original and would be left, 4 a site could not be tried.",
    )
    verify.add_argument(
        "target", metavar="MODEL", help=f"model.pt2, or {cli_files.FACTORY_FORM} that returns (model, args[, kwargs])"
    )
    verify.set_defaults(run=_verify)

    bisect = commands.add_parser(
        "bisect",
        parents=[common, models],
        help="find the sites that make a model's output differ, and write each as a file that shows it",
        description="Run a model with all sites replaced, with half of them, and so on. Exit status: 0 nothing "
        "differs, 1 no site is replaced, 2 an error, 3 sites were found that make the output differ.",
    )
    bisect.add_argument(
        "target", metavar="MODEL", help=f"{cli_files.FACTORY_FORM} that returns (model, args[, kwargs])"
    )
    bisect.add_argument("--gradients", action="store_true", help="compare the gradients of the parameters, too")
    bisect.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="allow a difference from the model as it is of this share of the largest element; without it the model "
        "in float64 is the measure",
    )
    bisect.add_argument("--inner", default="eager", metavar="NAME", help="what runs the graphs: eager, or inductor ...")
    bisect.add_argument(
        "-o", "--output", default="attnpass_repro.py", metavar="FILE", help="the file to write (default: %(default)s)"
    )
    bisect.set_defaults(run=_bisect)

    rewrite = commands.add_parser(
        "rewrite",
        parents=[common, models, page],
        help="write a program with its attention replaced",
        description="Write a program with its attention replaced. Where nothing can be replaced, OUT is a copy and "
        "the exit status is 1.",
    )
    rewrite.add_argument("source", metavar="IN", help=f"model.pt2, or {cli_files.FACTORY_FORM}")
    rewrite.add_argument("output", metavar="OUT", help="the .pt2 file to write; replaced whole or not at all")
    rewrite.add_argument(
        "--trust-buffers",
        action="store_true",
        help="take masks that buffers hold for granted: OUT is wrong if one of them is loaded with another mask",
    )
    rewrite.set_defaults(run=_rewrite)

    kernels = commands.add_parser(
        "kernels", parents=[common], help="list the kernels: which run here, why not, and what each can do"
    )
    kernels.set_defaults(run=_kernels)

    reasons = commands.add_parser("reasons", parents=[common], help="explain the reasons that reports give")
    reasons.add_argument("code", metavar="CODE", nargs="?", help="only this one")
    reasons.set_defaults(run=_reasons)

    demo = commands.add_parser("demo", parents=[common], help="audit, check and time three models on the CPU")
    demo.set_defaults(run=_demo)
    return parser


if __name__ == "__main__":
    sys.exit(main())
