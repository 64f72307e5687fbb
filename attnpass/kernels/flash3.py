"""FlashAttention-3: Hopper GPUs, compiled from flash-attention/hopper or loaded from the Hugging Face Hub.

    flash_3           batches of one length
    flash_varlen_3    padded keys, too: those that are seen are packed
    flash_3_hub       the build in kernels-community/flash-attn3, which the package `kernels` downloads

Python faces of it differ from month to month: the result without or with its log-sum-exp, windows as one argument or as
two, five results of a backward or eight. Its compiled library registers operations whose arguments have names and whose
backward writes into the tensors it is given, so those two are called: ``torch.ops.flash_attn_3.fwd`` and ``.bwd``.

Builds leave things out (a soft cap, widths, dtypes), and say so when they are run: each kind of call is tried first
(flash_base.py). Code from the Hub is loaded only where a user names `flash_3_hub`, never to find out whether it could.

Limits: no dropout, no ALiBi. Keys and values of two widths in two forms only. No deterministic backward beyond 192.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from attnpass.kernels.base import Capabilities
from attnpass.kernels.flash_base import FlashKernel
from attnpass.kernels.flash_ops import Lengths, Plan, Saved, Vendor, by_name
from attnpass.kernels.late import at_least, build_of, imported, unfit_gpu, version_of
from attnpass.reasons import Reason, reason
from attnpass.spec import AttentionSpec

_INSTALL = "build it from github.com/Dao-AILab/flash-attention/hopper"
_HUB = "kernels-community/flash-attn3"
_HUB_VERSION = 1
_HUB_INSTALL = "pip install 'kernels>=0.12'"
_HUB_OLDEST = (0, 12)
_GPUS, _HOPPER = range(9, 10), "compute capability 9.0 (Hopper)"
_WIDEST = 256
_FIXED_ORDER = 192  # the widest head with a backward that adds in a fixed order


def _vendor(name: str, ops: Callable[[], Any]) -> Vendor:
    return Vendor(name=name, forward=functools.partial(_forward, ops), backward=functools.partial(_backward, ops))


def _forward(
    ops: Callable[[], Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    plan: Plan,
    lengths: Lengths | None,
) -> tuple[Tensor, Tensor, None]:
    # one split: several are added up in an order of their own
    out, lse, *_ = ops().fwd(q, k, v, **by_name(lengths), **_plan(plan), num_splits=1)
    return out, lse, None


def _backward(
    ops: Callable[[], Any], dout: Tensor, saved: Saved, plan: Plan, lengths: Lengths | None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = saved.unwritten()
    ops().bwd(
        *(dout, saved.q, saved.k, saved.v, saved.out, saved.lse, dq, dk, dv),
        **by_name(lengths),
        **_plan(plan),
        deterministic=plan.deterministic,
    )
    return dq, dk, dv


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "softmax_scale": plan.scale,
        "is_causal": plan.causal,
        "window_size_left": plan.window[0],
        "window_size_right": plan.window[1],
        "softcap": plan.softcap,
    }


# -- where the operations come from ------------------------------------------------------------------------------------


def _library() -> str | None:
    """Loads the compiled library; what is missing where it cannot be."""
    found = imported("flash_attn_3._C", "FlashAttention-3", _INSTALL)
    if isinstance(found, str):
        return found
    return None if _complete(_ops()) else "this FlashAttention-3 registers no fwd and bwd: it is of another time"


def _ops() -> Any:
    return torch.ops.flash_attn_3


def _complete(ops: Any) -> bool:
    return all(hasattr(ops, name) for name in ("fwd", "bwd"))


@functools.cache
def _hub_ops() -> Any:
    """The operations of the build from the Hub, which is downloaded and run now."""
    module = _hub_module()
    interface = getattr(module, "flash_attn_interface", None)
    for holder in (module, interface):
        for name in ("ops", "flash_attn_3_gpu", "flash_attn_3_cuda"):
            found = getattr(holder, name, None)
            if found is not None and _complete(found):
                return found
    raise ImportError(f"{_HUB} has no operations fwd and bwd")


def _hub_module() -> ModuleType:
    import kernels  # type: ignore[import-not-found,unused-ignore]

    local = _locally()
    if local is not None and "package_name" in inspect.signature(kernels.get_local_kernel).parameters:
        # this release does not look for local kernels by itself
        return cast(ModuleType, kernels.get_local_kernel(local, "flash_attn3"))
    return cast(ModuleType, kernels.get_kernel(_HUB, version=_HUB_VERSION))


def _locally() -> Path | None:
    """A folder that stands for the repository: LOCAL_KERNELS="repository=folder:repository=folder", as in `kernels`."""
    for entry in os.environ.get("LOCAL_KERNELS", "").split(":"):
        repository, _, folder = entry.partition("=")
        if repository == _HUB and folder:
            return Path(folder)
    return None


# -- the kernels -------------------------------------------------------------------------------------------------------


class Flash3(FlashKernel):
    """``flash_attn_interface.flash_attn_func``."""

    name = "flash_3"
    vendor = _vendor("flash_3", _ops)
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({"float16", "bfloat16"}),
        max_width=512,
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
        return unfit_gpu(_GPUS, _HOPPER) or _library()

    def version(self) -> str:
        return version_of("flash-attn-3", "flash_attn_3") or build_of("flash_attn_3")

    def _limits(self, spec: AttentionSpec) -> Iterator[Reason]:
        width, v_width = spec.qk_width, spec.v_width
        if not isinstance(width, int) or not isinstance(v_width, int):
            return
        alike = width == v_width <= _WIDEST
        if not alike and not (128 < width <= 192 and 96 < v_width <= 128) and not (width <= 64 and v_width <= 512):
            yield reason("head_width", detail=f"{width} with values of width {v_width}")
        widest = max(width, v_width)
        if spec.grad and widest > _WIDEST:
            yield reason("head_width", detail=f"{widest} in a backward")
        if spec.grad and spec.deterministic and widest > _FIXED_ORDER:
            yield reason("not_deterministic")


class FlashVarlen3(Flash3):
    """``flash_attn_interface.flash_attn_varlen_func``, where keys are padded."""

    name = "flash_varlen_3"
    can = Capabilities(**{**vars(Flash3.can), "key_padding": True})


class Flash3Hub(Flash3):
    """The same from the Hub."""

    name = "flash_3_hub"
    only_by_name = True
    vendor = _vendor("flash_3_hub", _hub_ops)

    def _missing(self) -> str | None:
        unfit = unfit_gpu(_GPUS, _HOPPER)
        # by what is installed: a module of this name may be anybody's
        version = version_of("kernels")
        if unfit is not None or at_least(version, _HUB_OLDEST):
            return unfit
        return f"the package kernels is {f'{version}, too old' if version else 'not installed'}: {_HUB_INSTALL}"

    def version(self) -> str:
        return f"{_HUB} v{_HUB_VERSION}"
