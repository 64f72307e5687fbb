"""Kernels that are wrong on purpose, so that what looks for wrong ones has something to find.

with wrong(lambda spec: spec.width == 16, scale=1.05): ...      sites of which this is true get a wrong scale
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from torch.fx import Node

import attnpass
from attnpass.graph import Builder
from attnpass.kernels.native import Native
from attnpass.site import Call
from attnpass.spec import AttentionSpec

NAME = "wrong"
Broken = Callable[[AttentionSpec], bool]


class Wrong(Native):
    """torch's own, with another scale, or without its mask, at some sites; it is expected to be fastest everywhere."""

    name = NAME

    def __init__(self, broken: Broken, *, scale: float, unmasked: bool, raises: bool) -> None:
        self.broken, self.scale, self.unmasked, self.raises = broken, scale, unmasked, raises

    def cost(self, spec: AttentionSpec) -> float:
        return 0.0

    def emit(self, b: Builder, call: Call) -> Node:
        if not self.broken(call.spec):
            return super().emit(b, call)
        if self.raises:
            return b.call(_fails, super().emit(b, call))
        assert isinstance(call.scale, float)
        call = dataclasses.replace(call, scale=call.scale * self.scale)
        if self.unmasked:
            call = dataclasses.replace(call, mask=None, causal=False)
        return super().emit(b, call)


def _fails(x: object) -> object:
    """Fine on values without content, so that it is built; it fails when it is run."""
    if type(x).__name__ != "FakeTensor":
        raise RuntimeError("no such kernel image")
    return x


@contextlib.contextmanager
def wrong(
    broken: Broken = lambda spec: True, *, scale: float = 1.0, unmasked: bool = False, raises: bool = False
) -> Iterator[None]:
    """All sites go to a kernel that is wrong where `broken` says so."""
    attnpass.register_kernel(Wrong(broken, scale=scale, unmasked=unmasked, raises=raises))
    try:
        yield
    finally:
        attnpass.unregister_kernel(NAME)
