"""The parts of a trial: errors and when one is worse, the original in float64, and the inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnpass
from attnpass.kernels import kernels
from attnpass.trial import Built, Given, Pair
from attnpass.trial.compare import gap
from attnpass.trial.examine import run
from attnpass.trial.inputs import HUGE, KINDS, MASKS_OFF, RANDOM, REAL, copied
from attnpass.trial.pair import Side

INF, NAN = math.inf, math.nan


# -- errors ------------------------------------------------------------------------------------------------------------


def of(mine: list[float], plain: list[float], true: list[float], **more: Any) -> Any:
    tensors = (torch.tensor([x], dtype=torch.float64) for x in (mine, plain, true))
    return gap(*tensors, **({"share": 0.01, "size": 1.0} | more))


def test_twice_the_original_and_the_tolerance_is_allowed_and_no_more() -> None:
    assert not of([1.019], [1.005], [1.0]).worse
    assert of([1.021], [1.005], [1.0]).worse
    assert not of([1.0], [9.0], [1.0]).worse, "being better is no fault"
    found = of([1.021], [1.005], [1.0])
    assert (found.original, found.replacement, found.allowed) == pytest.approx((0.005, 0.021, 0.02))


def test_where_the_original_is_beyond_the_tolerance_itself_more_is_chance() -> None:
    assert not of([1.7], [1.1], [1.0]).worse
    assert of([1.8], [1.1], [1.0]).worse


@pytest.mark.parametrize(
    ("mine", "plain", "true", "worse"),
    [
        (NAN, 1.0, 1.0, True),  # the original had a number
        (INF, 1.0, 1.0, True),
        (NAN, NAN, 1.0, False),  # its own float16 has run over: both are as wrong
        (1.0, NAN, 1.0, False),  # ... and one that has not is better
        (NAN, NAN, NAN, False),
        (1.0, NAN, NAN, True),  # a query without a key must not be hidden
        (1.0, INF, INF, True),
        (1.0, 1.0, NAN, False),  # the original does not show it either
    ],
)
def test_what_is_no_number(mine: float, plain: float, true: float, worse: bool) -> None:
    found = of([mine, 2.0], [plain, 2.0], [true, 2.0])
    assert found.worse is worse
    assert not of([mine, 2.0], [plain, 2.0], [true, 2.0], hideable=True).worse or math.isfinite(true)


def test_rows_are_looked_at_one_by_one() -> None:
    """A row that the original gets wrong is no licence for the others."""
    true = torch.zeros(9, 2, dtype=torch.float64)
    plain, mine = true.clone(), true.clone()
    plain[0], mine[1] = 0.5, 0.4
    assert not gap(mine, plain, true, share=0.01, size=1.0).worse
    assert gap(mine, plain, true, share=0.01, size=1.0, rows=True).worse


def test_nothing_is_said_where_nothing_is_asked() -> None:
    assert of([1.0], [NAN], [NAN], hideable=True) is None
    assert of([1.0], [2.0], [3.0], skip=torch.tensor([[True]])) is None
    empty = torch.zeros(0, 4)
    assert gap(empty, empty, empty.double(), share=0.1, size=0.0) is None


def test_kernels_declare_a_tolerance() -> None:
    for kernel in kernels():
        if not kernel.can.approximate:
            assert 0 < kernel.tolerance("bfloat16") < 100
            assert 0 < kernel.tolerance("float32") < 1000


# -- both sides of a site ----------------------------------------------------------------------------------------------


def watched(fn: Any, *args: Any, **policy: Any) -> list[tuple[Pair, Given, list[Any]]]:
    """Everything that a function's sites are tried on."""
    from attnpass.capture import frames
    from attnpass.capture.observe import isolated

    found: list[tuple[Pair, Given, list[Any]]] = []

    def watch(built: Built, pair: Pair, given: Given, trials: Any) -> None:
        found.append((pair, given, list(trials)))

    def backend(gm: Any, inputs: Any) -> Any:
        done = frames.process(
            gm, inputs, name="g", policy=attnpass.Policy(**policy), rewrite=False, compiled=False, watch=watch
        )
        assert not done.report.failures
        return gm.forward

    torch._dynamo.reset()
    isolated(fn, args, {}, backend)
    return found


def masked(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    keep = pad[:, None, None] & (torch.arange(12)[None] <= torch.arange(12)[:, None])
    scores = (q @ k.transpose(-2, -1)) * 0.3
    return (scores + torch.where(keep, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)).softmax(-1) @ v


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.randn(3, 2, 2, 12, 8, dtype=dtype).unbind(0))


def test_both_sides_read_the_same_leaves_and_a_mask_is_followed_to_its_inputs() -> None:
    pad = torch.ones(2, 12, dtype=torch.bool)
    pad[0, 7:] = False
    found = watched(masked, *qkv(), pad)
    pair, given, _ = found[0]
    assert given.kind == REAL
    assert {node.op for node in pair.leaves} == {"placeholder"}
    assert len(pair.leaves) == 4
    assert len(pair.data) == 1, "the padding mask, and nothing else"
    (mask,) = pair.data
    assert torch.equal(given.values[mask], pad)
    kinds = [given.kind for _, given, _ in found]
    assert kinds == [kind for kind in KINDS if kind in kinds], "in the order of the documentation"
    off = next(given for _, given, _ in found if given.kind == MASKS_OFF)
    assert not off.values[mask][0].any()
    assert torch.equal(off.values[mask][1], pad[1]), "only its first row"


