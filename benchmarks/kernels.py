"""Every kernel that can run here, through the pass: TFLOP/s and error of attention alone, by form of mask and width.

    python -m benchmarks.kernels [--device cuda] [--only KERNEL ...] [--jobs 16] [--json FILE] [--write]

The attention is hand-written code, compiled with the pass and one kernel asked for; what the kernel refuses is a line
with the reason. On a GPU the time is that for which kernels run, on a CPU the median of whole calls; operations are
counted on the scores that the mask keeps, errors are relative to float64 and of one head. For a GPU many are compiled
side by side, and measured one at a time (benchmarks/apart.py). `--write` puts the rates into attnpass/rates.json, from
which the pass chooses.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnpass.errors import first_line
from benchmarks.apart import measured
from benchmarks.timing import busy_ms, median_ms

SHAPES = {
    "cuda": ((4, 32, 4096, 128), (1, 16, 16384, 64), (2, 8, 4096, 256)),
    "cpu": ((1, 8, 2048, 64), (1, 8, 1024, 128)),
}
DTYPES = {"cuda": ("bfloat16",), "cpu": ("float32", "bfloat16")}
LAUNCH_US = {"cuda": 5.0, "cpu": 50.0}  # taken to be the cost of one more small operation
CHOSEN = {"cpu": ("native", "flex")}  # the kernels that are chosen there by what they cost


@dataclass(frozen=True)
class Row:
    """One kernel, one shape, one form of mask."""

    kernel: str
    version: str
    form: str
    dtype: str
    shape: tuple[int, ...]
    ms: float | None
    tflops: float | None
    error: float | None
    note: str = ""


def distance(x: Tensor) -> Tensor:
    """How far each key lies behind the query."""
    at = torch.arange(x.shape[-1], device=x.device)
    return at[:, None] - at[None]


def causal(x: Tensor, pad: Tensor) -> Tensor:
    return distance(x) >= 0


def window(x: Tensor, pad: Tensor) -> Tensor:
    return (distance(x) >= 0) & (distance(x) < wide(x.shape[-1]))


def wide(length: int) -> int:
    """The window."""
    return min(1024, length // 4)


def keys(x: Tensor, pad: Tensor) -> Tensor:
    return pad[:, None, None, :]


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "full": None,
    "causal": causal,
    "window": window,
    "keys": keys,
    "tensor": lambda x, pad: pad[:, None, None, :] & pad[:, None, :, None],
}


class Attention(nn.Module):
    """Hand-written attention with one form of mask."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.mask = MASKS[form]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        x = q @ k.mT / math.sqrt(q.shape[-1])
        if self.mask is not None:
            x = x.masked_fill(~self.mask(x, pad), torch.finfo(x.dtype).min)
        out = x.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return out.transpose(1, 2).flatten(2)  # as models go on


def kept(form: str, length: int) -> float:
    """The share of the scores that a form keeps; padding is counted as if nothing were padded."""
    if form == "causal":
        return (length + 1) / (2 * length)
    if form == "window":
        return sum(min(i + 1, wide(length)) for i in range(length)) / length**2
    return 1.0


@dataclass(frozen=True)
class Task:
    """One kernel and one shape, in some forms."""

    kernel: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    forms: tuple[str, ...]


def tasks_of(kernel: Any, device: str) -> Iterator[Task]:
    """What is compiled in one process each: a call for all forms, but for each a function takes its time."""
    # a kernel that is given what a mask means has no argument for a tensor
    forms = tuple(form for form in MASKS if not (form == "tensor" and kernel.takes == "forms"))
    for dtype, shape in itertools.product(DTYPES[device], SHAPES[device]):
        for some in ((form,) for form in forms) if kernel.takes == "functions" else (forms,):
            yield Task(kernel.name, device, dtype, shape, some)


def prepare(task: Task) -> Callable[[], list[Row]]:
    """Compiles the forms."""
    from attnpass.kernels import kernels

    warnings.filterwarnings("ignore")
    (kernel,) = (kernel for kernel in kernels() if kernel.name == task.kernel)
    batch, heads, length, width = task.shape
    torch.manual_seed(0)
    # heads beside one another in memory, as a model's projections leave them
    memory = (batch, length, heads, width)
    like = {"device": task.device, "dtype": getattr(torch, task.dtype)}
    q, k, v = (torch.randn(memory, **like).transpose(1, 2) for _ in range(3))
    pad = torch.ones(batch, length, dtype=torch.bool, device=task.device)
    ready = [compiled(kernel, form, (q, k, v, pad)) for form in task.forms]
    torch.cuda.empty_cache()
    return lambda: [measure() for measure in ready]


def compiled(kernel: Any, form: str, given: tuple[Tensor, ...]) -> Callable[[], Row]:
    """One form of mask, run once; what measures it."""
    import attnpass
    from attnpass.capture.dynamo import backend

    attnpass.reset()
    options = {"kernel": [kernel.name, "keep"], "allow_approximate": True}
    if kernel.takes == "forms":
        options["inner"] = "aot_eager"  # nothing is left to fuse
    attention = Attention(form)
    run = torch.compile(attention, backend=backend, options=options)
    q, k, v, pad = given
    batch, heads, length, width = q.shape
    dtype = str(q.dtype).removeprefix("torch.")
    row = Row(kernel.name, kernel.version(), form, dtype, tuple(q.shape), None, None, None)
    try:
        with torch.no_grad():
            out = run(*given)
            (site,) = attnpass.report().sites
            if site.kernel != kernel.name:
                verdict = next(v for v in site.verdicts if v.kernel == kernel.name)
                texts = "; ".join(r.text for r in verdict.refusals) or (site.reason.text if site.reason else "")
                return lambda: replace(row, note=texts)
            true = attention(*(t[:1, :1].double() for t in (q, k, v)), pad[:1])
            error = ((out[:1, :, :width].double() - true).norm() / true.norm()).item()
    except Exception as failure:  # a kernel that fails is a result too
        note = f"failed: {first_line(failure)[:200]}"
        return lambda: replace(row, note=note)

    def measure() -> Row:
        with torch.no_grad():
            ms = busy_ms(lambda: run(*given)) if q.is_cuda else median_ms(lambda: run(*given), "cpu")
        operations = 4 * batch * heads * length**2 * width * kept(form, length)
        return replace(row, ms=ms, tflops=operations / ms / 1e9, error=error)

    return measure


