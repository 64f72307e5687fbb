"""Timing the kernels that would serve a site, on tensors of its own shapes, strides and dtypes.

    site ─┬─ kernel a: built into the graph, the new nodes cut out ─┬─ run ──> microseconds ──> kept on disk
          ├─ kernel b: likewise                                     │
          └─ the original's own nodes, cut out as they are ─────────┘

Each distinct case is timed once per device and versions; the same layer elsewhere, and the next process, reads what is
kept. A file that cannot be read is timed anew, one that cannot be written is done without.

Limits: data is random, masks that are read keep everything and ids are all equal; symbolic sizes have the lengths that
the graph was traced with. Where gradients are asked for a forward and a backward are timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attnpass.aside import aside
from attnpass.choose import Choice
from attnpass.emit import build
from attnpass.errors import first_line
from attnpass.excerpt import excerpt, needed
from attnpass.files import is_plain, read_bounded, write_whole
from attnpass.graph import Shared, hint, tensor, value
from attnpass.kernels import Kernel
from attnpass.kernels.identity import identity
from attnpass.policy import Policy
from attnpass.prove import Proved
from attnpass.reasons import reason
from attnpass.site import Site

_WARM, _TIMED, _RUNS = 3, 5, 10
_LONGEST = 4096  # bytes of a file of ours
_SLOWEST = 1e12  # microseconds
_remarks: list[str] = []  # the last one
ORIGINAL = "original"


def fastest_first(graph: Graph, proved: Proved, choice: Choice, policy: Policy, *, compiled: bool) -> Choice:
    """The same kernels in the order of their times; none that takes longer than the original."""
    if not choice.kernels or choice.asked:
        return choice  # what was asked for by name is taken whatever it costs
    times = timed(graph, proved, choice.kernels, compiled=compiled)
    verdicts = tuple(
        dataclasses.replace(v, cost_us=times[v.kernel], timed=True) if v.accepts and v.kernel in times else v
        for v in choice.verdicts
    )
    limit = (1 - policy.min_gain) * times.get(ORIGINAL, math.inf)
    ranked = sorted(choice.kernels, key=lambda kernel: times.get(kernel.name, math.inf))
    kept = tuple(kernel for kernel in ranked if times.get(kernel.name, 0.0) <= limit)
    why = None if kept else reason("not_profitable")
    return dataclasses.replace(choice, kernels=kept, reason=why, verdicts=verdicts)


def timed(graph: Graph, proved: Proved, kernels: Sequence[Kernel], *, compiled: bool) -> dict[str, float]:
    """Microseconds by the name of the kernel, and of the original; what cannot be timed is left out."""
    site = proved.site
    found: dict[str, float] = {}
    work: list[tuple[str, str, Callable[[], Cut]]] = [
        (kernel.name, kernel.version(), lambda kernel=kernel: _of_kernel(graph, proved, kernel))  # type: ignore[misc]
        for kernel in kernels
    ]
    work.append((ORIGINAL, "", lambda: cut(site.output, set(site.region))))
    for at, (name, version, make) in enumerate(work):
        path = _path(site, name, version, compiled)
        us = _read(path, name)
        if us is None:
            print(f"attnpass: timing {name} for {_words(site)} ({at + 1} of {len(work)})", file=sys.stderr, flush=True)
            us = _measured(make, site, compiled)
            if us is not None:
                _write(path, us, name, site)
        if us is not None:
            found[name] = us
    return found


def _words(site: Site) -> str:
    return f"q {'x'.join(map(str, site.spec.q))}, keys {site.spec.keys}, {site.spec.dtype}"


# -- what is timed -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A part of a graph as a module of its own, and the values that it reads."""

    module: GraphModule
    reads: tuple[Node, ...]


def _of_kernel(graph: Graph, proved: Proved, kernel: Kernel) -> Cut:
    """What the kernel's call consists of; the graph is left as it was."""
    b, out = build(graph, proved, kernel, Shared())
    try:
        return cut(out, set(b.made))
    finally:
        b.discard()


def cut(end: Node, inside: set[Node]) -> Cut:
    """The nodes of `inside` that `end` needs, as a module of whatever else they read."""
    parts = needed([end], inside)
    graph, twin = Graph(), dict[Node, Any]()
    reads: list[Node] = []
    for node in end.graph.nodes:
        if node in parts and node not in inside:
            if tensor(node) is None:
                twin[node] = _hint(value(node))
            else:
                reads.append(node)
                twin[node] = graph.placeholder(f"given{len(reads)}")
    return Cut(excerpt(graph, end, parts & inside, twin), tuple(reads))


