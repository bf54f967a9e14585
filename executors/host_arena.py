"""Host memory for copies, in one region that is page-locked once; torch's own rounds up to powers of two."""

from __future__ import annotations

import mmap
import threading
import weakref
from bisect import insort
from collections import deque
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = ["Arena"]

ALIGNED = 64  # bytes
ROOM = 50  # one part in so many more, for what lies between blocks


class Arena:
    """Allocates blocks out of one region, first fit.

    Copies on streams may still read a freed block: its next owner must write it after them.

    Args:
        size: the most bytes of blocks at once; a block that finds no gap gets memory of its own.
        device: on CUDA, the region is page-locked for its copies.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self.size = _up(size + size // ROOM + mmap.PAGESIZE, mmap.PAGESIZE)
        self.beyond = 0  # blocks that found no gap
        self._free = [(0, self.size)]  # (offset, bytes), ascending, none beside another
        # Blocks are given back by any thread, wherever Python's garbage collector interrupts it.
        self._given: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    @cached_property
    def _region(self) -> Tensor:
        region = torch.frombuffer(mmap.mmap(-1, self.size), dtype=torch.uint8)
        if self.pinned:
            _lock(region)
            weakref.finalize(self, _unlock, region)
        return region

    def take(self, size: int) -> tuple[Tensor, int]:
        """Return a block, (size,) of uint8, and its offset, to give it back by; -1 for memory of its own."""
        needed = _up(size, ALIGNED)
        with self._lock:
            gaps = self.gaps()
            number = next((i for i, (_, room) in enumerate(gaps) if room >= needed), None)
            if number is not None:
                offset, room = gaps[number]
                gaps[number : number + 1] = [(offset + needed, room - needed)] if room > needed else []
                return self._region[offset : offset + size], offset
            self.beyond += 1
        if self.pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True), -1
        return torch.from_numpy(np.empty(size, dtype=np.uint8)), -1

    def give(self, offset: int, size: int) -> None:
        """Take a block back."""
        if offset >= 0:
            self._given.append((offset, size))

    def gaps(self) -> list[tuple[int, int]]:
        """Return (offset, bytes) of what is free, ascending, none beside another."""
        while self._given:
            offset, size = self._given.popleft()
            begin, end = offset, offset + _up(size, ALIGNED)
            for each in [(o, s) for o, s in self._free if o + s == begin or o == end]:
                self._free.remove(each)
                begin, end = min(begin, each[0]), max(end, sum(each))
            insort(self._free, (begin, end - begin))
        return self._free


def _up(size: int, unit: int) -> int:
    """Return the next multiple of a unit, at least one."""
    return max(1, -(-size // unit)) * unit


def _lock(region: Tensor) -> None:
    error = torch.cuda.cudart().cudaHostRegister(region.data_ptr(), region.nbytes, 0)
    if int(error):
        raise RuntimeError(
            f"page-locking {region.nbytes} bytes of host memory failed ({error}); plan with less HostMemory, or raise the limit of "
            "locked memory (ulimit -l)"
        )


def _unlock(region: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(region.data_ptr())
