"""Timing calls, on a GPU by its own clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM, TIMED = 4, 15


def median_ms(call: Callable[[], Any], device: str = "cuda") -> float:
    """Of one call, by CUDA events or the clock, after some for warming up."""
    for _ in range(WARM):
        call()
    once = _by_clock if device == "cpu" else _by_events
    return statistics.median(once(call) for _ in range(TIMED))


def _by_clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _by_events(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def busy_ms(call: Callable[[], Any], calls: int = 5) -> float:
    """What the kernels of one call take: less than a call takes where the GPU waits for its next launch."""
    call()
    torch.cuda.synchronize()
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    # the bound enumeration is equal to itself, but not the same object
    on_gpu = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return math.fsum(event.time_range.elapsed_us() for event in on_gpu) / calls / 1e3


def peak_mib(call: Callable[[], Any]) -> float:
    """What one call allocates at most beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
