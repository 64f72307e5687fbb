"""Every closed form is proved of every spelling, at known and at unknown lengths, and the graph's own values agree."""

from __future__ import annotations

from functools import cache

import pytest

from attnpass.masks import MaskProof
from attnpass.spec import MaskSpec
from tests.masks import spellings as s
from tests.masks.harness import Table

TABLES: dict[str, tuple[dict[str, s.Spelling], MaskSpec]] = {
    "causal": (s.CAUSAL, MaskSpec(causal=0)),
    "window": (s.WINDOW, MaskSpec(causal=0, window=(3, None))),
    "two-sided window": (s.TWO_SIDED, MaskSpec(window=(3, 3))),
    "prefix": (s.PREFIX, MaskSpec(causal=0, prefix=3)),
    "chunk": (s.CHUNK, MaskSpec(chunk=4)),
    "document": (s.DOCUMENT, MaskSpec(document=True)),
    "padding": (s.PADDING, MaskSpec(key_padding=True)),
    "nothing": (s.NOTHING, MaskSpec()),
}
ALL: dict[str, dict[str, s.Spelling]] = {
    **{form: makes for form, (makes, _) in TABLES.items()},
    "everything": s.EVERYTHING,
    "alibi": s.ALIBI,
    "relative": s.RELATIVE,
    "chunk tables": s.CHUNK_STATIC,
}
STATIC_ONLY = {"take along"}  # torch makes its length static
CASES = [(form, name) for form, (table, _) in TABLES.items() for name in table]
LENGTHS = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@cache
def table(form: str, dynamic: bool) -> Table:
    makes = dict(ALL[form])
    if dynamic:
        makes = {name: make for name, make in makes.items() if name not in STATIC_ONLY}
    return Table(makes, dynamic=dynamic)


def proved(proof: MaskProof) -> MaskProof:
    assert proof.check.startswith("agreed"), proof.steps
    return proof


@LENGTHS
@pytest.mark.parametrize(("form", "name"), CASES, ids=[f"{form}: {name}" for form, name in CASES])
def test_a_mask_is_proved_however_it_is_spelled(form: str, name: str, dynamic: bool) -> None:
    spec = TABLES[form][1]
    proof = proved(table(form, dynamic).proof(name))
    assert proof.spec == spec, proof.steps
    assert not proof.biases
    assert proof.empty_rows == ("possible" if form == "padding" else "impossible"), proof.steps


@pytest.mark.parametrize("name", s.CHUNK_STATIC)
def test_chunks_from_tables(name: str) -> None:
    assert proved(table("chunk tables", False).proof(name)).spec == MaskSpec(chunk=4)


@LENGTHS
@pytest.mark.parametrize("name", s.EVERYTHING)
def test_a_mask_without_any_key(name: str, dynamic: bool) -> None:
    proof = proved(table("everything", dynamic).proof(name))
    assert proof.everything_masked
    assert proof.empty_rows == "possible"


@LENGTHS
@pytest.mark.parametrize("name", s.ALIBI)
def test_alibi(name: str, dynamic: bool) -> None:
    proof = proved(table("alibi", dynamic).proof(name))
    assert proof.spec == MaskSpec()
    (term,) = proof.biases
    assert term.bias.kind == "alibi", proof.steps
    assert term.bias.alibi is not None


@LENGTHS
@pytest.mark.parametrize("name", s.RELATIVE)
def test_a_bias_of_the_distance_alone(name: str, dynamic: bool) -> None:
    if dynamic and name in STATIC_ONLY:
        pytest.skip("torch makes its length static")
    proof = proved(table("relative", dynamic).proof(name))
    assert proof.spec == MaskSpec()
    (term,) = proof.biases
    assert term.bias.kind == "relative", proof.steps


@pytest.mark.parametrize("form", [form for form in ALL if form != "chunk tables"])
def test_there_are_twelve_spellings_of_each(form: str) -> None:
    assert len(ALL[form]) >= 12
