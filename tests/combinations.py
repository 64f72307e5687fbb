"""A small model under one option of the backend, in every mode that a user may train or run it in.

    python -m tests.combinations OPTION      a line for each mode and inner backend; raises where a result is wrong

Two calls of other lengths each, so that the second one is compiled anew; results and gradients are held to eager code.
In a process of its own, because what can go wrong besides is that it never ends.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnpass
from attnpass.capture.dynamo import backend

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "autotune": {"autotune": True},
    "verify": {"verify": True},
    "autotune and verify": {"autotune": True, "verify": True},
    "strict": {"strict": True},
    "empty rows": {"empty_rows": "dont_care"},
    "a kernel that cannot": {"kernel": "flash_3"},
    "a kernel that is named": {"kernel": ["native_math"]},
}
MODES = ("evaluated", "inference mode", "trained", "trained, dynamic", "trained, autocast", "trained, checkpoints")
INNER = ("inductor", "aot_eager", "eager")
WIDTH, HEADS, KV_HEADS = 64, 4, 2


class Layer(nn.Module):
    """A causal mask in a buffer, padding that is added, heads that are shared."""

    def __init__(self) -> None:
        super().__init__()
        shared = WIDTH * KV_HEADS // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        # no bias: its gradient is zero, and what is computed of it noise
        self.k, self.v = nn.Linear(WIDTH, shared, bias=False), nn.Linear(WIDTH, shared)
        self.register_buffer("causal", torch.ones(128, 128).tril().bool())

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part(x).view(batch, length, -1, WIDTH // HEADS).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        w = q @ k.mT * 0.25
        low = torch.finfo(w.dtype).min
        w = w.masked_fill(~self.causal[:length, :length], low) + torch.where(pad, 0.0, low).to(w.dtype)[:, None, None]
        out: Tensor = self.o((w.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out


class Model(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.checkpoints = "checkpoints" in mode

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, pad, use_reentrant=False) if self.checkpoints else layer(x, pad))
        return x


def context(mode: str) -> contextlib.AbstractContextManager[Any]:
    if "autocast" in mode:
        return torch.autocast("cpu", torch.bfloat16)
    if "trained" in mode:
        return torch.enable_grad()
    return torch.inference_mode() if "inference" in mode else torch.no_grad()


def results(model: Model, call: Callable[..., Tensor], x: Tensor, pad: Tensor, mode: str) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_("trained" in mode)
    with context(mode):
        out = call(x, pad)
    seen = out * pad[..., None]  # as a loss leaves padded queries out
    if "trained" not in mode:
        return [seen]
    seen.float().square().sum().backward()
    return [seen.detach(), *(y.grad for y in (x, *model.parameters()) if y.grad is not None)]


def held(options: dict[str, Any], mode: str, inner: str) -> str:
    """Runs one combination; the kernels that were taken."""
    torch._dynamo.reset()
    attnpass.reset()
    torch.manual_seed(0)
    model = Model(mode)
    dynamic = True if "dynamic" in mode else None
    call = torch.compile(model, backend=backend, dynamic=dynamic, options={**options, "inner": inner})
    for length in (40, 56):
        x, pad = torch.randn(2, length, WIDTH), torch.ones(2, length, dtype=torch.bool)
        pad[0, :5] = pad[1, -7:] = False
        mine, plain = results(model, call, x, pad, mode), results(model, model, x, pad, mode)
        assert len(mine) == len(plain)
        for a, b in zip(mine, plain, strict=True):
            error = (a.float() - b.float()).norm() / b.float().norm()
            assert error < (3e-2 if "autocast" in mode else 1e-4), f"{mode}, {inner}: relative error {error:.2e}"
    report = attnpass.report()
    assert not report.failures, report.failures[0]
    assert report.sites
    return ", ".join(sorted({site.kernel or "left" for site in report.sites}))


def main() -> None:
    warnings.simplefilter("ignore")
    options = OPTIONS[sys.argv[1]]
    for mode, inner in itertools.product(MODES, INNER):
        print(f"{mode}, {inner}: {held(options, mode, inner)}", flush=True)
    print("all held")


if __name__ == "__main__":
    main()
