"""What tests of kernels share: one operation held to float64 over every feature and shape, and whole graphs.

Problem        one attention with all that an operation may be given
complaints     where an operation is further from float64 than twice what eager code of the same dtype is
Through        a function compiled with the pass, with one kernel to choose
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule, Node

import attnpass
from attnpass import choose
from attnpass.capture import frames
from attnpass.kernels import Kernel
from attnpass.kernels.flash_base import FlashKernel
from attnpass.kernels.flash_ops import define
from attnpass.ledger import Decision
from tests.zoo import numbers

INF = math.inf


# -- one operation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention. Bounds count from the query's own position, the last query standing at the last key."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    queries: int = 128
    keys: int = 128
    width: int = 64
    v_width: int | None = None
    left: int | None = None
    right: int | None = None
    alibi: bool = False
    sink: bool = False
    softcap: float = 0.0
    padding: str = ""  # "left", "right", "holes", "row": the first batch row has no key at all
    scale: float = 0.2
    deterministic: bool = False
    grad: bool = True
    layout: str = "model"  # "model": as a projection leaves it; "plain": contiguous; "odd": nothing is aligned

    @property
    def name(self) -> str:
        default = Problem()
        return (
            "-".join(f"{field}={value}" for field, value in vars(self).items() if value != getattr(default, field))
            or "plain"
        )


@dataclass(frozen=True)
class Given:
    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None
    sink: Tensor | None
    seen: Tensor | None  # (batch, 1, 1, keys)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.sink) if x is not None and x.requires_grad]


def given(problem: Problem, device: str, dtype: torch.dtype) -> Given:
    g = torch.Generator().manual_seed(0)

    def laid_out(heads: int, length: int, width: int) -> Tensor:
        x = torch.randn(problem.batch, length, heads, width, generator=g).to(device, dtype)
        if problem.layout == "plain":
            x = x.transpose(1, 2).contiguous()
        elif problem.layout == "odd":
            wide = torch.zeros(problem.batch, length, heads, width + 3, device=device, dtype=dtype)
            x = wide[..., 1 : width + 1].copy_(x).transpose(1, 2)
        else:
            x = x.transpose(1, 2)
        return x.requires_grad_(problem.grad)

    slopes = (2.0 ** -torch.arange(1, problem.heads + 1)).to(device) if problem.alibi else None
    sink = None
    if problem.sink:
        sink = torch.randn(1, problem.heads, 1, 1, generator=g).to(device, dtype).requires_grad_(problem.grad)
    return Given(
        q=laid_out(problem.heads, problem.queries, problem.width),
        k=laid_out(problem.kv_heads, problem.keys, problem.width),
        v=laid_out(problem.kv_heads, problem.keys, problem.v_width or problem.width),
        slopes=slopes,
        sink=sink,
        seen=seen(problem, g).to(device) if problem.padding else None,
    )


def seen(problem: Problem, g: torch.Generator) -> Tensor:
    j = torch.arange(problem.keys)[None]
    short = torch.linspace(0.3, 1.0, problem.batch)[:, None] * problem.keys
    if problem.padding == "left":
        keep = j >= problem.keys - short.ceil()
    elif problem.padding == "right":
        keep = j < short.ceil()
    else:
        keep = torch.rand(problem.batch, problem.keys, generator=g) < 0.7
        keep[:, problem.keys // 2] = True
        if problem.padding == "row":
            keep[0] = False
    return keep[:, None, None]


def definition(problem: Problem, x: Given, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention by its definition, computed in this dtype; a query without any key gets zero and -inf."""
    groups = problem.heads // problem.kv_heads
    q, k, v = (y.to(dtype) for y in (x.q, x.k, x.v))
    k, v = (y.repeat_interleave(groups, 1) for y in (k, v))
    s = (q @ k.mT) * problem.scale
    if problem.softcap:
        s = (s / problem.softcap).tanh() * problem.softcap
    i = torch.arange(problem.queries, device=q.device)[:, None] + problem.keys - problem.queries
    j = torch.arange(problem.keys, device=q.device)[None]
    if x.slopes is not None:
        s = s - (x.slopes[:, None, None] * (i - j).abs()).to(dtype)
    off = torch.zeros_like(s, dtype=torch.bool)
    if problem.right is not None:
        off = off | (j > i + problem.right)
    if problem.left is not None:
        off = off | (j < i - problem.left)
    if x.seen is not None:
        off = off | ~x.seen
    s = s.masked_fill(off, -INF)
    if x.sink is not None:
        s = torch.cat([s, x.sink.to(dtype).expand(*s.shape[:3], 1)], -1)
    lse = s.detach().double().logsumexp(-1)
    # a row without a key: zero, and no gradient
    p = s.masked_fill((lse == -INF)[..., None], 0.0).softmax(-1).masked_fill((lse == -INF)[..., None], 0.0)
    return p[..., : problem.keys] @ v, lse


