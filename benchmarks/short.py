"""Attention over some hundred tokens on a CPU: torch's fused kernel beside the code that inductor writes without it.

    python -m benchmarks.short [--json FILE] [--write]

    bfloat16  causal  forward   64 x  64   kernel 6.73 ms   original 3.58 ms = 0.53
    ...

The kernel takes blocks of 32 queries and is slow for short sequences, while scores that fit the cache cost inductor's
code little: in bfloat16 it takes half the time, in float32 more than the kernel. Both are the same hand-written
attention, compiled by the pass with the kernel asked for and with all sites kept, their calls taking turns; forward
passes, and forward and backward. `--write` puts the table into attnpass/rates.json, from which such sites are left
alone (cost.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import DTYPES, Attention, digits, text

LENGTHS, WIDTHS = (64, 128, 256, 512, 1024), (64, 128)
FORMS = {"full": "full", "causal": "causal", "keys": "tensor"}  # as benchmarks.kernels and rates.json name them
SCORES = 1_600_000  # of one call: they fit the cache
BATCH = 2
SECONDS = 0.7  # for which the two take turns


@dataclass(frozen=True)
class Row:
    """One shape with one form of mask, forward or in training."""

    dtype: str
    form: str
    train: bool
    length: int
    width: int
    heads: int
    kernel_ms: float
    original_ms: float

    @property
    def tflops(self) -> float:
        return 4 * BATCH * self.heads * self.length**2 * self.width / self.kernel_ms / 1e9

    @property
    def ratio(self) -> float:
        return self.original_ms / self.kernel_ms


def measured(dtype: str, form: str, length: int, width: int, *, train: bool) -> Row:
    """Compiles both and lets them take turns."""
    from attnpass.capture.dynamo import backend

    torch._dynamo.reset()
    torch.manual_seed(0)
    heads = max(1, SCORES // (BATCH * length**2))
    # heads beside one another in memory, as a model's projections leave them
    memory = (BATCH, length, heads, width)
    leaves = [torch.randn(memory, dtype=getattr(torch, dtype)).requires_grad_(train) for _ in range(3)]
    pad = torch.ones(BATCH, length, dtype=torch.bool)
    pad[1:, length // 2 :] = False

    def step(call: Callable[..., torch.Tensor]) -> float:
        begin = time.perf_counter()
        with torch.set_grad_enabled(train):
            out = call(*(leaf.transpose(1, 2) for leaf in leaves), pad)
            if train:
                out.sum().backward()
        return (time.perf_counter() - begin) * 1e3

    calls = [torch.compile(Attention(form), backend=backend, options={"kernel": name}) for name in ("native", "keep")]
    for call in (*calls, *calls):
        step(call)
    times: list[tuple[float, ...]] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        times.append(tuple(step(call) for call in calls))
    kernel, original = (statistics.median(column) for column in zip(*times, strict=True))
    return Row(dtype, form, train, length, width, heads, kernel, original)


def rows() -> Iterator[Row]:
    """All of them."""
    for dtype, form, train in itertools.product(DTYPES["cpu"], FORMS, (False, True)):
        for length, width in itertools.product(LENGTHS, WIDTHS):
            yield measured(dtype, form, length, width, train=train)


def table(found: list[Row], dtype: str) -> dict[str, Any]:
    """What rates.json says of one dtype."""
    out: dict[str, Any] = {name: {"tflops": {}, "forward": {}, "training": {}} for name in FORMS.values()}
    for row in found:
        if row.dtype != dtype:
            continue
        section = out[FORMS[row.form]]
        kinds = {"training": row.ratio} if row.train else {"forward": row.ratio, "tflops": row.tflops}
        for kind, number in kinds.items():
            section[kind].setdefault(str(row.length), {})[str(row.width)] = digits(number)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="the table, into attnpass/rates.json")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{torch.get_num_threads()} threads of a CPU, torch {torch.__version__}")
    found: list[Row] = []
    for row in rows():
        found.append(row)
        what = f"{row.dtype:9} {row.form:7} {'training' if row.train else 'forward':9} {row.length:4} x {row.width:3}"
        print(f"{what} kernel {row.kernel_ms:7.3f} ms original {row.original_ms:7.3f} ms = {row.ratio:.2f}", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if asked.write:
        shipped = Path(str(resources.files("attnpass").joinpath("rates.json")))
        sections = json.loads(shipped.read_text(encoding="utf-8"))
        for dtype in DTYPES["cpu"]:
            sections[f"cpu {dtype}"]["short"] = table(found, dtype)
        shipped.write_text(text(sections), "utf-8")


if __name__ == "__main__":
    main()
