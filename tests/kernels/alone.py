"""A function compiled with the pass where one kernel alone is asked, and attention to compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule

import attnpass
from attnpass import choose
from attnpass.capture import frames
from attnpass.kernels import Kernel
from attnpass.ledger import Report
from attnpass.spec import AttentionSpec
from tests.flex_cases import Case, grid, masked, scores, weighted
from tests.zoo.numbers import complaints, run, truth


class Alone:
    """The graphs and reports of a compiled function, in which no other kernel than this one is asked."""

    def __init__(
        self, function: Callable[..., Any], kernel: Kernel, *, inner: str = "eager", dynamic: bool | None = False
    ) -> None:
        self.kernel, self.inner = kernel, inner
        self.graphs: list[GraphModule] = []
        self.reports: list[Report] = []
        self.compiled = torch.compile(function, backend=self._backend, fullgraph=True, dynamic=dynamic)

    def _backend(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose, "kernels", lambda: (self.kernel,))
            policy = attnpass.Policy(kernel=self.kernel.name, allow_approximate=True)
            done = frames.process(gm, example_inputs, name="graph", policy=policy, rewrite=True, compiled=True)
        self.graphs.append(gm)
        self.reports.append(done.report)
        return lookup_backend(self.inner)(gm, example_inputs)

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    @property
    def kernels(self) -> list[str | None]:
        assert not any(report.failures for report in self.reports)
        return [site.kernel for report in self.reports for site in report.sites]

    @property
    def refusals(self) -> list[str]:
        return [r.code for report in self.reports for site in report.sites for v in site.verdicts for r in v.refusals]

    def targets(self) -> list[str]:
        """The names of all operations in the graphs, once the kernel's call is in them."""
        return [str(node.target) for gm in self.graphs for node in gm.graph.nodes if node.op == "call_function"]


def held_to_float64(
    module: nn.Module, given: tuple[Tensor, ...], call: Callable[..., Any], *, grad: bool, floors: Any = None
) -> list[str]:
    """Where a compiled module is further from float64 than eager code may be."""
    with contextlib.nullcontext() if grad else torch.no_grad():
        mine = run(module, given, call=call, grad=grad)
        return complaints(mine, run(module, given, grad=grad), truth(module, given, grad=grad), floors=floors)


def spec(**changes: Any) -> AttentionSpec:
    """One plain attention of eight heads, with whatever a test changes of it."""
    shape = (2, 8, 256, 64)
    known: dict[str, Any] = {"q": shape, "k": shape, "v": shape, "dtype": "bfloat16", "device": "cuda", "scale": 0.125}
    return AttentionSpec(**(known | changes))


def codes(kernel: Kernel, **changes: Any) -> list[str]:
    """The codes of a kernel's refusals of one spec."""
    return [reason.code for reason in kernel.refusals(spec(**changes))]


# -- attention as it is written by hand --------------------------------------------------------------------------------


def full(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    return weighted(scores(q, k), v, q)


def causal_from_the_start(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    return weighted(masked(scores(q, k), torch.arange(k.shape[2], device=q.device) <= i), v, q)


def causal_to_the_end(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k), j <= i), v, q)


def window(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k), (j <= i) & (j > i - 37)), v, q)


def both_ways(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k), (j <= i + 5) & (j >= i - 11)), v, q)


def padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    return weighted(masked(scores(q, k), pad[:, None, None, :]), v, q)


def padded_and_causal(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(scores(q, k), (j <= i) & pad[:, None, None, :]), v, q)


def biased(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor | None = None
) -> Tensor:
    # the sinks stand for a table of biases, one for each head and distance; in q's dtype, and trained
    i, j = grid(q, k)
    far = ((i - j).abs() % 7).to(q.dtype) / 7
    return weighted(scores(q, k) + sinks.view(1, -1, 1, 1) * far, v, q)


def dense_mask(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, ids: Tensor, sinks: Tensor, dense: Tensor) -> Tensor:
    return weighted(scores(q, k).masked_fill(~dense, torch.finfo(q.dtype).min), v, q)


FULL = Case("full", full)
FROM_THE_START = Case("causal_from_the_start", causal_from_the_start)
TO_THE_END = Case("causal_to_the_end", causal_to_the_end)
WINDOW = Case("window", window)
BOTH_WAYS = Case("both_ways", both_ways)
PADDED = Case("padded", padded)
PADDED_AND_CAUSAL = Case("padded_and_causal", padded_and_causal, empty=True)
BIASED = Case("biased", biased)
DENSE = Case("dense_mask", dense_mask, empty=True)
MASKS = (FULL, FROM_THE_START, TO_THE_END, WINDOW, BOTH_WAYS, PADDED, PADDED_AND_CAUSAL, BIASED, DENSE)
