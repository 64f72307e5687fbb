"""Which kernel a site gets: named ones in order, others by cost, approximate ones where allowed; what is demanded."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram, export

import attnpass
from attnpass import AttnpassError, Policy, choose
from attnpass.capture.dynamo import backend
from attnpass.graph import Builder
from attnpass.kernels import plugins
from attnpass.kernels.native import Native
from attnpass.ledger import Report
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec

Make = Callable[..., "Fake"]


class Fake(Native):
    """Torch's own kernel under another name, with a cost of its own."""

    def __init__(self, name: str, cost: float | None, missing: str | None, **can: Any) -> None:
        self.name, self._cost, self._missing = name, cost, missing
        self.can = dataclasses.replace(Native.can, **can)

    def available(self) -> Reason | None:
        return None if self._missing is None else reason("unavailable", detail=self._missing)

    def cost(self, spec: AttentionSpec) -> float | None:
        return self._cost


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Registers kernels for one test."""
    monkeypatch.delenv("ATTNPASS_KERNEL", raising=False)
    monkeypatch.delenv("ATTNPASS_POLICY", raising=False)
    with contextlib.ExitStack() as stack:

        def register(name: str, cost: float | None = None, missing: str | None = None, **can: Any) -> Fake:
            kernel = Fake(name, cost, missing, **can)
            attnpass.register_kernel(kernel)
            stack.callback(attnpass.unregister_kernel, name)
            return kernel

        yield register


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT / 4, -1) @ x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Attention(), Attention()])
        self.cross = Attention()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x)
        return self.cross(x)


class Call1(nn.Module):
    """Calls the fused function itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def sample() -> Tensor:
    return torch.randn(2, 3, 8, 16)


def program(model: nn.Module | None = None) -> ExportedProgram:
    return export(model or Net(), (sample(),))


def report_of(source: ExportedProgram | None = None, **policy: Any) -> Report:
    """What was done, after a look that the result still computes the same."""
    source = source or program()
    done, report = attnpass.rewrite(source, policy=Policy(**policy))
    x = sample()
    torch.testing.assert_close(done.module()(x), source.module()(x), atol=1e-5, rtol=1e-4)
    return report


def kernels_of(report: Report) -> list[str | None]:
    return [site.kernel for site in report.sites]


def code(report: Report) -> str | None:
    why = report.sites[0].reason
    return None if why is None else why.code


# -- by name -----------------------------------------------------------------------------------------------------------


def test_a_named_kernel_is_taken_before_a_cheaper_one(fake: Make) -> None:
    fake("cheap", cost=1.0)
    fake("dear", cost=99.0)
    assert kernels_of(report_of()) == ["cheap"] * 3
    assert kernels_of(report_of(kernel="dear")) == ["dear"] * 3
    assert kernels_of(report_of(kernel=["dear", "cheap"])) == ["dear"] * 3
    assert kernels_of(report_of(kernel="native")) == ["native"] * 3


def test_kernels_that_are_as_good_as_the_cheapest_keep_their_order(fake: Make) -> None:
    """One and the same kernel differs by more from one measurement to another; what comes last is asked first."""
    fake("cheapest", cost=100.0)
    fake("as good", cost=102.0)
    fake("dearer", cost=104.0)
    assert kernels_of(report_of()) == ["as good"] * 3


def test_where_a_named_kernel_cannot_serve_the_next_best_is_taken_and_the_report_tells_why(fake: Make) -> None:
    fake("away", missing="package away is not installed")
    fake("narrow", max_width=8)
    fake("cheap", cost=1.0)
    report = report_of(kernel=["away", "narrow", "native"])
    assert kernels_of(report) == ["native"] * 3
    text = str(report)
    assert "asked for away: package away is not installed\n" in text
    assert "asked for narrow: does not take heads of width 16" in text
    assert report.sites[0].asked == ("away", "narrow", "native")
    assert report.to_dict()["sites"][0]["asked"] == ["away", "narrow", "native"]
    assert "asked for" not in str(report_of(kernel="native"))
    assert "Asked for, but not taken" in report.to_html()
    assert kernels_of(report_of(kernel=["away", "narrow"])) == ["cheap"] * 3


