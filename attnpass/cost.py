"""Expected time of one forward call, from the spec alone: enough to tell which of two kernels to take, or none.

    operations / rate of the kernel for this form of mask and this width
    bytes / bandwidth                       below which no call comes, however few its operations
    + launches, the lists or packed keys that a mask needs, the repair of rows without a key

Rates and bandwidth are in rates.json, measured by ``python -m benchmarks.kernels`` on the device that it names. Other
GPUs are slower or faster in about the same proportion, and only the proportion matters; ``autotune`` measures on the
spot. Nothing was measured of other devices: there the answer is None.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from attnpass.spec import AttentionSpec, MaskSpec, Size, is_causal

_LAUNCH = 5.0  # one more small kernel
_LISTS = 4 * _LAUNCH  # a site's share in making the lists of blocks, which sites of one mask have in common
_BLOCK = 128
_REPAIRED = 3 * _LAUNCH  # rows without a key, answered afterwards
# What inductor moves for each score in code that is not fused: written by the first product, read and written by the
# softmax, read by the second product, with a mask now and then. From two shapes on the H200 (14.5 and 16.5 bytes).
_UNFUSED_BYTES = 15.0

_LENGTH, _BATCH = 2048, 4  # where they are symbolic


@dataclass(frozen=True)
class _Kernel:
    """What was measured of one kernel."""

    masks: str  # "tensor": computes all scores; "blocks", "bounds": only those within
    tflops: Mapping[str, Mapping[int, float]]  # by the form of the mask, by width; counted on the scores that are kept


@dataclass(frozen=True)
class _Rates:
    """rates.json."""

    bytes_per_us: float
    products: float  # operations per microsecond of a large product
    kernels: Mapping[str, _Kernel]


@functools.cache
def rates() -> _Rates:
    """The table of measured rates."""
    found = json.loads(resources.files("attnpass").joinpath("rates.json").read_text(encoding="utf-8"))
    kernels = {
        name: _Kernel(
            masks=known["masks"],
            tflops={form: {int(w): rate for w, rate in by_width.items()} for form, by_width in known["tflops"].items()},
        )
        for name, known in found["kernels"].items()
    }
    return _Rates(bytes_per_us=found["bytes_per_us"], products=found["products_tflops"] * 1e6, kernels=kernels)


def rated_us(spec: AttentionSpec, kernel: str) -> float | None:
    """One call of a kernel that has been measured."""
    known = rates().kernels.get(kernel)
    if spec.device != "cuda" or known is None:
        return None
    if known.masks == "tensor":
        return _by_tensor(spec, known)
    share = _kept(spec)
    # blocks that the edge of the mask cuts are computed whole
    edge = 0.0 if is_causal(spec) or spec.mask.empty else _BLOCK / _number(spec.keys, _LENGTH)
    extra = 0.0
    if known.masks == "blocks" and not spec.mask.empty:
        extra, edge = _LISTS, _BLOCK / _number(spec.keys, _LENGTH)
    elif spec.mask.key_padding:
        extra = 4 * _LAUNCH + 2 * _bytes(spec) / rates().bytes_per_us  # keys and values are moved together
    if spec.sink or spec.empty_rows != "impossible":
        extra += _LAUNCH
    share = min(1.0, share + edge)
    if known.masks == "blocks" and spec.bias:
        # No rate of a bias that is a function was measured (T5's takes a logarithm and a read for each score). It is
        # taken to cost what a tensor costs, so that nothing but the blocks left out speaks for the function: T5's
        # encoder stays with the tensor at any length.
        return _by_tensor(spec, rates().kernels["native"]) * share + extra
    bounded = spec.mask.causal is not None or spec.mask.window is not None
    return _time(spec, known, "causal" if bounded else "full", share) + extra


def unfused_us(spec: AttentionSpec) -> float | None:
    """The original's own operations, as a compiler leaves them: products, and scores in memory."""
    if spec.device != "cuda":
        return None
    bytes_ = _scores(spec) * _UNFUSED_BYTES * (2 if spec.dtype == "float32" else 1) + _bytes(spec)
    return _operations(spec) / rates().products + bytes_ / rates().bytes_per_us + _copies(spec) + 3 * _LAUNCH


def _by_tensor(spec: AttentionSpec, known: _Kernel) -> float:
    """A kernel that is given every mask but a causal one as a tensor, and computes all scores."""
    if is_causal(spec):
        return _time(spec, known, "causal", _kept(spec))
    if spec.mask.empty and not spec.bias:
        return _time(spec, known, "full", 1.0)
    # A mask over keys alone is read from the cache. Its rate is that of a padded BERT of 512 tokens, where flex was
    # slower (4.19 ms for four layers, 3.95 so); at 16384 tokens it is 270, and that of flex 330.
    keys_alone = spec.mask == MaskSpec(key_padding=True) and not spec.bias
    return _time(spec, known, "keys" if keys_alone else "tensor", 1.0) + _copies(spec) + _repairs(spec)


def _copies(spec: AttentionSpec) -> float:
    """Heads of k and v that are repeated, for a product or for a kernel that has no masks beside shared heads: written
    and read again. Next to nothing for a long prompt, most of the time for one token behind a long cache.
    """
    if spec.groups == 1:
        return 0.0
    return 2 * spec.groups * (_size(spec, spec.k) + _size(spec, spec.v)) / rates().bytes_per_us


def _repairs(spec: AttentionSpec) -> float:
    """Rows without a key: one more look at the mask, and at the queries or at the result."""
    if spec.empty_rows == "impossible":
        return 0.0
    masks = 0.0
    if spec.mask != MaskSpec(key_padding=True):
        masks = _scores(spec) / _number(spec.q[1], 1) / rates().bytes_per_us
    if spec.empty_rows == "mean" and not spec.grad:
        return _LAUNCH + masks  # queries of zero, in whatever made the queries
    return _REPAIRED + masks


def _time(spec: AttentionSpec, known: _Kernel, form: str, share: float) -> float:
    by_width = next(known.tflops[name] for name in (form, "causal", "full") if name in known.tflops)
    width = max(_number(spec.qk_width, 64), _number(spec.v_width, 64))
    nearest = min(by_width, key=lambda w: (w < width, abs(w - width)))
    return max(_operations(spec) * share / (by_width[nearest] * 1e6), _bytes(spec) / rates().bytes_per_us) + _LAUNCH


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
