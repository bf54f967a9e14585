"""Revolve as a stream, packed, on chains and online: runs by the formulas, the least possible."""

from __future__ import annotations

import heapq
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Forward, Free, Keep, Schedule
from rematplan.scheduler.solvers import (
    OnlineRevolve,
    revolve_actions,
    revolve_packed,
    revolve_runs,
    solve_chain,
)
from rematplan.scheduler.solvers.revolve_counts import (
    PACKED,
    PACKED_STEPS,
    advance,
    repetitions,
    reverse,
)
from tests.shared.chains import chains
from tests.shared.helpers import oracle, schedule_with_slots

TABLES = oracle("revolve.json")["tables"]
NUMBERS = [tuple(map(int, key.split(","))) for key in TABLES["revolve_total"]]
TWO_PHASE = pytest.mark.parametrize("two_phase", [False, True])


def uniform(length: int) -> Chain:
    return Chain.from_arrays([1.0] * length, [0.0] * length, [1] * (length + 1), [1] * length)


def unpacked(chunks: Iterable[np.ndarray]) -> Iterator[Action]:
    for chunk in chunks:
        yield from (PACKED[kind](stage) for kind, stage in chunk.T.tolist())


def most_held(actions: Iterable[Action]) -> int:
    """The most boundaries held at once for the sake of a later run; what is kept is outside of them."""
    held: set[int] = set()
    most = 0
    for action in actions:
        if isinstance(action, Checkpoint):
            held.add(action.stage)
        elif isinstance(action, Free):
            held.remove(action.boundary)
        elif isinstance(action, Backward):
            held.discard(action.stage)
        most = max(most, len(held))
    return most


def least_runs(steps: int, slots: int, held: frozenset[int]) -> int:
    """Fewest forwards that reverse ``steps`` steps from ``held``, one held at a time: Dijkstra over states.

    Any boundary may be held when it is computed, if a slot is free, and given up at any time.
    """
    start = (steps, held, -1)  # steps left, boundaries held, the working boundary or -1
    best = {start: 0}
    queue: list[tuple[int, int, frozenset[int], int]] = [(0, *start)]
    while queue:
        cost, left, boundaries, working = heapq.heappop(queue)
        if left == 0:
            return cost
        if cost > best[left, boundaries, working]:
            continue
        following = [(cost, left, boundaries - {b}, working) for b in boundaries]
        if working >= 0 and len(boundaries) < slots:
            following.append((cost, left, boundaries | {working}, working))
        for i in {*boundaries, working} - {-1}:
            if i < left - 1:
                following.append((cost + 1, left, boundaries, i + 1))
            elif i == left - 1:
                following.append((cost + 1, left - 1, boundaries - {i}, -1))
        for entry in following:
            if entry[0] < best.get(entry[1:], sys.maxsize):
                best[entry[1:]] = entry[0]
                heapq.heappush(queue, entry)
    raise AssertionError("x_0 was not held")


# Counts


@pytest.mark.parametrize(("steps", "slots"), NUMBERS)
def test_the_closed_forms_are_the_tables_of_the_oracle(steps, slots):
    key = f"{steps},{slots}"
    assert revolve_runs(steps, slots) == TABLES["revolve_total"][key]
    assert revolve_runs(steps, slots) - steps == TABLES["revolve_adv"][key]
    assert revolve_runs(steps, slots, two_phase=True) == TABLES["two_phase_total"][key]


