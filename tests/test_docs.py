"""The documentation is true: generated pages are up to date, links lead somewhere, Python in it runs."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import attnpass
from attnpass.reasons import CATALOGUE, to_markdown

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


def blocks(page: Path) -> list[str]:
    """The Python in a page."""
    return [code for language, code in _FENCE.findall(page.read_text()) if language == "python"]


def anchor(heading: str) -> str:
    """What a heading is called in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_page_of_reasons_is_what_the_catalogue_says():
    assert (ROOT / "docs" / "reasons.md").read_text() == to_markdown(), "run `make docs`"


def test_every_reason_has_a_text_and_an_advice():
    for code, entry in CATALOGUE.items():
        assert re.fullmatch(r"[a-z_]+", code)
        assert entry.text
        assert entry.advice.endswith("."), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path):
    text = _FENCE.sub("", page.read_text())
    for link in _LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if heading:
            assert heading in {anchor(h) for h in _HEADING.findall(target.read_text())}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_codes_that_a_page_names_are_in_the_catalogue(page: Path):
    for code in re.findall(r"attnpass reasons ([a-z_]+)", page.read_text()):
        assert code in CATALOGUE


@pytest.mark.parametrize(
    ("page", "code"), [pytest.param(p, c, id=f"{p.name}-{i}") for p in PAGES for i, c in enumerate(blocks(p))]
)
def test_python_in_the_pages_runs(page: Path, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from attnpass.recognize import walk

    if 'backend="attnpass"' in code:
        compile(code, str(page), "exec")  # needs the package installed; tests/test_examples.py runs the like
        return
    monkeypatch.setattr(walk, "RULES", dict(walk.RULES))  # a page that registers a rule leaves no trace
    # a module of its own, because torch.compile wants to import the module that a function comes from
    (tmp_path / "code_of_a_page.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "code_of_a_page", raising=False)
    importlib.invalidate_caches()
    importlib.import_module("code_of_a_page")
    monkeypatch.delitem(sys.modules, "code_of_a_page")


def test_public_names_that_the_readme_uses_exist():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"attnpass\.([a-z_]+)\(", text)):
        assert name in attnpass.__all__, name


def test_every_example_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f"(examples/{example.name})" in text, example.name


def test_every_page_is_linked_from_somewhere():
    linked = {
        (page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in _LINK.findall(page.read_text())
    }
    assert {page for page in PAGES if page.name != "README.md"} <= linked


def test_the_audit_in_the_readme_is_what_comes_out():
    transformers = pytest.importorskip("transformers")
    from tests import audit_in_readme

    pinned = dict(re.findall(r"^(torch|transformers)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    here = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    if here != pinned:
        pytest.skip(f"the README shows {pinned}")
    assert audit_in_readme.audit_text() == audit_in_readme.shown(), "run `python -m tests.audit_in_readme`"
