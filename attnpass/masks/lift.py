"""From a node and an index to an expression: what element `index` of this tensor is.

    Lifter(graph).read(node, index, when)

The index is pushed from the result to the inputs, so a view is an index computation, a gather is a substitution, and a
mask of a million elements is one small expression. Each operation has one rule, registered under its name; a rule that
meets something it does not understand raises :class:`Unliftable`, and the tensor becomes an opaque load at exactly
these coordinates. So a lifted expression is always right; what varies is how much of it is opaque.

`when` is the position in the graph at which the tensor is looked at: in-place operations before it count, later ones
do not. An opaque load must still be readable at the end, so a tensor that is written later is not loaded itself; its
reader is, whose result is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from attnpass.masks.expr import FALSE, TRUE, ZERO, Bool, Kind, Load, Poly, Tree, Value, of, poly
from attnpass.masks.logic import TooLarge, both, eq, ge, is_bool, ite
from attnpass.masks.ranges import is_one
from attnpass.masks.sizes import Sizes
from attnpass.masks.writes import Writes, link, name_of, writes_first

Index = tuple[Poly, ...]
_MAX_DEPTH = 80  # operations in a row, each a handful of Python frames
_END = 2**63 - 1
_KINDS: dict[torch.dtype, Kind] = {torch.bool: "bool"}
for _dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
    _KINDS[_dtype] = "int"
for _dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    _KINDS[_dtype] = "real"


class Unliftable(Exception):
    """This operation, in this form, has no closed form here."""


class Content(str):
    """Among what a reading relied on: the name of a node whose real content was read."""


def liftable(dtype: torch.dtype) -> bool:
    return dtype in _KINDS


def kind_of(dtype: torch.dtype) -> Kind:
    if dtype not in _KINDS:
        raise Unliftable(str(dtype))
    return _KINDS[dtype]


@dataclass
class Call:
    """One operation as its rule sees it."""

    node: Node
    name: str
    when: int
    lifter: Lifter
    args: dict[str, Any] = field(default_factory=dict)
    output: int = 0  # which of several results

    @property
    def val(self) -> torch.Tensor:
        val = self.node.meta.get("val")
        if isinstance(val, tuple | list):
            val = val[self.output]
        if not isinstance(val, torch.Tensor):
            raise Unliftable("no tensor")
        return val

    @property
    def dtype(self) -> torch.dtype:
        return self.val.dtype

    @property
    def shape(self) -> Index:
        return self.lifter.shape(self.val)

    def shape_of(self, arg: Node) -> Index:
        return self.lifter.shape(tensor_of(arg))

    def read(self, arg: Node, index: Index) -> Value:
        """An element of an input, as this operation sees it."""
        return self.lifter.read(arg, index, self.when)

    def broadcast(self, arg: Node, index: Index, shape: Index | None = None) -> Value:
        """The element of an input that broadcasting pairs with this element of the result (or of `shape`)."""
        return self.read(arg, align(index, self.shape if shape is None else shape, self.shape_of(arg)))

    def integer(self, arg: Any) -> Poly:
        """A size, a dimension's bound, or any other scalar integer."""
        try:
            return self.lifter.sizes.poly(arg)
        except TypeError:
            raise Unliftable("scalar") from None

    def dim(self, arg: Any, rank: int) -> int:
        if not isinstance(arg, int):
            raise Unliftable("dim")
        return arg % max(rank, 1)

    def assume(self, text: str) -> None:
        self.lifter.assumed[-1].add(text)


Rule = Callable[[Call, Index], Value]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of these operations."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def tensor_of(node: Node) -> torch.Tensor:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        raise Unliftable("no tensor")
    return val


def align(index: Index, shape: Index, source: Index) -> Index:
    """The index into `source` of the element that broadcasting puts at `index` of `shape`."""
    skip = len(index) - len(source)
    if skip < 0:
        raise Unliftable("rank")
    out = []
    for at, size in enumerate(source):
        if is_one(size):
            out.append(ZERO)
        elif size == shape[skip + at]:
            out.append(index[skip + at])
        else:
            raise Unliftable("a size that may be one")
    return tuple(out)


