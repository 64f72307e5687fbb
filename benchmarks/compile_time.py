"""What the pass costs: its share of compile time for Llama-shaped models, and a graph of 100,000 nodes.

    python -m benchmarks.compile_time [--layers 8,32,128] [--repeat 3] [--nodes 100000] [--sites 1000] [--write]

1. A hand-written Llama (rotary positions, grouped heads, causal mask in the graph, small widths) is compiled with
   inductor, caches off, with and without the pass. The pass is timed inside the backend: everything between Dynamo's
   graph and the inner backend's call. Layers are identical, or all of different widths: the cost should follow the
   number of distinct layers.
2. A synthetic ATen graph of many sites in four spellings is rewritten; its outputs are compared before and after.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

PAGE = Path(__file__).parents[1] / "docs" / "compile-time.md"
WIDTH, HEADS, KV_HEADS, HEAD = 64, 4, 2, 16
BATCH, LENGTH = 1, 16


class Attention(nn.Module):
    """Llama's attention as transformers spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, HEADS, HEAD).transpose(1, 2)
        k = self.k_proj(x).view(b, n, KV_HEADS, HEAD).transpose(1, 2)
        v = self.v_proj(x).view(b, n, KV_HEADS, HEAD).transpose(1, 2)
        q, k = q * cos + rotated(q) * sin, k * cos + rotated(k) * sin
        k, v = (t[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(b, HEADS, n, HEAD) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * HEAD**-0.5 + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = F.dropout(weights, p=0.0, training=self.training)
        return self.o_proj(torch.matmul(weights, v).transpose(1, 2).contiguous().reshape(b, n, -1))


def rotated(x: Tensor) -> Tensor:
    return torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), dim=-1)


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention = Attention()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.gate, self.up = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), cos, sin, mask)
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """`distinct`: every layer has another hidden width, so that no two are the same code over the same shapes."""

    def __init__(self, layers: int, *, distinct: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, WIDTH)
        self.layers = nn.ModuleList(Layer(96 + 8 * i if distinct else 96) for i in range(layers))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        position = torch.arange(n, device=ids.device)
        angle = position[:, None] * torch.arange(1, HEAD + 1, device=ids.device)[None] * 0.01
        keep = position[None, :] <= position[:, None]
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)[None, None]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin(), mask)
        return self.norm(x)


@dataclass
class Clock:
    """Seconds inside the pass and inside the inner backend, over all graphs of one compilation."""

    whole: float = 0.0
    inner: float = 0.0

    @property
    def own(self) -> float:
        return self.whole - self.inner


