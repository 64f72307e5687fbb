"""The stage between finding a site and choosing its kernel: what its masks and biases amount to.

    layers of a site ── attnpass.masks ── MaskProof ──┬── nothing masked: the layers are dropped
                                                      ├── one keep-mask and ordinary biases: `expressed`
                                                      ├── the same while data are ordinary numbers: `while_tame`
                                                      └── else: the layers stay the tensors they are

Recognition reads masks as tensors and has to expect the worst of them. Here the graph's own arithmetic is read, and
what it proves goes into the spec: the structure of the mask, and whether a query may be left without any key. Nothing
is claimed of a site some of whose layers the proof could not look at.

A bias that is data (T5's table, slopes in a buffer) may hold minus infinity itself, and then what a query gets hangs on
all that is added and filled, in its order. So nothing is said of such a site in its spec. For kernels that take
functions there is `while_tame`: what holds while the data are ordinary numbers, which is asked when the graph runs, and
the steps to take when they are not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from attnpass.graph import size_text, tensor
from attnpass.masks import AddedTerm, MaskProof, Masks
from attnpass.masks.bias import TAME, ordinary
from attnpass.masks.expr import TRUE, Load
from attnpass.masks.lift import Unliftable
from attnpass.masks.logic import TooLarge
from attnpass.masks.settled import Settled
from attnpass.masks.thin import thinnest
from attnpass.reasons import Reason, reason
from attnpass.recognize.existing import DEFINED, LAYOUT
from attnpass.recognize.gradients import asked
from attnpass.recognize.meaning import NO_GRADIENT
from attnpass.site import Add, Fill, Layer, Placed, Site
from attnpass.spec import CERTAIN, BiasSpec, EmptyRow, is_causal

_LONGEST = 160  # of a line of a proof in the ledger

Step = AddedTerm | float  # what is added to the scores, or what replaces those that are masked


@dataclass(frozen=True, kw_only=True)
class WhileTame:
    """One keep-mask with ordinary biases, as long as the data that these read are numbers below TAME."""

    sources: tuple[str, ...]  # the data: where every number of these tensors is tame, all biases are ordinary
    rows: EmptyRow  # what a query without any key gets then
    steps: tuple[Step, ...]  # in any case: all that the layers do, innermost first; what masks, masks as the proof says


@dataclass(frozen=True, kw_only=True)
class Proved:
    """A site whose spec says what was proved of its masks."""

    site: Site
    proof: MaskProof | None = None  # of all its layers; None where one of them could not be looked at
    expressed: bool = False  # the keep-mask of the proof, with the biases of the proof, is all that the layers do
    while_tame: WhileTame | None = None  # where that is not proved: it is so as long as data are tame
    steps: tuple[str, ...] = ()  # for the ledger
    bug: str | None = None  # what was lifted is not what the graph computes: a mistake of ours, to be reported
    errors: tuple[Exception, ...] = ()  # other mistakes of ours, which cost a proof
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
    settled = Settled(masks.lifter)
    return [_prove(site, masks, settled, frozenset(held)) for site in sites]


def _prove(site: Site, masks: Masks, settled: Settled, held: frozenset[str]) -> Proved:
    if site.existing_call and not site.layers:
        return Proved(site=site, expressed=True)  # what it masks, it says itself
    try:
        proof = masks.of_site(site)
    except (TooLarge, Unliftable) as why:
        return Proved(site=site, steps=(f"nothing was proved: {why}",))
    except Exception as error:  # no proof is lost but this one; the layers are dense tensors, as found
        return Proved(site=site, errors=(error,))
    steps = tuple(_short(step) for step in proof.steps)
    if proof.agreed is False:
        refused = dataclasses.replace(site, obstacles=(*site.obstacles, reason("mask_disagrees", detail=proof.check)))
        return Proved(site=refused, steps=steps, bug=proof.check, errors=proof.errors)
    terms = _terms(site.layers, proof)
    site = _thinned(site, terms, masks)
    active = [pair for pair in zip(site.layers, terms, strict=True) if not _idle(*pair, proof)]
    rows = _rows(site, active, proof, settled)
    while_tame = None if rows is not None else _while_tame(site, active, proof, settled)
    if while_tame is not None:
        steps += (
            _short(f"biases are ordinary numbers while these are below {TAME:g}: {', '.join(while_tame.sources)}"),
        )
    sure = rows is EmptyRow.IMPOSSIBLE
    spec = dataclasses.replace(
        site.spec,
        mask=proof.spec,
        bias=tuple(
            b
            for b, (_, term) in zip(site.spec.bias, _added(site.layers, terms), strict=True)
            if term is None or not term.droppable
        ),
        empty_rows=site.spec.empty_rows if rows is None else _beside_sink(site, rows),
    )
    assumed = tuple(a for a in site.assumptions if not (sure and a in _OF_ROWS))
    site = dataclasses.replace(
        site,
        spec=spec,
        layers=tuple(layer for layer, _ in active),
        in_order=site.in_order and not sure,
        assumptions=tuple(dict.fromkeys((*assumed, *proof.assumptions))),
        obstacles=tuple(o for o in site.obstacles if not _overcome(o, sure=sure, masked=bool(proof.fills))),
    )
    relied = proof.contents & held
    return Proved(site=site, proof=proof, expressed=rows is not None, while_tame=while_tame, steps=steps, held=relied)


_OF_ROWS = (NO_GRADIENT, LAYOUT, DEFINED)  # assumptions about queries without any key
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
        assumptions=tuple(a for a in site.assumptions if a not in _OF_ROWS),
        obstacles=tuple(o for o in site.obstacles if not _about_rows(o)),
    )
    return dataclasses.replace(proved, site=site)


def _terms(layers: tuple[Layer, ...], proof: MaskProof) -> list[AddedTerm | None]:
    """What the proof says of each layer that is added; nothing where the factor is no number, and of fills."""
    added = iter(proof.added)
    return [next(added) if isinstance(layer, Add) and layer.factor.is_number else None for layer in layers]


def _added(layers: tuple[Layer, ...], terms: list[AddedTerm | None]) -> list[tuple[Add, AddedTerm | None]]:
    return [(layer, term) for layer, term in zip(layers, terms, strict=True) if isinstance(layer, Add)]


def _thinned(site: Site, terms: list[AddedTerm | None], masks: Masks) -> Site:
    """Biases that turn out to be masked nowhere, from before they were masked: the same numbers in a smaller tensor.

    They need not have the same gradients (one of the two may be detached): where any is asked, nothing is done.
    """
    layers = tuple(_thin(layer, term, site, masks) for layer, term in zip(site.layers, terms, strict=True))
    adds = (layer for layer in layers if isinstance(layer, Add))
    bias = tuple(_resized(spec, add.tensor, site) for spec, add in zip(site.spec.bias, adds, strict=True))
    return dataclasses.replace(site, layers=layers, spec=dataclasses.replace(site.spec, bias=bias))


def _thin(layer: Layer, term: AddedTerm | None, site: Site, masks: Masks) -> Layer:
    if not isinstance(layer, Add) or term is None or term.masking or term.droppable:
        return layer
    if asked(layer.tensor.node, site.state):
        return layer
    placed = thinnest(masks, site, layer.tensor)
    return layer if asked(placed.node, site.state) else dataclasses.replace(layer, tensor=placed)


def _resized(spec: BiasSpec, placed: Placed, site: Site) -> BiasSpec:
    own = {atom for dim in placed.layout for atom in dim}
    parts = (site.roles.batch, site.roles.heads, site.roles.queries, site.roles.keys)
    sizes = [math.prod(site.sizes[atom] for atom in part if atom in own) for part in parts]
    return dataclasses.replace(spec, shape=tuple(map(size_text, sizes)))


def _idle(layer: Layer, term: AddedTerm | None, proof: MaskProof) -> bool:
    """The layer does nothing: it adds what softmax cannot see, or it is a fill that never applies."""
    if isinstance(layer, Fill):
        return proof.nothing_masked
    return term is not None and term.droppable and not term.masking


def _beside_sink(site: Site, rows: EmptyRow) -> EmptyRow:
    """A sink leaves no weight to a finite fill, alone in its row."""
    if site.sink is None or rows is EmptyRow.IMPOSSIBLE:
        return rows
    return site.hollow if rows is EmptyRow.NAN else EmptyRow.ZERO


_Active = Sequence[tuple[Layer, AddedTerm | None]]  # what does something, and what the proof says of it if it is added


def _rows(site: Site, active: _Active, proof: MaskProof, tame: Callable[[Load], bool]) -> EmptyRow | None:
    """What a query without any key gets if the layers are taken for one keep-mask; None where they cannot be.

    That all of them together leave every query a key is proved of the keep-mask; a bias may still be minus infinity for
    a whole row, so it must be proved to be ordinary, and none may be left that the proof did not look at.
    """
    if not all(_looked_at(layer) for layer, _ in active):
        return None
    if not all(_ordinary(added, tame) for added in proof.biases):
        return None
    return _empty(site, active, proof)


def _looked_at(layer: Layer) -> bool:
    return isinstance(layer, Fill) or layer.factor.is_number


def _ordinary(added: AddedTerm, tame: Callable[[Load], bool]) -> bool:
    return abs(added.term.factor) < TAME and ordinary(added.bias.value, tame)


def _empty(site: Site, active: _Active, proof: MaskProof) -> EmptyRow | None:
    """What a query without any key gets, all biases being ordinary numbers."""
    if proof.empty_rows == "impossible":
        return EmptyRow.IMPOSSIBLE
    if site.floor is not None or len(proof.fills) != 1:
        return None  # then it depends on the order in which they are applied
    if proof.biases:
        return _empty_beside_biases(site, active, proof)
    if site.in_order:
        return None
    if all(isinstance(layer, Fill) for layer, _ in active):
        return site.spec.empty_rows
    # One added tensor of zeros and a fill, which swallows the scores: alone in a row it makes all keys equal. Two of
    # them would add up where both apply.
    plain = site.spec.empty_rows in (EmptyRow.NAN, EmptyRow.MEAN) and not any(map(_about_rows, site.obstacles))
    term = next((a for a in proof.added if a.masking), None)
    if len(active) > 1 or not plain or term is None or not term.exact or len(term.values or ()) != 2:
        return None
    return EmptyRow.NAN if proof.fills[0] == -math.inf else EmptyRow.MEAN


def _empty_beside_biases(site: Site, active: _Active, proof: MaskProof) -> EmptyRow | None:
    """The same where there are biases: the mask must be applied once, and none of them may be seen beside its fill."""
    steps, (fill,) = _steps(active, proof), proof.fills
    if steps is None or site.existing_call or any(map(_about_rows, site.obstacles)):
        return None
    # a fill that comes last leaves nothing of them, and one that is low enough swallows them as it does the scores
    if fill > CERTAIN and isinstance(steps[-1], AddedTerm):
        return None
    return site.hollow if fill == -math.inf else EmptyRow.MEAN


def _while_tame(site: Site, active: _Active, proof: MaskProof, settled: Settled) -> WhileTame | None:
    """What is known of a site whose biases are ordinary if the data are.

    For a forward pass alone: beside data that are not tame a fused backward loses the log-sum-exp (layers.py). And not
    in float16, whose lowest number does not swallow a score that a kernel adds in float32, nor in float64, of which
    float32 makes infinities.
    """
    if site.spec.grad or site.existing_call or site.floor is not None:
        return None
    if not all(_as_float32(layer) for layer, _ in active):
        return None
    sources: dict[str, None] = {}

    def noted(load: Load) -> bool:
        if not settled(load):
            sources[load.source] = None
        return True

    rows = _rows(site, active, proof, noted)
    steps = _steps(active, proof)
    if rows is None or steps is None or not all(_beside(site, proof.nodes[source]) for source in sources):
        return None
    return WhileTame(sources=tuple(sources), rows=rows, steps=steps)


def _beside(site: Site, node: Node) -> bool:
    """A single number may lie on the CPU although all else is on a GPU."""
    val = tensor(node)
    return val is not None and val.device == site.device


def _as_float32(layer: Layer) -> bool:
    """The original adds or fills in a dtype with the range of float32."""
    val = tensor(layer.placed.node)
    dtype = layer.dtype if isinstance(layer, Fill) else None if val is None else val.dtype
    return dtype not in (torch.float16, torch.float64)


def _steps(active: _Active, proof: MaskProof) -> tuple[Step, ...] | None:
    """All that the layers do, innermost first, the mask being the whole of the proof; None where it comes in parts."""
    steps: list[Step] = []
    for layer, term in reversed(active):
        if isinstance(layer, Add):
            if term is None or not term.exact:
                return None
            steps.append(term)
        elif not steps or isinstance(steps[-1], AddedTerm):  # two fills in a row with one number are one
            steps.append(layer.value)
    masks = sum(not isinstance(step, AddedTerm) or step.masking for step in steps)
    return tuple(steps) if masks <= 1 and len(proof.fills) <= 1 else None


def _about_rows(obstacle: Reason) -> bool:
    return obstacle.code == "empty_rows"


def _overcome(obstacle: Reason, *, sure: bool, masked: bool) -> bool:
    """The proof has removed what stood in the way."""
    return (sure and _about_rows(obstacle)) or (not masked and obstacle.code == "weak_fill")


def _short(step: str) -> str:
    return step if len(step) <= _LONGEST else step[: _LONGEST - 3] + "..."
