"""The frontier, many budgets from one table, and the table of all solvers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget, SearchLimit
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import SOLVERS, solve_chain
from rematplan.scheduler.solvers.compare import compare
from rematplan.scheduler.solvers.frontier import pareto
from tests.shared.brute_force import persistent_schedules
from tests.shared.chains import chains
from tests.shared.helpers import oracle, oracle_chain


@settings(max_examples=70)
@given(chains(4, signed=True))
def test_the_frontier_is_that_of_all_persistent_schedules(chain):
    lines = sorted(
        (line.peak, line.seconds) for line in (simulate(chain, s) for s in persistent_schedules(chain))
    )
    truth: list[tuple[int, float]] = []
    for peak, seconds in lines:
        if not truth or seconds < truth[-1][1]:
            truth.append((peak, seconds))
    frontier = pareto(chain, step=1)
    assert [(point.peak, point.seconds) for point in frontier] == truth


@settings(max_examples=50)
@given(chains(9, options=3, largest=1000, signed=True))
def test_every_point_is_what_its_schedule_takes_and_none_beats_its_bound(chain):
    frontier = pareto(chain)
    for point in frontier:
        line = simulate(chain, frontier.schedule(point))
        assert line.peak == point.peak
        assert line.seconds == pytest.approx(point.seconds)
        assert point.lower_bound <= point.seconds * (1 + 1e-12)
    peaks = [point.peak for point in frontier]
    seconds = [point.seconds for point in frontier]
    assert peaks == sorted(set(peaks))
    assert seconds == sorted(set(seconds), reverse=True)


def test_the_frontier_of_the_oracle_s_chain_is_at_or_below_its_persistent_optima():
    data = oracle("hetero_L50.json")
    chain = oracle_chain(data["chain"])
    frontier = pareto(chain, step=data["rows"][0].get("unit", 2**20))
    for row in data["rows"]:
        assert frontier.within(row["limit"]).seconds <= row["persistent"] * 1.001
    assert frontier.points[-1].seconds == pytest.approx(chain.plain_seconds)


def test_below_the_frontier_the_error_says_the_smallest_budget():
    data = oracle("hetero_L10.json")
    chain = oracle_chain(data["chain"])
    frontier = pareto(chain)
    with pytest.raises(InfeasibleBudget) as alone:
        solve_chain(chain, 1)
    with pytest.raises(InfeasibleBudget) as caught:
        frontier.within(frontier.points[0].peak - 1)
    assert caught.value.smallest == alone.value.smallest == frontier.points[0].peak


@pytest.mark.parametrize("step", [0, -1, 1.5, True])
def test_a_step_that_is_no_positive_int_is_refused(step):
    with pytest.raises((TypeError, ValueError), match="pareto: step="):
        pareto(Chain.from_arrays([1.0], [1.0], [1, 1], [1]), step=step)


@settings(max_examples=50)
@given(chains(7, options=3, signed=True))
def test_many_budgets_at_once_are_each_solved_as_if_alone(chain):
    low = pareto(chain).points[0].peak
    budgets = [max(low, 1) + extra for extra in (17, 0, 5, 0, 1000)]
    for budget, schedule in zip(budgets, solve_chain(chain, budgets), strict=True):
        line = simulate(chain, schedule)
        assert line.peak <= budget
        assert line.seconds == simulate(chain, solve_chain(chain, budget)).seconds


@pytest.mark.parametrize("solver", ["optimal", "chen"])
def test_of_many_budgets_the_smallest_decides_whether_they_can_be_met(solver):
    chain = Chain.from_arrays([1.0] * 6, [1.0] * 6, [10] * 7, [30] * 6)
    with pytest.raises(InfeasibleBudget) as alone:
        solve_chain(chain, 1, solver)
    with pytest.raises(InfeasibleBudget) as caught:
        solve_chain(chain, [1000, 2, alone.value.smallest], solver)
    assert (caught.value.budget, caught.value.smallest) == (2, alone.value.smallest)
    assert len(solve_chain(chain, [alone.value.smallest] * 3, solver)) == 3


def test_compare_runs_every_solver_that_needs_no_more_and_says_which_it_leaves_out():
    chain = Chain.from_arrays([1.0] * 6, [2.0] * 6, [10] * 7, [30] * 6, name="six")
    table = compare(chain, [1000, 120, 1])
    assert set(table.cells) | set(table.left_out) == set(SOLVERS)
    assert "keep" in table.left_out["selective"]
    assert all(table.overhead(name, 0) == 0 for name in ("optimal", "keep_all"))
    for name, cells in table.cells.items():
        best = table.cells["optimal"] if not SOLVERS[name].exact else cells
        for cell, other in zip(cells, best, strict=True):
            assert (cell.seconds or math.inf) >= (other.seconds or math.inf)
        assert cells[2].seconds is None
        assert cells[2].peak > 1
    text = str(table)
    assert text.startswith("six: overhead")
    assert "selective was left out" in text
    assert all(name in text for name in table.cells)


def test_compare_leaves_out_a_solver_that_gives_up():
    chain = Chain.from_arrays([1.0, 2.0, 3.0] * 3, [1.0] * 9, [1, 5, 2, 7, 3, 8, 2, 9, 4, 6], [9, 14, 11] * 3)
    few = {"exhaustive": {"states": 3}}
    table = compare(chain, [40], parameters=few)
    assert "gave up after 3 states" in table.left_out["exhaustive"]
    assert "exhaustive was left out" in str(table)
    with pytest.raises(SearchLimit):
        compare(chain, [40], ["exhaustive"], few)


def test_compare_passes_parameters_on():
    chain = Chain.from_arrays([1.0] * 6, [2.0] * 6, [10] * 7, [30] * 6)
    tables = [compare(chain, [1000], ["periodic"], {"periodic": {"every": k}}) for k in (1, 3)]
    assert tables[0].cells["periodic"][0].peak != tables[1].cells["periodic"][0].peak


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([],), "empty"),
        (([0],), "memory_budget=0"),
        (([10], ["rotor"]), "no solver 'rotor'"),
        (([10], None, {"rotor": {}}), "no solver 'rotor'"),
        (([10], ["selective"]), "needs the parameter 'keep'"),
        ((10,), "memory_budgets=10 must be a list"),
        (([10.0],), r"memory_budget=10\.0"),
        (([10], ["periodic"], {"periodic": 2}), r"parameters\['periodic'\]=2 must map"),
    ],
)
def test_compare_refuses_what_it_cannot_do(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        compare(Chain.from_arrays([1.0], [1.0], [1, 1], [1]), *arguments)
