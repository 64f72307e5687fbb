"""Stand-ins for scores of which something outside the site reads only the form.

    scores ── softmax ── ...                          q ── fused ── ...
       └── ones_like ── triu ── (the mask)            full([]) ── expand ── ones_like ── triu ── (the mask)

Masks are often built that way. The reader's result does not depend on the scores, but as long as it reads them they
have to be computed. So it is written again on a tensor of the same form that needs no memory: one number, expanded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from attnpass.arrange import Sizes
from attnpass.errors import Refuse
from attnpass.graph import Builder, fake_mode_of, plain, same, state_of, tensor, value
from attnpass.site import Dim, Site
from attnpass.verify import checked

aten = torch.ops.aten


def stand_ins(graph: Graph, site: Site) -> list[tuple[Node, Node]]:
    """Each of the site's form readers, and what is to be read in its place; on failure nothing is left behind."""
    builders: list[Builder] = []
    pairs: list[tuple[Node, Node]] = []
    try:
        for reader in site.form_readers:
            b = Builder(graph, reader, mode=fake_mode_of(graph), state=state_of(reader, site.state), like=reader)
            builders.append(b)
            pairs.append((reader, _again(b, reader, site)))
    except BaseException:
        for b in builders:
            b.discard()
        raise
    return pairs


def _again(b: Builder, reader: Node, site: Site) -> Node:
    sizes = Sizes(b, site.sizes, [site.q.node, site.k.node])
    region = set(site.region)
    made = {node: _stand_in(b, node, reader, site, sizes) for node in reader.all_input_nodes if node in region}
    args, kwargs = map_arg((reader.args, reader.kwargs), lambda node: made.get(node, node))
    assert callable(reader.target)
    new = b.call(reader.target, *args, **kwargs)
    if tensor(reader) is not None:
        return checked(b, reader, new)
    if not same(value(reader), value(new)):
        raise Refuse("verify_failed", reader, detail=f"{value(new)} for {value(reader)}")
    return new


def _stand_in(b: Builder, node: Node, reader: Node, site: Site, sizes: Sizes) -> Node:
    val = tensor(node)
    assert val is not None
    one = b.call(aten.full.default, [], 0, dtype=val.dtype, device=val.device)
    return b.call(aten.expand.default, one, [_size(extent, reader, site, sizes) for extent in val.shape])


def _size(extent: Any, reader: Node, site: Site, sizes: Sizes) -> int | Node:
    """The size of a dimension of the scores, said by the sizes of q and k."""
    extent = plain(extent)
    if isinstance(extent, int):
        return extent
    roles = site.roles
    outer = (*roles.batch, *roles.heads)
    dims: list[Dim] = [roles.queries, roles.keys, roles.batch, roles.heads, outer, *((atom,) for atom in outer)]
    for dim in dims:
        if same(math.prod(site.sizes[atom] for atom in dim), extent):
            return sizes.dim(dim)
    # not known before the scores themselves are: they have to stay, and nothing would be saved
    raise Refuse("weights_used", reader, op=reader.name)
