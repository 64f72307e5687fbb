"""The walk from the probabilities outwards to the product with the values.

Between the two stand only operations that are the identity on probabilities: casts, views, dropout in evaluation, the
slice that cuts a sink column off. Live dropout is part of the attention. Whatever else reads the probabilities is
noted: the big tensor must then stay alive, and a fused call would save nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import same, tensor
from attnpass.recognize import products, views
from attnpass.recognize.axes import Axes
from attnpass.recognize.ops import bound, describe, op_name
from attnpass.recognize.products import Product
from attnpass.recognize.purity import Effects
from attnpass.recognize.walk import Sink
from attnpass.shape_readers import reads_shape_only
from attnpass.site import Layout

# What changes probabilities but still leads to the values: named apart, because it *is* attention, of another kind.
_CHANGES = {
    "add",
    "clamp",
    "constant_pad_nd",
    "div",
    "feature_dropout",
    "lerp",
    "masked_fill",
    "mul",
    "nan_to_num",
    "pad",
    "pow",
    "relu",
    "roll",
    "sub",
    "where",
}


@dataclass
class Outwards:
    """What was found on the way out."""

    products: list[tuple[Product, Layout, Node]] = field(default_factory=list)  # product, V's layout, V
    crossed: list[Node] = field(default_factory=list)
    refused: list[Refuse] = field(default_factory=list)
    dropout: Any = 0.0
    out_layout: Layout = ()
    result: Node | None = None  # where it is not the product itself: the product scaled (scaled.py)


def outwards(node: Node, layout: Layout, axes: Axes, effects: Effects, live: set[Node], sink: Sink | None) -> Outwards:
    """Follow the probabilities to the one product with the values."""
    walk = _Walk(axes=axes, effects=effects, live=live, sink=sink)
    walk.follow(node, layout)
    return walk.out


@dataclass(kw_only=True)
class _Walk:
    """One softmax's walk outwards: what holds everywhere on it, and what it has found so far."""

    axes: Axes
    effects: Effects
    live: set[Node]
    sink: Sink | None
    out: Outwards = field(default_factory=Outwards)

    def follow(self, node: Node, layout: Layout) -> None:
        """All readers of `node`, which holds the probabilities in this layout."""
        for user in node.users:
            if user not in self.live or reads_shape_only(user, {node}):
                continue
            try:
                if user.op == "call_function" and self.effects.value_at(node, user) is not node:
                    raise Refuse("mutated", user, what="the probabilities")
                self._cross(node, user, layout)
            except Refuse as why:
                self.out.refused.append(why)

    def _cross(self, node: Node, user: Node, layout: Layout) -> None:
        """One reader: the product with the values, or an identity to follow further."""
        name = op_name(user)
        if user.op == "output":
            raise Refuse("graph_output", user)
        if products.is_product(user) or _is_mul_of_sum(user, self.live):
            self._product(node, user, layout)
            return
        if user.args[:1] != (node,):  # as an index, a count ...
            raise Refuse(_why(user, self.live), user, op=describe(user))
        if name == "dropout":
            self._dropout(user)
            after = layout
        elif name == "slice" and self.sink is not None and not views.is_whole(user):
            after = _cut_sink(user, layout, self.axes, self.sink)
        elif name in views.VIEWS or name in views.CASTS:
            val = tensor(user)
            if val is None or not val.is_floating_point():
                raise Refuse("probabilities_changed", user, op="a cast")
            after = views.forward(user, layout, self.axes)
        elif name == "detach" and not node.meta.get("attnpass_grad", False):
            after = layout
        else:
            raise Refuse(_why(user, self.live), user, op=describe(user))
        self.out.crossed.append(user)
        self.follow(user, after)

    def _dropout(self, user: Node) -> None:
        args = bound(user)
        if args["train"] and args["p"] != 0:
            if self.out.dropout != 0.0:
                raise Refuse("probabilities_changed", user, op="two dropouts")
            self.out.dropout = args["p"]

    def _product(self, node: Node, user: Node, layout: Layout) -> None:
        """The product with the values: its own axes are new atoms, then identified with those of the probabilities."""
        axes, out = self.axes, self.out
        result = user
        if not products.is_product(user):
            result = next(u for u in user.users if u in self.live)
        fresh = axes.of_shape(views.shape_of(result))
        product = products.read(result, fresh, axes)
        if product.inner is not user or (product.a is node) == (product.b is node):
            raise Refuse("not_a_query_key_product", user, detail="the probabilities are not one operand")
        if product.extra is not None or product.alpha != 1:
            raise Refuse("probabilities_changed", user, op="a product with alpha or beta")
        mine, other, other_layout = (
            (product.a_layout, product.b, product.b_layout)
            if product.a is node
            else (product.b_layout, product.a, product.a_layout)
        )
        for mark, known in zip(axes.resolve(mine), axes.resolve(layout), strict=True):
            axes.unify(mark, known)
        values = self.effects.value_at(other, product.inner)
        out.products.append((product, axes.resolve(other_layout), values))
        out.out_layout = axes.resolve(fresh)
        out.crossed.append(user)
        if result is not user:
            out.crossed.append(result)


def _why(user: Node, live: set[Node]) -> str:
    if op_name(user) in ("linear", "einsum", "convolution", "conv2d", "addmm"):
        return "mixes_heads"
    if op_name(user) in _CHANGES and _leads_to_product(user, live):
        return "probabilities_changed"
    return "no_product_after"


def _leads_to_product(node: Node, live: set[Node]) -> bool:
    for _ in range(8):
        readers = [user for user in node.users if user in live]
        if any(products.is_product(user) for user in readers):
            return True
        readers = [
            u for u in readers if op_name(u) in _CHANGES | views.VIEWS | views.CASTS | {"dropout", "linear", "norm"}
        ]
        if not readers:
            return False
        node = readers[0]
    return False


def _is_mul_of_sum(user: Node, live: set[Node]) -> bool:
    """The mul of mul + sum: what sums it is its only reader, so the two together are one product."""
    readers = [u for u in user.users if u in live]
    return (
        op_name(user) == "mul"
        and len(readers) == 1
        and op_name(readers[0]) == "sum"
        and readers[0].args[0] is user
        and products.is_product(readers[0])
    )


def _cut_sink(user: Node, layout: Layout, axes: Axes, sink: Sink) -> Layout:
    """``p[..., :-1]`` (or ``1:``) takes exactly the sink column away."""
    args = bound(user)
    source = user.args[0]
    assert isinstance(source, Node)
    shape, after = views.shape_of(source), views.shape_of(user)
    dim = args["dim"] % len(shape)
    start, step = args["start"] or 0, args["step"]
    if axes.resolve_dim(layout[dim]) != axes.resolve_dim(sink.whole) or step != 1:
        raise Refuse("probabilities_changed", user, op="a slice")
    # one element goes: the first when it starts at one, else the last
    fits = isinstance(start, int) and start == (1 if sink.first else 0) and same(after[dim] + 1, shape[dim])
    if not fits:
        raise Refuse("probabilities_changed", user, op="a slice that does not cut the sink column")
    return (*layout[:dim], axes.resolve_dim(sink.keys), *layout[dim + 1 :])
