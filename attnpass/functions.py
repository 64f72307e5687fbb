"""A proved mask, its biases and the soft cap as functions of one score and its index, for kernels that take such.

    proof.keep    ──>  keep(b, h, i, j, *reads)          a graph module, and the tensors of the graph that it reads
    soft cap, then
    proof.biases  ──>  score(s, b, h, i, j, *reads)
    structure     ──>  lists of the blocks that keep anything, and of those that keep all

Each function is written from the same expressions as a dense mask would be, so no tensor over queries and keys comes
to be. Sites with equal masks share functions and lists. Biases that are data are in tame.py.

A sink is an extra key of value zero whose score is the sink itself. Where the kernel returns its log-sum-exp it is
cheaper to rescale the result afterwards (lse.py); where it does not, that key is appended here, and no block is left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attnpass.graph import Builder, Shared, is_one, tensor, value
from attnpass.kernels.ops import apart
from attnpass.layers import Dense
from attnpass.masks import MaskProof
from attnpass.masks.blocks import BLOCK, judged, listed
from attnpass.masks.expr import Expr, Fn, Load, Poly, Sym, Value, Var, walk
from attnpass.masks.frame import Frame
from attnpass.masks.ranges import integer_bounds
from attnpass.masks.render import Renderer, SizeNodes
from attnpass.masks.structure import Structure
from attnpass.masks.writes import link
from attnpass.prove import Proved
from attnpass.reasons import Reason, reason
from attnpass.recognize.gradients import asked
from attnpass.site import BlockLists, Functions, Site
from attnpass.spec import EmptyRow
from attnpass.structured import mask_key, written
from attnpass.tame import addend, score_key, stepped, tameness, unless
from attnpass.tame import rows_with_a_key as tame_rows

aten = torch.ops.aten
_FEW_QUERIES = 16  # rows of the narrowest tile


def obstacles(proved: Proved, *, while_tame: bool = False) -> Iterator[Reason]:
    """Why a site's mask and biases cannot be given to a kernel as functions.

    `while_tame`: the kernel takes any functions, so it may do with what is proved as long as data are tame.
    """
    site, proof = proved.site, proved.proof
    known = proved.while_tame if while_tame else None
    if proof is None or not (proved.expressed or known is not None):
        yield reason("not_expressed")
        return
    if known is not None and site.spec.device != "cpu" and any(n.value is None for n in proof.frame.lengths):
        # the mask reads whether the data are tame; of symbolic sizes beside scores that read data nothing was measured
        yield reason("kernel_bug", detail="NaN with symbolic sizes and a mask that reads data (pytorch#186775)")
    if any(asked(node, site.state) for node, _ in proof.loads):
        yield reason("bias_gradient")
    if site.spec.device == "cpu" and any(_symbolic(node) for node, _ in proof.loads):
        yield reason("no_fused_form", detail="a mask of symbolic size on the CPU")
    if site.bent:
        yield reason("empty_rows", detail="gradients through the soft cap")


def _symbolic(node: Node) -> bool:
    val = tensor(node)
    return val is None or not all(isinstance(size, int) for size in val.shape)


def functions(
    b: Builder, proved: Proved, shared: Shared, *, sink: Node | None = None, alive: Node | None = None
) -> Functions:
    """The functions of a site that has no obstacles; `sink` is to be an extra key, behind the others.

    `alive`: the rows with a key. In others every key gets the same score, so that a kernel answers with the mean.
    """
    site, proof = proved.site, proved.proof
    assert proof is not None
    writer = _Writer(b, proof, site, shared)
    tame = tameness(b, proved, shared)
    read = [a.bias.value for a in proof.biases] + ([proof.keep] if proved.while_tame is not None else [])

    def made(key: Hashable, make: Callable[[], _Made]) -> _Made:
        place = (key, proof.frame.lengths, site.device, sink, tame, alive)
        return shared.all(place, b, make, lambda function: (function[0], *function[1]))

    keep, keep_reads = made(
        ("keep", proof.keep),
        lambda: writer.function(("b", "h", "i", "j"), [proof.keep], lambda f: _keep(f, proof, tame, sink, alive)),
    )
    score, score_reads = made(
        ("score", site.softcap, *score_key(proved)),
        lambda: writer.function(("score", "b", "h", "i", "j"), read, lambda f: _score(f, proved, sink, alive)),
    )
    return Functions(
        score=score,
        score_reads=score_reads,
        keep=keep,
        keep_reads=keep_reads,
        blocks=_blocks(b, writer, shared, sink, tame, alive),
    )


def answered_within(proved: Proved) -> bool:
    """Rows without a key are better answered by the kernel than by one more look at all values: where there are so few
    queries that these are most of what is read. Gradients, which such a row may send to its scores, are not asked for.
    """
    site, proof = proved.site, proved.proof
    mean = site.rows is EmptyRow.MEAN and site.sink is None and not site.spec.grad
    return mean and proof is not None and proved.while_tame is None and _few_queries(proof.frame)


def rows_with_a_key(b: Builder, proved: Proved, shared: Shared) -> Node:
    """Where a query sees a key, (batch, heads, queries, 1), for a kernel that does not tell.

    The mask is written out only to be reduced at once, which a compiler makes one loop of.
    """
    if proved.while_tame is not None:
        return tame_rows(b, proved, shared)
    return shared.get(("rows", *mask_key(proved)), b, lambda: b.call(aten.any.dim, written(b, proved), -1, True))


def answers(b: Builder, proved: Proved, shared: Shared, alive: Node) -> list[Dense]:
    """How the rows without a key are answered, one way after the other."""
    site, known = proved.site, proved.while_tame
    if known is None:
        return [Dense(mask=None, alive=alive, answer=site.rows)]
    tame = tameness(b, proved, shared)
    hollow = Dense(mask=None, alive=alive, answer=site.hollow)
    if tame is None or known.rows is not EmptyRow.MEAN:
        return [hollow]  # while data are tame there is no such row, or it is one of -inf too
    wild = b.call(aten.logical_not.default, tame)
    return [
        replace(hollow, alive=b.call(aten.logical_or.default, alive, tame)),
        Dense(mask=None, alive=b.call(aten.logical_or.default, alive, wild), answer=EmptyRow.MEAN),
    ]


_Made = tuple[Node, tuple[Node, ...]]  # the node of a function, and what it reads


# -- functions ---------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes functions that read the tensors and sizes of one graph."""

    def __init__(self, b: Builder, proof: MaskProof, site: Site, shared: Shared) -> None:
        self.proof = proof
        self.device = site.device
        self.b = b
        self.shared = shared
        self.operands = {_memory(placed.node) for placed in (site.q, site.k, site.v)}
        self.nodes = proof.nodes
        self.find = SizeNodes(b, proof.sizes)

    def function(self, names: tuple[str, ...], exprs: Sequence[Value], body: Callable[[_Body], Node]) -> _Made:
        graph = Graph()
        args = {name: graph.placeholder(name) for name in names}
        function = _Body(self, graph, args, [])
        if not all(map(_narrow, exprs)):
            for name in ("b", "h", "i", "j"):
                args[name] = function.call(aten.to.dtype, args[name], torch.int64)
        graph.output(body(function))
        return self.b.module(GraphModule(torch.nn.Module(), graph)), tuple(map(self.in_memory, function.reads))

    def in_memory(self, node: Node) -> Node:
        """What a function reads, as inductor can read it there.

        What is not computed yet is written into the function, to be computed again for each score. On the CPU even that
        fails (torch 2.13: "NotImplementedError: Pointwise"), and so does reading what is q, k or v as well.
        """
        val, on_cpu = tensor(node), self.device.type == "cpu"
        computed = node.op == "call_function"
        if val is None or not ((computed and (on_cpu or _few(val))) or (on_cpu and node in self.operands)):
            return node
        return self.shared.get(("apart", node), self.b, lambda: self.b.call(apart(), node))


