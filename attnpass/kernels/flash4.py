"""FlashAttention-4, the package flash-attn-4: kernels written in Python and compiled when they are first called.

    flash_4           batches of one length
    flash_varlen_4    padded keys, too: those that are seen are packed

It lies in ``flash_attn.cute``, inside a package without a file of its own, so ``flash_attn`` being there says nothing.
The functions below the public ones are called, whose results differ between releases but begin with what is used here.
"No bound" is None to it: a window with one side of -1 is a bound of -1. Its own sinks are not used (flash_ops.py).

Limits: no dropout, no ALiBi; one kernel for each form of a call takes seconds to compile, which
FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 keeps on disk. Tested on compute capability 9.0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnpass.kernels.base import Capabilities
from attnpass.kernels.flash_base import FlashKernel
from attnpass.kernels.flash_ops import Lengths, Plan, Saved, Vendor, by_name
from attnpass.kernels.late import imported, unfit_gpu, version_of
from attnpass.reasons import Reason, reason
from attnpass.spec import AttentionSpec

_INSTALL = "pip install --pre flash-attn-4"
_FORWARD, _BACKWARD = "_flash_attn_fwd", "_flash_attn_bwd"
_LENGTHS = frozenset({"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"})
_PLAN = frozenset({"softmax_scale", "causal", "softcap", "window_size_left", "window_size_right"})
_GIVEN = {_FORWARD: _PLAN | _LENGTHS | {"return_lse"}, _BACKWARD: _PLAN | _LENGTHS | {"deterministic"}}
_BLACKWELL = (10, 11)
_ALIKE, _WIDEST = 128, 256  # up to here any width has a kernel on Blackwell; the one above that has
_UNLIKE = {(96, 64), (128, 64), (192, 128), (256, 128)}  # widths of keys and values that were compiled both ways
_UNLIKE_ON_BLACKWELL = {(96, 64), (128, 64), (192, 128)}
# Of keys and values, where the gradients were right on an H200 (4.0.0b36). Those of heads 8, 40 and 72 wide and of
# (128, 64) were wrong there, and those of 104 and 112 do not compile; what nobody tried is refused as well.
_BACKWARDS = {*((width, width) for width in (64, 96, 120, 128, 160, 192, 256)), (96, 64), (192, 128), (256, 128)}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, plan: Plan, lengths: Lengths | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    numbers = {**_plan(plan), **by_name(lengths), "softcap": plan.softcap or None}
    out, lse, *_ = _function(_FORWARD)(q, k, v, **numbers, return_lse=True)
    return out, lse, None


def _backward(dout: Tensor, saved: Saved, plan: Plan, lengths: Lengths | None) -> tuple[Tensor, Tensor, Tensor]:
    numbers = {**_plan(plan), **by_name(lengths), "softcap": plan.softcap}
    dq, dk, dv, *_ = _function(_BACKWARD)(
        saved.q, saved.k, saved.v, saved.out, dout, saved.lse, **numbers, deterministic=plan.deterministic
    )
    return dq, dk, dv


def _plan(plan: Plan) -> dict[str, Any]:
    left, right = (None if bound < 0 else bound for bound in plan.window)
    return {
        "softmax_scale": plan.scale,
        "causal": plan.causal,
        "window_size_left": left,
        "window_size_right": right,
    }


def _function(name: str) -> Any:
    return getattr(_interface(), name)


def _interface() -> Any:
    return imported("flash_attn.cute.interface", "flash-attn-4", _INSTALL)


class Flash4(FlashKernel):
    """``flash_attn.cute.flash_attn_func``."""

    name = "flash_4"
    vendor = Vendor(name="flash_4", forward=_forward, backward=_backward)
    tried = False  # a trial would compile a kernel that no model uses
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({"float16", "bfloat16"}),
        max_width=256,
        width_multiple=8,
        unlike_widths=True,
        groups=True,
        causal=True,
        window=True,
        softcap=True,
        sink=True,
        backward=True,
        deterministic=True,
    )

    def _missing(self) -> str | None:
        unfit = unfit_gpu(range(9, 12), "compute capability 9 to 11")
        if unfit is not None:
            return unfit
        found = _interface()
        return found if isinstance(found, str) else _unlike_release()

    def version(self) -> str:
        return version_of("flash-attn-4")  # its own __version__ asks for another name and is always 0.0.0

    def _limits(self, spec: AttentionSpec) -> Iterator[Reason]:
        width, v_width = spec.qk_width, spec.v_width
        if not isinstance(width, int) or not isinstance(v_width, int):
            return
        if width != v_width:
            if (width, v_width) not in (_UNLIKE_ON_BLACKWELL if _on_blackwell() else _UNLIKE):
                yield reason("head_width", detail=f"{width} with values of width {v_width}")
            if spec.groups > 1 and spec.grad:
                yield reason("grad", detail="for shared heads of unlike widths")
        elif _ALIKE < width != _WIDEST and _on_blackwell():
            yield reason("head_width", detail=f"{width} on this GPU")
        if spec.grad and (width, v_width) not in _BACKWARDS:
            detail = f"its gradients are wrong for some widths, and {width} with {v_width} is none that was tried"
            yield reason("kernel_bug", detail=detail)


class FlashVarlen4(Flash4):
    """``flash_attn.cute.flash_attn_varlen_func``, where keys are padded; without padding there is nothing to pack."""

    name = "flash_varlen_4"
    can = Capabilities(**{**vars(Flash4.can), "key_padding": True})


def _on_blackwell() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in _BLACKWELL


@functools.cache
def _unlike_release() -> str | None:
    """What its functions lack of what they are given here."""
    for name, given in _GIVEN.items():
        function = getattr(_interface(), name, None)
        lacking = given if function is None else given - inspect.signature(function).parameters.keys()
        if lacking:
            release = version_of("flash-attn-4")
            return f"flash-attn-4 {release} is not one that is known ({name} without {min(lacking)}): {_INSTALL}"
    return None
