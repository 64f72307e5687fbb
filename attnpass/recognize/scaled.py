"""An attention sink written as a scale of the result: ``out * sigmoid(logsumexp(scores) - sink)``.

    scores ──┬── softmax ── ... ── product with the values ──┐
             └── logsumexp ── minus the sink ── sigmoid ─────┴── times ── result

    exp(s_j) / (exp(sink) + sum_k exp(s_k))  =  softmax(s)_j * sigmoid(lse - sink)

So the result is that of an attention with one more key, whose score is the sink and whose value is zero, and whatever
is said of such a sink holds. The log-sum-exp must be that of the very scores that the softmax is taken of, over the
same axis, and the scale must lie on the axes of the result as the log-sum-exp does; only casts and views may stand in
between. Unlike softmax it sees a constant that is added to all scores: with a sink the walk inwards drops none.

Where a query has no key at all and the fill is -inf, this spelling gives NaN (assemble.py refuses that).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import same, tensor
from attnpass.recognize import views
from attnpass.recognize.axes import Axes
from attnpass.recognize.ops import bound, op_name, pair
from attnpass.recognize.purity import Effects
from attnpass.recognize.softmax import Anchor, seen_by
from attnpass.recognize.views import shape_of
from attnpass.recognize.weights import Outwards
from attnpass.site import Dim, Layout, Placed


@dataclass(frozen=True)
class Scaling:
    """The scale of a result, read up to the multiplication."""

    sink: Placed
    share: Node  # sigmoid(lse - sink), as the multiplication reads it
    layout: Layout  # of `share`
    result: Node  # the multiplication
    nodes: tuple[Node, ...]  # everything from the log-sum-exp to the result


@dataclass(frozen=True)
class _At:
    """A tensor that was reached, what its dimensions are, and what was crossed to it."""

    node: Node
    layout: Layout
    crossed: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Scales:
    """Looks for scales in one graph."""

    axes: Axes
    effects: Effects
    live: set[Node]

    def read(self, anchor: Anchor, scores: Node, layout: Layout, over: Dim) -> Scaling | None:
        """The scale made from the log-sum-exp of an anchor's scores, if there is exactly one."""
        if anchor.base != 1.0:
            return None  # its scores are powers of two
        found = list(self._scalings(_At(*self._innermost(scores, layout)), over))
        return found[0] if len(found) == 1 else None

    def apply(self, scaling: Scaling, out: Outwards) -> None:
        """What the walk outwards ends with is the scaled result; Refuse where something else is scaled."""
        product = out.products[0][0].node
        result = shape_of(scaling.result)
        for at in self._through(_At(product, out.out_layout)):
            operands = (scaling.share, at.node)
            if pair(scaling.result) not in (operands, operands[::-1]) or not self._sees(at, scaling.result):
                continue
            wide = len(result) == len(at.layout) and all(map(same, result, shape_of(at.node)))
            if wide and self._lies_on(scaling, at.layout, result):
                out.result = scaling.result
                out.out_layout = self.axes.resolve(at.layout)
                out.crossed += [*at.crossed, *scaling.nodes]
                return
        raise Refuse("probabilities_changed", scaling.result, op="a scale of something else")

    def _lies_on(self, scaling: Scaling, layout: Layout, shape: Sequence[Any]) -> bool:
        """Each dimension of the scale is the dimension of the result that it is multiplied with, or of size one."""
        expected = self.axes.align(layout, shape_of(scaling.share), shape)
        return expected == self.axes.resolve(scaling.layout)

    def _innermost(self, node: Node, layout: Layout) -> tuple[Node, Layout]:
        """Scores before they were cast or viewed for the softmax: the log-sum-exp may read them there."""
        while op_name(node) in views.CASTS | views.VIEWS:
            source = seen_by(self.effects, node.args[0], node)
            if source is None or not _floating(source):
                break
            try:
                layout = views.backward(node, layout, self.axes)
            except Refuse:
                break
            node = source
        return node, layout

    def _scalings(self, scores: _At, over: Dim) -> Iterator[Scaling]:
        for lse, read in self._readers(scores, "logsumexp"):
            summed = self._summed(lse, read, over)
            if summed is not None:
                yield from self._made_of(summed)

    def _made_of(self, lse: _At) -> Iterator[Scaling]:
        for less, read in self._readers(lse, "sub", "rsub"):
            sink = self._subtracted(less, read)
            if sink is None:
                continue
            for sigmoid, difference in self._readers(_after(read, less), "sigmoid"):
                for result, share in self._readers(_after(difference, sigmoid), "mul"):
                    yield Scaling(sink, share.node, share.layout, result, (*share.crossed, result))

    def _summed(self, lse: Node, at: _At, over: Dim) -> _At | None:
        """The log-sum-exp over the keys, all of them and nothing else."""
        args = bound(lse)
        dims = {d % len(at.layout) for d in ([args["dim"]] if isinstance(args["dim"], int) else args["dim"])}
        layout = self.axes.resolve(at.layout)
        if {a for d in dims for a in layout[d]} != set(self.axes.resolve_dim(over)):
            return None
        left = [() if d in dims else dim for d, dim in enumerate(layout) if args["keepdim"] or d not in dims]
        return _At(lse, tuple(left), (*at.crossed, lse))

    def _subtracted(self, less: Node, at: _At) -> Placed | None:
        """What is taken from the log-sum-exp: once, and of no more axes than it has."""
        a, b = pair(less)
        lse, sink = (b, a) if op_name(less) == "rsub" else (a, b)
        if lse is not at.node or not isinstance(sink, Node) or bound(less)["alpha"] != 1:
            return None
        source = seen_by(self.effects, sink, less)
        shape = shape_of(at.node)
        wide = len(shape_of(less)) == len(shape) and all(map(same, shape_of(less), shape))
        if source is None or not wide or not _floating(source):
            return None
        return Placed(source, self.axes.align(at.layout, shape_of(source), shape))

    def _readers(self, at: _At, *names: str) -> Iterator[tuple[Node, _At]]:
        """Operations of these names that read a tensor, or what casts and views make of it."""
        for here in self._through(at):
            for user in here.node.users:
                if user in self.live and op_name(user) in names and self._sees(here, user):
                    yield user, here

    def _through(self, at: _At) -> Iterator[_At]:
        """A tensor and what casts and views make of it."""
        stack = [at]
        while stack:
            here = stack.pop()
            yield here
            for user in here.node.users:
                name = op_name(user)
                if user not in self.live or user.args[:1] != (here.node,) or not self._sees(here, user):
                    continue
                # the identity for values; for gradients where none flow
                still = name == "detach" and not here.node.meta.get("attnpass_grad", False)
                if not still and (name not in views.CASTS | views.VIEWS or not _floating(user)):
                    continue
                try:
                    layout = here.layout if still else views.forward(user, here.layout, self.axes)
                except Refuse:
                    continue
                stack.append(_At(user, layout, (*here.crossed, user)))

    def _sees(self, at: _At, user: Node) -> bool:
        """The reader sees the tensor as it was made."""
        return seen_by(self.effects, at.node, user) is at.node


def _after(at: _At, node: Node) -> _At:
    """One elementwise operation further."""
    return _At(node, at.layout, (*at.crossed, node))


def _floating(node: Node) -> bool:
    val = tensor(node)
    return val is not None and val.is_floating_point()
