"""Reading a program from a file without running what is in it.

``torch.export.load`` unpickles the sample inputs, the weights for which the file itself says so, and objects among the
constants; where its safe unpickler refuses it tries the one that runs any code. Of all that, attnpass needs tensors. So
here only the safe unpickler is allowed, and a file with such objects is refused: whoever trusts it can load it himself
and give the program to :func:`attnpass.rewrite`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Iterator

from attnpass.errors import AttnpassError

ADVICE = "if you trust it, load it with torch.export.load and call attnpass.rewrite(program)"
_SAFE, _UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_OBJECTS = ("/constants/custom_obj_", "/constants/opaque_obj_")  # torch's names of what is more than a tensor
_SPARE = 64 << 20  # bytes that may be packed as densely as they like: text of a graph is


def only_tensors(path: str, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that holds objects, or more than a file of its size should."""
    inside = archive.infolist()
    if any(name in f"/{entry.filename}" for entry in inside for name in _OBJECTS):
        raise AttnpassError(f"{path} holds objects besides tensors, and loading them may run any code; {ADVICE}")
    unpacked = sum(entry.file_size for entry in inside)
    if unpacked > 4 * sum(entry.compress_size for entry in inside) + _SPARE:
        raise AttnpassError(f"{path} would unpack to {unpacked >> 20} MB, which no program that torch wrote does")


@contextlib.contextmanager
def safely() -> Iterator[None]:
    """torch.load reads tensors only, also where it is asked for more."""
    before = {name: os.environ.pop(name, None) for name in (_SAFE, _UNSAFE)}
    os.environ[_SAFE] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def refused(path: str, error: BaseException) -> str | None:
    """What to say where the safe unpickler has refused."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    return f"{path} holds something that is no tensor, and unpickling it may run any code; {ADVICE}"
