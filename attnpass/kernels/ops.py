"""Operations of our own, where a compiler must not look into what stands between two others.

They are registered when they are first asked for: a bare import registers nothing. Each has two forms,

    attnpass::<name>         for graphs: has its gradient, or says that it has none
    attnpass::<name>_only    for code that inductor has written: the same function, and nothing around it

because a graph that waits for its next launch waits for what is around it, too: torch enters Python twice for an
operation that has a gradient, even where none is asked for. Inductor gets a graph in which gradients are operations
already (so does AOTInductor, which has none), and puts the second form there by its table of decompositions. No other
table has it: a program that is exported keeps the first form, whatever is done with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef


def register(
    name: str, schema: str, forward: Callable[..., Any], fake: Callable[..., Any], tags: Sequence[torch.Tag] = ()
) -> CustomOpDef:
    """Registers ``attnpass::<name>``, a function without side effects whose results are new memory."""
    op: CustomOpDef = torch.library.custom_op(f"attnpass::{name}", forward, mutates_args=(), schema=schema, tags=tags)
    op.register_fake(fake)
    only = f"attnpass::{name}_only"
    torch.library.define(only, schema, tags=op._opoverload.tags)
    torch.library.impl(only, "default", torch.compiler.disable(forward))  # type: ignore[no-untyped-call]
    torch.library.register_fake(only, fake)
    _preferred(op._opoverload, getattr(torch.ops.attnpass, f"{name}_only").default)
    return op


def _preferred(op: torch._ops.OpOverload, only: torch._ops.OpOverload) -> None:
    """Inductor writes the second form where a graph has the first."""
    try:
        from torch._inductor.decomposition import decompositions, select_decomp_table
    except ImportError:  # no inductor, or one of another time: it takes the first form as well
        return
    for table in (decompositions, select_decomp_table()):  # the second may be a copy that was made before
        table[op] = only


@functools.cache
def apart() -> Callable[..., Any]:
    """``attnpass::apart``, a copy that inductor does not look into: two of its mistakes end at its border.

    1. Its template of FlexAttention for the CPU raises when what follows is fused with it (torch 2.13: "Unsupported for
       `epilogue_nodes`"), and any pointwise operation of the model may follow.
    2. Its template for CUDA takes the stride of the head dimension for that of batch and heads merged. For lists of
       blocks that inductor lays out itself that dimension has size one and any stride at all: then lists of other
       batches, or memory beyond, are read (torch 2.11, seen on an H200). What comes out here has the strides that its
       fake value has.
    """

    def copy(x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    return register("apart", "(Tensor x) -> Tensor", copy, copy)._opoverload
