"""FlexAttention: inductor writes a kernel around a mask and a change of scores that are given as functions.

The call is torch's own higher-order operation, as ``torch.nn.attention.flex_attention`` would leave it in a graph:

    flex_attention(q, k, v, score, (lengths, lists of blocks, sizes of blocks, keep), scale, options, reads, reads)
        -> (result, log-sum-exp to the base 2, greatest scores)

Only a compiler makes a fused kernel of it: run as it stands it computes all scores. The tuple of blocks is torch's own
affair and has changed between releases, so its order is taken from torch's ``BlockMask``.

Limits: on the CPU it has neither a backward nor the log-sum-exp; on CUDA heads are at least 16 wide.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from attnpass.cost import rated_us
from attnpass.errors import first_line
from attnpass.graph import Builder, value
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.kernels.native import HALF
from attnpass.kernels.ops import apart
from attnpass.reasons import Reason, reason
from attnpass.site import Call, Functions
from attnpass.spec import AttentionSpec

aten = torch.ops.aten
_NARROWEST = 16  # what a Triton product takes
# Narrower heads go through a product that, where eight keys are left over, computes sixteen (torch 2.13, AVX2): plain
# flex_attention of 200 keys and width 16 is wrong or NaN.
_NARROWEST_CPU = 24
_DECODED = 128  # fewer queries are computed by another template
_WIDEST = {"float32": 128}  # what fits into a multiprocessor's shared memory, with a backward


class Flex(Kernel):
    """``torch.ops.higher_order.flex_attention``."""

    name = "flex"
    takes = "functions"
    can = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        max_width=256,
        unlike_widths=True,
        groups=True,
        dense_mask=True,
        softcap=True,
        sink=True,
        backward=True,
    )

    def version(self) -> str:
        return torch.__version__

    def available(self) -> Reason | None:
        try:
            from torch.nn.attention.flex_attention import BlockMask, _apply_kernel_options  # noqa: F401
        except ImportError as error:
            return reason("unavailable", detail=f"this torch has no FlexAttention: {first_line(error)}")
        return None

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        if not isinstance(spec.q[1], int) or not isinstance(spec.k[1], int):
            yield reason("no_fused_form", detail="a symbolic number of heads")
        if spec.device == "cpu":
            if spec.grad:
                yield reason("grad", detail="on the CPU")
            if any(isinstance(size, str) for size in (*spec.q, *spec.k, *spec.v)):
                # the code that inductor writes for the CPU uses sizes that it does not declare (torch 2.13)
                yield reason("no_fused_form", detail="symbolic sizes on the CPU")
            if isinstance(spec.qk_width, int) and spec.qk_width < _NARROWEST_CPU:
                yield reason("kernel_bug", detail="on the CPU it writes beyond the scores of heads this narrow")
            if not _vectors():
                yield reason("no_fused_form", detail="a CPU or system that inductor has no template for")
        else:
            for width in {w for w in (spec.qk_width, spec.v_width) if isinstance(w, int)}:
                if not _NARROWEST <= width <= _WIDEST.get(spec.dtype, width):
                    yield reason("head_width", detail=f"{width} in {spec.dtype} on CUDA")
            mask = spec.mask
            symbolic = isinstance(spec.queries, str) or isinstance(spec.keys, str) or isinstance(spec.q[0], str)
            if symbolic and (mask.key_padding or mask.document or mask.limited or mask.dense):
                yield reason("kernel_bug", detail="NaN with symbolic sizes and a mask that reads data (pytorch#186775)")
            if spec.device == "cuda" and not _triton():
                yield reason("unavailable", detail="Triton is not installed, or does not know this GPU")

    def gives_lse(self, spec: AttentionSpec) -> bool:
        return spec.device != "cpu"

    def cost(self, spec: AttentionSpec) -> float | None:
        return rated_us(spec, self.name)

    def emit(self, b: Builder, call: Call) -> Node:
        out = b.call(operator.getitem, _call(b, call, lse=False), 0)
        return b.call(apart(), out) if call.spec.device == "cpu" else out

    def emit_with_lse(self, b: Builder, call: Call) -> tuple[Node, Node]:
        results = _call(b, call, lse=True)
        base_2 = b.call(operator.getitem, results, 1)
        return b.call(operator.getitem, results, 0), b.call(aten.mul.Tensor, base_2, math.log(2.0))


def _triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


def _vectors() -> bool:
    """Inductor's template for the CPU is there: its own conditions."""
    return torch.cpu._is_avx2_supported() and os.getenv("ATEN_CPU_CAPABILITY") != "default" and sys.platform != "darwin"


