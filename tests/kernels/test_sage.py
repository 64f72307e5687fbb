"""SageAttention on the CPU: availability, refusals, and the operation around stand-ins with the package's faults."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import attnpass
from attnpass.kernels import late, sage
from attnpass.kernels.base import Kernel
from attnpass.kernels.sage import (
    Sage,
    SageFp8Cuda,
    SageFp8CudaSm90,
    SageFp16Cuda,
    SageFp16Triton,
    SageKernel,
    SageVarlen,
)
from attnpass.kernels.sage_ops import FORMS, operation
from attnpass.spec import MaskSpec
from tests.flex_cases import Attention, Case, inputs, masked, scores, weighted
from tests.kernels.alone import FULL, MASKS, PADDED, Alone, causal_from_the_start, codes, held_to_float64

KINDS: tuple[type[SageKernel], ...] = (
    Sage,
    SageVarlen,
    SageFp16Triton,
    SageFp16Cuda,
    SageFp8Cuda,
    SageFp8CudaSm90,
)
CAUSAL = MaskSpec(causal=0)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
in_models = pytest.mark.parametrize("kind", [Sage, SageVarlen], ids=lambda kind: kind.name)  # the others are as `sage`
by_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> Iterator[None]:
    attnpass.reset()
    forget()
    yield
    attnpass.reset()
    forget()


def forget() -> None:
    late.imported.cache_clear()
    sage._release.cache_clear()


# -- a stand-in --------------------------------------------------------------------------------------------------------
# What the two releases are documented to compute, and what they do wrong. Nothing is rounded to fewer bits.


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """(batch, length, heads, width); the diagonal starts at the first query and the first key."""
    times = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(times, 2) for x in (k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    if causal:
        assert q.shape[1] == k.shape[1]
        weights = weights.masked_fill(~torch.ones(weights.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v.double()).to(q.dtype)


def checked(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1, "Last dim of qkv must be contiguous."
        unit = 16 // x.element_size()
        assert all(step and step % unit == 0 for step in x.stride()[:-1]), "misaligned address"
        assert x.data_ptr() % 16 == 0, "misaligned address"


def overrun(out: Tensor, causal: bool) -> Tensor:
    """Triton's causal kernels read the scale of a block of 64 keys that is none of theirs."""
    if causal and 0 < out.shape[1] % 128 <= 64:
        out[-1, out.shape[1] // 128 * 128 :, -1] = math.nan
    return out


def first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> Tensor:
    assert tensor_layout == "NHD"
    assert q.shape[-1] in (64, 96, 128), "headdim should be in [64, 96, 128]."
    assert sm_scale is not None
    checked(q, k, v)
    if smooth_k:
        k -= k.mean(1, keepdim=True)
    if not is_causal and k.shape[1] % 64:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % 64)) for x in (k, v))
    return overrun(attended(q, k, v, is_causal, sm_scale), is_causal)


def second(form: str) -> Any:
    known = FORMS[form]

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        assert tensor_layout == "NHD"
        assert not kwargs  # would be swallowed
        width = q.shape[-1]
        q, k, v = (torch.nn.functional.pad(x, (0, (64 if width <= 64 else 128) - width)) for x in (q, k, v))
        checked(q, k, v)
        out = attended(q, k - k.mean(1, keepdim=True), v, is_causal, width**-0.5 if sm_scale is None else sm_scale)
        if known.eight_bit_values:
            times = q.shape[2] // v.shape[2]
            out = out.masked_fill((v == 0).all(1, keepdim=True).repeat_interleave(times, 2), math.nan)
        if form == "fp16_triton":
            out = overrun(out, is_causal)
        return out[..., :width]

    return run


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> Tensor:
    assert not is_causal
    assert not kwargs
    assert sm_scale is not None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int64  # 32 bits overflow when multiplied with a stride
    checked(q, k, v)
    if smooth_k:
        k = k - k.mean(0, keepdim=True)
    out = torch.zeros_like(q)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for row in range(len(ends_q) - 1):
        mine, seen = slice(*ends_q[row : row + 2]), slice(*ends_k[row : row + 2])
        assert ends_q[row + 1] - ends_q[row] <= max_seqlen_q
        assert ends_k[row + 1] - ends_k[row] <= max_seqlen_k
        if ends_k[row] != ends_k[row + 1]:
            out[mine] = attended(q[None, mine], k[None, seen], v[None, seen], False, sm_scale)[0]
    return out


