"""Unmodified models on a GPU: eager attention through inductor, through attnpass, and what the library ships (sdpa).

    python -m benchmarks.gpu [--only NAME ...] [--train] [--graphs] [--by-hand] [--waived] [--jobs 16] [--json FILE]

Times are medians of CUDA events around one forward call in bfloat16 (with --train: forward and backward); beside them
is how long its kernels ran, which is less where the GPU waits for the next launch. Memory is the peak above what the
model itself holds, errors are relative to the same model in float32. Each form of a model is compiled in a process of
its own, many at once; they are measured one at a time, in rounds (benchmarks/apart.py), and in one round all forms are
launched from the same core. --graphs has all recorded in CUDA graphs (mode="reduce-overhead"), as one token at a
time is served: then the GPU waits for nothing. The rows called decode are one step behind a static cache that is nearly
full. --by-hand adds the library's other integrations; --waived the pass with `empty_rows="dont_care"`, where queries
without a key make a difference.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.apart import Measured, measured
from benchmarks.models import Inputs, Model, decoder, right_padded, tokens
from benchmarks.timing import busy_ms, median_ms, peak_mib


@dataclass(frozen=True)
class Row:
    """One form of one model."""

    model: str
    attention: str
    compiler: str
    train: bool
    graphs: bool
    ms: float | None = None
    busy_ms: float | None = None
    mib: float | None = None
    error: float | None = None
    note: str = ""


LLAMA = decoder(2048, 5632, 32, 8)
BERT = {"vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
MODELS = {
    "llama_prefill4k": Model("LlamaConfig", LLAMA, lambda: {"input_ids": tokens(2, 4096)}),
    "llama_padded": Model(
        "LlamaConfig", LLAMA, lambda: {"input_ids": tokens(4, 2048), "attention_mask": right_padded(4, 2048)}
    ),
    "mistral_sw_8k": Model(
        "MistralConfig",
        decoder(2048, 5632, 16, 8, head_dim=128, sliding_window=1024),
        lambda: {"input_ids": tokens(1, 8192)},
    ),
    "gemma2_4k": Model(
        "Gemma2Config",
        decoder(2048, 8192, 8, 4, head_dim=256, sliding_window=1024),
        lambda: {"input_ids": tokens(2, 4096)},
    ),
    "bert_large_512_pad": Model(
        "BertConfig",
        {**BERT, "num_attention_heads": 16},
        lambda: {"input_ids": tokens(32, 512), "attention_mask": right_padded(32, 512)},
    ),
    "vit_l_384": Model(
        "ViTConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "image_size": 384,
        },
        lambda: {"pixel_values": torch.randn(32, 3, 384, 384)},
    ),
    "gpt2_1k": Model(
        "GPT2Config",
        {"vocab_size": 1000, "n_embd": 1024, "n_layer": 4, "n_head": 16, "n_positions": 1024, "use_cache": False},
        lambda: {"input_ids": tokens(8, 1024)},
    ),
    "t5_512": Model(
        "T5Config",
        {"vocab_size": 1000, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 4, "num_heads": 12},
        lambda: {"input_ids": tokens(16, 512)},
        cls="T5EncoderModel",
    ),
}
LLAMA_8B = decoder(4096, 14336, 32, 8, use_cache=True)
for batch, length in ((1, 2048), (1, 32768), (16, 8192), (8, 32768)):
    MODELS[f"decode_{batch}x{length // 1024}k"] = Model(
        "LlamaConfig", LLAMA_8B, functools.partial(lambda batch: {"input_ids": tokens(batch, 1)}, batch), cache=length
    )
FORMS = (("eager", "inductor"), ("eager", "attnpass"), ("sdpa", "inductor"), ("sdpa", "attnpass"))
BY_HAND = (("flash_attention_2", "inductor"), ("flex_attention", "inductor"))
WAIVED = (("eager", "attnpass, dont_care"), ("sdpa", "attnpass, dont_care"))
ROUNDS = 3
CORES = sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Task:
    """One form of one model; the one called exact is what the errors of the others are taken from."""

    model: str
    attention: str
    compiler: str
    train: bool
    graphs: bool
    folder: str  # where exact results lie

    @property
    def exact(self) -> Path:
        return Path(self.folder) / f"{self.model}.pt"

    def row(self, note: str = "") -> Row:
        return Row(self.model, self.attention, self.compiler, self.train, self.graphs, note=note)


def forms(name: str, *, by_hand: bool, waived: bool) -> Iterator[tuple[str, str]]:
    """How a model is measured."""
    yield from FORMS
    if by_hand and not MODELS[name].cache:  # the library's other integrations take no static cache
        yield from BY_HAND
    if waived and (MODELS[name].cache or "pad" in name):
        yield from WAIVED


def groups(tasks: Sequence[Task], most: int) -> Iterator[list[Task]]:
    """Those of whole models, as many as may run side by side."""
    group: list[Task] = []
    for name in dict.fromkeys(task.model for task in tasks):
        own = [task for task in tasks if task.model == name]
        if group and len(group) + len(own) > most:
            yield group
            group = []
        group += own
    yield group


def prepare(task: Task) -> Callable[[], Row]:
    """Compiles one form and runs it once."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    inputs = {key: x.cuda() for key, x in MODELS[task.model].inputs().items()}
    if task.compiler == "exact":
        model = _model(task)
        torch.save(_run(model, inputs | MODELS[task.model].state(model, inputs), train=False), task.exact)
        del model
        torch.cuda.empty_cache()  # the others of the group are to be measured
        return task.row

    import attnpass
    from attnpass.capture.dynamo import backend

    model = _model(task)
    for parameter in model.parameters():  # rotary frequencies stay what a loaded model has: float32
        parameter.data = parameter.data.bfloat16()
    torch.cuda.empty_cache()
    inputs = inputs | MODELS[task.model].state(model, inputs)
    ours = task.compiler.startswith("attnpass")
    options = {"empty_rows": "dont_care"} if task.compiler.endswith("dont_care") else None
    mode = "reduce-overhead" if task.graphs else None
    call = torch.compile(model, backend=backend if ours else "inductor", mode=mode, options=options)
    out = _run(call, inputs, train=task.train).cpu()
    torch.cuda.empty_cache()
    report = attnpass.report()
    kernels = sorted({site.kernel for site in report.sites if site.kernel})
    note = f"{report.replaced} replaced by {', '.join(kernels)}" if ours else ""
    row = task.row(note)
    step = functools.partial(_run, call, inputs, train=task.train)
    rounds = itertools.count(1)

    def measure() -> Row:
        number = next(rounds)
        _on_a_core_of(number)
        ms = median_ms(step)
        if number < ROUNDS:
            return replace(row, ms=ms)
        # a profiler that has run once makes every later launch of its process slower: nothing is timed after it
        busy = busy_ms(step)
        mib = None if task.graphs else peak_mib(step)  # a recorded graph has its memory before it is called
        true = torch.load(task.exact, map_location="cpu")
        error = ((out.float() - true).norm() / true.norm()).item()
        return replace(row, ms=ms, busy_ms=busy, mib=mib, error=error)

    return measure


