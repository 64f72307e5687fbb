"""Operations ``attnpass::<name>`` around functions of flash-attn's kind, which compilers cannot look into as shipped.

    attnpass::<name>(q, k, v, slopes?, sink?, order?, ends?, scale, left, right, softcap, dropout, deterministic)
        -> (out, log-sum-exp, state of the random numbers)
    attnpass::<name>_backward(dout, q, k, v, out, lse, rng, ... the same ...) -> (dq, dk, dv, dsink)

The whole plan is in the arguments, the backward is an operation of its own, and the fakes have the true strides. q, k,
v and out are (batch, heads, length, width) with any strides; the memory of what is returned is (batch, length, heads,
width), as these kernels write it, so the transpose and reshape that models do next are free. `left` and `right` count
keys from a query's own position, the last query standing at the last key; -1 is no bound. `order` and `ends` pack the
keys (packed.py): then the kernel is called with sequences of several lengths. Nothing waits for the GPU.

A kernel comes as a :class:`Vendor`, two functions that import its package when they are called:

    forward(q, k, v, slopes, plan, lengths)  -> (out, lse, rng or None)
    backward(dout, saved, plan, lengths)     -> (dq, dk, dv)

They get (batch, length, heads, width), rows contiguous, everything aligned to 16 bytes; with `lengths` instead
(batch * length, heads, width). lse is float32, (batch, heads, queries), or with `lengths` (heads, batch * queries); the
backward gets it as the forward gave it. ``define(vendor)`` registers both operations and returns the first.

A sink is answered here for all of them. It is one more score s whose value is zero, so out' = out * sigmoid(lse - s)
and lse' = log(exp(lse) + exp(s)). With these a kernel's own backward gives the gradients of that attention: it makes
probabilities as exp(score - lse') and subtracts rowsum(dout * out') from each of their gradients, and both are right.

Limits: no gradient through the log-sum-exp (it tells which rows have a key), none to slopes, none of second order. The
operations exist once `define` was called, so a saved artefact that holds one needs this package, and that call, first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpass.kernels import ops

_ALIGNED = 16  # bytes that one instruction of these kernels loads


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of one call."""

    scale: float
    left: int  # -1: no bound
    right: int
    softcap: float  # 0: none
    dropout: float
    deterministic: bool  # the backward adds in a fixed order

    @property
    def causal(self) -> bool:
        """Bounded by the query's own position and by nothing else."""
        return self.right == 0 and self.left == -1

    @property
    def window(self) -> tuple[int, int]:
        """The bounds, without that which `causal` says."""
        return (-1, -1) if self.causal else (self.left, self.right)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Where each batch row's queries and keys begin and end in a packed tensor, int32 (batch + 1,)."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


def by_name(lengths: Lengths | None) -> dict[str, Any]:
    """As the functions of flash-attn's kind name them; nothing for batches of one length."""
    if lengths is None:
        return {}
    return {
        "cu_seqlens_q": lengths.queries,
        "cu_seqlens_k": lengths.keys,
        "max_seqlen_q": lengths.most_queries,
        "max_seqlen_k": lengths.most_keys,
    }


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a backward is given beside the gradient of the result."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    rng: Tensor
    slopes: Tensor | None

    def unwritten(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for the gradients of q, k and v."""
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (self.q, self.k, self.v))
        return dq, dk, dv


Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, Plan, Lengths | None], tuple[Tensor, Tensor, Tensor | None]]
Backward = Callable[[Tensor, Saved, Plan, Lengths | None], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """One package's functions, and the name of the operation made of them."""

    name: str
    forward: Forward
    backward: Backward
    random: bool = False  # it has dropout
    empty: float = -math.inf  # its log-sum-exp of a query without any key


_PLAN = "float scale, int left, int right, float softcap, float dropout, bool deterministic"
_GIVEN = "Tensor? slopes, Tensor? sink, Tensor? order, Tensor? ends"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_GIVEN}, {_PLAN}) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rng, {_GIVEN}, {_PLAN})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_PLANNED = 6  # how many arguments the plan is