@TWO_PHASE
@given(steps=st.integers(1, 120), slots=st.integers(1, 130))
def test_the_actions_are_legal_as_many_as_the_formula_says_and_hold_no_more_than_the_slots(
    two_phase, steps, slots
):
    schedule = Schedule(tuple(revolve_actions(steps, slots, two_phase=two_phase)))
    assert sum(simulate(uniform(steps), schedule).runs) == revolve_runs(steps, slots, two_phase=two_phase)
    needed = steps if two_phase else max(steps - 1, 1)
    assert most_held(schedule) <= min(slots, needed)
    if 1 < slots <= needed:
        assert most_held(schedule) == slots


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", range(1, 9))
def test_nothing_that_keeps_one_step_at_a_time_runs_fewer(steps, slots):
    # The oracle of the oracle: Dijkstra over everything that can be held.
    assert revolve_runs(steps, slots) == least_runs(steps, slots, frozenset([0]))


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", range(1, 8))
def test_no_first_of_two_phases_leaves_a_better_placement(steps, slots):
    placements = [frozenset([0])]
    for boundary in range(1, steps):
        placements += [held | {boundary} for held in placements if len(held) < slots]
    least = min(least_runs(steps, slots, held) for held in placements)
    assert revolve_runs(steps, slots, two_phase=True) == steps + least


@given(st.integers(1, 10**40), st.integers(1, 60))
def test_the_repetitions_are_the_least_that_suffice(steps, slots):
    r = repetitions(steps, slots)
    assert comb(slots + r, slots) >= steps
    assert r == 0 or comb(slots + r - 1, slots) < steps


def test_runs_are_counted_exactly_at_any_size():
    n = 10**30
    assert revolve_runs(n, 1) == n + n * (n - 1) // 2
    assert revolve_runs(n, n) == 2 * n - 1
    assert revolve_runs(n, n - 1) == 2 * n - 1
    assert revolve_runs(comb(70, 20), 20) == comb(70, 20) * 51 - comb(70, 49)


# Golden values


def test_ten_steps_and_three_slots_hold_states_0_4_and_7_first():
    # As in the paper's figure of 10 steps and 3 checkpoints.
    F, C, K, B = Forward, Checkpoint, Keep, Backward
    sweep = [C(0), F(1), F(2), F(3), C(4), F(5), F(6), C(7), F(8), K(9), B(9)]
    third = [C(7), K(8), B(8), K(7), B(7)]
    second = [C(4), C(5), K(6), B(6), K(5), B(5), K(4), B(4)]
    first = [C(0), C(1), C(2), K(3), B(3), K(2), B(2), K(1), B(1), K(0), B(0)]
    assert list(revolve_actions(10, 3)) == sweep + third + second + first


def test_two_phases_lose_the_last_state():
    F, C, K, B = Forward, Checkpoint, Keep, Backward
    sweep = [C(0), F(1), F(2), C(3), F(4)]
    last = [C(3), K(4), B(4), K(3), B(3)]
    first = [C(0), C(1), K(2), B(2), K(1), B(1), K(0), B(0)]
    assert list(revolve_actions(5, 2, two_phase=True)) == sweep + last + first


# The stream and the packed form


@TWO_PHASE
@given(steps=st.integers(1, 300), slots=st.integers(1, 300), chunk=st.integers(2, 100))
@pytest.mark.slow
def test_the_packed_form_is_the_same_actions(two_phase, steps, slots, chunk):
    packed = unpacked(revolve_packed(steps, slots, two_phase=two_phase, chunk=chunk))
    assert list(packed) == list(revolve_actions(steps, slots, two_phase=two_phase))


@pytest.mark.parametrize("slots", [1, 2, 3, 10, 1000, 10**6, 10**9])
@pytest.mark.slow
def test_a_billion_steps_begin_at_once_and_alike(slots):
    start = time.process_time()
    actions = list(islice(revolve_actions(10**9, slots), 5000))
    packed = list(islice(unpacked(revolve_packed(10**9, slots)), 5000))
    assert time.process_time() - start < 5  # about 0.05
    assert actions == packed
    assert isinstance(actions[0], Checkpoint)


@settings(max_examples=100)
@given(st.integers(2, PACKED_STEPS) | st.just(PACKED_STEPS), st.floats(0, 1))
def test_the_compiled_splits_are_those_of_python_integers(steps, share):
    slots = max(1, min(steps - 1, round(steps**share)))
    r = repetitions(steps, slots)
    expected = min(comb(slots + r - 1, slots), steps - comb(slots + r - 2, slots - 1))
    assert advance(steps, slots) == expected