@dataclass
class _Body:
    """A function while it is being written: its own graph, its arguments, and what it reads besides."""

    writer: _Writer
    graph: Graph
    args: dict[str, Node]
    reads: list[Node]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def read(self, outer: Any) -> Any:
        """Something of the graph around as an argument; numbers stay numbers."""
        if not isinstance(outer, Node):
            return outer
        name = f"read{self.reads.index(outer) if outer in self.reads else len(self.reads)}"
        known = next((node for node in self.graph.nodes if node.target == name), None)
        if known is None:
            self.reads.append(outer)
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                known = self.graph.placeholder(name)
        return known

    def render(self, expr: Value, dtype: torch.dtype, j: Node) -> Node:
        find, nodes = self.writer.find, self.writer.nodes
        render = Renderer(
            self.call,
            indices={**self.args, "j": j},
            size=lambda sym: self.read(find(sym)),
            tensor=lambda source: self.read(nodes[source]),
            extents=find.extents(nodes),
            device=self.writer.device,
            scalar=lambda op, *args: self.call(op, *args) if any(isinstance(a, Node) for a in args) else op(*args),
        )
        out = render(expr, dtype)
        assert isinstance(out, Node)
        return out

    def keys(self) -> Any:
        """The number of keys without that of a sink."""
        return self.read(self.writer.find.poly(self.writer.proof.frame.keys))


