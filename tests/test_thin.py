"""A bias under a mask that proves to mask nothing is read from before it was broadcast to all batch rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnpass
from tests.test_prove import INF, Attend, B, H, S, qkv, rewritten

MIN = torch.finfo(torch.float32).min
Cover = Callable[[Tensor, Tensor], Tensor]
WHOLE, SMALL = (B, H, S, S), (1, H, S, S)


def everything(at: Tensor) -> Tensor:
    return (at >= 0).expand(B, 1, S, S)


def all_but_the_first(at: Tensor) -> Tensor:
    return (at >= 1).expand(B, 1, S, S)


COVERS: dict[str, Cover] = {
    "where": lambda bias, keep: torch.where(keep, bias, MIN),
    "where, turned": lambda bias, keep: torch.where(~keep, -INF, bias),
    "masked_fill": lambda bias, keep: bias.masked_fill(~keep, MIN),
    "broadcast first": lambda bias, keep: bias.expand(WHOLE).masked_fill(~keep, MIN),
    "twice": lambda bias, keep: bias.masked_fill(~keep, MIN).masked_fill(~keep, -INF),
}


def attention(cover: Cover, keep: Callable[[Tensor], Tensor]) -> Attend:
    """Two layers, each of which covers the bias anew."""

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table.permute(2, 0, 1)[None]
        for _ in range(2):
            v = (q @ k.mT * 0.3 + cover(bias, keep(torch.arange(S)))).softmax(-1) @ v
        return v

    return attend


@pytest.mark.parametrize("cover", COVERS)
def test_a_bias_that_is_masked_nowhere_is_one_for_all_batch_rows(cover: str) -> None:
    attend, inputs = attention(COVERS[cover], everything), (*qkv(), torch.randn(S, S, H))
    program, report = rewritten(attend, *inputs)
    assert [[bias.shape for bias in site.spec.bias] for site in report.sites] == [[SMALL]] * 2
    calls = [node for node in program.graph.nodes if "attention" in str(node.target)]
    (mask,) = {call.args[3] for call in calls}
    assert tuple(mask.meta["val"].shape) == SMALL
    torch.testing.assert_close(program.module()(*inputs), attend(*inputs))


@pytest.mark.parametrize("cover", COVERS)
def test_one_that_is_masked_somewhere_stays_what_it_is(cover: str) -> None:
    attend, inputs = attention(COVERS[cover], all_but_the_first), (*qkv(), torch.randn(S, S, H))
    program, report = rewritten(attend, *inputs)
    assert [[bias.shape for bias in site.spec.bias] for site in report.sites] == [[WHOLE]] * 2
    torch.testing.assert_close(program.module()(*inputs), attend(*inputs))


def test_a_number_that_is_put_in_is_no_mask() -> None:
    attend = attention(lambda bias, keep: torch.where(keep, bias, 0.5), all_but_the_first)
    inputs = (*qkv(), torch.randn(S, S, H))
    program, report = rewritten(attend, *inputs)
    assert {bias.shape for site in report.sites for bias in site.spec.bias} == {WHOLE}
    torch.testing.assert_close(program.module()(*inputs), attend(*inputs))


def test_a_table_that_holds_other_numbers_meanwhile_is_not_read_again() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        held = table.clone()
        bias = torch.where(everything(torch.arange(S)), held, MIN)
        held.copy_(table.flip(-1))
        out = (q @ k.mT * 0.3 + bias).softmax(-1) @ v
        held.copy_(table)
        return out + held.sum()

    inputs = (*qkv(), torch.randn(H, S, S))
    program, report = rewritten(attend, *inputs)
    assert report.replaced == 1
    torch.testing.assert_close(program.module()(*inputs), attend(*inputs))


def test_a_table_that_is_detached_gets_no_gradient(fresh_dynamo: None) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = torch.where(everything(torch.arange(S)), table.permute(2, 0, 1)[None].expand(WHOLE).detach(), MIN)
        return (q @ k.mT * 0.3 + bias).softmax(-1) @ v + (table**2).sum()

    inputs = tuple(x.requires_grad_() for x in (*qkv(), torch.randn(S, S, H)))
    attnpass.reset()
    fast = torch.compile(attend, backend="attnpass", options={"inner": "eager"})
    mine, true = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (fast, attend))
    assert attnpass.report().replaced == 1
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)
