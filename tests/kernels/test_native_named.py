"""torch's own kernels by name: refusals, and what is written into a graph; on the CPU, and for CUDA by fake tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnpass.graph import Builder, State
from attnpass.kernels import Kernel, native, native_named, operands
from attnpass.kernels.native import Native
from attnpass.kernels.native_named import NativeCudnn, NativeEfficient, NativeFlash, NativeMath
from attnpass.site import Call
from attnpass.spec import BiasSpec, MaskSpec
from tests.flex_cases import Attention, Case, inputs
from tests.kernels.alone import BIASED, DENSE, FROM_THE_START, FULL, MASKS, PADDED, Alone, codes, held_to_float64, spec

CAUSAL, DENSELY = MaskSpec(causal=0), MaskSpec(dense=True)
ON_CPU = {NativeMath: "_scaled_dot_product_attention_math", NativeFlash: "_scaled_dot_product_flash_attention_for_cpu"}
ON_CUDA = {
    NativeMath: "_scaled_dot_product_attention_math",
    NativeFlash: "_scaled_dot_product_flash_attention",
    NativeEfficient: "_scaled_dot_product_efficient_attention",
    NativeCudnn: "_scaled_dot_product_cudnn_attention",
}
on_cpu = pytest.mark.parametrize("kind", ON_CPU, ids=lambda kind: kind.name)
by_case = pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


# -- on the CPU, where two of them run ---------------------------------------------------------------------------------


@on_cpu
@by_case
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_a_case_computes_the_same(case: Case, kind: type[Kernel], grad: bool) -> None:
    module, found = Attention(case), Alone(Attention(case), kind())
    given = inputs(45, 24, queries=33, grad=grad)
    assert not held_to_float64(module, given, found, grad=grad)
    if case is BIASED and grad and kind is NativeFlash:
        assert found.kernels == [None]
        assert found.refusals == ["bias_gradient"]
    else:
        assert found.kernels == [kind.name]
        assert any(ON_CPU[kind] in name for name in found.targets())
        assert not any("softmax" in name for name in found.targets())


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_have_masks_of_their_own_dtype(kind: type[Kernel], dtype: torch.dtype) -> None:
    # both operations read a mask of bool or of another float type as if it were of theirs
    module = Attention(DENSE, BIASED)
    found = Alone(module, kind())
    assert not held_to_float64(module, inputs(45, 24, queries=33, dtype=dtype), found, grad=False)
    assert found.kernels == [kind.name] * 2


@on_cpu
@pytest.mark.parametrize(("width", "v_width"), [(24, 40), (40, 24), (7, 7)])
def test_other_widths(kind: type[Kernel], width: int, v_width: int) -> None:
    module = Attention(FULL, DENSE)
    found = Alone(module, kind())
    assert not held_to_float64(module, inputs(45, width, v_width=v_width, grad=True), found, grad=True)
    assert found.kernels == [kind.name] * 2


@on_cpu
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_heads(kind: type[Kernel], kv_heads: int) -> None:
    module = Attention(FULL, PADDED)
    found = Alone(module, kind())
    assert not held_to_float64(module, inputs(45, 16, kv_heads=kv_heads, grad=True), found, grad=True)
    assert found.kernels == [kind.name] * 2


@on_cpu
def test_inductor_compiles_it(kind: type[Kernel]) -> None:
    module = Attention(FULL, FROM_THE_START, DENSE)
    found = Alone(module, kind(), inner="inductor")
    assert not held_to_float64(module, inputs(45, 16, grad=True), found, grad=True)
    assert found.kernels == [kind.name] * 3


@on_cpu
def test_symbolic_sizes(kind: type[Kernel]) -> None:
    module = Attention(FULL, PADDED)
    found = Alone(module, kind(), dynamic=None)
    for length in (45, 60, 52):
        assert not held_to_float64(module, inputs(length, 16, grad=True), found, grad=True)
    assert found.kernels == [kind.name] * 4  # compiled for one length, and then once for all


@on_cpu
def test_the_switches_for_all_of_torch_change_nothing(kind: type[Kernel]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    module = Attention(FULL)
    found = Alone(module, kind())
    other = SDPBackend.FLASH_ATTENTION if kind is NativeMath else SDPBackend.MATH
    given = inputs(45, 16)
    with sdpa_kernel(other), torch.profiler.profile() as seen, torch.no_grad():
        found(*given)
    ran = {event.name for event in seen.events()}
    assert f"aten::{ON_CPU[kind]}" in ran
    assert not {f"aten::{name}" for name in ON_CPU.values()} - {f"aten::{ON_CPU[kind]}"} & ran


# -- for CUDA, as far as fake tensors go -------------------------------------------------------------------------------


def emitted(
    kind: type[Kernel],
    *,
    mask: torch.Tensor | None = None,
    length: int = 45,
    width: int = 20,
    v_width: int = 20,
    kv_heads: int = 4,
    scale: float = 0.3,
    **said: Any,
) -> tuple[Node, Node]:
    """What a kernel writes for CUDA tensors: its call, and the result."""
    mode, graph = FakeTensorMode(allow_non_fake_inputs=True), Graph()

    def given(name: str, x: torch.Tensor) -> Node:
        node = graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        return node

    half = {"dtype": torch.bfloat16}
    shapes = ((2, 4, 33, width), (2, kv_heads, length, width), (2, kv_heads, length, v_width))
    q, k, v = (given(name, torch.empty(shape, **half)) for name, shape in zip("qkv", shapes, strict=True))
    known = spec(q=shapes[0], k=shapes[1], v=shapes[2], groups=4 // kv_heads, **said)
    call = Call(q=q, k=k, v=v, mask=None, scale=scale, groups=known.groups, spec=known)
    call = dataclasses.replace(call, mask=None if mask is None else given("mask", mask))
    b = Builder(graph, graph.output(q), mode=mode, state=State(grad=False), like=q)
    out = kind().emit(b, call)
    (found,) = [node for node in graph.nodes if ON_CUDA[kind] in str(node.target)]
    return found, out


def val(node: Any) -> torch.Tensor:
    found: torch.Tensor = node.meta["val"]
    return found


SHAPES = [(2, 4, 33, 45), (1, 1, 33, 45), (2, 1, 1, 45), (1, 4, 33, 1), (1, 1, 1, 45)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [NativeMath, NativeEfficient, NativeCudnn], ids=lambda kind: kind.name)
def test_masks_are_added_in_the_dtype_of_q(kind: type[Kernel], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    call, _ = emitted(kind, mask=torch.empty(shape, dtype=dtype))
    mask = val(call.args[3])
    assert mask.dtype == torch.bfloat16
    assert mask.shape[-1] == 45
    assert mask.stride(-1) == 1


@pytest.mark.parametrize("length", [45, 48])
@pytest.mark.parametrize("kind", [NativeMath, NativeEfficient, NativeCudnn], ids=lambda kind: kind.name)
def test_a_bias_with_heads_innermost_is_laid_out_along_the_keys(kind: type[Kernel], length: int) -> None:
    # as T5 reads it from a table: cuDNN read beyond it on an H200, and the efficient kernel refused it
    table = torch.empty(33, length, 4, dtype=torch.bfloat16)
    call, _ = emitted(kind, mask=table.permute(2, 0, 1)[None], length=length)
    mask = val(call.args[3])
    assert mask.stride(-1) == 1
    assert kind is not NativeEfficient or all(stride % 8 == 0 for stride in mask.stride()[:-1])


@pytest.mark.parametrize("length", [45, 48, 1, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_a_mask_begin_where_they_can_be_loaded(shape: tuple[int, ...], length: int) -> None:
    shape = (*shape[:3], length if shape[3] > 1 else 1)
    call, _ = emitted(NativeEfficient, mask=torch.empty(shape, dtype=torch.bool), length=length)
    mask = val(call.args[3])
    assert mask.shape == (2, 4, 33, length)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert mask.stride(-1) == 1


def test_rows_of_a_mask_of_symbolic_length() -> None:
    shapes, graph = ShapeEnv(), Graph()
    mode = FakeTensorMode(shape_env=shapes)
    dynamic = StatelessSymbolicContext(dynamic_sizes=[*[DimDynamic.STATIC] * 2, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    keys = mode.from_tensor(torch.empty(2, 4, 45, 24, dtype=torch.bfloat16), symbolic_context=dynamic)
    with mode:
        values = {"q": torch.empty_like(keys[:, :, :33]), "k": keys, "mask": keys.new_empty((2, 1, 33, keys.shape[2]))}
    q, k, mask = (graph.placeholder(name) for name in values)
    for node, value in zip((q, k, mask), values.values(), strict=True):
        node.meta["val"] = value
    known = spec(q=(2, 4, 33, 24), k=(2, 4, "s0", 24), v=(2, 4, "s0", 24))
    b = Builder(graph, graph.output(q), mode=mode, state=State(grad=False), like=q)
    NativeEfficient().emit(b, Call(q=q, k=k, v=k, mask=mask, scale=0.3, groups=1, spec=known))
    (call,) = [node for node in graph.nodes if ON_CUDA[NativeEfficient] in str(node.target)]
    stride = val(call.args[3]).stride(2)
    assert [stride.node.expr.subs(dict.fromkeys(stride.node.expr.free_symbols, n)) for n in (45, 48)] == [48, 56]


def test_a_mask_that_is_laid_out_well_is_not_copied() -> None:
    call, _ = emitted(NativeEfficient, mask=torch.empty((2, 4, 33, 48), dtype=torch.bfloat16), length=48)
    mask: Any = call.args[3]
    assert mask.target is torch.ops.aten.expand.default
    assert mask.args[0].op == "placeholder"


@pytest.mark.parametrize("kind", [NativeFlash, NativeEfficient, NativeCudnn], ids=lambda kind: kind.name)
def test_widths_are_filled_up_and_cut_off(kind: type[Kernel]) -> None:
    call, out = emitted(kind, width=20, v_width=20)
    assert [val(node).shape[-1] for node in call.args[:3]] == [24, 24, 24]
    assert call.kwargs["scale"] == 0.3
    assert val(out).shape == (2, 4, 33, 20)


def test_flash_fills_up_unlike_widths_and_others_need_not() -> None:
    for kind, widths in ((NativeFlash, [40, 40, 40]), (NativeEfficient, [24, 24, 40]), (NativeCudnn, [24, 24, 40])):
        call, out = emitted(kind, width=24, v_width=40)
        assert [val(node).shape[-1] for node in call.args[:3]] == widths
        assert val(out).shape == (2, 4, 33, 40)


@pytest.mark.parametrize("kind", ON_CUDA, ids=lambda kind: kind.name)
def test_flash_alone_shares_heads(kind: type[Kernel]) -> None:
    call, _ = emitted(kind, kv_heads=2)
    assert val(call.args[1]).shape[1] == (2 if kind is NativeFlash else 4)
    assert kind().shares_heads(spec(groups=2)) == (kind is NativeFlash)


@pytest.mark.parametrize("kind", [NativeEfficient, NativeCudnn], ids=lambda kind: kind.name)
def test_the_log_sum_exp_is_kept_for_a_backward_alone(kind: type[Kernel]) -> None:
    trained = (BiasSpec(shape=(1, 1, 1, 1), dtype="bfloat16", grad=True),)
    given = [{}, {"grad": True}, {"bias": trained}]
    assert [emitted(kind, **said)[0].args[4] for said in given] == [False, True, True]


@pytest.mark.parametrize("kind", ON_CUDA, ids=lambda kind: kind.name)
def test_no_kernel_is_given_a_negative_scale(kind: type[Kernel]) -> None:
    # they look for the greatest score before they scale
    call, _ = emitted(kind, scale=-0.25)
    assert call.kwargs["scale"] == 0.25


def test_heads_that_batch_rows_share_by_a_stride_of_zero_are_copied() -> None:
    graph, mode = Graph(), FakeTensorMode()
    node = graph.placeholder("k")
    with mode:
        node.meta["val"] = torch.empty((1, 4, 33, 24), device="cuda").expand(2, -1, -1, -1)
        b = Builder(graph, graph.output(node), mode=mode, state=State(grad=False), like=node)
        assert val(operands.loadable(b, node)).stride() == (3168, 792, 24, 1)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_plain_attention_is_refused_by_none() -> None:
    assert [codes(kind()) for kind in ON_CUDA] == [[]] * 4
    assert [codes(kind(), device="cpu") for kind in ON_CPU] == [[]] * 2


def test_two_are_taken_by_name_alone() -> None:
    assert {kind for kind in ON_CUDA if kind.only_by_name} == {NativeMath, NativeCudnn}


def test_dropout_that_would_go_to_cudnn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codes(Native(), dropout=0.1) == []
    monkeypatch.setattr(native, "_prefers_cudnn", lambda: True)
    assert codes(Native(), dropout=0.1) == ["kernel_bug"]
    assert codes(Native(), dropout=0.1, dtype="float32") == []
    assert codes(NativeEfficient(), dropout=0.1) == []


SHORT = (2, 8, 100, 64)
NARROW, WIDE, WIDER = (2, 8, 256, 20), (2, 8, 256, 192), (2, 8, 256, 264)
ROWS = (65536, 8, 16, 64)
REFUSED: list[tuple[type[Kernel], dict[str, Any], list[str]]] = [
    (NativeMath, {"device": "xpu"}, ["device"]),
    (NativeMath, {"softcap": 5.0}, ["softcap"]),
    (NativeMath, {"sink": True}, ["sink"]),
    (NativeMath, {"bias": (BiasSpec(shape=(1, 8, 256, 256), dtype="float32", exact=False),)}, ["bias_precision"]),
    (NativeFlash, {"mask": DENSELY}, ["dense_mask"]),
    (NativeFlash, {"bias": (BiasSpec(shape=(1, 8, 256, 256), dtype="bfloat16"),)}, ["dense_mask"]),
    (NativeFlash, {"mask": CAUSAL}, []),
    (NativeFlash, {"mask": CAUSAL, "k": SHORT, "v": SHORT}, ["no_form"]),
    (NativeFlash, {"dtype": "float32"}, ["dtype"]),
    (NativeFlash, {"q": WIDER, "k": WIDER, "v": WIDER}, ["head_width"]),
    (NativeFlash, {"q": WIDE, "k": WIDE}, ["unlike_widths"]),
    (NativeFlash, {"q": (2, 8, 256, "s1"), "k": (2, 8, 256, "s1"), "v": (2, 8, 256, "s1")}, ["head_width"]),
    (NativeFlash, {"q": ROWS, "k": ROWS, "v": ROWS}, ["no_form"]),
    (NativeMath, {"q": ROWS, "k": ROWS, "v": ROWS}, []),
    (NativeFlash, {"device": "cpu", "dropout": 0.1}, ["dropout"]),
    (NativeFlash, {"device": "cpu", "bias": (BiasSpec(shape=(), dtype="bfloat16", grad=True),)}, ["bias_gradient"]),
    (NativeFlash, {"device": "cpu", "mask": DENSELY, "dtype": "float64"}, []),
    (NativeFlash, {"grad": True, "deterministic": True, "dropout": 0.1}, []),
    (NativeEfficient, {"device": "cpu"}, ["device"]),
    (NativeEfficient, {"dtype": "float64"}, ["dtype"]),
    (NativeEfficient, {"dtype": "float32", "q": WIDER, "k": WIDER, "v": NARROW, "mask": DENSELY}, []),
    (NativeEfficient, {"q": (2, 8, 256, "s1"), "k": (2, 8, 256, "s1")}, ["head_width"]),
    (NativeEfficient, {"bias": (BiasSpec(shape=(1, 8, 1, 1), dtype="bfloat16", grad=True),)}, []),
    (
        NativeEfficient,
        {"q": (1, 1, 70000, 8), "k": (1, 1, 70000, 8), "v": (1, 1, 70000, 8), "mask": DENSELY},
        ["kernel_bug"],
    ),
    (NativeEfficient, {"q": (1, 1, 70000, 8), "k": (1, 1, 70000, 8), "v": (1, 1, 70000, 8), "mask": CAUSAL}, []),
    (NativeCudnn, {"dtype": "float32"}, ["dtype"]),
    (NativeCudnn, {"q": WIDE, "k": WIDE, "v": WIDE}, ["head_width"]),
    (NativeCudnn, {"k": (2, 8, 1, 64), "v": (2, 8, 1, 64)}, ["no_form"]),
    (NativeCudnn, {"dropout": 0.125}, ["kernel_bug"]),
    (NativeCudnn, {"deterministic": True}, ["not_deterministic"]),
    (NativeCudnn, {"deterministic": True, "grad": True}, ["not_deterministic"]),
    (NativeCudnn, {"bias": (BiasSpec(shape=(1, 8, 1, 1), dtype="bfloat16", grad=True),)}, ["bias_gradient"]),
    (NativeCudnn, {"mask": DENSELY, "grad": True}, []),
    (NativeCudnn, {"mask": DENSELY, "grad": True, "k": (2, 8, 192, 64), "v": (2, 8, 192, 64)}, ["kernel_bug"]),
    (NativeCudnn, {"mask": DENSELY, "grad": True, "k": (2, 8, "s0", 64), "v": (2, 8, "s0", 64)}, ["kernel_bug"]),
    (NativeCudnn, {"mask": DENSELY, "k": (2, 8, 192, 64), "v": (2, 8, 192, 64)}, []),
    (NativeCudnn, {"grad": True, "k": (2, 8, 192, 64), "v": (2, 8, 192, 64)}, []),
]


@pytest.mark.parametrize(("kind", "changes", "expected"), REFUSED, ids=str)
def test_what_each_refuses(
    kind: type[Kernel], changes: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_named, "_cudnn", lambda: 91500)
    monkeypatch.setattr(native_named, "_capability", lambda: (9, 0))
    assert codes(kind(), **changes) == expected


@pytest.mark.parametrize(
    ("kind", "capability", "changes", "expected"),
    [
        (NativeFlash, (7, 5), {}, ["unavailable"]),
        (NativeCudnn, (7, 5), {}, ["unavailable"]),
        (NativeEfficient, (7, 5), {"dtype": "float16"}, []),
        (NativeEfficient, (7, 5), {}, ["dtype"]),
        (NativeFlash, (8, 9), {"q": WIDE, "k": WIDE, "v": WIDE, "grad": True}, []),
        (
            NativeFlash,
            (8, 9),
            {"q": (1, 1, 9, 200), "k": (1, 1, 9, 200), "v": (1, 1, 9, 200), "grad": True},
            ["head_width"],
        ),
        (NativeFlash, (9, 0), {"q": (1, 1, 9, 200), "k": (1, 1, 9, 200), "v": (1, 1, 9, 200), "grad": True}, []),
        (NativeCudnn, (9, 0), {"q": WIDE, "k": WIDE, "v": (2, 8, 256, 128)}, []),
        (NativeCudnn, (8, 0), {"q": WIDE, "k": WIDE, "v": (2, 8, 256, 128)}, ["head_width"]),
    ],
    ids=str,
)
def test_what_each_refuses_by_the_gpu(
    kind: type[Kernel],
    capability: tuple[int, int],
    changes: dict[str, Any],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_named, "_cudnn", lambda: 91500)
    monkeypatch.setattr(native_named, "_capability", lambda: capability)
    assert codes(kind(), **changes) == expected


def test_without_a_gpu_two_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = [kind().available() is None for kind in ON_CUDA]
    assert there == [True, True, False, False]
    assert NativeMath().version() == torch.__version__


def test_an_old_cudnn_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native_named, "_cudnn", lambda: 8900)
    missing = NativeCudnn().available()
    assert missing is not None
    assert "cuDNN 9" in missing.text