def _call(b: Builder, call: Call, *, lse: bool) -> Node:
    from torch.nn.attention.flex_attention import _apply_kernel_options

    functions = call.functions
    assert functions is not None
    given = (value(call.q), value(call.k), value(call.v))
    own: Any = {"fwd_num_warps": 8} if functions.keep_reads and _crowded(call.spec, given[0].device) else None
    with torch.set_grad_enabled(b.state.grad):  # decides whether a backward is prepared for
        options = _apply_kernel_options(*given, lse or call.spec.grad, own)
    q, k, v = call.q, call.k, call.v
    if call.spec.device == "cpu":
        # inductor's template reads the shape of the memory that these are views of (torch 2.13)
        q, k, v = (b.call(apart(), node) for node in (q, k, v))
    return b.call(
        torch.ops.higher_order.flex_attention,
        q,
        k,
        v,
        functions.score,
        _blocks(b, call, functions),
        call.scale,
        dict(options),
        functions.score_reads,
        functions.keep_reads,
    )


def _crowded(spec: AttentionSpec, device: torch.device) -> bool:
    """A mask that reads a tensor needs more registers than inductor's own number of warps has.

    On Hopper heads of width 64 get tiles of 128 x 128 scores and four warps. With a mask that reads a tensor that is
    more than their registers hold: ptxas spills 7 to 8 kB for each thread, and partial blocks take tens of times as
    long (seen on the H200, torch 2.11: 205 ms where 4 are due). Eight warps spill nothing.
    """
    decoding = isinstance(spec.queries, int) and spec.queries < _DECODED
    return spec.qk_width == 64 and spec.dtype in HALF and not decoding and _on_hopper(device)


def _on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


def _blocks(b: Builder, call: Call, functions: Functions) -> tuple[Any, ...]:
    """torch's tuple of blocks, with nodes in it: a BlockMask over their values tells the order."""
    from torch.nn.attention.flex_attention import BlockMask

    lists = functions.blocks
    pairs = {
        "kv_num_blocks": lists.part_rows[0],
        "kv_indices": lists.part_rows[1],
        "q_num_blocks": lists.part_columns[0],
        "q_indices": lists.part_columns[1],
        "full_kv_num_blocks": lists.full_rows[0] if lists.full_rows else None,
        "full_kv_indices": lists.full_rows[1] if lists.full_rows else None,
        "full_q_num_blocks": lists.full_columns[0] if lists.full_columns else None,
        "full_q_indices": lists.full_columns[1] if lists.full_columns else None,
    }
    node_of = {id(value(node)): node for node in pairs.values() if node is not None}
    known = BlockMask(
        seq_lengths=(-1, -2),
        BLOCK_SIZE=(lists.size, lists.size),
        mask_mod=_stands_for_keep,
        **{name: None if node is None else value(node) for name, node in pairs.items()},  # type: ignore[arg-type]
    )
    lengths = {-1: b.size(call.q, 2), -2: b.size(call.k, 2)}

    def node(entry: Any) -> Any:
        if entry is _stands_for_keep:
            return functions.keep
        if isinstance(entry, torch.Tensor):
            return node_of[id(entry)]
        return lengths.get(entry, entry) if isinstance(entry, int) else entry

    return tuple(node(entry) for entry in known.as_tuple())


def _stands_for_keep(*index: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError  # a mark in the tuple, replaced by the site's own function before anything runs
