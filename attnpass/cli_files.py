"""What the command line reads and writes: models made by a factory, and ``.pt2`` files.

    package.module:factory ── import, call, check ── model, args, kwargs
    model.pt2              ── look inside before torch does ── ExportedProgram
    ExportedProgram        ── saved beside its place, then moved there ── out.pt2

Every failure is an AttnpassError whose text is one clear line.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import logging
import os
import struct
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attnpass.cli_pickles import only_tensors, refused, safely
from attnpass.errors import AttnpassError
from attnpass.files import write_whole

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FACTORY_FORM = "package.module:factory"


def is_factory(target: str) -> bool:
    """``package.module:factory`` rather than the path of a file."""
    module, colon, name = target.partition(":")
    looks_like_code = all(part.isidentifier() for part in [*module.split("."), *name.split(".")])
    return bool(colon) and looks_like_code and not os.path.exists(target)


def first_line(error: BaseException) -> str:
    """``ValueError: what went wrong``, on one line however long the text is."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(error: BaseException) -> str:
    """`` (file.py:12)``: the innermost line of the traceback that is neither torch's nor ours."""
    skip = (os.path.dirname(__file__) + os.sep, f"{os.sep}site-packages{os.sep}torch{os.sep}", "<frozen ")
    trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in trace if not any(part in frame.filename for part in skip)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


# -- factories ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What a factory returned."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def make(target: str) -> Made:
    """Import and call a factory; the current folder is looked in first, as ``python -m`` does."""
    module_name, _, name = target.partition(":")
    factory = _attribute(_module(module_name), name, target)
    if not callable(factory):
        raise AttnpassError(f"{target} is of type {type(factory).__name__}, not a function that returns (model, args)")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise AttnpassError(f"{target} failed: {first_line(error)}{place(error)}") from error
    return _checked(made, target)


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None  # whoever raises it may name none
        if missing is not None and (name == missing or name.startswith(missing + ".")):
            raise AttnpassError(
                f"no module named {missing!r}; run this in the folder that holds it, or install it"
            ) from error
        if missing is not None:
            raise AttnpassError(f"module {name!r} needs {missing!r}, which is not installed{place(error)}") from error
        raise AttnpassError(f"module {name!r} cannot be imported: {first_line(error)}{place(error)}") from error


def _attribute(module: ModuleType, name: str, target: str) -> Any:
    held: Any = module
    for part in name.split("."):
        try:
            held = getattr(held, part)
        except AttributeError:
            near = difflib.get_close_matches(part, [key for key in dir(held) if not key.startswith("_")], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AttnpassError(f"{target.partition(':')[0]} has no {name!r}{hint}") from None
    return held


def _checked(made: Any, target: str) -> Made:
    wanted = f"{target} must return (model, args) or (model, args, kwargs)"
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise AttnpassError(f"{wanted}, not {type(made).__name__}{size}")
    model, args, kwargs = made if len(made) == 3 else (*made, {})
    if not callable(model):
        raise AttnpassError(f"{wanted}; its model is of type {type(model).__name__}, which cannot be called")
    if not isinstance(args, tuple | list):
        kind = type(args).__name__
        raise AttnpassError(f"{wanted}; its args is of type {kind}, write (model, (x,)) for one argument")
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise AttnpassError(f"{wanted}; its kwargs is no dict of names")
    return Made(model, tuple(args), kwargs)


def export(made: Made, target: str) -> ExportedProgram:
    """The model of a factory as an ExportedProgram."""
    import torch

    if not isinstance(made.model, torch.nn.Module):
        raise AttnpassError(f"{target} returns {type(made.model).__name__}; only a torch.nn.Module can be exported")
    try:
        # a failing export prints the graph so far, which belongs to no result
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return torch.export.export(made.model, made.args, made.kwargs)
    except Exception as error:
        raise AttnpassError(
            f"the model of {target} does not export: {first_line(error)}; "
            "torch.export.draft_export(model, args) tells what stands in the way, "
            "torch.compile(model, backend='attnpass') needs no export"
        ) from error


# -- .pt2 files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """An exported program and the other files that were saved with it."""

    program: ExportedProgram
    extra: dict[str, Any] = field(default_factory=dict)


def load(path: str) -> Loaded:
    """An ExportedProgram from a file that ``torch.export.save`` wrote."""
    _look_inside(path)
    import torch

    extra: dict[str, Any] = {"": None}  # torch fills it with all there is, unless it is empty
    causes: list[BaseException] = []
    try:
        with _overheard(causes), safely():
            program = torch.export.load(path, extra_files=extra)
        del extra[""]
        return Loaded(program, extra)
    except Exception as error:
        raise AttnpassError(_why_not_loaded(path, causes[0] if causes else error)) from error


def _look_inside(path: str) -> None:
    """Say what a file is that is no exported program; torch's own answers do not."""
    again = "save the program again with torch.export.save(program, path)"
    if not os.path.exists(path):
        raise AttnpassError(f"no such file: {path}")
    if os.path.isdir(path):
        raise AttnpassError(f"{path} is a folder; give the .pt2 file itself")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            only_tensors(path, archive)
    except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, UnicodeDecodeError):
        raise AttnpassError(f"{path} is no .pt2 file, or only part of one; {again}") from None
    except OSError as error:
        raise AttnpassError(f"{path} cannot be read: {error.strerror}") from error
    inside = {name.partition("/")[2] for name in names}
    if any(name.startswith("models/") for name in inside) or "version" in names:
        return
    if any(name.startswith("data/aotinductor/") for name in inside):
        raise AttnpassError(f"{path} is compiled by AOTInductor already; rewrite the exported program it was made from")
    if any(name.startswith("code/") for name in inside):
        raise AttnpassError(f"{path} is a TorchScript file; export the model with torch.export and {again}")
    if "data.pkl" in inside:
        raise AttnpassError(f"{path} was written by torch.save and holds no program; {again}")
    raise AttnpassError(f"{path} is a zip file, but no exported program; {again}")