def _hint(size: Any) -> Any:
    """The number that a symbol stood for when it was traced."""
    known = hint(size)
    if known is None:
        raise ValueError(f"nothing is known of the size {size}")
    return known


def _like(node: Node, generator: torch.Generator) -> torch.Tensor:
    """A real tensor with the shape and strides of a fake one."""
    fake = tensor(node)
    assert fake is not None
    shape, strides = [_hint(n) for n in fake.shape], [_hint(n) for n in fake.stride()]
    length = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    if not fake.is_floating_point():
        return torch.ones(length, dtype=fake.dtype, device=fake.device).as_strided(shape, strides)
    flat = torch.randn(length, dtype=fake.dtype, device=fake.device, generator=generator)
    return flat.as_strided(shape, strides).requires_grad_(node.meta.get("attnpass_grad", False))


# -- timing ------------------------------------------------------------------------------------------------------------


def _measured(make: Callable[[], Cut], site: Site, compiled: bool) -> float | None:
    try:
        return aside(_timed_aside, make(), site, compiled)
    except Exception as error:  # what cannot be timed is not chosen for its time
        print(f"attnpass: could not be timed: {first_line(error)}", file=sys.stderr)
        return None


def _timed_aside(part: Cut, site: Site, compiled: bool) -> float:
    own = torch.Generator(site.device).manual_seed(0)  # the user's random numbers stay as they are
    given = [_like(node, own) for node in part.reads]
    grad = site.spec.grad and any(x.requires_grad for x in given)
    with site.state.entered(), torch.set_grad_enabled(grad):
        run: Callable[..., Any] = part.module
        if compiled:
            run = torch._inductor.compile(part.module, list(given))

        def step() -> None:
            out = run(*given)[0]
            if grad:
                out.sum().backward()
                for x in given:
                    x.grad = None

        return _cuda_us(step, grad) if site.device.type == "cuda" else _cpu_us(step)


def _cpu_us(step: Callable[[], None]) -> float:
    times = []
    for turn in range(_WARM + _TIMED):
        start = time.perf_counter()
        step()
        if turn >= _WARM:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _cuda_us(step: Callable[[], None], grad: bool) -> float:
    """By events; recorded as a CUDA graph where that is possible, so that the time of launches does not count."""
    for _ in range(_WARM):
        step()
    torch.cuda.synchronize()
    call = step
    if not grad:
        with contextlib.suppress(RuntimeError):
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded, capture_error_mode="thread_local"):
                step()
            call = recorded.replay
    times = []
    for _ in range(_TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(_RUNS):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)) / _RUNS)
    return statistics.median(times) * 1e3


# -- on disk -----------------------------------------------------------------------------------------------------------


def _path(site: Site, name: str, version: str, compiled: bool) -> Path:
    """One file for each case, named by everything that the time depends on: nothing is shared, so nothing is locked."""
    device = site.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.get_num_threads()}"
    layouts = [
        # a symbol is timed as the number that it was traced with: another number is another case
        (str(val.dtype), [(str(n), _hint(n)) for n in val.shape], [(str(n), _hint(n)) for n in val.stride()])
        for val in (value(placed.node) for placed in (site.q, site.k, site.v, *(x.placed for x in site.layers)))
    ]
    whole = (identity(), torch.__version__, where, name, version, compiled, repr(site.spec), layouts)
    return folder() / f"{hashlib.sha256(repr(whole).encode()).hexdigest()[:32]}.json"


def folder() -> Path:
    """Where times are kept: $ATTNPASS_CACHE, or the user's cache folder."""
    own = os.environ.get("ATTNPASS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnpass"


def _read(path: Path, name: str) -> float | None:
    """What is kept; None where nothing is that can be read, which is said once if there is something."""
    try:
        if not is_plain(path):
            raise ValueError("no ordinary file")
        kept = json.loads(read_bounded(path, _LONGEST))
        us = kept["us"]
        if kept["kernel"] != name or type(us) not in (int, float) or not 0 < us < _SLOWEST:
            raise ValueError("not what attnpass writes")
        return float(us)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _remark(f"{path} is not used, and timed anew: {first_line(error)}")
        return None


def _write(path: Path, us: float, name: str, site: Site) -> None:
    kept = {"us": us, "kernel": name, "case": _words(site)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not is_plain(path)):
            path.unlink()  # what a link names is not ours to replace, and a pipe would wait for a reader
        write_whole(path, json.dumps(kept))
    except OSError as error:
        _remark(f"{path} is not written: {first_line(error)}")


def _remark(text: str) -> None:
    """The first one of a process: a folder that is not ours would say as much of each file in it."""
    if not _remarks:
        print(f"attnpass: {text}", file=sys.stderr, flush=True)
    _remarks[:] = [text]
