"""Expected time of one forward call, from the spec alone: enough to tell which of two kernels to take, or none.

    operations / rate of the kernel for this form of mask and this width
    bytes / bandwidth                       below which no call comes, however few its operations
    + launches, the lists or packed keys that a mask needs, the repair of rows without a key

Rates and bandwidth are in rates.json, measured by ``python -m benchmarks.kernels`` on the devices that it names. Others
are slower or faster in about the same proportion, and only the proportion matters; ``autotune`` measures on the spot.
On the CPU only calls that take a while are told: of those a function is taken where it is clearly faster, because that
costs ten seconds of compiling. And those over some hundred tokens, where torch's kernel for the CPU may be slower than
what inductor writes without it (``python -m benchmarks.short``). Nothing was measured of other devices: there the
answer is None.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from attnpass.names import NATIVE
from attnpass.spec import AttentionSpec, EmptyRow, MaskSpec, Size, is_causal

_LISTS = 4  # launches: a site's share in making the lists of blocks, which sites of one mask have in common
_BLOCK = 128
_REPAIRED = 3  # launches: rows without a key, answered afterwards
_LONG = 5e8  # operations of a call on the CPU that takes a while: some ten milliseconds
_BRIEF = 2e7  # operations of a call for which it matters at all: a tenth of a millisecond
_BLOCKS = 192  # queries from which on torch's kernel for the CPU takes them by more than 32
_CACHED = 2**23  # scores of a call that the cache holds
_CLEARLY = 1.25  # by what more than a guess differs there: CPUs do not all compare as the one that was measured
# What inductor moves for each score in code that is not fused: written by the first product, read and written by the
# softmax, read by the second product, with a mask now and then. From two shapes on the H200 (14.5 and 16.5 bytes).
_UNFUSED_BYTES = 15.0

_LENGTH, _BATCH = 2048, 4  # where they are symbolic


@dataclass(frozen=True)
class _Kernel:
    """What was measured of one kernel."""

    masks: str  # "tensor": computes all scores; "blocks", "bounds": only those within
    tflops: Mapping[str, Mapping[int, float]]  # by the form of the mask, by width; counted on the scores that are kept


_ByLength = Mapping[int, Mapping[int, float]]  # and width


@dataclass(frozen=True)
class _Short:
    """What was measured of short sequences and one form of mask on a CPU."""

    tflops: _ByLength  # of torch's kernel, counted on all scores
    forward: _ByLength  # how long inductor's own code takes, in times of that kernel
    training: _ByLength  # the same, forward and backward


@dataclass(frozen=True)
class _Rates:
    """rates.json."""

    bytes_per_us: float
    products: float  # operations per microsecond of a large product
    launch: float  # microseconds of one more small kernel
    kernels: Mapping[str, _Kernel]
    short: Mapping[str, _Short]  # by the form of the mask


@functools.cache
def _measured() -> Mapping[str, _Rates]:
    """The tables of measured rates, by device, or by device and dtype."""
    found = json.loads(resources.files("attnpass").joinpath("rates.json").read_text(encoding="utf-8"))
    return {device: _read(table) for device, table in found.items()}


def _read(table: Mapping[str, Any]) -> _Rates:
    kernels = {
        name: _Kernel(
            masks=known["masks"],
            tflops={form: _by_number(by_width) for form, by_width in known["tflops"].items()},
        )
        for name, known in table["kernels"].items()
    }
    short = {
        form: _Short(**{kind: {int(n): _by_number(row) for n, row in rows.items()} for kind, rows in kinds.items()})
        for form, kinds in table.get("short", {}).items()
    }
    return _Rates(
        bytes_per_us=table["bytes_per_us"],
        products=table["products_tflops"] * 1e6,
        launch=table["launch_us"],
        kernels=kernels,
        short=short,
    )


def _by_number(row: Mapping[str, float]) -> Mapping[int, float]:
    return {int(number): rate for number, rate in row.items()}


def rates(spec: AttentionSpec) -> _Rates | None:
    """What was measured of the device of this attention."""
    known = _measured()
    return known.get(f"{spec.device} {spec.dtype}") or known.get(spec.device)


def rated_us(spec: AttentionSpec, kernel: str) -> float | None:
    """One call of a kernel that has been measured."""
    here = rates(spec)
    known = here.kernels.get(kernel) if here else None
    if here is None or known is None:
        return None
    if spec.device != "cpu":
        return _rated(spec, here, known)
    function = known.masks == "blocks"
    short = _short(spec, here)
    if short is not None and kernel == NATIVE:
        return _operations(spec) / (_at(short.tflops, spec) * 1e6)
    if _operations(spec) < _LONG or (function and spec.bias):  # T5's as a function took twice as long as its tensor
        return None
    return _rated(spec, here, known) * (_CLEARLY if function else 1.0)


def _rated(spec: AttentionSpec, here: _Rates, known: _Kernel) -> float:
    if known.masks == "tensor":
        return _by_tensor(spec, here, known)
    share = _kept(spec)
    # blocks that the edge of the mask cuts are computed whole
    edge = 0.0 if is_causal(spec) or spec.mask.empty else _BLOCK / _number(spec.keys, _LENGTH)
    extra = 0.0
    if known.masks == "blocks" and not spec.mask.empty:
        extra, edge = _LISTS * here.launch, _BLOCK / _number(spec.keys, _LENGTH)
    elif spec.mask.key_padding:
        extra = 4 * here.launch + 2 * _bytes(spec) / here.bytes_per_us  # keys and values are moved together
    if spec.sink or spec.empty_rows != "impossible":
        extra += here.launch
    share = min(1.0, share + edge)
    if known.masks == "blocks" and spec.bias:
        # No rate of a bias that is a function was measured (T5's takes a logarithm and a read for each score). It is
        # taken to cost what a tensor costs, so that nothing but the blocks left out speaks for the function: T5's
        # encoder stays with the tensor at any length.
        return _by_tensor(spec, here, here.kernels[NATIVE]) * share + extra
    return _time(spec, here, known, _form(spec), share) + extra


def _form(spec: AttentionSpec) -> str:
    """The form of mask whose rate is nearest for a kernel that leaves out what a mask takes away."""
    if spec.mask.dense:  # a function whose blocks are all looked at pair by pair
        return "tensor"
    return "causal" if spec.mask.causal is not None or spec.mask.window is not None else "full"


def called_us(spec: AttentionSpec) -> float | None:
    """A fused call that is there already, as it is: rows without a key it answers by itself."""
    return rated_us(replace(spec, empty_rows=EmptyRow.IMPOSSIBLE), NATIVE)


def unfused_us(spec: AttentionSpec) -> float | None:
    """The original's own operations, as a compiler leaves them: products, and scores in memory. On a CPU that is told
    only where it is clearly less than the fused call.
    """
    here = rates(spec)
    if here is None:
        return None
    if spec.device == "cpu":
        return _unfused_on_cpu(spec, here)
    bytes_ = _scores(spec) * _UNFUSED_BYTES * (2 if spec.dtype == "float32" else 1) + _bytes(spec)
    return _operations(spec) / here.products + bytes_ / here.bytes_per_us + _copies(spec, here) + 3 * here.launch


def _unfused_on_cpu(spec: AttentionSpec, here: _Rates) -> float | None:
    short, fused = _short(spec, here), rated_us(spec, NATIVE)
    if short is None or fused is None or spec.softcap is not None or spec.sink:
        return None
    if not (spec.grad or spec.bias) and _short_form(spec) == "tensor" and _number(spec.queries, _LENGTH) >= _BLOCKS:
        return None  # beside such a mask one spelling takes 0.7 times as long, and BERT's 1.4 times
    times = _at(short.training if spec.grad else short.forward, spec)
    doubt = 1.0 if spec.bias else _CLEARLY  # T5's own code was seen to be as fast as what was measured
    return fused * times if times * doubt < 1 else None


def _short(spec: AttentionSpec, here: _Rates) -> _Short | None:
    """The table for self-attention over some hundred tokens on a CPU, where this is such a one. It holds for shared
    heads as well: that the original repeats them was seen to make no difference.
    """
    length = spec.queries
    if not (here.short and isinstance(length, int) and length == spec.keys):
        return None
    if spec.dtype == "bfloat16" and not _measured_bfloat16():
        return None
    short = here.short[_short_form(spec)]
    least, most = min(short.tflops), max(short.tflops)
    within = least // 2 <= length <= most * 5 // 4 and _scores(spec) <= _CACHED
    return short if within and _operations(spec) >= _BRIEF else None


def _short_form(spec: AttentionSpec) -> str:
    if is_causal(spec):
        return "causal"
    return "full" if spec.mask.empty and not spec.bias else "tensor"


@functools.cache
def _measured_bfloat16() -> bool:
    """This CPU multiplies bfloat16 as the measured one does: by AVX-512. Where AMX does, torch's kernel is another."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16")) and not has.get("amx_tile")


