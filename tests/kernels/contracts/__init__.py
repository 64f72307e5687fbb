"""The signatures of functions that kernels call, as their vendors' wheels have them.

    python -m tests.kernels.contracts WHEEL      prints what a fixture of this folder holds

Nothing is imported from a wheel: Python files are parsed, lists of operations are read as text. The fixtures are what
test_contracts.py holds the stand-ins to, whose signatures in turn every call of ours meets.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

# of each package: Python files and their functions, lists of operations and theirs
WANTED: dict[str, tuple[dict[str, list[str]], dict[str, list[str]]]] = {
    "amd_aiter": ({"aiter/ops/mha.py": ["flash_attn_func", "_flash_attn_backward"]}, {}),
    "torch_npu": ({}, {"torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml": ["npu_fusion_attention"]}),
    "torch_xla": (
        {"torch_xla/experimental/custom_kernel.py": ["fa_custom_forward", "fa_custom_backward"]},
        {},
    ),
    "xformers": (
        {
            "xformers/ops/fmha/__init__.py": [
                "memory_efficient_attention_forward_requires_grad",
                "memory_efficient_attention_backward",
            ]
        },
        {},
    ),
}


def load(package: str) -> dict[str, Any]:
    """The fixture of one package."""
    found: dict[str, Any] = json.loads((FOLDER / f"{package}.json").read_text(encoding="utf-8"))
    return found


def extract(wheel: Path) -> dict[str, Any]:
    """What a fixture holds, from a wheel."""
    package, version = wheel.name.split("-")[:2]
    files, lists = WANTED[package]
    functions: dict[str, str] = {}
    schemas: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for path, names in files.items():
            functions |= parameters(archive.read(path).decode(), names)
        for path, names in lists.items():
            text = archive.read(path).decode()
            for name in names:
                found = re.search(rf"func: ({name}\(.*)$", text, re.MULTILINE)
                assert found is not None, name
                schemas[name] = found[1].strip()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {"package": package, "version": version, "sha256": digest, "functions": functions, "schemas": schemas}


def parameters(source: str, names: list[str]) -> dict[str, str]:
    """The parameters of top-level functions of a Python file, with defaults and without types."""
    found = {node.name: node.args for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for name in names:
        for arg in (*found[name].args, *found[name].kwonlyargs):
            arg.annotation = None
    return {name: ast.unparse(found[name]) for name in names}
