"""verify=True: every replacement is tried beside its original, and one that is worse is put back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnpass
from attnpass import cli
from attnpass.ledger import Decision, Report
from attnpass.spec import AttentionSpec
from attnpass.trial import CLEAN, examine
from attnpass.trial.inputs import HUGE, MASKS_OFF, MASKS_RANDOM, PADDING, RANDOM, REAL, TIES
from tests.wrong_kernels import NAME, wrong

ROOT = Path(__file__).resolve().parent.parent
VERIFY = {"verify": True, "inner": "eager"}


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


class Block(nn.Module):
    """Two attentions of different widths, the second over fewer queries."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 96), nn.Linear(32, 48)

    @staticmethod
    def attend(qkv: Tensor, pad: Tensor | None) -> Tensor:
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if pad is not None:
            scores = scores.masked_fill(~pad[:, None, None], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.wide(x), pad)
        return self.attend(self.narrow(x), pad)


def narrow(spec: AttentionSpec) -> bool:
    return spec.qk_width == 4


def kinds(site: Decision, what: str = "result") -> list[str]:
    return [trial.inputs for trial in site.trials if trial.what == what]


def padding() -> Tensor:
    pad = torch.ones(2, 20, dtype=torch.bool)
    pad[0, 12:] = False
    return pad


def compiled(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Report]:
    attnpass.reset()
    torch._dynamo.reset()
    out = torch.compile(fn, backend="attnpass", options=VERIFY | options)(*args)
    return out, attnpass.report()


# -- what is right stays -----------------------------------------------------------------------------------------------


def test_a_right_kernel_is_kept_and_its_numbers_are_told() -> None:
    x = torch.randn(2, 20, 32)
    _, report = compiled(Block(), x)
    assert report.replaced == 2
    assert not report.failures
    for site in report.sites:
        assert kinds(site) == kinds(site, "gradient") == [REAL, RANDOM, HUGE, TIES]
        assert all(0 < trial.original < 1 and 0 <= trial.replacement < trial.allowed for trial in site.trials)
        assert site.untried is None


def test_masks_that_are_inputs_are_varied_and_padding_is_made_unclean() -> None:
    with torch.no_grad():
        _, report = compiled(Block(), torch.randn(2, 20, 32), padding())
    for site in report.sites:
        assert {MASKS_OFF, MASKS_RANDOM, *PADDING} <= set(kinds(site))
        assert kinds(site, "gradient") == []
        # the original fills what it has multiplied; fused kernels multiply what they fill
        assert site.replaced
        assert [t.inputs for t in site.trials if t.worse] == list(PADDING)
        assert site.assumptions == (CLEAN,)
    _, strict = compiled(Block(), torch.randn(2, 20, 32), padding(), strict=True)
    assert strict.replaced == 0
    assert all(site.reason is not None and site.reason.code == "strict" for site in strict.sites)


def test_what_inductor_compiles_for_a_trial_has_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # as for FlexAttention on CUDA: on a CPU it has none
    monkeypatch.setattr(examine, "_by_inductor", lambda pair: True)
    _, report = compiled(Block(), torch.randn(2, 20, 32), inner="inductor")
    for site in report.sites:
        assert kinds(site) == kinds(site, "gradient") == [REAL, RANDOM, HUGE, TIES], site.untried


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_that_a_fused_kernel_is_more_exact_is_no_fault(dtype: torch.dtype) -> None:
    _, report = compiled(Block().to(dtype), torch.randn(2, 20, 32, dtype=dtype))
    assert report.replaced == 2
    huge = next(t for t in report.sites[0].trials if t.inputs == HUGE)
    assert huge.original > 0.01, "scores in the thousands are rounded to whole numbers"
    assert huge.replacement < huge.original