class Lifter:
    """Expressions of one graph's tensors."""

    def __init__(
        self, graph: Graph, *, sizes: Sizes | None = None, constants: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.writes = Writes(graph)
        self.sizes = sizes or Sizes()
        self.constants = constants or {}  # tensors that are part of the program, by the name of their node
        self.assumed: list[set[str]] = [set()]  # what the reading in progress relied on (Content, too), innermost last
        self.nodes: dict[str, Node] = {node.name: node for node in graph.nodes}
        self.levels: tuple[tuple[int, Poly], ...] = ()  # inside vmap: the index of each axis that it hides
        self._hidden: dict[Node, bool] = {}
        self.opaque: dict[str, str] = {}  # nodes kept as loads, and the operation that was not understood
        self._memo: dict[Any, tuple[Value, frozenset[str]]] = {}
        self._fresh = 0

    def reset(self) -> None:
        """Begin a new reading, whatever became of the last one."""
        self.assumed = [set()]
        self.levels = ()

    def shape(self, val: torch.Tensor) -> Index:
        return tuple(self.sizes.poly(size) for size in val.shape)

    def fresh(self) -> str:
        """A name for an index of no tensor of the graph: the position that a running sum runs over."""
        self._fresh += 1
        return f"t{self._fresh}"

    def read(self, node: Node, index: Index, when: int) -> Value:
        """Element `index` of what this tensor holds at position `when`; opaque where nothing better is known."""
        writers = self.writes.to(node)
        if not writers:
            when = self.writes.position[node]
        key = (node, index, when, self.levels)
        if key not in self._memo:
            self.assumed.append(set())
            try:
                value = self._value(node, index, when)
            finally:
                relied = self.assumed.pop()
            self._memo[key] = value, frozenset(relied)
        value, assumed = self._memo[key]
        self.assumed[-1] |= assumed
        return value

    def _value(self, node: Node, index: Index, when: int) -> Value:
        writers = self.writes.to(node)
        if len(self.assumed) > _MAX_DEPTH:
            return self.load(node, index, "depth")
        try:
            return self._content(node, index, when) if writers else self.apply(node, index, when)
        except (Unliftable, TooLarge) as why:
            self.assumed[-1].clear()
            if any(self.writes.position[w] >= when for w in writers):
                raise Unliftable("written later") from None
            return self.load(node, index, str(why))

    def load(self, node: Node, index: Index, why: str) -> Value:
        """The tensor as it is, at exactly these coordinates."""
        if self.levels and self._hides_axes(node):
            raise Unliftable(why)  # it has axes that its coordinates do not show
        val = tensor_of(node)
        self.opaque.setdefault(node.name, why)
        real = val.dtype.is_floating_point or val.dtype.is_complex
        kind: Kind = "bool" if val.dtype == torch.bool else "real" if real else "int"
        load = Load(node.name, index, kind, str(val.dtype).removeprefix("torch."))
        return of(load) if load.kind == "int" else load

    def _hides_axes(self, node: Node) -> bool:
        """Made inside a vmap from something that it maps over."""
        if node not in self._hidden:
            self._hidden[node] = node.op == "call_function" and (
                name_of(node.target) == "python:_add_batch_dim" or any(map(self._hides_axes, node.all_input_nodes))
            )
        return self._hidden[node]

    def apply(self, node: Node, index: Index, when: int, output: int = 0) -> Value:
        """The rule of this node's operation."""
        if node.op in ("placeholder", "get_attr") and node.name in self.constants:
            held, val = self.constants[node.name], tensor_of(node)
            if held.dtype != val.dtype or tuple(map(poly, held.shape)) != self.shape(val):
                raise Unliftable("constant tensor")
            element = self.constant(held, index)
            self.assumed[-1].add(Content(node.name))
            return element
        if node.op != "call_function":
            raise Unliftable(node.op)
        name = name_of(node.target)
        if name not in RULES:
            raise Unliftable(name)
        call = Call(node, name, when, self, bind(node), output)
        value = RULES[name](call, index)
        if is_bool(value) != (call.dtype == torch.bool):
            raise Unliftable("dtype")
        return value

    def constant(self, value: torch.Tensor, index: Index) -> Value:
        """An element of a tensor whose content is known: as its closed form."""
        from attnpass.masks.content import form_of, readable

        form = form_of(value) if readable(value) else None
        if form is None:
            raise Unliftable("a constant without a closed form")
        return form.at(index)

    # --- tensors that are written in place ------------------------------------------------------------------------

    def _content(self, node: Node, index: Index, when: int) -> Value:
        position = self.writes.position
        how, first = link(node)
        if how == "same":
            assert first is not None
            return self.read(first, index, when)
        later = self.writes.between(node, position[node], when)
        if not later and how != "owner":
            return self.apply(node, index, position[node])
        if how == "view":
            return self.apply(node, index, when)
        if how == "unknown":
            raise Unliftable("may be a view of what is written")
        if not later:
            return self.apply(node, index, position[node])
        return self._after(later[-1], node, index)

    def _after(self, writer: Node, owner: Node, index: Index) -> Value:
        """What `owner` holds right after `writer` has written it, perhaps through a view and only in part."""
        if not writes_first(writer.target):
            raise Unliftable("unknown write")
        target = writer.args[0]
        assert isinstance(target, Node)
        path: list[Node] = []
        node = target
        while node is not owner:
            how, first = link(node)
            if how not in ("same", "view") or first is None:
                raise Unliftable("written through an unknown view")
            if how == "view":
                path.append(node)
            node = first
        inside: Bool = TRUE
        at = index
        for view in reversed(path):
            here, at = self._through(view, at)
            inside = both(inside, here)
        position = self.writes.position[writer]
        new = self.apply(writer, at, position)
        if inside == TRUE:
            return new
        old = self.read(owner, index, position)
        return ite(inside, new, old)

    def _through(self, view: Node, index: Index) -> tuple[Bool, Index]:
        """Where an element of a view's input appears in the view: (whether at all, index)."""
        call = Call(view, name_of(view.target), 0, self, bind(view))
        source = view.args[0]
        assert isinstance(source, Node)
        shape = call.shape_of(source)
        rank = len(index)
        if call.name == "unsqueeze":
            at = call.dim(call.args["dim"], rank + 1)
            return TRUE, (*index[:at], ZERO, *index[at:])
        if call.name == "transpose":
            a, b = call.dim(call.args["dim0"], rank), call.dim(call.args["dim1"], rank)
            swapped = list(index)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            return TRUE, tuple(swapped)
        if call.name not in ("slice", "select"):
            raise Unliftable("written through a view")
        d = call.dim(call.args["dim"], rank)
        if call.name == "select":
            k = call.integer(call.args["index"])
            wrapped = k + shape[d] if ge(k) == FALSE else k
            if ge(wrapped) != TRUE:
                raise Unliftable("index of unknown sign")
            return eq(index[d] - wrapped), index[:d] + index[d + 1 :]
        if call.args.get("step", 1) != 1:
            raise Unliftable("step")
        start = slice_start(call, shape[d])
        length = call.shape[d]
        k = index[d] - start
        return both(ge(k), ge(length - 1 - k)), (*index[:d], k, *index[d + 1 :])


def slice_start(call: Call, size: Poly) -> Poly:
    """The first element that a slice keeps. Beyond the end it keeps none, so there the answer does not matter."""
    raw = call.args.get("start")
    start = poly(0) if raw is None else call.integer(raw)
    if ge(start) == TRUE or _as_long_as_asked(call, start):
        return start
    if ge(start) != FALSE:
        raise Unliftable("start of unknown sign")
    from_end = start + size
    if ge(from_end) == TRUE:
        return from_end
    if ge(from_end) == FALSE:
        return ZERO
    d = call.dim(call.args["dim"], len(call.shape))
    end = call.args.get("end")
    if (end is None or end == _END) and call.shape[d] == -start:
        return from_end  # it is as long as it was asked to be, so it was not clamped
    raise Unliftable("start before the beginning")


def _as_long_as_asked(call: Call, start: Poly) -> bool:
    """start:end with end >= 0 has end - start elements: had the start counted from the end, it would have fewer."""
    end = call.args.get("end")
    if end is None or end == _END:
        return False
    d = call.dim(call.args["dim"], len(call.shape))
    last = call.integer(end)
    return ge(last) == TRUE and call.shape[d] == last - start


def bind(node: Node) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {"self": node.args[0], "index": node.args[1]} if len(node.args) == 2 else {}
    out: dict[str, Any] = {}
    for at, argument in enumerate(node.target._schema.arguments):
        if at < len(node.args):
            out[argument.name] = node.args[at]
        elif argument.name in node.kwargs:
            out[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            out[argument.name] = argument.default_value
    return out


def as_tree(value: Value) -> Tree:
    """A value that is no boolean."""
    if is_bool(value):
        raise Unliftable("a boolean that is added or compared")
    return value  # type: ignore[return-value]


def as_bool(value: Value) -> Bool:
    if not is_bool(value):
        raise Unliftable("a number as a condition")
    return value  # type: ignore[return-value]
