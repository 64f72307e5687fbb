"""Operations of our own, where a compiler must not look into what stands between two others.

They are registered when they are first asked for: a bare import registers nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


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

    torch.library.custom_op("attnpass::apart", copy, mutates_args=()).register_fake(copy)
    return torch.ops.attnpass.apart.default