def test_without_it_nothing_of_it_is_even_imported() -> None:
    code = (
        "import sys, torch, attnpass\n"
        "f = lambda q, k, v: (q @ k.mT / 8).softmax(-1) @ v\n"
        "torch.compile(f, backend='attnpass', options={'inner': 'eager'})(*torch.randn(3, 2, 4, 20, 64))\n"
        "assert attnpass.report().replaced == 1\n"
        "assert not attnpass.report().sites[0].trials\n"
        "assert not [name for name in sys.modules if name.startswith(('attnpass.trial', 'attnpass.capture.actual'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# -- what is wrong is put back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"scale": 1.05}, {"unmasked": True}])
def test_exactly_the_wrong_site_is_put_back_with_the_numbers(how: dict[str, Any]) -> None:
    model, x, pad = Block(), torch.randn(2, 20, 32), padding()
    with wrong(narrow, **how):
        out, report = compiled(model, x, pad)
    right, guilty = report.sites
    assert right.replaced
    assert right.kernel == NAME
    assert not guilty.replaced
    assert guilty.kernel is None
    assert guilty.reason is not None
    assert guilty.reason.code == "verify_worse"
    worst = max(t.replacement for t in guilty.trials if t.worse and t.inputs == REAL)
    assert 1e-3 < worst < 10
    assert "on" in guilty.reason.text
    assert f"{NAME} is worse than the original" in guilty.reason.text
    verdict = next(v for v in guilty.verdicts if v.kernel == NAME)
    assert [r.code for r in verdict.refusals] == ["verify_worse"]
    # and the model is right again
    torch.testing.assert_close(out, model(x, pad))


def test_a_wrong_gradient_alone_is_found() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad / 2

    from attnpass.kernels.native import Native

    class Backward(Native):
        name = "wrong"

        def cost(self, spec: AttentionSpec) -> float:
            return 0.0

        def emit(self, b: Any, call: Any) -> Any:
            out = super().emit(b, call)
            return b.call(lambda x: Halved.apply(x) if type(x) is Tensor else x.clone(), out)

    attnpass.register_kernel(Backward())
    try:
        report = attnpass.verify(Block(), torch.randn(2, 20, 32))
    finally:
        attnpass.unregister_kernel("wrong")
    assert report.replaced == 0
    for site in report.sites:
        assert not any(t.worse for t in site.trials if t.what == "result")
        assert all(t.worse for t in site.trials if t.what == "gradient" and t.inputs in (REAL, RANDOM))


def test_a_kernel_that_fails_when_it_runs_is_put_back() -> None:
    with wrong(narrow, raises=True):
        out, report = compiled(Block(), x := torch.randn(2, 20, 32))
    assert [site.replaced for site in report.sites] == [True, False]
    assert report.sites[1].reason is not None
    assert report.sites[1].reason.code == "verify_raised"
    assert "no such kernel image" in report.sites[1].reason.text
    assert out.shape == (2, 20, 16), x.shape


def test_what_shows_only_on_hard_inputs_is_found() -> None:
    """A kernel that ignores a padding mask is right as long as nothing is padded."""
    with wrong(unmasked=True), torch.no_grad():
        _, report = compiled(Block(), torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.bool))
    assert report.replaced == 0
    for site in report.sites:
        worse = {t.inputs for t in site.trials if t.worse}
        assert REAL not in worse
        assert MASKS_RANDOM in worse


def test_sites_behind_one_that_is_put_back_keep_what_they_share() -> None:
    """Equal masks are built once, by the first site; the others go on reading that."""

    def model(x: Tensor, pad: Tensor) -> Tensor:
        for scale in (0.5, 0.25, 0.125):
            i = torch.arange(20)
            keep = (i[None] <= i[:, None]) & pad[:, None, None]
            x = (x @ x.mT * scale).masked_fill(~keep, torch.finfo(x.dtype).min).softmax(-1) @ x
        return x

    x = torch.randn(2, 4, 20, 8)
    with wrong(lambda spec: spec.scale == 0.5, scale=0.8), torch.no_grad():
        out, report = compiled(model, x, padding())
    assert [site.replaced for site in report.sites] == [False, True, True]
    torch.testing.assert_close(out, model(x, padding()))


# -- what cannot simply be compared ------------------------------------------------------------------------------------


def test_rows_without_a_key_do_not_count_where_the_user_does_not_care() -> None:
    pad = padding()
    pad[1] = False
    with torch.no_grad():
        _, report = compiled(Block(), torch.randn(2, 20, 32), pad, empty_rows="dont_care")
    assert report.replaced == 2
    assert not any(t.worse for site in report.sites for t in site.trials if t.inputs not in PADDING)
    with wrong(scale=1.2), torch.no_grad():
        _, report = compiled(Block(), torch.randn(2, 20, 32), pad, empty_rows="dont_care")
    assert report.replaced == 0, "all other rows do"


