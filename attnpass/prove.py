"""The stage between finding a site and choosing its kernel: what its masks and biases amount to.

    layers of a site ── attnpass.masks ── MaskProof ──┬── nothing masked: the layers are dropped
                                                      ├── one keep-mask of known structure: `expressed`
                                                      └── else: the layers stay the tensors they are

Recognition reads masks as tensors and has to expect the worst of them. Here the graph's own arithmetic is read, and
what it proves goes into the spec: the structure of the mask, and whether a query may be left without any key. Nothing
is claimed of a site some of whose layers the proof could not look at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph

from attnpass.errors import first_line
from attnpass.masks import AddedTerm, MaskProof, Masks
from attnpass.masks.bias import ordinary
from attnpass.masks.expr import TRUE
from attnpass.reasons import Reason, reason
from attnpass.recognize.meaning import NO_GRADIENT
from attnpass.site import Add, Fill, Layer, Site
from attnpass.spec import EmptyRow, is_causal

_LONGEST = 160  # of a line of a proof in the ledger


@dataclass(frozen=True, kw_only=True)
class Proved:
    """A site whose spec says what was proved of its masks."""

    site: Site
    proof: MaskProof | None = None  # of all its layers; None where one of them could not be looked at
    expressed: bool = False  # the keep-mask of the proof, with the biases of the proof, is all that the layers do
    steps: tuple[str, ...] = ()  # for the ledger
    bug: str | None = None  # what was lifted is not what the graph computes: a mistake of ours, to be reported
    held: frozenset[str] = frozenset()  # nodes of held tensors whose content the proof relies on

    @property
    def structured(self) -> bool:
        """The mask is a few closed forms: computing it anew costs less than reading it."""
        return self.expressed and self.proof is not None and self.proof.residual == TRUE

    @property
    def unmasked(self) -> bool:
        """Proved: nothing is masked and nothing is added."""
        return self.expressed and self.site.spec.mask.empty and not self.site.spec.bias

    @property
    def causal(self) -> bool:
        """Proved: query i sees the keys up to i, and nothing is added."""
        return self.expressed and is_causal(self.site.spec)


def prove(
    graph: Graph, sites: Sequence[Site], constants: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]
) -> list[Proved]:
    """All sites of a graph, before anything is inserted into it."""
    if not sites:
        return []
    masks = Masks(graph, constants={**constants, **held})
    return [_prove(site, masks, frozenset(held)) for site in sites]


def _prove(site: Site, masks: Masks, held: frozenset[str]) -> Proved:
    if site.existing_call and not site.layers:
        return Proved(site=site, expressed=True)  # what it masks, it says itself
    try:
        proof = masks.of_site(site)
    except Exception as error:  # no proof is lost but this one; the layers are dense tensors, as found
        return Proved(site=site, bug=f"the masks could not be looked at: {first_line(error)}")
    steps = tuple(_short(step) for step in proof.steps)
    if proof.agreed is False:
        refused = dataclasses.replace(site, obstacles=(*site.obstacles, reason("mask_disagrees", detail=proof.check)))
        return Proved(site=refused, steps=steps, bug=proof.check)
    terms = _terms(site.layers, proof)
    layers = tuple(x for x, term in zip(site.layers, terms, strict=True) if not _idle(x, term, proof))
    rows = _rows(site, layers, proof)
    sure = rows is EmptyRow.IMPOSSIBLE
    spec = dataclasses.replace(
        site.spec,
        mask=proof.spec,
        bias=tuple(
            b
            for b, (_, term) in zip(site.spec.bias, _added(site.layers, terms), strict=True)
            if term is None or not term.bias.droppable
        ),
        # whatever fills such a row, beside a sink it weighs nothing
        empty_rows=site.spec.empty_rows if rows is None else rows if sure or site.sink is None else EmptyRow.ZERO,
    )
    assumed = tuple(a for a in site.assumptions if not (sure and a == NO_GRADIENT))
    site = dataclasses.replace(
        site,
        spec=spec,
        layers=layers,
        in_order=site.in_order and not sure,
        assumptions=tuple(dict.fromkeys((*assumed, *proof.assumptions))),
        obstacles=tuple(o for o in site.obstacles if not _overcome(o, sure=sure, masked=bool(proof.fills))),
    )
    relied = proof.contents & held
    return Proved(site=site, proof=proof, expressed=rows is not None, steps=steps, held=relied)


WAIVED = "what a query without any key gets does not matter (empty_rows='dont_care')"


def waive(proved: Proved) -> Proved:
    """The user does not care what a query without any key gets: nothing is done about it, and nothing refused."""
    site = proved.site
    if site.spec.empty_rows is EmptyRow.IMPOSSIBLE:
        return proved
    site = dataclasses.replace(
        site,
        waived=True,
        in_order=False,
        assumptions=tuple(a for a in site.assumptions if a != NO_GRADIENT),
        obstacles=tuple(o for o in site.obstacles if not _about_rows(o)),
    )
    return dataclasses.replace(proved, site=site)


def _terms(layers: tuple[Layer, ...], proof: MaskProof) -> list[AddedTerm | None]:
    """What the proof says of each layer that is added; nothing where the factor is no number, and of fills."""
    added = iter(proof.added)
    return [next(added) if isinstance(layer, Add) and layer.factor.is_number else None for layer in layers]


def _added(layers: tuple[Layer, ...], terms: list[AddedTerm | None]) -> list[tuple[Add, AddedTerm | None]]:
    return [(layer, term) for layer, term in zip(layers, terms, strict=True) if isinstance(layer, Add)]


def _idle(layer: Layer, term: AddedTerm | None, proof: MaskProof) -> bool:
    """The layer does nothing: it adds what softmax cannot see, or it is a fill that never applies."""
    if isinstance(layer, Fill):
        return proof.nothing_masked
    return term is not None and term.bias.droppable and not term.masking


def _rows(site: Site, layers: tuple[Layer, ...], proof: MaskProof) -> EmptyRow | None:
    """What a query without any key gets if the layers are taken for one keep-mask; None where they cannot be.

    That all of them together leave every query a key is proved of the keep-mask; a bias may still be minus infinity for
    a whole row, so it must be proved to be ordinary, and none may be left that the proof did not look at.
    """
    if any(isinstance(layer, Add) and not layer.factor.is_number for layer in layers):
        return None
    if not all(ordinary(a.bias.value) for a in proof.biases):
        return None
    if proof.empty_rows == "impossible":
        return EmptyRow.IMPOSSIBLE
    if proof.biases or site.in_order or site.floored or len(proof.fills) != 1:
        return None  # then it depends on the order in which they are applied
    if all(isinstance(layer, Fill) for layer in layers):
        return site.spec.empty_rows
    # One added tensor of zeros and a fill, which swallows the scores: alone in a row it makes all keys equal. Two of
    # them would add up where both apply.
    plain = site.spec.empty_rows in (EmptyRow.NAN, EmptyRow.MEAN) and not any(map(_about_rows, site.obstacles))
    term = next((a for a in proof.added if a.masking), None)
    if len(layers) > 1 or not plain or term is None or not term.exact or len(term.values or ()) != 2:
        return None
    return EmptyRow.NAN if proof.fills[0] == -math.inf else EmptyRow.MEAN


def _about_rows(obstacle: Reason) -> bool:
    return obstacle.code == "empty_rows"


def _overcome(obstacle: Reason, *, sure: bool, masked: bool) -> bool:
    """The proof has removed what stood in the way."""
    return (sure and _about_rows(obstacle)) or (not masked and obstacle.code == "weak_fill")


def _short(step: str) -> str:
    return step if len(step) <= _LONGEST else step[: _LONGEST - 3] + "..."
