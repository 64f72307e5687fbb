"""Files that are not what they should be, and files that nobody may find half written: what tests/test_cli.py lacks."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnpass
from attnpass import AttnpassError, ambient, autotune, cli, cli_files, files
from attnpass.capture.dynamo import backend
from tests.test_cli import Attention, qkv

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.export.save(torch.export.export(Attention(), qkv()), tmp_path / "model.pt2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def packed(change: Callable[[str, bytes], bytes | None], **more: bytes) -> None:
    """``bad.pt2``: model.pt2 with its records changed or left out, and more of them."""
    with zipfile.ZipFile("model.pt2") as source, zipfile.ZipFile("bad.pt2", "w") as target:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                target.writestr(name, data)
        top = source.namelist()[0].partition("/")[0]
        for name, data in more.items():
            target.writestr(f"{top}/{name.replace('__', '/')}", data)


def bomb_as_sample_inputs() -> None:
    torch.save((Bomb(),), "bomb.pt")
    packed(lambda name, data: Path("bomb.pt").read_bytes() if "sample_inputs" in name else data)


def plain_pickle_as_sample_inputs() -> None:
    packed(lambda name, data: pickle.dumps(Bomb()) if "sample_inputs" in name else data)


def bomb_among_the_weights() -> None:
    torch.save(Bomb(), "bomb.pt")
    entry = {"path_name": "weight_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    def change(name: str, data: bytes) -> bytes:
        return json.dumps({"config": {"w": entry}}).encode() if name.endswith("weights_config.json") else data

    packed(change, data__weights__weight_0=Path("bomb.pt").read_bytes())


def object_among_the_constants() -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    def change(name: str, data: bytes) -> bytes:
        return json.dumps({"config": {"c": entry}}).encode() if name.endswith("constants_config.json") else data

    packed(change, data__constants__opaque_obj_0=pickle.dumps(Bomb()))


def gigantic() -> None:
    with zipfile.ZipFile("bad.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bad/models/model.json", b" " * (300 << 20))


def no_model() -> None:
    packed(lambda name, data: None if name.endswith("models/model.json") else data)


def wrong_types() -> None:
    packed(lambda name, data: b'{"graph_module": 3}' if name.endswith("models/model.json") else data)


def deep() -> None:
    packed(lambda name, data: b"[" * 200_000 if name.endswith("models/model.json") else data)


def loop_of_links() -> None:
    os.symlink("bad.pt2", "bad.pt2")


def not_permitted() -> None:
    Path("bad.pt2").write_bytes(b"x")
    os.chmod("bad.pt2", 0)
    if os.access("bad.pt2", os.R_OK):
        pytest.skip("this user may read everything")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bomb_as_sample_inputs, "unpickling it may run any code"),
        (plain_pickle_as_sample_inputs, "bad.pt2"),
        (bomb_among_the_weights, "unpickling it may run any code"),
        (object_among_the_constants, "loading them may run any code"),
        (gigantic, "would unpack to 300 MB"),
        (no_model, "no exported program"),
        (wrong_types, "cannot be loaded"),
        (deep, "cannot be loaded"),
        (loop_of_links, "no such file"),
        (not_permitted, "cannot be read"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_hostile_program_gets_one_clear_line_and_nothing_runs(
    make: Callable[[], None], says: str, folder: Path, capsys: Capture
) -> None:
    make()
    before = dict(os.environ)
    assert cli.main(["audit", "bad.pt2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1
    assert err.startswith("attnpass: ")
    assert not (folder / "unpickled").exists()
    assert dict(os.environ) == before


def test_torch_alone_would_have_run_it(folder: Path) -> None:
    """That the files above are hostile is not a belief."""
    bomb_among_the_weights()
    with contextlib.suppress(Exception):
        torch.export.load("bad.pt2")
    assert (folder / "unpickled").exists()


@pytest.mark.parametrize("flag", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_settings_of_the_user_for_unpickling_neither_matter_nor_change(
    flag: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flag, "1")
    assert cli_files.load("model.pt2").program is not None
    assert os.environ[flag] == "1"
    bomb_as_sample_inputs()
    with pytest.raises(AttnpassError, match="may run any code"):
        cli_files.load("bad.pt2")
    assert not (folder / "unpickled").exists()


# -- policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"kernel": "nati', "is no JSON, or only part of it"),
        (b"", "is empty"),
        (b"\x80\x04\x95", "is no text"),
        (b"[" * 100_000, "is no policy"),
        (b'{"fuel": ' + b"9" * 5000 + b"}", "is no policy"),
        (b" " * (2 << 20), "more than 1048576 bytes"),
        (b'{"kernel": {"a": 1}}', "name of a kernel"),
        (b'{"kernel": [[]]}', "name of a kernel"),
        (b'{"rules": {"a": 3}}', "name of a kernel"),
        (b'{"rules": 3}', "option 'rules'"),
        (b'{"min_gain": NaN}', "a share below 1"),
        (b'{"min_gain": 1e999}', "a share below 1"),
        (b'{"fuel": -1}', "a number of sites"),
        (b'{"strict": "yes"}', "True or False"),
        (b'{"of_a_newer_version": 1}', "unknown option"),
        (b"[1]", "is no JSON object"),
        (b"null", "is no JSON object"),
    ],
    ids=range(17),
)
def test_a_policy_file_that_is_none(text: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(text)
    monkeypatch.setenv("ATTNPASS_POLICY", str(path))
    with pytest.raises(AttnpassError) as caught:
        ambient.resolved()
    assert says in str(caught.value)
    assert str(caught.value).startswith("ATTNPASS_POLICY: ")
    assert len(str(caught.value)) < 300


def test_a_policy_file_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/zero"):
        pytest.skip("no such device")
    with pytest.raises(AttnpassError, match="more than 1048576 bytes"):
        ambient.from_text("/dev/zero")


def test_a_policy_from_a_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"kernel": "native"}')
    os.close(writer)
    assert ambient.from_text(f"/dev/fd/{reader}") == {"kernel": "native"}
    os.close(reader)


# -- the cache of times ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[Path]:
    monkeypatch.setenv("ATTNPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_remarks", [])
    monkeypatch.setattr(autotune, "_measured", lambda *_: 5.0)
    yield tmp_path / "cache"
    attnpass.reset()


def tuned() -> None:
    torch._dynamo.reset()
    attnpass.reset()
    given = qkv()
    options = {"autotune": True, "inner": "eager"}
    torch.testing.assert_close(
        torch.compile(Attention(), backend=backend, options=options)(*given), Attention()(*given)
    )
    assert not attnpass.report().failures


def as_link(path: Path) -> None:
    outside = path.parent.parent / "precious"
    outside.write_text("precious")
    path.unlink()
    path.symlink_to(outside)


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "us": True})),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "us": 10**400})),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "us": "5"})),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "kernel": "another"})),
        lambda path: path.write_text('{"version": 2, "times": {}}'),
        lambda path: path.write_text("[" * 4000),
        lambda path: path.write_bytes(pickle.dumps(Bomb())),
        lambda path: path.write_bytes(b" " * (1 << 20) + path.read_bytes()),
        as_link,
        as_device,
        as_pipe,
    ],
    ids=[
        "cut",
        "bool",
        "huge",
        "text",
        "other kernel",
        "newer",
        "deep",
        "pickle",
        "gigantic",
        "link",
        "device",
        "pipe",
    ],
)
def test_a_file_of_times_that_is_none_is_written_anew(
    spoil: Callable[[Path], None], cache: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned()
    whole = {path.name: path.read_text() for path in cache.iterdir()}
    assert len(whole) > 1
    for path in list(cache.iterdir()):
        spoil(path)
    capsys.readouterr()
    monkeypatch.setattr(autotune, "_remarks", [])
    tuned()
    said = [line for line in capsys.readouterr().err.splitlines() if "is not used" in line]
    assert len(said) == 1, "one remark, however many files"
    assert {path.name: path.read_text() for path in cache.iterdir()} == whole
    assert not any(path.is_symlink() for path in cache.iterdir())
    if (cache.parent / "precious").exists():
        assert (cache.parent / "precious").read_text() == "precious"
    assert not (Path.cwd() / "unpickled").exists()


def test_times_are_done_without_where_there_is_no_folder_for_them(
    cache: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file")
    tuned()
    assert sum("is not" in line for line in capsys.readouterr().err.splitlines()) == 1
    assert cache.read_text() == "a file"


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_text_is_written_whole(tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    files.write_whole(out, "one")
    assert out.read_text() == "one"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    os.chmod(out, 0o640)
    link = tmp_path / "link"
    link.symlink_to(out)
    files.write_whole(link, "two")
    assert link.is_symlink()
    assert out.read_text() == "two"
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "plain", "link"}


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(AttnpassError, match="cannot be written: No space left"):
            cli_files.write_text(str(out), "new")
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(out, "half \ud800")
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_a_text_is_written_to_a_pipe(tmp_path: Path) -> None:
    code = "from attnpass.files import write_whole; write_whole('/dev/stdout', 'to a pipe')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "to a pipe", done.stderr
