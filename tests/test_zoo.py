"""The table of cases, run: recognition, numerics, idempotence, both fronts, the ledger, and the page in docs/."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import attnpass
from tests.zoo import CASES
from tests.zoo.__main__ import PAGE, TITLES, page
from tests.zoo.case import Case
from tests.zoo.idioms import IDIOMS
from tests.zoo.judge import differences, softmaxes
from tests.zoo.numbers import Run, complaints, run, truth

EXPORTED = [case for case in CASES if case.export]


@dataclass(frozen=True)
class Subject:
    """A case built: the module and its inputs are read only, every run works on copies."""

    module: nn.Module
    inputs: tuple[Any, ...]
    dynamic: Any

    @property
    def grad(self) -> bool:
        """Something needs a gradient."""
        return any(getattr(x, "requires_grad", False) for x in (*self.inputs, *self.module.parameters()))


def build(case: Case) -> Subject:
    torch.manual_seed(0)
    module, inputs, *dynamic = case.build()
    return Subject(module.train(case.train), inputs, dynamic[0] if dynamic else None)


@dataclass(frozen=True)
class Exported:
    subject: Subject
    before: ExportedProgram
    after: ExportedProgram
    report: dict[str, Any]


@functools.cache  # pytest runs each test for all cases, then the next test
def exported(case: Case) -> Exported:
    subject = build(case)
    before = torch.export.export(copy.deepcopy(subject.module), subject.inputs, dynamic_shapes=subject.dynamic)
    after, report = attnpass.rewrite(before)
    return Exported(subject, before, after, report.to_dict())


@functools.cache
def measured(case: Case) -> tuple[Run, Run]:
    """Eager code, and what it is measured against."""
    subject = build(case)
    eager = run(copy.deepcopy(subject.module), subject.inputs, grad=case.grad)
    return eager, truth(subject.module, subject.inputs, grad=case.grad) if case.reference == "float64" else eager


def by_case(cases: list[Case]) -> pytest.MarkDecorator:
    """All tests of one case in one worker, which exports and measures it once."""
    params = [pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.name)) for case in cases]
    return pytest.mark.parametrize("case", params)


@by_case(EXPORTED)
class TestExportedProgram:
    def test_is_recognised_or_refused_exactly(self, case: Case) -> None:
        found = exported(case)
        assert not differences(case, found.report, grad=found.subject.grad)

    def test_every_softmax_is_in_the_ledger_once(self, case: Case) -> None:
        found = exported(case)
        ids = [entry["id"] for entry in (*found.report["sites"], *found.report["misses"])]
        assert len(set(ids)) == len(ids) == softmaxes(found.before) + case.spelled

    def test_is_as_close_to_float64_as_eager_code(self, case: Case) -> None:
        subject, after = exported(case).subject, exported(case).after.module()
        eager, reference = measured(case)
        assert not complaints(run(after, subject.inputs, grad=case.grad), eager, reference)

    def test_is_not_rewritten_twice(self, case: Case) -> None:
        after = exported(case).after
        again, report = attnpass.rewrite(after)
        assert report.replaced == 0
        assert again.graph_module.code == after.graph_module.code


@by_case([case for case in CASES if case.other_sizes])
def test_a_rewritten_program_runs_at_other_sizes(case: Case) -> None:
    assert case.other_sizes is not None
    inputs, module = case.other_sizes(), build(case).module
    eager = run(copy.deepcopy(module), inputs, grad=case.grad)
    reference = truth(module, inputs, grad=case.grad)
    assert not complaints(run(exported(case).after.module(), inputs, grad=case.grad), eager, reference)


@by_case(list(CASES))
def test_torch_compile_finds_the_same_and_computes_the_same(case: Case) -> None:
    found = compiled(case)
    eager, reference = measured(case)
    assert not complaints(found.run, eager, reference)
    if not case.alike:
        assert not differences(case.compiled, found.report, grad=found.subject.grad)


@dataclass(frozen=True)
class Compiled:
    subject: Subject
    run: Run
    report: dict[str, Any]


def compiled(case: Case) -> Compiled:
    from attnpass.capture.dynamo import backend

    subject = build(case)
    module = copy.deepcopy(subject.module)
    torch._dynamo.reset()
    attnpass.reset()
    fast = torch.compile(module, backend=backend, options={"inner": "eager"}, fullgraph=True)
    outcome = run(module, subject.inputs, call=lambda *args: fast(*marked(subject, args)), grad=case.grad)
    return Compiled(subject, outcome, attnpass.report().to_dict())


def marked(subject: Subject, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same dimensions dynamic for Dynamo as for torch.export."""
    shapes = subject.dynamic["args"] if isinstance(subject.dynamic, dict) else subject.dynamic or ()
    for arg, dims in zip(args, shapes, strict=False):
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(arg, dim)
    return args


# -- the table itself --------------------------------------------------------------------------------------------------


def test_names_are_unique_and_themes_have_titles() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 150
    assert {case.theme for case in CASES} == TITLES.keys()


def test_every_idiom_trap_and_bug_has_a_case_and_no_case_has_another() -> None:
    assert {case.idiom for case in CASES} == IDIOMS.keys()


def test_a_third_of_the_cases_are_look_alikes_or_traps() -> None:
    assert sum(case.trap for case in CASES) * 3 >= len(CASES)


def test_the_page_in_docs_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.zoo"


def test_reasons_in_the_table_are_in_the_catalogue() -> None:
    from attnpass.reasons import CATALOGUE

    codes = {e.reason for case in CASES for e in case.expect if e.reason}
    assert codes <= CATALOGUE.keys()


def setup_module() -> None:
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