@contextlib.contextmanager
def _overheard(causes: list[BaseException]) -> Iterator[None]:
    """torch.export.load logs the real error and raises another: keep the first, print neither."""

    class Listener(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if record.exc_info and record.exc_info[1] is not None:
                causes.append(record.exc_info[1])
            return False

    log, listener = logging.getLogger("torch.export"), Listener()
    level = log.level
    log.addFilter(listener)
    log.setLevel(logging.WARNING)  # whatever the level of the loggers above it: nothing passes the listener
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeFilter(listener)


def _why_not_loaded(path: str, error: BaseException) -> str:
    import torch

    text = str(error)
    unsafe = refused(path, error)
    if unsafe is not None:
        return unsafe
    if "failed to resolve" in text:
        op = text.partition("failed to resolve ")[2].split(" ")[0]
        return f"{path} uses {op}, which is not registered here; name the package that defines it with --import"
    if "version" in text and "does not match" in text:
        return (
            f"{path} was saved by another version of PyTorch than {torch.__version__} and cannot be read by it; "
            "save it again with this one, or run attnpass with that one"
        )
    if isinstance(error, KeyError):
        return f"{path} holds no program named 'model'; save one program a file with torch.export.save"
    return f"{path} cannot be loaded: {first_line(error)}"


def check_output(path: str) -> None:
    """Complain about a place that cannot be written to before any work is done."""
    out = Path(path)
    if out.suffix != ".pt2":
        raise AttnpassError(f"the output must be named *.pt2, not {path}")
    if out.is_dir():
        raise AttnpassError(f"{path} is a folder; name the file to write")
    folder = out.resolve().parent
    if not folder.is_dir():
        raise AttnpassError(f"no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        raise AttnpassError(f"{folder} cannot be written to")


def save(loaded: Loaded, path: str) -> None:
    """Write the program beside its place and move it there: `path` is what it was, or whole, never in between."""
    import torch

    out = Path(path).resolve()  # through a link: the file it names is replaced, not the link
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".attnpass-") as folder:
            # the file name becomes part of what is written, so it is the final one already
            written = os.path.join(folder, out.name)
            torch.export.save(loaded.program, written, extra_files=loaded.extra)
            os.replace(written, out)
    except Exception as error:
        raise AttnpassError(f"{path} cannot be written: {first_line(error)}") from error


def write_text(path: str, text: str) -> None:
    """Write a small file whole."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise AttnpassError(f"{path} cannot be written: {error.strerror}") from error
