"""Kernels of other packages, which name them as entry points of the group ``attnpass.kernels``.

    [project.entry-points."attnpass.kernels"]
    mine = "my_package.attention:Mine"          a Kernel, its class, or a function that makes one

They are imported when kernels are first listed. One that cannot be is listed as a kernel that is not available, with
what went wrong, and a warning says so once; the others are not affected.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

from torch.fx import Node

from attnpass.errors import first_line
from attnpass.graph import Builder
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.warn import warned

GROUP = "attnpass.kernels"


class Broken(Kernel):
    """Stands for a kernel that could not be loaded."""

    can = Capabilities()

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why

    def available(self) -> Reason | None:
        return reason("unavailable", detail=self.why)

    def emit(self, b: Builder, call: Call) -> Node:
        raise NotImplementedError(self.why)  # it is not available, so it is never asked


def found() -> Iterator[Kernel]:
    """One kernel for each entry point."""
    for point in entry_points(group=GROUP):
        try:
            yield _loaded(point)
        except Exception as error:  # whatever importing other people's code may raise
            why = f"its entry point {point.value!r} failed: {first_line(error)}"
            warned(f"the kernel {point.name!r} was left out; {why}")
            yield Broken(point.name, why)


def _loaded(point: EntryPoint) -> Kernel:
    made = point.load()
    kernel = made if isinstance(made, Kernel) else made()
    if not isinstance(kernel, Kernel):
        raise TypeError(f"{point.value} gives {type(kernel).__name__}, not an attnpass.Kernel")
    return kernel