def _at(table: _ByLength, spec: AttentionSpec) -> float:
    """The entry whose length is nearest, by their ratio, and then whose width is."""
    length, width = _number(spec.queries, _LENGTH), _width(spec)
    by_width = table[min(table, key=lambda n: abs(math.log(n / length)))]
    return _nearest(by_width, width)


def _nearest(by_width: Mapping[int, float], width: int) -> float:
    """A wider one rather than a narrower."""
    return by_width[min(by_width, key=lambda w: (w < width, abs(w - width)))]


def _width(spec: AttentionSpec) -> int:
    return max(_number(spec.qk_width, 64), _number(spec.v_width, 64))


def _by_tensor(spec: AttentionSpec, here: _Rates, known: _Kernel) -> float:
    """A kernel that is given every mask but a causal one as a tensor, and computes all scores."""
    if is_causal(spec):
        return _time(spec, here, known, "causal", _kept(spec))
    if spec.mask.empty and not spec.bias:
        return _time(spec, here, known, "full", 1.0)
    # A mask over keys alone is read from the cache. Its rate is that of a padded BERT of 512 tokens, where flex was
    # slower (4.19 ms for four layers, 3.95 so); at 16384 tokens it is 270, and that of flex 330.
    keys_alone = spec.mask == MaskSpec(key_padding=True) and not spec.bias
    return (
        _time(spec, here, known, "keys" if keys_alone else "tensor", 1.0) + _copies(spec, here) + _repairs(spec, here)
    )


