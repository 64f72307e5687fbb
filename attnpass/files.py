"""Files that somebody else may have put there, and files that nobody may find half written.

read_bounded    no more than is asked for, whatever the file is
write_whole     beside its place, then moved there; on failure the old file is as it was and nothing is left
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def read_bounded(path: str | Path, limit: int) -> str:
    """The text of a file; a pipe or a device is read like a file, but never for ever. ValueError where it is longer."""
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    return data.decode()


def is_plain(path: str | Path) -> bool:
    """An ordinary file, links followed: reading it ends, and it can be replaced."""
    return stat.S_ISREG(os.stat(path).st_mode)


def write_whole(path: str | Path, text: str) -> None:
    """Replace a file by another one; a link stays, what it names is replaced; a pipe or a terminal is written to."""
    if os.path.exists(path) and not os.path.isdir(path) and not is_plain(path):
        Path(path).write_text(text, encoding="utf-8")
        return
    place = Path(path).resolve()
    number, part = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name[:100]}-", suffix=".part")
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, stat.S_IMODE(place.stat().st_mode) if place.exists() else 0o666 & ~_umask())
        os.replace(part, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _umask() -> int:
    """What files of this process are made with; it can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
