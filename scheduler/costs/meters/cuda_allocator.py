"""CUDA's caching allocator, simulated: the blocks that a stream of allocations and releases gets.

The rules are those of PyTorch's own allocator in its default configuration, on one stream (sources:
https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp, ``get_allocation_size``,
``get_free_block``, ``should_split``, ``find_expandable_block``; the constants: c10/core/AllocatorConfig.h):

1. A size is rounded up to 512 bytes. Up to 1 MiB it comes from the small pool, above from the large one.
2. The smallest free block of the pool that is large enough is taken; of equal ones the lowest address.
3. If there is none, the driver gives a segment: of 2 MiB in the small pool; in the large one of 20 MiB for
   less than 10 MiB, else of the size rounded up to 2 MiB.
4. The excess of a block is split off and free, if it is at least 512 bytes (small pool) or more than 1 MiB
   (large pool). Else it stays in the block, and counts as allocated: up to 1 MiB for each large tensor.
5. A released block merges with its free neighbours in the segment.
6. With expandable segments each pool is one segment that grows at its end, by multiples of 2 MiB (small) or
   20 MiB (large), and the excess is split off from 512 bytes on in either pool. The block at the end counts
   in rule 2 as if it had grown already, so that it is taken last.

Not simulated: other streams, private pools of CUDA graphs, empty_cache, the retries when memory runs out,
options such as max_split_size_mb. Addresses of segments ascend here; the driver's may not, which matters only
where several free blocks are equal.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["LARGEST_SLACK", "SMALLEST_BLOCK", "AllocatorPeaks", "CachingAllocator", "block_bytes"]

SMALLEST_BLOCK = 512
SMALL = 2**20  # the largest size of the small pool
SMALL_SEGMENT = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20
SHARES_SEGMENT = 10 * 2**20  # sizes below come from segments of LARGE_SEGMENT
ROUND_LARGE = 2 * 2**20
LARGEST_SLACK = SMALL  # bytes of excess in a large block


class AllocatorPeaks(NamedTuple):
    """The most bytes at any time: asked for, of blocks in use, of segments (".all.peak" of memory_stats)."""

    requested: int
    allocated: int
    reserved: int


@dataclass(slots=True, eq=False)
class _Block:
    """A stretch of a segment; its neighbours in it."""

    address: int
    size: int
    before: _Block | None = None
    after: _Block | None = None
    requested: int = -1  # -1: free


class _Pool:
    def __init__(self, small: bool, expandable: bool, address: int) -> None:
        self.small, self.expandable = small, expandable
        self.free: list[tuple[int, int]] = []  # (size, address), ascending
        self.blocks: dict[int, _Block] = {}  # free ones, by address
        self.next_address = address
        self.end: _Block | None = None  # the last block of the expandable segment

    def put(self, block: _Block) -> None:
        insort(self.free, (block.size, block.address))
        self.blocks[block.address] = block

    def take(self, block: _Block) -> _Block:
        del self.free[bisect_left(self.free, (block.size, block.address))]
        return self.blocks.pop(block.address)

    def best(self, size: int) -> _Block | None:
        """Apply rule 2."""
        at = bisect_left(self.free, (size, -1))
        if at == len(self.free):
            return None
        block = self.blocks[self.free[at][1]]
        if self.expandable and block is self.end and at + 1 < len(self.free):  # rule 6
            block = self.blocks[self.free[at + 1][1]]
        return self.take(block)

    def segment(self, size: int) -> tuple[_Block, int]:
        """Return a free block of at least ``size`` bytes, in no list; bytes from the driver. Rules 3, 6."""
        if not self.expandable:
            given = SMALL_SEGMENT if self.small else LARGE_SEGMENT
            if not self.small and size >= SHARES_SEGMENT:
                given = _up(size, ROUND_LARGE)
            block = _Block(self.next_address, given)
        else:
            unit = SMALL_SEGMENT if self.small else LARGE_SEGMENT
            last = self.end
            if last is not None and last.requested < 0:
                given = _up(size - last.size, unit)
                self.take(last).size += given
                block = last
            else:
                given = _up(size, unit)
                block = self.end = _Block(self.next_address, given, before=last)
                if last is not None:
                    last.after = block
        self.next_address += given
        return block, given

    def splits(self, left: int) -> bool:
        """Apply rule 4."""
        return left >= SMALLEST_BLOCK if self.small or self.expandable else left > LARGEST_SLACK


class CachingAllocator:
    """The allocator, and what it counts.

    Args:
        expandable_segments: as in ``PYTORCH_ALLOC_CONF=expandable_segments:True``.

    Attributes:
        requested, allocated, reserved: bytes now; see AllocatorPeaks.
        peaks: the most so far, or since ``reset_peaks``.
    """

    def __init__(self, *, expandable_segments: bool = False) -> None:
        # The pools are so far apart that neither reaches the other's addresses.
        self._pools = (_Pool(False, expandable_segments, 2**60), _Pool(True, expandable_segments, 0))
        self._used: dict[int, _Block] = {}
        self.requested = self.allocated = self.reserved = 0
        self.reset_peaks()

    def reset_peaks(self) -> None:
        """Restart the peaks from the current bytes, as ``torch.cuda.reset_peak_memory_stats`` does."""
        self.peaks = AllocatorPeaks(self.requested, self.allocated, self.reserved)

    def allocate(self, size: int) -> int:
        """Return the address of a block for ``size`` bytes.

        Raises:
            ValueError: ``size`` is not positive.
        """
        if size <= 0:
            raise ValueError(f"CachingAllocator.allocate: size={size}, expected a positive number of bytes")
        rounded = block_bytes(size)
        pool = self._pools[rounded <= SMALL]
        block = pool.best(rounded)
        if block is None:
            block, given = pool.segment(rounded)
            self.reserved += given
        if pool.splits(block.size - rounded):
            rest = _Block(block.address + rounded, block.size - rounded, block, block.after)
            if rest.after is not None:
                rest.after.before = rest
            block.size, block.after = rounded, rest
            if pool.end is block:
                pool.end = rest
            pool.put(rest)
        block.requested = size
        self._used[block.address] = block
        self.requested += size
        self.allocated += block.size
        self.peaks = AllocatorPeaks(*map(max, self.peaks, (self.requested, self.allocated, self.reserved)))
        return block.address

    def free(self, address: int) -> None:
        """Release the block at ``address``.

        Raises:
            KeyError: no block in use begins there.
        """
        block = self._used.pop(address)
        pool = self._pools[address < 2**60]
        self.requested -= block.requested
        self.allocated -= block.size
        block.requested = -1
        before, after = block.before, block.after
        if before is not None and before.requested < 0:  # rule 5
            pool.take(before).size += block.size
            before.after = after
            if pool.end is block:
                pool.end = before
            block = before
        if after is not None and after.requested < 0:
            block.size += pool.take(after).size
            block.after = after.after
            if pool.end is after:
                pool.end = block
            after = block.after
        if after is not None:
            after.before = block
        pool.put(block)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def block_bytes(size: int) -> int:
    """Round ``size`` up to 512 bytes, the least of a block."""
    return _up(size, SMALLEST_BLOCK)