def test_huge_scores_are_in_the_thousands() -> None:
    for pair, given, _ in watched(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, *qkv()):
        if given.kind == HUGE:
            q, k = (given.values[placed.node] for placed in (pair.site.q, pair.site.k))
            assert 300 < (q @ k.mT * 0.3).abs().max() < 3000


def test_the_original_in_float64_is_what_its_author_meant() -> None:
    """Casts inside the site are widened; those that make a mask stay, because there the lowest float32 becomes -inf."""
    pad = torch.ones(2, 12, dtype=torch.bool)

    def half(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        low = torch.where(pad[:, None, None], 0.0, torch.finfo(torch.float32).min).to(torch.bfloat16)
        return ((q @ k.mT / 8).to(torch.float32) + low).softmax(-1).to(torch.bfloat16) @ v

    q, k, v = qkv(torch.bfloat16)
    pair, given, _ = watched(half, q, k, v, pad)[0]
    true, _ = run(pair.exact, pair.original.reads, given.values, (), pair.site.state, wide=True)
    assert true.dtype == torch.float64
    torch.testing.assert_close(true, (q.double() @ k.double().mT / 8).softmax(-1) @ v.double(), rtol=1e-12, atol=1e-12)
    hidden = {**given.values, next(iter(pair.data)): ~pad}
    nothing, _ = run(pair.exact, pair.original.reads, hidden, (), pair.site.state, wide=True)
    assert nothing.isnan().all(), "-inf everywhere, as in the model; in float64 it would have been a number"


def test_gradients_of_the_reference_are_not_rounded() -> None:
    leaves = [x.requires_grad_() for x in qkv(torch.bfloat16)]
    pair, given, _ = watched(lambda q, k, v: (q @ k.mT / 8).softmax(-1) @ v, *leaves)[0]
    wanted = (pair.site.q.node, pair.site.k.node, pair.site.v.node)
    _, grads = run(pair.exact, pair.original.reads, given.values, wanted, pair.site.state, wide=True)
    for grad in grads:
        assert grad.dtype == torch.float64
        assert not torch.equal(grad, grad.to(torch.float32).double())


def test_equal_layers_are_tried_on_made_up_inputs_once_and_on_their_own_each() -> None:
    def three(x: Tensor) -> Tensor:
        for _ in range(3):
            x = (x @ x.mT / 8).softmax(-1) @ x
        return x

    kinds = [given.kind for _, given, _ in watched(three, torch.randn(2, 2, 12, 8))]
    assert kinds.count(REAL) == 3
    assert kinds.count(RANDOM) == 1


def test_kernels_of_few_bits_declare_more() -> None:
    from attnpass.kernels.sage import SageFp8Cuda, SageFp16Cuda

    shares = [
        kernel().tolerance("bfloat16") * torch.finfo(torch.bfloat16).eps for kernel in (SageFp16Cuda, SageFp8Cuda)
    ]
    assert 0.01 < shares[0] < shares[1] < 0.5


def test_a_mask_that_is_written_in_place_is_taken_as_it_is() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = torch.zeros(2, 1, 1, 12)
        mask.masked_fill_(~pad[:, None, None], -torch.inf)
        return (q @ k.mT / 8 + mask).softmax(-1) @ v

    pad = torch.ones(2, 12, dtype=torch.bool)
    pad[1, 5:] = False
    for pair, given, trials in watched(written, *qkv(), pad):
        assert not any(trial.worse for trial in trials if not trial.inputs.startswith("padding"))
        assert not pair.data, "the mask would not follow another padding"
        assert not given.kind.startswith("masks")


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 5),
        torch.randn(4, 5).t(),
        torch.randn(4, 1).expand(4, 5),
        torch.randn(9, 9)[1:5, ::2],
        torch.randn(()),
        torch.randn(0, 3),
    ],
)
def test_copies_have_the_strides_of_the_original_and_memory_of_their_own(x: Tensor) -> None:
    new = copied(x, grad=True)
    assert new.stride() == x.stride()
    assert torch.equal(new, x)
    assert new.is_leaf
    assert new.requires_grad
    assert x.numel() == 0 or new.data_ptr() != x.data_ptr()


def test_a_side_knows_another_that_computes_the_same() -> None:
    def once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 8).softmax(-1) @ v

    def again(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        d = torch.matmul(a, b.transpose(-1, -2)) / 8
        return torch.softmax(d, -1).matmul(c)

    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 7).softmax(-1) @ v

    keys: list[Any] = [watched(fn, *qkv())[0][0].original.key for fn in (once, once, other)]
    assert keys[0] == keys[1] != keys[2]
    assert isinstance(watched(again, *qkv())[0][0].original, Side)
