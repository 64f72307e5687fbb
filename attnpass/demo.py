"""``attnpass demo``: three models nobody prepared, audited, compiled with and without attnpass, compared and timed.

    model ── audit ── torch.compile(model) ──────────────────────┐
                  └─ torch.compile(model, backend="attnpass") ──┴─ error against eager, time side by side

A GPT and a vision transformer written by hand, and a Llama of the transformers library where that is installed. All
are small, randomly initialised and run on the CPU in float32. Runs of the two compiled models take turns, so that
whatever else the machine does meets both; what is shown is the median, and the ratio of the medians.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnpass
from attnpass.errors import AttnpassError

if TYPE_CHECKING:
    from rich.console import Console

    from attnpass.ledger import Report

_SECONDS = 8.0  # of timing for each model
_ROUNDS = (5, 40)  # at least, at most
_TOLERANCE = 1e-3  # float32, a few layers: what is larger is a defect

# -- the models, as people write them ----------------------------------------------------------------------------------


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)
        q = q.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        k = k.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        v = v.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        seen = torch.tril(torch.ones(length, length, dtype=torch.bool, device=x.device))
        scores = scores.masked_fill(~seen, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 512, length: int = 2048, width: int = 256, heads: int = 4, depth: int = 3):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.einsum("bhid,bhjd->bhij", q * self.scale, k).softmax(dim=-1)
        y = torch.einsum("bhij,bhjd->bhid", weights, v)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    def __init__(self, side: int = 512, patch: int = 16, width: int = 256, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Example:
    """A model with arguments, and how to read the tensor to compare from what it returns."""

    title: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: Callable[[Any], Tensor] = lambda out: out


def gpt() -> Example:
    return Example("GPT, by hand (1 x 2048 tokens)", GPT(), (torch.randint(0, 512, (1, 2048)),))


def vit() -> Example:
    return Example("ViT, by hand (2 x 1025 patches)", ViT(), (torch.randn(2, 3, 512, 512),))


def llama() -> Example:
    _hide_broken_torchvision()
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except (ImportError, OSError, RuntimeError) as error:
        raise AttnpassError(f"left out: transformers cannot be imported, pip install transformers ({error})") from error
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        attn_implementation="eager",
    )
    return Example(
        "Llama, transformers, eager (1 x 2048 tokens)",
        LlamaForCausalLM(config),
        (torch.randint(0, 512, (1, 2048)),),
        {"use_cache": False},
        lambda out: out.logits,
    )


def _hide_broken_torchvision() -> None:
    """transformers imports a torchvision that is built for another torch, and then cannot be imported itself."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]


EXAMPLES = (gpt, vit, llama)

# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is shown of one model."""

    model: str
    sites: int
    replaced: int
    error: tuple[float, float]  # against eager, without attnpass and with it
    ms: tuple[float, float]
    rounds: int

    @property
    def ratio(self) -> float:
        return self.ms[0] / self.ms[1]


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


def _compilers() -> tuple[Callable[..., Any], Callable[..., Any], str]:
    """torch.compile without and with attnpass, and what comes after it in both cases."""
    import torch._dynamo

    # the name works once the package is installed; from a source tree its function does
    backend: Any = "attnpass"
    if backend not in torch._dynamo.list_backends():
        from attnpass.capture import dynamo

        backend = dynamo.backend
    if _has_compiler():
        return torch.compile, lambda model: torch.compile(model, backend=backend), "inductor"
    return (
        lambda model: torch.compile(model, backend="aot_eager"),
        lambda model: torch.compile(model, backend=backend, options={"inner": "aot_eager"}),
        "aot_eager, because no C++ compiler was found",
    )


