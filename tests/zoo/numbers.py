"""Errors against float64: a rewritten model may be no further from the truth than twice what eager code is.

The reference is the same module in float64, with every cast to a narrower type inside it widened as well, so that it is
the function that the author meant and not a rounding of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

T = torch.Tensor
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = 8.0  # units in the last place of the largest element, for results that eager code happens to get exactly


class InDouble(TorchDispatchMode):
    """Whatever asks for a narrower floating type gets float64."""

    supports_higher_order_operators = True  # cond and the like run their bodies under this mode again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(x: Any) -> Any:
            return torch.float64 if isinstance(x, torch.dtype) and x in _NARROW else x

        return func(*tree_map(widen, args), **tree_map(widen, kwargs or {}))


@dataclass(frozen=True)
class Run:
    """Everything that one run can be held to, by name."""

    tensors: dict[str, T]


def run(
    module: nn.Module,
    inputs: Sequence[Any],
    *,
    call: Callable[..., Any] | None = None,
    grad: bool,
    double: bool = False,
) -> Run:
    """Outputs, written inputs and buffers, and with `grad` the gradients of all inputs and parameters that need one."""
    given = [_leaf(x, double) for x in inputs]
    torch.manual_seed(0)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves = {f"input {i}": x for i, x in enumerate(given) if isinstance(x, T) and x.requires_grad} | parameters
    out = (module if call is None else call)(*given)
    outputs = [x for x in tree_leaves(out) if isinstance(x, T)]
    found = {f"output {i}": x.detach().clone() for i, x in enumerate(outputs)}
    if grad:
        heads = [x for x in outputs if x.requires_grad]
        assert not leaves or heads, "no output has a gradient"
        if heads and leaves:
            weights = [
                torch.linspace(-1, 1, max(x.numel(), 1), dtype=x.dtype, device=x.device)[: x.numel()].view(x.shape)
                for x in heads
            ]
            grads = torch.autograd.grad(heads, list(leaves.values()), weights, allow_unused=True)
            found |= {f"grad of {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    found |= {f"buffer {name}": b.detach().clone() for name, b in module.named_buffers()}
    found |= {f"input {i} afterwards": x for i, x in enumerate(given) if isinstance(x, T) and not x.requires_grad}
    return Run(found)


def _leaf(x: Any, double: bool) -> Any:
    if not isinstance(x, T):
        return x
    out = x.detach().clone()
    if double and out.is_floating_point():
        out = out.double()
    if double and out.is_complex():
        out = out.to(torch.complex128)
    return out.requires_grad_(x.requires_grad)


def truth(module: nn.Module, inputs: Sequence[Any], *, grad: bool) -> Run:
    """The run in float64."""
    with InDouble():
        return run(copy.deepcopy(module).double(), inputs, grad=grad, double=True)


def complaints(
    candidate: Run, eager: Run, reference: Run, *, floors: Mapping[torch.dtype, float] | None = None
) -> list[str]:
    """Where the candidate is further from the reference than eager code may be; empty when all is well."""
    found: list[str] = []
    if candidate.tensors.keys() != eager.tensors.keys():
        found.append(f"has {sorted(candidate.tensors.keys() ^ eager.tensors.keys())} only on one side")
    for name, plain in eager.tensors.items():
        if name not in candidate.tensors:
            continue
        mine, true = candidate.tensors[name], reference.tensors[name]
        if mine.shape != plain.shape or mine.dtype != plain.dtype:
            found.append(f"{name}: {mine.dtype} {tuple(mine.shape)}, expected {plain.dtype} {tuple(plain.shape)}")
            continue
        if not plain.is_floating_point():
            if not torch.equal(mine, plain):
                found.append(f"{name}: differs")
            continue
        nan = plain.isnan()
        if not torch.equal(mine.isnan(), nan):
            found.append(f"{name}: NaN at other places ({int(mine.isnan().sum())} against {int(nan.sum())})")
            continue
        # float64's own lowest number, summed, may be none where the narrower one's is: then eager code is the reference
        true = torch.where(true.isnan() & ~nan, plain.double(), true.double())
        here, own = _error(mine, true, nan), _error(plain, true, nan)
        largest = true[~nan].abs().max().item() if bool((~nan).any()) else 0.0
        size = max(largest, 1.0)  # inputs are of order one: what cancels to nothing is measured by them
        allowed = 2 * own + (floors or {}).get(plain.dtype, FLOOR) * torch.finfo(plain.dtype).eps * size
        if not here <= allowed:
            found.append(f"{name}: error {here:.3g}, eager {own:.3g}, allowed {allowed:.3g}")
    return found


def _error(a: T, b: T, nan: T) -> float:
    # equal infinities differ by nothing
    x, y = a.double()[~nan], b.double()[~nan]
    gap = torch.where(x == y, 0.0, x - y).abs()
    return float(gap.max()) if gap.numel() else 0.0
