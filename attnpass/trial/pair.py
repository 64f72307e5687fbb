"""One site as two small modules that compute the same from the same leaves: the original, and its replacement.

    q, k, v ───────────────┬── the original's own operations ──> output
    inputs of its masks ───┴── the fused call and what it needs ──> output

The leaves are q, k and v, and what masks and biases are made from. A mask tensor is no leaf where it can be made anew:
the operations that lead to it are taken along, up to the inputs of the graph. So both sides see the same mask however
each of them spells it, and giving an input another value (a padding mask, say) is giving it to both. A tensor that
cannot be made anew (written in place, random, or with too long a history) is a leaf with the value that it really has.

Limits: dropout is taken out of both sides, because no two kernels draw the same numbers.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attnpass.emit import build
from attnpass.excerpt import excerpt, needed
from attnpass.graph import Shared, tensor, value
from attnpass.kernels import Kernel
from attnpass.masks.writes import Writes
from attnpass.prove import Proved
from attnpass.site import Site

_LONGEST = 400  # operations that may lead to a mask; longer is part of the model, not of the mask
_DROPOUT = {"dropout": 1, "dropout_": 1, "native_dropout": 1, "scaled_dot_product_attention": 4}  # where p stands
_FORM_ONLY = frozenset(f"{what}_like" for what in ("empty", "full", "ones", "zeros")) | frozenset(
    f"new_{what}" for what in ("empty", "full", "ones", "zeros")
)
_RANDOM = torch.Tag.nondeterministic_seeded


class Untried(Exception):
    """This site cannot be tried; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A site whose replacement stands in the graph beside it; the uses of its output have not been moved."""

    id: str
    proved: Proved
    kernel: Kernel
    fused: Node


@dataclass(frozen=True)
class Side:
    """One of the two modules, the nodes whose values it reads, and which of its nodes belong to the site itself."""

    module: GraphModule
    reads: tuple[Node, ...]
    own: frozenset[str]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for modules that compute the same."""
        number = {node: i for i, node in enumerate(self.module.graph.nodes)}

        def plain(arg: Any) -> Any:
            if isinstance(arg, Node):
                return ("node", number[arg])
            if isinstance(arg, tuple | list):
                return tuple(map(plain, arg))
            return repr(arg)

        return tuple(
            (
                node.op,
                str(node.target) if node.op == "call_function" else "",
                plain(node.args),
                plain([*node.kwargs.items()]),
            )
            for node in self.module.graph.nodes
        )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both sides of one site."""

    site: Site  # without its dropout
    kernel: Kernel
    original: Side
    replacement: Side
    leaves: tuple[Node, ...]  # in graph order; what either side reads
    operands: frozenset[Node]  # q, k, v
    data: frozenset[Node]  # leaves that may hold whatever a caller gives the model
    whole: bool  # every other leaf comes from outside: values may be made up

    @cached_property
    def exact(self) -> GraphModule:
        """The original in float64, reading what it reads."""
        from attnpass.trial.reference import exact

        return exact(self.original)

    @property
    def key(self) -> tuple[Any, ...]:
        forms = tuple(_form(node) for node in (*self.original.reads, *self.replacement.reads))
        return self.kernel.name, self.site.spec, forms, self.original.key, self.replacement.key


def paired(graph: Graph, built: Built, writes: Writes, fixed: Collection[str]) -> Pair:
    """Both sides of a site; `fixed` names the inputs whose content is part of the proof. Raises Untried."""
    site, fused = _still(built.proved.site), built.fused
    fixed = {*fixed, *built.proved.held}
    if site is built.proved.site:
        return _paired(graph, site, built.kernel, fused, writes, fixed)
    b, fused = build(graph, dataclasses.replace(built.proved, site=site), built.kernel, Shared())
    try:
        return _paired(graph, site, built.kernel, fused, writes, fixed)
    finally:
        b.discard()


def _still(site: Site) -> Site:
    """The site without dropout."""
    if site.spec.dropout == 0:
        return site
    return dataclasses.replace(site, dropout=0.0, spec=dataclasses.replace(site.spec, dropout=0.0))


def _paired(graph: Graph, site: Site, kernel: Kernel, fused: Node, writes: Writes, fixed: Collection[str]) -> Pair:
    region = {*site.region, site.output}
    made = {node for node in graph.nodes if node.meta.get("attnpass_made")}
    operands = frozenset(placed.node for placed in (site.q, site.k, site.v))
    names = {_memory(node): node for node in operands}
    history: set[Node] = set()
    for node in (*_reads(site.output, region), *_reads(fused, made)):
        if _memory(node) not in names:
            history |= _history(node, operands, lambda n: _repeatable(n, writes, region, site.output))
    original = _side(site.output, region | history, region | _onwards(history, operands), names)
    replacement = _side(fused, made | history, made, names)
    if _quieten(original.module) | _quieten(replacement.module):
        raise Untried("it draws random numbers besides dropout")
    read = {*original.reads, *replacement.reads}
    leaves = tuple(node for node in graph.nodes if node in read)
    behind = _behind(operands, site.output)
    for leaf in leaves:
        if leaf in behind and leaf not in operands and tensor(leaf) is not None:
            raise Untried(f"what lies between its operands and itself cannot be cut out ({leaf.name})")
    given = frozenset(n for n in leaves if n not in operands and _given(n))
    whole = all(n in given or n in operands or n.op == "get_attr" or tensor(n) is None for n in leaves)
    # a mask that could not be made anew would not follow another value of what it is made from
    free = given if whole else ()
    data = frozenset(n for n in free if n.name not in fixed and "attnpass_constant" not in n.meta)
    return Pair(
        site=site,
        kernel=kernel,
        original=original,
        replacement=replacement,
        leaves=leaves,
        operands=operands,
        data=data,
        whole=whole,
    )


def _behind(operands: Collection[Node], end: Node) -> set[Node]:
    """What is made from the operands before the site ends."""
    found: set[Node] = set()
    work = list(operands)
    while work:
        node = work.pop()
        new = [user for user in node.users if user not in found and user < end and not _form_only(user, node)]
        found.update(new)
        work += new
    return found


def _form_only(user: Node, node: Node) -> bool:
    """It asks for no element of what it reads, only for its shape, dtype and device."""
    if tensor(user) is None and not isinstance(value(user), tuple | list):
        return True
    target = user.target
    name = target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else ""
    return name in _FORM_ONLY and user.all_input_nodes.count(node) == 1 and user.args[:1] == (node,)


def _given(node: Node) -> bool:
    """Of its content nothing can have been proved: it comes from outside, or from a call that nobody knows."""
    return tensor(node) is not None and (
        node.op == "placeholder" or (node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload))
    )


def _reads(end: Node, inside: Collection[Node]) -> list[Node]:
    """What a part of the graph needs from outside."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    work = [end]
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inside:
            work += node.all_input_nodes
        else:
            found[node] = None
    return list(found)


