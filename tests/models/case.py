"""One model of the suites: a name, how to build it, and how it is to be captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`build` returns a module in evaluation mode and its keyword (or, under "*", positional) arguments."""

    suite: str
    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    front: str = "dynamo"  # or "export"
    grad: bool = True  # compare gradients too
    note: str = ""

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the weights anew, so large that scores are of order one and every bias and norm matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
            if parameter.dim() >= 2:
                fan_in = max(1, parameter[0].numel())
                gain = 1.5 if parameter.dim() == 2 else 0.8  # batch norm does not tame convolutions in evaluation
                parameter.copy_(noise * (gain / fan_in**0.5))
            else:
                parameter.add_(0.1 * noise)
    return model


def padded(batch: int, length: int) -> Tensor:
    """A keep-mask with padding on the left of the first row and on the right of the second."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :3] = 0
    if batch > 1:
        mask[1, -2:] = 0
    return mask


def tokens(batch: int, length: int, vocab: int = 99, seed: int = 1) -> Tensor:
    """Token ids that avoid the special ids at the low end."""
    return torch.randint(10, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