def test_keep_ends_a_list_and_alone_keeps_the_site(fake: Make) -> None:
    fake("away", missing="not installed")
    kept = report_of(kernel="eager")
    assert (kernels_of(kept), code(kept)) == ([None] * 3, "kept")
    ended = report_of(kernel=["away", "keep"])
    assert (kernels_of(ended), code(ended)) == ([None] * 3, "kept")
    assert "asked for away: not installed" in str(ended)
    assert kernels_of(report_of(kernel=["away", "native", "keep"])) == ["native"] * 3


def test_a_kernel_that_is_there_to_be_named_is_not_considered_otherwise(fake: Make) -> None:
    fake("pinned", cost=0.1).only_by_name = True
    report = report_of()
    assert kernels_of(report) == ["native"] * 3
    assert "pinned" not in [verdict.kernel for verdict in report.sites[0].verdicts]
    assert kernels_of(report_of(kernel="pinned")) == ["pinned"] * 3


def test_a_package_is_looked_for_only_where_its_kernel_would_serve_or_is_named(fake: Make) -> None:
    kernel = fake("narrow", missing="narrow is not installed", max_width=4)
    looked: list[str] = []
    kernel.available = lambda: looked.append(kernel.name)  # type: ignore[method-assign, assignment, func-returns-value]
    report = attnpass.audit(program())
    assert not looked
    codes = {r.code for site in report.sites for v in site.verdicts if v.kernel == "narrow" for r in v.refusals}
    assert codes == {"head_width"}
    attnpass.audit(program(), policy=Policy(kernel="narrow"))
    assert looked


def test_a_known_kernel_that_is_not_registered_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attnpass.kernels, "_registered", [Native()])
    report = report_of(kernel="flash_3")
    assert kernels_of(report) == ["native"] * 3
    assert "asked for flash_3: no kernel of this name is registered" in str(report)


def test_a_kernel_whose_call_cannot_be_written_says_so(fake: Make) -> None:
    def emit(b: Builder, call: Call) -> Any:
        raise ValueError("no such form")

    fake("broken").emit = emit  # type: ignore[method-assign]
    report = report_of(kernel="broken")
    assert kernels_of(report) == ["native"] * 3
    assert "asked for broken: the pass failed here and left the graph as it was: ValueError: no such form" in " ".join(
        str(report).split()
    )
    with pytest.raises(AttnpassError, match=r"encoder\.0 .*broken: .*no such form"):
        report_of(kernel="broken", strict_kernel=True)


# -- approximate -------------------------------------------------------------------------------------------------------


def test_an_approximate_kernel_is_taken_only_where_that_is_allowed(fake: Make) -> None:
    fake("rough", cost=0.1, approximate=True)
    assert kernels_of(report_of()) == ["native"] * 3
    named = report_of(kernel="rough")
    assert kernels_of(named) == ["native"] * 3
    assert "asked for rough: computes in fewer bits than its inputs have" in str(named)
    assert kernels_of(report_of(kernel="rough", allow_approximate=True)) == ["rough"] * 3
    assert kernels_of(report_of(allow_approximate=True)) == ["rough"] * 3


# -- rules -------------------------------------------------------------------------------------------------------------


def test_rules_choose_for_each_site(fake: Make) -> None:
    fake("cheap", cost=1.0)
    fake("dear", cost=99.0)
    report = report_of(rules={"encoder.*": "dear", "*cross": "keep"})
    assert kernels_of(report) == ["dear", "dear", None]
    assert report.sites[2].reason is not None
    assert report.sites[2].reason.code == "kept"
    assert kernels_of(report_of(kernel="native", rules={"encoder.1": "dear"})) == ["native", "dear", "native"]
    place = report.sites[0].where
    assert kernels_of(report_of(rules={f"test_choose.py:{place.line}": "dear"})) == ["dear"] * 3
    assert kernels_of(report_of(rules={lambda spec: spec.keys == 8: "dear"})) == ["dear"] * 3


def test_a_predicate_that_fails_keeps_its_site_and_says_so(fake: Make) -> None:
    report = report_of(rules={lambda spec: spec.q["heads"]: "native"})
    assert (kernels_of(report), code(report)) == ([None] * 3, "rule_failed")
    assert "TypeError" in str(report)


def test_a_rule_that_fits_no_site_is_noted() -> None:
    rules = {"encodr.*": "native", "encoder.*": "native"}
    for report in (report_of(rules=rules), attnpass.audit(Net(), sample(), policy=Policy(rules=rules))):
        assert report.notes == ("the rule for 'encodr.*' fits no site",)


# -- strict_kernel -----------------------------------------------------------------------------------------------------