def _memory(node: Node) -> Node:
    """The tensor whose memory this one is, or may be."""
    how, first = link(node)
    while how != "owner" and first is not None:
        node = first
        how, first = link(node)
    return node


def _few(val: torch.Tensor) -> bool:
    """A copy costs nothing beside the attention: slopes, tables, whether the data are tame."""
    return all(isinstance(size, int) for size in val.shape) and val.numel() <= 1 << 16


def _narrow(e: Expr) -> bool:
    """Everything computed from indices alone fits in the 32 bits that kernels give them; what is read has 64."""
    return all(_fits(p) for p in walk(e) if isinstance(p, Poly))


def _fits(p: Poly) -> bool:
    total = 0
    for mono, c in p.terms:
        if any(isinstance(inner, Load | Fn) for atom in mono for inner in walk(atom)):
            continue
        low, high = integer_bounds(Poly({mono: 1}))
        if low is None or high is None:
            if len(mono) > 1 or not all(isinstance(atom, Var | Sym) for atom in mono):
                return False
            low, high = 0, 2**24  # a length of which nothing is known, or a position in it
        total += abs(c) * max(abs(low), abs(high))
    return total < 2**31


def _keep(f: _Body, proof: MaskProof, tame: Node | None, sink: Node | None, alive: Node | None) -> Node:
    is_sink, inside = _beside(f) if sink is not None else (None, f.args["j"])
    seen = unless(f.call, None if tame is None else f.read(tame), f.render(proof.keep, torch.bool, inside))
    if alive is not None:
        seen = f.call(aten.logical_or.default, seen, f.call(aten.logical_not.default, _of_row(f, alive)))
    return seen if is_sink is None else f.call(aten.logical_or.default, is_sink, seen)


def _of_row(f: _Body, rows: Node) -> Node:
    """What a tensor over (batch, heads, queries, 1) holds for the row of this score."""
    val = tensor(rows)
    assert val is not None
    zero = f.call(aten.mul.Tensor, f.args["j"], 0)
    at = [zero if is_one(size) else f.args[name] for size, name in zip(val.shape[:3], "bhi", strict=True)]
    return f.call(aten.index.Tensor, f.read(rows), [*at, zero])


def _score(f: _Body, proved: Proved, sink: Node | None, alive: Node | None) -> Node:
    x, j, proof, cap = f.args["score"], f.args["j"], f.writer.proof, proved.site.softcap
    if isinstance(cap, Node):
        cap = f.read(_as_tensor(f.writer, cap))
    if cap is not None:
        x = f.call(aten.mul.Tensor, f.call(aten.tanh.default, f.call(aten.div.Tensor, x, cap)), cap)
    is_sink, inside = _beside(f) if sink is not None else (None, j)

    def render(e: Value, dtype: torch.dtype) -> Node:
        return f.render(e, dtype, inside)

    if proved.while_tame is not None:
        x = stepped(f.call, render, proved, x)
    else:
        for added in proof.biases:
            x = f.call(aten.add.Tensor, x, addend(f.call, render, added))
    if alive is not None:
        x = f.call(aten.where.ScalarOther, _of_row(f, alive), x, 0.0)
    return x if sink is None else f.call(aten.where.self, is_sink, _of_row(f, sink), x)