def rows(device: str, only: list[str] | None, jobs: int) -> Iterator[Row]:
    """All of them."""
    from attnpass.kernels import kernels

    tasks: list[Task] = []
    for kernel in kernels():
        asked = only or CHOSEN.get(device)
        if device not in kernel.can.devices or (asked and kernel.name not in asked):
            continue
        missing = kernel.available()
        if missing is not None:
            yield Row(kernel.name, "", "", "", (), None, None, None, missing.text)
        else:
            tasks += tasks_of(kernel, device)
    tasks.sort(key=lambda task: len(task.forms))  # those that take alike long side by side
    for start in range(0, len(tasks), jobs):
        for found in measured(prepare, tasks[start : start + jobs]):
            task = found.task
            forms = ", ".join(task.forms)
            failed = Row(task.kernel, "", forms, task.dtype, task.shape, None, None, None, found.failure)
            yield from found.results[0] if found.results else [failed]


def bandwidth(device: str) -> float:
    """Bytes per microsecond of a large copy."""
    x = torch.empty(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / (median_ms(lambda: y.copy_(x), device) * 1e3)


def products(device: str, dtype: str) -> float:
    """TFLOP/s of a large product."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, device) / 1e9


def table(found: list[Row], old: dict[str, Any], device: str, dtype: str) -> dict[str, Any]:
    """What rates.json says of a device, with what was measured in place of what was there."""
    masks = {"tensor": "tensor", "functions": "blocks", "forms": "bounds"}
    from attnpass.kernels import Kernel, kernels

    out = dict(old.get("kernels", {}))
    kept = {name: {"keys": k["tflops"]["keys"]} for name, k in out.items() if "keys" in k["tflops"]}
    for kernel in kernels():
        if type(kernel).cost is Kernel.cost:  # it is chosen by no rate
            continue
        tflops: dict[str, dict[str, float]] = {}
        for row in found:
            # a window is expected from the rate of a causal mask: it depends on how wide it is; masks over keys alone
            # are those of short sequences (cost.py)
            if (row.kernel, row.dtype) == (kernel.name, dtype) and row.tflops and row.form not in ("window", "keys"):
                tflops.setdefault(row.form, {})[str(row.shape[-1])] = digits(row.tflops)
        if tflops:
            by_width = {
                form: dict(sorted(rates.items(), key=lambda rate: int(rate[0]))) for form, rates in tflops.items()
            }
            out[kernel.name] = {"masks": masks[kernel.takes], "tflops": {**by_width, **kept.get(kernel.name, {})}}
    day = datetime.datetime.now(tz=datetime.UTC).date()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    return {
        **old,
        "device": name,
        "measured": f"{day}, torch {torch.__version__}, {dtype}",
        "bytes_per_us": round(bandwidth(device)),
        "products_tflops": digits(products(device, dtype)),
        "launch_us": LAUNCH_US[device],
        "kernels": dict(sorted(out.items())),
    }


def digits(x: float) -> float:
    """Three of them."""
    rounded = float(f"{x:.3g}")
    return int(rounded) if rounded.is_integer() else rounded


def text(sections: dict[str, dict[str, Any]]) -> str:
    """One line for each kernel."""
    parts = []
    for name, rates in sections.items():
        head = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in rates.items() if k != "kernels")
        lines = ",\n".join(f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in rates["kernels"].items())
        parts.append(f'  {json.dumps(name)}: {{\n{head},\n    "kernels": {{\n{lines}\n    }}\n  }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=sorted(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", metavar="KERNEL", help="only this kernel (may be repeated)")
    parser.add_argument("--jobs", type=int, help="processes that compile side by side (on the CPU 1)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, nargs="?", const="", help="the rates, into attnpass/rates.json or FILE")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    warnings.filterwarnings("ignore")
    print(f"{asked.device}, torch {torch.__version__}")
    found: list[Row] = []
    jobs = asked.jobs or (os.cpu_count() if asked.device == "cuda" else None) or 1
    for row in rows(asked.device, asked.only, jobs):
        found.append(row)
        speed = f"{row.ms:8.3f} ms {row.tflops:5.3g} TFLOP/s error {row.error:.1e}" if row.ms is not None else row.note
        print(f"{row.kernel:30} {row.form:7} {row.dtype:9} {'x'.join(map(str, row.shape)):16} {speed}", flush=True)
        # after each row: what was measured survives a limit of time
        if asked.json:
            asked.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if asked.write is not None:
        shipped = Path(str(resources.files("attnpass").joinpath("rates.json")))
        sections = json.loads(shipped.read_text(encoding="utf-8"))
        for dtype in DTYPES[asked.device]:
            section = asked.device if len(DTYPES[asked.device]) == 1 else f"{asked.device} {dtype}"
            sections[section] = table(found, sections.get(section, {}), asked.device, dtype)
        (shipped if str(asked.write) in ("", ".") else asked.write).write_text(text(sections), "utf-8")


if __name__ == "__main__":
    main()
