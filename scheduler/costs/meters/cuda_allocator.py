"""CUDA's caching allocator, simulated: the blocks that a stream of allocations and releases gets.

The rules are those of PyTorch's own allocator in its default configuration, on one stream (sources:
https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp, ``get_allocation_size``,
``get_free_block``, ``should_split``, ``find_expandable_block``; the constants: c10/core/AllocatorConfig.h):

1. A size is rounded up to 512 bytes. Up to 1 MiB it comes from the small pool, above from the large one.
2. The smallest free block of the pool that is large enough is taken; of equal ones that of the lowest
address. 3. If there is none, a segment is asked of the driver: of 2 MiB in the small pool; in the large one
of 20 MiB for less than
   10 MiB, else of the size rounded up to 2 MiB.
4. What a block has too much is split off and free, if it is at least 512 bytes (small pool) or more than 1
   MiB (large pool). What is not split off is part of the block, and counts as allocated: up to 1 MiB for each
   large tensor.
5. A block that is released becomes one with its free neighbours in the segment.
6. With expandable segments each pool is one segment that grows at its end, by multiples of 2 MiB (small) or
   20 MiB (large), and what is too much is split off from 512 bytes on in either pool. The block at the end
   counts in rule 2 as if it had grown already, so that it is taken last.

Not simulated: other streams, private pools of CUDA graphs, an empty_cache, the retries when memory runs out,
options such as max_split_size_mb. Segments have ascending addresses here; the driver may give others, which
matters only where several free blocks are equal.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LARGEST_SLACK", "SMALLEST_BLOCK", "AllocatorPeaks", "CachingAllocator", "block_bytes", "replay"]

SMALLEST_BLOCK = 512
SMALL = 2**20  # the largest size of the small pool
SMALL_SEGMENT = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20
SHARES_SEGMENT = 10 * 2**20  # sizes below come from segments of LARGE_SEGMENT
ROUND_LARGE = 2 * 2**20
LARGEST_SLACK = SMALL  # bytes that a large block may have too much


@dataclass(frozen=True, slots=True)
class AllocatorPeaks:
    """The most bytes at any time, as ``torch.cuda.memory_stats`` names them (".all.peak").

    Attributes:
        requested: that were asked for. allocated: of blocks in use. reserved: of segments.
    """

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
            if self.small:
                given = SMALL_SEGMENT
            else:
                given = LARGE_SEGMENT if size < SHARES_SEGMENT else -(-size // ROUND_LARGE) * ROUND_LARGE
            block = _Block(self.next_address, given)
            self.next_address += given
            return block, given
        unit = SMALL_SEGMENT if self.small else LARGE_SEGMENT
        last = self.end
        if last is not None and last.requested < 0:
            given = -(-(size - last.size) // unit) * unit
            self.take(last).size += given
            block = last
        else:
            given = -(-size // unit) * unit
            block = _Block(self.next_address, given, before=last)
            if last is not None:
                last.after = block
            self.end = block
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
    """

    def __init__(self, *, expandable_segments: bool = False) -> None:
        # The pools are so far apart that neither reaches the other's addresses.
        self._pools = (_Pool(False, expandable_segments, 2**60), _Pool(True, expandable_segments, 0))
        self._used: dict[int, _Block] = {}
        self.requested = self.allocated = self.reserved = 0
        self._peaks = (0, 0, 0)

    @property
    def peaks(self) -> AllocatorPeaks:
        """The most so far, or since ``reset_peaks``."""
        return AllocatorPeaks(*self._peaks)

    def reset_peaks(self) -> None:
        """Begin new peaks at what there is now, as ``torch.cuda.reset_peak_memory_stats`` does."""
        self._peaks = (self.requested, self.allocated, self.reserved)

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
        now = (self.requested, self.allocated, self.reserved)
        self._peaks = tuple(map(max, self._peaks, now))  # type: ignore[assignment] # of length 3
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


def block_bytes(size: int) -> int:
    """Round ``size`` up to 512 bytes: what a block has at least."""
    return -(-size // SMALLEST_BLOCK) * SMALLEST_BLOCK


def replay(events: Iterable[tuple[int, int]], *, expandable_segments: bool = False) -> AllocatorPeaks:
    """Return the peaks of a stream of allocations and releases.

    Args:
        events: (key, bytes) in order: positive for an allocation under that key, which must be free; negative
            or 0 for the release of what was allocated under it.

    Raises:
        ValueError: a key is allocated twice, or released without having been allocated.
    """
    allocator = CachingAllocator(expandable_segments=expandable_segments)
    at: dict[int, int] = {}
    for key, size in events:
        if (size > 0) == (key in at):
            what = "allocated twice" if size > 0 else "released, and is not allocated"
            raise ValueError(f"replay: {key} is {what}")
        if size > 0:
            at[key] = allocator.allocate(size)
        else:
            allocator.free(at.pop(key))
    return allocator.peaks
