"""Comparing what was proved with what the graph computes, element by element at the traced sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from attnpass.masks.bias import split
from attnpass.masks.check import MAX_ELEMENTS, NotRun, Replay, differing
from attnpass.masks.evaluate import Evaluator, dense_indices
from attnpass.masks.expr import Bool, Value, loads, variables
from attnpass.masks.frame import NAMES, Frame
from attnpass.masks.lift import Lifter, as_tree
from attnpass.masks.sizes import Sizes
from attnpass.masks.structure import Structure, whole
from attnpass.masks.terms import Term
from attnpass.spec import ASSUMED


def extents(names: Collection[str], frame: Frame, sizes: Sizes) -> dict[str, int]:
    """The traced length of each axis; one for those that are not named."""
    out: dict[str, int] = {}
    total = 1
    for name, n in zip(NAMES, frame.lengths, strict=True):
        number = sizes.at_hint(n)
        if number is None:
            raise NotRun("a size without a traced value")
        out[name] = number if name in names else 1
        total *= out[name]
    if total > MAX_ELEMENTS:
        raise NotRun(f"{total} elements")
    return out


def evaluator(
    names: Collection[str], frame: Frame, sizes: Sizes, tensors: Mapping[str, Tensor] | None = None
) -> Evaluator:
    """Values over the named axes at the traced sizes; the other axes are looked at in their first position."""
    return Evaluator(dense_indices(extents(names, frame, sizes)), sizes.hints, tensors)


class Comparison:
    """One site's terms: as the graph computes them, and as they were lifted."""

    def __init__(self, lifter: Lifter, frame: Frame, when: int) -> None:
        self.lifter = lifter
        self.frame = frame
        self.when = when

    def check(self, structure: Structure, terms: Sequence[Term], lifted: Sequence[Value], keep: Bool) -> str:
        """agreed ..., disagreed ..., or not run: ..."""
        sources = {load.source for value in lifted for load in loads(value)}
        todo = [t for t, value in zip(terms, lifted, strict=True) if t.node.name not in sources]
        if not todo:
            return "not run: nothing was lifted" if terms else "agreed (no mask)"
        replay = Replay(self.lifter.writes, self.lifter.sizes, sources, self.lifter.constants)
        nodes = self.lifter.nodes
        try:
            replay.run({t.node for t in terms} | {nodes[name] for name in sources}, self.when)
        except NotRun as why:
            return f"not run: {why}"
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as why:
            # the operations themselves reject random data or the CPU; that says nothing about the proof
            return f"not run: {type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''}"
        try:
            return self._compared(replay, structure, terms, lifted, keep)
        except NotRun as why:
            return f"not run: {why}"

    def _compared(
        self,
        replay: Replay,
        structure: Structure,
        terms: Sequence[Term],
        lifted: Sequence[Value],
        keep: Bool,
    ) -> str:
        sources = {load.source for value in lifted for load in loads(value)}
        tensors = {name: replay.values[self.lifter.nodes[name]] for name in sources}
        proved = whole(structure, self.frame)
        names = variables(proved) | variables(keep) | {v for t in terms for p in t.index for v in variables(p)}
        evaluate = evaluator(names, self.frame, self.lifter.sizes, tensors)
        seen = evaluate(keep)
        elements = 0
        for term, value in zip(terms, lifted, strict=True):
            actual = replay.values[term.node][tuple(evaluate(p) for p in term.index)]
            elements += actual.numel()
            wrong = differing(actual, evaluate(value))
            if wrong:
                return f"disagreed: {term.node.name} was lifted wrongly in {wrong} of {actual.numel()} elements"
            if term.off is not None:
                seen = seen & (actual.bool() != term.off)
            else:
                parts = split(as_tree(value), actual.dtype, term.factor)
                kept = evaluate(parts.keep)
                floating = actual.dtype.is_floating_point  # integers may be added, too
                lowest = max(ASSUMED, torch.finfo(actual.dtype).min) if floating else ASSUMED
                wrong = int((~kept & ~(actual.double() * term.factor <= lowest)).sum())
                wrong += differing(torch.where(kept, actual.double(), 0), torch.where(kept, evaluate(parts.bias), 0))
                if wrong:
                    return f"disagreed: mask and bias were told apart wrongly in {wrong} elements"
                seen = seen & kept
        wrong = differing(seen, evaluate(proved))
        if wrong:
            return f"disagreed: the closed form differs from the mask in {wrong} elements"
        return f"agreed ({elements} elements)"
