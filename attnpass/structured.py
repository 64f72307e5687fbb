"""A proved mask written anew from its closed form, once for all sites that have it.

    original   arange, compare, where(.., 0, lowest), clamp, slice ...  float (b, 1, i, j), read by every layer
    here       i >= j, and pad[b, j]                                    bool, of size one along axes without say

What the original's operations made is not read any more, so it need not be made. Only closed forms are written: for a
mask that holds data over queries and keys, the tensor that is there is as good.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from attnpass.graph import Builder, Shared, tensor
from attnpass.layers import Dense, keeping, with_empty_rows
from attnpass.masks import dense
from attnpass.prove import Proved
from attnpass.spec import EmptyRow


def structured_mask(b: Builder, proved: Proved, shared: Shared) -> Dense:
    """The keep-mask of a site whose layers it expresses wholly."""
    site, proof = proved.site, proved.proof
    assert proof is not None
    q = tensor(site.q.node)
    assert q is not None
    device: torch.device = q.device
    nodes = {load.source: node for node, load in proof.loads}
    key = (proof.keep, proof.frame.lengths, device)

    def render() -> Node:
        return dense(proof.keep, b, proof.frame, proof.sizes, nodes, device=device)

    def repaired() -> tuple[Node, Node]:
        return with_empty_rows(b, shared.get(("keep", *key), b, render))

    if site.rows is EmptyRow.IMPOSSIBLE:
        return keeping(site, shared.get(("keep", *key), b, render), None)
    alive, every = shared.all(("every", *key), b, repaired, lambda pair: pair)
    return keeping(site, every, alive)
