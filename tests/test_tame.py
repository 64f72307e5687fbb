"""Biases of float data given to FlexAttention as functions: exact whatever the data hold, and what is refused of them.

The rewritten graph is run as it stands, where the operation computes all scores by itself; two tests compile it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import attnpass
from attnpass.capture.dynamo import backend
from attnpass.functions import obstacles
from attnpass.graph import State
from attnpass.kernels.flex import Flex
from attnpass.masks.bias import TAME
from attnpass.prove import Proved, prove
from attnpass.recognize import find
from attnpass.spec import EmptyRow
from tests.test_flex import Flexed, as_on_cuda, calls, dense_blocks, listed  # noqa: F401 (a fixture)

INF = float("inf")
MIN = torch.finfo(torch.float32).min
H, S, D = 2, 140, 24
REACH = 40  # distances beyond it have the bias of this one
Attend = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


class Plain(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.attend(*inputs)


def given(table: Tensor, length: int = S) -> tuple[Tensor, ...]:
    """q, k, v, which keys there are (the first queries see none), and a table of biases for each batch row."""
    q, k, v = torch.randn(3, len(table), H, length, D)
    pad = (torch.arange(length) >= 30).expand(len(table), -1)
    return q, k, v, pad, table


def distances(q: Tensor) -> Tensor:
    at = torch.arange(q.shape[2], device=q.device)
    return at - at[:, None]


def bias(q: Tensor, table: Tensor) -> Tensor:
    """(batch, heads, queries, keys)"""
    return table[:, distances(q).clamp(-REACH, REACH) + REACH].permute(0, 3, 1, 2)


def seen(q: Tensor, pad: Tensor) -> Tensor:
    return (distances(q) <= 0) & pad[:, None, None, :]


def product(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.2


def alone(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    return (product(q, k) + bias(q, table)).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    x = product(q, k) + bias(q, table)
    return x.masked_fill(distances(q) > 0, -INF).softmax(-1) @ v


def added_mask(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    return (product(q, k) + bias(q, table) + torch.where(seen(q, pad), 0.0, MIN)).softmax(-1) @ v


def added_mask_first(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    return (product(q, k) + torch.where(seen(q, pad), 0.0, MIN) + bias(q, table)).softmax(-1) @ v


def added_infinity(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    return (product(q, k) + bias(q, table) + torch.where(seen(q, pad), 0.0, -INF)).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    return (product(q, k) + bias(q, table)).masked_fill(~seen(q, pad), -1e9).softmax(-1) @ v


def filled_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    x = (product(q, k) + bias(q, table)).masked_fill(distances(q) > 0, MIN)
    return x.masked_fill(~pad[:, None, None, :], MIN).softmax(-1) @ v


def filled_first(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    return (product(q, k).masked_fill(~seen(q, pad), MIN) + bias(q, table)).softmax(-1) @ v


def safe(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    x = product(q, k) + bias(q, table) + torch.where(seen(q, pad), 0.0, MIN)
    out: Tensor = torch.ops.aten._safe_softmax(x, -1) @ v
    return out


def with_sinks(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    x = product(q, k) + bias(q, table) + torch.where(seen(q, pad), 0.0, MIN)
    x = torch.cat([x, k[:, :, :1, :1].expand(-1, -1, q.shape[2], -1)], -1)
    return x.softmax(-1)[..., :-1] @ v


def two_biases(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    x = product(q, k) + 0.5 * bias(q, table) + torch.where(seen(q, pad), 0.0, MIN)
    return (x + table[:, 0].abs().view(-1, H, 1, 1) * distances(q)).softmax(-1) @ v


FORMS = (
    alone, causal, added_mask, added_mask_first, added_infinity, filled, filled_twice, filled_first, safe, with_sinks,
    two_biases,
)  # fmt: skip


def made(*entries: tuple[slice, float]) -> Tensor:
    """A table of noise, but for some distances of one head."""
    table = torch.randn(1, 2 * REACH + 1, H, generator=torch.Generator().manual_seed(1))
    for where, number in entries:
        table[:, where, 0] = number
    return table


KEPT, BEHIND, AHEAD = slice(None, REACH + 1), slice(None, REACH), slice(REACH + 1, None)
EVERY, FAR, ONE = slice(None), slice(0, 5), slice(3, 4)
WILD = {
    "large": made((FAR, 5 * TAME)),
    "some are -inf": made((FAR, -INF)),
    "what is kept is -inf": made((KEPT, -INF)),
    "what is masked is -inf": made((AHEAD, -INF)),
    "all are -inf": made((EVERY, -INF)),
    "all are low": made((EVERY, MIN)),
    "what is kept is low": made((KEPT, MIN)),
    "low of two kinds": made((EVERY, MIN), (ONE, -1e31), (AHEAD, -2e31)),
    "low or -inf": made((EVERY, MIN), (BEHIND, -INF)),
    "below a fill": made((KEPT, -4e9)),
    "inf": made((ONE, INF)),
    "inf where it is masked": made((AHEAD, INF)),
    "nearly inf where it is masked": made((AHEAD, -MIN)),
    "NaN": made((ONE, float("nan"))),
    "NaN where it is masked": made((AHEAD, float("nan"))),
    "tame": made(),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.usefixtures("as_on_cuda")
def test_whatever_the_data_hold(form: Attend) -> None:
    assert_the_same(form)


@pytest.mark.parametrize("form", [alone, causal, added_mask, safe, with_sinks], ids=lambda form: form.__name__)
def test_without_a_log_sum_exp(form: Attend) -> None:
    assert_the_same(form)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_whatever_the_data_hold_on_cuda(form: Attend) -> None:
    # a score beside the largest of these biases has few digits left, and sums go another way than eager code's
    assert_the_same(form, inner="inductor", device="cuda", atol=1e-3)


def assert_the_same(form: Attend, *, inner: str = "eager", device: str = "cpu", atol: float = 1e-5) -> None:
    """All tables in one call, and then tame ones alone."""
    found = Flexed(Plain(form), inner=inner)
    for table in (torch.cat(list(WILD.values())), made().repeat(len(WILD), 1, 1)):
        inputs = tuple(x.to(device) for x in given(table))
        with torch.no_grad():
            mine, true = found(*inputs), form(*inputs)
        for name, a, b, slopes in zip(WILD, mine, true, table[:, 0].abs(), strict=True):
            if form is two_biases and device == "cuda" and (slopes == -MIN).any():
                continue  # the compiler's fused multiply-add holds a product that overflows in eager code
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert found.kernels == ["flex"]
    assert len(calls(found.gm)) == 1


@pytest.mark.usefixtures("as_on_cuda")
def test_blocks_are_left_out_only_while_the_data_are_tame() -> None:
    found = Flexed(Plain(causal))
    below = torch.ones(2, 2, dtype=torch.bool).tril()
    for name, table in WILD.items():
        inputs = given(table)
        with torch.no_grad():
            found(*inputs)
            ((*_, blocks, _, _, _, _),) = listed(found.gm, inputs)
        part, full = dense_blocks(*blocks[2:4]), dense_blocks(*blocks[4:6])
        tame = name == "tame"
        assert torch.equal((part | full)[0, 0], below if tame else torch.ones_like(below)), name
        assert not bool(full.any()) or tame


@pytest.mark.usefixtures("as_on_cuda")
def test_scores_stay_in_order_where_kernels_change_the_base() -> None:
    """To compute with powers of two, kernels multiply all scores by 1.44, too much for the lowest and greatest."""
    low = [-INF, MIN, -2e38, -1.5e30, -1.1e30, -0.9e30]
    numbers = torch.tensor([*low, -1e9, 0.0, 5.0, *(-x for x in reversed(low))])
    table = made()
    table[0, : len(numbers), 0] = numbers
    found, inputs = Flexed(Plain(alone)), given(table)
    with torch.no_grad():
        found(*inputs)
        ((_, _, _, score, *_, reads, _),) = listed(found.gm, inputs)
    zero, far = torch.zeros((), dtype=torch.long), torch.tensor(REACH)
    by_distance = [far - n for n in range(len(numbers))]  # the first entries are those of keys furthest behind
    mine = torch.stack([score(torch.tensor(1.5), zero, zero, d, zero, *reads) for d in by_distance])
    assert bool((mine.diff() > 0).all())
    assert torch.equal((mine * 1.44269504).isinf(), numbers.isinf())
    ordinary = slice(len(low) - 1, -len(low) + 1)
    torch.testing.assert_close(mine[ordinary], numbers[ordinary] + 1.5, rtol=0, atol=0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def flex_refusals(attend: Attend, *inputs: Tensor) -> list[str]:
    (site,) = attnpass.audit(Plain(attend), *inputs).sites
    (verdict,) = [v for v in site.verdicts if v.kernel == "flex"]
    return [r.code for r in verdict.refusals]


def masked_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    """Where both masks apply, two lowest numbers are added: what a row of them gives hangs on each."""
    x = product(q, k) + bias(q, table) + torch.where(distances(q) <= 0, 0.0, MIN)
    return (x + torch.where(pad[:, None, None, :], 0.0, MIN)).softmax(-1) @ v


def seen_beside_the_fill(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    """Beside -1e9 a bias of a thousand can be told from none, so a row without a key is not the mean."""
    return (product(q, k) + torch.where(seen(q, pad), 0.0, -1e9) + bias(q, table)).softmax(-1) @ v


@pytest.mark.parametrize("attend", [masked_twice, seen_beside_the_fill], ids=lambda attend: attend.__name__)
def test_masks_that_are_no_one_thing(attend: Attend) -> None:
    with torch.no_grad():
        assert flex_refusals(added_mask, *given(made())) == []
        assert flex_refusals(attend, *given(made())) == ["not_expressed"]


def wide(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
    return (product(q, k) + bias(q, table)).softmax(-1).to(v.dtype) @ v


def test_no_gradients_and_no_narrow_or_wide_floats() -> None:
    q, k, v, pad, table = given(made())
    assert "not_expressed" not in flex_refusals(added_mask, q, k, v, pad, table)
    assert "not_expressed" in flex_refusals(added_mask, q.clone().requires_grad_(), k, v, pad, table)
    with torch.no_grad():
        assert flex_refusals(alone, q.half(), k.half(), v.half(), pad, table.half()) == ["not_expressed"]
        assert flex_refusals(wide, q, k, v, pad, table.double()) == ["not_expressed"]
        assert flex_refusals(alone, *(x.bfloat16() for x in (q, k, v)), pad, table.bfloat16()) == []


def test_a_table_that_is_trained_can_serve_in_evaluation() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(made())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return alone(q, k, v, q, self.table)

    model, inputs = Biased(), given(made())[:3]
    with torch.no_grad():
        assert flex_refusals(model, *inputs) == []
    assert "bias_gradient" in flex_refusals(model, *inputs)


def proved(attend: Attend, *inputs: Tensor, **how: Any) -> Proved:
    """What is proved of the one site of a function, as it is exported."""
    with torch.no_grad():
        program = export(Plain(attend), inputs, strict=False, **how)
    (site,) = find(program.graph, State(grad=False)).sites
    (found,) = prove(program.graph, [site], {}, {})
    return found


def test_symbolic_sizes_on_cuda() -> None:
    shapes = (({2: (s := Dim("s", min=2, max=4096))},) * 3 + ({1: s}, None),)
    found = proved(causal, *given(made()), dynamic_shapes=shapes)
    spec = dataclasses.replace(found.site.spec, device="cuda")
    there = dataclasses.replace(found, site=dataclasses.replace(found.site, spec=spec))
    assert [r.code for r in obstacles(there, while_tame=True)] == ["kernel_bug"]


def test_kernels_that_take_no_functions_are_told_nothing() -> None:
    found = proved(causal, *given(made()))
    assert found.while_tame is not None
    assert not found.expressed
    assert found.site.spec.empty_rows is EmptyRow.NAN
    assert [r.code for r in obstacles(found)] == ["not_expressed"]
    assert not list(obstacles(found, while_tame=True))


# -- numbers that hang on no data --------------------------------------------------------------------------------------


def with_slopes(slopes: Callable[[Tensor], Tensor]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, data: Tensor) -> Tensor:
        x = product(q, k) + slopes(data).view(-1, 1, 1) * distances(q)
        return x.masked_fill(distances(q) > 0, -INF).softmax(-1) @ v

    return attend


@pytest.mark.parametrize(
    ("slopes", "known"),
    [
        (lambda data: torch.pow(torch.full((), 0.5), torch.arange(1, H + 1)), True),
        (lambda data: torch.reciprocal(torch.pow(2, torch.arange(1, H + 1) * 1.5)), True),
        (lambda data: torch.pow(2.0, -torch.arange(1, H + 1)).to(torch.bfloat16), True),
        (lambda data: torch.pow(torch.full((), 0.5), data), False),
        (lambda data: torch.reciprocal(torch.arange(H).float()), False),  # of zero
        (lambda data: torch.pow(torch.full((), 30.0), torch.arange(1, H + 3))[2:], False),  # no ordinary slopes
        (lambda data: torch.rand(H), False),
        (lambda data: torch.empty(H), False),
    ],
)
def test_slopes_that_a_model_computes_are_known(slopes: Callable[[Tensor], Tensor], known: bool) -> None:
    q, k, v, *_ = given(made())
    found = proved(with_slopes(slopes), q, k, v, torch.arange(1.0, H + 1))
    assert found.expressed == known
    assert (found.site.spec.empty_rows is EmptyRow.IMPOSSIBLE) == known
    assert (found.while_tame is None) == known


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_through_inductor() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, table: Tensor) -> Tensor:
        x = torch.tanh(product(q, k)) + bias(q, table) + torch.where(seen(q, pad), 0.0, MIN)
        return x.softmax(-1) @ v

    fast = torch.compile(Plain(capped), backend=backend, fullgraph=True)
    for table in (torch.cat(list(WILD.values())), made().repeat(len(WILD), 1, 1)):
        inputs = given(table)
        with torch.no_grad():
            torch.testing.assert_close(fast(*inputs), capped(*inputs), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert [site.kernel for site in attnpass.report().sites] == ["flex"]


@pytest.mark.slow
# torch's own tracing of the autograd.Function in Bloom (2.13)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["t5", "mpt", "bloom", "falcon_alibi", "swin"])
@pytest.mark.usefixtures("as_on_cuda")
def test_models_with_biases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tests.models.transformers_cases import cases

    refusals = Flex.refusals
    monkeypatch.setattr(  # narrow heads, of which only compiled code is wrong
        Flex, "refusals", lambda self, spec: [r for r in refusals(self, spec) if r.code != "kernel_bug"]
    )
    (case,) = [case for case in cases() if case.name == name]
    model, inputs = case.build()
    for left_out in ("", "attention_mask"):
        fed = {key: x for key, x in inputs.items() if not left_out or left_out not in key}
        found = Flexed(lambda fed=fed: model(**fed))
        with torch.no_grad():
            mine, true = found(), model(**fed)
        torch.testing.assert_close(mine[0], true[0], rtol=1e-4, atol=1e-5)
        assert set(found.kernels) == {"flex"}
        torch._dynamo.reset()
