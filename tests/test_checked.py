"""What `attnpass.verify` looks at before anything reads a new result: shape, dtype, and strides that show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnpass.errors import Refuse
from attnpass.graph import Builder, State, fake_mode_of, tensor
from attnpass.verify import checked

aten = torch.ops.aten


def replaced(
    write: Callable[[Builder, Node], Node], read: Callable[[torch.Tensor], torch.Tensor] = lambda y: y
) -> Node:
    """What is offered in place of ``x.relu()``, which is read so, if it is taken."""
    traced = make_fx(lambda x: read(x.relu()), tracing_mode="fake", pre_dispatch=True)
    graph: Graph = traced(torch.randn(4, 6)).graph
    (x,), (old,) = graph.find_nodes(op="placeholder"), graph.find_nodes(op="call_function", target=aten.relu.default)
    b = Builder(graph, old, mode=fake_mode_of(graph), state=State(), like=old)
    return checked(b, old, write(b, x))


def test_the_same_in_other_words_is_taken() -> None:
    new = replaced(lambda b, x: b.call(aten.clamp_min.default, x, 0))
    assert new.target == aten.clamp_min.default


def test_another_dtype_is_refused() -> None:
    with pytest.raises(Refuse) as refused:
        replaced(lambda b, x: b.call(aten.to.dtype, x, torch.float64))
    assert refused.value.code == "verify_failed"
    assert "float64" in refused.value.details["detail"]


def test_another_shape_is_refused() -> None:
    with pytest.raises(Refuse) as refused:
        replaced(lambda b, x: b.call(aten.transpose.int, x, 0, 1))
    assert refused.value.code == "verify_failed"
    assert "shape" in refused.value.details["detail"]


def columns_innermost(b: Builder, x: Node) -> Node:
    return b.call(aten.t.default, b.call(aten.contiguous.default, b.call(aten.t.default, x)))


def test_strides_that_nobody_sees_may_be_others() -> None:
    new = tensor(replaced(columns_innermost, lambda y: y.sum()))
    assert new is not None
    assert new.stride() == (1, 4)


def written_through_a_reshape(y: torch.Tensor) -> torch.Tensor:
    y.reshape(-1).mul_(2.0)  # a view of y only as long as y is contiguous
    return y.sum()


def test_what_is_written_through_what_may_be_a_copy_keeps_its_strides() -> None:
    new = tensor(replaced(columns_innermost, written_through_a_reshape))
    assert new is not None
    assert new.stride() == (6, 1)


def test_strides_that_leave_the_graph_are_made_those_of_the_original() -> None:
    new = tensor(replaced(columns_innermost))
    assert new is not None
    assert new.stride() == (6, 1)
    assert new.shape == (4, 6)
