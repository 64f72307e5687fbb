"""The closed forms of real tensors: right in every element, and none where one element does not fit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from attnpass.masks import MaskProof, Masks, content
from attnpass.masks.content import form_of
from attnpass.masks.expr import BConst, Const, Int, Poly, poly
from tests.masks.harness import Make, Traced, _Module, analyse

ONES = torch.ones(9, 9)
INF = torch.full((9, 9), -math.inf)
FORMS: dict[str, Tensor] = {
    "causal": ONES.tril().view(1, 1, 9, 9),
    "causal, bool": ONES.tril().bool(),
    "causal, uint8": ONES.tril().to(torch.uint8),
    "causal, int64": ONES.tril().long(),
    "causal, transposed": ONES.triu().bool().T,
    "causal, expanded": ONES.tril()[None, None].expand(3, 2, 9, 9),
    "causal, oblong": torch.ones(5, 9).tril(4),
    "strictly causal": ONES.tril(-1),
    "added": INF.triu(1),
    "added, half": INF.bfloat16().triu(1),
    "added, with minus zero": (1 - ONES.tril()) * -1e4,
    "window": ONES.tril().triu(-3),
    "identity": torch.eye(9),
    "ones": ONES,
    "one": torch.ones(1, 1),
    "scalar": torch.tensor(-2.5),
    "nan": torch.full((3, 4), math.nan),
    "positions": torch.arange(20),
    "positions, float": torch.arange(20.0)[None],
    "positions, int8": torch.arange(20, dtype=torch.int8),
    "rows": torch.arange(9)[:, None].expand(9, 9),
    "distances": torch.arange(20)[None] - torch.arange(20)[:, None],
    "backwards": 7 - 3 * torch.arange(20),
    "tail": torch.cat([torch.ones(6), torch.zeros(3)])[None],
}


def _python(value: object) -> object:
    if isinstance(value, Int):
        assert value.p.value is not None
        return float(value.p.value)
    assert isinstance(value, BConst | Const | Poly)
    return value.value


@pytest.mark.parametrize("name", FORMS)
def test_every_element_is_what_the_form_says(name: str) -> None:
    tensor = FORMS[name]
    form = form_of(tensor)
    assert form is not None
    for at in itertools.product(*map(range, tensor.shape)):
        found = _python(form.at(tuple(map(poly, at))))
        assert repr(found) == repr(tensor[at].item())


@pytest.mark.parametrize("name", FORMS)
def test_one_other_element_and_the_form_is_another(name: str) -> None:
    tensor = FORMS[name].clone()
    form = form_of(tensor)
    last = tuple(n - 1 for n in tensor.shape)
    for at in {
        last,
        tuple(n // 2 for n in tensor.shape),
        tuple(n // 2 if d else 0 for d, n in enumerate(tensor.shape)),
    }:
        old = tensor[at].clone()
        tensor[at] = not old if tensor.dtype == torch.bool else 5
        assert form_of(tensor) != form
        tensor[at] = old
        assert form_of(tensor) == form


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(9, 9),
        torch.randn(20),
        torch.arange(20.0) / 3,
        torch.arange(20.0).half() + 2048,  # half precision cannot hold every second one
        torch.arange(4.0)[:, None, None] * (torch.arange(9) - torch.arange(9)[:, None]),
        (torch.arange(9) < 3) | ONES.tril().bool(),
    ],
)
def test_other_tensors_have_no_form(tensor: Tensor) -> None:
    assert form_of(tensor) is None


def test_zeros_of_either_sign_are_told_apart() -> None:
    assert form_of(torch.zeros(3)) != form_of(-torch.zeros(3))


def test_pieces_of_a_large_tensor_are_all_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_CHUNK", 7)
    for name, tensor in FORMS.items():
        assert form_of(tensor.clone()) == form_of(tensor), name
    tensor = torch.ones(2, 50, 3)
    for at in (0, 49, 149, 299):
        broken = tensor.clone()
        broken.view(-1)[at] = 0
        form = form_of(broken)
        assert form is None or form != form_of(tensor)


def test_a_form_is_remembered_until_the_tensor_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(9, 9).tril()
    form = form_of(tensor)
    with monkeypatch.context() as patch:
        patch.setattr(content, "_read", lambda _: pytest.fail("read again"))
        assert form_of(tensor) is form
    tensor.triu_()
    assert form_of(tensor) != form


# -- in a graph --------------------------------------------------------------------------------------------------------


def _proved(make: Make, held: Tensor, queries: int, keys: int, *, dynamic: bool) -> MaskProof:
    x, y = torch.zeros(3, queries), torch.zeros(3, keys)
    sizes = {1: Dim("Q", min=2, max=40)}, {1: Dim("K", min=2, max=40)}
    shapes = (sizes,) if dynamic else None
    program = export(_Module(lambda x, y, held: make(x.shape[1], y.shape[1], held), {"held": held}), (x, y),
                     dynamic_shapes=shapes, strict=False)  # fmt: skip
    return analyse(Traced(program, Masks(program.graph, constants={"b_held": held})))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_end_of_a_causal_mask(dynamic: bool) -> None:
    """As GPT-J cuts it: the last rows, of which there are as many as queries."""
    held = torch.ones(64, 64).tril().bool()[None, None]
    proof = _proved(lambda n, m, held: held[:, :, m - n : m, :m], held, 5, 12, dynamic=dynamic)
    assert proof.spec.causal == 7 or (dynamic and " - " in str(proof.spec.causal))
    assert not proof.spec.dense
    assert proof.agreed
    assert proof.contents == {"b_held"}


def test_a_tensor_that_was_not_vouched_for_is_data() -> None:
    held = torch.ones(64, 64).tril().bool()
    x = torch.zeros(3, 12)
    program = export(_Module(lambda x, held: held[: x.shape[1], : x.shape[1]], {"held": held}), (x,), strict=False)
    proof = analyse(Traced(program, Masks(program.graph)))
    assert proof.spec.dense
    assert not proof.contents


def test_what_is_written_before_it_is_read_is_data() -> None:
    def make(n: int, m: int, held: Tensor) -> Tensor:
        held.view(-1)[1::3].fill_(1)
        return held[:n, :m] != 0

    proof = _proved(make, torch.ones(64, 64).tril(), 12, 12, dynamic=False)
    assert proof.spec.causal is None
