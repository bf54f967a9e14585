"""Blocks of host memory for copies never overlap, and leave the whole region when all are freed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rematplan.executors.host_arena import Arena

CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 9)), max_size=60))
def test_blocks_do_not_overlap_and_leave_the_whole_region(steps: list[tuple[int, int]]) -> None:
    arena = Arena(20_000, CPU)
    there: list[tuple[Tensor, int, int, int]] = []
    for number, (size, which) in enumerate(steps):
        if which < len(there) and which < 5:
            block, offset, length, value = there.pop(which)
            assert block.eq(value).all()
            arena.give(offset, length)
        else:
            block, offset = arena.take(size)
            assert block.shape == (size,)
            block.fill_(number)
            there.append((block, offset, size, number))
    for block, offset, length, value in there:
        assert block.eq(value).all()
        arena.give(offset, length)
    assert arena.gaps() == [(0, arena.size)]


def test_where_there_is_no_gap_a_block_is_memory_of_its_own() -> None:
    arena = Arena(1000, CPU)
    first, offset = arena.take(arena.size)
    assert (offset, arena.beyond) == (0, 0)
    other, apart = arena.take(1)
    assert (apart, arena.beyond) == (-1, 1)
    other.fill_(1)
    first.fill_(2)
    assert other.item() == 1
    arena.give(apart, 1)
    arena.give(offset, arena.size)
    assert arena.take(64)[1] == 0


def test_nothing_is_taken_from_the_system_before_the_first_block() -> None:
    assert "_region" not in vars(Arena(2**50, CPU))


def test_threads_take_and_give_at_once() -> None:
    arena = Arena(200_000, CPU)

    def work(number: int) -> int:
        for turn in range(200):
            size = 1 + (37 * turn + 11 * number) % 3000
            block, offset = arena.take(size)
            block.fill_(number)
            assert block.eq(number).all()
            arena.give(offset, size)
        return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))
    assert arena.beyond == 0
    assert arena.gaps() == [(0, arena.size)]