def _copies(spec: AttentionSpec, here: _Rates) -> float:
    """Heads of k and v that are repeated, for a product or for a kernel that has no masks beside shared heads: written
    and read again. Next to nothing for a long prompt, most of the time for one token behind a long cache.
    """
    if spec.groups == 1:
        return 0.0
    return 2 * spec.groups * (_size(spec, spec.k) + _size(spec, spec.v)) / here.bytes_per_us


def _repairs(spec: AttentionSpec, here: _Rates) -> float:
    """Rows without a key: one more look at the mask, and at the queries or at the result."""
    if spec.empty_rows == "impossible":
        return 0.0
    masks = 0.0
    if spec.mask != MaskSpec(key_padding=True):
        masks = _scores(spec) / _number(spec.q[1], 1) / here.bytes_per_us
    if spec.empty_rows == "mean" and not spec.grad:
        return here.launch + masks  # queries of zero, in whatever made the queries
    return _REPAIRED * here.launch + masks


def _time(spec: AttentionSpec, here: _Rates, known: _Kernel, form: str, share: float) -> float:
    by_width = next(known.tflops[name] for name in (form, "causal", "full") if name in known.tflops)
    rate = _nearest(by_width, _width(spec)) * 1e6
    return max(_operations(spec) * share / rate, _bytes(spec) / here.bytes_per_us) + here.launch


def _operations(spec: AttentionSpec) -> float:
    return 2 * _scores(spec) * (_number(spec.qk_width, 64) + _number(spec.v_width, 64))


def _scores(spec: AttentionSpec) -> float:
    outer = _number(spec.q[0], _BATCH) * _number(spec.q[1], 1)
    return outer * _number(spec.queries, _LENGTH) * _number(spec.keys, _LENGTH)


def _bytes(spec: AttentionSpec) -> float:
    return math.fsum(_size(spec, shape) for shape in (spec.q, spec.k, spec.v))


def _size(spec: AttentionSpec, shape: tuple[Size, ...]) -> float:
    """Bytes of one operand."""
    sizes = (_number(size, usual) for size, usual in zip(shape, (_BATCH, 1, _LENGTH, 64), strict=True))
    return math.prod(sizes) * (4 if spec.dtype == "float32" else 2)


def _kept(spec: AttentionSpec) -> float:
    """The share of the scores that the closed forms keep; what depends on data is taken to keep all."""
    queries, keys = _number(spec.queries, _LENGTH), _number(spec.keys, _LENGTH)
    mask = spec.mask
    left = right = float(keys)  # how far back and ahead a query sees
    if mask.causal is not None:
        right = _offset(mask.causal, 0)
    if mask.window is not None:
        left = _offset(mask.window[0], keys)
        right = min(right, _offset(mask.window[1], keys))
    if mask.chunk is not None:
        left = min(left, _offset(mask.chunk, keys) / 2)
        right = min(right, _offset(mask.chunk, keys) / 2)
    steps = 64
    seen = 0.0
    for step in range(steps):
        i = (step + 0.5) / steps * queries
        seen += max(0.0, min(keys, i + right + 1) - max(0.0, i - left))
    share = seen / steps / keys
    return min(1.0, share + (_offset(mask.prefix, 0) / keys if mask.prefix is not None else 0.0))


def _offset(size: Size | None, otherwise: float) -> float:
    return float(size) if isinstance(size, int) else otherwise


def _number(size: Size, otherwise: int) -> int:
    return size if isinstance(size, int) else otherwise
