"""What attention means, without a single graph node.

    out[b, h, i] = sum_j  p[b, h, i, j] * v[b, h // groups, j]
    p[b, h, i]   = dropout(softmax_j(cap(scale * q[b, h, i] . k[b, h // groups, j]) + bias[b, h, i, j]
                                     where mask[b, h, i, j]))

An :class:`AttentionSpec` states one such computation completely enough that a kernel can say, from the spec alone,
whether it computes the same function. Everything here is frozen, hashable and free of tensors, nodes and fake
tensors, so a spec can be kept, compared, pickled and printed long after its graph is gone.

Sizes are integers where they are known and the text of the symbolic expression where they are not, so two sizes are
*proved* equal exactly when they compare equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

# Which added or filled numbers take a key's weight away beside ordinary scores.
CERTAIN = -1e30  # no score that is a number of ordinary size can be outweighed
ASSUMED = -1e8  # assumed, and said so
BLURS = -6e4  # beside it a score loses digits that matter (the lowest float16 is about there)

Size = int | str
"""A known size, or the text of a symbolic one (``"s27"``, ``"2*s27"``)."""


class EmptyRow(StrEnum):
    """What the original computes for a query that may see no key at all."""

    IMPOSSIBLE = "impossible"  # proved: every query sees at least one key
    NAN = "nan"  # -inf everywhere: 0 / 0
    MEAN = "mean"  # one finite fill everywhere: the plain mean of all values
    ZERO = "zero"  # what scaled_dot_product_attention itself answers


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """A conjunction of proved facts about which keys a query sees, and whether an unproved dense mask stays."""

    causal: Size | None = None  # key j is seen by query i when j <= i + causal
    window: tuple[Size | None, Size | None] | None = None  # i - left <= j <= i + right
    prefix: Size | None = None  # the first `prefix` keys are always seen
    chunk: Size | None = None  # only keys of the query's own chunk
    document: bool = False  # only keys whose id equals the query's
    limited: bool = False  # only keys up to, or from, a position that is data: one for each query
    key_padding: bool = False  # keys switched off per batch row
    dense: bool = False  # a tensor over (query, key) that is not proved to be any of the above

    @property
    def empty(self) -> bool:
        """True when nothing is masked."""
        return self == MaskSpec()


@dataclass(frozen=True, kw_only=True)
class BiasSpec:
    """One tensor added to the scores: its shape against (batch, heads, queries, keys), 1 where it broadcasts."""

    shape: tuple[Size, ...]
    dtype: str
    grad: bool = False
    exact: bool = True  # holds only values that the dtype of q holds exactly (or is of that dtype)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The meaning of one attention site. Shapes are canonical: (batch, heads, length, width)."""

    q: tuple[Size, ...]
    k: tuple[Size, ...]
    v: tuple[Size, ...]
    dtype: str  # of q, k, v as a fused kernel would read them
    device: str
    scale: float | str  # the text says what a scale that is no number is made of
    groups: int = 1  # query heads that share one key/value head
    mask: MaskSpec = field(default_factory=MaskSpec)
    bias: tuple[BiasSpec, ...] = ()
    softmax_dtype: str = "float32"
    dropout: float | str = 0.0
    softcap: float | str | None = None  # the text is that of a symbolic one
    sink: bool = False
    empty_rows: EmptyRow = EmptyRow.IMPOSSIBLE
    grad: bool = False  # gradients of q, k or v may be asked for
    inference: bool = False  # ... but most likely are not: what is fast may be chosen for a forward pass alone
    deterministic: bool = False  # the same inputs have to give the same bits: torch.use_deterministic_algorithms
    weights_used: bool = False  # scores or probabilities are read by something else too

    @property
    def queries(self) -> Size:
        return self.q[2]

    @property
    def keys(self) -> Size:
        return self.k[2]

    @property
    def qk_width(self) -> Size:
        return self.q[3]

    @property
    def v_width(self) -> Size:
        return self.v[3]

    @property
    def masked(self) -> bool:
        return not self.mask.empty


def is_causal(spec: AttentionSpec) -> bool:
    """The mask is j <= i and nothing else, which most kernels know by a flag."""
    return spec.mask == MaskSpec(causal=0) and not spec.bias