@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_dropout_is_taken_out_of_both(scale: float) -> None:
    """No two kernels draw the same numbers; all else is compared."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.dropout((q @ k.mT / 4).softmax(-1), 0.3, training=True) @ v

    q, k, v = torch.randn(3, 2, 4, 20, 16)
    with wrong(scale=scale), no_refusals("dropout", "no_fused_form"):
        report = attnpass.verify(model, q, k, v)
    (site,) = report.sites
    assert site.spec.dropout == 0.3
    assert site.replaced is (scale == 1.0), site.reason
    assert kinds(site) == [REAL, RANDOM, HUGE, TIES]


class no_refusals:
    """The wrong kernel serves what it would refuse for these reasons."""

    def __init__(self, *codes: str) -> None:
        self.codes = codes

    def __enter__(self) -> None:
        from tests.wrong_kernels import Wrong

        self.kept = Wrong.refusals
        plain, codes = self.kept, self.codes

        def refusals(kernel: Any, spec: AttentionSpec) -> Iterator[Any]:
            yield from (r for r in plain(kernel, spec) if r.code not in codes)

        Wrong.refusals = refusals  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        from tests.wrong_kernels import Wrong

        Wrong.refusals = self.kept  # type: ignore[method-assign]


def test_a_mask_in_a_buffer_is_not_varied_where_the_proof_relies_on_it() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(20, 20).tril().bool())

        def forward(self, x: Tensor) -> Tensor:
            scores = (x @ x.mT / 4).masked_fill(~self.mask, float("-inf"))
            return scores.softmax(-1) @ x

    with torch.no_grad():
        _, report = compiled(Buffered(), torch.randn(2, 4, 20, 16))
    (site,) = report.sites
    assert site.replaced
    assert site.spec.mask.causal == 0
    assert kinds(site) == [REAL, RANDOM, HUGE, TIES]


def test_inside_a_checkpoint_a_site_gets_what_the_model_gives_it() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 3 + 1
        return checkpoint(lambda y: (y @ y.mT / 4).softmax(-1) @ y, y, use_reentrant=False)

    x = torch.randn(2, 4, 20, 16, requires_grad=True)
    with wrong(scale=1.3):
        report = attnpass.verify(model, x)
    (site,) = report.sites
    assert not site.replaced
    assert site.untried is None
    assert {REAL, RANDOM} <= set(kinds(site))


def test_a_graph_that_cannot_be_run_is_tried_on_made_up_inputs() -> None:
    """A program that was loaded without its inputs, say."""
    program = torch.export.export(Block().eval(), (torch.randn(2, 20, 32), padding()))
    program._example_inputs = None
    report = attnpass.verify(program)
    for site in report.sites:
        assert site.replaced
        assert site.untried == "no inputs to run the model on are known here"
        assert RANDOM in kinds(site)
        assert REAL not in kinds(site)


# -- nothing of the user's is touched ----------------------------------------------------------------------------------


def test_inputs_buffers_and_random_numbers_are_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(20)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            self.calls += 1
            cache.copy_(x)
            y = self.norm(cache.flatten(0, 1)).view_as(x) + torch.rand_like(x)
            return (y @ y.mT / 4).softmax(-1) @ y

    model, x, cache = Counting(), torch.randn(2, 4, 20, 16), torch.zeros(2, 4, 20, 16)
    plain, plain_cache = Counting(), torch.zeros(2, 4, 20, 16)
    torch.manual_seed(3)
    expected = torch.compile(plain, backend="eager")(x, plain_cache)
    after = torch.rand(3)
    torch.manual_seed(3)
    out, report = compiled(model, x, cache)
    assert report.replaced == 1
    assert report.sites[0].untried is None
    torch.testing.assert_close(out, expected)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(cache, plain_cache)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


# -- exported programs -------------------------------------------------------------------------------------------------


def test_an_exported_program_is_tried_on_its_own_inputs_or_on_others() -> None:
    program = torch.export.export(Block().eval(), (torch.randn(2, 20, 32), padding()))
    report = attnpass.verify(program)
    assert report.replaced == 2
    assert all(REAL in kinds(site) and site.untried is None for site in report.sites)
    report = attnpass.verify(program, torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.bool))
    assert all(REAL in kinds(site) for site in report.sites)
    with pytest.raises(attnpass.AttnpassError, match="does not take these arguments"):
        attnpass.verify(program, torch.randn(2, 21, 32))
    with wrong(narrow, scale=1.1):
        rewritten, report = attnpass.rewrite(program, policy=attnpass.Policy(verify=True))
    assert [site.replaced for site in report.sites] == [True, False]
    calls = [n for n in rewritten.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    assert len(calls) == 1


def test_of_a_dynamic_program_other_sizes_can_be_tried() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Block().eval(), (torch.randn(2, 20, 32),), dynamic_shapes=({0: batch},))
    report = attnpass.verify(program, torch.randn(5, 20, 32))
    assert report.replaced == 2
    assert all(REAL in kinds(site) for site in report.sites), [site.untried for site in report.sites]


# -- the command line --------------------------------------------------------------------------------------------------


def factory() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Block().eval().requires_grad_(False), (torch.randn(2, 20, 32), padding())


def empty() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Linear(4, 4), (torch.randn(2, 4),)


def test_the_command_shows_each_site_and_its_status_says_what_came_of_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = f"{__name__}:factory"
    assert cli.main(["verify", target]) == 0
    table = capsys.readouterr().out
    assert "tried against float64: 2 sites, none worse than its original" in table
    assert "fine, if padding is" in table
    page = tmp_path / "page.html"
    with wrong(narrow, scale=1.1):
        assert cli.main(["verify", target, "--html", str(page)]) == 3
        table = capsys.readouterr().out
        assert "1 put back" in table
        assert "put back" in table
        assert "wrong is worse than the original" in " ".join(table.split())
        assert cli.main(["verify", target, "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert [site["replaced"] for site in told["sites"]] == [True, False]
    assert any(trial["worse"] for trial in told["sites"][1]["trials"])
    html = page.read_text()
    assert "Tried against float64" in html
    assert "worse</span>" in html
    assert cli.main(["verify", f"{__name__}:empty"]) == 1
    capsys.readouterr()
    assert cli.main(["verify", "nowhere.pt2"]) == 2


def test_the_command_takes_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, args = factory()
    torch.export.save(torch.export.export(model, args), tmp_path / "model.pt2")
    assert cli.main(["verify", str(tmp_path / "model.pt2")]) == 0
    assert "2 sites" in capsys.readouterr().out
