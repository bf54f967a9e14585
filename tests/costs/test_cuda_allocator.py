"""The simulated caching allocator keeps its stated rules; each golden value is derived from them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematplan.scheduler.costs.meters.cuda_allocator import (
    AllocatorPeaks,
    CachingAllocator,
    block_bytes,
)

KIB, MIB = 2**10, 2**20
EITHER = pytest.mark.parametrize("expandable", [False, True])


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


def test_sizes_round_up_to_512_bytes_and_small_ones_share_a_segment_of_2_mib() -> None:
    assert replay([(0, 1), (1, 513)]) == AllocatorPeaks(514, 512 + 1024, 2 * MIB)
    # 1 MiB is still small, two of them fill a segment, and a third needs another.
    assert replay([(i, MIB) for i in range(2)]).reserved == 2 * MIB
    assert replay([(i, MIB) for i in range(3)]).reserved == 4 * MIB


def test_from_1_mib_on_tensors_share_20_mib_and_from_10_mib_on_each_has_its_own_segment() -> None:
    assert replay([(0, MIB + 1)]) == AllocatorPeaks(MIB + 1, MIB + 512, 20 * MIB)
    assert replay([(0, 10 * MIB - 512)]).reserved == 20 * MIB
    assert replay([(0, 10 * MIB)]).reserved == 10 * MIB
    # 3 MiB fit six times into 20 MiB; the seventh opens another segment.
    assert replay([(i, 3 * MIB) for i in range(6)]).reserved == 20 * MIB
    assert replay([(i, 3 * MIB) for i in range(7)]).reserved == 40 * MIB


def test_a_large_block_is_split_only_if_more_than_1_mib_is_left() -> None:
    # 11 MiB of a segment of 12: 1 MiB is left, which is not more than 1 MiB.
    assert replay([(0, 11 * MIB)]) == AllocatorPeaks(11 * MIB, 12 * MIB, 12 * MIB)
    # 512 bytes less, and the rest is split off.
    assert replay([(0, 11 * MIB - 512)]).allocated == 11 * MIB - 512
    # With expandable segments any 512 bytes are.
    assert replay([(0, 11 * MIB)], expandable_segments=True) == AllocatorPeaks(11 * MIB, 11 * MIB, 20 * MIB)


def test_a_cached_block_that_is_little_too_large_is_given_whole() -> None:
    # The block of 14 MiB is free; 13.5 MiB leave half a MiB.
    events = [(0, 14 * MIB), (0, 0), (1, 13 * MIB + 512 * KIB)]
    assert replay(events) == AllocatorPeaks(14 * MIB, 14 * MIB, 14 * MIB)
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(14 * MIB))
    allocator.allocate(13 * MIB + 512 * KIB)
    assert (allocator.requested, allocator.allocated) == (13 * MIB + 512 * KIB, 14 * MIB)


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (16, 12, 14)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(12 * MIB) == blocks[1]
    assert allocator.allocate(12 * MIB) == blocks[2]  # and 2 MiB of it are split off
    assert allocator.allocate(2 * MIB) == blocks[2] + 12 * MIB
    assert allocator.allocated == allocator.requested == 26 * MIB
    assert allocator.reserved == 42 * MIB


@EITHER
def test_free_neighbours_become_one(expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    first, second, third = (allocator.allocate(4 * MIB) for _ in range(3))
    allocator.free(first)
    allocator.free(third)  # with the 8 MiB behind it
    assert allocator.allocate(5 * MIB) == third
    allocator.free(third)
    allocator.free(second)  # joins all: 20 MiB
    assert allocator.allocate(9 * MIB) == first
    assert allocator.allocate(9 * MIB) == first + 9 * MIB
    assert allocator.reserved == 20 * MIB


def test_an_expandable_segment_grows_where_a_plain_pool_needs_a_new_one() -> None:
    events = [(0, 15 * MIB), (1, 15 * MIB), (0, 0), (1, 0), (2, 30 * MIB)]
    assert replay(events).reserved == (16 + 16 + 30) * MIB
    assert replay(events, expandable_segments=True).reserved == 40 * MIB


def test_the_end_of_an_expandable_segment_is_taken_last() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    first, *_ = (allocator.allocate(6 * MIB) for _ in range(3))  # 2 MiB are left at the end
    allocator.free(first)
    assert allocator.allocate(2 * MIB) == first


def test_an_expandable_segment_grows_from_the_free_bytes_at_its_end() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    first, second = allocator.allocate(8 * MIB), allocator.allocate(12 * MIB)  # to the last byte
    allocator.free(first)
    allocator.free(second)
    assert allocator.allocate(30 * MIB) == first
    assert allocator.reserved == 40 * MIB


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="7 is allocated twice"):
        replay([(7, 1), (7, 1)])
    with pytest.raises(ValueError, match="7 is released, and is not allocated"):
        replay([(7, 0)])
    with pytest.raises(ValueError, match="size=0"):
        CachingAllocator().allocate(0)
    with pytest.raises(KeyError):
        CachingAllocator().free(0)


def test_peaks_begin_anew_at_what_is_there() -> None:
    allocator = CachingAllocator()
    kept, gone = allocator.allocate(512), allocator.allocate(1024)
    allocator.free(gone)
    assert allocator.peaks == AllocatorPeaks(1536, 1536, 2 * MIB)
    allocator.reset_peaks()
    assert allocator.peaks == AllocatorPeaks(512, 512, 2 * MIB)
    allocator.free(kept)
    assert allocator.allocated == allocator.requested == 0


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rematplan.scheduler.costs.meters.cuda_allocator"
    subprocess.run([sys.executable, "-c", code], check=True)


SIZES = st.one_of(
    st.integers(1, 3 * MIB),
    st.integers(MIB, 40 * MIB),
    st.sampled_from([512, MIB, 5 * MIB, 10 * MIB, 20 * MIB]),  # what fills segments to their end
)
# What to do next: a size to allocate, or which of the blocks in use to free.
STREAMS = st.lists(st.one_of(SIZES, st.floats(0, 1, exclude_max=True)), max_size=60)


@dataclass
class Stretch:
    """Bytes of a pool by address: in use under a key, free, or none between two segments."""

    size: int
    key: int = -1

    FREE: ClassVar[int] = -1
    GAP: ClassVar[int] = -2


class Literal:
    """The rules by a list of stretches for each pool, searched from end to end."""

    def __init__(self, expandable: bool) -> None:
        self.expandable = expandable
        self.pools: dict[bool, list[Stretch]] = {True: [], False: []}  # small or not
        self.requested: dict[int, int] = {}
        self.reserved = 0

    def grown(self, pool: list[Stretch], small: bool, size: int) -> int:
        """The index of a free stretch that the driver's bytes make or lengthen."""
        if self.expandable:
            unit = 2 * MIB if small else 20 * MIB
            if not pool or pool[-1].key != Stretch.FREE:
                pool.append(Stretch(0))
            more = 0
            while pool[-1].size + more < size:
                more += unit
            pool[-1].size += more
        else:
            more = 2 * MIB if small else 20 * MIB
            if size >= 10 * MIB:
                more = (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
            pool += [Stretch(0, Stretch.GAP), Stretch(more)]
        self.reserved += more
        return len(pool) - 1

    def allocate(self, key: int, size: int) -> None:
        rounded = (size + 511) // 512 * 512
        small = rounded <= MIB
        pool = self.pools[small]
        fits = [i for i, each in enumerate(pool) if each.key == Stretch.FREE and each.size >= rounded]
        # The end of an expandable segment could grow, so it comes last.
        fits.sort(key=lambda i: (self.expandable and i == len(pool) - 1, pool[i].size, i))
        at = fits[0] if fits else self.grown(pool, small, rounded)
        rest = pool[at].size - rounded
        if rest >= 512 if small or self.expandable else rest > MIB:
            pool[at].size = rounded
            pool.insert(at + 1, Stretch(rest))
        pool[at].key = key
        self.requested[key] = size

    def free(self, key: int) -> None:
        pool = self.pools[self.requested.pop(key) <= MIB]
        next(each for each in pool if each.key == key).key = Stretch.FREE
        for i in range(len(pool) - 1, 0, -1):
            if pool[i].key == pool[i - 1].key == Stretch.FREE:
                pool[i - 1].size += pool.pop(i).size

    @property
    def allocated(self) -> int:
        return sum(each.size for pool in self.pools.values() for each in pool if each.key >= 0)


@EITHER
@given(stream=STREAMS)
def test_the_counters_keep_their_order_and_are_those_of_a_literal_reading(
    expandable: bool, stream: list[int | float]
) -> None:
    allocator, literal = CachingAllocator(expandable_segments=expandable), Literal(expandable)
    used: dict[int, int] = {}
    for number, what in enumerate(stream):
        if isinstance(what, int):
            literal.allocate(number, what)
            used[number] = allocator.allocate(what)
        elif used:
            key = list(used)[int(what * len(used))]
            literal.free(key)
            allocator.free(used.pop(key))
        assert allocator.requested == sum(literal.requested.values())
        assert allocator.allocated == literal.allocated
        assert allocator.reserved == literal.reserved
        rounded = sum(map(block_bytes, literal.requested.values()))
        large = sum(size > MIB for size in literal.requested.values())
        assert allocator.requested <= rounded <= allocator.allocated <= rounded + large * MIB
        assert allocator.allocated <= allocator.reserved
        if expandable:
            assert allocator.allocated == rounded
    for address in used.values():
        allocator.free(address)
    assert allocator.requested == allocator.allocated == 0