def test_strict_kernel_names_the_site_and_every_reason(fake: Make) -> None:
    fake("away", missing="package away is not installed", max_width=8)
    fake("narrow", max_width=8, dtypes=frozenset({"float16"}))
    demand = Policy(kernel=["away", "narrow"], strict_kernel=True)
    for front in (
        lambda: attnpass.rewrite(program(), policy=demand),
        lambda: attnpass.audit(program(), policy=demand),
        lambda: attnpass.audit(Net(), sample(), policy=demand),
    ):
        with pytest.raises(AttnpassError) as caught:
            front()
        text = str(caught.value)
        assert "encoder.0 (test_choose.py:" in text
        assert "cross (test_choose.py:" in text
        assert "away: package away is not installed, does not take heads of width 16; " in text
        assert "narrow: does not take float32, does not take heads of width 16" in text


@pytest.mark.usefixtures("fresh_dynamo")
def test_strict_kernel_reaches_the_user_of_torch_compile(fake: Make) -> None:
    fake("away", missing="package away is not installed")
    options = {"inner": "eager", "kernel": "away", "strict_kernel": True}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"encoder\.0 .*package away is not installed"):
        torch.compile(Net(), backend=backend, options=options)(sample())
    assert len(attnpass.report().sites) == 3, "the report of what was demanded in vain is kept"


def test_strict_kernel_is_content_with_what_was_asked_for(fake: Make) -> None:
    fake("away", missing="not installed")
    for policy in (
        Policy(strict_kernel=True),
        Policy(strict_kernel=True, kernel="native"),
        Policy(strict_kernel=True, kernel=["away", "native"]),
        Policy(strict_kernel=True, kernel=["away", "keep"]),
        Policy(strict_kernel=True, kernel="away", fuel=0),
        Policy(strict_kernel=True, rules={"nowhere": "away"}),
    ):
        assert len(attnpass.audit(program(), policy=policy).sites) == 3
    with pytest.raises(AttnpassError, match="strict_kernel"):
        attnpass.audit(program(), policy=Policy(strict_kernel=True, rules={"cross": "away"}))


