"""The command line: what it prints where, its exit status, and one clear line for whatever a user gets wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import attnpass
from attnpass import cli, cli_files, cli_kernels, demo
from attnpass.kernels import Capabilities
from attnpass.kernels.native import Native
from attnpass.reasons import Reason, reason
from tests.models import torchvision_stub

ROOT = Path(__file__).resolve().parent.parent

MODELS = """
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) / 3.0, dim=-1) @ v

class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Wrong(nn.Module):
    def forward(self, x):
        return x @ x.unsqueeze(0).expand(3, 5, 7)

def attention():
    print("a factory may print")
    return Attention(), tuple(torch.randn(3, 2, 4, 5, 8).unbind(0))

def by_name():
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    return Attention(), (q,), {"k": k, "v": v}

def nothing_to_replace():
    return nn.Linear(2, 2), (torch.randn(3, 2),)

def branching():
    return Branching(), (torch.randn(3),)

def failing_model():
    return Wrong(), (torch.randn(2, 2),)

def raising():
    raise ValueError("no weights here\\nsecond line")

def leaving():
    raise SystemExit(3)

def a_number():
    return 3

def one_thing():
    return (nn.Linear(2, 2),)

def bare_argument():
    return nn.Linear(2, 2), torch.randn(2, 2)

def bad_keywords():
    return nn.Linear(2, 2), (torch.randn(2, 2),), [1]

def no_model():
    return 3, (torch.randn(2, 2),)

def a_function():
    return torch.relu, (torch.randn(2, 2),)

constant = 3
"""


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 3.0, dim=-1) @ v


def qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, 2, 4, 5, 8).unbind(0))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of factories, and two programs: one with attention, one without."""
    (tmp_path / "factories.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("import a_package_that_is_nowhere\n")
    (tmp_path / "lazy.py").write_text("raise ModuleNotFoundError('some requirement is not met')\n")
    (tmp_path / "unfinished.py").write_text("def f(:\n")
    torch.export.save(torch.export.export(Attention(), qkv()), tmp_path / "model.pt2")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(3, 2),)), tmp_path / "linear.pt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("factories", "broken", "lazy", "unfinished"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


Capture = pytest.CaptureFixture[str]


# -- what goes well ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["model.pt2", "factories:attention", "factories:by_name"])
@pytest.mark.usefixtures("folder", "fresh_dynamo")
def test_audit_reports_every_site_and_exits_with_0(target: str, capsys: Capture) -> None:
    assert cli.main(["audit", target, "--json"]) == 0
    out, err = capsys.readouterr()
    (site,) = json.loads(out)["sites"]
    assert site["replaced"]
    assert "factory may print" not in out
    assert "attnpass:" not in err


