"""Masks, biases and sinks as arguments of kernels: through a kernel that has every such argument and computes plainly.

It stands for flash-attn and its kind: bounds counted from the end, slopes of heads, keys switched off, a sink, a soft
cap, a log-sum-exp, and zero where a query sees no key.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import attnpass
from attnpass import choose
from attnpass.capture import frames
from attnpass.graph import Builder
from attnpass.kernels import Capabilities, Kernel
from attnpass.ledger import Decision
from attnpass.site import Call
from attnpass.spec import AttentionSpec
from tests.flex_cases import CASES, Attention, Case, grid, inputs, masked, scores, weighted
from tests.zoo.numbers import complaints, run, truth

aten = torch.ops.aten
INF = math.inf


class Plain(Kernel):
    """Every argument that there is, computed as the definition says."""

    name = "plain"
    takes = "forms"
    can = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({"float32", "float64"}),
        unlike_widths=True,
        groups=True,
        causal=True,
        window=True,
        key_padding=True,
        alibi=True,
        softcap=True,
        sink=True,
        backward=True,
    )

    def gives_lse(self, spec: AttentionSpec) -> bool:
        return True

    def emit(self, b: Builder, call: Call) -> Node:
        return self.emit_with_lse(b, call)[0]

    def emit_with_lse(self, b: Builder, call: Call) -> tuple[Node, Node]:
        given = call.forms
        assert given is not None
        pair = b.call(
            plain,
            *(call.q, call.k, call.v, given.slopes, given.keys, given.sink),
            *(call.scale, given.left, given.right, call.spec.softcap),
        )
        import operator

        return b.call(operator.getitem, pair, 0), b.call(operator.getitem, pair, 1)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    keys: Tensor | None,
    sink: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, with flash-attn's conventions."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    x = q @ k.mT * scale
    if softcap is not None:
        x = (x / softcap).tanh() * softcap
    i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2])[None]
    if slopes is not None:
        assert slopes.dtype == torch.float32
        assert slopes.shape == q.shape[1:2]
        x = x - slopes[:, None, None] * (i - j).abs()
    off = torch.zeros_like(x, dtype=torch.bool)
    off = off | (j > i + right) if right is not None else off
    off = off | (j < i - left) if left is not None else off
    off = off | ~keys if keys is not None else off
    x = x.masked_fill(off, -INF)
    if sink is not None:
        x = torch.cat([x, sink.expand(*x.shape[:3], 1)], -1)
    lse = x.logsumexp(-1)
    p = x.softmax(-1).masked_fill(lse[..., None] == -INF, 0.0)
    return p[..., : k.shape[2]].to(v.dtype) @ v, lse


class Said:
    """A function compiled with the pass, the plain kernel being the only one."""

    def __init__(self, function: Callable[..., Any], *, dynamic: bool | None = False, grad: bool = False) -> None:
        self.graphs: list[GraphModule] = []
        self.sites: list[Decision] = []
        self.compiled = torch.compile(function, backend=self._backend, fullgraph=True, dynamic=dynamic)

    def _backend(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose, "kernels", lambda: (Plain(),))
            done = frames.process(gm, example_inputs, name="graph", policy=attnpass.Policy(), rewrite=True)
        assert not done.report.failures
        assert not done.report.notes
        self.graphs.append(gm)
        self.sites += done.report.sites
        return gm.forward

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    @property
    def arguments(self) -> list[dict[str, Any]]:
        """What the kernel was given, for each site."""
        names = ("slopes", "keys", "sink", "scale", "left", "right", "softcap")
        found = [node for gm in self.graphs for node in gm.graph.nodes if node.target is plain]
        return [dict(zip(names, node.args[3:], strict=True)) for node in found]


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def held_to_float64(module: nn.Module, given: tuple[Tensor, ...], said: Said, *, grad: bool = False) -> list[str]:
    with contextlib.nullcontext() if grad else torch.no_grad():
        mine = run(module, given, call=said, grad=grad)
        return complaints(mine, run(module, given, grad=grad), truth(module, given, grad=grad))


SAID = ("cap_alone", "causal", "window", "sink", "sink_by_lse")
UNSAID = (
    "prefix", "chunks", "documents", "limits", "padded", "padded_and_capped", "padded_by_infinity", "dense_mask",
    "sink_and_slopes",
)  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in SAID], ids=lambda case: case.name)
def test_a_case_computes_the_same(case: Case, grad: bool) -> None:
    module = Attention(case)
    said = Said(module)
    assert not held_to_float64(module, inputs(grad=grad), said, grad=grad)
    assert [site.kernel for site in said.sites] == ["plain"]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in UNSAID], ids=lambda case: case.name)
def test_what_has_no_such_form_is_refused(case: Case) -> None:
    said = Said(Attention(case))
    with torch.no_grad():
        said(*inputs())
    (site,) = said.sites
    assert not site.replaced
    assert {r.code for r in site.verdicts[0].refusals} & {"no_form", "not_expressed", "empty_rows"}, site.verdicts


def judged(function: Callable[..., Tensor], given: tuple[Tensor, ...], **options: Any) -> Said:
    """Compiled, compared, and replaced."""

    class Module(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return function(*args)

    module = Module()
    said = Said(module, **options)
    assert not held_to_float64(module, given, said)
    assert [site.replaced for site in said.sites] == [True], [(site.reason, site.verdicts) for site in said.sites]
    return said


def test_bounds_are_counted_from_the_end() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = grid(q, k)
        return weighted(masked(scores(q, k), (j <= i + 2) & (j > i - 5)), v, q)

    (said,) = judged(attention, inputs(64, queries=24)[:3]).arguments
    assert (said["left"], said["right"]) == (4, 2)


@pytest.mark.parametrize(("queries", "keys", "replaced"), [(24, 64, False), (64, 64, True), (64, 24, True)])
def test_a_diagonal_from_the_first_key(queries: int, keys: int, replaced: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return weighted(scores(q, k).masked_fill(~keep, -INF), v, q)

    class Module(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return attention(*args)

    said = Said(Module())
    given = inputs(keys, queries=queries)[:3]
    assert not held_to_float64(Module(), given, said)
    # with more keys than queries the bound lies behind the query's own position, which no argument says
    assert said.sites[0].replaced is replaced, said.sites[0].verdicts


def test_a_call_that_is_causal_by_itself() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnpass.gain._faster", lambda kernel, spec: True)
        (said,) = judged(attention, inputs(64, kv_heads=4)[:3]).arguments
        assert (said["left"], said["right"]) == (None, 0)
        unequal = Said(attention)
        unequal(*inputs(64, queries=24, kv_heads=4)[:3])
    assert not unequal.sites[0].replaced


@pytest.mark.parametrize("off", ["left", "right", "interior", "whole rows"])
@pytest.mark.parametrize("fill", [-INF, torch.finfo(torch.float32).min], ids=["inf", "lowest"])
def test_padded_keys(off: str, fill: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        x = scores(q, k)
        return weighted(x + torch.where(pad[:, None, None, :], 0.0, fill), v, q)

    q, k, v, *_ = inputs(48)
    at = torch.arange(48)
    row = {"left": at >= 20, "right": at < 30, "interior": at % 3 != 0, "whole rows": at < 0}[off]
    pad = torch.stack([torch.ones(48, dtype=torch.bool), row])
    (said,) = judged(attention, (q, k, v, pad)).arguments
    assert said["keys"] is not None
    assert said["right"] is None


def test_slopes_of_heads() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = grid(q, k)
        steep = torch.tensor([2.0**-n for n in range(1, 5)])[:, None, None]
        return weighted(masked(scores(q, k) + steep * j, j <= i), v, q)

    (said,) = judged(attention, inputs(64)[:3]).arguments
    assert said["slopes"] is not None
    assert said["right"] == 0


def test_slopes_without_an_end_are_refused() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = grid(q, k)
        return weighted(scores(q, k) + torch.tensor([2.0**-n for n in range(1, 5)])[:, None, None] * (j - i), v, q)

    said = Said(attention)
    said(*inputs(64)[:3])
    assert "no_form" in {r.code for r in said.sites[0].verdicts[0].refusals}


def test_symbolic_lengths() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = grid(q, k)
        return weighted(masked(scores(q, k), (j <= i) & (j > i - 7)), v, q)

    said = judged(attention, inputs(48, kv_heads=4)[:3], dynamic=True)
    assert isinstance(said.sites[0].spec.queries, str)
    (found,) = said.arguments
    assert (found["left"], found["right"]) == (6, 0)


def test_layers_share_what_a_mask_needs() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = torch.where(pad[:, None, None, :], 0.0, -INF)
        once = weighted(scores(q, k) + mask, v, q)
        return weighted(scores(once, k) + mask, v, q)

    q, k, v, *_ = inputs(48)
    said = Said(attention)
    said(q, k, v, torch.arange(48) >= torch.tensor([[0], [9]]))
    assert len({found["keys"] for found in said.arguments}) == 1
    assert len(said.arguments) == 2
