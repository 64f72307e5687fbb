"""Whole sites, as recognition hands them over: several layers, merged and split axes, masks written in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, arange, nn
from torch.export import Dim, export

from attnpass.graph import State
from attnpass.masks import MaskProof, Masks
from attnpass.masks.expr import Value
from attnpass.masks.lift import RULES, Call, Index
from attnpass.recognize import find
from attnpass.spec import MaskSpec
from tests.masks.harness import constants

INF = float("inf")
B, H, S, D = 2, 4, 12, 8
Attend = Callable[..., Tensor]


def _module(attend: Attend) -> nn.Module:
    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return attend(*inputs)

    return Module()


def proof(attend: Attend, *inputs: Tensor, dynamic: bool = False) -> MaskProof:
    """The proof of the one site of a function of tensors."""

    length = Dim("S", min=8, max=4096)
    shapes = (tuple({x.dim() - 2: length} if x.dim() > 2 else {1: length} for x in inputs),) if dynamic else None
    program = export(_module(attend), inputs, dynamic_shapes=shapes, strict=False)
    found = find(program.graph, State())
    (site,) = found.sites
    result = Masks(program.graph, constants=constants(program)).of_site(site)
    assert result.check.startswith("agreed"), result.steps
    return result


def qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, *(shape or (B, H, S, D)))
    return q, k, v


def causal(n: int) -> Tensor:
    return torch.full((n, n), -INF).triu(1)


def test_a_mask_and_padding_in_two_layers() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3 + causal(q.shape[2])
        return scores.masked_fill(pad[:, None, None, :] == 0, -INF).softmax(-1) @ v

    for dynamic in (False, True):
        result = proof(attend, *qkv(), torch.ones(B, S), dynamic=dynamic)
        assert result.spec == MaskSpec(causal=0, key_padding=True)
        assert result.fills == (-INF,)


def test_batch_and_heads_merged() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
        mask = torch.where(pad[:, None, None, :] > 0, 0.0, -INF).expand(B, H, S, S).reshape(B * H, S, S)
        return (torch.bmm(q, k.mT) + mask + causal(S)).softmax(-1).bmm(v).view(B, H, S, D)

    result = proof(attend, *qkv(), torch.ones(B, S))
    assert result.spec == MaskSpec(causal=0, key_padding=True)
    (_, load), = result.loads  # fmt: skip
    assert load.source.startswith("inputs")


def test_alibi_as_bloom_adds_it() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
        position = torch.ones(B, S, dtype=torch.long).cumsum(-1) - 1
        alibi = (slopes[0][..., None] * position[:, None, :]).reshape(B * H, 1, S)
        scores = alibi.baddbmm(q, k.mT, beta=1.0, alpha=0.3).view(B, H, S, S)
        weights = (scores + causal(S)).softmax(-1)
        return torch.bmm(weights.view(B * H, S, S), v).view(B, H, S, D)

    result = proof(attend, *qkv(), torch.rand(1, H))
    assert result.spec == MaskSpec(causal=0)
    (term,) = result.biases
    assert term.bias.kind == "alibi"
    assert term.bias.alibi is not None
    assert repr(term.bias.alibi.distance) == "j"


def test_a_mask_is_taken_as_it_was_when_it_was_read() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(S, S)
        mask.masked_fill_(torch.ones(S, S, dtype=torch.bool).triu(1), -INF)
        out = (q @ k.mT + mask).softmax(-1) @ v
        mask.fill_(0.0)
        return out + mask.sum()

    assert proof(attend, *qkv()).spec == MaskSpec(causal=0)


def test_a_mask_written_in_part_is_the_whole_of_its_writes() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((S, S), -INF)
        mask.triu_(1)
        mask[:, :3] = 0
        return (q @ k.mT + mask.clone()).softmax(-1) @ v

    assert proof(attend, *qkv()).spec == MaskSpec(causal=0, prefix=3)


def test_a_given_bias_is_dense_and_the_mask_beside_it_is_not() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + (bias + causal(S))).softmax(-1) @ v

    result = proof(attend, *qkv(), torch.randn(H, S, S))
    assert result.spec == MaskSpec(causal=0)
    (term,) = result.biases
    assert term.bias.kind == "dense"


def test_windows_of_swin_keep_their_window_axis() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, groups: Tensor) -> Tensor:
        windows = groups.shape[0]
        off = groups[:, None, :] != groups[:, :, None]
        mask = torch.zeros(windows, S, S).masked_fill(off, -INF)
        scores = (q @ k.mT).view(-1, windows, H, S, S) + mask[None, :, None]
        return scores.view(-1, H, S, S).softmax(-1) @ v

    result = proof(attend, *qkv(6, H, S, D), torch.randint(0, 2, (3, S)))
    assert result.spec == MaskSpec(document=True), result.steps
    assert "b % 3" in repr(result.structure.documents[0].query)


def test_queries_in_blocks() -> None:
    """Position i of the scores is block and place in it; the mask speaks of both."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).view(B, H, S // 4, 4, S)
        at = arange(S // 4)[:, None, None] * 4 + arange(4)[None, :, None]
        scores = scores.masked_fill(arange(S) > at, -INF)
        return scores.view(B, H, S, S).softmax(-1) @ v

    assert proof(attend, *qkv()).spec == MaskSpec(causal=0)


def test_the_mask_of_an_existing_call() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = torch.ones(S, S, dtype=torch.bool).tril() & (pad > 0)[:, None, None, :]
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal(S))

    def flagged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5], is_causal=True)

    assert proof(padded, *qkv(), torch.ones(B, S)).spec == MaskSpec(causal=0, key_padding=True)
    assert proof(added, *qkv()).spec == MaskSpec(causal=0)
    assert proof(added, *qkv(2, B, H, S, D)).spec == MaskSpec(causal=0)
    assert proof(added, *qkv(B, S, D)).spec == MaskSpec(causal=0)
    assert proof(flagged, *qkv()).spec == MaskSpec(causal=0)


def test_a_rule_that_fails_costs_the_proof_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Call, index: Index) -> Value:
        raise KeyError("diagonal")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + causal(S)).softmax(-1) @ v

    monkeypatch.setitem(RULES, "triu", broken)
    program = export(_module(attend), qkv(), strict=False)
    (site,) = find(program.graph, State()).sites
    result = Masks(program.graph).of_site(site)
    assert result.check == "disagreed: lifting triu failed: KeyError: 'diagonal'"
    assert result.agreed is False
    assert result.spec == MaskSpec()
    assert result.biases[0].bias.kind == "dense"


def test_a_wrong_rule_is_caught_and_its_claim_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES["triu"]

    def wrong(call: Call, index: Index) -> Value:
        return right(call, (index[0], index[1] + 1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + causal(S)).softmax(-1) @ v

    monkeypatch.setitem(RULES, "triu", wrong)
    program = export(_module(attend), qkv(), strict=False)
    (site,) = find(program.graph, State()).sites
    result = Masks(program.graph).of_site(site)
    assert result.check == "disagreed: triu was lifted wrongly in 12 of 144 elements"
    assert result.spec == MaskSpec()
    assert [repr(load) for _, load in result.loads] == ["triu[i, j]"]


def test_sites_that_share_a_mask_share_the_proof() -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = causal(S)
            x = (q @ k.mT + mask).softmax(-1) @ v
            return (x @ k.mT + mask).softmax(-1) @ v

    program = export(Module(), qkv(), strict=False)
    first, second = find(program.graph, State()).sites
    masks = Masks(program.graph)
    assert masks.of_site(first) is masks.of_site(second)
