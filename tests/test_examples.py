"""Every example runs, in a process of its own, and says what it should."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXPECTED = {
    "add_a_kernel.py": ["-> capped", "has no backward"],
    "add_an_idiom.py": ["unknown_op", "-> native"],
    "audit_transformers.py": ["layers.*.self_attn", "weights_used"],
    "quickstart.py": ["4x", "-> native", "gradients"],
    "rewrite_exported.py": ["-> native", "without attnpass, at other sizes"],
}
# transformers imports torchvision, whose binary part may not fit the torch that is tested
RUN = """
import runpy, sys
from tests.models import torchvision_stub
if "transformers" in sys.argv[1]:
    torchvision_stub.ensure()
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def _entry_point(folder: Path) -> None:
    """What installing the package would tell torch: where the backend is."""
    info = folder / "attnpass_for_tests-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attnpass-for-tests\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\nattnpass = attnpass.capture.dynamo:backend\n")


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_says_what_it_should(example: Path, tmp_path: Path):
    paths = [str(ROOT)]
    if not importlib.metadata.entry_points(group="torch_dynamo_backends", name="attnpass"):
        _entry_point(tmp_path)
        paths.append(str(tmp_path))
    if "transformers" in example.name:
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(example)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for text in EXPECTED[example.name]:
        assert text in done.stdout, done.stdout


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES} == set(EXPECTED)
