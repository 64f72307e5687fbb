"""Writes: what a reader sees, what is unchanged, what is still needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnpass.errors import Refuse
from attnpass.recognize.ops import op_name
from attnpass.recognize.purity import Effects


def trace(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Graph:
    return make_fx(function, pre_dispatch=True)(*(torch.zeros(shape) for shape in shapes)).graph


def named(graph: Graph, name: str, index: int = 0) -> Node:
    return [node for node in graph.nodes if op_name(node) == name][index]


def test_a_whole_in_place_write_is_what_a_later_reader_of_the_old_name_sees() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        s = x * 2
        s.add_(1)
        return torch.exp(s)

    graph = trace(program, (3,))
    effects = Effects(graph)
    s, reader = named(graph, "mul"), named(graph, "exp")
    assert effects.value_at(s, reader) is named(graph, "add")


def test_a_write_through_a_slice_leaves_a_value_that_no_node_has() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        s = x * 2
        s[1:] = 7
        return torch.exp(s)

    graph = trace(program, (3,))
    effects = Effects(graph)
    with pytest.raises(Refuse) as caught:
        effects.value_at(named(graph, "mul"), named(graph, "exp"))
    assert caught.value.code == "mutated"


def test_a_write_to_the_base_is_seen_through_an_older_view() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        s = x * 2
        v = s.view(-1)
        s.add_(1)
        return torch.exp(v)

    graph = trace(program, (3, 2))
    with pytest.raises(Refuse):
        Effects(graph).value_at(named(graph, "view"), named(graph, "exp"))


def test_a_write_after_the_reader_does_not_matter() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        s = x * 2
        y = torch.exp(s)
        s.add_(1)
        return y + s

    graph = trace(program, (3,))
    effects = Effects(graph)
    assert effects.value_at(named(graph, "mul"), named(graph, "exp")) is named(graph, "mul")


def test_a_tensor_written_between_two_places_is_not_unchanged() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        q = x * 2
        y = torch.exp(q)
        q.add_(1)
        return y + torch.sin(q)

    graph = trace(program, (3,))
    effects = Effects(graph)
    at = effects.position
    q = named(graph, "mul")
    assert effects.unchanged(q, at[q], at[named(graph, "exp")])
    assert not effects.unchanged(q, at[q], at[named(graph, "sin")])


def test_a_write_to_one_input_may_be_a_write_to_another() -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = torch.exp(x)
        y.add_(1)
        return a + x

    graph = trace(program, (3,), (3,))
    effects = Effects(graph)
    x = next(node for node in graph.nodes if node.op == "placeholder")
    last = named(graph, "add", -1)
    assert not effects.unchanged(x, effects.position[x], effects.position[last])


def test_the_dropped_result_of_an_in_place_call_is_live_when_its_tensor_is_read() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        s = x * 2
        s.masked_fill_(x > 0, -1.0)
        return torch.exp(s)

    graph = trace(program, (3,))
    assert named(graph, "masked_fill") in Effects(graph).live()


def test_a_write_that_nobody_reads_is_not_live() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        s = x * 2
        s.add_(1)
        return torch.exp(x)

    graph = trace(program, (3,))
    assert named(graph, "add") not in Effects(graph).live()


def test_a_write_to_an_input_is_live() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(x)
        x.add_(1)
        return y

    graph = trace(program, (3,))
    assert named(graph, "add") in Effects(graph).live()
