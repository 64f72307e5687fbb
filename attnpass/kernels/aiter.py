"""AMD's aiter: flash-attention for its data-centre GPUs (gfx90a, gfx942, gfx950), from the package amd-aiter.

    aiter.flash_attn_func             (batch, length, heads, width), bounds from the end of both, ALiBi
    aiter.ops.mha._flash_attn_backward   its own backward, with out and the log-sum-exp of the forward

**Verified by contract only**: nothing of this has run on such a GPU. Its calls are held to the signatures of the wheel
(tests/kernels/contracts) and their numbers to functions that do what it documents. So little is asked of it:

- its fixed-order backward always, because the other one takes a causal mask from the first of both (its own FIXME);
- no rows without a key, whose log-sum-exp it does not document; no sinks, which need that a backward uses what it says;
- no window of a single key, its choice of a kernel looks for a bound *above* zero; none for unlike lengths.

`aiter` on the package index is another package, which ``available`` tells. Kernels are compiled when they are first
called, which takes minutes; the first call is the trial before one is chosen (flash_base.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnpass.kernels.base import Capabilities
from attnpass.kernels.flash_base import FlashKernel, may_see_no_key
from attnpass.kernels.flash_ops import Lengths, Plan, Saved, Vendor
from attnpass.kernels.late import imported, version_of
from attnpass.reasons import Reason, reason
from attnpass.spec import AttentionSpec

_INSTALL = "pip install amd-aiter"
_GPUS = ("gfx90a", "gfx942", "gfx950")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, plan: Plan, lengths: Lengths | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    function = _module("aiter").flash_attn_func
    out, lse = function(
        *(q, k, v),
        dropout_p=0.0,
        softmax_scale=plan.scale,
        causal=plan.causal,
        window_size=(*plan.window, *_further(function)),
        alibi_slopes=slopes,
        deterministic=True,
        return_lse=True,
    )
    return out, lse, None


def _backward(dout: Tensor, saved: Saved, plan: Plan, lengths: Lengths | None) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = saved.unwritten()
    _module("aiter.ops.mha")._flash_attn_backward(
        *(dout, saved.q, saved.k, saved.v, saved.out, saved.lse, dq, dk, dv),
        dbias=None,
        dropout_p=0.0,
        softmax_scale=plan.scale,
        causal=plan.causal,
        window_size_left=plan.window[0],
        window_size_right=plan.window[1],
        bias=None,
        alibi_slopes=saved.slopes,
        deterministic=True,
    )
    return dq, dk, dv


def _further(function: Any) -> tuple[int, ...]:
    """Later versions have a third number there, how many first keys are always seen: none."""
    usual = inspect.signature(function).parameters["window_size"].default
    return (0,) * (len(usual) - 2)


def _module(name: str) -> Any:
    found = imported(name, "aiter", _INSTALL)
    assert isinstance(found, ModuleType), found
    return found


def _unfit() -> str | None:
    if torch.version.hip is None or not torch.cuda.is_available():
        return "needs an AMD GPU and a torch built for ROCm"
    name = str(torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName).partition(":")[0]
    if name not in _GPUS:
        return f"needs one of {', '.join(_GPUS)}; this GPU is {name}"
    found = imported("aiter", "aiter", _INSTALL)
    if isinstance(found, str):
        return found
    if not hasattr(found, "flash_attn_func"):
        return f"the package aiter that is installed is not AMD's: pip uninstall aiter, {_INSTALL}"
    below = imported("aiter.ops.mha", "aiter", _INSTALL)
    if isinstance(below, str):
        return below
    known = hasattr(below, "_flash_attn_backward")
    return None if known else "this aiter has no _flash_attn_backward: it is of another time"


class Aiter(FlashKernel):
    """``aiter.flash_attn_func``."""

    name = "aiter"
    verified = "contract"
    only_by_name = True  # what never ran is not taken unasked
    vendor = Vendor(name="aiter", forward=_forward, backward=_backward)
    can = Capabilities(
        devices=frozenset({"cuda"}),  # as torch calls AMD's GPUs too
        dtypes=frozenset({"float16", "bfloat16"}),
        max_width=256,
        width_multiple=8,
        unlike_widths=True,
        groups=True,
        causal=True,
        window=True,
        alibi=True,
        backward=True,
        deterministic=True,
    )

    def _missing(self) -> str | None:
        return _unfit()

    def version(self) -> str:
        return version_of("amd-aiter")

    def _limits(self, spec: AttentionSpec) -> Iterator[Reason]:
        if may_see_no_key(spec):
            yield reason("no_form", detail="a causal mask or a window where there may be more queries than keys")
        window = spec.mask.window
        if window is not None and (spec.queries != spec.keys or window[0] == 0):
            yield reason("kernel_bug", detail="a window of a single key is taken for no window")