def measure(example: Example, say: Callable[[str], None]) -> Row:
    """Compile one model both ways, compare both with eager, and time them in turns."""
    torch._dynamo.reset()
    plain, passed, _ = _compilers()
    args, kwargs, read = example.args, example.kwargs, example.result
    expected = read(example.model(*args, **kwargs))
    models, errors = [], []
    for compiler, how in ((plain, "without"), (passed, "with")):
        say(f"compiling {how} attnpass")
        attnpass.reset()
        compiled = compiler(example.model)
        errors.append(float((read(compiled(*args, **kwargs)) - expected).abs().max()))
        models.append(compiled)
    report = attnpass.report()
    say("timing")
    first, second = _in_turns(models, args, kwargs)
    return Row(
        model=example.title,
        sites=len(report.sites),
        replaced=report.replaced,
        error=(errors[0], errors[1]),
        ms=(statistics.median(first) * 1e3, statistics.median(second) * 1e3),
        rounds=len(first),
    )


def _in_turns(models: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    least, most = _ROUNDS
    for model in models:
        model(*args, **kwargs)
    end = time.perf_counter() + _SECONDS
    while len(times[0]) < most and (len(times[0]) < least or time.perf_counter() < end):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(*args, **kwargs)
            taken.append(time.perf_counter() - start)
    return times


# -- showing -----------------------------------------------------------------------------------------------------------


def main(*, json_output: bool = False, quiet: bool = False) -> int:
    """Run the demo; 0 fine, 1 nothing replaced, 2 a result differs from eager's."""
    from rich.console import Console

    out = Console(quiet=quiet or json_output, highlight=False)
    if not sys.stdout.isatty():
        out.width = 160
    after = _compilers()[2]
    out.print(
        f"attnpass {attnpass.__version__}, torch {torch.__version__}, CPU, float32, {torch.get_num_threads()} threads"
    )
    out.print(f"Both ways are compiled by {after}; one of them meets attnpass first.\n")
    rows = list(_run(out))
    if json_output:
        print(json.dumps([{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows], indent=2))
    _table(out, rows)
    wrong = [row.model for row in rows if not row.error[1] <= _TOLERANCE]
    if wrong:
        raise AttnpassError(
            f"results differ from eager by more than {_TOLERANCE}: {', '.join(wrong)}; please report it"
        )
    return 0 if any(row.replaced for row in rows) else 1


def _run(out: Console) -> Iterator[Row]:
    for make in EXAMPLES:
        torch.manual_seed(0)
        with torch.no_grad():
            try:
                example = make()
            except AttnpassError as error:
                out.print(f"[yellow]{make.__name__}[/yellow]: {error}\n", soft_wrap=True)
                continue
            example.model.eval()
            with _progress(example.title, out.quiet) as say:
                say("auditing")
                report = attnpass.audit(example.model, *example.args, **example.kwargs)
                _show_audit(out, example, report)
                yield measure(example, say)


def _show_audit(out: Console, example: Example, report: Report) -> None:
    out.rule(f"[bold]{example.title}[/bold]", align="left")
    out.print(str(report), markup=False, soft_wrap=True)
    out.print()


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, on a terminal only."""
    from rich.console import Console

    if quiet or not sys.stderr.isatty():
        yield lambda doing: None
        return
    with Console(stderr=True).status(title) as status:
        yield lambda doing: status.update(f"{title}: {doing} ...")


def _table(out: Console, rows: list[Row]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", title="Compiled without and with attnpass", title_justify="left"
    )
    table.add_column("model")
    for name in ("replaced", "max error", "ms without", "ms with", "faster"):
        table.add_column(name, justify="right")
    for row in rows:
        colour = "green" if row.ratio >= 1.02 else "yellow" if row.ratio < 0.98 else "white"
        table.add_row(
            row.model,
            f"{row.replaced} of {row.sites}",
            f"{row.error[0]:.1e} / {row.error[1]:.1e}",
            f"{row.ms[0]:.1f}",
            f"{row.ms[1]:.1f}",
            f"[{colour}]{row.ratio:.2f} x[/{colour}]",
        )
    out.print(table)
    out.print("Errors are against eager, without / with attnpass; times are medians of runs in turns.")
