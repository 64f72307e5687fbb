"""What compiled code that calls our operations depends on, for the keys of caches.

Inductor and AOTAutograd keep compiled graphs on disk. Such a graph calls ``attnpass::...`` by name, but holds the
strides that our fakes promised and the backward that we registered when it was compiled: code of another version of
this package must not be run by it. The text of our kernels and operations is that version; a number that somebody has
to remember to raise would not be.

Packages of vendors need not be in it: our operations import them when they run, and what they can do was asked when the
graph was made, which is the key itself.
"""

from __future__ import annotations

import functools
import hashlib
from importlib import resources


@functools.cache
def identity() -> str:
    """Version of the package and a digest of this folder's sources; the version alone where there are none."""
    import attnpass

    digest = hashlib.sha256()
    for file in sorted(resources.files(__package__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{attnpass.__version__} {digest.hexdigest()[:16]}"
