"""The table of cases on CUDA: the same functions, through torch's CUDA kernels, held to the same bound.

The reference is still float64 on the CPU. Cases whose own code does not run on CUDA (a tensor made on the CPU inside)
are skipped, because there is nothing to compare.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import attnpass
from attnpass.capture.dynamo import backend
from tests.test_zoo import build, by_case
from tests.zoo import CASES
from tests.zoo.case import Case
from tests.zoo.numbers import Run, complaints, run, truth

pytestmark = pytest.mark.gpu

# torch's memory-efficient kernel, the only fused one for float32 on CUDA, loses more digits than the plain products,
# most of all in its backward: up to 1e-4 of the largest element was seen on an H200 with torch 2.11.
FLOORS = {torch.float32: 4096.0}


def on_cuda(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs
    )


def on_cpu(found: Run) -> Run:
    return Run({name: x.cpu() for name, x in found.tensors.items()})


@by_case([case for case in CASES if not case.train and case.reference == "float64"])
def test_a_case_computes_the_same_on_cuda(case: Case) -> None:
    subject = build(case)
    module: nn.Module = copy.deepcopy(subject.module).cuda()
    inputs = on_cuda(subject.inputs)
    try:
        eager = on_cpu(run(copy.deepcopy(module), inputs, grad=case.grad))
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"does not run on CUDA by itself: {str(error).splitlines()[0][:80]}")
    here = run(copy.deepcopy(subject.module), subject.inputs, grad=case.grad)
    if any(not torch.equal(x.isnan(), here.tensors[name].isnan()) for name, x in eager.tensors.items()):
        pytest.skip("eager code itself has its NaN at other places on CUDA than on the CPU")
    torch._dynamo.reset()
    attnpass.reset()
    compiled = torch.compile(
        module, backend=backend, options={"inner": "eager"}, fullgraph=True, dynamic=subject.dynamic is not None
    )
    candidate = on_cpu(run(module, inputs, call=compiled, grad=case.grad))
    reference = truth(subject.module, subject.inputs, grad=case.grad)
    assert not complaints(candidate, eager, reference, floors=FLOORS)
