"""The knapsack bound is below every schedule, and is the linear relaxation that it claims to be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.solvers.knapsack_bound import Knapsack
from tests.shared.brute_force import fastest_of_all
from tests.shared.chains import chains


@given(chains(3), st.integers(0, 100))
def test_no_schedule_is_faster_than_the_bound(chain: Chain, budget: int) -> None:
    seconds = fastest_of_all(chain, budget)
    assert chain.plain_seconds + Knapsack(chain).extra(budget) <= seconds + 1e-9


@given(chains(4, options=3))
def test_more_memory_never_takes_more_seconds_and_enough_takes_none(chain: Chain) -> None:
    bound = Knapsack(chain)
    extra = [bound.extra(budget) for budget in range(0, 400, 5)]
    assert extra == sorted(extra, reverse=True)
    cheapest = sum(min(option.recompute for option in stage.options) for stage in chain.stages)
    assert bound.extra(10**9) == pytest.approx(cheapest)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 60))
def test_it_is_at_most_the_best_choice_of_stages_to_keep(stages: list[tuple[int, int]], room: int) -> None:
    """The literal knapsack, where nothing but what is kept takes bytes: a stage is kept, or runs again."""
    forward, saved = zip(*stages, strict=True)
    chain = Chain.from_arrays(
        list(map(float, forward)), [0.0] * len(stages), [0] * (len(stages) + 1), list(saved)
    )
    best = min(
        sum(seconds for seconds, keep in zip(forward, kept, strict=True) if not keep)
        for kept in itertools.product([False, True], repeat=len(stages))
        if sum(size for size, keep in zip(saved, kept, strict=True) if keep) <= room
    )
    assert Knapsack(chain).extra(room) <= best + 1e-9


def test_the_steps_of_the_hull_are_taken_by_seconds_spared_per_byte() -> None:
    # Stage 0 spares 4 s for 2 bytes, stage 1 spares 3 s for 3 bytes; x_0 takes 1 byte, nothing else does.
    chain = Chain.from_arrays([4.0, 3.0], [0.0, 0.0], [1, 0, 0], [2, 3])
    bound = Knapsack(chain)
    assert [bound.extra(1 + room) for room in range(6)] == [7.0, 5.0, 3.0, 2.0, 1.0, 0.0]
