"""What the kernels of flash-attn's kind have in common: masks as bounds, slopes and padded keys, one operation each.

    flash          flash.py      FlashAttention-2        bounds, ALiBi, soft cap, dropout
    flash_3        flash3.py     FlashAttention-3        bounds, soft cap where it was built in; Hopper
    flash_varlen*                ... and padded keys, by packing those that are seen (packed.py)

Bounds count from a query's own position, the last query standing at the last key, as these kernels do by themselves.
Sinks and the log-sum-exp are those of the operation (flash_ops.py). What a build leaves out cannot be told from its
version, so before a site gets a kernel, the kernel is run once, on sixteen keys of that kind (``trial``).
"""

from __future__ import annotations

import functools
import math
import operator
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from attnpass.cost import rated_us
from attnpass.errors import first_line
from attnpass.graph import Builder
from attnpass.kernels.base import Kernel
from attnpass.kernels.flash_ops import Lengths, Plan, Saved, Vendor, define
from attnpass.kernels.operands import upright
from attnpass.kernels.packed import packed
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec, Size

aten = torch.ops.aten
_GRID = 65535  # blocks along the second and third axis of a CUDA grid
_COUNTED = 2**31  # rows that 32 bits count
_KEYS = 16


class FlashKernel(Kernel):
    """A kernel around one :class:`Vendor`."""

    takes = "forms"
    vendor: Vendor
    tried = True  # asked to run before it is taken

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        found = [*super().refusals(spec), *_too_many(spec), *self._limits(spec)]
        yield from found
        if self.tried and not found and spec.device == "cuda" and self.available() is None:
            failure = trial(self.vendor, _sample(spec))
            if failure is not None:
                yield reason("unavailable", detail=f"this build does not compute it: {failure}")

    def available(self) -> Reason | None:
        missing = self._missing()
        return None if missing is None else reason("unavailable", detail=missing)

    @abstractmethod
    def _missing(self) -> str | None:
        """Why it cannot run here, and what to do."""

    def _limits(self, spec: AttentionSpec) -> Iterator[Reason]:
        """What this kernel refuses beyond its table."""
        return iter(())

    def gives_lse(self, spec: AttentionSpec) -> bool:
        return True

    def cost(self, spec: AttentionSpec) -> float | None:
        return rated_us(spec, self.name)

    def emit(self, b: Builder, call: Call) -> Node:
        return b.call(operator.getitem, self._call(b, call), 0)

    def emit_with_lse(self, b: Builder, call: Call) -> tuple[Node, Node]:
        results = self._call(b, call)
        out, lse = (b.call(operator.getitem, results, at) for at in (0, 1))
        if self.vendor.empty != -math.inf:
            lse = b.call(aten.masked_fill.Scalar, lse, b.call(aten.eq.Scalar, lse, self.vendor.empty), -math.inf)
        return out, lse

    def _call(self, b: Builder, call: Call) -> Node:
        forms, spec = call.forms, call.spec
        assert forms is not None
        q, scale = upright(b, call)
        order, ends = (None, None) if forms.keys is None else packed(b, forms.keys, call.k)
        left, right = (-1 if bound is None else bound for bound in (forms.left, forms.right))
        numbers = (scale, left, right, spec.softcap or 0.0, float(call.dropout), spec.deterministic)
        target = define(self.vendor)
        return b.call(target, q, call.k, call.v, forms.slopes, forms.sink, order, ends, *numbers)


def _too_many(spec: AttentionSpec) -> Iterator[Reason]:
    for size, name in ((spec.q[0], "batch rows"), (spec.q[1], "heads")):
        if isinstance(size, int) and size > _GRID:
            yield reason("no_form", detail=f"more than {_GRID} {name}")
    if spec.mask.key_padding and max(_rows(spec.q), _rows(spec.k)) >= _COUNTED:
        yield reason("no_form", detail=f"{_COUNTED} rows in one tensor")


def may_see_no_key(spec: AttentionSpec) -> bool:
    """Some query may stand before all keys: there are bounds, and there may be more queries than keys."""
    queries, keys = spec.queries, spec.keys
    if spec.mask.causal is None and spec.mask.window is None:
        return False
    return queries != keys and not (isinstance(queries, int) and isinstance(keys, int) and queries <= keys)


def _rows(shape: tuple[Size, ...]) -> int:
    batch, _, length, _ = shape
    return batch * length if isinstance(batch, int) and isinstance(length, int) else 0


# -- a trial -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """All that decides which of a build's kernels a call needs."""

    device: str
    dtype: str
    width: int
    v_width: int
    left: int
    right: int
    slopes: bool
    softcap: float
    grad: bool
    deterministic: bool
    packed: bool


def _sample(spec: AttentionSpec) -> Sample:
    assert isinstance(spec.qk_width, int)
    assert isinstance(spec.v_width, int)
    return Sample(
        device=spec.device,
        dtype=spec.dtype,
        width=spec.qk_width,
        v_width=spec.v_width,
        left=-1 if spec.mask.window is None else 1,
        right=_right(spec),
        slopes=bool(spec.bias),
        softcap=0.0 if spec.softcap is None else 1.0,
        grad=spec.grad,
        deterministic=spec.deterministic,
        packed=spec.mask.key_padding,
    )


def _right(spec: AttentionSpec) -> int:
    """A bound of the same kind: none, the query's own position, or one further ahead."""
    mask, queries, keys = spec.mask, spec.queries, spec.keys
    if isinstance(mask.causal, int) and isinstance(queries, int) and isinstance(keys, int):
        return 0 if mask.causal == keys - queries else 1
    if mask.causal is not None:
        return 0
    return -1 if mask.window is None or mask.window[1] is None else 1


@functools.cache
def trial(vendor: Vendor, sample: Sample) -> str | None:
    """Run it once; what it says where it does not, None where it does. Nothing random is drawn."""
    with _disable_current_modes(), torch.no_grad():
        try:
            _run(vendor, sample)
        except torch.OutOfMemoryError:
            return None  # says nothing about the build
        except Exception as error:  # whatever a build says that was made without this
            return first_line(error)
    return None


def _run(vendor: Vendor, sample: Sample) -> None:
    dtype = getattr(torch, sample.dtype)
    shape = (_KEYS, 1) if sample.packed else (1, _KEYS, 1)
    q, k = (torch.zeros(*shape, sample.width, dtype=dtype, device=sample.device) for _ in "qk")
    v = torch.zeros(*shape, sample.v_width, dtype=dtype, device=sample.device)
    plan = Plan(
        scale=1.0,
        left=sample.left,
        right=sample.right,
        softcap=sample.softcap,
        dropout=0.0,
        deterministic=sample.deterministic,
    )
    slopes = torch.zeros(1, device=sample.device) if sample.slopes else None
    ends = torch.tensor([0, _KEYS], dtype=torch.int32, device=sample.device)
    lengths = Lengths(queries=ends, keys=ends, most_queries=_KEYS, most_keys=_KEYS) if sample.packed else None
    out, lse, rng = vendor.forward(q, k, v, slopes, plan, lengths)
    if sample.grad:
        saved = Saved(q=q, k=k, v=v, out=out, lse=lse, rng=lse if rng is None else rng, slopes=slopes)
        vendor.backward(torch.zeros_like(out), saved, plan, lengths)
    if q.is_cuda:
        torch.cuda.synchronize()  # an error of the GPU shows here, not in the model
