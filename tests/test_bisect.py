"""attnpass bisect: the sites that make an output differ, and the files that show them without the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnpass
from attnpass import cli
from attnpass.spec import AttentionSpec
from tests.wrong_kernels import wrong

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> None: ...


class Layer(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(24, 72)

    def forward(self, x: Tensor, pad: Tensor | None) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if pad is not None:
            scores = scores.masked_fill(~pad[:, None, None], float("-inf"))
        return x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Three layers with 2, 3 and 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, (2, 3, 4)))

    def forward(self, x: Tensor, pad: Tensor | None = None) -> dict[str, list[Tensor]]:
        for layer in self.layers:
            x = layer(x, pad)
        return {"hidden": [x]}


def heads(*wanted: int) -> object:
    return lambda spec: spec.q[1] in wanted


def inputs() -> tuple[Tensor, Tensor]:
    pad = torch.ones(2, 20, dtype=torch.bool)
    pad[0, 12:] = False
    return torch.randn(2, 20, 24), pad


def run(path: Path) -> subprocess.CompletedProcess[str]:
    """The file in a process of its own, from another folder."""
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=path.parent, check=False)


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    found = attnpass.bisect(Stack(), *inputs(), output=str(tmp_path / "repro.py"))
    assert not found.differs
    assert found.replaced == 3
    assert found.against == "float64"
    assert found.tensor == "output['hidden'][0]"
    assert 0 < found.gap.replacement <= found.gap.allowed < 1e-3
    assert not list(tmp_path.iterdir())


def test_the_one_wrong_site_is_found_and_its_file_shows_it_without_the_model(tmp_path: Path) -> None:
    path = tmp_path / "repro.py"
    with wrong(heads(4), scale=1.05):
        found = attnpass.bisect(Stack(), *inputs(), output=str(path))
    (one,) = found.found
    (site,) = one.sites
    assert site.where.module == "layers.2"
    assert site.where.file == __file__
    assert site.where.code is not None
    assert "softmax" in site.where.code
    assert one.gap.worse
    assert one.alone
    assert one.reproducer == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["repro.py"], "the values are in it, and nothing else is left"
    text = path.read_text()
    assert "layers.2" in text
    assert "test_bisect" not in text.replace(__file__, ""), "the model is not needed"
    done = run(path)
    assert done.returncode == 1, done.stderr
    assert "the replacement is worse than the original" in done.stdout
    # the file shows the difference, not itself: with the right scale it is gone
    scales = {part.split(")")[0] for part in text.split("scale = ")[1:]}
    (scale,) = scales
    path.write_text(text.replace(f"scale = {scale}", f"scale = {float(scale) / 1.05}"))
    done = run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference beyond rounding" in done.stdout


@pytest.mark.slow
def test_each_of_several_wrong_sites_is_found(tmp_path: Path) -> None:
    with wrong(heads(2, 4), scale=0.9):
        found = attnpass.bisect(Stack(), *inputs(), output=str(tmp_path / "repro.py"))
    assert [one.sites[0].where.module for one in found.found] == ["layers.0", "layers.2"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["repro.py", "repro_2.py"]


@pytest.mark.slow
def test_values_that_are_large_are_kept_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "repro.py"
    with wrong(heads(3), unmasked=True):
        x, pad = torch.randn(2, 400, 24), torch.ones(2, 400, dtype=torch.bool)
        pad[:, 200:] = False
        found = attnpass.bisect(Stack(), x, pad, output=str(path))
    assert [one.sites[0].where.module for one in found.found] == ["layers.1"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["repro.pt", "repro.py"]
    assert run(path).returncode == 1


@pytest.mark.slow
def test_gradients_are_compared_on_request() -> None:
    with wrong(heads(3), scale=1.02):
        found = attnpass.bisect(Stack(), *inputs(), gradients=True)
    assert [one.sites[0].where.module for one in found.found] == ["layers.1"]
    assert found.tensor.startswith("gradient of layers."), "the weights of layers before it feel it most"
    with pytest.raises(attnpass.AttnpassError, match="no gradient to compare"):
        attnpass.bisect(Stack().requires_grad_(False), *inputs(), gradients=True)


@pytest.mark.slow
def test_a_tolerance_is_measured_from_the_model_itself() -> None:
    with wrong(heads(3), scale=1.02):
        assert not attnpass.bisect(Stack(), *inputs(), tolerance=0.5).differs
        found = attnpass.bisect(Stack(), *inputs(), tolerance=1e-5)
    assert found.differs
    assert found.against == "the model as it is"


@pytest.mark.slow
def test_where_a_model_does_not_run_in_float64_its_last_bits_are_the_measure() -> None:
    class Single(Stack):
        def forward(self, x: Tensor, pad: Tensor | None = None) -> dict[str, list[Tensor]]:
            assert x.dtype == torch.float32
            return super().forward(x, pad)

    found = attnpass.bisect(Single(), *inputs())
    assert not found.differs
    assert "in float64 it does not run: AssertionError" in found.against
    assert 0 < found.gap.allowed < 1e-3
    with wrong(heads(3), scale=1.02):
        found = attnpass.bisect(Single(), *inputs())
    assert [one.sites[0].where.module for one in found.found] == ["layers.1"]


@pytest.mark.slow
def test_random_numbers_are_the_same_in_every_run_and_dropout_sites_are_left_out() -> None:
    class Noisy(Stack):
        def forward(self, x: Tensor, pad: Tensor | None = None) -> dict[str, list[Tensor]]:
            return super().forward(nn.functional.dropout(x, 0.5, training=True), pad)

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    found = attnpass.bisect(Noisy(), *inputs())
    assert not found.differs
    assert found.gap.replacement < 1e-4, "with other numbers the output would be another"
    torch.manual_seed(1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_model_is_as_it_was() -> None:
    class Counting(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, pad: Tensor | None = None) -> dict[str, list[Tensor]]:
            self.calls += 1
            return super().forward(x, pad)

    model = Counting()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    attnpass.bisect(model, *inputs()[:1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(state, torch.random.get_rng_state()), "inputs() draws, and nothing else"


# -- the command line --------------------------------------------------------------------------------------------------


def factory() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Stack().eval(), inputs()


def nothing() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Linear(4, 4), (torch.randn(2, 4),)


@pytest.mark.slow
def test_the_command_says_where_and_writes_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target, path = f"{__name__}:factory", tmp_path / "repro.py"
    assert cli.main(["bisect", target, "-o", str(path)]) == 0
    assert "no difference with all 3 sites replaced" in capsys.readouterr().out
    with wrong(heads(4), scale=1.05):
        assert cli.main(["bisect", target, "-o", str(path)]) == 3
        told = capsys.readouterr().out
        assert "layers.2  test_bisect.py:" in told
        assert "softmax(-1) @ v" in told
        assert f"python {path}" in told.replace("\n", "")
        assert cli.main(["bisect", target, "-o", str(path), "--json", "--tolerance", "1e-4"]) == 3
    row = json.loads(capsys.readouterr().out)
    assert [site["where"]["module"] for one in row["found"] for site in one["sites"]] == ["layers.2"]
    assert row["found"][0]["reproducer_shows_it"] is True
    assert cli.main(["bisect", f"{__name__}:nothing"]) == 1
    assert "no site is replaced" in capsys.readouterr().out
    assert cli.main(["bisect", "model.pt2"]) == 2
    assert "package.module:factory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with wrong(heads(4), scale=1.05), pytest.raises(attnpass.AttnpassError, match="cannot be written"):
        attnpass.bisect(Stack(), *inputs(), output=str(tmp_path / "no" / "repro.py"))


def test_what_is_shown_only_together_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sites, each within what is allowed, and both beyond it."""
    from attnpass.bisect import _Search
    from attnpass.trial.compare import Gap

    def difference(search: object, wanted: list[str]) -> tuple[str, Gap]:
        return "output", Gap(0.0, float(len(wanted)), 1.5)

    monkeypatch.setattr(_Search, "difference", difference)
    search = object.__new__(_Search)
    gaps = list(search.culprits(["a", "b", "c"], "output", Gap(0.0, 3.0, 1.5)))
    assert [names for names, _, _ in gaps] == [["b", "c"]]


def test_the_spec_of_the_wrong_kernel_is_what_the_tests_think() -> None:
    found: list[AttentionSpec] = []
    with wrong(lambda spec: bool(found.append(spec))):
        attnpass.audit(Stack(), *inputs())
    assert [spec.q[1] for spec in found] == [2, 3, 4]
