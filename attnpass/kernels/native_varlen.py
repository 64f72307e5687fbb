"""torch's own build of flash-attn 2 with what ``torch.nn.attention.varlen`` gives access to: packed keys, and bounds.

    scaled_dot_product_attention   a mask of padded keys, or a window, is a tensor over queries and keys
    here                           keys that are seen are packed, a window is two numbers; no package besides torch

``varlen_attn`` has changed its arguments with each release (2.10 to 2.13: is_causal, window_size, return_aux,
enable_gqa), so what stands below it is called, ``aten._flash_attention_forward`` and its backward, which have not. They
are wrapped in an operation of ours as flash-attn itself is (flash_ops.py), for the packing and for sinks.

Limits: those of flash-attn 2. No soft cap, no ALiBi (there is no backward for it), no dropout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnpass.kernels.base import Capabilities
from attnpass.kernels.flash import Flash
from attnpass.kernels.flash_ops import Lengths, Plan, Saved, Vendor
from attnpass.kernels.late import unfit_gpu

aten = torch.ops.aten
_GPUS = range(8, 100)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, plan: Plan, lengths: Lengths | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    out, lse, *_ = aten._flash_attention_forward(
        *(q, k, v, *_lengths(q, k, lengths), 0.0, plan.causal, False), scale=plan.scale, **_bounds(plan)
    )
    return out, lse, None


def _backward(dout: Tensor, saved: Saved, plan: Plan, lengths: Lengths | None) -> tuple[Tensor, Tensor, Tensor]:
    # of random numbers, of which there are none
    q, k, v = saved.q, saved.k, saved.v
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    dq, dk, dv = aten._flash_attention_backward(
        *(dout, q, k, v, saved.out, saved.lse, *_lengths(q, k, lengths), 0.0, plan.causal, state, unused),
        scale=plan.scale,
        **_bounds(plan),
    )
    return dq, dk, dv


def _lengths(q: Tensor, k: Tensor, lengths: Lengths | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    if lengths is None:
        return None, None, q.shape[1], k.shape[1]
    return lengths.queries, lengths.keys, lengths.most_queries, lengths.most_keys


def _bounds(plan: Plan) -> dict[str, int]:
    return {"window_size_left": plan.window[0], "window_size_right": plan.window[1]}


class NativeVarlen(Flash):
    """``torch.nn.attention.varlen.varlen_attn``; the limits of flash-attn 2 are its own."""

    name = "native_varlen"
    vendor = Vendor(name="native_varlen", forward=_forward, backward=_backward, empty=math.inf)
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({"float16", "bfloat16"}),
        max_width=256,
        width_multiple=8,
        groups=True,
        causal=True,
        window=True,
        key_padding=True,
        sink=True,
        backward=True,
        deterministic=True,  # by torch's own switch
    )

    def _missing(self) -> str | None:
        built = torch.backends.cuda.is_flash_attention_available()
        unbuilt = None if built else "this torch was built without flash-attn"
        return unfit_gpu(_GPUS, "compute capability 8.0 or above") or unbuilt

    def version(self) -> str:
        return torch.__version__
