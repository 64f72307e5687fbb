"""flash-attn 2 and 3 on the CPU: through functions that keep the contracts of both packages (standins.py)."""

from __future__ import annotations

import importlib.metadata
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx import GraphModule

import attnpass
from attnpass import functions
from attnpass.kernels import flash, flash3, flash_base, late
from attnpass.kernels.flash import Flash, FlashVarlen
from attnpass.kernels.flash3 import Flash3, Flash3Hub, FlashVarlen3
from attnpass.kernels.flash_base import FlashKernel
from attnpass.kernels.flash_ops import define
from attnpass.spec import AttentionSpec, BiasSpec, MaskSpec
from tests.flex_cases import BY_NAME, Attention, Case, capped, grid, inputs, masked, scores, weighted
from tests.kernels import standins
from tests.kernels.matrix import (
    FEATURES,
    INF,
    Problem,
    Through,
    complaints,
    flash_operation,
    given,
    held_to_float64,
    served,
)

# the log-sum-exp is float32, which eager code does not need
FLOORS = {torch.float32: 32.0}
KINDS: tuple[type[FlashKernel], ...] = (Flash, FlashVarlen, Flash3, FlashVarlen3)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
# these have all that the others of their family have, and the same operation
by_operation = pytest.mark.parametrize("kind", [FlashVarlen, FlashVarlen3], ids=lambda kind: kind.vendor.name)


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both packages stand in, and nothing that was found out about them before counts."""
    standins.flash_2(monkeypatch)
    standins.flash_3(monkeypatch)
    forget()
    attnpass.reset()
    yield
    forget()
    attnpass.reset()


def forget() -> None:
    late.imported.cache_clear()
    flash._function.cache_clear()
    flash3._hub_ops.cache_clear()
    flash_base.trial.cache_clear()


def on_cpu(kind: type[FlashKernel]) -> FlashKernel:
    """The kernel with a table that takes the CPU and float32 as well; the rest is its own."""
    can = replace(kind.can, devices=frozenset({"cpu"}), dtypes=kind.can.dtypes | {"float32"})

    def available(self: FlashKernel) -> None:
        return None

    return type(f"{kind.__name__}OnCpu", (kind,), {"can": can, "available": available})()


def spec(**changes: Any) -> AttentionSpec:
    shape = (2, 4, 128, 64)
    plain = {"q": shape, "k": shape, "v": shape, "dtype": "bfloat16", "device": "cuda", "scale": 0.125}
    return AttentionSpec(**{**plain, **changes})


def refused(kernel: FlashKernel, **changes: Any) -> set[str]:
    return {reason.code for reason in kernel.refusals(spec(**changes))}


# -- the operations ----------------------------------------------------------------------------------------------------

SMALL = [
    *FEATURES,
    Problem(batch=3, kv_heads=2, queries=1, keys=40),
    Problem(batch=3, kv_heads=2, queries=1, keys=40, padding="holes"),
    Problem(queries=30, keys=50, kv_heads=1, left=9, right=0),
    Problem(queries=50, keys=30, right=0),
    Problem(queries=50, keys=30, right=0, sink=True),
    Problem(queries=30, keys=50, padding="row", sink=True, kv_heads=2),
    Problem(layout="plain", kv_heads=2),
    Problem(layout="odd", kv_heads=2, right=0),
    Problem(layout="odd", padding="holes"),
]


@by_operation
@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_an_operation_computes_what_it_says(kind: type[FlashKernel], problem: Problem) -> None:
    # what the stand-in for 3 leaves out, as a real build of it does
    without_cap = issubclass(kind, Flash3)
    if not served(problem, kind()) or (without_cap and problem.softcap):
        pytest.skip("not what it declares")
    assert not complaints(flash_operation(kind()), problem, "cpu", torch.float32)


@by_operation
@pytest.mark.parametrize("layout", ["model", "plain", "odd"])
@pytest.mark.parametrize("extra", [{"right": 0, "sink": True}, {"padding": "holes"}], ids=["sink", "padded"])
def test_an_operation_is_what_torch_takes_it_for(kind: type[FlashKernel], layout: str, extra: Any) -> None:
    """Fakes with the true strides, a backward that is an operation, sizes that are symbols."""
    problem = Problem(queries=9, keys=20, kv_heads=2, width=16, layout=layout, **extra)
    x, vendor = given(problem, "cpu", torch.float32), kind().vendor
    order = ends = None
    if x.seen is not None:
        order = torch.randperm(2 * 20)
        ends = torch.tensor([0, 14, 29], dtype=torch.int32)
    right = -1 if problem.right is None else problem.right
    args = (x.q, x.k, x.v, None, x.sink, order, ends, 0.3, -1, right, 0.0, 0.0, False)
    torch.library.opcheck(define(vendor), args)
    with torch.no_grad():
        out, lse, rng = define(vendor)(*args)
        back = getattr(torch.ops.attnpass, f"{vendor.name}_backward").default
        torch.library.opcheck(back, (torch.randn_like(out), x.q, x.k, x.v, out, lse, rng, *args[3:]))
    # the model's transpose and reshape are views
    assert out.transpose(1, 2).is_contiguous()


@by_operation
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_inductor_calls_the_function_alone(kind: type[FlashKernel], grad: bool) -> None:
    """Without what torch puts around an operation that has a gradient."""
    through = Through(module := Attention(BY_NAME["causal"]), on_cpu(kind), inner="inductor")
    x = inputs(width=32, grad=grad)
    with fresh_cache():
        failed, code = run_and_get_code(held_to_float64, module, x, through, grad=grad, floors=FLOORS)
    assert not failed
    called = set(re.findall(r"torch\.ops\.attnpass\.(\w+)", "\n".join(code)))
    name = kind.vendor.name
    assert called == {f"{name}_only", *([f"{name}_backward_only"] if grad else [])}
    only = getattr(torch.ops.attnpass, f"{name}_only").default
    assert only.tags == define(kind.vendor).tags  # type: ignore[attr-defined]


def test_other_compilers_keep_the_operation_that_has_a_gradient() -> None:
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    op = define(Flash3.vendor)
    x = given(Problem(width=16), "cpu", torch.float32)
    compiled = torch.compile(
        lambda q: op(q, x.k, x.v, None, None, None, None, 0.3, -1, -1, 0.0, 0.0, False)[0],
        backend=aot_autograd(fw_compiler=keep, decompositions=torch.export.default_decompositions()),
    )
    with torch.no_grad():
        compiled(x.q)
    assert [node.target for node in graphs[0].graph.nodes].count(op) == 1


def test_the_result_of_odd_widths_of_values_has_the_strides_of_its_fake() -> None:
    problem = Problem(width=64, v_width=96, queries=9, keys=20)
    assert not complaints(flash_operation(Flash3()), problem, "cpu", torch.float32)
    x = given(problem, "cpu", torch.float32)
    args = (x.q, x.k, x.v, None, None, None, None, 0.3, -1, -1, 0.0, 0.0, False)
    torch.library.opcheck(define(Flash3().vendor), args)


def test_dropout_drops_the_same_in_the_backward() -> None:
    """Values that are the unit matrix show the probabilities, from which the gradients are computed by hand."""
    q, k, w = (torch.randn(2, 3, 32, 32, dtype=torch.float32, requires_grad=True) for _ in range(3))
    op = define(Flash().vendor)

    def call(v: Tensor, p: float) -> Tensor:
        torch.manual_seed(1)
        found: Tensor = op(q, k, v, None, None, None, None, 0.3, -1, -1, 0.0, p, False)[0]
        return found

    unit = torch.eye(32).expand(2, 3, 32, 32)
    keep = (call(unit, 0.4) != 0).float() / 0.6
    assert 0.5 < float((keep > 0).float().mean()) < 0.7
    by_hand = (torch.softmax(q @ k.mT * 0.3, -1) * keep) @ w
    out = call(w, 0.4)
    torch.testing.assert_close(out, by_hand)
    for mine, true in zip(
        torch.autograd.grad(out.sin().sum(), (q, k, w)),
        torch.autograd.grad(by_hand.sin().sum(), (q, k, w)),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_two_calls_with_dropout_are_not_merged() -> None:
    op = define(Flash().vendor)
    assert torch.Tag.nondeterministic_seeded in op.tags  # type: ignore[attr-defined]
    assert torch.Tag.nondeterministic_seeded not in define(Flash3().vendor).tags  # type: ignore[attr-defined]


def test_a_build_without_a_version_is_told_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flash_attn_3"
    package.mkdir()
    (package / "__init__.py").touch()
    assert Flash3().version() == ""
    monkeypatch.delitem(sys.modules, "flash_attn_3")
    monkeypatch.syspath_prepend(tmp_path)
    (package / "_C.so").write_bytes(bytes(123))
    assert Flash3().version() == "unversioned, 123 bytes"


# -- through the pass --------------------------------------------------------------------------------------------------


def _pads(kind: str, length: int = 200) -> Tensor:
    j = torch.arange(length)
    rows = {
        "left": (j >= 37, j >= 150),
        "right": (j < 163, j < 11),
        "holes": (j % 3 != 1, (j < 50) | (j > 90)),
        "row": (j < 163, j < 0),
    }[kind]
    return torch.stack(rows)


def padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    return weighted(masked(scores(q, k), pad[:, None, None, :]), v, q)


def padded_by_infinity(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
    return weighted(scores(q, k).masked_fill(~pad[:, None, None, :], -INF), v, q)


def alibi(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1, device=q.device).view(1, -1, 1, 1)
    return weighted(masked(scores(q, k) + slopes * (j - i), j <= i), v, q)


def upwards(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(-scores(q, k), j <= i), v, q)


def nothing(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    return weighted(masked(scores(q, k) * 0.0, grid(q, k)[1] <= grid(q, k)[0]), v, q)


def capped_alibi(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1, device=q.device).view(1, -1, 1, 1)
    return weighted(masked(capped(scores(q, k)) + slopes * (j - i), j <= i), v, q)


def capped_window(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    i, j = grid(q, k)
    return weighted(masked(capped(scores(q, k)), (j <= i) & (j > i - 50)), v, q)


SERVED = {
    Flash: [
        *(BY_NAME[name] for name in ("cap_alone", "causal", "window", "sink")),
        Case("alibi", alibi),
        Case("capped_alibi", capped_alibi),
        Case("upwards", upwards),
        Case("nothing", nothing),
        Case("capped_window", capped_window),
    ],
    Flash3: [*(BY_NAME[name] for name in ("causal", "sink")), Case("upwards", upwards), Case("nothing", nothing)],
}
SITES = [(kind, case) for kind, cases in SERVED.items() for case in cases]


@pytest.mark.parametrize(("kind", "case"), SITES, ids=lambda x: x.name)
@pytest.mark.parametrize("queries", [None, 120], ids=["square", "fewer queries"])
def test_a_model_computes_the_same(kind: type[FlashKernel], case: Case, queries: int | None) -> None:
    through = Through(module := Attention(case), on_cpu(kind))
    x = inputs(width=32, queries=queries, grad=True)
    assert not held_to_float64(module, x, through, grad=True, floors=FLOORS), through.reasons
    assert [site.kernel for site in through.sites] == [kind.name]
    (call,) = through.calls(define(kind.vendor))
    assert call.args[5:7] == (None, None)


@pytest.mark.parametrize("kind", [FlashVarlen, FlashVarlen3], ids=lambda kind: kind.name)
@pytest.mark.parametrize("pad", ["left", "right", "holes", "row"])
@pytest.mark.parametrize("attention", [padded, padded_by_infinity], ids=["lowest", "infinity"])
def test_padded_keys_are_packed(kind: type[FlashKernel], pad: str, attention: Callable[..., Tensor]) -> None:
    q, k, v, _, *rest = inputs(width=32, queries=120, grad=True)
    grad = not (pad == "row" and attention is padded_by_infinity)  # where it is no number
    through = Through(module := Attention(Case("padded", attention)), on_cpu(kind))
    x = (q, k, v, _pads(pad), *rest)
    assert not held_to_float64(module, x, through, grad=grad, floors=FLOORS), through.reasons
    assert [site.kernel for site in through.sites] == [kind.name]
    (call,) = through.calls(define(kind.vendor))
    assert None not in call.args[5:7]


@pytest.mark.parametrize("kind", [Flash, Flash3], ids=lambda kind: kind.name)
def test_padded_keys_are_refused_without_packing(kind: type[FlashKernel]) -> None:
    through = Through(Attention(Case("padded", padded)), on_cpu(kind))
    through(*inputs(width=32))
    assert "has no argument for padded keys" in through.reasons


def test_keys_are_sorted_once_for_all_layers() -> None:
    class Layers(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
            for _ in range(3):
                q = q + padded(q, k, v, pad)
            return q

    through = Through(module := Layers(), on_cpu(FlashVarlen))
    assert not held_to_float64(module, inputs(width=32, grad=True), through, grad=True, floors=FLOORS)
    assert len(through.calls(define(FlashVarlen.vendor))) == 3
    assert len(through.calls(torch.ops.aten.sort.stable)) == 1


@pytest.mark.parametrize("kind", [Flash, FlashVarlen, Flash3], ids=lambda kind: kind.name)
def test_a_graph_serves_all_lengths(kind: type[FlashKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call compiles for its length, the second for any."""
    # what FlexAttention cannot do on the CPU has nothing to do with what the CPU stands in for here
    monkeypatch.setattr(functions, "_symbolic", lambda node: False)
    case = Case("padded", padded) if kind is FlashVarlen else BY_NAME["causal"]
    through = Through(module := Attention(case), on_cpu(kind), inner="aot_eager", dynamic=None)
    for length in (200, 90, 41, 77):
        q, k, v, _, *rest = inputs(length, 32, grad=True)
        pad = torch.arange(length) >= torch.tensor([[7], [30]])
        assert not held_to_float64(module, (q, k, v, pad, *rest), through, grad=True, floors=FLOORS)
    assert [site.kernel for site in through.sites] == [kind.name] * 2, through.reasons
    assert isinstance(through.sites[1].spec.keys, str)


