"""What the masks and biases of one attention site are: the answer that the rest of the pass works with.

    Masks(graph).analyse(terms, frame) -> MaskProof

Every term is lifted to an expression of (b, h, i, j), dominating fills are told from biases, the conjunction of all
keep-masks is taken apart into closed forms, rows without a key are ruled out where they can be, and the result is
compared with the graph's own operations at the traced sizes. What is claimed is proved; what is not stays in
`residual` (which keys are seen) and `biases` (what is added), exactly.

    data          a buffer or an input is an opaque load, whatever it holds in the trace; one whose content the caller
                  vouches for (`constants`) is read, and `contents` names it
    disagreement  the claim is withdrawn: everything is dense again, and `check` says so
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from attnpass.errors import first_line
from attnpass.masks import lift_choice, lift_create, lift_gather, lift_pointwise, lift_views, lift_vmap
from attnpass.masks.bias import describe, split
from attnpass.masks.compare import Comparison
from attnpass.masks.empty import empty_rows
from attnpass.masks.expr import TRUE, Bool, Value, loads
from attnpass.masks.frame import Frame, broadcast, of_site, placed_index
from attnpass.masks.frame import frame as make_frame
from attnpass.masks.lift import Content, Lifter, Unliftable, as_tree, tensor_of
from attnpass.masks.logic import any_leaf, both, ge, is_bool, negate
from attnpass.masks.numeric import nonzero
from attnpass.masks.proof import AddedTerm, MaskProof
from attnpass.masks.structure import take_apart
from attnpass.masks.terms import Term
from attnpass.site import Fill, Site
from attnpass.spec import ASSUMED, CERTAIN

RULES = (
    lift_choice,
    lift_create,
    lift_gather,
    lift_pointwise,
    lift_views,
    lift_vmap,
)  # imported so that their rules are registered


class Masks:
    """The masks of one graph. Sites that share a mask share the proof."""

    def __init__(
        self, graph: Graph, *, constants: Mapping[str, torch.Tensor] | None = None, check: bool = True
    ) -> None:
        self.lifter = Lifter(graph, constants=constants)
        self.sizes = self.lifter.sizes
        self._check = check
        self._memo: dict[Any, MaskProof] = {}
        self._timed: set[Node] = set()  # nodes whose value hangs on something that is written in place
        for node in graph.nodes:
            if self.lifter.writes.to(node) or any(arg in self._timed for arg in node.all_input_nodes):
                self._timed.add(node)

    def frame(self, batch: Any, heads: Any, queries: Any, keys: Any) -> Frame:
        """The axes of scores of this shape."""
        return make_frame(self.sizes, batch, heads, queries, keys)

    def term(
        self, node: Node, frame: Frame, *, off: bool | None = None, fill: float = -math.inf, factor: float = 1.0
    ) -> Term:
        """A tensor that broadcasts against the scores."""
        index = broadcast(frame, self.lifter.shape(tensor_of(node)))
        return Term(node=node, index=index, off=off, fill=fill, factor=factor)

    def of_site(self, site: Site) -> MaskProof:
        """All layers of a site whose factor is a number; the others are not looked at."""
        frame, atoms = of_site(self.sizes, site.roles, site.sizes)
        terms = []
        for layer in site.layers:
            if isinstance(layer, Fill):
                index = placed_index(layer.mask, self.sizes, site.sizes, atoms)
                terms.append(Term(node=layer.mask.node, index=index, off=layer.off, fill=layer.value))
            elif layer.factor.is_number:
                index = placed_index(layer.tensor, self.sizes, site.sizes, atoms)
                terms.append(Term(node=layer.tensor.node, index=index, factor=layer.factor.number))
        keep = ge(frame.i - frame.j) if site.causal else TRUE
        return self.analyse(terms, frame, reader=site.anchor, keep=keep, sink=site.sink is not None)

    def analyse(
        self,
        terms: Sequence[Term],
        frame: Frame,
        *,
        reader: Node | None = None,
        keep: Bool = TRUE,
        sink: bool = False,
    ) -> MaskProof:
        """The meaning of these terms together, as `reader` sees them (by default, as they are when all is done).

        `keep` is what is known to be masked besides: an argument of the call itself. `sink`: a sink stands beside the
        keys, and sees what is added to all of them.
        """
        key = (tuple((t.node, t.index, t.off, t.fill, t.factor) for t in terms), frame.lengths, keep, sink, reader)
        if key not in self._memo:
            # sites read one mask at different times; only where something is written does the time matter
            written = any(t.node in self._timed for t in terms)
            plain = (*key[:-1], None)
            if written:
                self._memo[key] = self._analyse(tuple(terms), frame, reader, keep, sink)
            else:
                if plain not in self._memo:
                    self._memo[plain] = self._analyse(tuple(terms), frame, None, keep, sink)
                self._memo[key] = self._memo[plain]
        return self._memo[key]

    def _analyse(self, terms: tuple[Term, ...], frame: Frame, reader: Node | None, keep: Bool, sink: bool) -> MaskProof:
        position = self.lifter.writes.position
        when = len(position) if reader is None else position[reader]
        self.lifter.reset()
        failures: dict[str, Exception] = {}
        lifted = [self._lift(term, when, failures) for term in terms]
        proof = self._prove(terms, lifted, frame, keep, sink)
        if failures:
            return replace(proof.checked(f"disagreed: {'; '.join(failures)}"), errors=tuple(failures.values()))
        if not self._check:
            return proof
        check = Comparison(self.lifter, frame, when).check(proof.structure, terms, lifted, keep)
        if check.startswith("disagreed"):
            opaque = [self.lifter.load(t.node, t.index, "withdrawn") for t in terms]
            proof = self._prove(terms, opaque, frame, keep, sink)
        return proof.checked(check)

    def _lift(self, term: Term, when: int, failures: dict[str, Exception]) -> Value:
        """The term as an expression. Its reader may see the tensor itself, even if that is written later."""
        try:
            return self.lifter.read(term.node, term.index, when)
        except Unliftable as why:
            reason = str(why)
        except Exception as why:  # a mistake in a rule costs this mask its proof, and is reported
            reason = f"lifting {term.node.name} failed: {first_line(why)}"
            failures[reason] = why
        self.lifter.reset()
        return self.lifter.load(term.node, term.index, reason)

    def _prove(
        self, terms: tuple[Term, ...], lifted: Sequence[Value], frame: Frame, keep: Bool, sink: bool
    ) -> MaskProof:
        fills: set[float] = set()
        added: list[AddedTerm] = []
        steps: list[str] = []
        for term, value in zip(terms, lifted, strict=True):
            steps.append(f"{term.node.name} is {value!r}")
            if term.off is not None:
                on = truth(value)
                keep = both(keep, negate(on) if term.off else on)
                fills.add(term.fill)
                continue
            parts = split(as_tree(value), tensor_of(term.node).dtype, term.factor)
            keep = both(keep, parts.keep)
            fills.update(parts.fills)
            bias = describe(parts.bias, frame)
            if sink and bias.kind == "row":
                bias = replace(bias, kind="dense")  # the same for all keys, but the sink is beside them
            steps.append(f"{term.node.name} adds, besides masking: {bias.kind}")
            added.append(
                AddedTerm(term=term, bias=bias, values=parts.values, exact=parts.exact, masking=parts.keep != TRUE)
            )
        structure = take_apart(keep, frame)
        steps += structure.words()
        empty, why = empty_rows(keep, structure, frame, self.sizes)
        steps.append(f"a query without any key: {empty} ({why})")
        kept = tuple(a for a in added if not a.droppable)
        read = {load for e in (keep, *(a.bias.value for a in kept)) for load in loads(e)}
        fills = set() if keep == TRUE else fills
        relied = self.lifter.assumed[-1]
        contents = frozenset(str(r) for r in relied if isinstance(r, Content))
        assumed = sorted(r for r in relied if not isinstance(r, Content))
        assumed += [
            f"scores stay far above the mask's fill of {fill:g} wherever a query has a key"
            for fill in sorted(fills)
            if CERTAIN < fill <= ASSUMED
        ]
        return MaskProof(
            spec=structure.spec(frame),
            structure=structure,
            keep=keep,
            added=tuple(added),
            fills=tuple(sorted(fills)),
            empty_rows=empty,
            steps=tuple(steps),
            assumptions=tuple(assumed),
            contents=contents,
            loads=tuple((self.lifter.nodes[load.source], load) for load in sorted(read, key=lambda x: x.key)),
            check="not run: not asked for",
            frame=frame,
            sizes=self.sizes,
        )


def truth(value: Value) -> Bool:
    """Where a mask of any dtype is not zero."""
    return value if is_bool(value) else any_leaf(as_tree(value), nonzero)  # type: ignore[return-value]
