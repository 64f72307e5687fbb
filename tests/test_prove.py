"""The prove stage in the pass: what a proof removes from the graph, what it leaves, what happens when it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

import attnpass
from attnpass.errors import AttnpassError
from attnpass.masks import Masks
from attnpass.policy import Policy
from attnpass.prove import WAIVED
from attnpass.spec import EmptyRow, MaskSpec

INF = float("inf")
B, H, S, D = 2, 3, 7, 8
Attend = Callable[..., Tensor]
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Plain(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.attend(*inputs)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, S, D)
    return q, k, v


def rewritten(attend: Attend, *inputs: Tensor, **policy: Any) -> tuple[ExportedProgram, attnpass.Report]:
    return attnpass.rewrite(export(Plain(attend), inputs, strict=False), policy=Policy(**policy))


def targets(program: ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def over_queries_and_keys(program: ExportedProgram) -> list[str]:
    """Nodes whose value has an element for each query and key."""
    values = [(node.name, node.meta.get("val")) for node in program.graph.nodes]
    return [name for name, val in values if isinstance(val, Tensor) and tuple(val.shape[-2:]) == (S, S)]


def causal(n: int = S) -> Tensor:
    return torch.full((n, n), -INF).triu(1)


def test_a_causal_mask_becomes_a_flag_and_is_not_made() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.3 + causal()).softmax(-1) @ v

    program, report = rewritten(attend, *qkv())
    (call,) = [node for node in program.graph.nodes if node.target is SDPA]
    assert call.args[3:6] == (None, 0.0, True)
    assert not over_queries_and_keys(program)
    (site,) = report.sites
    assert site.spec.mask == MaskSpec(causal=0)
    assert site.spec.empty_rows is EmptyRow.IMPOSSIBLE
    assert any("upper bound: j <= i" in step for step in site.proofs)
    torch.testing.assert_close(program.module()(*qkv()), attend(*qkv()))


def test_a_mask_of_zeros_is_dropped() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(S, S, dtype=torch.bool)
        return (q @ k.mT * 0.3 + torch.where(seen, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v

    program, report = rewritten(attend, *qkv())
    assert targets(program) == [SDPA]
    assert report.sites[0].spec.mask == MaskSpec()


def two_layers(mask: Callable[[Tensor], Tensor]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        made = mask(given)
        for _ in range(2):
            q = (q @ k.mT * 0.3 + made).softmax(-1) @ v
        return q

    return attend


def test_a_structured_mask_is_made_once_for_all_layers() -> None:
    def mask(pad: Tensor) -> Tensor:
        seen = torch.ones(S, S, dtype=torch.bool).tril() & pad[:, None, None, :]
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)

    pad = torch.ones(B, S, dtype=torch.bool)
    pad[0, :3] = False
    program, report = rewritten(two_layers(mask), *qkv(), pad)
    assert [site.spec.mask for site in report.sites] == [MaskSpec(causal=0, key_padding=True)] * 2
    first, second = (node for node in program.graph.nodes if node.target is SDPA)
    assert first.args[3] is second.args[3]
    assert targets(program).count(torch.ops.aten.any.dim) == 1
    torch.testing.assert_close(program.module()(*qkv(), pad), two_layers(mask)(*qkv(), pad))


def test_a_dense_bias_is_made_ready_once_for_all_layers() -> None:
    def mask(bias: Tensor) -> Tensor:
        return (bias * 2).unsqueeze(0)

    bias = torch.randn(H, S, S)
    bias[:, 2] = -INF  # a row without a key: NaN
    program, report = rewritten(two_layers(mask), *qkv(), bias)
    assert [site.replaced for site in report.sites] == [True, True]
    first, second = (node for node in program.graph.nodes if node.target is SDPA)
    assert first.args[3] is second.args[3]
    torch.testing.assert_close(program.module()(*qkv(), bias), two_layers(mask)(*qkv(), bias), equal_nan=True)


def padded(fill: float) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return (q @ k.mT * 0.3).masked_fill(~pad[:, None, None, :], fill).softmax(-1) @ v

    return attend


@pytest.mark.parametrize("fill", [-INF, torch.finfo(torch.float32).min])
def test_rows_without_a_key_may_be_waived(fill: float) -> None:
    pad = torch.ones(B, S, dtype=torch.bool)
    pad[0] = False
    exact, _ = rewritten(padded(fill), *qkv(), pad)
    waived, report = rewritten(padded(fill), *qkv(), pad, empty_rows="dont_care", strict=True)
    (site,) = report.sites
    assert site.replaced
    assert site.assumptions == (WAIVED,)
    assert site.spec.empty_rows is (EmptyRow.NAN if fill == -INF else EmptyRow.MEAN)  # what the original does
    assert torch.ops.aten.any.dim in targets(exact)
    assert torch.ops.aten.any.dim not in targets(waived)
    true = padded(fill)(*qkv(), pad)
    torch.testing.assert_close(exact.module()(*qkv(), pad), true, equal_nan=True)
    torch.testing.assert_close(waived.module()(*qkv(), pad)[1], true[1])


def test_strict_allows_no_assumption() -> None:
    pad = torch.ones(B, S, dtype=torch.bool)
    for fill, replaced in ((-1e9, 0), (-INF, 1)):
        report = rewritten(padded(fill), *qkv(), pad, strict=True)[1]
        assert report.replaced == replaced, fill
        assert [site.reason.code for site in report.sites if site.reason] == ["strict"] * (1 - replaced)
    assert rewritten(padded(-1e9), *qkv(), pad)[1].replaced == 1


def test_what_may_be_waived_is_checked() -> None:
    with pytest.raises(AttnpassError, match="'exact' or 'dont_care'"):
        Policy.from_options({"empty_rows": "zero"})


def test_a_fill_that_leaves_rows_empty_gives_the_mean_and_its_gradients() -> None:
    fill = torch.finfo(torch.float32).min
    pad = torch.ones(B, S, dtype=torch.bool)
    pad[0] = False
    inputs = [x.requires_grad_() for x in qkv()]
    program, report = rewritten(padded(fill), *inputs, pad)
    assert report.replaced == 1
    module = program.module()
    weight = torch.randn(B, H, S, D)
    got = torch.autograd.grad((module(*inputs, pad) * weight).sum(), inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    true = torch.autograd.grad((padded(fill)(*wide, pad) * weight).sum(), wide)
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_mistake_in_a_proof_is_a_refusal_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpass.masks import lift
    from attnpass.masks.expr import TRUE

    def wrong(call: lift.Call, index: lift.Index) -> Any:
        return TRUE

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, cols = torch.arange(S)[:, None], torch.arange(S)
        return (q @ k.mT * 0.3).masked_fill(~(rows >= cols), -INF).softmax(-1) @ v

    monkeypatch.setitem(lift.RULES, "ge", wrong)
    program, report = rewritten(attend, *qkv())
    (site,) = report.sites
    assert site.reason is not None
    assert site.reason.code == "mask_disagrees"
    assert "please report" in report.notes[0]
    assert "please report" in str(report)
    assert SDPA not in targets(program)


def test_a_proof_that_fails_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.3 + causal()).softmax(-1) @ v

    def fails(self: Masks, site: Any) -> Any:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Masks, "of_site", fails)
    program, report = rewritten(attend, *qkv())
    assert report.replaced == 1
    (failure,) = report.failures
    assert (failure.stage, failure.part) == ("prove", "program.s0")
    assert failure.line == "RuntimeError: a mistake of ours"
    torch.testing.assert_close(program.module()(*qkv()), attend(*qkv()))


def sloped(mask: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    """ALiBi with slopes that the model computes, and a mask: of scores and of what is seen."""

    def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        slopes = torch.pow(torch.full((), 0.5), torch.arange(1, H + 1)).view(-1, 1, 1)
        x = q @ k.mT * 0.3 + slopes * (torch.arange(S) - torch.arange(S)[:, None])
        return mask(x, pad[:, None, None, :]).softmax(-1) @ v

    return attend


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        (lambda x, seen: x + torch.where(seen, 0.0, LOWEST), EmptyRow.MEAN),
        (lambda x, seen: x + torch.where(seen, 0.0, -INF), EmptyRow.NAN),
        (lambda x, seen: x.masked_fill(~seen, LOWEST), EmptyRow.MEAN),
        (lambda x, seen: x.masked_fill(~seen, -1e9), EmptyRow.MEAN),
        (lambda x, seen: x.masked_fill(~seen, -INF), EmptyRow.NAN),
        (lambda x, seen: x.masked_fill(~seen, LOWEST) + x.new_ones(S).cumsum(-1), EmptyRow.MEAN),
        # where both apply, two of them are added; and a bias shows beside -1e9: nothing is said, and all is kept
        (lambda x, seen: x + torch.where(seen, 0.0, LOWEST) + torch.where(seen, 0.0, LOWEST), None),
        (lambda x, seen: x + torch.where(seen, 0.0, -1e9), None),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_rows_without_a_key_beside_a_bias(
    mask: Callable[[Tensor, Tensor], Tensor], rows: EmptyRow | None, grad: bool
) -> None:
    pad = torch.ones(B, S, dtype=torch.bool)
    pad[0] = False
    pad[1, :2] = False
    inputs = [x.requires_grad_(grad) for x in qkv()]
    program, report = rewritten(sloped(mask), *inputs, pad)
    (site,) = report.sites
    assert site.replaced
    if rows is not None:
        assert site.spec.empty_rows is rows
    got, true = program.module()(*inputs, pad), sloped(mask)(*inputs, pad)
    torch.testing.assert_close(got, true, equal_nan=True)
    if grad:
        weight = torch.randn(H, S, D)  # no gradient is asked of a query without a key
        mine, theirs = (torch.autograd.grad((x[1] * weight).sum(), inputs) for x in (got, true))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a[1], b[1])


@pytest.mark.parametrize("number", [1e5, 1e9, 1e30, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("apply", [torch.add, torch.sub], ids=["add", "sub"])
def test_a_number_that_swallows_scores_is_not_the_same_as_none(number: float, apply: Attend) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = torch.arange(q.shape[-2])[:, None]
        kept = (rows >= 2).expand(-1, k.shape[-2]).float()  # of the first queries every key is marked
        return apply(q @ k.mT, (1.0 - kept) * number).softmax(-1) @ v

    program, report = rewritten(attend, *qkv())
    assert report.replaced == (apply is torch.sub)
    torch.testing.assert_close(program.module()(*qkv()), attend(*qkv()), rtol=1e-4, atol=1e-4)


def test_an_ordinary_number_for_a_whole_row_is_dropped() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = torch.arange(q.shape[-2])[:, None]
        return (q @ k.mT - torch.where(rows >= 2, 1.5, 100.0)).softmax(-1) @ v

    (site,) = rewritten(attend, *qkv())[1].sites
    assert site.replaced
    assert not site.spec.bias


SUBTRACTED: dict[str, Attend] = {
    "a fill of one minus a mask": lambda q, k, v: q @ k.mT - (1 - torch.ones(S, S).tril()) * 1e9,
    "a marked triangle times the greatest number": lambda q, k, v: (
        q @ k.mT - torch.ones(S, S).triu(1) * torch.finfo(torch.float32).max
    ),
    "a mask that is chosen": lambda q, k, v: q @ k.mT - torch.where(torch.ones(S, S).tril() == 1, 0.0, 1e30),
    "infinity": lambda q, k, v: q @ k.mT - torch.full((S, S), INF).triu(1),
    "taken from twice": lambda q, k, v: -((1 - torch.ones(S, S).tril()) * 1e9 - q @ k.mT),
}


@pytest.mark.parametrize("form", SUBTRACTED)
def test_a_mask_may_be_subtracted(form: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SUBTRACTED[form](q, k, v).softmax(-1) @ v

    program, report = rewritten(attend, *qkv())
    (site,) = report.sites
    assert site.replaced
    assert site.spec.mask == MaskSpec(causal=0)
    torch.testing.assert_close(program.module()(*qkv()), attend(*qkv()))


@pytest.mark.parametrize("number", [1e9, torch.finfo(torch.float32).max])
def test_what_raises_scores_is_no_mask(number: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT - (1 - torch.ones(S, S).tril()) * -number).softmax(-1) @ v

    assert [miss.reason.code for miss in rewritten(attend, *qkv())[1].misses] == ["lost_scores"]
