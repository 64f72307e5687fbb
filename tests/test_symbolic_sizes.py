"""Sizes that are equal only because a guard says so: the pass asks torch nothing that would need another guard.

A bias that is cut to the number of keys, ``bias[..., max(0, 64 - keys):]``, has a size of its own,
64 - Max(0, 64 - keys), and a guard from the addition that makes it the number of keys.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

import attnpass
from attnpass.capture.dynamo import backend
from attnpass.capture.template import no_new_guards
from attnpass.graph import Builder, State, no_new_condition, value

aten = torch.ops.aten

LONGEST, BATCH, HEADS, WIDTH = 64, 2, 4, 16


class CutBias(nn.Module):
    """Attention over a cache and what is new, beside a bias that is cut to length."""

    def __init__(self, lead: tuple[int, ...], cut: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.cut = cut
        self.bias = nn.Buffer(torch.randn(*lead, 1, LONGEST, dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
        k, v = torch.cat([past, k], -2), torch.cat([past, v], -2)
        return torch.softmax(q @ k.mT / 4 + self.cut(self.bias, k.shape[-2]), -1) @ v


def last(bias: Tensor, keys: int) -> Tensor:
    return bias[..., max(0, LONGEST - keys) :]


def first(bias: Tensor, keys: int) -> Tensor:
    return bias[..., :keys]


# the leading dimensions of scores and of the bias: one of size one goes, merged ones are split, several become one
LEADS = {
    "heads": ((BATCH, HEADS), (HEADS,)),
    "heads in the batch": ((BATCH * HEADS,), (BATCH * HEADS,)),
    "two batch dimensions": ((BATCH, 3, HEADS), (BATCH, 3, HEADS)),
    "one of two batch dimensions": ((BATCH, 3, HEADS), (3, HEADS)),
}
# where dimensions become one torch asks whether what was cut off has the strides of a whole
NEEDS_A_GUARD = {("two batch dimensions", "last"), ("one of two batch dimensions", "last")}


@pytest.mark.parametrize("cut", [last, first])
@pytest.mark.parametrize("lead", LEADS)
def test_a_bias_cut_to_the_number_of_keys(lead: str, cut: Callable[[Tensor, int], Tensor]) -> None:
    outer, own = LEADS[lead]
    torch._dynamo.reset()
    attnpass.reset()
    model = CutBias(own, cut)
    compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
    for new, cached in ((5, 6), (7, 9)):
        q, k, v = torch.randn(3, *outer, new, WIDTH, dtype=torch.float64)
        past = torch.randn(*outer, cached, WIDTH, dtype=torch.float64)
        for tensor in (q, k, v, past):
            torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
        torch.testing.assert_close(compiled(q, k, v, past), model(q, k, v, past))
    (site,) = attnpass.report().sites  # one graph for both
    needed = "new_condition" if (lead, cut.__name__) in NEEDS_A_GUARD else None
    assert (site.reason.code if site.reason else None) == needed


@pytest.mark.parametrize("cut", [last, first])
@pytest.mark.parametrize("lead", LEADS)
def test_the_same_in_an_exported_program(lead: str, cut: Callable[[Tensor, int], Tensor]) -> None:
    outer, own = LEADS[lead]
    model = CutBias(own, cut)
    length = {len(outer): torch.export.Dim.DYNAMIC}

    def inputs(new: int, cached: int) -> tuple[Tensor, ...]:
        q, k, v = torch.randn(3, *outer, new, WIDTH, dtype=torch.float64)
        return q, k, v, torch.randn(*outer, cached, WIDTH, dtype=torch.float64)

    program = torch.export.export(model, inputs(5, 6), dynamic_shapes=(length,) * 4)
    rewritten, report = attnpass.rewrite(program)
    again = inputs(7, 9)
    torch.testing.assert_close(rewritten.module()(*again), model(*again))
    (site,) = report.sites
    assert site.replaced, site.reason
    assert not report.failures


def test_what_a_call_asked_for_before_it_failed_is_forgotten() -> None:
    """Another kernel is taken then; torch 2.11 tells of such conditions by a count for the whole graph."""
    env = ShapeEnv()

    def fails() -> None:
        env.counter["ignored_backward_guard"] += 2
        raise ValueError("this one will not do")

    with pytest.raises(ValueError, match="will not do"), no_new_condition(env):
        fails()
    assert not env.counter["ignored_backward_guard"]


def test_nothing_is_asked_only_to_keep_a_fake_result() -> None:
    """A mask padded to whole rows of eight, as the memory-efficient kernel of CUDA takes it: whether its strides are
    those of channels last depends on the length, and torch asks that of what it keeps.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = Graph()
    mask = graph.placeholder("mask")
    mask.meta["val"] = mode.from_tensor(torch.zeros(1, 1, 5, 7))
    b = Builder(graph, graph.output(mask), mode=mode, state=State(), like=mask)
    with no_new_guards(mode.shape_env):
        keys = b.size(mask, -1)
        over = b.call(operator.sub, 8, b.call(operator.mod, keys, 8))
        padded = b.call(aten.constant_pad_nd.default, mask, [0, over])
        rows = b.call(aten.slice.Tensor, padded, -1, 0, keys)
    assert statically_known_true(value(rows).shape[-1] == value(mask).shape[-1])