Operation = Callable[[Problem, Given], tuple[Tensor, Tensor]]


def complaints(operation: Operation, problem: Problem, device: str, dtype: torch.dtype) -> list[str]:
    """The result, the log-sum-exp and all gradients of an operation, against float64."""
    x = given(problem, device, dtype)
    mine, lse = operation(problem, x)
    true, true_lse = definition(problem, x, torch.float64)
    plain, _ = definition(problem, x, dtype)
    found = _further("result", mine, plain, true)
    if not torch.equal(lse == -INF, true_lse == -INF):
        found.append("log-sum-exp: -inf at other places")
    elif not problem.alibi:  # flash-attn counts slopes from the first key: the same but for a number per row
        finite = true_lse > -INF
        gap = float((lse.double() - true_lse)[finite].abs().max()) if bool(finite.any()) else 0.0
        # enough to tell any other convention; a soft cap goes through an approximate tanh
        allowed = 2e-2 if problem.softcap else 2e-3
        found += [] if gap <= allowed else [f"log-sum-exp: error {gap:.3g}, allowed {allowed:.3g}"]
    if problem.grad:
        weight = torch.linspace(-1, 1, true.numel(), dtype=torch.float64, device=device).view(true.shape)
        names = ["q", "k", "v", "sink"]
        runs = [torch.autograd.grad(y, x.leaves, weight.to(y.dtype), retain_graph=True) for y in (mine, plain, true)]
        for name, *grads in zip(names[: len(x.leaves)], *runs, strict=True):
            found += _further(f"gradient of {name}", *grads)
    return found


def _further(name: str, mine: Tensor, plain: Tensor, true: Tensor) -> list[str]:
    if mine.shape != true.shape:
        return [f"{name}: {tuple(mine.shape)}, expected {tuple(true.shape)}"]
    here, own = (float((y.detach().double() - true.detach().double()).abs().max()) for y in (mine, plain))
    size = max(1.0, float(true.detach().abs().max()))
    allowed = 2 * own + numbers.FLOOR * torch.finfo(mine.dtype).eps * size
    return [] if here <= allowed else [f"{name}: error {here:.3g}, eager {own:.3g}, allowed {allowed:.3g}"]


def flash_operation(kernel: FlashKernel) -> Operation:
    """The operation of a kernel of flash-attn's kind, called as a graph calls it."""

    def operation(problem: Problem, x: Given) -> tuple[Tensor, Tensor]:
        order = ends = None
        if x.seen is not None:
            keep = x.seen.expand(problem.batch, 1, 1, problem.keys).flatten()
            order = keep.logical_not().to(torch.uint8).sort(stable=True).indices
            ends = keep.view(problem.batch, -1).sum(1).cumsum(0).to(torch.int32)
            ends = torch.nn.functional.pad(ends, (1, 0))
        bounds = (-1 if bound is None else bound for bound in (problem.left, problem.right))
        out, lse, _ = define(kernel.vendor)(
            *(x.q, x.k, x.v, x.slopes, x.sink, order, ends, problem.scale, *bounds),
            *(problem.softcap, 0.0, problem.deterministic),
        )
        return out, lse.masked_fill(lse == kernel.vendor.empty, -INF)

    return operation


LENGTHS = ((128, 128), (1, 200), (7, 7), (200, 200), (64, 200), (1024, 1024))

