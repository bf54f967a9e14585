"""Uniform chains over two memories: their costs, which are the least."""

from __future__ import annotations

import heapq
import math
import time
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import hrevolve
from rematplan.scheduler.solvers.hrevolve import solve_uniform
from tests.shared.helpers import oracle


def fastest_uniform(steps: int, memory: int, disk: int, write: float, read: float) -> float:
    """Least cost of any sequence of moves, by Dijkstra: steps left, slots in use, the boundary at work."""
    start = (steps, frozenset([0]), frozenset[int](), -1)
    best = {start: 0.0}
    tie = count()
    queue = [(0.0, next(tie), start)]
    while queue:
        cost, _, state = heapq.heappop(queue)
        left, held, there, at = state
        if left == 0:
            return cost
        if cost > best[state]:
            continue
        moves = [(0.0, (left, held, there, i)) for i in held] + [
            (read, (left, held, there, i)) for i in there
        ]
        moves += [(0.0, (left, held - {i}, there, at)) for i in held]
        moves += [(0.0, (left, held, there - {i}, at)) for i in there]
        if 0 <= at < left - 1:
            moves.append((1.0, (left, held, there, at + 1)))
        if at == left - 1:
            moves.append((0.0, (left - 1, held - {at}, there - {at}, -1)))
        if at >= 0 and len(held) < memory:
            moves.append((0.0, (left, held | {at}, there, at)))
        if at >= 0 and at not in there and len(there) < disk:
            moves.append((write, (left, held, there | {at}, at)))
        for price, after in moves:
            if cost + price < best.get(after, math.inf):
                best[after] = cost + price
                heapq.heappush(queue, (cost + price, next(tie), after))
    raise AssertionError


def uniform_cost(steps: int, memory: int, disk: int | None, write: float, read: float) -> float:
    """The cost that ``solve_uniform`` claims, once the referee has said the same of its schedule."""
    found = solve_uniform(steps, memory, disk, write, read)
    sizes = [1] * (steps + 1)
    chain = Chain.from_arrays([1.0] * steps, [0.0] * steps, sizes, sizes[1:], boundary_grad=[0] * (steps + 1))
    capacity = found.disk_slots if disk is None else disk
    host = HostMemory(capacity, 1 / write if write else math.inf, 1 / read if read else math.inf)
    line = simulate(chain, found.schedule, host)
    assert line.seconds - steps == pytest.approx(found.cost)
    assert line.peak <= memory + 2  # and x_i and x_{i+1} of the stage that runs
    assert line.host_peak == found.disk_slots
    assert line.stall == pytest.approx(found.writes * write + found.reads * read)
    return found.cost


@pytest.mark.parametrize("row", oracle("two_level.json")["rows"])
def test_uniform_chains_cost_what_exhaustive_search_says(row):
    cost = uniform_cost(row["l"], row["c_ram"], row["c_disk"], row["wd"], row["rd"])
    assert cost == pytest.approx(row["opt_cost"])


PRICES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0])


@settings(max_examples=60)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), PRICES, PRICES)
def test_no_sequence_of_moves_at_all_is_cheaper_on_a_uniform_chain(steps, memory, disk, write, read):
    cost = uniform_cost(steps, memory, disk, write, read)
    assert cost == pytest.approx(fastest_uniform(steps, memory, disk, write, read))


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 8), PRICES, PRICES)
def test_a_slot_more_never_costs(steps, memory, disk, write, read):
    cost = uniform_cost(steps, memory, disk, write, read)
    assert uniform_cost(steps, memory + 1, disk, write, read) <= cost
    assert uniform_cost(steps, memory, None, write, read) <= uniform_cost(
        steps, memory, disk + 1, write, read
    )
    assert uniform_cost(steps, memory, disk + 1, write, read) <= cost


@pytest.mark.parametrize(("length", "slots"), [(10, 2), (50, 5), (100, 3)])
def test_without_a_disk_or_with_one_that_is_too_dear_it_is_revolve(length, slots):
    advances = oracle("revolve.json")["tables"]["revolve_adv"][f"{length},{slots}"]
    assert uniform_cost(length, slots, 0, 1.0, 1.0) == advances
    assert uniform_cost(length, slots, None, 1e6, 1e6) == advances


def test_a_thousand_uniform_steps_are_solved_in_seconds():
    solve_uniform(3, 1, 1, 1.0, 1.0)  # compiles
    start = time.process_time()
    assert uniform_cost(1000, 10, None, 2.0, 2.0) == 2243
    assert uniform_cost(1000, 10, 5, 2.0, 2.0) == 3136
    assert time.process_time() - start < 10  # 0.3 on one idle core


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 1, 1, 1, 1), "steps"),
        ((5.0, 1, 1, 1, 1), "steps"),
        ((True, 1, 1, 1, 1), "steps"),
        ((5, 2**63, 1.5, 1, 1), "disk_slots"),
        ((5, 0, 1, 1, 1), "memory_slots"),
        ((5, 1, -1, 1, 1), "disk_slots"),
        ((5, 1, 1, math.nan, 1), "write"),
        ((5, 1, 1, -1, 1), "write"),
        ((5, 1, 1, 1, math.inf), "read"),
    ],
)
def test_a_uniform_problem_that_makes_no_sense_is_refused(arguments, name):
    with pytest.raises((TypeError, ValueError), match=f"solve_uniform: {name}="):
        solve_uniform(*arguments)


def test_tables_too_large_for_a_disk_that_binds_are_refused(monkeypatch):
    monkeypatch.setattr(hrevolve, "TABLE_BYTES", 10_000)
    assert solve_uniform(50, 2, None, 0.1, 0.1).disk_slots > 3
    with pytest.raises(ValueError, match="unlimited disk"):
        solve_uniform(50, 2, 3, 0.1, 0.1)