def test_strict_kernel_does_not_pass_over_a_graph_that_failed(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr("attnpass.pipeline.find", broken)
    with pytest.raises(AttnpassError, match="program: recognize failed: ZeroDivisionError: oh no"):
        attnpass.audit(program(), policy=Policy(strict_kernel=True, kernel="native"))


# -- gain --------------------------------------------------------------------------------------------------------------


def test_a_site_is_replaced_where_that_is_expected_to_save_enough(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = program()
    monkeypatch.setattr(choose, "unfused_us", lambda spec: 100.0)
    assert kernels_of(report_of(source, min_gain=0.9)) == ["native"] * 3, "a kernel that tells no cost"
    monkeypatch.setattr(choose, "unfused_us", lambda spec: None)
    fake("cheap", cost=80.0)
    assert kernels_of(report_of(source, min_gain=0.9)) == ["cheap"] * 3, "nothing is known of the original"
    monkeypatch.setattr(choose, "unfused_us", lambda spec: 100.0)
    assert kernels_of(report_of(source)) == ["cheap"] * 3
    assert kernels_of(report_of(source, min_gain=0.2)) == ["cheap"] * 3
    kept = report_of(source, min_gain=0.21)
    assert (kernels_of(kept), code(kept)) == ([None] * 3, "not_profitable")
    assert kernels_of(report_of(source, min_gain=0.9, kernel="cheap")) == ["cheap"] * 3, "named: at the user's word"
    monkeypatch.setattr(choose, "unfused_us", lambda spec: 79.0)
    slower = report_of(source)
    assert (kernels_of(slower), code(slower)) == ([None] * 3, "not_profitable")
    assert kernels_of(report_of(source, min_gain=-0.1)) == ["cheap"] * 3


# -- calls that are there ----------------------------------------------------------------------------------------------


def test_a_call_is_given_to_a_kernel_that_was_asked_for(fake: Make) -> None:
    fake("named", cost=99.0)
    source = program(Call1())
    assert code(report_of(source)) == "already_fused"
    assert kernels_of(report_of(source, kernel="named")) == ["named"]
    for asked in ("native", ["native", "named"]):
        assert code(report_of(source, kernel=asked, strict_kernel=True)) == "already_fused"
    assert code(report_of(source, kernel="keep")) == "kept"


def test_a_call_that_another_kernel_may_answer_otherwise_stays(fake: Make) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=(x > 0.5)[..., :8])

    fake("named")
    source = program(Masked())
    report = report_of(source, kernel="named")
    assert code(report) == "already_fused"
    assert "asked for named: is not known to answer every query as the call that is there does" in str(report)
    with pytest.raises(AttnpassError, match="named: is not known to answer"):
        report_of(source, kernel="named", strict_kernel=True)


# -- where a policy comes from -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
def test_every_front_goes_by_the_policy_around_it(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("dear", cost=99.0)
    fake("cheap", cost=1.0)

    def compiled(**options: Any) -> Report:
        torch._dynamo.reset()
        attnpass.reset()
        torch.compile(Net(), backend=backend, options={"inner": "eager", **options})(sample())
        return attnpass.report()

    monkeypatch.setenv("ATTNPASS_KERNEL", "native")
    assert kernels_of(compiled()) == ["native"] * 3
    with attnpass.policy(kernel="dear"):
        assert kernels_of(compiled()) == ["dear"] * 3
        assert kernels_of(attnpass.audit(program())) == ["dear"] * 3
        assert kernels_of(attnpass.audit(Net(), sample())) == ["dear"] * 3
        assert kernels_of(attnpass.rewrite(program())[1]) == ["dear"] * 3
        assert kernels_of(attnpass.rewrite(program(), policy=Policy(fuel=1))[1]) == ["dear", None, None]
        assert kernels_of(compiled(kernel="cheap")) == ["cheap"] * 3
        assert kernels_of(compiled(kernel=None)) == ["cheap"] * 3
    monkeypatch.setenv("ATTNPASS_KERNEL", "natve")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"ATTNPASS_KERNEL: .*near are native"):
        compiled()


# -- the registry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keep", "SDPA", "_native", "flash_attention_3", "_"])
def test_a_kernel_cannot_take_a_name_that_has_a_meaning(name: str) -> None:
    with pytest.raises(AttnpassError, match="a kernel"):
        attnpass.register_kernel(Fake(name, None, None))


class Point:
    """An entry point."""

    value = "somewhere:Thing"

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.load = name, load


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the registry find these entry points, as if the process had just begun."""
    import attnpass.kernels as registry

    def install(*points: Point) -> None:
        monkeypatch.setattr(registry, "_registered", list(registry._registered))
        monkeypatch.setattr(registry, "_plugins_loaded", False)
        monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "attnpass.kernels" else ())

    return install


def test_kernels_of_other_packages_are_loaded_when_kernels_are_listed(entry_points: Callable[..., None]) -> None:
    loaded: list[str] = []

    def load() -> Any:
        loaded.append("once")
        attnpass.kernels.kernels()  # a plugin may look at what is there
        return Fake("plugged", 1.0, None)

    entry_points(Point("plugged", load), Point("made", lambda: lambda: Fake("made", 99.0, None)))
    Policy()
    assert loaded == []
    assert Policy(kernel="Plugged").kernel == "plugged"
    assert kernels_of(report_of()) == ["plugged"] * 3
    assert kernels_of(report_of(kernel="made")) == ["made"] * 3
    assert loaded == ["once"]


def missing() -> Any:
    raise ImportError("libcuda.so.1: cannot open shared object file")


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (missing, "ImportError: libcuda.so.1"),
        (lambda: 3, "TypeError"),
        (lambda: dict, "TypeError: somewhere:Thing gives dict, not an attnpass.Kernel"),
    ],
)
def test_a_broken_entry_point_is_a_warning_and_a_kernel_that_is_not_there(
    load: Callable[[], Any], text: str, entry_points: Callable[..., None]
) -> None:
    entry_points(Point("broken", load), Point("fine", lambda: Fake("fine", 1.0, None)))
    with pytest.warns(RuntimeWarning, match="the kernel 'broken' was left out; its entry point 'somewhere:Thing'"):
        report = report_of(kernel="broken")
    assert kernels_of(report) == ["fine"] * 3
    assert f"asked for broken: its entry point 'somewhere:Thing' failed: {text}" in " ".join(str(report).split())


def test_a_broken_entry_point_is_no_error_where_warnings_are(entry_points: Callable[..., None]) -> None:
    entry_points(Point("broken", missing), Point("native", lambda: Fake("native", 1.0, None)))
    names = [kernel.name for kernel in attnpass.kernels.kernels()]  # the tests turn warnings into errors
    assert "broken" in names
    assert names.count("native") == 1