def test_dropout_reaches_the_kernel() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.dropout(torch.softmax(q @ k.mT * 0.3, -1), 0.25, True) @ v

    through = Through(attention, on_cpu(Flash))
    q, k, v = (torch.randn(2, 4, 40, 32, requires_grad=True) for _ in range(3))
    first, second = through(q, k, v), through(q, k, v)
    assert not torch.equal(first, second)
    (call,) = through.calls(define(Flash.vendor))
    assert call.args[11] == 0.25
    through = Through(attention, on_cpu(Flash3))
    through(q, k, v)
    assert not through.calls(define(Flash3.vendor))


def test_a_deterministic_backward_is_asked_for() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        through = Through(Attention(BY_NAME["causal"]), on_cpu(Flash))
        through(*inputs(width=32, grad=True))
    finally:
        torch.use_deterministic_algorithms(False)
    (call,) = through.calls(define(Flash.vendor))
    assert call.args[12] is True


def test_a_build_without_a_soft_cap_refuses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table tells what a build left out: it says so itself."""
    monkeypatch.setattr(Flash3, "available", lambda self: None)
    monkeypatch.setattr(flash_base, "_sample", lambda spec: replace(sample(spec), device="cpu"))
    found = [r.text for r in Flash3().refusals(spec(softcap=30.0))]
    assert found == [f"this build does not compute it: RuntimeError: {standins.NO_SOFTCAP}"]
    assert not list(Flash3().refusals(spec()))
    assert not list(Flash().refusals(spec(softcap=30.0, grad=True)))


sample = flash_base._sample


# -- what is refused ---------------------------------------------------------------------------------------------------


@by_kind
def test_what_the_table_refuses(kind: type[FlashKernel]) -> None:
    kernel = kind()
    assert not refused(kernel)
    assert not refused(kernel, mask=MaskSpec(causal=0), grad=True, deterministic=True, sink=True)
    assert refused(kernel, device="cpu") == {"device"}
    assert refused(kernel, dtype="float32") == {"dtype"}
    assert refused(kernel, dtype="float64") == {"dtype"}
    odd = (2, 4, 128, 60)
    assert refused(kernel, q=odd, k=odd, v=odd) == {"head_width"}
    wide = (2, 4, 128, 264)
    assert refused(kernel, q=wide, k=wide, v=wide) == {"head_width"}
    assert refused(kernel, mask=MaskSpec(dense=True)) == {"no_form"}
    assert refused(kernel, mask=MaskSpec(document=True)) == {"no_form"}
    many = (70000, 4, 128, 64)
    assert refused(kernel, q=many, k=many, v=many) == {"no_form"}
    heads = (1, 70000, 128, 64)
    assert refused(kernel, q=heads, k=heads, v=heads) == {"no_form"}
    assert refused(kernel, dropout="p") == {"dropout_unknown"}


def test_what_only_one_of_them_has() -> None:
    slopes = (BiasSpec(shape=(1, 4, 1, 128), dtype="float32"),)
    causal = MaskSpec(causal=0)
    assert not refused(Flash(), dropout=0.1, bias=slopes, mask=causal)
    assert refused(Flash3(), dropout=0.1) == {"dropout"}
    assert refused(Flash3(), bias=slopes, mask=causal) == {"no_form"}
    assert refused(Flash(), dropout=0.1, softcap=30.0) == {"dropout"}
    assert refused(Flash(), mask=MaskSpec(key_padding=True)) == {"no_form"}
    assert not refused(FlashVarlen(), mask=MaskSpec(key_padding=True))
    long = (3000, 4, 2**20, 64)
    assert refused(FlashVarlen(), q=long, k=long, v=long, mask=MaskSpec(key_padding=True)) == {"no_form"}


@pytest.mark.parametrize(
    ("width", "v_width", "grad", "fine"),
    [
        (192, 128, True, True),
        (136, 104, False, True),
        (192, 96, False, False),
        (128, 64, False, False),
        (64, 256, True, True),
        (64, 512, False, True),
        (64, 512, True, False),
        (256, 256, True, True),
        (512, 512, False, False),
        (96, 128, False, False),
    ],
)
def test_unlike_widths(width: int, v_width: int, grad: bool, fine: bool) -> None:
    q, v = (2, 4, 128, width), (2, 4, 128, v_width)
    assert (refused(Flash3(), q=q, k=q, v=v, grad=grad) == set()) == fine
    if width != v_width:
        assert "unlike_widths" in refused(Flash(), q=q, k=q, v=v)


def test_no_fixed_order_for_the_widest_heads() -> None:
    for width, codes in ((192, set()), (200, {"not_deterministic"}), (256, {"not_deterministic"})):
        shape = (2, 4, 128, width)
        assert refused(Flash3(), q=shape, k=shape, v=shape, grad=True, deterministic=True) == codes
        assert not refused(Flash3(), q=shape, k=shape, v=shape, deterministic=True)
        assert not refused(Flash(), q=shape, k=shape, v=shape, grad=True, deterministic=True)


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "fine"),
    [
        (MaskSpec(causal=0), 128, 128, True),
        (MaskSpec(causal=0), 100, 128, True),
        (MaskSpec(causal=-28), 128, 100, True),  # from the last of both: 0
        (MaskSpec(causal=0), 128, 100, True),  # ... 28
        (MaskSpec(causal=0), 220, 100, False),  # ... 120
        (MaskSpec(window=(40, None)), 128, 128, True),
        (MaskSpec(window=(40, None)), 100, 128, True),
        (MaskSpec(window=(40, None)), 128, 100, False),
        (MaskSpec(window=(40, 9)), 128, 100, True),
        (MaskSpec(window=(40, 80)), 128, 100, False),
        (MaskSpec(window=(40, None), causal=-28), 128, 100, True),
        (MaskSpec(window=(40, None)), "s1", "s1", True),
        (MaskSpec(window=(40, None)), "s1", "s2", False),
        (MaskSpec(causal="s2 - s1"), "s1", "s2", True),
    ],
)
def test_bounds_that_flash_2_reads_otherwise(mask: MaskSpec, queries: Any, keys: Any, fine: bool) -> None:
    q, k = (2, 4, queries, 64), (2, 4, keys, 64)
    assert (refused(Flash(), q=q, k=k, v=k, mask=mask) == set()) == fine
    assert not refused(Flash3(), q=q, k=k, v=k, mask=mask)


def test_the_stand_in_reads_those_bounds_otherwise() -> None:
    """Otherwise the test before this one would be about nothing."""
    for problem in (Problem(queries=220, keys=100, right=120), Problem(queries=128, keys=100, left=40)):
        assert complaints(flash_operation(Flash()), problem, "cpu", torch.float32)
        assert not complaints(flash_operation(Flash3()), problem, "cpu", torch.float32)


def test_bounds_over_symbolic_sizes_are_looked_at_when_the_call_is_written() -> None:
    class Ahead(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            i, j = grid(q, k)
            return weighted(masked(scores(q, k), j <= i + 5), v, q)

    for kind, taken in ((Flash, None), (Flash3, "flash_3")):
        torch._dynamo.reset()
        through = Through(Ahead(), on_cpu(kind), dynamic=None)
        for queries, keys in ((40, 50), (41, 52)):
            q, k = torch.randn(2, 4, queries, 32), torch.randn(2, 4, keys, 32)
            through(q, k, k)
        # with numbers it is known that there are no more queries than keys
        assert [site.kernel for site in through.sites] == [kind.name, taken], through.reasons


# -- what is there -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))


def gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    patch.setattr(torch.version, "hip", None)


def why(kernel: FlashKernel) -> str:
    found = kernel.available()
    assert found is None or found.code == "unavailable"
    return "" if found is None else found.text


def package(patch: pytest.MonkeyPatch, folder: Path, name: str, text: str) -> None:
    """A package on the path in place of the stand-in; its text runs when it is imported."""
    for module in [module for module in sys.modules if module.partition(".")[0] == name.partition(".")[0]]:
        patch.delitem(sys.modules, module)
    file = folder.joinpath(*name.split("."), "__init__.py")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    patch.syspath_prepend(str(folder))
    forget()


@by_kind
def test_available_with_package_and_gpu(kind: type[FlashKernel], hopper: None) -> None:
    assert why(kind()) == ""


@by_kind
def test_without_a_gpu(kind: type[FlashKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why(kind()).startswith("needs an NVIDIA GPU")


def test_on_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5))
    assert why(Flash()) == "needs a GPU of compute capability 8.0 or above; this one has compute capability 7.5"
    gpu(monkeypatch, (8, 0))
    assert why(Flash()) == ""
    assert why(Flash3()) == "needs a GPU of compute capability 9.0 (Hopper); this one has compute capability 8.0"
    gpu(monkeypatch, (10, 0))
    assert why(FlashVarlen3()).startswith("needs a GPU of")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert why(Flash()).startswith("needs an NVIDIA GPU")


def test_packages_that_are_absent(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_3", "flash_attn_3._C"):
        monkeypatch.setitem(sys.modules, name, None)
    forget()
    assert why(Flash()) == "flash-attn 2 is not installed: pip install flash-attn"
    assert why(Flash3()).startswith("FlashAttention-3 is not installed: build it from")


def test_flash_attn_4_alone_is_no_flash_attn_2(hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(monkeypatch, tmp_path, "flash_attn.cute", "")
    assert why(Flash()) == "flash-attn 2 is not installed: pip install flash-attn"


def test_a_build_for_another_torch(hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(monkeypatch, tmp_path, "flash_attn", "raise ImportError('x.so: undefined symbol: _ZN3c10')")
    assert "undefined symbol: _ZN3c10; it was built for another torch" in why(Flash())


def test_a_build_for_another_cuda(hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "raise ImportError('libcudart.so.12: cannot open shared object file: No such file or directory')"
    package(monkeypatch, tmp_path, "flash_attn_3", text)
    assert "pip install nvidia-cuda-runtime-cu12, and preload libcudart.so.12" in why(Flash3())


def test_a_package_that_breaks_in_any_other_way(hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(monkeypatch, tmp_path, "flash_attn", "1 / 0")
    assert why(Flash()) == "flash-attn 2 cannot be imported: ZeroDivisionError: division by zero"
    package(monkeypatch, tmp_path, "flash_attn_3", "import a_package_that_is_not_there")
    assert why(Flash3()) == "FlashAttention-3 cannot be imported, it needs a_package_that_is_not_there"


def test_old_versions(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    standins.flash_2(monkeypatch, "2.6.3")
    assert why(Flash()).startswith("flash-attn 2.6.3 is too old: needs 2.7 or above")
    standins.flash_2(monkeypatch, "2.7.4.post1")
    assert why(Flash()) == ""


def test_a_compiled_library_of_another_time(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash3, "_ops", lambda: object())
    assert why(Flash3()) == "this FlashAttention-3 registers no fwd and bwd: it is of another time"


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys\n"
        "from attnpass.kernels import flash, flash3\n"
        "kernels = [flash.Flash(), flash.FlashVarlen(), flash3.Flash3(), flash3.FlashVarlen3(), flash3.Flash3Hub()]\n"
        "[kernel.version() for kernel in kernels]\n"
        "assert not {'flash_attn', 'flash_attn_3', 'kernels'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_only_by_name(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Flash3Hub.only_by_name
    installed(monkeypatch, "0.12.3")
    monkeypatch.setitem(sys.modules, "kernels", None)  # importing it would fail
    assert why(Flash3Hub()) == ""


def test_the_package_that_loads_from_the_hub(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.11.5")
    assert why(Flash3Hub()) == "the package kernels is 0.11.5, too old: pip install 'kernels>=0.12'"
    installed(monkeypatch, None)
    assert why(Flash3Hub()) == "the package kernels is not installed: pip install 'kernels>=0.12'"


def installed(patch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    patch.setattr(importlib.metadata, "version", version)


INIT = """
import torch
from torch.library import Library
library = Library("flash_attn3_from_the_hub", "FRAGMENT")
from tests.kernels import standins
standins.register(library)
ops = torch.ops.flash_attn3_from_the_hub
"""


def test_a_local_kernel_through_the_real_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loader of `kernels`, offline, on a folder laid out as the repository on the Hub is."""
    loader = pytest.importorskip("kernels")
    if not hasattr(loader, "get_kernel"):
        pytest.skip("a package of that name, but not that package")
    build = tmp_path / "build" / ("torch-cuda" if torch.version.cuda else "torch-cpu")
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(INIT)
    (build / "metadata.json").write_text(
        '{"name": "flash-attn3", "id": "_x_1", "version": 1, "license": "BSD-3-Clause", "python-depends": [], '
        f'"backend": {{"type": "{"cuda" if torch.version.cuda else "cpu"}"}}}}'
    )
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn3={tmp_path}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problem = Problem(right=0, sink=True, kv_heads=2)
    assert not complaints(flash_operation(Flash3Hub()), problem, "cpu", torch.float32)


