"""SageAttention: scores from eight-bit integers, values in half precision or eight-bit floats.

    sage                              what the package itself takes for the GPU
    sage_varlen                       padded keys, by packing those that are seen (packed.py)
    sage_qk_int8_pv_fp16_triton       Triton, values in float16
    sage_qk_int8_pv_fp16_cuda         compiled, values in float16
    sage_qk_int8_pv_fp8_cuda          compiled for 8.9 and above, values in eight bits
    sage_qk_int8_pv_fp8_cuda_sm90     compiled for 9.0, values in eight bits

All compute in fewer bits than their inputs have, so none is taken unless the user allows it; sage_ops.py says how far
off each may be. Values beyond 65504 overflow where they are taken in float16.

Two releases are known: 1.0.6, which needs Triton alone and has `sage` alone, and 2.2, which has to be built from
source. What each does wrong is refused here or mended in sage_ops.py. No backward, no mask but a causal one over as
many keys as queries; rows without a key in `sage_varlen` alone.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch.fx import Node

from attnpass.cost import rated_us
from attnpass.graph import Builder
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.kernels.late import imported, unfit_gpu, version_of
from attnpass.kernels.operands import upright
from attnpass.kernels.packed import packed
from attnpass.kernels.sage_ops import FORMS, operation
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec

aten = torch.ops.aten

_PACKAGE = "sageattention"
_FIRST, _SECOND = (1, 0, 6), (2, 2)
_FROM_SOURCE = "build it from source, github.com/thu-ml/SageAttention"
_GRID = 65535  # blocks along the second and third axis of a CUDA grid
_COUNTED = 2**31  # elements that its offsets can count
_WIDEST = 128

# GPUs by compute capability, and which part of the package has to be compiled for them
Parts = Mapping[tuple[int, int], str]
_TRITON: Parts = dict.fromkeys([(8, 0), (8, 6), (8, 7), (8, 9), (9, 0)], "")
_HALF: Parts = dict.fromkeys([(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)], "SM80_ENABLED")
_EIGHT_BITS: Parts = dict.fromkeys([(8, 9), (9, 0), (10, 0), (12, 0), (12, 1)], "SM89_ENABLED")
_HOPPER: Parts = {(9, 0): "SM90_ENABLED"}
_CHOSEN: Parts = {
    (8, 0): "SM80_ENABLED",
    (8, 6): "",
    (8, 9): "SM89_ENABLED",
    (9, 0): "SM90_ENABLED",
    (12, 0): "SM89_ENABLED",
    (12, 1): "SM89_ENABLED",
}


class SageKernel(Kernel):
    """One entry point of the package."""

    takes = "forms"
    can = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({"float16", "bfloat16"}),
        max_width=_WIDEST,
        groups=True,
        causal=True,
        approximate=True,
    )
    form: str  # of sage_ops.FORMS
    parts: Parts

    def version(self) -> str:
        return version_of(_PACKAGE)

    def available(self) -> Reason | None:
        missing = self._missing()
        return None if missing is None else reason("unavailable", detail=missing)

    def _missing(self) -> str | None:
        unfit = unfit_gpu(range(8, 13), "compute capability 8.0 or above")
        if unfit is not None:
            return unfit
        found = imported(_PACKAGE, "SageAttention", self._install())
        if isinstance(found, str):
            return found
        if not self._knows(_release()):
            return f"SageAttention {self.version() or 'of no version'} will not do: {self._install()}"
        capability = torch.cuda.get_device_capability()
        parts = self._parts()
        if capability not in parts:
            return f"SageAttention has no such kernel for compute capability {capability[0]}.{capability[1]}"
        part = parts[capability]
        if not callable(getattr(found, FORMS[self._form()].function, None)):
            return f"this SageAttention has no {FORMS[self._form()].function}: {self._install()}"
        if part and not getattr(importlib.import_module(f"{_PACKAGE}.core"), part, False):
            return f"SageAttention was not compiled for this GPU ({part} is off): {_FROM_SOURCE}"
        return None

    def _install(self) -> str:
        return f"needs 2.2 or above; {_FROM_SOURCE}"

    def _knows(self, version: tuple[int, ...]) -> bool:
        return version >= _SECOND

    def _parts(self) -> Parts:
        return self.parts

    def _form(self) -> str:
        return self.form

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        if spec.mask.causal is not None and spec.queries != spec.keys:
            # its diagonal starts at the first query and the first key
            yield reason("no_form", detail="a causal mask over more or fewer keys than queries")
        for size, what in ((spec.q[0], "batch rows"), (spec.q[1], "heads")):
            if isinstance(size, int) and size > _GRID:
                yield reason("no_form", detail=f"more than {_GRID} {what}")
        if any(_elements(shape) >= _COUNTED for shape in (spec.q, spec.k)):
            yield reason("no_form", detail=f"{_COUNTED} elements in one tensor")

    def tolerance(self, dtype: str) -> float:
        # the largest error lies as far out as the largest element does; declared is the one of all elements together
        return 2 * FORMS[self._form()].error / torch.finfo(getattr(torch, dtype)).eps

    def cost(self, spec: AttentionSpec) -> float | None:
        return rated_us(spec, self.name)

    def emit(self, b: Builder, call: Call) -> Node:
        forms, form = call.forms, self._form()
        assert forms is not None
        q, scale = upright(b, call)
        order, ends = (None, None) if forms.keys is None else packed(b, forms.keys, call.k)
        return b.call(operation(form), q, call.k, call.v, order, ends, form, scale, forms.causal)


class Sage(SageKernel):
    """``sageattn``: of 2.2 the form that suits the GPU, of 1.0.6 the only one that there is."""

    name = "sage"

    def _install(self) -> str:
        return f"pip install sageattention, which is 1.0.6 and needs Triton alone; for 2.2 {_FROM_SOURCE}"

    def _knows(self, version: tuple[int, ...]) -> bool:
        return version == _FIRST or version >= _SECOND

    def _parts(self) -> Parts:
        return _TRITON if self._is_first() else _CHOSEN

    def _form(self) -> str:
        return "sage1" if self._is_first() else "sage"

    def _is_first(self) -> bool:
        return _release() == _FIRST

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        if not self._is_first():
            return
        if spec.qk_width not in (64, 96, 128):
            yield reason("head_width", detail=f"{spec.qk_width}: 1.0.6 has 64, 96 and 128")
        if spec.mask.causal is None and not (isinstance(spec.keys, int) and spec.keys % 64 == 0):
            # what fills the last block up takes part in the softmax, with scores of zero
            yield reason("kernel_bug", detail="1.0.6 is right only where the number of keys is a multiple of 64")


class SageVarlen(SageKernel):
    """``sageattn_varlen``. In 1.0.6 what fills each row's last block up takes part in the softmax: it will not do."""

    name = "sage_varlen"
    can = Capabilities(**{**vars(SageKernel.can), "causal": False, "key_padding": True})
    form = "sage_varlen"
    parts = _TRITON

    def gives_lse(self, spec: AttentionSpec) -> bool:
        return True

    def emit_with_lse(self, b: Builder, call: Call) -> tuple[Node, Node]:
        """What is asked of the log-sum-exp of a kernel that takes forms is whether it is -inf, which the keys tell: a
        batch row has keys for all its queries or for none. Elsewhere it is zero here.
        """
        forms = call.forms
        assert forms is not None
        shape = [b.size(call.q, dim) for dim in range(3)]
        if forms.keys is None:
            return self.emit(b, call), b.call(aten.new_zeros.default, call.q, shape, dtype=torch.float32)
        any_key = b.call(aten.any.dim, b.call(aten.squeeze.dim, forms.keys, 1), -1)  # (batch or 1, 1)
        zero = b.call(aten.new_zeros.default, call.q, [], dtype=torch.float32)
        lse = b.call(aten.where.ScalarOther, any_key, zero, -math.inf)
        return self.emit(b, call), b.call(aten.expand.default, b.call(aten.unsqueeze.default, lse, 1), shape)