@functools.cache
def define(vendor: Vendor) -> Callable[..., Any]:
    """Register ``attnpass::<name>`` and its backward; returns the operation to put into a graph."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        sink: Tensor | None,
        order: Tensor | None,
        ends: Tensor | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan, packing = _plan(*numbers), _packing(q, k, order, ends)
        lengths = None if packing is None else packing.lengths
        out, lse, rng = vendor.forward(*_operands(q, k, v, packing), slopes, plan, lengths)
        out, lse = _batched(out, q), _by_batch(lse, q).contiguous()
        if sink is not None:
            out, lse = _sunk(out, lse, sink, vendor.empty)
        return out.contiguous().transpose(1, 2), lse, _state(q, vendor) if rng is None else rng

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        rng: Tensor,
        slopes: Tensor | None,
        sink: Tensor | None,
        order: Tensor | None,
        ends: Tensor | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plan, packing = _plan(*numbers), _packing(q, k, order, ends)
        q_rows, k_rows, v_rows = _operands(q, k, v, packing)
        told = lse if packing is None else lse.transpose(0, 1).reshape(lse.shape[1], -1).contiguous()
        lengths = None if packing is None else packing.lengths
        saved = Saved(q=q_rows, k=k_rows, v=v_rows, out=_rows(out, packing), lse=told, rng=rng, slopes=slopes)
        dq, dk, dv = vendor.backward(_rows(dout, packing), saved, plan, lengths)
        dq = _batched(dq, q)
        dk, dv = (_unpacked(grad, like, packing) for grad, like in ((dk, k), (dv, v)))
        dsink = lse.new_empty(0) if sink is None else _sink_gradient(dout, out, lse, sink)
        return (*(grad.contiguous().transpose(1, 2) for grad in (dq, dk, dv)), dsink)  # type: ignore[return-value]

    def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, queries, _ = q.shape
        out = q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
        return out, q.new_empty((batch, heads, queries), dtype=torch.float32), _state(q, vendor)

    def fake_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        sink = rest[1]
        dsink = lse.new_empty(0) if sink is None else sink.new_empty(sink.shape)
        return (*(x.new_empty(_swapped(x.shape)).transpose(1, 2) for x in (q, k, v)), dsink)

    # an operation that draws random numbers is neither merged with an equal one nor run again
    tags = (torch.Tag.nondeterministic_seeded,) if vendor.random else ()
    op = ops.register(vendor.name, _FORWARD, forward, fake, tags)
    back = ops.register(f"{vendor.name}_backward", _BACKWARD, backward, fake_backward)

    def gradients(ctx: Any, dout: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        *tensors, slopes, sink, order, ends = ctx.saved_tensors
        call: Any = back._opoverload
        dq, dk, dv, dsink = call(dout, *tensors, slopes, sink, order, ends, *ctx.plan)
        return (dq, dk, dv, None, None if sink is None else dsink, None, None, *(None,) * _PLANNED)

    op.register_autograd(gradients, setup_context=_saved)
    return op._opoverload


def _saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, slopes, sink, order, ends, *ctx.plan = inputs
    ctx.save_for_backward(q, k, v, *output, slopes, sink, order, ends)
    ctx.mark_non_differentiable(*output[1:])


def _plan(scale: float, left: int, right: int, softcap: float, dropout: float, deterministic: bool) -> Plan:
    return Plan(scale=scale, left=left, right=right, softcap=softcap, dropout=dropout, deterministic=deterministic)


def _state(q: Tensor, vendor: Vendor) -> Tensor:
    return q.new_zeros(2 if vendor.random else 0, dtype=torch.int64)


# -- operands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packing:
    order: Tensor  # the places of all keys of the batch, those that are seen first
    lengths: Lengths


def _packing(q: Tensor, k: Tensor, order: Tensor | None, ends: Tensor | None) -> _Packing | None:
    if order is None or ends is None:
        return None
    batch, _, queries, _ = q.shape
    starts = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=q.device)
    return _Packing(order, Lengths(queries=starts, keys=ends, most_queries=queries, most_keys=k.shape[2]))


def _operands(q: Tensor, k: Tensor, v: Tensor, packing: _Packing | None) -> tuple[Tensor, Tensor, Tensor]:
    if packing is None:
        return _rows(q, None), _rows(k, None), _rows(v, None)
    moved = (_flat(x).index_select(0, packing.order) for x in (k, v))
    return (_rows(q, packing), *moved)  # type: ignore[return-value]


def _rows(x: Tensor, packing: _Packing | None) -> Tensor:
    """In the kernel's order of dimensions, as its loads want it."""
    return aligned(x.transpose(1, 2) if packing is None else _flat(x))


def aligned(x: Tensor) -> Tensor:
    """Rows contiguous, and starting at multiples of what one instruction loads."""
    unit = max(1, _ALIGNED // x.element_size())
    # a stride of 0 is no stride to what describes a tensor to the hardware
    straight = x.stride(-1) == 1 and all(step and step % unit == 0 for step in x.stride()[:-1])
    if straight and x.data_ptr() % _ALIGNED == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _flat(x: Tensor) -> Tensor:
    """(batch * length, heads, width)"""
    return x.transpose(1, 2).flatten(0, 1)


def _swapped(shape: torch.Size) -> tuple[int, ...]:
    batch, heads, length, width = shape
    return batch, length, heads, width


def _batched(x: Tensor, q: Tensor) -> Tensor:
    """(batch, queries, heads, width), packed or not."""
    return x if x.dim() == 4 else x.view(q.shape[0], q.shape[2], *x.shape[-2:])


def _by_batch(lse: Tensor, q: Tensor) -> Tensor:
    """(batch, heads, queries), packed or not."""
    batch, heads, queries, _ = q.shape
    return lse if lse.dim() == 3 else lse.view(heads, batch, queries).transpose(0, 1)


def _unpacked(grad: Tensor, like: Tensor, packing: _Packing | None) -> Tensor:
    """The gradient of keys or values at their own places, zero for those that no query sees."""
    if packing is None:
        return grad
    # what stands beyond the last key that is seen was written by nobody
    unseen = torch.arange(grad.shape[0], device=grad.device) >= packing.lengths.keys[-1]
    grad = grad.masked_fill(unseen[:, None, None], 0.0)
    return torch.empty_like(grad).index_copy_(0, packing.order, grad).view(_swapped(like.shape))


# -- a sink ------------------------------------------------------------------------------------------------------------


def _sunk(out: Tensor, lse: Tensor, sink: Tensor, empty: float) -> tuple[Tensor, Tensor]:
    """The result (batch, queries, heads, width) and the log-sum-exp with one more score."""
    score = sink[..., 0].float()
    if empty != -math.inf:
        lse = lse.masked_fill(lse == empty, -math.inf)
    share = torch.sigmoid(lse - score).transpose(1, 2)[..., None]
    return (out * share).to(out.dtype), torch.logaddexp(lse, score)


def _sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Its probability times what softmax subtracts from each: its own value being zero, that is all there is."""
    share = torch.exp(sink[..., 0].float() - lse)
    product = (dout.float() * out.float()).sum(-1)
    return (-share * product)[..., None].sum_to_size(sink.shape).to(sink.dtype)
