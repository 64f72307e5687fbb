"""What plain inductor makes of a program: for tests that show a bug there before they show that it is not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import utils
from torch.utils._pytree import tree_leaves

Function = Callable[..., Any]


def compiled(fn: Function, args: Any, backend: Any, **options: Any) -> Any:
    """The result of `fn`, compiled anew; random numbers are those of every other call here."""
    torch._dynamo.reset()
    torch.manual_seed(7)
    return torch.compile(fn, backend=backend, **options)(*args)


def eager(fn: Function, args: Any) -> Any:
    torch.manual_seed(7)
    return fn(*args)


def with_gradients(fn: Function, count: int = 3) -> Function:
    """Computes the gradients of a sum over the first result, too, in the first `count` arguments."""

    def run(*args: Any) -> Any:
        leaves = [a.detach().requires_grad_() if i < count else a for i, a in enumerate(args)]
        result = fn(*leaves)
        first = tree_leaves(result)[0]
        weights = torch.linspace(-1, 1, first.numel(), dtype=first.dtype, device=first.device).view(first.shape)
        return first.detach(), torch.autograd.grad((first * weights).sum(), leaves[:count])

    return run


def distance(one: Any, other: Any) -> float:
    """The largest difference; infinite where one has NaN or infinity and the other has not."""
    worst = 0.0
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if isinstance(a, Tensor):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            if not torch.equal(a.isfinite(), b.isfinite()):
                return float("inf")
            if a.numel():
                worst = max(worst, (a - b).detach().double().nan_to_num(0, 0, 0).abs().max().item())
    return worst


def error(fn: Function, args: Any, backend: Any, **options: Any) -> float:
    """How far the compiled result is from the eager one."""
    return distance(compiled(fn, args, backend, **options), eager(fn, args))


def plain_is_wrong(fn: Function, args: Any, more_than: float = 1e-2) -> None:
    """Plain inductor changes the result; where it does not (any more), the test has nothing to show."""
    found = error(fn, args, "inductor")
    if found <= more_than:
        pytest.skip(f"plain inductor of torch {torch.__version__} gets this right (difference {found:.1e})")


def plain_raises(fn: Function, args: Any) -> None:
    """Plain inductor does not compile it."""
    try:
        compiled(fn, args, "inductor")
    except Exception:
        return
    pytest.skip(f"plain inductor of torch {torch.__version__} compiles this")


def plain_misses(fn: Function, args: Any, **options: Any) -> None:
    """Plain inductor finds no attention in it."""
    if fused_by_inductor(fn, args, **options):
        pytest.skip(f"plain inductor of torch {torch.__version__} finds this attention")


def fused_by_inductor(fn: Function, args: Any, backend: Any = "inductor", **options: Any) -> int:
    """How many times inductor's own patterns take something for attention."""
    with counting() as count:
        compiled(fn, args, backend, **options)
        return count()


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Counts what inductor's patterns replace, with caches of nobody else: a cached graph is not searched again."""
    with utils.fresh_cache():
        before = counters["inductor"]["fuse_attention"]
        yield lambda: counters["inductor"]["fuse_attention"] - before
