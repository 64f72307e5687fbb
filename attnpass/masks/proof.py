"""The result of an analysis: what is proved of the masks and biases of one site, and what stays as it was."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch.fx import Node

from attnpass.masks.bias import Bias
from attnpass.masks.empty import EmptyRows
from attnpass.masks.expr import FALSE, TRUE, Bool, Load
from attnpass.masks.frame import Frame
from attnpass.masks.sizes import Sizes
from attnpass.masks.structure import Structure
from attnpass.masks.terms import Term
from attnpass.spec import MaskSpec


@dataclass(frozen=True, kw_only=True)
class AddedTerm:
    """What one term adds besides masking."""

    term: Term
    bias: Bias
    values: tuple[float, ...] | None  # all values of the whole tensor, where they are a finite set: {fill, 0}
    exact: bool  # where it masks, it is the fill itself and nothing more
    masking: bool  # it takes keys away somewhere

    @property
    def droppable(self) -> bool:
        """Besides masking it does nothing that softmax can see."""
        return self.bias.droppable(self.term.factor)


@dataclass(frozen=True, kw_only=True)
class MaskProof:
    """The proved meaning of all masks and biases of one site."""

    spec: MaskSpec  # what was proved, in the words of a spec
    structure: Structure  # the same as expressions: offsets, ids, key padding, what stays dense
    keep: Bool  # the whole mask: the conjunction of everything in `structure`
    added: tuple[AddedTerm, ...]  # one for each term that is added
    fills: tuple[float, ...]  # the values that stand for "not seen", least first; none where nothing is masked
    empty_rows: EmptyRows
    steps: tuple[str, ...]  # the proof, for people
    assumptions: tuple[str, ...]
    contents: frozenset[str]  # nodes of constant tensors that were read for what they hold
    loads: tuple[tuple[Node, Load], ...]  # the opaque tensors that the mask and what is added still read, and where
    check: str  # "agreed ...", "disagreed ...", "not run: ..."
    errors: tuple[Exception, ...] = ()  # mistakes in rules
    frame: Frame
    sizes: Sizes = field(repr=False)

    @property
    def nodes(self) -> dict[str, Node]:
        """The tensors that its loads read, by the name of the source."""
        return {load.source: node for node, load in self.loads}

    @property
    def residual(self) -> Bool:
        """What remains dense of the mask."""
        return self.structure.residual

    @property
    def biases(self) -> tuple[AddedTerm, ...]:
        """What is added besides masking, without what softmax cannot see."""
        return tuple(a for a in self.added if not a.droppable)

    @property
    def nothing_masked(self) -> bool:
        return self.keep == TRUE

    @property
    def everything_masked(self) -> bool:
        return self.keep == FALSE

    @property
    def agreed(self) -> bool | None:
        """What the check said; None where it could not be run."""
        return None if self.check.startswith("not run") else self.check.startswith("agreed")

    def checked(self, check: str) -> MaskProof:
        """The same, with what the check said."""
        return replace(self, check=check, steps=(*self.steps, f"check: {check}"))