def _as_tensor(writer: _Writer, scalar: Node) -> Node:
    """A symbolic scalar in the dtype that scores have in a kernel: a function reads tensors.

    As a product, of which torch.compile makes one of tensors; for `scalar_tensor` it would compile each number anew.
    """

    def make() -> Node:
        one = writer.b.call(aten.scalar_tensor.default, 1.0, dtype=torch.float32, device=writer.device)
        return writer.b.call(aten.mul.Tensor, one, scalar)

    return writer.shared.get(("scalar", scalar, writer.device), writer.b, make)


def _beside(f: _Body) -> tuple[Node, Node]:
    """Whether this key is the sink, and a key that every tensor has."""
    keys = f.keys()
    last = keys - 1 if isinstance(keys, int) else f.call(aten.sub.Tensor, keys, 1)
    return f.call(aten.eq.Scalar, f.args["j"], keys), f.call(aten.clamp.default, f.args["j"], None, last)


# -- blocks ------------------------------------------------------------------------------------------------------------


def _blocks(
    b: Builder, writer: _Writer, shared: Shared, sink: Node | None, tame: Node | None, alive: Node | None
) -> BlockLists:
    proof, device = writer.proof, writer.device
    structure, frame = proof.structure, proof.frame
    opaque = Structure(residual=proof.keep)  # of which no block is left out, and none does without the function
    if sink is not None:
        structure = opaque  # the sink may be in the last block
        batch, heads, queries, keys = frame.lengths
        frame = replace(frame, lengths=(batch, heads, queries, keys + 1))

    def make() -> BlockLists:
        found = judged(structure, b, frame, proof.sizes, writer.nodes, device=device)
        part, full = found.some, None if _few_queries(frame) and device.type != "cpu" else found.full
        if tame is not None:
            every = judged(opaque, b, frame, proof.sizes, writer.nodes, device=device).some
            part = b.call(aten.where.self, tame, part, every)
            full = None if full is None else b.call(aten.logical_and.default, full, tame)
        if alive is not None:  # a row without a key sees all
            dead = b.call(aten.any.dims, b.call(aten.logical_not.default, alive), [1, 2], True)
            part = b.call(aten.logical_or.default, part, dead)
        if full is not None:
            part = b.call(aten.logical_and.default, part, b.call(aten.logical_not.default, full))
        elif device.type == "cpu":  # inductor's template for one query counts them, there or not (torch 2.13)
            full = b.call(aten.zeros_like.default, part)
        return BlockLists(
            size=BLOCK,
            part_rows=_listed(b, part),
            part_columns=_listed(b, _turned(b, part)),
            full_rows=None if full is None else _listed(b, full),
            full_columns=None if full is None else _listed(b, _turned(b, full)),
        )

    key = ("blocks", structure, frame.lengths, tuple(writer.nodes.values()), device, tame, alive)
    return shared.all(key, b, make, _nodes)


def _few_queries(frame: Frame) -> bool:
    """So few that a kernel waits for keys and values whatever it does with the scores: then the function may as well
    look at full blocks, and lists of these need not be made.
    """
    queries = frame.queries.value
    return queries is not None and queries <= _FEW_QUERIES


def _listed(b: Builder, blocks: Node) -> tuple[Node, Node]:
    marks = value(blocks)
    many, which = listed(b.call, blocks, marks.shape, marks.device)
    if marks.device.type != "cpu" and all(is_one(size) for size in marks.shape[:3]):
        return many, which  # a single row: no stride but that from one number to the next is ever taken
    return b.call(apart(), many), b.call(apart(), which)


def _turned(b: Builder, blocks: Node) -> Node:
    return b.call(aten.transpose.int, blocks, -2, -1)


def _nodes(lists: BlockLists) -> Iterator[Node]:
    for pair in (lists.part_rows, lists.part_columns, lists.full_rows, lists.full_columns):
        yield from pair or ()
