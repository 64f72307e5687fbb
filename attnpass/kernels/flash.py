"""FlashAttention-2, the package flash-attn: any NVIDIA GPU from Ampere on.

    flash           batches of one length
    flash_varlen    padded keys, too: those that are seen are packed

Its functions below the public ones are called, which give the log-sum-exp and take it back; they are the same from 2.7
to 2.8. A query without any key has a log-sum-exp of +inf here, and a result of zero.

Limits: no dropout beside a soft cap, and its probability is rounded to 1/255. Where there are more queries than keys, a
bound ahead of as many keys as there are is taken for none, and beside one behind one is made up: both are refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnpass.errors import Refuse
from attnpass.graph import Builder, value
from attnpass.kernels.base import Capabilities
from attnpass.kernels.flash_base import FlashKernel
from attnpass.kernels.flash_ops import Lengths, Plan, Saved, Vendor, by_name
from attnpass.kernels.late import at_least, imported, unfit_gpu, version_of
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec

_INSTALL = "pip install flash-attn"
_OLDEST = (2, 7)
_GPUS = range(8, 100)
_PAST = "bounds that go past the keys, for more queries than keys"


def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, plan: Plan, lengths: Lengths | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    target = "_flash_attn_forward" if lengths is None else "_flash_attn_varlen_forward"
    out, lse, _, rng = _function(target)(
        q, k, v, **by_name(lengths), **_plan(plan, slopes), causal=plan.causal, return_softmax=False
    )
    return out, lse, rng


def _backward(dout: Tensor, saved: Saved, plan: Plan, lengths: Lengths | None) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = saved.unwritten()
    target = "_flash_attn_backward" if lengths is None else "_flash_attn_varlen_backward"
    _function(target)(
        *(dout, saved.q, saved.k, saved.v, saved.out, saved.lse, dq, dk, dv),
        **by_name(lengths),
        **_plan(plan, saved.slopes),
        causal=plan.causal,
        deterministic=plan.deterministic,
        rng_state=saved.rng,
    )
    return dq, dk, dv


def _plan(plan: Plan, slopes: Tensor | None) -> dict[str, Any]:
    return {
        "dropout_p": plan.dropout,
        "softmax_scale": plan.scale,
        "window_size_left": plan.window[0],
        "window_size_right": plan.window[1],
        "softcap": plan.softcap,
        "alibi_slopes": None if slopes is None else slopes.contiguous(),
    }


@functools.cache
def _function(name: str) -> Any:
    """One of its functions, not the operation of the same name around it: a FlashAttention-3 of late 2025 registers
    its own operations under the same names, and whichever is imported last has them.
    """
    module = _interface()
    assert isinstance(module, ModuleType), module
    found = getattr(module, name)
    return getattr(found, "_init_fn", found)


def _interface() -> ModuleType | str:
    # flash-attn-4 alone is a package `flash_attn` too, but without this module
    return imported("flash_attn.flash_attn_interface", "flash-attn 2", _INSTALL)


class Flash(FlashKernel):
    """``flash_attn_func``."""

    name = "flash"
    vendor = Vendor(name="flash_2", forward=_forward, backward=_backward, random=True, empty=math.inf)
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({"float16", "bfloat16"}),
        max_width=256,
        width_multiple=8,
        groups=True,
        causal=True,
        window=True,
        alibi=True,
        softcap=True,
        sink=True,
        dropout=True,
        backward=True,
        deterministic=True,
    )

    def _missing(self) -> str | None:
        unfit = unfit_gpu(_GPUS, "compute capability 8.0 or above")
        if unfit is not None:
            return unfit
        found = _interface()
        return found if isinstance(found, str) else _too_old()

    def version(self) -> str:
        return version_of("flash-attn")

    def _call(self, b: Builder, call: Call) -> Node:
        ahead = call.forms.right if call.forms is not None else None
        queries, keys = value(call.q).shape[2], value(call.k).shape[2]
        if ahead is not None and not (statically_known_true(queries <= keys) or statically_known_true(ahead < keys)):
            raise Refuse("no_form", detail=_PAST)
        return super()._call(b, call)

    def _limits(self, spec: AttentionSpec) -> Iterator[Reason]:
        if spec.softcap is not None and spec.dropout != 0.0:
            yield reason("dropout", detail="beside a soft cap")
        if _misread(spec):
            yield reason("no_form", detail=_PAST)
        wide = isinstance(spec.qk_width, int) and spec.qk_width > 192
        if wide and spec.grad and spec.dropout != 0.0 and spec.device == "cuda" and _small_shared_memory():
            yield reason("dropout", detail=f"for heads of width {spec.qk_width} in a backward on this GPU")


class FlashVarlen(Flash):
    """``flash_attn_varlen_func``, where keys are padded; without padding there is nothing to pack."""

    name = "flash_varlen"
    can = Capabilities(**{**vars(Flash.can), "key_padding": True})


def _misread(spec: AttentionSpec) -> bool:
    """Some query stands before all keys, and its bound ahead is one that the kernel drops or makes up."""
    mask, queries, keys = spec.mask, spec.queries, spec.keys
    if queries == keys or (mask.causal is None and mask.window is None):
        return False
    ahead = mask.causal if mask.window is None or mask.causal is not None else mask.window[1]
    if not isinstance(queries, int) or not isinstance(keys, int):
        return ahead is None  # else the call is looked at when it is written
    # the spec counts from the first query and the first key, the kernel from the last of both
    return queries > keys and (not isinstance(ahead, int) or ahead - (keys - queries) >= keys)


def _small_shared_memory() -> bool:
    """GPUs that have no room for the backward of its widest heads with dropout."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() not in ((8, 0), (9, 0))


def _too_old() -> str | None:
    version = str(getattr(imported("flash_attn", "flash-attn 2", _INSTALL), "__version__", ""))
    return None if at_least(version, _OLDEST) else f"flash-attn {version} is too old: needs 2.7 or above, {_INSTALL}"
