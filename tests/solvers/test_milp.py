"""The MILP bound and the referee of DAG plans, against Dijkstra over sets of values."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from rematplan.scheduler.bounds import milp
from rematplan.scheduler.bounds.dag import Dag, Drop, Op, Run, Turn, chain_dag, simulate_dag
from rematplan.scheduler.bounds.milp import milp_bound, relaxed_seconds, solve_dag
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import solve_chain
from tests.shared.chains import chains
from tests.shared.dags import DIAMOND, dags, fastest
from tests.shared.helpers import oracle, oracle_chain, smallest

SMALL = oracle("small_chains.json")


def bound(dag: Dag, budget: int) -> tuple[float, int]:
    """Seconds of a plan proven optimal, or inf; and the smallest budget where nothing fits, or 0."""
    try:
        found = solve_dag(dag, budget)
    except InfeasibleBudget as error:
        return math.inf, -1 if error.note else error.smallest
    line = simulate_dag(dag, found.plan)
    assert (line.seconds, line.peak) == (found.seconds, found.peak)
    assert found.peak <= budget
    assert found.gap <= 1e-6
    return found.seconds, 0


def best(chain: Chain, budget: int) -> float:
    """Seconds of the fastest schedule of all; inf if nothing fits."""
    try:
        return simulate(chain, solve_chain(chain, budget, "exhaustive")).seconds
    except InfeasibleBudget:
        return math.inf


def least(chain: Chain) -> int:
    """The least peak of all schedules, or 1."""
    return max(smallest(chain, "exhaustive"), 1)


@pytest.mark.slow
@settings(max_examples=80)
@given(dags(), st.data())
def test_small_dags_take_as_long_as_the_fastest_plan_of_the_class(dag, data):
    smallest = bound(dag, 1)[1]
    budget = max(smallest + data.draw(st.integers(-2, 12)), 1)
    assert bound(dag, budget)[0] == fastest(dag, budget)


@settings(max_examples=50)
@given(dags())
def test_the_smallest_budget_is_the_least_peak_of_the_class(dag):
    smallest = bound(dag, 1)[1]
    assert fastest(dag, smallest) < math.inf
    assert fastest(dag, smallest - 1) == math.inf


@settings(max_examples=80)
@given(dags(), st.integers(0, 12))
def test_the_relaxation_is_a_bound(dag, more):
    budget = bound(dag, 1)[1] + more
    assert relaxed_seconds(dag, budget) <= bound(dag, budget)[0] * (1 + 1e-6) + 1e-9


def test_a_diamond_recomputes_its_cheap_branch():
    assert solve_dag(DIAMOND, 18).seconds == 7
    for budget in (14, 17):  # a, b and c's work do not fit at once
        found = solve_dag(DIAMOND, budget)
        assert found.plan == (Run(0), Run(1), Drop(2), Run(2), Run(1), Drop(1), Run(3), Drop(2), Drop(3))
        assert (found.seconds, found.peak) == (8, 14)
    assert bound(DIAMOND, 13) == (math.inf, 14)


@settings(max_examples=40)
@given(chains(3), st.data())
def test_on_chains_the_bound_is_the_optimum_of_all_schedules_or_just_below(chain, data):
    smallest = least(chain)
    budget = smallest + data.draw(st.integers(0, 20))
    found = milp_bound(chain, budget)
    assert found.gap <= 1e-6
    assert found.seconds <= best(chain, budget)


@pytest.mark.parametrize("number", range(0, len(SMALL), 4))
def test_on_the_oracles_chains_the_bound_lies_between_their_bound_and_the_optimum(number):
    chain = oracle_chain(SMALL[number])
    for row in SMALL[number]["rows"][::3]:
        free = math.inf if row["exact_with_free_discard"] is None else row["exact_with_free_discard"]
        assert free <= bound(chain_dag(chain), row["limit"])[0] <= best(chain, row["limit"])


def test_a_boundary_just_made_may_feed_a_backward_in_the_dag_alone():
    # The chain's Backward(i) wants x_i held or inside stage i-1; the Dag also takes it fresh from
    # Forward(i-1).
    chain = oracle_chain(SMALL[16])
    rows = [
        (bound(chain_dag(chain), row["limit"])[0], best(chain, row["limit"])) for row in SMALL[16]["rows"]
    ]
    assert any(dag < exhaustive for dag, exhaustive in rows)


@settings(max_examples=25)
@given(chains(3, largest=10**9))
def test_sizes_far_beyond_the_tolerance_of_the_solver_still_fit_to_the_byte(chain):
    smallest = least(chain)
    dag = chain_dag(chain)
    try:
        found = milp_bound(chain, smallest, time_limit=5.0)
    except TimeoutError:  # now and then HiGHS loses its way among numbers of such sizes, and says so
        reject()
    assert simulate_dag(dag, found.plan).peak <= smallest


def test_a_plan_that_slips_over_the_budget_is_solved_again_under_a_lower_one(monkeypatch):
    exact = milp._Model.__init__

    def lax(self, dag, budget, most_seconds):
        exact(self, dag, None if budget is None else budget + 3, most_seconds)

    monkeypatch.setattr(milp._Model, "__init__", lax)
    found = solve_dag(DIAMOND, 17)
    assert (found.seconds, found.peak) == (8, 14)
    assert found.lower_bound == pytest.approx(7)


def test_a_time_limit_is_kept_and_gives_a_plan_with_its_gap_or_an_error():
    chain = Chain.from_arrays(
        [float(i % 3 + 1) for i in range(16)], [2.0] * 16, [100] * 17, [900 + 7 * i for i in range(16)]
    )
    began = time.perf_counter()
    try:
        found = milp_bound(chain, 6000, time_limit=1.0)
    except TimeoutError:
        pass  # a slow machine: no plan yet
    else:
        assert found.peak <= 6000
        assert 0 <= found.gap < 1
        assert found.lower_bound >= chain.plain_seconds * (1 - 1e-6)
    assert time.perf_counter() - began < 15


def test_no_time_at_all_is_an_error_that_carries_the_bound():
    length = 14
    chain = Chain.from_arrays([1.0] * length, [2.0] * length, [100] * (length + 1), [1000] * length)
    with pytest.raises(TimeoutError, match=r"none takes less than .* Raise time_limit"):
        milp_bound(chain, 3000, time_limit=1e-3)


def test_a_known_plan_cuts_off_slower_ones():
    assert solve_dag(DIAMOND, 14, most_seconds=8.0).seconds == 8
    with pytest.raises(ValueError, match=r"7\.5 seconds or less"):
        solve_dag(DIAMOND, 14, most_seconds=7.5)


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan, True, "10"])
def test_a_time_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match="time_limit"):
        solve_dag(DIAMOND, 14, time_limit=limit)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ([Run(1)], "reads one of the values"),
        ([Run(9)], "no such op"),
        ([Drop(3)], "is not there"),
        ([Drop(0)], "is an input"),
        ([Run(0), Run(1), Run(2)], "turn 3 is not taken"),
        ([Run(0), Run(1), Run(2), Run(3), Drop(4)], "outputs"),
        ([Run(0), Run(1), Run(2), Run(3), Run(3)], "only in its turn"),
    ],
)
def test_the_referee_refuses_what_cannot_be_carried_out(plan, why):
    with pytest.raises(ValueError, match=why):
        simulate_dag(DIAMOND, plan)


def test_the_referee_counts_a_second_copy_while_its_op_runs():
    once = simulate_dag(DIAMOND, [Run(0), Run(1), Run(2), Run(3)])
    twice = simulate_dag(DIAMOND, [Run(0), Run(1), Run(1), Run(2), Run(3)])
    assert (once.peak, twice.peak) == (18, 18)
    assert twice.seconds == once.seconds + 1
    assert simulate_dag(DIAMOND, [Run(0), Run(1), Run(2), Run(1), Run(3)]).peak == 20


def test_a_dag_is_checked_where_it_is_made():
    with pytest.raises(ValueError, match="no earlier turn"):
        Dag.plain([Op("a", 1.0, ((1,),), (0,))], [1, 1])
    with pytest.raises(ValueError, match="must be an int"):
        Dag.plain([Op("a", 1.0, (), (0,))], [-1])
    with pytest.raises(ValueError, match="not in 0"):
        Dag.plain([Op("a", 1.0, (), (5,))], [1])
    with pytest.raises(ValueError, match="finite"):
        Dag.plain([Op("a", math.nan, (), (0,))], [1])
    with pytest.raises(ValueError, match="finite"):
        Dag.plain([Op("a", "1", (), (0,))], [1])  # type: ignore[arg-type] # on purpose
    with pytest.raises(ValueError, match="of a turn must be an int"):
        Dag((Op("a", 1.0, (), (0,)),), (1,), (Turn((0,), starts=0.5),))  # type: ignore[arg-type] # on purpose
    with pytest.raises(ValueError, match="lasting names"):
        Dag((Op("a", 1.0, (), (0,)),), (1,), (Turn((0,)),), lasting=frozenset({7}))
    with pytest.raises(ValueError, match="twice, or an input"):
        Dag.plain([Op("a", 1.0, (), (0,))], [1], inputs=[0])