@pytest.mark.usefixtures("folder", "fresh_dynamo")
def test_audit_prints_the_report_as_text(capsys: Capture) -> None:
    assert cli.main(["audit", "model.pt2"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(attnpass.audit(torch.export.load("model.pt2"))).strip()
    assert err == ""
    assert "\x1b" not in out


@pytest.mark.parametrize("target", ["linear.pt2", "factories:nothing_to_replace"])
@pytest.mark.usefixtures("folder", "fresh_dynamo")
def test_audit_exits_with_1_where_nothing_would_be_replaced(target: str) -> None:
    assert cli.main(["audit", target, "--quiet"]) == 1


@pytest.mark.usefixtures("folder", "fresh_dynamo")
def test_quiet_prints_nothing(capsys: Capture) -> None:
    assert cli.main(["audit", "model.pt2", "-q"]) == 0
    assert cli.main(["rewrite", "model.pt2", "out.pt2", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("source", ["model.pt2", "factories:attention"])
@pytest.mark.usefixtures("folder")
def test_rewrite_writes_a_program_that_runs(source: str, capsys: Capture) -> None:
    assert cli.main(["rewrite", source, "out.pt2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["replaced"]
    program = torch.export.load("out.pt2")
    assert "scaled_dot_product_attention" in program.graph_module.code
    q, k, v = qkv()
    torch.testing.assert_close(program.module()(q, k, v), Attention()(q, k, v))


@pytest.mark.usefixtures("folder")
def test_rewrite_where_nothing_is_replaced_writes_a_copy_and_exits_with_1() -> None:
    assert cli.main(["rewrite", "linear.pt2", "out.pt2", "-q"]) == 1
    assert torch.export.load("out.pt2").graph_module.code == torch.export.load("linear.pt2").graph_module.code


@pytest.mark.usefixtures("folder")
def test_rewrite_in_place_keeps_what_else_the_file_holds() -> None:
    program = torch.export.load("model.pt2")
    torch.export.save(program, "model.pt2", extra_files={"notes.txt": "keep me"})
    assert cli.main(["rewrite", "model.pt2", "model.pt2", "-q"]) == 0
    extra = {"notes.txt": ""}
    assert "scaled_dot_product" in torch.export.load("model.pt2", extra_files=extra).graph_module.code
    assert extra == {"notes.txt": "keep me"}


def test_rewrite_leaves_no_other_file_and_ordinary_permissions(folder: Path) -> None:
    before = set(os.listdir(folder))
    assert cli.main(["rewrite", "model.pt2", "out.pt2", "-q"]) == 0
    assert set(os.listdir(folder)) - {"__pycache__"} == before | {"out.pt2"}
    assert stat.S_IMODE(os.stat("out.pt2").st_mode) == stat.S_IMODE(os.stat("model.pt2").st_mode)


def test_rewrite_writes_through_a_link(folder: Path) -> None:
    (folder / "link.pt2").symlink_to("linear.pt2")
    assert cli.main(["rewrite", "model.pt2", "link.pt2", "-q"]) == 0
    assert (folder / "link.pt2").is_symlink()
    assert "scaled_dot_product" in torch.export.load("linear.pt2").graph_module.code


@pytest.mark.usefixtures("folder")
def test_a_program_with_foreign_operators_loads_once_their_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("operators.py").write_text(
        "import torch\n"
        "library = torch.library.Library('attnpass_test_cli', 'FRAGMENT')\n"
        "library.define('twice(Tensor x) -> Tensor')\n"
        "library.impl('twice', lambda x: x * 2, 'CompositeExplicitAutograd')\n"
    )
    Path("save.py").write_text(
        "import torch, operators\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, q, k, v):\n"
        "        q = torch.ops.attnpass_test_cli.twice(q)\n"
        "        return torch.softmax(q @ k.transpose(-1, -2) / 3.0, dim=-1) @ v\n"
        "program = torch.export.export(Model(), tuple(torch.randn(3, 2, 4, 5, 8).unbind(0)))\n"
        "torch.export.save(program, 'foreign.pt2')\n"
    )
    subprocess.run([sys.executable, "save.py"], check=True)
    with pytest.MonkeyPatch.context():
        assert run("audit", "foreign.pt2").returncode == 2
        assert "--import" in run("audit", "foreign.pt2").stderr
        assert run("audit", "foreign.pt2", "--import", "operators", "-q").returncode == 0


def test_kernels_says_what_runs_here_and_why_not(capsys: Capture) -> None:
    assert cli.main(["kernels", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["available"] == (row["reason"] is None) for row in rows)
    assert cli.main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert all(row["kernel"] in out for row in rows)
    assert "\x1b" not in out
    native = next(row for row in rows if row["kernel"] == "native")
    assert (native["version"], native["verified"], native["only_by_name"]) == (torch.__version__, "hardware", False)
    assert native["widths"] == {"most": None, "multiple": 1}
    assert native["supports"]["causal"]
    assert not native["supports"]["softcap"]


class Odd(Native):
    """Everything that is said of a kernel only now and then."""

    name = "odd"
    only_by_name = True
    verified = "contract"
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({"float32", "bfloat16"}),
        max_width=256,
        width_multiple=8,
        alibi=True,
        approximate=True,
    )

    def available(self) -> Reason | None:
        return reason("unavailable", detail="odd is not installed: pip install odd")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_kernels_says_what_each_can_do_at_any_width(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    console.print(cli_kernels.shown([cli_kernels.row(Native()), cli_kernels.row(Odd())]))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    here, away = lines.index("run here"), lines.index("do not run here")
    assert here < lines.index(f"  native  {torch.__version__}") < away
    assert lines[away + 1 : away + 4] == [
        "  odd     odd is not installed: pip install odd",
        "        cuda; bfloat16, float32; heads of width up to 256, multiples of 8",
        "        ALiBi",
    ]
    last = " ".join(" ".join(lines[away + 4 :]).split())
    assert last == (
        "approximate: only with allow_approximate; only where it is named; "
        "tested against its documentation, not on hardware"
    )


def kernel_of(text: str) -> str | None:
    (site,) = json.loads(text)["sites"]
    return site["kernel"]


@pytest.mark.usefixtures("folder", "fresh_dynamo")
def test_kernels_and_policies_are_given_on_the_command_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNPASS_KERNEL", "keep")
    Path("policy.json").write_text('{"kernel": "native"}')
    for command in (["audit", "model.pt2"], ["audit", "factories:attention"], ["rewrite", "model.pt2", "out.pt2"]):
        assert cli.main([*command, "--json"]) == 1
        assert kernel_of(capsys.readouterr().out) is None
        for options in (
            ["--kernel", "flash_attention_3,sdpa"],
            ["--policy", "policy.json"],
            ["--policy", '{"rules": {"*": "native"}}'],
            ["--policy", '{"kernel": "keep"}', "--kernel", "native"],
        ):
            assert cli.main([*command, "--json", *options]) == 0
            assert kernel_of(capsys.readouterr().out) == "native"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kernel", "natve"], "there is no kernel 'natve'; near are native"),
        (["--policy", "nowhere.json"], "--policy: nowhere.json cannot be read"),
        (["--policy", '{"kernl": 3}'], "--policy: unknown option 'kernl'; did you mean 'kernel'?"),
        (["--policy", '{"kernel": "flash_3", "strict_kernel": true}'], "strict_kernel: no kernel that was asked for"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_wrong_policy_gets_one_clear_line(options: list[str], says: str, capsys: Capture) -> None:
    assert says in wrong(capsys, "audit", "model.pt2", *options)
    assert says in wrong(capsys, "rewrite", "model.pt2", "out.pt2", *options)
    assert not Path("out.pt2").exists()


def test_reasons_explains_one_or_all(capsys: Capture) -> None:
    assert cli.main(["reasons", "weak_fill"]) == 0
    out = capsys.readouterr().out
    assert "weak_fill" in out
    assert "functorch" not in out
    assert cli.main(["reasons", "--json"]) == 0
    from attnpass.reasons import CATALOGUE

    assert [row["code"] for row in json.loads(capsys.readouterr().out)] == list(CATALOGUE)


@pytest.mark.usefixtures("folder")
def test_the_report_is_written_as_a_page(capsys: Capture) -> None:
    assert cli.main(["audit", "model.pt2", "--html", "report.html", "-q"]) == 0
    assert Path("report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert "nowhere/report.html cannot be written" in wrong(
        capsys, "audit", "model.pt2", "--html", "nowhere/report.html"
    )


def test_version_and_help(capsys: Capture) -> None:
    for option, text in (("--version", attnpass.__version__), ("--help", "exit status: 0 fine")):
        with pytest.raises(SystemExit) as stopped:
            cli.main([option])
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def wrong(capsys: Capture, *arguments: str) -> str:
    """Run a command that must fail: exit status 2, nothing on stdout, exactly one line on stderr."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    (line,) = err.splitlines()
    assert line.startswith("attnpass: ")
    return line


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nothing.pt2", "no such file: nothing.pt2"),
        ("nothing", "neither a .pt2 file nor package.module:factory"),
        ("a folder:with blanks", "neither a .pt2 file nor"),
        (".", "is a folder"),
        ("factories.py", "is no .pt2 file"),
        ("nowhere.at.all:f", "no module named 'nowhere'"),
        ("factories:atention", "did you mean 'attention'?"),
        ("factories:zzz", "factories has no 'zzz'"),
        ("broken:f", "needs 'a_package_that_is_nowhere', which is not installed"),
        ("lazy:f", "cannot be imported: ModuleNotFoundError: some requirement is not met"),
        ("unfinished:f", "cannot be imported: SyntaxError"),
        ("factories:constant", "not a function that returns (model, args)"),
        ("factories:raising", "failed: ValueError: no weights here (/"),
        ("factories:leaving", "failed: SystemExit: 3"),
        ("factories:a_number", "must return (model, args) or (model, args, kwargs), not int"),
        ("factories:one_thing", "not tuple of 1"),
        ("factories:bare_argument", "write (model, (x,)) for one argument"),
        ("factories:bad_keywords", "its kwargs is no dict of names"),
        ("factories:no_model", "its model is of type int"),
        ("factories:failing_model", "the model does not run on these arguments"),
    ],
)
@pytest.mark.usefixtures("folder", "fresh_dynamo")
def test_a_wrong_target_gets_one_clear_line(target: str, says: str, capsys: Capture) -> None:
    assert says in wrong(capsys, "audit", target)


def repacked(change: Callable[[str, bytes], bytes]) -> None:
    """``bad.pt2``: model.pt2 with each of its records changed."""
    with zipfile.ZipFile("model.pt2") as source, zipfile.ZipFile("bad.pt2", "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))


def half() -> None:
    data = Path("model.pt2").read_bytes()
    Path("bad.pt2").write_bytes(data[: len(data) // 2])


def newer_archive() -> None:
    repacked(lambda name, data: b"99" if name.endswith("archive_version") else data)


def newer_schema() -> None:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        model = json.loads(data)
        model["schema_version"]["major"] += 1
        return json.dumps(model).encode()

    repacked(change)


def garbled() -> None:
    repacked(lambda name, data: b"{" if name.endswith("models/model.json") else data)


def script() -> None:
    Path("bad.pt2").write_bytes(b"")
    with zipfile.ZipFile("bad.pt2", "w") as archive:  # what torch.jit.save writes, as far as we look
        archive.writestr("bad/code/__torch__.py", "")
        archive.writestr("bad/data.pkl", "")


def aot_inductor() -> None:
    with zipfile.ZipFile("bad.pt2", "w") as archive:  # what aoti_compile_and_package writes, as far as we look
        archive.writestr("bad/archive_format", "pt2")
        archive.writestr("bad/data/aotinductor/model/model.so", "")


def other_zip() -> None:
    with zipfile.ZipFile("bad.pt2", "w") as archive:
        archive.writestr("readme.txt", "")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (half, "or only part of one"),
        (lambda: Path("bad.pt2").write_text("text"), "is no .pt2 file"),
        (lambda: torch.save({"w": torch.ones(1)}, "bad.pt2"), "was written by torch.save"),
        (script, "is a TorchScript file"),
        (aot_inductor, "is compiled by AOTInductor already"),
        (other_zip, "is a zip file, but no exported program"),
        (newer_archive, "another version of PyTorch"),
        (newer_schema, "another version of PyTorch"),
        (garbled, "cannot be loaded"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else None,
)
@pytest.mark.parametrize("command", [["audit"], ["rewrite"]], ids=lambda command: command[0])
def test_a_file_that_is_no_program_gets_one_clear_line(
    make: Callable[[], None], says: str, command: list[str], folder: Path, capsys: Capture
) -> None:
    make()
    output = ["out.pt2"] if command == ["rewrite"] else []
    assert says in wrong(capsys, *command, "bad.pt2", *output)
    assert not (folder / "out.pt2").exists()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("nowhere/out.pt2", "no such folder"),
        ("out.zip", "must be named *.pt2"),
        ("folder.pt2", "is a folder"),
    ],
)
def test_a_wrong_output_is_refused_before_any_work(output: str, says: str, folder: Path, capsys: Capture) -> None:
    (folder / "folder.pt2").mkdir()
    assert says in wrong(capsys, "rewrite", "there_is_no_such_file.pt2", output)


@pytest.mark.usefixtures("folder")
def test_a_model_that_does_not_export_gets_one_clear_line(capsys: Capture) -> None:
    line = wrong(capsys, "rewrite", "factories:branching", "out.pt2")
    assert "the model of factories:branching does not export" in line
    assert "torch.compile(model, backend='attnpass')" in line
    assert "only a torch.nn.Module can be exported" in wrong(capsys, "rewrite", "factories:a_function", "out.pt2")
    assert not Path("out.pt2").exists()


def test_a_write_that_fails_halfway_leaves_the_old_file(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (folder / "linear.pt2").read_bytes()
    before = set(os.listdir(folder))

    def half_save(program: object, path: str, **options: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", half_save)
    assert "linear.pt2 cannot be written: OSError: [Errno 28]" in wrong(capsys, "rewrite", "model.pt2", "linear.pt2")
    assert (folder / "linear.pt2").read_bytes() == old
    assert set(os.listdir(folder)) == before


@pytest.mark.usefixtures("folder")
def test_a_defect_of_ours_is_one_line_too(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(cli_files, "load", broken)
    assert "unexpected ZeroDivisionError: oh" in wrong(capsys, "audit", "model.pt2")


def test_an_unknown_reason_gets_a_suggestion(capsys: Capture) -> None:
    assert "did you mean 'weak_fill'?" in wrong(capsys, "reasons", "weakfill")
    assert "lists them" in wrong(capsys, "reasons", "zzzzzz")


def test_a_missing_import_gets_one_clear_line(capsys: Capture) -> None:
    assert "--import nowhere failed" in wrong(capsys, "audit", "model.pt2", "--import", "nowhere")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["audit"], ["rewrite", "one.pt2"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


# -- as a process ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "attnpass", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.usefixtures("folder")
def test_the_factory_is_found_in_the_current_folder() -> None:
    done = run("audit", "factories:attention", "--json")
    assert (done.returncode, done.stderr) == (0, "a factory may print\n")
    assert json.loads(done.stdout)["sites"]


@pytest.mark.usefixtures("folder")
def test_colour_and_progress_are_for_terminals_only() -> None:
    import pty

    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "attnpass", "audit", "model.pt2"]
    piped = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "\x1b" not in piped.stdout + piped.stderr
    terminal, inside = pty.openpty()
    shown = subprocess.run(command, stdout=inside, stderr=inside, env=environment)
    os.close(inside)
    text = b""
    with contextlib.suppress(OSError):  # raised at the end of what was written
        while part := os.read(terminal, 65536):
            text += part
    os.close(terminal)
    assert (piped.returncode, shown.returncode) == (0, 0)
    assert b"\x1b[" in text
    assert b"auditing" in text


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f'"{sys.executable}" -m attnpass reasons | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


# -- the demo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [demo.gpt, demo.vit, demo.llama])
def test_every_attention_of_the_demo_is_found(make: Callable[[], demo.Example]) -> None:
    if make is demo.llama:
        torchvision_stub.ensure()
        pytest.importorskip("transformers")
    with torch.no_grad():
        example = make()
        report = attnpass.audit(example.model.eval(), *example.args, **example.kwargs)
    assert report.replaced == len(report.sites) == 3
    assert report.misses == ()


def small() -> demo.Example:
    return demo.Example("small", demo.GPT(64, 16, 16, 2, 1), (torch.randint(0, 64, (1, 16)),))


def left_out() -> demo.Example:
    raise attnpass.AttnpassError("left out for a reason")


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_demo_compares_and_goes_on_without_what_is_missing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "EXAMPLES", (left_out, small))
    monkeypatch.setattr(demo, "_SECONDS", 0.0)
    monkeypatch.setattr(demo, "_has_compiler", lambda: False)
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "left out for a reason" in out
    assert "1 of 1" in out
    assert "no C++ compiler" in out
    assert cli.main(["demo", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["replaced"] == 1
    assert max(row["error"]) < 1e-4


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_demo_fails_when_a_result_is_wrong(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy() -> demo.Example:
        calls = iter(range(1000))
        return demo.Example("noisy", small().model, small().args, result=lambda out: out + next(calls))

    monkeypatch.setattr(demo, "EXAMPLES", (noisy,))
    monkeypatch.setattr(demo, "_SECONDS", 0.0)
    monkeypatch.setattr(demo, "_has_compiler", lambda: False)
    assert "results differ from eager" in wrong(capsys, "demo", "--quiet")