class SageFp16Triton(SageKernel):
    """``sageattn_qk_int8_pv_fp16_triton``. Its masks are never used: floats are added to scores in another base."""

    name = "sage_qk_int8_pv_fp16_triton"
    only_by_name = True  # `sage` takes the one that suits the GPU
    form = "fp16_triton"
    parts = _TRITON


class SageFp16Cuda(SageKernel):
    """``sageattn_qk_int8_pv_fp16_cuda``."""

    name = "sage_qk_int8_pv_fp16_cuda"
    only_by_name = True
    form = "fp16_cuda"
    parts = _HALF


class SageFp8Cuda(SageKernel):
    """``sageattn_qk_int8_pv_fp8_cuda``."""

    name = "sage_qk_int8_pv_fp8_cuda"
    only_by_name = True
    form = "fp8_cuda"
    parts = _EIGHT_BITS


class SageFp8CudaSm90(SageKernel):
    """``sageattn_qk_int8_pv_fp8_cuda_sm90``."""

    name = "sage_qk_int8_pv_fp8_cuda_sm90"
    only_by_name = True
    form = "fp8_cuda_sm90"
    parts = _HOPPER


@functools.cache
def _release() -> tuple[int, ...]:
    """The installed version, ``2.2.0+cu130`` being (2, 2, 0); empty where there is none. Nothing is imported."""
    return tuple(int(part) for part in re.findall(r"\d+", version_of(_PACKAGE).partition("+")[0])[:3])


def _elements(shape: tuple[int | str, ...]) -> int:
    """How many elements the kernel counts, whose heads may be padded to the widest; zero where that is not known."""
    known = [size for size in shape[:3] if isinstance(size, int)]
    return math.prod(known) * _WIDEST if len(known) == 3 else 0