def installed(monkeypatch: pytest.MonkeyPatch, version: str = "2.2.0", **parts: Any) -> ModuleType:
    """A package of this release."""
    module, core = ModuleType("sageattention"), ModuleType("sageattention.core")
    entries = {"sageattn": first} if version == "1.0.6" else {FORMS[form].function: second(form) for form in FORMS}
    if version != "1.0.6":
        entries |= {"sageattn_varlen": varlen, "sageattn": second("sage")}
        vars(core).update({"SM80_ENABLED": True, "SM89_ENABLED": True, "SM90_ENABLED": True} | parts)
    vars(module).update(entries)
    monkeypatch.setitem(sys.modules, "sageattention", module)
    monkeypatch.setitem(sys.modules, "sageattention.core", core)
    monkeypatch.setattr(sage, "version_of", lambda *names: version)
    forget()
    return module


def has_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)


def here(kind: type[SageKernel], monkeypatch: pytest.MonkeyPatch, version: str = "2.2.0") -> SageKernel:
    """The kernel as if it ran on the CPU, in float64 too."""
    installed(monkeypatch, version)
    monkeypatch.setattr(kind, "available", lambda self: None)
    can = dataclasses.replace(
        kind.can, devices=frozenset({"cpu"}), dtypes=frozenset({"float64", "float32", "bfloat16"})
    )
    monkeypatch.setattr(kind, "can", can)
    return kind()


# -- available ---------------------------------------------------------------------------------------------------------


def missing(kernel: Kernel) -> str:
    found = kernel.available()
    assert found is not None
    assert found.code == "unavailable"
    return found.text


