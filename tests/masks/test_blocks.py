"""Blocks of a mask, judged from its closed forms, against the mask itself at every pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpass.masks import blocks
from attnpass.masks.blocks import Judge, listed
from attnpass.masks.expr import TRUE, Bool, Load, Poly, of, poly
from attnpass.masks.frame import Frame, frame
from attnpass.masks.logic import both, eq, negate
from attnpass.masks.render import Renderer
from attnpass.masks.sizes import Sizes
from attnpass.masks.structure import Document, Limit, Structure, whole

BATCH, HEADS, BLOCK = 3, 2, 8
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scene:
    """Scores of one shape, and the tensors that their mask reads."""

    frame: Frame
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, queries: int, keys: int, seed: int = 0) -> Scene:
        g = torch.Generator().manual_seed(seed)
        pad = torch.rand(BATCH, keys, generator=g) < torch.rand(BATCH, 1, generator=g)
        ids = torch.randint(0, 4, (BATCH, max(queries, keys)), generator=g)
        ends = torch.randint(-5, 45, (BATCH, queries), generator=g)
        tensors = {"pad": pad, "ids": ids, "sorted": ids.sort().values, "ends": ends}
        return cls(frame(Sizes(), BATCH, HEADS, queries, keys), tensors)

    @property
    def queries(self) -> int:
        return self.frame.queries.value or 0

    @property
    def keys(self) -> int:
        return self.frame.keys.value or 0

    def renderer(self, indices: Any) -> Renderer:
        return Renderer(
            lambda op, *args, **kwargs: op(*args, **kwargs),
            indices=indices,
            size=lambda sym: None,
            tensor=self.tensors.__getitem__,
            extents=lambda source: tuple(poly(n) for n in self.tensors[source].shape),
            device=CPU,
        )

    def judge(self, structure: Structure) -> tuple[Tensor, Tensor]:
        def number(p: Poly) -> int:
            assert p.value is not None
            return p.value

        judged = Judge(
            lambda op, *args, **kwargs: op(*args, **kwargs),
            self.frame,
            number=number,
            scalar=lambda op, *args: op(*args),
            renderer=self.renderer,
            device=CPU,
            size=BLOCK,
        )(structure)
        full = torch.zeros_like(judged.some) if judged.full is None else judged.full
        assert judged.some.shape[1:] == full.shape[1:] == (1, -(-self.queries // BLOCK), -(-self.keys // BLOCK))
        shape = (BATCH, *judged.some.shape[1:])
        return judged.some.expand(shape), full.expand(shape)

    def truth(self, keep: Bool) -> tuple[Tensor, Tensor]:
        """Which blocks keep anything, and which keep all, pair by pair."""
        sizes = (BATCH, HEADS, self.queries, self.keys)
        shapes = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
        grid = {n: torch.arange(size).view(s) for n, size, s in zip("bhij", sizes, shapes, strict=True)}
        seen = self.renderer(grid)(keep).expand(BATCH, 1, self.queries, self.keys)
        rows = seen.split(BLOCK, 2)
        cells = [row.split(BLOCK, 3) for row in rows]
        some = torch.stack([torch.stack([c.any(-1).any(-1) for c in row], -1) for row in cells], -2)
        # a short block is not full, as torch has it
        full = torch.stack([torch.stack([c.all(-1).all(-1) & whole_block(c) for c in row], -1) for row in cells], -2)
        return some, full


def whole_block(cell: Tensor) -> bool:
    return cell.shape[-2:] == (BLOCK, BLOCK)


lengths = st.tuples(st.integers(2, 40), st.integers(2, 40))
offsets = st.integers(-20, 45).map(poly)


def keys_of(scene: Scene) -> Bool:
    return Load("pad", (scene.frame.b, scene.frame.j), "bool", "bool")


def document(scene: Scene, name: str) -> Document:
    load = lambda at: of(Load(name, (scene.frame.b, at), "int", "int64"))  # noqa: E731
    return Document(query=load(scene.frame.i), key=load(scene.frame.j))


def limit(scene: Scene, *, upper: bool, slope: int = 0) -> Limit:
    load = of(Load("ends", (scene.frame.b, scene.frame.i), "int", "int64"))
    return Limit(end=load + scene.frame.i * slope, upper=upper)


def exact(scene: Scene, structure: Structure) -> None:
    for judged, true in zip(scene.judge(structure), scene.truth(whole(structure, scene.frame)), strict=True):
        assert torch.equal(judged, true)


@settings(max_examples=150, deadline=None)
@given(lengths, offsets)
def test_an_upper_bound_is_judged_exactly(shape: tuple[int, int], offset: Poly) -> None:
    exact(Scene.of(*shape), Structure(upper=offset))


@settings(max_examples=150, deadline=None)
@given(lengths, offsets)
def test_a_lower_bound_is_judged_exactly(shape: tuple[int, int], offset: Poly) -> None:
    exact(Scene.of(*shape), Structure(lower=offset))


@settings(max_examples=150, deadline=None)
@given(lengths, offsets, st.integers(0, 45).map(poly))
def test_a_prefix_is_judged_exactly(shape: tuple[int, int], offset: Poly, prefix: Poly) -> None:
    exact(Scene.of(*shape), Structure(upper=offset, prefix=prefix))


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 45).map(poly))
def test_chunks_are_judged_exactly(shape: tuple[int, int], size: Poly) -> None:
    exact(Scene.of(*shape), Structure(chunk=size))


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(0, 45), st.integers(0, 45))
def test_a_window_is_judged_exactly(shape: tuple[int, int], left: int, right: int) -> None:
    exact(Scene.of(*shape), Structure(lower=poly(left), upper=poly(right)))


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(0, 10**6))
def test_key_padding_is_judged_exactly(shape: tuple[int, int], seed: int) -> None:
    scene = Scene.of(*shape, seed)
    exact(scene, Structure(keys=keys_of(scene)))


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(0, 10**6))
def test_documents_are_never_left_out_and_full_exactly(shape: tuple[int, int], seed: int) -> None:
    scene = Scene.of(*shape, seed)
    structure = Structure(documents=(document(scene, "sorted"),))
    some, full = scene.judge(structure)
    true_some, true_full = scene.truth(whole(structure, scene.frame))
    assert torch.equal(full, true_full)
    assert not (true_some & ~some).any()


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(0, 10**6), st.booleans(), st.sampled_from([-1, 0, 1]))
def test_a_limit_is_judged_exactly(shape: tuple[int, int], seed: int, upper: bool, slope: int) -> None:
    scene = Scene.of(*shape, seed)
    exact(scene, Structure(limits=(limit(scene, upper=upper, slope=slope),)))


@settings(max_examples=400, deadline=None)
@given(
    lengths,
    st.integers(0, 10**6),
    st.none() | offsets,
    st.none() | offsets,
    st.none() | st.integers(0, 45).map(poly),
    st.none() | st.integers(1, 20).map(poly),
    st.booleans(),
    st.sampled_from([(), ("ids",), ("sorted",), ("ids", "sorted")]),
    st.sampled_from([(), (True,), (False,), (True, False)]),
    st.booleans(),
)
def test_of_any_conjunction_nothing_kept_is_left_out_and_nothing_full_is_masked(
    shape: tuple[int, int],
    seed: int,
    upper: Poly | None,
    lower: Poly | None,
    prefix: Poly | None,
    chunk: Poly | None,
    padded: bool,
    documents: tuple[str, ...],
    limits: tuple[bool, ...],
    dense: bool,
) -> None:
    scene = Scene.of(*shape, seed)
    odd = eq(of(Load("ids", (scene.frame.b, scene.frame.i), "int", "int64")) - scene.frame.j)
    structure = Structure(
        upper=upper,
        lower=lower,
        prefix=prefix if upper is not None else None,
        chunk=chunk,
        keys=keys_of(scene) if padded else TRUE,
        documents=tuple(document(scene, name) for name in documents),
        limits=tuple(limit(scene, upper=upper) for upper in limits),
        residual=negate(odd) if dense else TRUE,
    )
    some, full = scene.judge(structure)
    true_some, true_full = scene.truth(whole(structure, scene.frame))
    assert not (true_some & ~some).any()
    assert not (full & ~true_full).any()
    assert not (dense and full.any())


def test_what_stays_dense_is_computed_in_every_block() -> None:
    scene = Scene.of(20, 30)
    some, full = scene.judge(Structure(residual=both(keys_of(scene), eq(scene.frame.i - scene.frame.j))))
    assert some.all()
    assert not full.any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sorted_", [False, True])
def test_blocks_are_listed_as_torch_lists_them(
    transposed: bool, sorted_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.flex_attention import _dense_to_ordered

    if sorted_:
        monkeypatch.setattr(blocks, "_COMPARED", 0)
    g = torch.Generator().manual_seed(0)
    marks = torch.rand(20, 1, 5, 7, generator=g) < torch.rand(20, 1, 1, 1, generator=g)
    marks[0], marks[1] = False, True
    marks = marks.transpose(-2, -1) if transposed else marks
    many, which = listed(lambda op, *args, **kwargs: op(*args, **kwargs), marks, marks.shape, CPU)
    theirs = _dense_to_ordered(marks)
    for mine, other in zip((many, which), theirs, strict=True):
        assert mine.dtype == other.dtype == torch.int32
        assert mine.is_contiguous()
    assert torch.equal(many, theirs[0])
    counted = torch.arange(marks.shape[-1]) < many[..., None]
    assert torch.equal(which[counted], theirs[1][counted])
    assert 0 <= int(which.min()) <= int(which.max()) < marks.shape[-1]
    assert not sorted_ or torch.equal(which, theirs[1])
