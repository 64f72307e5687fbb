"""Soft caps that are symbolic numbers: a float of the model under dynamic=True, as Gemma2 has it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnpass
from attnpass.capture.dynamo import backend
from attnpass.kernels.flash import Flash
from attnpass.kernels.flex import Flex
from attnpass.report import words
from attnpass.spec import AttentionSpec
from tests.test_flex import Flexed, as_on_cuda, held_to_float64  # noqa: F401 (a fixture)

symbolic_sizes = pytest.mark.usefixtures("as_on_cuda")  # with which FlexAttention is refused on the CPU
HEADS, WIDTH = 4, 32


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


def given(length: int = 20, *, grad: bool = False) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(length)
    return tuple(torch.randn(2, length, HEADS * WIDTH, generator=g).requires_grad_(grad) for _ in range(3))


class Capped(nn.Module):
    """Attention whose scores are changed by numbers that the model holds."""

    def __init__(self, change: Callable[[Tensor, Capped], Tensor], cap: float = 2.5) -> None:
        super().__init__()
        self.change = change
        self.cap, self.other, self.size = cap, 4.5, 0.3

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # So that these two are known although all sizes of the inputs are dynamic. And computed, as a model's are: of a
        # view of an input torch's template for the CPU takes the wrong shape (2.13).
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2).cos() for t in (q, k, v))
        x = self.change(q @ k.mT * self.size, self)
        i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
        return torch.where(j <= i, x, float("-inf")).softmax(-1) @ v


def gemma(x: Tensor, m: Capped) -> Tensor:
    x = x / m.cap
    x = torch.tanh(x)
    return x * m.cap


CAPS: dict[str, Callable[[Tensor, Capped], Tensor]] = {
    "gemma2": gemma,
    "commuted": lambda x, m: m.cap * (x / m.cap).tanh(),
    "another factor inside": lambda x, m: (x / m.cap * m.other * 0.5).tanh() * m.cap,
}


@symbolic_sizes
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CAPS)
def test_a_symbolic_cap_computes_the_same(name: str, grad: bool) -> None:
    module = Capped(CAPS[name])
    found = Flexed(module, dynamic=True)
    assert not held_to_float64(module, given(grad=grad), found, grad=grad)
    assert found.kernels == ["flex"]
    (site,) = found.reports[0].sites
    assert isinstance(site.spec.softcap, str)
    assert site.spec.mask.causal == 0


@symbolic_sizes
@pytest.mark.parametrize("cap", [0.7, 30.0, -2.0])
def test_one_graph_serves_every_cap(cap: float) -> None:
    module = Capped(gemma)
    found = Flexed(module, dynamic=True)
    with torch.no_grad():
        found(*given())
        module.cap = cap
        torch.testing.assert_close(found(*given()), module(*given()), rtol=1e-4, atol=1e-5)
    assert len(found.graphs) == 1


@pytest.mark.slow
def test_one_compiled_graph_serves_every_cap() -> None:
    """Inductor would compile each number anew if the cap were read in a way that it cannot make a tensor of."""
    module = Capped(gemma)
    found = Flexed(module, inner="inductor", dynamic=None)
    with torch.no_grad():
        for module.cap in (2.5, 0.7, 1.9, 30.0):
            torch.testing.assert_close(found(*given()), module(*given()), rtol=1e-4, atol=1e-5)
    assert found.kernels == ["flex", "flex"]  # of the number first seen, and of all others
    assert [isinstance(site.spec.softcap, str) for report in found.reports for site in report.sites] == [False, True]


NO_CAPS: dict[str, Callable[[Tensor, Capped], Tensor]] = {
    "another number inside": lambda x, m: (x / m.other).tanh() * m.cap,
    "no number inside": lambda x, m: x.tanh() * m.cap,
    "multiplied inside": lambda x, m: (x * m.cap).tanh() * m.cap,
    "divided twice": lambda x, m: (x / m.cap / m.cap).tanh() * m.cap,
    "divided outside": lambda x, m: (x / m.cap).tanh() / m.cap,
    "another factor outside": lambda x, m: (x / m.cap).tanh() * m.cap * 2,
    "two numbers outside": lambda x, m: (x / m.cap).tanh() * m.cap * m.other,
    "two caps": lambda x, m: ((x / m.cap).tanh() / m.cap).tanh() * m.cap,
}


@pytest.mark.parametrize("name", NO_CAPS)
def test_what_is_no_cap_of_one_number_is_no_site(name: str) -> None:
    module = Capped(NO_CAPS[name])
    found = Flexed(module, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(found(*given()), module(*given()))
    (report,) = found.reports
    assert not report.sites
    assert [miss.reason.code for miss in report.misses] == ["nonlinear_scores"]


def test_terms_inside_the_cap_are_refused_as_before() -> None:
    module = Capped(lambda x, m: ((x + torch.arange(x.shape[-1])) / m.cap).tanh() * m.cap)
    found = Flexed(module, dynamic=True)
    with torch.no_grad():
        found(*given())
    assert [miss.reason.code for miss in found.reports[0].misses] == ["term_inside_softcap"]


def test_kernels_that_take_a_number_refuse_and_the_report_says_the_symbol() -> None:
    spec = AttentionSpec(
        q=(2, 4, 64, 32), k=(2, 4, 64, 32), v=(2, 4, 64, 32), dtype="bfloat16", device="cuda", scale=0.3, softcap="zf1"
    )
    refused = [r for r in Flash().refusals(spec) if r.code == "softcap"]
    assert [r.text for r in refused] == ["has no soft cap that is no known number"]
    assert "softcap" not in {r.code for r in Flex().refusals(spec)}
    assert "softcap zf1" in words.extras(spec)


def test_the_audit_states_the_cap_although_no_kernel_takes_it() -> None:
    module = Capped(gemma)
    fast = torch.compile(module, backend=backend, options={"inner": "eager"}, dynamic=True)  # so there is no flex
    with torch.no_grad():
        torch.testing.assert_close(fast(*given()), module(*given()))
    report = attnpass.report()
    (site,) = report.sites
    assert isinstance(site.spec.softcap, str)
    (native,) = [verdict for verdict in site.verdicts if verdict.kernel == "native"]
    assert "softcap" in {refusal.code for refusal in native.refusals}
    assert json.loads(report.to_json())["sites"][0]["spec"]["softcap"] == site.spec.softcap
    assert f"softcap {site.spec.softcap}" in str(report)
