"""Tracing a function that makes a mask, and analysing what it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import Node

from attnpass.masks import MaskProof, Masks

Make = Callable[..., Tensor]
BATCH, HEADS = 3, 2


@dataclass(frozen=True)
class Traced:
    """An exported function of tensors whose result is a mask."""

    program: ExportedProgram
    masks: Masks

    @property
    def results(self) -> tuple[Node, ...]:
        output = next(n for n in self.program.graph.nodes if n.op == "output")
        return tuple(output.args[0])

    @property
    def result(self) -> Node:
        return self.results[0]


class _Module(nn.Module):
    def __init__(self, make: Make, buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.make = make
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Tensor:
        held = dict(self.named_buffers())
        return self.make(*inputs, **held)


def traced(make: Make, *inputs: Tensor, dynamic: Any = None, **buffers: Tensor) -> Traced:
    """torch.export of a function; `dynamic` as dynamic_shapes of its inputs."""
    shapes = None if dynamic is None else (tuple(dynamic),)
    program = export(_Module(make, buffers), inputs, dynamic_shapes=shapes, strict=False)
    return Traced(program, Masks(program.graph, constants=constants(program)))


def constants(program: ExportedProgram) -> dict[str, Tensor]:
    """The tensors that are part of the program's text, by the name of their node."""
    signature = program.graph_signature
    return {
        name: program.constants[target]
        for name, target in signature.inputs_to_lifted_tensor_constants.items()
        if isinstance(program.constants.get(target), Tensor)
    }


def analyse(t: Traced, node: Node | None = None, *, heads: int = HEADS, batch: Any = None) -> MaskProof:
    """The proof of a traced mask whose last dimensions are those of the scores."""
    node = node or t.result
    val = node.meta["val"]
    shape = list(val.shape)
    given = [batch if batch is not None else BATCH, heads, *shape[-2:]]
    for at, size in enumerate(shape[-4:-2]):
        if not (isinstance(size, int) and size == 1):
            given[at + 2 - len(shape[-4:-2])] = size
    frame = t.masks.frame(*given)
    off = False if val.dtype == torch.bool else None
    return t.masks.analyse([t.masks.term(node, frame, off=off)], frame)


def square(make: Make, length: int = 12, *, dynamic: bool = False, **options: Any) -> MaskProof:
    """The proof of make(x, S) where x is (BATCH, S) floats."""
    x = torch.zeros(BATCH, length)
    shapes = ({1: Dim("S", min=8, max=1 << 20)},) if dynamic else None
    return analyse(traced(lambda x: make(x, x.shape[1]), x, dynamic=shapes), **options)


def oblong(make: Make, queries: int = 5, keys: int = 12, *, dynamic: bool = False, **options: Any) -> MaskProof:
    """The proof of make(x, y, Sq, Sk) where x is (BATCH, Sq) and y (BATCH, Sk)."""
    x, y = torch.zeros(BATCH, queries), torch.zeros(BATCH, keys)
    q, k = Dim("Q", min=4, max=1 << 20), Dim("K", min=4, max=1 << 20)
    shapes = ({1: q}, {1: k}) if dynamic else None
    return analyse(traced(lambda x, y: make(x, y, x.shape[1], y.shape[1]), x, y, dynamic=shapes), **options)


class Table:
    """Many masks of (x, S) traced together: one export instead of one for each."""

    def __init__(self, makes: dict[str, Make], *, length: int = 12, dynamic: bool, x: Tensor | None = None) -> None:
        self.names = list(makes)
        x = torch.zeros(BATCH, length) if x is None else x
        shapes = ({1: Dim("S", min=8, max=1 << 20)},) if dynamic else None

        def run(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(make(x, x.shape[1]) for make in makes.values())

        self.traced = traced(run, x, dynamic=shapes)

    def node(self, name: str) -> Node:
        return self.traced.results[self.names.index(name)]

    def proof(self, name: str) -> MaskProof:
        return analyse(self.traced, self.node(name))
