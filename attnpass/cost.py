"""Expected time of one forward call, from the spec alone: enough to tell which of two kernels to take.

The rates are those of one NVIDIA H200 with bfloat16 (medians, torch 2.11, 2026-11-21); other GPUs are slower in about
the same proportion, and only the proportion matters. Nothing was measured of other devices: there the answer is None.
"""

from __future__ import annotations

from attnpass.spec import AttentionSpec, MaskSpec, Size, is_causal

# Operations per microsecond (1e6 is one TFLOP/s), for heads up to 64 wide and for wider ones.
_PLAIN = {64: 482e6, 128: 597e6}  # scaled_dot_product_attention without a mask (cuDNN)
_CAUSAL = {64: 440e6, 128: 567e6}  # ... by its flag, counted on the scores that are kept
_TENSOR = {64: 95e6, 128: 160e6}  # ... with a mask over queries and keys, counted on all scores
_FLEX = {64: 235e6, 128: 348e6}  # FlexAttention, counted on the scores of the blocks that it computes
# ... with a mask over keys alone, which is read from the cache: from a padded BERT of 512 tokens, four layers of which
# took 3.95 ms so and 4.19 ms with FlexAttention
_KEYS = {64: 380e6, 128: 470e6}

_BYTES = 4.3e6  # per microsecond: below this no call comes, however few its operations
_LAUNCH = 5.0  # one more small kernel
_BLOCKS = 4 * _LAUNCH  # a site's share in making the lists of blocks, which sites of one mask have in common
_BLOCK = 128
_REPAIRED = 3 * _LAUNCH  # rows without a key, answered afterwards

_LENGTH, _BATCH = 2048, 4  # where they are symbolic


def native_us(spec: AttentionSpec) -> float | None:
    """scaled_dot_product_attention."""
    if spec.device != "cuda":
        return None
    if is_causal(spec):
        return _time(spec, _CAUSAL, _kept(spec))
    if spec.mask.empty and not spec.bias:
        return _time(spec, _PLAIN, 1.0)
    keys_alone = spec.mask == MaskSpec(key_padding=True) and not spec.bias
    return _time(spec, _KEYS if keys_alone else _TENSOR, 1.0) + _repairs(spec)


def _repairs(spec: AttentionSpec) -> float:
    """Rows without a key: one more look at the mask, and at the queries or at the result."""
    if spec.empty_rows == "impossible":
        return 0.0
    masks = 0.0 if spec.mask == MaskSpec(key_padding=True) else _scores(spec) / _number(spec.q[1], 1) / _BYTES
    if spec.empty_rows == "mean" and not spec.grad:
        return _LAUNCH + masks  # queries of zero, in whatever made the queries
    return _REPAIRED + masks


def flex_us(spec: AttentionSpec) -> float | None:
    """FlexAttention, whose every mask is a function."""
    if spec.device != "cuda":
        return None
    blocks = 0.0 if spec.mask.empty else _BLOCKS
    repaired = 0.0 if spec.empty_rows == "impossible" and not spec.sink else _LAUNCH
    # blocks that the edge of the mask cuts are computed whole
    share = min(1.0, _kept(spec) + _BLOCK / _number(spec.keys, _LENGTH)) if not spec.mask.empty else 1.0
    return _time(spec, _FLEX, share) + blocks + repaired


def _time(spec: AttentionSpec, rates: dict[int, float], share: float) -> float:
    width = _number(spec.qk_width, 64) + _number(spec.v_width, 64)
    rate = rates[64 if width <= 128 else 128]
    operations = 2 * _scores(spec) * width * share
    return max(operations / rate, _bytes(spec) / _BYTES) + _LAUNCH


def _scores(spec: AttentionSpec) -> float:
    outer = _number(spec.q[0], _BATCH) * _number(spec.q[1], 1)
    return outer * _number(spec.queries, _LENGTH) * _number(spec.keys, _LENGTH)


def _bytes(spec: AttentionSpec) -> float:
    total = 0.0
    for shape in (spec.q, spec.k, spec.v):
        sizes = (_number(shape[0], _BATCH), _number(shape[1], 1), _number(shape[2], _LENGTH), _number(shape[3], 64))
        total += sizes[0] * sizes[1] * sizes[2] * sizes[3]
    return total * (4 if spec.dtype == "float32" else 2)


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
