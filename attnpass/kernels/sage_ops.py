"""Operations around SageAttention, which multiplies integers and eight-bit floats in place of half-precision numbers.

    attnpass::sage(q, k, v, order?, ends?, form, scale, causal) -> out
    attnpass::sage_uncaptured(...)           the same, for forms that cannot be part of a CUDA graph

q, k, v and out are (batch, heads, length, width); the memory of out is (batch, length, heads, width), the last two
rounded up to what the kernel computes. `order` and `ends` pack the keys (packed.py). There is no backward.

What the package does wrong as it is shipped (read in 1.0.6 and in 2.2.0) is mended here or refused in sage.py:

- it subtracts the mean of the keys from the caller's own tensor (1.0.6): that form gets a copy;
- its Triton kernels for causal masks read the scale of a block of keys that there is none of, where the length leaves
  half of the last 128 over: lengths are rounded up, with rows that no other row sees;
- a column of values that holds nothing but zeros becomes NaN in eight bits, 0 * (1 / 0): such columns are put back;
- its CUDA kernels start on the default stream, whatever the current one: all of the call is moved there, both streams
  wait for one another, and no CUDA graph can hold it;
- with packed keys it waits for the GPU to tell their number, which no CUDA graph can hold either, and takes the mean
  over what stands behind the last key: that mean is taken here;
- it switches the current device.

Its entry points swallow arguments that they do not know, masks among them, so nothing but the arguments here is given.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpass.kernels import ops
from attnpass.kernels.flash_ops import aligned

_BLOCK = 128  # queries that one causal block holds
_FAINT = 1e-35  # below this, one over the greatest of a column overflows in float32


@dataclass(frozen=True, kw_only=True)
class Form:
    """One entry point of the package."""

    function: str
    error: float  # relative, in L2, that tests hold it to: about half as much again as was measured on an H200
    exact_widths: bool = False  # it takes the widths that it computes, and no other
    writes_keys: bool = False
    eight_bit_values: bool = False
    default_stream: bool = False
    waits: bool = False  # for the GPU

    @property
    def captured(self) -> bool:
        """It can be part of a CUDA graph."""
        return not (self.default_stream or self.waits)

    def width(self, width: Any) -> Any:
        """The width that it computes."""
        return width if self.exact_widths else 64 if width <= 64 else 128


_16, _8 = 2e-2, 6e-2  # values in sixteen and in eight bits
_QUANTIZED = "sageattn_qk_int8_pv"
FORMS = {
    "sage1": Form(function="sageattn", error=_16, exact_widths=True, writes_keys=True),
    "sage": Form(function="sageattn", error=_8, eight_bit_values=True, default_stream=True),
    "sage_varlen": Form(function="sageattn_varlen", error=_16, waits=True),
    "fp16_triton": Form(function=f"{_QUANTIZED}_fp16_triton", error=_16),
    "fp16_cuda": Form(function=f"{_QUANTIZED}_fp16_cuda", error=_16, default_stream=True),
    "fp8_cuda": Form(function=f"{_QUANTIZED}_fp8_cuda", error=_8, eight_bit_values=True, default_stream=True),
    "fp8_cuda_sm90": Form(function=f"{_QUANTIZED}_fp8_cuda_sm90", error=_8, eight_bit_values=True, default_stream=True),
}

_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? order, Tensor? ends, str form, float scale, bool causal) -> Tensor"


@functools.cache
def operation(form: str) -> Callable[..., Any]:
    """The operation that runs this form."""
    return _defined(FORMS[form].captured)


@functools.cache
def _defined(captured: bool) -> Callable[..., Any]:
    name = "sage" if captured else "sage_uncaptured"
    tags = () if captured else (torch.Tag.cudagraph_unsafe,)
    return ops.register(name, _SCHEMA, _attend, _fake, tags)._opoverload


def _fake(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, ends: Tensor | None, form: str, scale: float, causal: bool
) -> Tensor:
    batch, heads, queries, width = q.shape
    wide = FORMS[form].width(width)
    rows = -(-queries // _BLOCK) * _BLOCK if causal else queries
    strides = (rows * heads * wide, wide, heads * wide, 1)
    return q.new_empty_strided((batch, heads, queries, width), strides)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, ends: Tensor | None, form: str, scale: float, causal: bool
) -> Tensor:
    known = FORMS[form]
    queries, width = q.shape[2:]
    if max(q.numel(), k.numel()) // width * known.width(width) >= 2**31:
        # refused beforehand where the sizes are known
        raise RuntimeError("SageAttention counts elements in 32 bits; this call has more")
    with _place(q.device, known) as home:
        if known.function == "sageattn_varlen":
            out = _packed(known, q, k, v, order, ends, scale)
        else:
            out = _whole(known, q, k, v, scale, causal)
        out = out[:, :queries, :, :width]
        if known.eight_bit_values:
            columns = _zero_columns(v).repeat_interleave(q.shape[1] // v.shape[1], 2)
            out.masked_fill_(columns, 0.0)
        if home is not None:
            out.record_stream(home)  # it was made on the default stream and will be read on this one
    return out.transpose(1, 2)


def _whole(known: Form, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """(batch, rows, heads, computed width)"""
    given = k
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    rows = -q.shape[1] % _BLOCK if causal else 0
    columns = known.width(q.shape[3]) - q.shape[3]
    if rows:
        # their mean, which the package subtracts from all keys, is then what it was
        k = torch.cat((k, k.mean(1, keepdim=True).expand(-1, rows, -1, -1)), 1)
    k = aligned(_padded(k, columns, 0))
    q, v = (aligned(_padded(x, columns, rows)) for x in (q, v))
    if known.writes_keys and k.data_ptr() == given.data_ptr():
        k = k.clone(memory_format=torch.contiguous_format)
    out: Tensor = _entry(known)(q, k, v, tensor_layout="NHD", is_causal=causal, sm_scale=scale)
    return out.contiguous()


def _packed(
    known: Form, q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, ends: Tensor | None, scale: float
) -> Tensor:
    """The same, of batch rows with keys of their own number."""
    batch, heads, queries, width = q.shape
    columns = known.width(width) - width
    most = k.shape[2]
    q, k, v = (_padded(x.transpose(1, 2), columns, 0).flatten(0, 1) for x in (q, k, v))
    # 64 bits: the kernels multiply them with strides
    starts = torch.arange(0, (batch + 1) * queries, queries, device=q.device)
    if order is None or ends is None:
        ends = torch.arange(0, (batch + 1) * most, most, device=q.device)
    else:
        k, v = (x.index_select(0, order) for x in (k, v))
        ends = ends.long()
    unseen = torch.arange(k.shape[0], device=k.device) >= ends[-1]
    k = k.masked_fill(unseen[:, None, None], 0.0)
    # any vector may be subtracted from all keys of a query; with their mean fewer bits are lost
    mean = k.sum(0, keepdim=True, dtype=torch.float32) / ends[-1].clamp(min=1)
    k = k - mean.to(k.dtype)
    q, v = aligned(q), aligned(v)
    out: Tensor = _entry(known)(q, k, v, starts, ends, queries, most, is_causal=False, sm_scale=scale, smooth_k=False)
    return out.contiguous().view(batch, queries, heads, -1)


def _entry(known: Form) -> Callable[..., Tensor]:
    entry: Callable[..., Tensor] = getattr(importlib.import_module("sageattention"), known.function)
    return entry


def _padded(x: Tensor, columns: int, rows: int) -> Tensor:
    """(batch, length, heads, width) with columns and rows of zeros appended."""
    return torch.nn.functional.pad(x, (0, columns, 0, 0, 0, rows)) if columns or rows else x


def _zero_columns(v: Tensor) -> Tensor:
    """(batch, 1, heads, width): where values are zero for all keys, or too small to be divided by."""
    least, greatest = torch.aminmax(v.transpose(1, 2), dim=1, keepdim=True)
    return torch.maximum(-least, greatest) < _FAINT


@contextlib.contextmanager
def _place(device: torch.device, known: Form) -> Iterator[torch.cuda.Stream | None]:
    """On the device of the operands, and on the stream that the kernels start on; yields the one that was current, if
    that is another.
    """
    if device.type != "cuda":
        yield None
        return
    with torch.cuda.device(device):
        home, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
        if not known.default_stream or home == default:
            yield None
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("SageAttention's CUDA kernels start on the default stream: no CUDA graph can hold them")
        default.wait_stream(home)
        with torch.cuda.stream(default):
            yield home
        home.wait_stream(default)