def _memory(node: Node) -> Node:
    """The node whose memory this one is: what is written in place goes by two names, the older one being as good."""
    while _writes(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _history(end: Node, operands: Collection[Node], repeatable: Callable[[Node], bool]) -> set[Node]:
    """The operations that make a tensor from inputs of the graph; nothing where they cannot be done again."""
    found: set[Node] = set()
    work = [end]
    while work:
        node = work.pop()
        if node in found or node in operands or not repeatable(node):
            continue
        found.add(node)
        work += node.all_input_nodes
        if len(found) > _LONGEST:
            return set()
    return found


def _onwards(history: Collection[Node], operands: Collection[Node]) -> set[Node]:
    """What is made from q, k or v is part of the site, not of its masks: a transpose, a bias that depends on q."""
    found: set[Node] = set(operands)
    for node in sorted(history):
        if not found.isdisjoint(node.all_input_nodes) and tensor(node) is not None:
            found.add(node)
    return found - set(operands)


def _repeatable(node: Node, writes: Writes, region: Collection[Node], end: Node) -> bool:
    """Done again on what its inputs hold right before `end`, it yields the same: nothing is drawn, and no memory is
    written meanwhile but by the site itself, whose writes are done again, too.
    """
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        if _RANDOM in node.target.tags:
            return False
    elif not _on_numbers(node.target):
        return False
    if tensor(node) is None:
        return True  # a size
    memory = (n for n in (node, *node.all_input_nodes) if tensor(n) is not None)
    return all(w in region or w < node or not w < end for n in memory for w in writes.to(n))


def _on_numbers(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    return getattr(target, "__module__", "") in ("_operator", "math") or target is operator.getitem or "sym_" in name


def _side(end: Node, inside: Collection[Node], own: Collection[Node], names: Mapping[Node, Node]) -> Side:
    """The nodes of `inside` that `end` needs, as a module of whatever else they read; `names`: by which name of its
    memory an operand goes.
    """
    # what writes in place is needed though nobody reads its result: readers go on reading what it has written to
    parts = needed([end, *(node for node in own if _writes(node))], inside)
    graph, twin = Graph(), dict[Node, Node]()
    outside = [node for node in end.graph.nodes if node in parts and node not in inside]
    reads = list(dict.fromkeys(names.get(_memory(node), node) for node in outside))
    for at, node in enumerate(reads):
        twin[node] = graph.placeholder(f"given{at}")
        twin[node].meta["val"] = value(node)
    for node in outside:
        twin[node] = twin[names.get(_memory(node), node)]
    module = excerpt(graph, end, parts.intersection(inside), twin)
    own_names = frozenset(twin[node].name for node in parts if node in own)
    return Side(module, tuple(reads), own_names)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _quieten(module: GraphModule) -> bool:
    """Take dropout out; whether something random is left."""
    left = False
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        place = _DROPOUT.get(name)
        if place is not None and len(node.args) > place:
            node.update_arg(place, 0.0)
        elif place is not None and "dropout_p" in node.kwargs:
            node.update_kwarg("dropout_p", 0.0)
        elif _RANDOM in node.target.tags and place is None:
            left |= _draws(node)
    module.recompile()
    return left


def _draws(node: Node) -> bool:
    """Fused calls are marked as random whatever their dropout is."""
    arguments: Iterable[Any] = node.target._schema.arguments  # type: ignore[union-attr]
    for at, argument in enumerate(arguments):
        if argument.name in ("dropout_p", "dropout", "p"):
            given = node.args[at] if at < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            return given not in (0, 0.0, None)
    return True


def _form(node: Node) -> Callable[..., Any] | tuple[Any, ...] | None:
    val = tensor(node)
    if val is None:
        return (str(value(node)),)
    grad = bool(node.meta.get("attnpass_grad"))
    return str(val.dtype), tuple(map(str, val.shape)), tuple(map(str, val.stride())), str(val.device), grad
