"""A proved mask written anew from its closed form, once for all sites that have it.

    original   arange, compare, where(.., 0, lowest), clamp, slice ...  float (b, 1, i, j), read by every layer
    here       i >= j, and pad[b, j]                                    bool, of size one along axes without say

What the original's operations made is not read any more, so it need not be made. Only closed forms are written: for a
mask that holds data over queries and keys, the tensor that is there is as good.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch.fx import Node

from attnpass.graph import Builder, Shared
from attnpass.layers import Dense, keeping, with_empty_rows
from attnpass.masks import dense
from attnpass.masks.expr import Value
from attnpass.prove import Proved
from attnpass.spec import EmptyRow


def structured_mask(b: Builder, proved: Proved, shared: Shared) -> Dense:
    """The keep-mask of a site whose layers it expresses wholly."""
    site, key = proved.site, mask_key(proved)

    def keep() -> Node:
        return shared.get(("keep", *key), b, lambda: written(b, proved))

    if site.rows is EmptyRow.IMPOSSIBLE:
        return keeping(site, keep(), None)
    alive, every = shared.all(("every", *key), b, lambda: with_empty_rows(b, keep()), lambda pair: pair)
    return keeping(site, every, alive)


def mask_key(proved: Proved) -> tuple[Hashable, ...]:
    """Equal for the sites of a graph whose keep-masks are the same tensor."""
    proof = proved.proof
    assert proof is not None
    return proof.keep, proof.frame.lengths, proved.site.device


def written(b: Builder, proved: Proved) -> Node:
    """The keep-mask as a tensor."""
    assert proved.proof is not None
    return rendered(b, proved, proved.proof.keep)


def rendered(b: Builder, proved: Proved, e: Value, dtype: torch.dtype = torch.bool) -> Node:
    """An expression of a site's proof as a tensor that broadcasts to (batch, heads, queries, keys)."""
    proof = proved.proof
    assert proof is not None
    return dense(e, b, proof.frame, proof.sizes, proof.nodes, device=proved.site.device, dtype=dtype)