def test_the_loader_is_called_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LOCAL_KERNELS does not speak of it: by repository and version, as ``kernels.get_kernel`` says."""
    asked = []

    class Loader:
        @staticmethod
        def get_kernel(repo_id: str, revision: str | None = None, version: int | str | None = None) -> Any:
            asked.append((repo_id, revision, version))
            interface = type("interface", (), {"flash_attn_3_cuda": torch.ops.flash_attn_3})
            return type("module", (), {"flash_attn_interface": interface})

    monkeypatch.setitem(sys.modules, "kernels", Loader)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    assert not complaints(flash_operation(Flash3Hub()), Problem(left=30, right=2), "cpu", torch.float32)
    assert asked == [("kernels-community/flash-attn3", None, 1)]


def test_a_hub_that_cannot_be_reached_is_a_refusal(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        @staticmethod
        def get_kernel(repo_id: str, revision: str | None = None, version: int | str | None = None) -> Any:
            raise OSError("no network")

    installed(monkeypatch, "0.12.3")
    monkeypatch.setitem(sys.modules, "kernels", Loader)
    monkeypatch.setattr(flash_base, "_sample", lambda spec: replace(sample(spec), device="cpu"))
    (reason,) = Flash3Hub().refusals(spec())
    assert reason.text == "this build does not compute it: OSError: no network"


def test_no_scale_turns_the_greatest_score_into_the_least() -> None:
    """The stand-in would not mind; the kernels would."""
    for case in (Case("upwards", upwards), Case("nothing", nothing)):
        torch._dynamo.reset()
        through = Through(Attention(case), on_cpu(Flash))
        through(*inputs(width=32))
        (call,) = through.calls(define(Flash.vendor))
        assert isinstance(call.args[7], float)
        assert call.args[7] > 0
        assert math.isfinite(call.args[7])
