"""What every kernel is: a capability table, and four questions.

    available()     can it run here? If not, what is missing?
    refusals(spec)  every reason why it would not compute this spec's function; reads nothing but the spec
    cost(spec)      expected microseconds of a forward call, or None where it cannot tell
    emit(b, call)   writes the fused call into the graph

A field that a table omits means *not supported*. An argument that a kernel cannot honour is a refusal, never dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from attnpass.graph import Builder
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec, is_causal


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a kernel declares. Everything not said is not supported."""

    devices: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()
    max_width: int | None = None  # None: any
    width_multiple: int = 1
    unlike_widths: bool = False
    groups: bool = False
    causal: bool = False  # by a flag, without a tensor
    window: bool = False  # ... by two numbers
    key_padding: bool = False  # by a tensor over (batch, keys)
    alibi: bool = False  # by one slope for each head
    dense_mask: bool = False
    bias_gradient: bool = False
    softcap: bool = False
    sink: bool = False
    dropout: bool = False
    backward: bool = False
    deterministic: bool = False  # the same inputs give the same bits, or can be asked to, in the backward too
    approximate: bool = False  # computes in fewer bits than its inputs have: taken only where the user allows it


class Kernel(ABC):
    """One fused implementation of attention."""

    name: str
    can: Capabilities
    takes: Literal["tensor", "functions", "forms"] = "tensor"  # what mask and biases are given as
    only_by_name: bool = False  # considered only where the user names it
    verified: Literal["hardware", "contract"] = "hardware"  # "contract": against its documentation alone

    def available(self) -> Reason | None:
        """None when it can run here, else what is missing and what to install."""
        return None

    def version(self) -> str:
        """The version of the package that it comes from, for the table of kernels."""
        return ""

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        """All reasons why this kernel does not compute `spec`: first those that the table tells."""
        can = self.can
        if spec.device not in can.devices:
            yield reason("device", device=spec.device)
        if spec.dtype not in can.dtypes:
            yield reason("dtype", dtype=spec.dtype)
        for width in dict.fromkeys((spec.qk_width, spec.v_width)):
            if not isinstance(width, int):
                if can.max_width is not None or can.width_multiple > 1:
                    yield reason("head_width", detail=f"{width}, a symbolic size")
            elif (can.max_width is not None and width > can.max_width) or width % can.width_multiple:
                yield reason("head_width", detail=str(width))
        if spec.qk_width != spec.v_width and not can.unlike_widths:
            yield reason("unlike_widths")
        if spec.groups > 1 and not can.groups:
            yield reason("groups")
        masked = not spec.mask.empty and not (can.causal and is_causal(spec))
        if self.takes == "forms":
            yield from _beyond(spec, can)
        elif (masked or spec.bias) and not can.dense_mask:
            yield reason("dense_mask")
        if any(bias.grad for bias in spec.bias) and not can.bias_gradient:
            yield reason("bias_gradient")
        if spec.softcap is not None and not can.softcap:
            yield reason("softcap", detail="")
        elif isinstance(spec.softcap, str) and self.takes != "functions":
            yield reason("softcap", detail="that is no known number")
        if spec.sink and not can.sink:
            yield reason("sink")
        if isinstance(spec.dropout, str):
            yield reason("dropout_unknown")
        elif spec.dropout > 0 and not can.dropout:
            yield reason("dropout", detail="")
        if spec.grad and not can.backward:
            yield reason("grad", detail="")
        if spec.deterministic and spec.grad and not can.deterministic:
            yield reason("not_deterministic")

    def compute_dtype(self, spec: AttentionSpec) -> str:
        """The dtype that operands and bias are cast to before the call; never narrower than the spec's."""
        return spec.dtype

    def shares_heads(self, spec: AttentionSpec) -> bool:
        """Heads of k and v that several query heads share are read once, not copied first."""
        return self.can.groups

    def gives_lse(self, spec: AttentionSpec) -> bool:
        """It can return the log-sum-exp of the scores, from which a sink or a row without a key is answered."""
        return False

    def tolerance(self, dtype: str) -> float:
        """How far from float64 a result may be beyond twice the original's own error, in units in the last place (of
        this dtype) of the largest element.
        """
        return 2.0 if dtype in ("float16", "bfloat16") else 32.0

    def cost(self, spec: AttentionSpec) -> float | None:
        """Expected microseconds of one forward call."""
        return None

    @abstractmethod
    def emit(self, b: Builder, call: Call) -> Node:
        """Write the call; the result is (batch, heads, queries, v width)."""

    def emit_with_lse(self, b: Builder, call: Call) -> tuple[Node, Node]:
        """The same where `gives_lse`: beside the result the natural logarithm of the sum of exp of each query's
        scores, (batch, heads, queries) in float32, -inf where the query sees no key; gradients flow through it.
        """
        raise NotImplementedError(f"{self.name} says that it gives no log-sum-exp")  # so it is never asked


def _beyond(spec: AttentionSpec, can: Capabilities) -> Iterator[Reason]:
    """What a mask and a bias have that this kernel has no argument for."""
    mask = spec.mask
    unknown = [
        name
        for name, there in (
            ("a prefix", mask.prefix is not None),
            ("chunks", mask.chunk is not None),
            ("documents", mask.document),
            ("limits that are data", mask.limited),
            ("a mask without proved structure", mask.dense),
            ("a window", mask.window is not None and not can.window),
            ("padded keys", mask.key_padding and not can.key_padding),
            ("a causal mask", mask.causal is not None and not (can.causal or can.window)),
            ("a bias", bool(spec.bias) and not can.alibi),
        )
        if there
    ]
    if unknown:
        yield reason("no_form", detail=", ".join(unknown))
