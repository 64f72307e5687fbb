"""The shape of the source tree: who may import whom, how long a file may be, what a bare import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "attnpass"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400

# Imports go down this list only; what shares a line may not import one another across packages.
ORDER: tuple[tuple[str, ...], ...] = (
    ("spec", "errors", "reasons", "names", "files"),
    ("ledger",),
    ("graph", "shape_readers", "warn", "aside"),
    ("site",),
    ("policy", "spelling", "cost"),
    ("ambient", "demands"),
    ("recognize", "masks", "kernels"),
    ("prove", "arrange", "verify"),
    ("layers",),
    ("structured", "standin", "lse", "gain", "excerpt"),
    ("tame",),
    ("functions",),
    ("closed",),
    ("choose", "emit"),
    ("autotune",),
    ("trial",),
    ("pipeline",),
    ("capture",),
    ("bisect",),
    ("report",),
    ("session",),
    ("__init__",),
    ("cli_pickles",),
    ("cli_files", "cli_kernels", "cli_verify", "demo"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
STRANGERS = ("recognize", "masks", "kernels")  # they meet in spec.py

# Module-level imports of other packages: everything else is imported where it is used.
ALLOWED = {"torch", "networkx"}


def part_of(path: Path) -> str:
    """The line of ORDER that a file belongs to: its top-level module or package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What a module imports when it is imported, with lines; `if TYPE_CHECKING:` blocks do not count."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            assert child.module is not None
            if child.module == "attnpass":
                yield from ((f"attnpass.{alias.name}", child.lineno) for alias in child.names)
            else:
                yield child.module, child.lineno
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_every_module_has_a_place_in_the_order() -> None:
    unknown = {part_of(path) for path in FILES} - set(RANK)
    assert not unknown, f"say in ORDER where {sorted(unknown)} belong"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    mine = part_of(path)
    for module, line in imports(parsed(path)):
        if not module.startswith("attnpass"):
            continue
        theirs = module.split(".")[1] if "." in module else "__init__"
        theirs = theirs if theirs in RANK else "__init__"  # a name of the package itself
        assert RANK[theirs] <= RANK[mine], f"{path.name}:{line} imports {module}, which stands above it"
        if mine in STRANGERS and theirs in STRANGERS:
            assert mine == theirs, f"{path.name}:{line} imports {module}; they meet in spec.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_packages_are_imported_where_they_are_used(path: Path) -> None:
    for module, line in imports(parsed(path)):
        top = module.partition(".")[0]
        assert top == "attnpass" or top in sys.stdlib_module_names or top in ALLOWED, f"{path.name}:{line}: {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < LONGEST, f"{lines} lines: a long file hides a second idea"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path: Path) -> None:
    if path.read_text(encoding="utf-8").strip():
        assert ast.get_docstring(parsed(path)), f"{path.name} has no docstring"


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, attnpass; assert 'torch' not in sys.modules; attnpass.Policy(); assert callable(attnpass.report)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_is_there() -> None:
    import attnpass

    for name in attnpass.__all__:
        assert getattr(attnpass, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = attnpass.nonsense


def test_the_function_report_is_not_replaced_by_the_package_of_that_name() -> None:
    code = (
        "import importlib, attnpass, inspect\n"
        "for name in ('report', 'capture'):\n"
        "    importlib.import_module('attnpass.' + name)\n"
        "assert inspect.isfunction(attnpass.report)\n"
        "assert inspect.ismodule(attnpass.capture)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
