"""FlexAttention compiled for CUDA where it may go wrong by shape or surroundings: widths, few queries, symbolic
lengths, checkpoints, autocast, memory, models.

Several attentions go into one module: their kernels are then compiled side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnpass
from attnpass import choose
from attnpass.capture.dynamo import backend
from attnpass.kernels.flex import Flex
from attnpass.kernels.native import Native
from tests.flex_cases import CASES, Attention, Case, inputs
from tests.models import torchvision_stub
from tests.test_flex import Flexed, SelfAttention, tiny
from tests.test_flex_gpu import FLOORS
from tests.zoo.numbers import Run, complaints, run, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # what inductor says of the softmax of a model's router
    pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled:UserWarning"),
    # Dynamo itself looks at the gradient of a layer's input (torch 2.11)
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choose, "kernels", lambda: (Native(), Flex()))  # whatever else is installed
    attnpass.reset()
    yield
    attnpass.reset()


def on_cuda(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in given)


def on_cpu(found: Run) -> Run:
    return Run({name: x.cpu() for name, x in found.tensors.items()})


def compared(
    module: nn.Module, given: tuple[Tensor, ...], *, grad: bool, call: Any = None, floors: Any = FLOORS
) -> list[str]:
    """What is wrong with the compiled module beside eager code on the same device."""
    here = copy.deepcopy(module).cuda()
    there = on_cuda(given)
    with torch.set_grad_enabled(grad):
        eager = on_cpu(run(copy.deepcopy(here), there, grad=grad))
        mine = on_cpu(run(here, there, call=call, grad=grad))
        return complaints(mine, eager, truth(module, given, grad=grad), floors=floors)


def chosen(*names: str) -> list[Case]:
    return [case for case in CASES if case.name in names]


@pytest.mark.parametrize(
    ("width", "v_width", "dtype"),
    [(16, 16, torch.float16), (128, 128, torch.float32), (256, 256, torch.bfloat16), (192, 128, torch.bfloat16)],
    ids=["16", "128", "256", "192 and 128"],
)
def test_widths_that_are_accepted_can_be_compiled(width: int, v_width: int, dtype: torch.dtype) -> None:
    # what fails here fails in the user's torch.compile: such a width has to be refused
    module = Attention(*chosen("window", "padded"))
    found = Flexed(module, inner="inductor")
    given = inputs(300, width, v_width=v_width, dtype=dtype, grad=True)
    assert not compared(module, given, grad=True, call=found)
    assert found.kernels == ["flex", "flex"]


@pytest.mark.parametrize(("queries", "length"), [(1, 1000), (7, 300)])
def test_few_queries(queries: int, length: int) -> None:
    module = Attention(*(case for case in CASES if not case.empty))
    found = Flexed(module, inner="inductor")
    assert not compared(module, inputs(length, 64, queries=queries, dtype=torch.bfloat16), grad=False, call=found)
    assert set(found.kernels) == {"flex"}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_symbolic_lengths(grad: bool) -> None:
    names = ("causal", "window", "chunks", "prefix")
    module = SelfAttention(*chosen(*names))
    found = Flexed(module, inner="inductor", dynamic=None)

    def marked(x: Tensor) -> Any:
        torch._dynamo.mark_dynamic(x, 1)
        return found(x)

    for length in (200, 300, 128, 129, 640):
        assert not compared(module, (torch.randn(2, length, 256, requires_grad=grad),), grad=grad, call=marked)
    assert found.kernels == ["flex"] * len(names)


def test_within_checkpoints() -> None:
    class Checkpointed(Attention):
        def forward(self, *given: Tensor) -> Any:
            return checkpoint(super().forward, *given, use_reentrant=False)

    module = Checkpointed(*chosen("window", "sink", "padded"))
    found = Flexed(module, inner="inductor")
    assert not compared(module, inputs(300, 64, dtype=torch.bfloat16, grad=True), grad=True, call=found)
    assert found.kernels == ["flex"] * 3


def test_under_autocast() -> None:
    class Autocast(Attention):
        def forward(self, *given: Tensor) -> Any:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return super().forward(*given)

    module = Autocast(*chosen("window", "padded"))
    found = Flexed(module, inner="inductor")
    # eager code rounds its scores to bfloat16, a kernel does not: both are held to float64
    assert not compared(module, inputs(300, 64), grad=False, call=found, floors={**FLOORS, torch.bfloat16: 1.0})
    assert found.kernels == ["flex", "flex"]


def test_the_scores_are_not_in_memory() -> None:
    """One tensor of scores would take 2 x 16 x 8192 x 8192 x 2 bytes: 4 GiB."""
    module = Attention(*chosen("window")).cuda()
    given = on_cuda(inputs(8192, 64, heads=16, kv_heads=4, dtype=torch.bfloat16)[:3])
    fast = torch.compile(module, backend=backend)
    with torch.no_grad():
        fast(*given)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fast(*given)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**29
    assert [site.kernel for site in attnpass.report().sites] == ["flex"]


@pytest.mark.parametrize(
    ("name", "length", "kernel"), [("causal", 512, "native"), ("padded", 4096, "flex"), ("documents", 4096, "flex")]
)
def test_the_kernel_that_is_taken(name: str, length: int, kernel: str) -> None:
    given = on_cuda(inputs(length, 64, heads=16, kv_heads=4, dtype=torch.bfloat16)[:5])
    with torch.no_grad():
        report = attnpass.audit(Attention(*chosen(name)).cuda(), *given)
    assert [site.kernel for site in report.sites] == [kernel]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_training_step_of_a_model(name: str) -> None:
    torchvision_stub.ensure()
    pytest.importorskip("transformers")
    model = tiny(name).cuda()
    ids = torch.randint(1, 99, (2, 150)).cuda()
    fast = torch.compile(model, backend=backend, options={"kernel": "flex"})
    grads = []
    for call in (model, fast):
        model.zero_grad()
        call(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    # experts that are chosen by data may break the model into graphs, some of which are given the mask
    made_here = [site for site in attnpass.report().sites if not site.spec.bias]
    assert made_here
    assert {site.kernel for site in made_here} == {"flex"}
    assert grads[0].keys() == grads[1].keys()
    for key, eager in grads[0].items():
        torch.testing.assert_close(
            grads[1][key], eager, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