@by_kind
def test_nothing_is_imported_without_a_gpu(kind: type[SageKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sage, "imported", None)
    assert "NVIDIA" in missing(kind())


@by_kind
def test_not_installed(kind: type[SageKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    text = missing(kind())
    assert "not installed" in text
    assert "thu-ml/SageAttention" in text
    assert ("pip install" in text) == (kind is Sage)  # what pip has is 1.0.6, which none of the others can use


@by_kind
def test_a_broken_build_is_a_reason(kind: type[SageKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name == "sageattention":
                raise OSError("libcudart.so.12: cannot open shared object file")

    has_gpu(monkeypatch)
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert "libcudart.so.12" in missing(kind())


@by_kind
def test_1_0_6_has_one_kernel(kind: type[SageKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.0.6")
    has_gpu(monkeypatch)
    if kind is Sage:
        assert kind().available() is None
        assert kind().version() == "1.0.6"
    else:
        assert "1.0.6" in missing(kind())
        assert "2.2" in missing(kind())


@by_kind
@pytest.mark.parametrize("version", ["1.0.5", "2.0.1", ""])
def test_other_releases_are_not_trusted(kind: type[SageKernel], version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, version)
    has_gpu(monkeypatch)
    assert f"SageAttention {version or 'of no version'}" in missing(kind())


@by_kind
@pytest.mark.parametrize("version", ["2.2.0", "2.2.0+cu130torch2.11", "2.10.0"])
def test_2_2_and_above(kind: type[SageKernel], version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, version)
    has_gpu(monkeypatch)
    assert kind().available() is None


@pytest.mark.parametrize(
    ("kind", "capability", "runs"),
    [
        (Sage, (8, 6), True),
        (Sage, (10, 0), False),
        (Sage, (12, 0), True),
        (SageFp8CudaSm90, (8, 9), False),
        (SageFp8CudaSm90, (12, 0), False),
        (SageFp8Cuda, (8, 6), False),
        (SageFp8Cuda, (8, 9), True),
        (SageFp16Cuda, (8, 0), True),
        (SageFp16Triton, (12, 0), False),
        (SageVarlen, (12, 0), False),
        (SageVarlen, (7, 5), False),
    ],
)
def test_gpus(kind: type[SageKernel], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    has_gpu(monkeypatch, capability)
    if runs:
        assert kind().available() is None
    else:
        assert "compute capability" in missing(kind())


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (Sage, "SM90_ENABLED"),
        (SageFp8CudaSm90, "SM90_ENABLED"),
        (SageFp8Cuda, "SM89_ENABLED"),
        (SageFp16Cuda, "SM80_ENABLED"),
    ],
)
def test_what_was_not_compiled(kind: type[SageKernel], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, **{part: False})
    has_gpu(monkeypatch)
    assert part in missing(kind())


def test_an_entry_point_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = installed(monkeypatch, "3.0")
    has_gpu(monkeypatch)
    del vars(module)["sageattn_qk_int8_pv_fp16_triton"]
    assert "has no sageattn_qk_int8_pv_fp16_triton" in missing(SageFp16Triton())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sage, "version_of", lambda *names: request.param)
    forget()
    return str(request.param)


second_release = pytest.mark.parametrize("release", ["2.2.0"], indirect=True)


@by_kind
@second_release
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"groups": 4, "k": (2, 2, 256, 64), "v": (2, 2, 256, 64)}, None),
        ({"device": "cpu"}, "device"),
        ({"dtype": "float32"}, "dtype"),
        ({"q": (2, 8, 256, 136), "k": (2, 8, 256, 136), "v": (2, 8, 256, 136)}, "head_width"),
        ({"q": (2, 8, 256, "s0"), "k": (2, 8, 256, "s0"), "v": (2, 8, 256, "s0")}, "head_width"),
        ({"v": (2, 8, 256, 128)}, "unlike_widths"),
        ({"mask": MaskSpec(dense=True)}, "no_form"),
        ({"mask": MaskSpec(causal=0, window=(9, None))}, "no_form"),
        ({"mask": MaskSpec(document=True)}, "no_form"),
        ({"softcap": 30.0}, "softcap"),
        ({"sink": True}, "sink"),
        ({"dropout": 0.1}, "dropout"),
        ({"grad": True}, "grad"),
        ({"q": (70000, 8, 2, 64), "k": (70000, 8, 2, 64), "v": (70000, 8, 2, 64)}, "no_form"),
        ({"q": (2, 70000, 2, 64), "k": (2, 70000, 2, 64), "v": (2, 70000, 2, 64)}, "no_form"),
        ({"k": (64, 8, 2**15, 64), "v": (64, 8, 2**15, 64)}, "no_form"),
    ],
)
def test_refusals(kind: type[SageKernel], release: str, changes: dict[str, Any], code: str | None) -> None:
    assert set(codes(kind(), **changes)) == (set() if code is None else {code})


@by_kind
@second_release
def test_causal_masks_and_padded_keys(kind: type[SageKernel], release: str) -> None:
    other = {"k": (2, 8, 300, 64), "v": (2, 8, 300, 64)}
    varying = dict.fromkeys("qkv", (2, 8, "s0", 64))
    alone = kind is SageVarlen
    assert codes(kind(), mask=CAUSAL) == (["no_form"] if alone else [])
    assert codes(kind(), mask=CAUSAL, **varying) == (["no_form"] if alone else [])
    assert codes(kind(), mask=CAUSAL, **(varying | {"q": (2, 8, 1, 64)}))
    assert codes(kind(), mask=MaskSpec(causal=44), **other)
    assert codes(kind(), **other) == []
    assert codes(kind(), mask=MaskSpec(key_padding=True)) == ([] if alone else ["no_form"])


@pytest.mark.parametrize("release", ["1.0.6"], indirect=True)
def test_what_1_0_6_does_wrong_is_refused(release: str) -> None:
    def widths(width: int) -> dict[str, Any]:
        return dict.fromkeys("qkv", (2, 8, 256, width))

    def keys(length: int | str) -> dict[str, Any]:
        return dict.fromkeys("kv", (2, 8, length, 64))

    assert codes(Sage(), **widths(96)) == []
    assert codes(Sage(), **widths(80)) == ["head_width"]
    assert codes(Sage(), **keys(320)) == []
    assert codes(Sage(), **keys(300)) == ["kernel_bug"]
    assert codes(Sage(), **keys("s0")) == ["kernel_bug"]
    # what fills a causal mask's last block up stands behind all queries
    assert codes(Sage(), mask=CAUSAL, **dict.fromkeys("qkv", (2, 8, 300, 64))) == []


def test_none_is_taken_unless_approximations_are_allowed() -> None:
    assert all(kind.can.approximate and not kind.can.backward for kind in KINDS)


# -- the operation -----------------------------------------------------------------------------------------------------


def operands(length: int, width: int, *, queries: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    return inputs(length, width, queries=queries, dtype=dtype)[:3]


@by_form
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("length", "width"), [(192, 64), (45, 40), (200, 96), (129, 128)])
def test_the_operation_computes_attention(
    form: str, causal: bool, length: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "sage_varlen" and causal:
        pytest.skip("it has none")
    if form == "sage1" and (width == 40 or (length % 64 and not causal)):
        pytest.skip("refused")
    installed(monkeypatch, "1.0.6" if form == "sage1" else "2.2.0")
    q, k, v = operands(length, width)
    before = k.clone()
    args = (q, k, v, None, None, form, 0.3, causal)
    out = operation(form)(*args)
    expected = attended(*(x.transpose(1, 2) for x in (q, k, v)), causal, 0.3).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(k, before)
    assert out.transpose(1, 2).stride()[2:] == ((width if form == "sage1" else 64 if width <= 64 else 128), 1)
    if form in ("sage1", "sage", "sage_varlen") and length in (192, 129):
        torch.library.opcheck(operation(form), args, test_utils=("test_schema", "test_faketensor"))


@by_form
def test_operands_of_any_strides(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.0.6" if form == "sage1" else "2.2.0")
    q, k, v = operands(64, 64)
    expected = attended(*(x.transpose(1, 2) for x in (q, k, v)), False, 0.3).transpose(1, 2)
    apart = torch.randn(2, 4, 64, 65)[..., 1:].copy_(q)  # no row starts at a multiple of 16 bytes
    backwards = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    out = operation(form)(apart, backwards, v, None, None, form, 0.3, False)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    shared = operation(form)(q, k[:, :1].expand(-1, 2, -1, -1), v, None, None, form, 0.3, False)
    assert shared.shape == q.shape


@by_form
def test_columns_of_zeros(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.0.6" if form == "sage1" else "2.2.0")
    q, k, v = operands(64, 64)
    v[0, 1, :, 5] = 0.0
    v[1, 0, 3, 7] = math.nan
    out = operation(form)(q, k, v, None, None, form, 0.3, False)
    assert (out[0, 2:, :, 5] == 0).all()
    assert out[0].isfinite().all()
    assert out[1, :2, :, 7].isnan().all()  # what the original has too


def test_what_no_cuda_graph_can_hold_says_so() -> None:
    captured = {form for form in FORMS if torch.Tag.cudagraph_unsafe not in operation(form).tags}
    assert captured == {"sage1", "fp16_triton"}


def test_more_elements_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    q = torch.empty(1, 1, 1, 64).expand(64, 1, 2**20, 64)
    with pytest.raises(RuntimeError, match="32 bits"):
        operation("sage")(q, q, q, None, None, "sage", 1.0, False)


# -- a compiled model --------------------------------------------------------------------------------------------------


@in_models
@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_a_case_computes_the_same_or_is_refused(
    case: Case, kind: type[SageKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, found = Attention(case), Alone(Attention(case), here(kind, monkeypatch))
    assert not held_to_float64(module, inputs(45, 24), found, grad=False)
    causal = kind is not SageVarlen and case.name in ("causal_from_the_start", "causal_to_the_end")
    padding = kind is SageVarlen and case is PADDED
    assert found.kernels == [kind.name if case is FULL or causal or padding else None]


@pytest.mark.parametrize("width", [64, 96])
def test_1_0_6(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in MASKS if case.name in ("full", "causal_from_the_start")]
    module = Attention(*cases)
    found = Alone(module, here(Sage, monkeypatch, "1.0.6"))
    assert not held_to_float64(module, inputs(64, width), found, grad=False)
    assert found.kernels == ["sage", "sage"]
    assert not held_to_float64(module, inputs(45, width), found, grad=False)
    assert found.kernels[2:] == [None, "sage"]


@in_models
def test_symbolic_lengths(kind: type[SageKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    def itself(q: Tensor, *rest: Tensor) -> Tensor:
        return causal_from_the_start(q, q[:, :2], q[:, 2:])  # of one length, proved

    cases = (FULL,) if kind is SageVarlen else (FULL, Case("itself", itself))
    module = Attention(*cases)
    found = Alone(module, here(kind, monkeypatch), dynamic=None)
    for length in (45, 130, 200):
        assert not held_to_float64(module, inputs(length, 64), found, grad=False)
    assert len(found.graphs) == 2  # the first length, and all others
    assert found.kernels == [kind.name] * len(cases) * 2


def test_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Attention(FULL, PADDED)
    for kind in (Sage, SageVarlen):
        found = Alone(module, here(kind, monkeypatch), inner="inductor")
        assert not held_to_float64(module, inputs(45, 24), found, grad=False)
        assert kind.name in found.kernels


def falling(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    return weighted(scores(q, k) * -1.0, v, q)


def test_a_scale_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Attention(Case("falling", falling))
    found = Alone(module, here(SageFp8CudaSm90, monkeypatch))
    assert not held_to_float64(module, inputs(45, 24), found, grad=False)
    assert found.kernels == ["sage_qk_int8_pv_fp8_cuda_sm90"]
    (call,) = [n for gm in found.graphs for n in gm.graph.nodes if "sage_uncaptured" in str(n.target)]
    assert call.args[6] > 0  # the kernels take the greatest product for the greatest score


def zeroed(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    return masked(scores(q, k), pad[:, None, None, :]).softmax(-1) @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("rows", ["one", "all"])
def test_batch_rows_without_a_key(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Attention(Case("zeroed", zeroed))
    found = Alone(module, here(SageVarlen, monkeypatch))
    q, k, v, pad, *rest = inputs(45, 24)
    pad = pad.clone()
    pad[1 if rows == "one" else slice(None)] = False
    assert not held_to_float64(module, (q, k, v, pad, *rest), found, grad=False)
    assert found.kernels == ["sage_varlen"]


def test_keys_that_nobody_sees_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~pad[:, None, None, :], -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)

    module = Attention(Case("filled", filled))
    found = Alone(module, here(SageVarlen, monkeypatch))
    q, k, v, pad, *rest = inputs(45, 24)
    k = k.masked_fill(~pad[:, None, :, None], math.nan)
    assert not held_to_float64(module, (q, k, v, pad, *rest), found, grad=False)
    assert found.kernels == ["sage_varlen"]
