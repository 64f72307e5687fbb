"""Readers of a form: which they are, and that they get a stand-in only where the scores go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

import attnpass
from attnpass.capture.exported import audit
from attnpass.shape_readers import data_inputs, reads_shape_only
from tests.recognize.test_purity import named, trace
from tests.zoo.case import Plain, qkv


def test_the_form_argument_is_told_from_those_that_are_read() -> None:
    graph = trace(lambda x, y: (torch.ones_like(x), x.expand_as(y), x + y), (3,), (2, 3))
    x, y = (node for node in graph.nodes if node.op == "placeholder")
    assert data_inputs(named(graph, "ones_like")) == []
    assert data_inputs(named(graph, "expand_as")) == [x]
    assert set(data_inputs(named(graph, "add"))) == {x, y}
    assert reads_shape_only(named(graph, "expand_as"), {y})
    assert not reads_shape_only(named(graph, "expand_as"), {x, y})


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    off = torch.ones_like(scores).cumsum(-1) > 3
    return scores.masked_fill(off, -torch.inf).softmax(-1) @ v


def exported(module: nn.Module, **dynamic: object) -> ExportedProgram:
    return torch.export.export(module, qkv(), **dynamic)  # type: ignore[arg-type]


def calls(program: ExportedProgram, name: str) -> list[Node]:
    return [node for node in program.graph.nodes if name in str(node.target)]


def test_the_scores_are_not_computed_for_their_form() -> None:
    after, report = attnpass.rewrite(exported(Plain(masked)))
    assert report.replaced == 1
    assert not calls(after, "matmul")
    assert all(node.users for node in after.graph.nodes if node.op == "call_function")


def test_an_audit_leaves_no_stand_in_behind() -> None:
    program = exported(Plain(masked))
    before = program.graph_module.code
    assert audit(program).sites[0].replaced
    assert program.graph_module.code == before


def test_symbolic_sizes_are_said_by_those_of_the_keys() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.mT).softmax(-1)
        return p @ v, torch.ones_like(p)

    length = Dim("length", min=2, max=64)
    program = exported(Plain(padded), dynamic_shapes={"args": ({}, {2: length}, {2: length})})
    after, report = attnpass.rewrite(program)
    assert report.replaced == 1
    (ones,) = calls(after, "ones_like")
    inputs = tuple(torch.cat((x, x), 2) if at else x for at, x in enumerate(qkv()))
    torch.testing.assert_close(after.module()(*inputs), program.module()(*inputs))
    assert not calls(after, "softmax")
    assert ones.users


@pytest.mark.parametrize("name", ["rand_like", "randn_like"])
def test_random_numbers_of_a_form_keep_the_scores(name: str) -> None:
    def noisy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores + getattr(torch, name)(scores)).softmax(-1) @ v

    report = attnpass.rewrite(exported(Plain(noisy)))[1]
    assert report.replaced == 0
    assert report.sites[0].reason is not None
    assert report.sites[0].reason.code == "weights_used"
