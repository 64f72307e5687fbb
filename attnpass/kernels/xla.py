"""TPUs: the Pallas kernel of torch_xla, ``torch_xla.experimental.custom_kernel.flash_attention``.

    attnpass::native_xla(q, k, v, ab?, causal, scale, grad) -> (out, sums, greatest)
    attnpass::native_xla_backward(dout, q, k, v, out, sums, greatest, ab?, causal, scale) -> (dq, dk, dv)

They call what stands below that function, ``xla::fa_custom_forward`` and its backward, because below autograd it would
not keep what a backward needs. `ab` is what is added to the scores, (batch, heads, queries, keys) in full.

**Verified by contract only**: nothing of this has run on a TPU. What the source of the wheel shows is refused:

- keys are filled up with zeros to blocks of 512, and those are seen as well, unless `ab` or a causal mask hides them;
- in its backward nothing is filled up, so there lengths have to be whole blocks, and rows of a rest get no gradient;
- q, k and v of other than one shape: its own fake tensors assert that;
- on any other device its operation returns memory that nobody wrote.

Its scale is 1.0 where none is given.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnpass.graph import Builder, tensor
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.kernels.late import imported, version_of
from attnpass.kernels.operands import heads_repeated
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec

aten = torch.ops.aten
_INSTALL = "pip install 'torch_xla[tpu,pallas]'"
_BLOCK = 512  # of keys in the forward, and of both in what makes the gradients of k and v
_BLOCK_Q = 1024  # of queries in what makes the gradient of q
_LANES = 128
_OFF = -0.7 * torch.finfo(torch.float32).max  # the kernel's own value for scores that do not count


class NativeXla(Kernel):
    """``torch_xla.experimental.custom_kernel.flash_attention``."""

    name = "native_xla"
    verified = "contract"
    only_by_name = True  # what never ran is not taken unasked
    can = Capabilities(
        devices=frozenset({"xla"}),
        dtypes=frozenset({"bfloat16", "float32"}),
        groups=True,
        causal=True,
        dense_mask=True,
        backward=True,
    )

    def available(self) -> Reason | None:
        found = imported("torch_xla.runtime", "torch_xla", _INSTALL)
        missing = found if isinstance(found, str) else None
        for name, called in (("torch_xla.experimental.custom_kernel", "torch_xla"), ("jax", "jax")):
            if missing is None:
                module = imported(name, called, _INSTALL)
                missing = module if isinstance(module, str) else None
        if missing is None and found.device_type() != "TPU":  # type: ignore[union-attr]
            missing = "needs a TPU; elsewhere it returns memory that nobody wrote"
        return None if missing is None else reason("unavailable", detail=missing)

    def version(self) -> str:
        return version_of("torch_xla")

    def shares_heads(self, spec: AttentionSpec) -> bool:
        return False

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        for bias in spec.bias:
            if not bias.exact:
                yield reason("bias_precision", detail=bias.dtype, dtype=spec.dtype)
        width, queries, keys = spec.qk_width, spec.queries, spec.keys
        if not isinstance(width, int) or (width > _LANES and width % _LANES):
            yield reason("head_width", detail=f"{width}: above {_LANES} they are multiples of it")
        if not isinstance(queries, int) or queries != keys:
            yield reason("no_form", detail="as many keys as queries, by a known number")
            return
        hidden = bool(spec.bias) or not spec.mask.empty  # by a tensor, or by being behind all queries
        if queries > _BLOCK and queries % _BLOCK and not hidden:
            detail = f"without a mask {queries} keys are filled up with zeros that are seen"
            yield reason("kernel_bug", detail=detail)
        if spec.grad and not _whole_blocks(queries):
            yield reason("kernel_bug", detail=f"{queries} are no whole blocks, and the rest gets no gradient")

    def emit(self, b: Builder, call: Call) -> Node:
        k, v = (heads_repeated(b, node, call.groups) for node in (call.k, call.v))
        target = operation()
        results = b.call(target, call.q, k, v, _added(b, call), call.causal, call.scale, call.spec.grad)
        return b.call(operator.getitem, results, 0)


def _whole_blocks(size: int) -> bool:
    return size in (_LANES, 2 * _LANES, _BLOCK) or size % _BLOCK_Q == 0


def _added(b: Builder, call: Call) -> Node | None:
    """The mask as what is added to the scores, in full; no lower than what the kernel itself adds."""
    val, q = (tensor(node) if node is not None else None for node in (call.mask, call.q))
    if call.mask is None or val is None or q is None:
        return None
    if val.dtype is torch.bool:
        zero = b.call(aten.scalar_tensor.default, 0.0, dtype=q.dtype, device=q.device)
        added = b.call(aten.where.ScalarOther, call.mask, zero, _OFF)
    else:
        added = b.call(aten.clamp.default, b.call(aten.to.dtype, call.mask, q.dtype), _OFF)
    shape = [*(b.size(call.q, dim) for dim in range(3)), b.size(call.k, 2)]
    return b.call(aten.contiguous.default, b.call(aten.expand.default, added, shape))


@functools.cache
def operation() -> Callable[..., Any]:
    """``attnpass::native_xla``, with its backward."""
    where = ("None", "None")  # how it is spread over devices, as text: not at all

    def forward(
        q: Tensor, k: Tensor, v: Tensor, ab: Tensor | None, causal: bool, scale: float, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = [grad] * 3 + [False] * 7  # of which of its arguments, in their order, a gradient will be asked for
        found = torch.ops.xla.fa_custom_forward(q, k, v, causal, None, None, scale, ab, *where, needed)
        return (found[0], found[4], found[5]) if grad else (found[0], q.new_empty(0), q.new_empty(0))

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        sums: Tensor,
        greatest: Tensor,
        ab: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = [x.contiguous() for x in (dout, q, k, v, out, sums, greatest)]
        shapes = (list(q.shape), list(k.shape), None if ab is None else list(ab.shape))
        needed = [True] * 3 + [False] * 7
        dq, dk, dv, _ = torch.ops.xla.fa_custom_backward(*given, None, None, ab, causal, scale, *where, *shapes, needed)
        return dq, dk, dv

    def fake(
        q: Tensor, k: Tensor, v: Tensor, ab: Tensor | None, causal: bool, scale: float, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = q.shape[:3] if grad else (0,)
        return torch.empty_like(q), *(q.new_empty(kept, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]

    def fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in (q, k, v))

    def saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, ab, ctx.causal, ctx.scale, _ = inputs
        ctx.save_for_backward(q, k, v, *output, ab)
        ctx.mark_non_differentiable(*output[1:])

    def gradients(ctx: Any, dout: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        *tensors, ab = ctx.saved_tensors
        return (*back._opoverload(dout, *tensors, ab, ctx.causal, ctx.scale), None, None, None, None)

    op = torch.library.custom_op("attnpass::native_xla", forward, mutates_args=())
    op.register_fake(fake)
    back: Any = torch.library.custom_op("attnpass::native_xla_backward", backward, mutates_args=())
    back.register_fake(fake_backward)
    op.register_autograd(gradients, setup_context=saved)
    return op._opoverload
