"""xformers' memory-efficient attention, which takes the best of what it finds: flash-attn 3, flash-attn 2, cutlass.

Which one it is depends on what else is installed, on the GPU, and on the call; a call that none of them takes is a
refusal, because each kind of call is tried once before it is chosen (flash_base.py). Masks are objects there:

    right = 0                LowerTriangularFromBottomRightMask (LowerTriangularMask counts from the first of both)
    right = 0, left          LowerTriangularFromBottomRightLocalAttentionMask, of left + 1 keys
    left, right              LocalAttentionFromBottomRightMask

Its functions with an explicit log-sum-exp are called, one forward and one backward, inside an operation of ours
(flash_ops.py); they have no dropout. Shared heads are copied: its form for them has no backward.

Three things about its installation are told by ``available``: without libcudart.so.12 a build for CUDA 12 imports, and
then says of each of its operations that it "wasn't build with CUDA support"; FlashAttention-4 alone is taken by it for
flash-attn 2, which ends the import; so does a flash-attn of a version that it does not know.

Limits: no padded keys (its BlockDiagonalMask wants their number on the host), no tensor of biases, no rows without a
key: what the log-sum-exp says of those differs between the three.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from attnpass.kernels.base import Capabilities
from attnpass.kernels.flash_base import FlashKernel, may_see_no_key
from attnpass.kernels.flash_ops import Lengths, Plan, Saved, Vendor
from attnpass.kernels.late import imported, unfit_gpu, version_of
from attnpass.reasons import Reason, reason
from attnpass.spec import AttentionSpec

_INSTALL = "pip install xformers"
_GPUS = range(8, 100)
_NEEDED = ("memory_efficient_attention_forward_requires_grad", "memory_efficient_attention_backward", "attn_bias")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, plan: Plan, lengths: Lengths | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    fmha = _fmha()
    k, v = (_repeated(x, q) for x in (k, v))
    given = {"attn_bias": _mask(fmha, plan, q, k), "scale": plan.scale}
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, **given)
    return out, lse[..., : q.shape[1]], None  # cutlass rounds the length up


def _backward(dout: Tensor, saved: Saved, plan: Plan, lengths: Lengths | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = saved.q, saved.k, saved.v
    fmha, wide = _fmha(), [_repeated(x, q) for x in (k, v)]
    given = {"attn_bias": _mask(fmha, plan, q, k), "scale": plan.scale}
    dq, dk, dv = fmha.memory_efficient_attention_backward(dout, saved.out, saved.lse, q, *wide, **given)
    return dq, _summed(dk, k), _summed(dv, v)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """(batch, length, heads, width) with a head for each of q's."""
    groups = q.shape[2] // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, 2)


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    groups = grad.shape[2] // x.shape[2]
    return grad if groups == 1 else grad.reshape(*x.shape[:3], groups, x.shape[3]).sum(3)


def _mask(fmha: Any, plan: Plan, q: Tensor, k: Tensor) -> Any:
    known = fmha.attn_bias
    if plan.left == plan.right == -1:
        return None
    if plan.right == 0:
        if plan.left == -1:
            return known.LowerTriangularFromBottomRightMask()
        return known.LowerTriangularFromBottomRightLocalAttentionMask(plan.left + 1)
    far = max(q.shape[1], k.shape[1])  # it has no bound at all on neither side alone
    left, right = (far if bound == -1 else bound for bound in (plan.left, plan.right))
    return known.LocalAttentionFromBottomRightMask(left, right)


def _fmha() -> Any:
    found = _module()
    assert isinstance(found, ModuleType), found
    return found.fmha


def _module() -> ModuleType | str:
    found = imported("xformers.ops", "xformers", _INSTALL)
    if isinstance(found, str) and "flash_attn" in found:
        found += "; it takes FlashAttention-4 alone for flash-attn 2: install flash-attn 2 as well, or neither"
    return found


def _unfit(ops: ModuleType) -> str | None:
    """Why an xformers that was imported would not do."""
    fmha = getattr(ops, "fmha", None)
    missing = [name for name in _NEEDED if not hasattr(fmha, name)]
    if missing:
        return f"xformers {version_of('xformers')} has no {missing[0]}: {_INSTALL} of 0.0.29 to 0.0.35"
    library = imported("xformers._cpp_lib", "xformers", _INSTALL)
    if getattr(library, "_built_with_cuda", True):
        return None
    error: BaseException | None = getattr(library, "_cpp_library_load_exception", None)
    while error is not None and error.__cause__ is not None:
        error = error.__cause__  # what the dynamic loader said
    why = "it was built without CUDA" if error is None else str(error).partition("\n")[0]
    if "libcudart.so." in why:
        major = why.partition("libcudart.so.")[2].partition(":")[0].strip()
        why += (
            f"; it was built for CUDA {major}: pip install nvidia-cuda-runtime-cu{major}, "
            f"and preload libcudart.so.{major} before xformers is imported"
        )
    return f"the CUDA part of xformers was not loaded: {why}"


class Xformers(FlashKernel):
    """``xformers.ops.memory_efficient_attention``."""

    name = "xformers"
    vendor = Vendor(name="xformers", forward=_forward, backward=_backward)
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        width_multiple=8,
        unlike_widths=True,
        groups=True,
        causal=True,
        window=True,
        sink=True,
        backward=True,
    )

    def _missing(self) -> str | None:
        unfit = unfit_gpu(_GPUS, "compute capability 8.0 or above")
        if unfit is not None:
            return unfit
        found = _module()
        return found if isinstance(found, str) else _unfit(found)

    def version(self) -> str:
        return version_of("xformers")

    def shares_heads(self, spec: AttentionSpec) -> bool:
        return False

    def _limits(self, spec: AttentionSpec) -> Iterator[Reason]:
        if may_see_no_key(spec):
            yield reason("no_form", detail="a causal mask or a window where there may be more queries than keys")
        if spec.mask.window is not None and spec.dtype == "float32":
            yield reason("no_form", detail="a window in float32")
