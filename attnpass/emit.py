"""Writing the fused call of one decided site into its graph.

    q, k, v, masks --arrange--> canonical form --kernel.emit--> (b, h, i, e) --arrange--> the original's form

New nodes are inserted before the original's last product; nothing is erased here, and the uses are only moved once
everything has been built and checked, so a failure leaves the graph as it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Graph, Node

from attnpass.arrange import Sizes, arrange
from attnpass.closed import forms
from attnpass.errors import Refuse
from attnpass.functions import answered_within, answers, functions, rows_with_a_key
from attnpass.graph import Builder, Shared, fake_mode_of, tensor
from attnpass.kernels.base import Kernel
from attnpass.layers import Dense, answered, as_given, dense_mask, hushed, multiplied
from attnpass.lse import alive, sunk
from attnpass.prove import Proved
from attnpass.site import Call, Factor, Layout, Placed, Site
from attnpass.spec import EmptyRow
from attnpass.structured import structured_mask

aten = torch.ops.aten


def build(graph: Graph, proved: Proved, kernel: Kernel, shared: Shared) -> tuple[Builder, Node]:
    """Insert everything the fused call needs; the last node stands for the site's output."""
    site = proved.site
    b = Builder(graph, site.output, mode=fake_mode_of(graph), state=site.state, like=site.output)
    try:
        return b, _build(b, proved, kernel, shared)
    except BaseException:
        b.discard()
        raise


def _build(b: Builder, proved: Proved, kernel: Kernel, shared: Shared) -> Node:
    site = proved.site
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
    dropout = site.dropout if isinstance(site.dropout, float | int) else 0.0
    call = Call(q=q, k=k, v=v, scale=scale, dropout=dropout, groups=spec.groups, spec=spec)
    if kernel.takes != "tensor":
        return _finished(b, site, _by_meaning(b, proved, kernel, shared, call, sizes), sizes)
    causal = site.causal or (kernel.can.causal and proved.causal)
    if causal or proved.unmasked:
        dense = Dense(mask=None)
    elif site.existing_call:
        # its own mask, as it is: nothing is known of rows without a key but that this call answers them (gain.py)
        dense = Dense(mask=as_given(b, site, sizes))
    elif proved.structured and not spec.bias:
        dense = structured_mask(b, proved, shared)
    else:
        dense = dense_mask(b, site, sizes, dtype, shared)
    q, k = hushed(b, dense, q, k)
    call = replace(call, q=q, k=k, mask=_still(b, site, dense.mask), causal=causal)
    out = _own(b, site, kernel.emit(b, call))
    return _finished(b, site, answered(b, out, call, dense, sizes, site), sizes)


def _still(b: Builder, site: Site, mask: Node | None) -> Node | None:
    """Where nothing is recorded a parameter still says that it needs a gradient; torch would take its unfused form."""
    if mask is None or site.state.grad or not mask.meta.get("attnpass_grad", False):
        return mask
    return b.call(aten.detach.default, mask)


def _own(b: Builder, site: Site, out: Node) -> Node:
    """A fused kernel's backward reads its result again, which the original's product did not: a result that is
    written into later has to be another tensor.
    """
    return b.call(aten.clone.default, out) if site.output_written and site.spec.grad else out


def _by_meaning(b: Builder, proved: Proved, kernel: Kernel, shared: Shared, call: Call, sizes: Sizes) -> Node:
    """The call of a kernel that is given what masks and biases mean: as functions, or as arguments of its own."""
    site, spec = proved.site, proved.site.spec
    told = kernel.gives_lse(spec)
    sink = _sink(b, site, sizes)
    afterwards = sink is not None and told and kernel.takes == "functions"
    # where the kernel itself answers rows without a key it is told which they are
    within = rows_with_a_key(b, proved, shared) if kernel.takes == "functions" and answered_within(proved) else None
    if kernel.takes == "forms":
        call = replace(call, forms=forms(b, proved, shared, sink))
    else:
        if sink is not None and not told:
            k, v = (b.call(aten.constant_pad_nd.default, node, [0, 0, 0, 1]) for node in (call.k, call.v))
            call = replace(call, k=k, v=v)
        call = replace(call, functions=functions(b, proved, shared, sink=None if told else sink, alive=within))
    empty = site.rows is not EmptyRow.IMPOSSIBLE and sink is None and within is None  # beside a sink it is zero
    out, lse = kernel.emit_with_lse(b, call) if told and (empty or afterwards) else (kernel.emit(b, call), None)
    if afterwards and sink is not None and lse is not None:
        return sunk(b, out, lse, sink)
    out = _own(b, site, out)
    if not empty:
        return out
    rows = alive(b, lse) if lse is not None else rows_with_a_key(b, proved, shared)
    for dense in answers(b, proved, shared, rows):
        out = answered(b, out, call, dense, sizes, site)
    return out


def _sink(b: Builder, site: Site, sizes: Sizes) -> Node | None:
    roles = site.roles
    if site.sink is None:
        return None
    return arrange(b, site.sink, (roles.batch, roles.heads, roles.queries, ()), sizes, expand=False)


def _finished(b: Builder, site: Site, out: Node, sizes: Sizes) -> Node:
    """The result in the original's form."""
    roles = site.roles
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
