"""Count the bytes that are live at once while a function runs.

CUDA: the caching allocator's own counters. CPU: every allocation and release that torch's CPU allocator
reports to the autograd profiler with memory events, summed in order: a count, not a sample of RSS. A device that is
not there (``Target``): the storages that ops on fake tensors make (``live.py``), which leaves out what kernels take
within themselves.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy

from scheduler.capture.target import Device, Target
from scheduler.costs.live import LiveBytes, rounded

__all__ = ["Counted", "allocated", "count_bytes"]


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes above those live at the start.

    Attributes:
        peak: the most bytes live at once.
        end: bytes live at the end.
        marks: (marks,) bytes live at each call of ``mark``.
        peaks: (marks + 1,) the most bytes live before the first mark, between marks, and after the last.
        result: what the function returned.
    """

    peak: int
    end: int
    marks: tuple[int, ...]
    peaks: tuple[int, ...]
    result: Any


def count_bytes(fn: Callable[[Callable[[], None]], Any], device: Device) -> Counted:
    """Run ``fn(mark)`` and count; ``mark()`` separates phases.

    Python's cyclic garbage collector is off meanwhile: it would let go of tensors of long ago in the middle of
    the count, and hide as many bytes of what the function takes.

    Raises:
        RuntimeError: an autograd profiler is active already (CPU).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        if isinstance(device, Target):
            return _count_fake(fn, device)
        return _count_cuda(fn, device) if device.type == "cuda" else _count_cpu(fn)
    finally:
        if collecting:
            gc.enable()


def _count_cuda(fn: Callable[[Callable[[], None]], Any], device: torch.device) -> Counted:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    marks: list[int] = []
    peaks: list[int] = []

    def mark() -> None:
        marks.append(torch.cuda.memory_allocated(device) - start)
        peaks.append(torch.cuda.max_memory_allocated(device) - start)
        torch.cuda.reset_peak_memory_stats(device)

    result = fn(mark)
    torch.cuda.synchronize(device)
    peaks.append(torch.cuda.max_memory_allocated(device) - start)
    end = torch.cuda.memory_allocated(device) - start
    return Counted(max(0, *peaks), end, tuple(marks), tuple(peaks), result)


def _count_cpu(fn: Callable[[Callable[[], None]], Any]) -> Counted:
    # A mark is an allocation of a size that nothing else asks for, so that it stands in the one stream
    # of events at its place.
    if torch._C._autograd._profiler_enabled():
        raise RuntimeError(
            "measuring CPU memory needs torch's profiler, and one is running already; measure outside of it"
        )
    marker = 1_000_003
    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    count = 0

    def mark() -> None:
        nonlocal count
        count += 1
        torch.empty(marker, dtype=torch.uint8)

    _enable_profiler_legacy(config)
    try:
        result = fn(mark)
    finally:
        threads = _disable_profiler_legacy()
    sizes = [e.cpu_memory_usage() for events in threads for e in events if str(e.kind()) == "memory_alloc"]
    live = highest = 0
    marks: list[int] = []
    peaks: list[int] = []
    skip = False
    for size in sizes:
        if skip:  # the release of the marker
            skip = False
            continue
        if size == marker:
            marks.append(live)
            peaks.append(highest)
            highest = live
            skip = True
            continue
        live += size
        highest = max(highest, live)
    peaks.append(highest)
    if len(marks) != count:
        raise RuntimeError("measuring CPU memory: another allocation of the marker's size got in the way")
    return Counted(max(0, *peaks), live, tuple(marks), tuple(peaks), result)


def _count_fake(fn: Callable[[Callable[[], None]], Any], target: Target) -> Counted:
    counter = LiveBytes(target.type)
    marks: list[int] = []
    peaks: list[int] = []

    def mark() -> None:
        marks.append(counter.live)
        peaks.append(counter.restart())

    with counter:
        result = fn(mark)
    peaks.append(counter.restart())
    return Counted(max(0, *peaks), counter.live, tuple(marks), tuple(peaks), result)


def allocated(size: int, device: Device) -> int:
    """Bytes that the device's allocator sets aside for a tensor of ``size`` bytes: CUDA rounds up to 512."""
    return rounded(size, device.type)