FEATURES = (
    Problem(),
    Problem(right=0),
    Problem(left=40, right=0),
    Problem(left=40, right=17),
    Problem(left=40),
    Problem(right=9),
    Problem(alibi=True, right=0),
    Problem(softcap=5.0),
    Problem(softcap=5.0, right=0),
    Problem(sink=True),
    Problem(sink=True, left=40, right=0),
    Problem(padding="left"),
    Problem(padding="right"),
    Problem(padding="holes"),
    Problem(padding="row"),
    Problem(padding="holes", sink=True),
    Problem(padding="row", sink=True),
    Problem(padding="holes", softcap=5.0),
)


def problems(*, widths: tuple[tuple[int, int], ...]) -> Iterator[Problem]:
    """Every feature; every pair of lengths and of widths with the features that depend on them; layouts and groups."""
    yield from FEATURES
    for queries, keys in LENGTHS:
        shape: dict[str, Any] = {"batch": 3, "kv_heads": 2, "queries": queries, "keys": keys}
        yield Problem(**shape)
        yield Problem(**shape, right=0)
        yield Problem(**shape, left=33, right=0)
        yield Problem(**shape, padding="holes")
    for width, v_width in widths:
        sizes: dict[str, Any] = {"width": width, "v_width": v_width, "kv_heads": 1, "queries": 70, "keys": 90}
        yield Problem(**sizes, right=0)
        yield Problem(**sizes, padding="left")
    # more queries than keys: the first ones stand before all keys, and see none
    yield Problem(queries=150, keys=90, right=0)
    yield Problem(queries=150, keys=90, right=5, sink=True)
    yield Problem(queries=150, keys=90, left=20, right=3)
    for layout in ("plain", "odd"):
        yield Problem(layout=layout, right=0, kv_heads=2)
        yield Problem(layout=layout, padding="holes", kv_heads=2)


def served(problem: Problem, kernel: Kernel) -> bool:
    """A kernel's table has all that the problem needs."""
    can = kernel.can
    causal = problem.right == 0 and problem.left is None
    return (
        (can.max_width is None or problem.width <= can.max_width)
        and (can.unlike_widths or problem.v_width in (None, problem.width))
        and (can.groups or problem.heads == problem.kv_heads)
        and (can.window or causal or (problem.left is None and problem.right is None))
        and (can.causal or not causal)
        and (can.alibi or not problem.alibi)
        and (can.sink or not problem.sink)
        and (can.softcap or not problem.softcap)
        and (can.key_padding or not problem.padding)
        and (can.deterministic or not problem.deterministic)
    )


def forward_only(problem: Problem) -> Problem:
    return replace(problem, grad=False)


# -- whole graphs ------------------------------------------------------------------------------------------------------


class Through:
    """A function compiled with the pass, one kernel being the only one, and what came of it."""

    def __init__(
        self, function: Callable[..., Any], kernel: Kernel, *, inner: str = "", dynamic: bool | None = False
    ) -> None:
        self.kernel, self.inner = kernel, inner
        self.graphs: list[GraphModule] = []
        self.sites: list[Decision] = []
        self.compiled = torch.compile(function, backend=self._backend, fullgraph=True, dynamic=dynamic)

    def _backend(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        policy = attnpass.Policy(kernel=self.kernel.name)
        with mock.patch.object(choose, "kernels", return_value=(self.kernel,)):
            done = frames.process(gm, example_inputs, name="graph", policy=policy, rewrite=True, compiled=True)
        assert not done.report.failures
        assert not done.report.notes
        self.graphs.append(gm)
        self.sites += done.report.sites
        return lookup_backend(self.inner)(gm, example_inputs) if self.inner else gm.forward

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    @property
    def reasons(self) -> list[str]:
        """What the kernel has against the sites."""
        return [reason.text for site in self.sites for verdict in site.verdicts for reason in verdict.refusals]

    def calls(self, target: Any) -> list[Node]:
        return [node for gm in self.graphs for node in gm.graph.nodes if node.target is target]


def held_to_float64(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    through: Through,
    *,
    grad: bool = False,
    floors: dict[torch.dtype, float] | None = None,
) -> list[str]:
    """What the compiled module does worse than the module itself."""
    with contextlib.nullcontext() if grad else torch.no_grad():
        mine = numbers.run(module, inputs, call=through, grad=grad)
        plain, true = numbers.run(module, inputs, grad=grad), numbers.truth(module, inputs, grad=grad)
        return numbers.complaints(mine, plain, true, floors=floors)
