"""Count the bytes that are live at once while a function runs.

CUDA: the caching allocator's own counters. CPU: every allocation and release that torch's CPU allocator
reports to the autograd profiler with memory events, summed in order: a count, not a sample of RSS. An absent
device (``Target``): the storages that ops on fake tensors make (``live_storages.py``), without the scratch
space of kernels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rematplan.scheduler.costs.meters.clock import wait
from rematplan.scheduler.costs.meters.cuda_allocator import SMALLEST_BLOCK
from rematplan.scheduler.costs.meters.live_storages import LiveBytes, rounded
from rematplan.scheduler.torch_layer.private import legacy_memory_events, profiler_is_on
from rematplan.scheduler.torch_layer.target import Device, Target

__all__ = ["Counted", "CpuEvents", "CudaBytes", "allocated", "count_bytes", "cpu_events"]


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes above those live at the start.

    Attributes:
        end: bytes live at the end.
        marks: (marks,) bytes live at each call of ``mark``.
        peaks: (marks + 1,) the most bytes live before the first mark, between marks, and after the last.
        result: what the function returned.
        requested: CUDA: as ``peak``, of the bytes asked for, before rounding up to blocks; None elsewhere.
    """

    end: int
    marks: Sequence[int]
    peaks: Sequence[int]
    result: Any
    requested: int | None = None

    @property
    def peak(self) -> int:
        """The most bytes live at once."""
        return max(0, *self.peaks)


class CudaBytes(NamedTuple):
    """Counters of the caching allocator, now and at most: bytes of blocks in use, bytes asked for, blocks."""

    allocated: int
    highest: int
    requested: int
    highest_requested: int
    blocks: int
    highest_blocks: int

    @classmethod
    def read(cls, device: torch.device) -> CudaBytes:
        """Read them; peaks are since the last ``torch.cuda.reset_peak_memory_stats``."""
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        blocks, asked = stats["allocated_bytes"]["all"], stats["requested_bytes"]["all"]
        count = stats["allocation"]["all"]
        pairs = ((each["current"], each["peak"]) for each in (blocks, asked, count))
        return cls(*(value for pair in pairs for value in pair))

    def without_slack(self, start: CudaBytes) -> tuple[int, int]:
        """Return the bytes above those of ``start``, now and at most, each tensor rounded up to 512 only.

        The slack of a block that is not split depends on which blocks are free: it is set aside for the whole
        step.
        """

        def above(allocated: int, requested: int, blocks: int) -> int:
            rounding = SMALLEST_BLOCK * max(0, blocks - start.blocks)
            return min(requested - start.requested + rounding, allocated - start.allocated)

        now = above(self.allocated, self.requested, self.blocks)
        return now, above(self.highest, self.highest_requested, self.highest_blocks)


def count_bytes(fn: Callable[[Callable[[], None]], Any], device: Device, *, slack: bool = True) -> Counted:
    """Run ``fn(mark)`` and count; ``mark()`` separates phases.

    Python's cyclic garbage collector is off meanwhile: it would release older tensors in the middle of the
    count, and hide as many bytes.

    Args:
        slack: on CUDA, whether to count what blocks have above their tensors' bytes rounded up to 512.

    Raises:
        RuntimeError: an autograd profiler is active already (CPU).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        if isinstance(device, Target):
            return _count_fake(fn, device)
        return _count_cuda(fn, device, slack) if device.type == "cuda" else _count_cpu(fn)
    finally:
        if collecting:
            gc.enable()


def _count_cuda(fn: Callable[[Callable[[], None]], Any], device: torch.device, slack: bool) -> Counted:
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = CudaBytes.read(device)
    seen: list[CudaBytes] = []

    def mark() -> None:
        seen.append(CudaBytes.read(device))
        torch.cuda.reset_peak_memory_stats(device)

    result = fn(mark)
    wait(device)
    mark()
    whole = ((each.allocated - start.allocated, each.highest - start.allocated) for each in seen)
    live, peaks = zip(*(whole if slack else (each.without_slack(start) for each in seen)), strict=True)
    requested = max(0, *(each.highest_requested - start.requested for each in seen))
    return Counted(live[-1], live[:-1], peaks, result, requested)


def _count_cpu(fn: Callable[[Callable[[], None]], Any]) -> Counted:
    # A mark is an allocation of a size that nothing else asks for, at its place among the events.
    marker = 1_000_003
    count = 0

    def mark() -> None:
        nonlocal count
        count += 1
        torch.empty(marker, dtype=torch.uint8)

    result, events = cpu_events(lambda: fn(mark))
    live = 0
    marks: list[int] = []
    peaks = [0]
    sizes = (size for kind, _, size in events if kind == "memory_alloc")
    for size in sizes:
        if size == marker:
            marks.append(live)
            peaks.append(live)
            next(sizes, None)  # the release of the marker
        else:
            live += size
            peaks[-1] = max(peaks[-1], live)
    if len(marks) != count:
        raise RuntimeError("measuring CPU memory: another allocation of the marker's size got in the way")
    return Counted(live, marks, peaks, result)


def public_memory_events() -> Callable[[], list[tuple[str, str, int]]]:
    """Note as ``private.legacy_memory_events`` does, by ``torch.autograd.profiler.profile``."""
    profile = torch.autograd.profiler.profile(profile_memory=True)
    profile.__enter__()

    def stop() -> list[tuple[str, str, int]]:
        profile.__exit__(None, None, None)
        assert profile.kineto_results is not None  # it has been entered and left
        rows: list[tuple[int, int, tuple[str, str, int]]] = []  # (ns, place among events of one ns, event)
        for number, event in enumerate(profile.kineto_results.events()):
            began, name = event.start_ns(), event.name()
            if name == "[memory]":
                rows.append((began, number, ("memory_alloc", "", event.nbytes())))  # type: ignore[attr-defined]
            else:
                rows.append((began, number, ("push", name, 0)))
                rows.append((began + event.duration_ns(), number, ("pop", "", 0)))
        return [event for *_, event in sorted(rows)]

    return stop


class CpuEvents:
    """Notes what torch's CPU allocator does from now on, by the autograd profiler with memory events.

    Attributes:
        stop: ends that, and returns (kind, name, bytes) of each event in order. A "push" opens an op or a
            ``record_function`` of that name and a "pop" closes it; a "memory_alloc" is an allocation, or,
            negative, a release.

    Raises:
        RuntimeError: an autograd profiler is active already.
    """

    def __init__(self) -> None:
        if profiler_is_on():
            raise RuntimeError(
                "measuring CPU memory needs torch's profiler, and one is running already; measure outside of it"
            )
        self.stop = legacy_memory_events() or public_memory_events()


def cpu_events(fn: Callable[[], Any]) -> tuple[Any, list[tuple[str, str, int]]]:
    """Run ``fn()``; return its result, and its ``CpuEvents``."""
    noting = CpuEvents()
    try:
        result = fn()
    finally:
        events = noting.stop()
    return result, events


def _count_fake(fn: Callable[[Callable[[], None]], Any], target: Target) -> Counted:
    marks: list[tuple[int, int]] = []

    def mark() -> None:
        marks.append((counter.live, counter.restart()))

    with LiveBytes(target.type) as counter:
        result = fn(mark)
    mark()
    live, peaks = zip(*marks, strict=True)
    return Counted(live[-1], live[:-1], peaks, result)


def allocated(size: int, device: Device) -> int:
    """Return the bytes that the device's allocator takes for ``size`` bytes: CUDA rounds up to 512."""
    return rounded(size, device.type)
