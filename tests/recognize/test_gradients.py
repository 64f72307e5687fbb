"""Which values gradients flow back through, writes into memory and readers of a mere form included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from attnpass.graph import State
from attnpass.recognize.gradients import mark_gradients
from attnpass.recognize.ops import op_name
from attnpass.recognize.purity import Effects
from tests.recognize.test_purity import named, trace


def marked(function: Callable[..., Any], *learned: bool) -> Graph:
    """The program's graph; inputs that are `learned` need a gradient."""
    graph = trace(function, *((3,) for _ in learned))
    for node, grad in zip([node for node in graph.nodes if node.op == "placeholder"], learned, strict=True):
        node.meta["attnpass_grad"] = grad
    mark_gradients(graph, State(), Effects(graph))
    return graph


def flows(graph: Graph, name: str, index: int = 0) -> bool:
    return bool(named(graph, name, index).meta["attnpass_grad"])


def test_a_value_passes_its_gradient_to_what_is_computed_from_it() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.exp(), y.sin(), x.detach().cos()

    graph = marked(program, True, False)
    assert flows(graph, "exp")
    assert not flows(graph, "sin")
    assert not flows(graph, "detach")


def test_what_is_read_from_memory_after_a_write_has_the_gradient_of_what_was_written() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        memory = torch.zeros(6)
        before = memory.sin()
        memory[:3].copy_(x)
        return before, memory.exp(), y.cos()

    graph = marked(program, True, False)
    assert not flows(graph, "sin")
    assert flows(graph, "exp")
    assert not flows(graph, "cos")


def test_a_write_of_data_carries_no_gradient() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        memory = torch.zeros(3)
        memory.copy_(y)
        return memory.exp(), x.sin()

    graph = marked(program, True, False)
    assert not flows(graph, "exp")
    assert flows(graph, "sin")


def test_who_reads_only_the_form_gets_no_gradient() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(x).exp(), y.type_as(x).sin(), torch.full_like(x, 2.0).cos(), x.expand_as(y).tanh()

    graph = marked(program, True, False)
    assert not any(flows(graph, name) for name in ("exp", "sin", "cos"))
    assert flows(graph, "tanh")


def test_nothing_is_recorded_where_gradients_are_off() -> None:
    graph = trace(lambda x: x.exp().sin(), (3,))
    for node in graph.nodes:
        with contextlib.suppress(KeyError):
            node.meta["attnpass_state"] = {"exp": State(grad=False), "sin": State()}[op_name(node)]
        if node.op == "placeholder":
            node.meta["attnpass_grad"] = True
    mark_gradients(graph, State(), Effects(graph))
    assert not flows(graph, "exp")
    assert not flows(graph, "sin")
