"""What is kept on disk is never served to another policy, another kernel or another version of the package.

Inductor and AOTAutograd keep compiled graphs under a key that is made of the graph and of settings. Kernels are chosen
in the graph, so another choice is another key; what our operations do is in the settings, by `kernels.identity`. The
pass itself is run whatever is kept, so the report of a warm start is that of a cold one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import attnpass
from attnpass import autotune, choose
from attnpass.capture.dynamo import backend
from attnpass.kernels import identity as identities
from attnpass.kernels.native import Native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATTNPASS_CACHE", str(tmp_path))
    attnpass.reset()
    yield
    attnpass.reset()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT * 0.2).masked_fill(~keep, -torch.inf).softmax(-1) @ v


# -- of torch: in one process ------------------------------------------------------------------------------------------


def hits(**options: Any) -> dict[str, int]:
    """Compile as a new process would, and count what came from the caches."""
    torch._dynamo.reset()
    attnpass.reset()
    counters.clear()
    given = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
    out = torch.compile(attention, backend=backend, options=options)(*given)
    torch.testing.assert_close(out, attention(*given))
    out.sum().backward()
    return {
        "hit": counters["aot_autograd"]["autograd_cache_hit"],
        "miss": counters["aot_autograd"]["autograd_cache_miss"],
    }


def test_a_key_holds_the_choice_and_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "identity", functools.cache(lambda: "one"))
    monkeypatch.setattr("attnpass.capture.fence.identity", lambda: identities.identity())
    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        assert hits() == {"hit": 0, "miss": 1}
        cold = attnpass.report().to_dict()
        assert hits() == {"hit": 1, "miss": 0}
        assert attnpass.report().to_dict() == cold  # the pass was run again
        assert hits(kernel="native_math") == {"hit": 0, "miss": 1}
        assert attnpass.report().sites[0].kernel == "native_math"
        assert hits(kernel="keep") == {"hit": 0, "miss": 1}
        monkeypatch.setattr(identities, "identity", lambda: "two")
        assert hits() == {"hit": 0, "miss": 1}, "code of another version was served"


def test_the_identity_is_the_text_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = identities.identity.__wrapped__
    now = real()
    assert now.startswith(f"{attnpass.__version__} ")
    assert real() == now
    folder = tmp_path / "kernels"
    folder.mkdir()
    for file in Path(identities.__file__).parent.glob("*.py"):
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(identities.resources, "files", lambda package: folder)
    assert real() == now
    (folder / "flash_ops.py").write_text((folder / "flash_ops.py").read_text() + "\n# another one")
    assert real() != now
    monkeypatch.setattr(attnpass, "__version__", "9.9.9")
    assert real().startswith("9.9.9 ")


# -- ours --------------------------------------------------------------------------------------------------------------


class Vendors(Native):
    """A kernel of a package that has versions."""

    name = "vendors"
    at = "2.7"

    def version(self) -> str:
        return self.at


def timed(length: int = 64, **options: Any) -> dict[str, float | None]:
    """Compile, and tell the times that the choice went by."""
    torch._dynamo.reset()
    attnpass.reset()
    given = [torch.randn(1, 2, length, 8) for _ in range(3)]
    torch.compile(attention, backend=backend, options={"autotune": True, "inner": "eager"}, **options)(*given)
    (site,) = attnpass.report().sites
    return {v.kernel: v.cost_us for v in site.verdicts if v.timed}


def test_times_are_of_one_version_of_the_kernel_and_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choose, "kernels", lambda: (Vendors(),))

    def said() -> str:
        return capsys.readouterr().err

    first = timed()
    assert "timing vendors" in said()
    assert timed() == first
    assert not said()
    monkeypatch.setattr(Vendors, "at", "2.8")
    timed()
    assert "timing vendors" in said()
    monkeypatch.setattr(Vendors, "at", "2.7")
    assert timed() == first
    assert not said()
    monkeypatch.setattr(autotune, "identity", lambda: "another version of attnpass")
    timed()
    assert "timing vendors" in said()
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("9.9.9"))
    timed()
    assert "timing vendors" in said()


def test_a_symbolic_length_is_timed_for_each_number_that_it_was_traced_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    timed(64, dynamic=True)
    capsys.readouterr()
    timed(64, dynamic=True)
    assert "timing" not in capsys.readouterr().err
    timed(512, dynamic=True)
    assert "timing" in capsys.readouterr().err


# -- of torch: processes that share a folder ---------------------------------------------------------------------------

CHILD = """
import json, sys, torch
import attnpass
from attnpass.kernels import identity as identities
from torch._dynamo.utils import counters
from torch.profiler import profile

options, version = json.loads(sys.argv[1]), sys.argv[2]
if version:
    from attnpass.capture import fence
    fence.identity = lambda: version
train = options.pop("train", False)

def attention(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT * 0.2).masked_fill(~keep, -torch.inf).softmax(-1) @ v

torch.manual_seed(0)
given = [torch.randn(1, 2, 64, 32, requires_grad=train) for _ in range(3)]
compiled = torch.compile(attention, backend="attnpass", options=options)
with torch.set_grad_enabled(train):
    out = compiled(*given)
    torch.testing.assert_close(out, attention(*given), atol=1e-5, rtol=1e-4)
    if train:
        got = torch.autograd.grad(out.sum(), given)
        torch.testing.assert_close(got, torch.autograd.grad(attention(*given).sum(), given), atol=1e-4, rtol=1e-3)
    with profile() as seen:
        compiled(*given)
ops = sorted({event.name for event in seen.events() if event.name.startswith("aten::_scaled_dot")})
print(json.dumps({
    "report": attnpass.report().to_dict(), "ran": ops,
    "fx": counters["inductor"]["fxgraph_cache_hit"], "aot": counters["aot_autograd"]["autograd_cache_hit"],
    "missed": counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"],
}))
"""


@pytest.fixture
def process(tmp_path: Path) -> Any:
    def run(version: str = "", environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        shared = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "ATTNPASS_CACHE": str(tmp_path / "ours")}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(options), version],
            env={**os.environ, **shared, **(environment or {})},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_processes_that_share_a_cache(process: Any, train: bool) -> None:
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    cold = process(train=train)
    assert cold["missed"]
    assert not cold["aot"]
    assert cold["ran"] == [flash]
    warm = process(train=train)
    assert warm["aot"] == 1
    assert not warm["missed"]
    assert warm["ran"] == [flash]
    assert warm["report"] == cold["report"]
    other = process(train=train, kernel="native_math")
    assert not other["aot"]
    assert other["report"]["sites"][0]["kernel"] == "native_math"
    assert flash not in other["ran"]
    by_environment = process(train=train, environment={"ATTNPASS_KERNEL": "native_math"})
    assert by_environment["aot"] == 1  # the same graph, however the choice was told
    assert by_environment["report"] == other["report"]
    assert by_environment["ran"] == other["ran"]
    kept = process(train=train, kernel="keep")
    assert not kept["aot"]
    assert flash not in kept["ran"]
    assert process(train=train)["ran"] == [flash]
    newer = process("another version of attnpass", train=train)
    assert not newer["aot"]
    assert newer["missed"]


@pytest.mark.slow
def test_masks_in_functions_are_part_of_the_key(process: Any) -> None:
    if process(kernel="flex")["report"]["sites"][0]["kernel"] != "flex":
        pytest.skip("FlexAttention does not run here")
    again = process(kernel="flex")
    assert again["ran"] == []
    assert again["report"]["sites"][0]["kernel"] == "flex"
    assert process()["ran"] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
