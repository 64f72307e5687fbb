"""Running a mask's own operations at the traced sizes, to compare with what was proved.

Only the operations between the mask and its opaque tensors are run, on the CPU, with real tensors: sizes are those of
the trace, opaque tensors are filled with small random values. This is no proof (it sees one size) but it would expose a
wrong rule; a disagreement withdraws the claim.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch._C._functorch import _vmap_decrement_nesting
from torch.fx import Node
from torch.fx.node import map_arg

from attnpass.masks.sizes import Sizes
from attnpass.masks.writes import VMAP, Writes
from attnpass.shape_readers import data_inputs

MAX_ELEMENTS = 4 << 20
_SKIPPED = {"_assert_tensor_metadata", "sym_constrain_range_for_size", "_assert_scalar", "_assert_async"}


class NotRun(Exception):
    """Why the operations were not run."""


class Replay:
    """Real values of some nodes of a graph at its traced sizes."""

    def __init__(
        self, writes: Writes, sizes: Sizes, opaque: Collection[str], constants: Mapping[str, torch.Tensor]
    ) -> None:
        self.writes = writes
        self.constants = constants
        self.sizes = sizes
        self.opaque = opaque
        self.values: dict[Node, Any] = {}
        self._random = torch.Generator().manual_seed(0)

    def run(self, targets: Collection[Node], when: int) -> None:
        """Compute these nodes, and everything that writes what they read before position `when`."""
        needed: set[Node] = set()
        work = list(targets)
        while work:
            node = work.pop()
            if node in needed:
                continue
            needed.add(node)
            if self._is_source(node):
                continue
            work.extend(data_inputs(node))
            work.extend(w for w in self.writes.to(node) if self.writes.position[w] < when)
        if any(_of_vmap(node) for node in needed):
            borders = [node for node in self.writes.position if _nesting(node)]  # nothing reads them
            needed.update(borders, *(node.all_input_nodes for node in borders))
        depth = 0
        try:
            for node in sorted(needed, key=self.writes.position.__getitem__):
                if node not in self.values:
                    self.values[node] = self._value(node)
                    depth += _nesting(node)
        finally:
            for _ in range(depth):  # only after an exception
                _vmap_decrement_nesting()

    def _is_source(self, node: Node) -> bool:
        return node.op != "call_function" or node.name in self.opaque or self._number(node) is not None

    def _number(self, node: Node) -> int | None:
        val = node.meta.get("val")
        if not isinstance(val, torch.SymInt | int) or isinstance(val, bool):
            return None
        number = self.sizes.at_hint(self.sizes.poly(val))
        if number is None:
            raise NotRun("a size without a traced value")
        return number

    def _value(self, node: Node) -> Any:
        number = self._number(node)
        if number is not None:
            return number
        if self._is_source(node):
            return self._filled(node)
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) and not (target is operator.getitem or _of_vmap(node)):
            raise NotRun(f"{target}")
        if target in _asserts():
            return None
        for val in _flat(node.meta.get("val")):
            self._shape(val)
        args = map_arg(node.args, self._read)
        kwargs = {key: map_arg(arg, self._read) for key, arg in node.kwargs.items()}
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        with torch.no_grad():
            return target(*args, **kwargs)  # type: ignore[operator]

    def _read(self, node: Node) -> Any:
        if node in self.values:
            return self.values[node]
        val = node.meta["val"]  # of what is not computed only the form is read
        return torch.zeros((), dtype=val.dtype).expand(self._shape(val))

    def _filled(self, node: Node) -> Any:
        """A constant of the program, or small random values: 0 and 1 where integers are expected."""
        if node.name in self.constants:
            constant = self.constants[node.name]
            if constant.numel() > MAX_ELEMENTS:
                raise NotRun(f"{constant.numel()} elements")
            return constant.detach().cpu().clone()
        module = node.graph.owning_module
        if node.op == "get_attr" and module is not None:
            held = getattr(module, str(node.target), None)
            if isinstance(held, torch.Tensor) and not isinstance(held, torch._subclasses.FakeTensor):
                self._shape(held)  # not a copy of what is too large to be looked at
                return held.detach().cpu().clone()
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            raise NotRun(f"{node.name} is no tensor")
        shape = self._shape(val)
        if val.dtype.is_floating_point:
            return torch.randn(shape, generator=self._random).to(val.dtype)
        if val.dtype.is_complex:
            raise NotRun("complex")
        return torch.randint(0, 2, shape, generator=self._random).to(val.dtype)

    def _shape(self, val: torch.Tensor) -> list[int]:
        shape: list[int] = []
        total = 1
        for size in val.shape:
            number = self.sizes.at_hint(self.sizes.poly(size))
            if number is None:
                raise NotRun("a size without a traced value")
            shape.append(number)
            total *= number
        if total > MAX_ELEMENTS:
            raise NotRun(f"{total} elements")
        return shape


def _of_vmap(node: Node) -> bool:
    return getattr(node.target, "__module__", "") == VMAP


def _nesting(node: Node) -> int:
    name = getattr(node.target, "__name__", "")
    return {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}.get(name, 0)


def _flat(val: Any) -> list[torch.Tensor]:
    if isinstance(val, torch.Tensor):
        return [val]
    return [v for v in val if isinstance(v, torch.Tensor)] if isinstance(val, tuple | list) else []


@cache
def _asserts() -> set[Any]:
    aten = torch.ops.aten
    return {overload for name in _SKIPPED for overload in _overloads(getattr(aten, name, None))}


def _overloads(packet: Any) -> list[Any]:
    return [] if packet is None else [getattr(packet, name) for name in packet.overloads()]


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements of two broadcastable tensors differ; NaN is equal to itself."""
    if a.shape != b.shape:
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    if a.dtype == torch.bool or b.dtype == torch.bool:
        return int((a.bool() != b.bool()).sum())
    a, b = a.double(), b.double()
    return int(((a != b) & ~(a.isnan() & b.isnan())).sum())
