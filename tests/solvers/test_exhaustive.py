"""The search over all schedules, against Dijkstra over the referee's states."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Chain, Option
from rematplan.scheduler.core.errors import InfeasibleBudget, SearchLimit
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Free, Keep, Schedule
from rematplan.scheduler.solvers import SOLVERS, exhaustive, optimal, solve_chain
from tests.shared.brute_force import fastest_of_all, persistent_schedules
from tests.shared.chains import chains
from tests.shared.helpers import oracle, oracle_chain

SMALL = oracle("small_chains.json")
# Stage 1 is kept, its input let go, and brought back by stage 0 when stage 1 is to be reversed.
DROPPED_INPUT = Chain.from_arrays([1.0, 4.0, 1.0, 1.0], [0.0] * 4, [4, 5, 2, 5, 5], [6, 2, 8, 7])


def answer(chain: Chain, budget: int, solver: str = "exhaustive") -> tuple[float, int]:
    """Seconds by the referee, or inf; and the smallest budget where nothing fits, or 0."""
    try:
        line = simulate(chain, solve_chain(chain, budget, solver))
    except InfeasibleBudget as error:
        return math.inf, error.smallest
    return line.seconds, 0


def budgets(chain: Chain) -> st.SearchStrategy[int]:
    """Budgets (bytes) from below what a persistent schedule needs to enough to keep all."""
    low, high = answer(chain, 1, "optimal")[1], answer(chain, 1, "keep_all")[1]
    return st.integers(max(low - 4, 1), max(low, high) + 1)


def search(chain: Chain, budget: int) -> float:
    """Seconds of what the search finds when no persistent schedule helps it; inf if nothing."""
    found = exhaustive._run(chain, budget, math.inf, exhaustive.STATES)
    if found is None:
        return math.inf
    line = simulate(chain, found)
    assert line.peak <= budget
    return line.seconds


@settings(max_examples=50)
@given(chains(3, options=3), st.data())
def test_three_stages_take_as_long_as_the_fastest_sequence_of_actions(chain, data):
    budget = data.draw(budgets(chain))
    truth = fastest_of_all(chain, budget, free=True)
    assert answer(chain, budget)[0] == truth
    assert search(chain, budget) == truth


@settings(max_examples=50)
@given(chains(4), st.data())
@pytest.mark.slow
def test_four_stages_take_as_long_as_the_fastest_sequence_of_actions(chain, data):
    budget = data.draw(budgets(chain))
    assert search(chain, budget) == fastest_of_all(chain, budget, free=True)


@pytest.mark.parametrize(("length", "number"), [(4, 60), (5, 12)])
@pytest.mark.slow
def test_where_inputs_of_kept_stages_go_early_the_search_is_exact_too(length, number):
    # Such chains reward letting go: little is lost to transients, gradients or what stays after a backward.
    rng = np.random.default_rng(length)
    beaten = 0
    for _ in range(number):
        boundary = rng.integers(1, 6, length + 1).tolist()
        saved = [size + int(rng.integers(0, 6)) for size in boundary[1:]]
        gradients, grad = rng.integers(0, 8, length + 1).tolist(), rng.integers(0, 3, length).tolist()
        chain = Chain.from_arrays(
            rng.integers(1, 5, length).astype(float).tolist(),
            [1.0] * length,
            boundary,
            saved,
            rng.integers(0, 4, length).tolist(),
            boundary_grad=gradients,
            grad=grad,
        )
        low, high = answer(chain, 1, "optimal")[1], answer(chain, 1, "keep_all")[1]
        budget = low + int((high - low) * rng.random())
        truth = fastest_of_all(chain, budget, free=True)
        assert search(chain, budget) == answer(chain, budget)[0] == truth
        beaten += truth < answer(chain, budget, "optimal")[0]
    assert beaten > 2


@settings(max_examples=60)
@given(chains(3))
def test_the_smallest_budget_is_the_least_peak_of_all_sequences(chain):
    seconds, smallest = answer(chain, 1)
    if smallest:
        assert fastest_of_all(chain, smallest, free=True) < math.inf
        assert smallest == 1 or fastest_of_all(chain, smallest - 1, free=True) == math.inf
    else:
        assert seconds == fastest_of_all(chain, 1, free=True)


@given(chains(8, options=3, largest=1000), st.data())
@pytest.mark.slow
def test_all_schedules_are_no_slower_than_the_persistent_ones_and_need_no_more_bytes(chain, data):
    assert answer(chain, 1)[1] <= answer(chain, 1, "optimal")[1]
    budget = data.draw(budgets(chain))
    assert answer(chain, budget)[0] <= answer(chain, budget, "optimal")[0]


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_the_oracles_exact_optimum_is_met_or_beaten_by_letting_boundaries_go(number):
    # The oracle's `exact` never lets a boundary go early; its bound lets anything go, kept stages included.
    chain = oracle_chain(SMALL[number])
    for row in SMALL[number]["rows"]:
        bound, exact = (math.inf if row[k] is None else row[k] for k in ("exact_with_free_discard", "exact"))
        assert bound <= answer(chain, row["limit"])[0] <= exact


def test_a_kept_stage_may_let_its_input_go_and_beat_every_persistent_schedule():
    schedule = solve_chain(DROPPED_INPUT, 28, "exhaustive")
    lines = [simulate(DROPPED_INPUT, other) for other in persistent_schedules(DROPPED_INPUT)]
    assert min(line.seconds for line in lines if line.peak <= 28) == 13
    assert simulate(DROPPED_INPUT, schedule).seconds == 9
    first = (Checkpoint(0), Keep(1), Checkpoint(2), Keep(3), Free(1), Backward(3), Keep(2), Backward(2))
    assert schedule == Schedule((*first, Keep(0), Backward(1), Backward(0)))


def test_a_backward_that_leaves_more_bytes_than_it_found_may_have_to_wait():
    # The gradient of x_1 takes 6 bytes, so stage 0 is kept first; x_1 is inside it, and its own copy goes.
    chain = Chain.from_arrays([1.0, 1.0], [0.0, 0.0], [1, 1, 0], [5, 1], [5, 10], boundary_grad=[0, 6, 0])
    assert solve_chain(chain, 13, "exhaustive") == Schedule(
        (Checkpoint(0), Keep(1), Keep(0), Free(1), Backward(1), Backward(0))
    )
    assert answer(chain, 12) == (math.inf, 13)
    assert fastest_of_all(chain, 12, free=True) == math.inf
    assert answer(chain, 1, "optimal")[1] > 13


def test_without_letting_go_early_no_schedule_of_that_chain_beats_the_persistent_ones():
    assert fastest_of_all(DROPPED_INPUT, 28) == 13


def test_where_no_schedule_beats_the_persistent_optimum_that_one_is_returned():
    chain = Chain.from_arrays([1.0] * 6, [1.0] * 6, [1] * 7, [3] * 6)
    assert solve_chain(chain, 100, "exhaustive") == optimal.solve(chain, 100)


def test_options_that_another_one_beats_keep_their_numbers():
    chain = Chain.from_arrays([2.0] * 3, [0.0] * 3, [1] * 4, [9] * 3)
    options = (Option(9), Option(20, 1.0), Option(2, 1.0))
    chain = Chain(tuple(dataclasses.replace(s, options=options) for s in chain.stages), 1, 1)
    smallest = answer(chain, 1)[1]
    kept = {
        action.option for action in solve_chain(chain, smallest, "exhaustive") if isinstance(action, Keep)
    }
    assert kept == {2}


def test_a_search_past_its_limit_says_so_and_what_to_do():
    with pytest.raises(SearchLimit, match=r"gave up after 3 states .* pass states="):
        solve_chain(DROPPED_INPUT, 28, "exhaustive", states=3)


@pytest.mark.parametrize("states", [0, -1, 1.5, True])
def test_a_limit_that_is_no_positive_int_is_refused(states):
    with pytest.raises((TypeError, ValueError), match="exhaustive: states="):
        solve_chain(DROPPED_INPUT, 28, "exhaustive", states=states)


def test_chains_past_the_declared_length_are_refused():
    length = SOLVERS["exhaustive"].most_stages + 1
    chain = Chain.from_arrays([1.0] * length, [1.0] * length, [1] * (length + 1), [1] * length)
    with pytest.raises(ValueError, match="takes chains of up to"):
        solve_chain(chain, 100, "exhaustive")


def test_more_options_than_a_packed_state_has_room_for_are_refused():
    options = tuple(Option(20 - k, float(k)) for k in range(20))
    stages = Chain.from_arrays([1.0] * 12, [1.0] * 12, [1] * 13, [20] * 12).stages
    chain = Chain(tuple(dataclasses.replace(s, options=options) for s in stages), 1, 1)
    with pytest.raises(ValueError, match="drop options"):
        solve_chain(chain, 100, "exhaustive")
