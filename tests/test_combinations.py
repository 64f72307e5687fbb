"""Every option of the backend in every mode of training and running: right, and it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.combinations import OPTIONS

LIMIT = 600  # seconds; a minute on a quiet machine


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_in_every_mode(option: str, tmp_path: Path) -> None:
    env = os.environ | {"ATTNPASS_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "tests.combinations", option]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.stdout.endswith("all held\n"), done.stdout + done.stderr[-2000:]
