"""Calls of scaled_dot_product_attention that are there already: what is written in their place, and when nothing is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import export
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnpass
from attnpass.capture.dynamo import backend
from attnpass.cost import called_us, rated_us
from attnpass.gain import gained
from attnpass.graph import State
from attnpass.kernels import kernels
from attnpass.kernels.native import Native
from attnpass.prove import WAIVED, Proved, prove, waive
from attnpass.recognize import existing, find
from attnpass.recognize.existing import DEFINED, LAYOUT
from attnpass.recognize.ops import bound, op_name
from attnpass.site import Add, Fill, Site
from attnpass.spec import AttentionSpec, EmptyRow, MaskSpec
from tests.models import torchvision_stub
from tests.zoo.heads import repeat_kv

Attend = Callable[..., Tensor]
INF = float("inf")
REPEATS = {"expand", "repeat", "repeat_interleave"}


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 8, 5, 6), torch.randn(3, 2, 7, 6), torch.randn(3, 2, 7, 6)


def triangle() -> Tensor:
    return torch.ones(5, 7, dtype=torch.bool).tril()


def exported(attend: Attend, *inputs: Tensor) -> Any:
    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return attend(*inputs)

    return export(Module(), inputs or qkv())


def site_of(attend: Attend, *inputs: Tensor) -> Site:
    (site,) = find(exported(attend, *inputs).graph, State()).sites
    return site


def written(attend: Attend, *inputs: Tensor) -> tuple[dict[str, Any], set[str]]:
    """The arguments of the call that is left, and all operations of the rewritten graph."""
    program, report = attnpass.rewrite(exported(attend, *inputs))
    assert report.replaced == 1
    assert not report.failures
    (call,) = (n for n in program.graph.nodes if op_name(n) == "scaled_dot_product_attention")
    return bound(call), {op_name(n) for n in program.graph.nodes}


# -- what is written -------------------------------------------------------------------------------------------------


def test_repeated_heads_are_read_before_they_are_repeated() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4), scale=0.3)

    call, ops = written(attend)
    assert [call[name].op for name in ("query", "key", "value")] == ["placeholder"] * 3
    assert call["enable_gqa"] is True
    assert call["scale"] == 0.3
    assert not ops & {*REPEATS, "reshape", "contiguous"}


def test_a_triangle_becomes_the_flag() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, triangle(), enable_gqa=True)

    call, ops = written(attend)
    assert call["attn_mask"] is None
    assert call["is_causal"] is True
    assert call["enable_gqa"] is True
    assert not ops & {"tril", "ones"}


def test_the_flag_stays_where_heads_are_no_longer_repeated() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4), is_causal=True)

    call, _ = written(attend)
    assert call["attn_mask"] is None
    assert call["is_causal"] is True


def test_a_mask_that_may_leave_a_query_without_keys_goes_to_the_new_call_as_it_is() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4), mask)

    call, ops = written(attend, *qkv(), torch.rand(3, 1, 5, 7) < 0.5)
    assert call["attn_mask"].op == "placeholder"
    assert not ops & {"any", "logical_or", "where"}  # no repair: the call itself says what such a row gives


def test_where_queries_without_keys_are_waived_the_call_may_be_any() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4), mask)

    # torch's fused kernel for the CPU takes no mask of three dimensions, so what answers changes with the call
    program = exported(attend, *qkv(), torch.rand(1, 5, 7) < 0.5)
    assert attnpass.rewrite(program)[1].replaced == 0
    new, report = attnpass.rewrite(program, policy=attnpass.Policy(empty_rows="dont_care"))
    assert report.replaced == 1
    assert WAIVED in report.sites[0].assumptions
    args = (*qkv(), torch.rand(1, 5, 7) < 0.9)
    torch.testing.assert_close(new.module()(*args), program.module()(*args))


def near_and_seen(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """A window over keys that may be padded, all of them."""
    at = torch.arange(q.shape[2])
    near = (at[:, None] >= at) & (at[:, None] - at < 3)
    return F.scaled_dot_product_attention(q, k, v, near & seen[:, None, None, :])


def padded() -> tuple[Tensor, ...]:
    """Some queries of the first sequence have no key, and all of the second."""
    return *torch.randn(3, 2, 4, 9, 24), torch.arange(9).expand(2, 9) >= torch.tensor([[4], [9]])


def test_a_boolean_mask_may_go_to_a_kernel_that_answers_queries_without_keys_as_torch_lays_down(
    fresh_dynamo: None,
) -> None:
    attnpass.reset()
    args = padded()
    with torch.no_grad():
        found = torch.compile(near_and_seen, backend=backend, options={"kernel": "flex", "strict": True})(*args)
        torch.testing.assert_close(found, near_and_seen(*args))
    (site,) = attnpass.report().sites
    assert site.kernel == "flex"
    assert site.spec.empty_rows is EmptyRow.ZERO
    assert not site.assumptions  # on a CPU all of torch's kernels answer so
    assert not found[0, :, :4].any()
    assert not found[1].any()


@pytest.mark.parametrize("low", [-INF, torch.finfo(torch.float32).min])
def test_a_mask_that_is_added_may_not(low: float, fresh_dynamo: None) -> None:
    attnpass.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, torch.where(seen, 0.0, low)[:, None, None, :].expand(2, 1, 9, 9))

    args = padded()
    with torch.no_grad():
        found = torch.compile(attend, backend=backend, options={"kernel": "flex"})(*args)
        torch.testing.assert_close(found, attend(*args))
    (site,) = attnpass.report().sites
    assert site.reason is not None
    assert site.reason.code == "already_fused"


def test_where_torch_may_take_cudnn_zeros_are_an_assumption() -> None:
    program = exported(near_and_seen, *padded())
    assert not find(program.graph, State()).sites[0].assumptions
    with FakeTensorMode():
        for node in program.graph.nodes:
            x = node.meta.get("val")
            if isinstance(x, Tensor):
                node.meta["val"] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    sites = find(program.graph, State()).sites
    (proved,) = prove(program.graph, sites, {}, {})
    assert proved.site.assumptions == (DEFINED,)
    assert waive(proved).site.assumptions == ()


def heads_innermost(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """As T5 makes its bias."""
    return F.scaled_dot_product_attention(q, k, v, table.permute(2, 0, 1)[None] + pad, scale=1.0)


def t5(low: float) -> tuple[Tensor, ...]:
    """Of the first sequence the third query has no key."""
    pad = torch.zeros(2, 1, 8, 8)
    pad[0, :, :, 6:] = low
    pad[0, :, 2] = low
    return (*torch.randn(3, 2, 4, 8, 16), torch.randn(8, 8, 4), pad)


@pytest.mark.parametrize("low", [-INF, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("grad", [False, True])
def test_a_call_that_torch_computes_unfused_is_attention_by_hand(
    low: float, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attnpass.rewrite(exported(heads_innermost, *t5(low)))[1].sites[0].reason.code == "already_fused"
    monkeypatch.setattr(existing, "_SIDE_BY_SIDE", {"cpu"})
    inputs = t5(low)
    for x in inputs[:3]:
        x.requires_grad_(grad)
    program = exported(heads_innermost, *inputs)
    new, report = attnpass.rewrite(program)
    (site,) = report.sites
    assert site.replaced
    assert LAYOUT in site.assumptions
    found, true = new.module()(*inputs), heads_innermost(*inputs)
    torch.testing.assert_close(found, true)
    if low == -INF:
        assert not true[0, :, 2].any()
    if grad:
        weight = torch.randn_like(true)
        if low != -INF:
            weight[0, :, 2] = 0  # no gradient is asked of a query that a bias masks entirely
        mine, theirs = (torch.autograd.grad((y * weight).sum(), inputs[:3]) for y in (found, true))
        torch.testing.assert_close(mine, theirs)
    strict = attnpass.rewrite(program, policy=attnpass.Policy(strict=True))[1]
    assert strict.sites[0].reason.code == "strict"


def test_dynamo_guards_how_a_mask_is_laid_out(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    monkeypatch.setattr(existing, "_SIDE_BY_SIDE", {"cpu"})
    attnpass.reset()
    args = t5(-INF)
    compiled = torch.compile(heads_innermost, backend="attnpass", options={"inner": "eager", "strict": True})
    torch.testing.assert_close(compiled(*args), heads_innermost(*args))
    (site,) = attnpass.report().sites
    assert site.replaced
    assert not site.assumptions
    # another layout is another graph
    other = args[3].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    compiled(*args[:3], other, args[4])
    assert [site.replaced for site in attnpass.report().sites] == [True, False]


# -- what is recognised ----------------------------------------------------------------------------------------------


def test_masks_are_layers_with_the_axes_of_the_scores() -> None:
    def fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    site = site_of(fill, *qkv(), torch.ones(3, 1, 5, 7, dtype=torch.bool))
    (layer,) = site.layers
    assert isinstance(layer, Fill)
    assert (layer.off, layer.value) == (False, -INF)
    assert layer.mask.layout == (site.roles.batch, (), site.roles.queries, site.roles.keys)
    (added,) = site_of(fill, *qkv(), torch.randn(5, 7)).layers
    assert isinstance(added, Add)
    assert added.factor.is_number
    assert added.factor.number == 1.0


def test_heads_of_a_grouped_call_are_shared_in_runs() -> None:
    site = site_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    shared, group = site.roles.heads
    assert site.roles.group == (group,)
    assert (site.sizes[shared], site.sizes[group]) == (2, 4)
    assert site.q.layout[1] == (shared, group)
    assert site.k.layout[1] == site.v.layout[1] == (shared,)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_the_last_axis_before_length_and_width_is_the_heads(rank: int) -> None:
    lead = (4, 2, 3)[5 - rank :]
    site = site_of(F.scaled_dot_product_attention, *(torch.randn(*lead, n, 6) for n in (5, 7, 7)))
    assert site.spec.q == ({5: 8}.get(rank, 2 if rank == 4 else 1), 3 if rank > 2 else 1, 5, 6)
    assert not site.obstacles


# -- what is left ----------------------------------------------------------------------------------------------------


def recorded(attend: Attend, *inputs: Tensor) -> bool:
    site = site_of(attend, *inputs)
    return [o.code for o in site.obstacles] == ["already_fused"] and not site.q.layout


def test_a_call_with_one_key_is_only_recorded() -> None:
    assert recorded(lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :1], v[:, :, :1], enable_gqa=True))


def test_a_call_with_a_mask_beside_the_flag_is_only_recorded() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4), triangle(), is_causal=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the kernel for the CPU takes both, others raise
        try:
            exported(both)
        except RuntimeError as error:
            pytest.skip(f"not possible any more (torch 2.15): {error}")
        assert recorded(both)


def test_kernels_that_the_program_names_itself_are_only_recorded() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    assert recorded(attend, *(torch.randn(3, 8, n, 6) for n in (5, 7, 7)))


def test_a_program_that_chooses_among_kernels_keeps_its_calls() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4))

    torch._dynamo.reset()
    attnpass.reset()
    inputs = qkv()
    out = torch.compile(attend, backend=backend, options={"inner": "eager"}, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, attend(*inputs))
    (site,) = attnpass.report().sites
    assert site.reason is not None
    assert site.reason.code == "already_fused"


def test_repeated_heads_are_no_gain_where_torch_would_repeat_them_again() -> None:
    site = site_of(lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4)))
    (native,) = (kernel for kernel in kernels() if isinstance(kernel, Native))

    def gains(**changes: Any) -> bool:
        spec = dataclasses.replace(site.spec, **changes)
        return gained(Proved(site=dataclasses.replace(site, spec=spec), expressed=True), native)

    assert gains()
    assert gains(device="cuda", dtype="bfloat16")
    assert not gains(device="cuda")  # no kernel for float32 shares heads
    mask = dataclasses.replace(site.spec.mask, causal=0)
    assert not gains(device="cuda", dtype="bfloat16", mask=mask)  # flash knows the flag for one length only
    assert gains(device="cuda", dtype="bfloat16", mask=mask, q=site.spec.q[:2] + site.spec.k[2:])


def test_a_mask_as_a_function_is_a_gain_where_it_is_expected_to_be_faster() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        near = (at[:, None] >= at) & (at[:, None] - at < 3)
        return F.scaled_dot_product_attention(q, k, v, near)

    program = exported(attend, *(torch.randn(2, 4, 9, 8) for _ in range(3)))
    (proved,) = prove(program.graph, find(program.graph, State()).sites, {}, {})
    (flex,) = (kernel for kernel in kernels() if kernel.takes == "functions")

    def gains(length: int) -> bool:
        shape = (4, 16, length, 64)
        spec = dataclasses.replace(proved.site.spec, q=shape, k=shape, v=shape, device="cuda", dtype="bfloat16")
        return gained(dataclasses.replace(proved, site=dataclasses.replace(proved.site, spec=spec)), flex)

    assert gains(8192)
    assert not gains(16)


def test_a_call_that_is_there_repairs_no_rows() -> None:
    shape = (4, 16, 2048, 64)
    spec = AttentionSpec(q=shape, k=shape, v=shape, dtype="bfloat16", device="cuda", scale=1.0, groups=1)
    sure = dataclasses.replace(spec, mask=MaskSpec(causal=0, key_padding=True))
    may_be_empty = dataclasses.replace(sure, empty_rows=EmptyRow.ZERO)
    assert called_us(may_be_empty) == called_us(sure) == rated_us(sure, "native")
    assert called_us(may_be_empty) < rated_us(may_be_empty, "native")


def test_a_call_without_gain_is_left_as_it_is_in_strict_mode_and_without_fuel() -> None:
    program = exported(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, enable_gqa=True))
    for policy in (attnpass.Policy(strict=True), attnpass.Policy(fuel=0)):
        _, report = attnpass.rewrite(program, policy=policy)
        (site,) = report.sites
        assert site.reason is not None
        assert site.reason.code == "already_fused"


# -- models of transformers ------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attn_implementation": "sdpa",
}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)), {"use_cache": False}


def mistral() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)
    return MistralForCausalLM(config), {"use_cache": False}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES), add_pooling_layer=False), {}


PADDED = torch.ones(2, 12, dtype=torch.long).index_put((torch.tensor([0, 0]), torch.tensor([10, 11])), torch.tensor(0))
# model, padded, and of each call what is replaced, in groups, by the flag
MODELS = [
    (llama, False, (True, 2, True)),
    (llama, True, (True, 2, False)),
    (mistral, False, (True, 2, False)),
    (bert, True, (False, 1, False)),
]


@pytest.mark.parametrize("front", ["compile", "export"])
@pytest.mark.parametrize(("build", "padded", "expected"), MODELS)
def test_models_that_call_it(
    build: Callable[[], Any], padded: bool, expected: tuple[bool, int, bool], front: str
) -> None:
    pytest.importorskip("transformers")
    torchvision_stub.ensure()
    torch.manual_seed(0)
    model, options = build()
    model.eval()
    inputs = {"input_ids": torch.arange(24).view(2, 12), **({"attention_mask": PADDED} if padded else {}), **options}
    if front == "compile":
        torch._dynamo.reset()
        attnpass.reset()
        out = torch.compile(model, backend=backend, options={"inner": "eager"})(**inputs)[0]
        report = attnpass.report()
    else:
        program, report = attnpass.rewrite(export(model, (), inputs, strict=False))
        out = program.module()(**inputs)[0]
        calls = [n for n in program.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
        assert [_told(call) for call in calls] == [expected[1:]] * 2
    torch.testing.assert_close(out, model(**inputs)[0])
    assert [site.replaced for site in report.sites] == [expected[0]] * 2
    assert [site.spec.groups for site in report.sites] == [expected[1]] * 2


def _told(call: Node) -> tuple[int, bool]:
    args = bound(call)
    heads = [args[name].meta["val"].shape[1] for name in ("query", "key")]
    return heads[0] // heads[1], args["is_causal"]
