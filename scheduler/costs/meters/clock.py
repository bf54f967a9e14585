"""Time pieces of work on a device: by the host's clock, or, on CUDA, by events on the stream."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rematplan.scheduler.torch_layer.private import keep_gpu_busy
from rematplan.scheduler.torch_layer.target import Device

__all__ = ["Spans", "wait"]

AHEAD = 4_000_000  # cycles of the device, some milliseconds: the host's launches run ahead by these


class Spans:
    """Times pieces of work, one after the other.

    On CUDA nothing waits between them: the device is kept busy first, so that kernels shorter than their
    launch follow each other closely, as in a step whose bottleneck is the device. The seconds of two events
    with nothing between them are subtracted. Elsewhere the host's clock is read.
    """

    def __init__(self, device: Device) -> None:
        self.cuda = device if isinstance(device, torch.device) and device.type == "cuda" else None
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self.cuda is not None:
            wait(self.cuda)
            _keep_busy(self.cuda)

    @contextmanager
    def span(self) -> Iterator[None]:
        """Time what runs within it."""
        if self.cuda is None:
            began = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - began)
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self.cuda)
        events[0].record(stream)
        yield
        events[1].record(stream)
        self._events.append(events)

    def seconds(self) -> list[float]:
        """Return the seconds of each piece, in order."""
        if self.cuda is not None:
            wait(self.cuda)
            none = _nothing(self.cuda)
            self._seconds += [max(0.0, a.elapsed_time(b) / 1e3 - none) for a, b in self._events]
            self._events.clear()
        return self._seconds


@functools.cache
def _nothing(device: torch.device) -> float:
    """Return the seconds between two events with nothing between them."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(20)]
    stream = torch.cuda.current_stream(device)
    _keep_busy(device)
    for event in events:
        event.record(stream)
    wait(device)
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in zip(events[::2], events[1::2], strict=True))


def _keep_busy(device: torch.device) -> None:
    """Occupy the device while the host launches what is timed."""
    with torch.cuda.device(device):
        keep_gpu_busy(AHEAD)


def wait(device: torch.device) -> None:
    """Wait until a CUDA device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