def test_more_steps_than_an_int64_holds_are_streamed():
    assert list(islice(revolve_actions(2**70, 40), 3)) == [Checkpoint(0), Forward(1), Forward(2)]


@pytest.mark.parametrize("stream", [revolve_actions, revolve_packed])
def test_memory_does_not_grow_with_the_steps(stream):
    deque(stream(10**3, 10), 0)  # compiled, imported
    tracemalloc.start()
    deque(islice(stream(10**7, 10), 10**4 if stream is revolve_actions else 10), 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20  # bytes; two chunks of 2**16 actions are 2 MiB


@pytest.mark.slow
def test_a_million_steps_are_packed_in_a_moment_and_streamed_in_seconds():
    deque(revolve_packed(100, 3), 0)
    start = time.process_time()
    actions = sum(chunk.shape[1] for chunk in revolve_packed(10**6, 10))
    assert time.process_time() - start < 1.5  # about 0.04
    assert actions == revolve_runs(10**6, 10) + 10**6
    start = time.process_time()
    deque(revolve_actions(10**6, 10), 0)
    assert time.process_time() - start < 12  # about 4 on an idle core


# On chains


@given(chain=chains(8), data=st.data())
def test_on_a_chain_the_fastest_number_of_slots_that_fits_is_found(chain, data):
    lines = [simulate(chain, schedule_with_slots(chain, slots)) for slots in range(1, len(chain) + 1)]
    smallest, largest = min(line.peak for line in lines), max(line.peak for line in lines)
    budget = data.draw(st.integers(max(smallest, 1), largest + 1))
    fastest = min(line.seconds for line in lines if line.peak <= budget)
    assert simulate(chain, solve_chain(chain, budget, "revolve")).seconds == fastest
    if smallest > 1:
        with pytest.raises(InfeasibleBudget) as caught:
            solve_chain(chain, smallest - 1, "revolve")
        assert caught.value.smallest == smallest


@pytest.mark.parametrize("slots", [1, 2, 5, 30])
def test_the_chain_solver_and_the_stream_are_one(slots):
    assert tuple(revolve_actions(30, slots)) == schedule_with_slots(uniform(30), slots).actions


def test_two_thousand_stages_are_solved_within_seconds():
    with pytest.raises(InfeasibleBudget) as caught:
        solve_chain(uniform(2000), 1, "revolve")
    start = time.process_time()
    schedule = solve_chain(uniform(2000), 2 * caught.value.smallest, "revolve")
    assert time.process_time() - start < 10  # about 0.7 on an idle core
    assert simulate(uniform(2000), schedule).peak <= 2 * caught.value.smallest


# Online


def online(slots: int, steps: int) -> tuple[OnlineRevolve, list[Action]]:
    loop = OnlineRevolve(slots)
    return loop, [action for _ in range(steps) for action in loop.step()]


@settings(max_examples=50)
@given(slots=st.integers(1, 12), steps=st.integers(0, 200))
def test_online_actions_are_legal_and_as_many_as_counted(slots, steps):
    loop, sweep = online(slots, steps)
    actions = (*sweep, *loop.backward_actions())
    if steps:
        assert sum(simulate(uniform(steps), Schedule(actions)).runs) == loop.runs
        assert most_held(actions) <= slots
        assert loop.runs >= revolve_runs(steps, slots, two_phase=True)
    else:
        assert actions == ()
        assert loop.runs == 0


@pytest.mark.parametrize("slots", range(1, 25))
def test_online_is_as_good_as_knowing_the_length_up_to_the_bound(slots):
    loop = OnlineRevolve(slots)
    for steps in range(1, comb(slots + 2, 2) + 1):
        loop.step()
        assert loop.runs == revolve_runs(steps, slots, two_phase=True)


@pytest.mark.parametrize("slots", range(2, 6))
def test_no_online_placement_is_as_good_beyond_the_bound(slots):
    def optimal(held: tuple[int, ...], steps: int) -> bool:
        gaps = zip(held, (*held[1:], steps), strict=True)
        extra = sum(
            revolve_runs(end - start, slots - i) - (end - start) for i, (start, end) in enumerate(gaps)
        )
        return 2 * steps + extra == revolve_runs(steps, slots, two_phase=True)

    reached: set[tuple[int, ...]] = {(0,)}  # every placement that was optimal at each length so far
    steps = 1
    while True:
        reached = {held for held in reached if optimal(held, steps)}
        if not reached:
            break
        more: set[tuple[int, ...]] = {(*held, steps) for held in reached}
        fewer: set[tuple[int, ...]] = {
            (*held[:k], *held[k + 1 :]) for held in more for k in range(1, len(held))
        }
        reached |= {held for held in more | fewer if len(held) <= slots}
        steps += 1
    assert steps == comb(slots + 2, 2) + 1


@pytest.mark.parametrize(("slots", "most"), [(2, 1.104), (3, 1.06), (5, 1.036), (10, 1.036), (20, 1.036)])
def test_online_stays_near_the_optimum_beyond_the_bound(slots, most):
    loop = OnlineRevolve(slots)
    for steps in range(1, 1200):
        loop.step()
        assert loop.runs <= most * revolve_runs(steps, slots, two_phase=True)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("steps", range(1, 11))
def test_the_backward_is_the_best_from_what_is_held_even_if_some_may_be_given_up(slots, steps):
    loop, _ = online(slots, steps)
    assert loop.runs == steps + least_runs(steps, slots, frozenset(loop.held))


@given(st.data())
def test_any_placement_is_reversed_as_the_formula_counts(data):
    steps = data.draw(st.integers(1, 40))
    held = sorted({0, *data.draw(st.sets(st.integers(0, steps - 1), max_size=6))})
    slots = len(held) + data.draw(st.integers(0, 2))
    gaps = list(zip(held, [*held[1:], steps], strict=True))
    sweep = [Checkpoint(i) if i in held else Forward(i) for i in range(steps)]
    back = reverse([(start, end - start, slots - i) for i, (start, end) in enumerate(gaps)])
    line = simulate(uniform(steps), Schedule((*sweep, *back)))
    counts = [revolve_runs(end - start, slots - i) for i, (start, end) in enumerate(gaps)]
    assert sum(line.runs) == steps + sum(counts)


def test_the_placement_for_four_slots():
    # The first gap grows first, to c + 1 = 5 steps; then the second to 4, the third to 3, the last to 2.
    loop = OnlineRevolve(4)
    placements = []
    for _ in range(14):
        loop.step()
        placements.append(loop.held)
    assert placements[3] == (0, 1, 2, 3)
    assert placements[13] == (0, 5, 9, 12)


def test_looking_at_the_backward_does_not_end_the_loop():
    loop, sweep = online(3, 5)
    list(loop.backward_actions())
    again, other = online(3, 5)
    assert sweep == other
    assert loop.step() == again.step()


# Misuse


@pytest.mark.parametrize("function", [revolve_runs, revolve_actions, revolve_packed])
@pytest.mark.parametrize(
    ("steps", "slots", "error"),
    [(0, 1, ValueError), (1, 0, ValueError), (1.5, 1, TypeError), (True, 1, TypeError), (3, "2", TypeError)],
)
def test_what_is_no_count_is_refused_at_once(function, steps, slots, error):
    with pytest.raises(error, match=f"{function.__name__}: s"):
        function(steps, slots)


def test_online_refuses_what_is_no_count():
    with pytest.raises(ValueError, match="OnlineRevolve: slots=0 must be at least 1"):
        OnlineRevolve(0)
    with pytest.raises(TypeError, match="OnlineRevolve: slots=None must be an int"):
        OnlineRevolve(None)  # type: ignore[arg-type] # on purpose


def test_packed_refuses_what_its_integers_do_not_hold():
    with pytest.raises(ValueError, match="revolve_actions takes any number"):
        revolve_packed(2**31, 3)
    with pytest.raises(ValueError, match="chunk=1 must be at least 2"):
        revolve_packed(10, 3, chunk=1)