def _on_a_core_of(number: int) -> None:
    """All forms are launched from the same one in a round: where others share the machine, some are 40 % slower."""
    os.sched_setaffinity(0, {CORES[(number - 1) * len(CORES) // ROUNDS]})


def _model(task: Task) -> nn.Module:
    torch.manual_seed(1)
    with torch.device("cuda"):
        return MODELS[task.model].build(task.attention).cuda().eval()


def _run(model: Any, inputs: Inputs, *, train: bool) -> torch.Tensor:
    with torch.set_grad_enabled(train):
        result: torch.Tensor = model(**inputs).last_hidden_state
        if train:
            model.zero_grad()
            result.square().mean().backward()
    return result.detach()


def together(found: Measured[Task, Row]) -> Row:
    """The rounds of one form."""
    task = found.task
    if found.failure:
        return task.row(found.failure)
    times = [row.ms for row in found.results if row.ms is not None]
    return replace(found.results[-1], ms=statistics.median(times) if times else None)


def _figures(row: Row) -> str:
    if row.ms is None:
        return ""
    memory = "" if row.mib is None else f" {row.mib:6.0f} MiB"
    return f"{row.ms:7.2f} ms ({row.busy_ms:6.2f} busy){memory} error {row.error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", choices=sorted(MODELS), help="only this model (may be repeated)")
    parser.add_argument("--train", action="store_true", help="a forward and a backward pass")
    parser.add_argument("--graphs", action="store_true", help="recorded in CUDA graphs")
    parser.add_argument("--by-hand", action="store_true", help="the library's other integrations as well")
    parser.add_argument("--waived", action="store_true", help="and the pass where rows without a key may hold anything")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile side by side")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if asked.graphs and asked.waived:
        parser.error("--graphs and --waived: torch.compile takes a mode or options, not both")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            Task(name, attention, compiler, asked.train, asked.graphs, folder)
            for name in asked.only or MODELS
            for attention, compiler in (("eager", "exact"), *forms(name, by_hand=asked.by_hand, waived=asked.waived))
        ]
        for group in groups(tasks, asked.jobs):
            for row in map(together, measured(prepare, group, rounds=ROUNDS)):
                if row.compiler == "exact" and not row.note:
                    continue
                found.append(row)
                head = f"{row.model:20} {row.attention:18} {row.compiler:19}"
                print(f"{head} {_figures(row)}  {row.note}", flush=True)
                if asked.json:  # after each row: what was measured survives a limit of time
                    asked.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
