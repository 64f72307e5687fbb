"""Writing the fused call of one decided site into its graph.

    q, k, v, masks --arrange--> canonical form --kernel.emit--> (b, h, i, e) --arrange--> the original's form

New nodes are inserted before the original's last product; nothing is erased here, and the uses are only moved once
everything has been built and checked, so a failure leaves the graph as it was.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from attnpass.arrange import Sizes, arrange
from attnpass.errors import Refuse
from attnpass.graph import Builder, fake_mode_of, tensor
from attnpass.kernels.base import Kernel
from attnpass.layers import answered, dense_mask, multiplied
from attnpass.site import Call, Factor, Layout, Placed, Site

aten = torch.ops.aten


def build(graph: Graph, site: Site, kernel: Kernel) -> tuple[Builder, Node]:
    """Insert everything the fused call needs; the last node stands for the site's output."""
    b = Builder(graph, site.output, mode=fake_mode_of(graph), state=site.state, like=site.output)
    try:
        return b, _build(b, site, kernel)
    except BaseException:
        b.discard()
        raise


def _build(b: Builder, site: Site, kernel: Kernel) -> Node:
    roles, spec = site.roles, site.spec
    dtype: torch.dtype = getattr(torch, kernel.compute_dtype(spec))
    placed = [site.q, site.k, site.v, *(p for p, _ in site.scale.tensors)]
    placed += [layer.placed for layer in site.layers]
    sizes = Sizes(b, site.sizes, [p.node for p in placed] + [site.output])
    q = arrange(b, site.q, (roles.batch, roles.heads, roles.queries, roles.width), sizes, expand=True)
    k = arrange(b, site.k, (roles.batch, roles.shared, roles.keys, roles.width), sizes, expand=True)
    v = arrange(b, site.v, (roles.batch, roles.shared, roles.keys, roles.v_width), sizes, expand=True)
    q, k, scale = _scaled(b, site, q, k, sizes)
    q, k, v = (_cast(b, node, dtype) for node in (q, k, v))
    dense = dense_mask(b, site, sizes, dtype)
    if dense.silent is not None:
        q = b.call(aten.where.ScalarOther, b.call(aten.logical_not.default, dense.silent), q, 0.0)
    call = Call(
        q=q,
        k=k,
        v=v,
        mask=dense.mask,
        scale=scale,
        dropout=site.dropout if isinstance(site.dropout, float | int) else 0.0,
        groups=spec.groups,
        spec=spec,
    )
    out = kernel.emit(b, call)
    if site.output_written and spec.grad:
        # a fused kernel's backward reads its result again; the original's product did not
        out = b.call(aten.clone.default, out)
    out = answered(b, out, call, dense, sizes, site)
    layout: Layout = (roles.batch, roles.heads, roles.queries, roles.v_width)
    out = arrange(b, Placed(out, layout), site.output_layout, sizes, expand=True)
    old = tensor(site.output)
    assert old is not None
    return _cast(b, out, old.dtype)


def _cast(b: Builder, node: Node, dtype: torch.dtype) -> Node:
    val = tensor(node)
    assert val is not None
    return node if val.dtype == dtype else b.call(aten.to.dtype, node, dtype)


def _scaled(b: Builder, site: Site, q: Node, k: Node, sizes: Sizes) -> tuple[Node, Node, float]:
    """Tensor factors go into q, or into k where they depend on the keys; known numbers become the kernel's scale."""
    roles = site.roles
    for placed, power in site.scale.tensors:
        own = {a for dim in placed.layout for a in dim}
        one = Factor(tensors=((placed, power),))
        if own & set(roles.keys):
            if own & set(roles.group):
                raise Refuse("score_weights", site.anchor)
            k = multiplied(b, k, one, sizes, (roles.batch, roles.shared, roles.keys, ()))
        else:
            q = multiplied(b, q, one, sizes, (roles.batch, roles.heads, roles.queries, ()))
    for node, power in site.scale.scalars:
        # the fused call takes a plain number only: a symbolic one would be settled by a guard
        q = b.call(aten.mul.Tensor if power > 0 else aten.div.Tensor, q, node)
    return q, k, site.scale.number
