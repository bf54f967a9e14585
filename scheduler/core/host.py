"""Describe the second memory, host or disk, and keep account of the copies between it and the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from rematplan.scheduler.core.checks import is_integer, is_number

__all__ = ["HostCopies", "HostMemory", "Item"]

Item: TypeAlias = tuple[str, int]  # ("boundary", i) is x_i; ("saved", i) are the saved tensors of stage i


@dataclass(frozen=True, slots=True)
class HostMemory:
    """How much can be copied off the device, and how fast.

    Copies are either synchronous (the device computes nothing meanwhile) or asynchronous: one channel writes
    and one reads, both at once and beside the compute, each serving its copies in order.

    Attributes:
        capacity: bytes.
        write_bandwidth, read_bandwidth: bytes per second from and to the device; ``math.inf`` for copies that
            cost their latency only.
        latency: seconds of each copy, on top of its bytes.
        asynchronous: whether copies overlap compute.
    """

    capacity: int
    write_bandwidth: float
    read_bandwidth: float
    latency: float = 0.0
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if not is_integer(self.capacity):
            raise ValueError(f"HostMemory: capacity={self.capacity!r} must be an integer number of bytes")
        object.__setattr__(self, "capacity", int(self.capacity))
        if self.capacity < 0:
            raise ValueError(f"HostMemory: capacity={self.capacity} must not be negative (bytes)")
        for field in ("write_bandwidth", "read_bandwidth", "latency"):
            value: Any = getattr(self, field)
            if not is_number(value) or math.isnan(value):
                raise ValueError(f"HostMemory: {field}={value!r} must be a number")
            try:
                object.__setattr__(self, field, float(value))
            except OverflowError as error:  # an int beyond what a float holds
                raise ValueError(
                    f"HostMemory: {field} has {value.bit_length()} bits, expected a float's range"
                ) from error
        if not (self.write_bandwidth > 0 and self.read_bandwidth > 0):
            raise ValueError(
                f"HostMemory: write_bandwidth={self.write_bandwidth} and read_bandwidth={self.read_bandwidth} "
                "must be above 0 (bytes per second)"
            )
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"HostMemory: latency={self.latency} must be finite and not negative (seconds)")
        if not isinstance(self.asynchronous, bool):
            raise ValueError(f"HostMemory: asynchronous={self.asynchronous!r} must be a bool")

    def write_seconds(self, size: int) -> float:
        """Return seconds to copy ``size`` bytes from the device."""
        return self.latency + size / self.write_bandwidth

    def read_seconds(self, size: int) -> float:
        """Return seconds to copy ``size`` bytes to the device."""
        return self.latency + size / self.read_bandwidth


class HostCopies:
    """The referee's account of the second memory during one step.

    Each method takes the clock of the compute, ``now``, and returns it, later where the compute had to wait.
    All such waits, and all seconds of synchronous copies, add up in ``stall``.
    """

    def __init__(self, host: HostMemory) -> None:
        self.host = host
        self.there: dict[Item, int] = {}  # copies on the host, from the start of their write: bytes
        self.used = self.peak = 0
        self.stall = 0.0
        self._written: dict[Item, float] = {}  # when the latest write of an item is over
        self._arrived: dict[Item, float] = {}  # the same for its latest read
        self._writer = self._reader = 0.0  # when the channels are free again

    def write(self, now: float, item: Item, size: int) -> float:
        """Start to copy ``item`` to the host."""
        self.there[item] = size
        self.used += size
        self.peak = max(self.peak, self.used)
        start = max(now, self._writer, self._arrived.get(item, 0.0))
        self._writer = self._written[item] = start + self.host.write_seconds(size)
        return now if self.host.asynchronous else self._wait(now, self._writer)

    def read(self, now: float, item: Item, size: int, source: Item) -> float:
        """Start to copy ``item`` to the device, out of ``source`` on the host."""
        start = max(now, self._reader, self._written[source])
        self._reader = self._arrived[item] = start + self.host.read_seconds(size)
        return now if self.host.asynchronous else self._wait(now, self._reader)

    def use(self, now: float, *items: Item) -> float:
        """Wait until one of ``items``, all on the device or on their way there, has arrived."""
        return self._wait(now, min((self._arrived.get(item, 0.0) for item in items), default=now))

    def settle(self, now: float, item: Item) -> float:
        """Wait for the copies of ``item`` that are under way: a copy of it is about to be released."""
        return self._wait(now, max(self._written.get(item, 0.0), self._arrived.get(item, 0.0)))

    def drop(self, now: float, item: Item) -> float:
        """Release the copy of ``item`` on the host, if it has one."""
        now = self.settle(now, item)
        self.used -= self.there.pop(item, 0)
        return now

    def _wait(self, now: float, until: float) -> float:
        self.stall += max(0.0, until - now)
        return max(now, until)