def compiled(model: nn.Module, ids: Tensor, *, inner: Callable[..., Any], with_pass: bool) -> tuple[float, Clock]:
    """(wall time of the first call, clock) of one compilation from scratch."""
    from attnpass.capture.dynamo import backend

    clock = Clock()

    def timed_inner(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        started = time.perf_counter()
        try:
            return inner(gm, example_inputs)
        finally:
            clock.inner += time.perf_counter() - started

    def timed(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        if not with_pass:
            return timed_inner(gm, example_inputs)
        started = time.perf_counter()
        try:
            return backend(gm, example_inputs, options={"inner": timed_inner})
        finally:
            clock.whole += time.perf_counter() - started

    torch._dynamo.reset()
    started = time.perf_counter()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend=timed)(ids)
    return time.perf_counter() - started, clock


@dataclass(frozen=True, kw_only=True)
class Row:
    """One size of model; seconds, medians."""

    layers: int
    distinct: int
    sites: int
    own: float
    without: float | None  # whole first call with inductor alone
    with_pass: float | None

    @property
    def share(self) -> float | None:
        return None if self.without is None else self.own / self.without


def measure(layers: int, *, distinct: bool, repeat: int, inductor: bool) -> Row:
    """The pass alone is repeated with the graph merely run; inductor is run once or as often as `repeat` says."""
    from torch._inductor.compile_fx import compile_fx

    import attnpass

    model, ids = Llama(layers, distinct=distinct).eval(), torch.randint(0, 99, (BATCH, LENGTH))
    own = [compiled(model, ids, inner=_run_as_is, with_pass=True)[1].own for _ in range(repeat)]
    attnpass.reset()
    compiled(model, ids, inner=_run_as_is, with_pass=True)
    replaced = attnpass.report().replaced
    assert replaced == layers, f"{replaced} of {layers} sites were replaced; a time without the work says nothing"
    without = with_pass = None
    if inductor:
        times = 1 if layers > 32 else repeat
        without = statistics.median(compiled(model, ids, inner=compile_fx, with_pass=False)[0] for _ in range(times))
        pairs = [compiled(model, ids, inner=compile_fx, with_pass=True) for _ in range(times)]
        with_pass = statistics.median(wall for wall, _ in pairs)
        own += [clock.own for _, clock in pairs]
    kinds = layers if distinct else 1
    return Row(
        layers=layers, distinct=kinds, sites=replaced, own=statistics.median(own), without=without, with_pass=with_pass
    )


def _run_as_is(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
    return gm.forward


# --- the large graph ---------------------------------------------------------------------------------------------


@dataclass
class Large:
    """A chain of attentions, each followed by elementwise operations, over (batch, heads, length, width)."""

    mode: FakeTensorMode
    graph: Graph = field(default_factory=Graph)
    nodes: int = 0

    def input(self, name: str, value: Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(value)
        self.nodes += 1
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(op, args, kwargs)
        given, named = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*given, **named)
        self.nodes += 1
        return node


def attention(g: Large, x: Node, keep: Node, spelling: int) -> Node:
    """One attention over x, in one of four spellings."""
    op = torch.ops.aten
    q, k, v = (g.call(op.mul.Tensor, x, factor) for factor in (0.9, 1.1, 0.7))
    turned = g.call(op.transpose.int, k, -2, -1)
    if spelling == 1:
        q = g.call(op.mul.Tensor, q, 0.35)
    scores = g.call(op.matmul.default, q, turned)
    if spelling != 1:
        scores = g.call(op.div.Tensor, scores, 2.8)
    if spelling == 2:
        scores = g.call(op.masked_fill.Scalar, scores, g.call(op.logical_not.default, keep), float("-inf"))
    if spelling == 3:
        bias = g.call(op.where.ScalarOther, keep, g.call(op.zeros_like.default, scores), -1e30)
        scores = g.call(op.add.Tensor, bias, scores)
    weights = g.call(op.softmax.int, scores, -1)
    return g.call(op.matmul.default, g.call(op.dropout.default, weights, 0.0, False), v)


def build_large(nodes: int, sites: int) -> tuple[GraphModule, tuple[Tensor, Tensor]]:
    """A GraphModule of about `nodes` nodes with `sites` sites, and inputs for it."""
    op = torch.ops.aten
    inputs = (torch.randn(1, 2, 6, 8), torch.ones(6, 6).tril().bool())
    g = Large(FakeTensorMode())
    first, keep = g.input("x", inputs[0]), g.input("keep", inputs[1])
    x = total = first
    for site in range(sites):
        answer = attention(g, x, keep, site % 4)
        total = g.call(op.add.Tensor, total, answer)  # every answer counts in the output
        x = g.call(op.add.Tensor, g.call(op.mul.Tensor, answer, 0.5), first)  # and no two tokens grow alike
        while g.nodes < (site + 1) * nodes // sites:
            x = g.call(op.neg.default, x)
    g.graph.output((total,))
    return GraphModule(nn.Module(), g.graph), inputs


@dataclass(frozen=True, kw_only=True)
class LargeRow:
    nodes: int
    sites: int
    replaced: int
    seconds: float
    error: float


def measure_large(nodes: int, sites: int) -> LargeRow:
    import attnpass

    module, inputs = build_large(nodes, sites)
    wanted = module(*inputs)[0]
    started = time.perf_counter()
    rewritten, report = attnpass.rewrite(module)
    seconds = time.perf_counter() - started
    error = float((rewritten(*inputs)[0] - wanted).abs().max() / wanted.abs().max())
    return LargeRow(
        nodes=len(module.graph.nodes), sites=len(report.sites), replaced=report.replaced, seconds=seconds, error=error
    )


# --- the page ----------------------------------------------------------------------------------------------------


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(rows: list[Row]) -> str:
    head = "| layers | distinct | sites replaced | the pass (s) | share | inductor alone (s) | with the pass (s) |\n"
    return head + "|---|---|---|---|---|---|---|\n" + "".join(_line(row) for row in rows)


def _line(r: Row) -> str:
    share = "" if r.share is None else f"{100 * r.share:.1f} %"
    cells = (r.layers, r.distinct, r.sites, _seconds(r.own), share, _seconds(r.without), _seconds(r.with_pass))
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def page(rows: list[Row], large: LargeRow, command: str) -> str:
    return f"""# What the pass costs

Written by `{command}` on {datetime.date.today().isoformat()} with torch {torch.__version__},
Python {platform.python_version()}, {os.cpu_count()} CPU cores. Seconds; medians of `--repeat` runs.

## A Llama-shaped model

Small widths, batch {BATCH}, {LENGTH} tokens, inference, inductor's caches off. *the pass*: from Dynamo's graph
to the call of the inner backend. *inductor alone* and *with the pass*: the whole first call, Dynamo and C++ compilation
included.
*share*: the pass against inductor alone. Small widths make inductor's part as small as it gets.

{table(rows)}
## A graph of {large.nodes:,} nodes

`attnpass.rewrite` on an ATen graph with {large.sites:,} sites in four spellings: {large.replaced:,} replaced in
{large.seconds:.1f} s; largest difference of the outputs before and after, relative, {large.error:.0e}.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", default="8,32,128", help="numbers of layers, comma-separated")
    parser.add_argument("--distinct", default="8,32", help="numbers of layers of a model whose layers all differ")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of which the median is taken")
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--sites", type=int, default=1_000)
    parser.add_argument("--no-inductor", action="store_true", help="time the pass alone")
    parser.add_argument("--write", action="store_true", help="write docs/compile-time.md")
    arguments = parser.parse_args(argv)
    compiled(Llama(1, distinct=False).eval(), torch.zeros(1, 4, dtype=torch.long), inner=_run_as_is, with_pass=True)
    rows = []
    for text, distinct in ((arguments.layers, False), (arguments.distinct, True)):
        for layers in (int(part) for part in text.split(",") if part):
            inductor = not arguments.no_inductor and not distinct
            row = measure(layers, distinct=distinct, repeat=arguments.repeat, inductor=inductor)
            rows.append(row)
            print(f"{layers} layers, {row.distinct} distinct: the pass takes {row.own:.2f} s", flush=True)
    large = measure_large(arguments.nodes, arguments.sites)
    command = shlex.join(["python", "-m", "benchmarks.compile_time", *(sys.argv[1:] if argv is None else argv)])
    text = page(rows, large, command)
    print(text)
    if arguments.write:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
