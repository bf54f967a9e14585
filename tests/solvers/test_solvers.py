"""Solvers: each within its budget by the referee, and as fast as it claims."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rematplan.scheduler.bounds.milp import milp_bound
from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.core.referee import Timeline, simulate
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Forward, Keep, Schedule
from rematplan.scheduler.solvers import SOLVERS, Solver, solve_chain
from rematplan.scheduler.solvers import optimal as optimal_module
from rematplan.scheduler.solvers.compare import compare
from rematplan.scheduler.solvers.frontier import pareto
from rematplan.scheduler.solvers.optimal import solve_optimal
from rematplan.scheduler.solvers.persistent import build
from rematplan.scheduler.solvers.sqrt import segment_ends
from rematplan.scheduler.solvers.two_level import solve_two_level
from tests.shared.brute_force import fastest_of_all, fastest_persistent, persistent_schedules
from tests.shared.chains import chains
from tests.shared.helpers import smallest

EVERY_SOLVER = pytest.mark.parametrize("solver", sorted(SOLVERS))
# What a solver cannot do without.
REQUIRED: dict[str, dict[str, Any]] = {
    "selective": {"keep": "[02468]$"},
    "two_level": {"host": HostMemory(20, 4.0, 2.0, 0.25)},
}


def solved(chain: Chain, budget: int, solver: str) -> Schedule:
    """``solve_chain`` with what the solver cannot do without."""
    return solve_chain(chain, budget, solver, **REQUIRED.get(solver, {}))


def judged(chain: Chain, budget: int, solver: str) -> Timeline:
    """What the referee says of ``solved``."""
    return simulate(chain, solved(chain, budget, solver), REQUIRED.get(solver, {}).get("host"))


def smallest_budget(chain: Chain, solver: str) -> int:
    """What the solver says is the smallest budget that it can meet (bytes)."""
    return smallest(chain, solver, **REQUIRED.get(solver, {}))


def seconds(chain: Chain, budget: int, solver: str = "optimal") -> float:
    """Seconds by the referee; inf if no schedule fits."""
    try:
        return judged(chain, budget, solver).seconds
    except InfeasibleBudget:
        return math.inf


def budgets(chain: Chain) -> st.SearchStrategy[int]:
    """Budgets (bytes) from just infeasible to just enough to keep all."""
    low, high = smallest_budget(chain, "optimal"), smallest_budget(chain, "keep_all")
    return st.integers(max(low - 1, 1), max(high, low) + 1)


def random_chain(length: int, options: int = 1, seed: int = 0) -> Chain:
    """Sizes without a common divisor, tens of MB to GB."""
    rng = np.random.default_rng(seed)

    def size(most: float) -> int:
        return int(rng.integers(10**7, int(most)))

    stages = []
    for i in range(length):
        forward, saved = rng.uniform(0.5, 5), size(4e9)
        shares = [1.0, *rng.uniform(0.1, 0.9, options - 1)]
        kept = tuple(
            Option(int(saved * share), forward * (1 - share), size(5e8), size(1e9), f"{share:.0%}")
            for share in shares
        )
        boundary = size(1e9)
        stages.append(
            Stage(str(i), forward, 2 * forward, boundary, kept, size(5e8), boundary, grad=size(2e8))
        )
    return Chain(tuple(stages), size(1e9), size(1e9), fixed=10**9)


# The optimum


@settings(max_examples=100)
@given(chains(4, signed=True))
def test_optimal_traces_the_frontier_of_all_persistent_schedules(chain):
    lines = (simulate(chain, schedule) for schedule in persistent_schedules(chain))
    fastest = math.inf
    for peak, time_ in sorted((line.peak, line.seconds) for line in lines):
        if time_ < fastest:  # a budget at which something faster fits, and the one just below it
            if peak > 1:
                assert seconds(chain, peak - 1) == fastest
            fastest = time_
            assert seconds(chain, max(peak, 1)) == fastest


@given(chains(4, signed=True), st.data())
def test_the_literal_recurrence_finds_the_fastest_of_all_persistent_schedules(chain, data):
    budget = data.draw(budgets(chain))
    lines = [simulate(chain, schedule) for schedule in persistent_schedules(chain)]
    fastest = min((line.seconds for line in lines if line.peak <= budget), default=math.inf)
    assert fastest_persistent(chain, budget) == fastest


@settings(max_examples=100)
@given(chains(7, options=3, signed=True), st.data())
def test_optimal_is_the_literal_recurrence(chain, data):
    budget = data.draw(budgets(chain))
    assert seconds(chain, budget) == fastest_persistent(chain, budget)


@settings(max_examples=100)
@given(chains(7, largest=1000, signed=True), st.data())
@pytest.mark.slow
def test_optimal_is_the_literal_recurrence_when_sizes_have_no_common_divisor(chain, data):
    budget = data.draw(budgets(chain))
    assert seconds(chain, budget) == fastest_persistent(chain, budget)


@st.composite
def repeating(draw, most=16):
    """Chains whose stages are drawn from a few, as the blocks of a transformer are."""
    kinds = [stage for _ in range(2) for stage in draw(chains(2, largest=3)).stages]
    # Equal stages leave equal gradients behind; what they carry may be let go by one of them only.
    kinds = [dataclasses.replace(kind, carried_change=max(kind.carried_change, 0)) for kind in kinds]
    stages = [draw(st.sampled_from(kinds)) for _ in range(draw(st.integers(9, most)))]
    return Chain(tuple(stages), draw(st.integers(0, 6)), draw(st.integers(0, 6)))


@settings(max_examples=70)
@given(repeating(), st.data())
def test_optimal_is_the_literal_recurrence_when_stages_repeat(chain, data):
    budget = data.draw(budgets(chain))
    assert seconds(chain, budget) == fastest_persistent(chain, budget)


@settings(max_examples=30)
@given(chains(17, signed=True), st.data())
def test_optimal_is_the_literal_recurrence_on_longer_chains(chain, data):
    budget = data.draw(budgets(chain))
    assert seconds(chain, budget) == fastest_persistent(chain, budget)


@contextmanager
def coarse(slots: int, window: int = 1):
    """Grids of no more than ``slots`` units, with splits at one in about ``window`` boundaries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimal_module, "TABLE_BYTES", 1)
        for name in ("MIN_SLOTS", "MAX_SLOTS", "QUICK_SLOTS"):
            patch.setattr(optimal_module, name, slots)
        if window > 1:
            patch.setattr(optimal_module, "MOST_STEPS", 1e-9)
            patch.setattr(optimal_module, "MOST_WINDOW", window)
        yield


@pytest.mark.slow
@settings(max_examples=100)
@given(chains(7, largest=1000, options=3, signed=True), st.data())
def test_on_a_grid_too_coarse_optimal_fits_and_its_bound_holds(chain, data):
    budget = data.draw(budgets(chain))
    truth = fastest_persistent(chain, budget)
    with coarse(data.draw(st.sampled_from([1, 3, 20])), data.draw(st.sampled_from([1, 2, 7]))):
        try:
            found = solve_optimal(chain, budget)
        except InfeasibleBudget:
            assert truth == math.inf
            return
    line = simulate(chain, found.schedule)
    assert line.peak <= budget
    assert line.seconds == found.seconds
    assert found.lower_bound <= truth <= found.seconds
    assert not found.exact or found.seconds == truth


def test_the_gradient_at_the_end_of_a_segment_counts_while_its_first_stage_is_kept():
    # Stages 0 and 1 are run again under the gradient of x_2, 50 bytes; the transient of keeping stage 0, 100
    # bytes, comes on top of that, although the gradient of x_1 is nothing.
    chain = Chain.from_arrays(
        [1.0, 1.0, 9.0], [1.0] * 3, [1, 1, 1, 1], [2, 3, 400], [0] * 3, [0] * 3, boundary_grad=[0, 0, 50, 0]
    )
    first = chain.stages[0]
    eager = Option(2, 0.0, forward_overhead=400)
    chain = Chain((dataclasses.replace(first, options=(eager,)), *chain.stages[1:]), 1, 0)
    again = Schedule(
        (Checkpoint(0), Forward(1), Keep(2), Backward(2), Keep(0), Keep(1), Backward(1), Backward(0))
    )
    line = simulate(chain, again)
    assert line.peak == 1 + 2 + 400 + 50
    assert seconds(chain, line.peak) == line.seconds
    assert seconds(chain, line.peak - 1) == line.seconds + 1


@given(chains(4, signed=True), st.data())
def test_no_sequence_of_actions_at_all_is_slower_than_optimal(chain, data):
    budget = data.draw(budgets(chain))
    assert fastest_of_all(chain, budget) <= seconds(chain, budget)


@given(chains(7, signed=True))
def test_a_grid_of_the_common_divisor_is_exact(chain):
    scaled = Chain.from_json(scale(chain.to_json(), 1000))
    low, high = smallest_budget(scaled, "optimal"), smallest_budget(scaled, "keep_all")
    found = solve_optimal(scaled, max((low + high) // 2, 1))
    sizes = [size for stage in scaled.stages[1:] for size in (stage.input, stage.retained)]
    sizes += [option.saved for stage in scaled.stages for option in stage.options]
    assert found.exact
    assert found.unit == (math.gcd(*sizes) or 1)


def scale(data, factor):
    """The JSON of a chain with every size multiplied."""
    if isinstance(data, dict):
        return {key: value if key == "format" else scale(value, factor) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [scale(value, factor) for value in data]
    return data * factor if type(data) is int else data


def test_seconds_never_rise_with_the_budget():
    chain = random_chain(12, options=3)
    low, high = smallest_budget(chain, "optimal"), smallest_budget(chain, "keep_all")
    times = [seconds(chain, low + (high - low) * i // 20) for i in range(21)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(chain.plain_seconds)


# Every solver


@EVERY_SOLVER
@given(chain=chains(7), data=st.data())
def test_every_solver_keeps_to_the_budget_and_its_smallest_budget_is_tight(solver, chain, data):
    least = smallest_budget(chain, solver)
    budget = least + data.draw(st.integers(0, 100))
    assert judged(chain, max(budget, 1), solver).peak <= budget
    assert judged(chain, max(least, 1), solver).peak == least
    if least > 1:
        with pytest.raises(InfeasibleBudget) as caught:
            solved(chain, least - 1, solver)
        assert caught.value.smallest == least
        assert caught.value.solver == solver


@EVERY_SOLVER
@given(chain=chains(6), data=st.data())
@pytest.mark.slow
def test_no_solver_beats_one_that_claims_to_be_exact(solver, chain, data):
    budget = data.draw(budgets(chain))
    exact = [other for other in SOLVERS.values() if other.exact and not other.required]
    if SOLVERS[solver].exact_in == "all schedules":  # the others are exact in a narrower class
        exact = [other for other in exact if other.exact_in == "all schedules"]
    if SOLVERS[solver].two_level:  # the others are exact with one memory
        exact = []
    assert all(seconds(chain, budget, other.name) <= seconds(chain, budget, solver) for other in exact)


@EVERY_SOLVER
def test_every_solver_handles_a_chain_of_one_stage(solver):
    chain = Chain.from_arrays([1.0], [2.0], [3, 4], [5], [6], [7])
    schedule = solved(chain, smallest_budget(chain, solver), solver)
    assert schedule == Schedule((Keep(0), Backward(0)))


@EVERY_SOLVER
def test_every_solver_handles_stages_without_any_size(solver):
    chain = Chain.from_arrays([1.0] * 4, [1.0] * 4, [0] * 5, [0] * 4)
    assert judged(chain, 1, solver).peak == 0


@EVERY_SOLVER
@pytest.mark.parametrize("once", [0, 3, 6])
def test_a_stage_that_may_run_only_once_runs_once(solver, once):
    stages = list(Chain.from_arrays([1.0] * 7, [1.0] * 7, [4] * 8, [9] * 7).stages)
    stages[once] = Stage("once", 1.0, 1.0, 4, (Option(9),), input_grad=4, recomputable=False)
    chain = Chain(tuple(stages), 4, 4)
    assert judged(chain, smallest_budget(chain, solver), solver).runs[once] == 1


def test_optimal_handles_chains_deeper_than_the_recursion_limit():
    length = sys.getrecursionlimit() + 100
    actions = build(length, lambda s, t: (0, 0) if s == t else (-1, t))
    assert len(actions) == length * (length - 1) // 2 + 2 * length


# Each heuristic is its paper's schedule


def test_keep_all_runs_every_stage_once():
    chain = Chain.from_arrays([1.0] * 3, [2.0] * 3, [1] * 4, [5] * 3)
    expected = Schedule((Keep(0), Keep(1), Keep(2), Backward(2), Backward(1), Backward(0)))
    assert solve_chain(chain, 1000, "keep_all") == expected


def test_sqrt_keeps_the_last_segment_and_runs_the_others_again():
    chain = Chain.from_arrays([1.0] * 4, [2.0] * 4, [1] * 5, [5] * 4)
    first = (Checkpoint(0), Forward(1), Keep(2), Keep(3), Backward(3), Backward(2))
    again = (Keep(0), Keep(1), Backward(1), Backward(0))
    assert solve_chain(chain, 1000, "sqrt") == Schedule(first + again)


@pytest.mark.parametrize(("length", "segments"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4), (100, 10)])
def test_sqrt_cuts_n_stages_into_the_root_of_n_nearly_equal_segments(length, segments):
    chain = Chain.from_arrays([1.0] * length, [1.0] * length, [1] * (length + 1), [1] * length)
    ends = segment_ends(chain)
    sizes = [ends.count(end) for end in sorted(set(ends))]
    assert len(sizes) == segments
    assert sum(sizes) == length
    assert max(sizes) - min(sizes) <= 1


def test_revolve_uses_as_many_slots_as_fit():
    chain = Chain.from_arrays([1.0] * 6, [1.0] * 6, [10] * 7, [10] * 6)

    def runs(budget: int) -> int:
        return sum(simulate(chain, solve_chain(chain, budget, "revolve")).runs)

    assert runs(1000) == 6 + 5  # every boundary held: each stage but the last runs twice
    assert runs(smallest_budget(chain, "revolve")) == 6 + 5 * 6 // 2  # only x_0 held


# The entry


# Whatever takes a chain and a budget.
ENTRIES: dict[str, Callable[[Any, Any], Any]] = {
    "solve_chain": solve_chain,
    "compare": lambda chain, budget: compare(chain, [budget]),
    "solve_optimal": solve_optimal,
    "solve_two_level": lambda chain, budget: solve_two_level(chain, budget, REQUIRED["two_level"]["host"]),
    "Frontier.within": lambda chain, budget: pareto(chain).within(budget),
    "milp_bound": milp_bound,
}
EVERY_ENTRY = pytest.mark.parametrize("entry", ENTRIES)


@EVERY_ENTRY
@pytest.mark.parametrize("budget", [True, 1.0, float("nan"), "6GiB", None])
@pytest.mark.slow
def test_a_budget_that_is_no_int_is_a_type_error(entry, budget):
    with pytest.raises(TypeError, match=f"{entry}: memory_budget="):
        ENTRIES[entry](random_chain(2), budget)


@EVERY_ENTRY
@pytest.mark.parametrize("budget", [0, -1, 2**63])
def test_a_budget_out_of_range_is_a_value_error(entry, budget):
    with pytest.raises(ValueError, match=f"{entry}: memory_budget={budget} must be in"):
        ENTRIES[entry](random_chain(2), budget)


@EVERY_ENTRY
@pytest.mark.parametrize("chain", [None, "chain", [1.0, 2.0]])
def test_what_is_no_chain_is_a_type_error(entry, chain):
    with pytest.raises(TypeError, match="must be a Chain"):
        ENTRIES[entry](chain, 100)


def test_an_unknown_solver_is_a_value_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="optimal, revolve, sqrt, keep_all"):
        solve_chain(random_chain(2), 2**40, "rockmate")


def test_the_largest_budget_and_numpy_integers_are_accepted():
    chain = random_chain(3)
    assert solve_chain(chain, 2**63 - 1) == solve_chain(chain, np.int64(2**62))  # type: ignore[call-overload] # on purpose


def test_sizes_that_would_overflow_are_refused():
    chain = Chain.from_arrays([1.0], [1.0], [2**61, 2**61], [0])
    with pytest.raises(ValueError, match=r"below 2\*\*62"):
        solve_chain(chain, 2**62)


def test_seconds_that_would_overflow_are_refused():
    chain = Chain.from_arrays([1e308] * 2, [1e308] * 2, [1, 1, 1], [1, 1])
    for solver in set(SOLVERS) - {"keep_all", "sqrt"}:  # these two leave it to the referee
        if solver != "two_level":  # where the plain step fits, it returns that
            with pytest.raises(ValueError, match="times its stages they must stay below"):
                solved(chain, 2**40, solver)


def test_a_chain_too_long_is_refused_at_once():
    most = SOLVERS["optimal"].most_stages
    count = most + 1
    chain = Chain.from_arrays([1.0] * count, [1.0] * count, [1] * (count + 1), [1] * count)
    with pytest.raises(ValueError, match=f"up to {most} stages, got {most + 1}; choose another solver"):
        solve_chain(chain, 2**40)
    assert len(solve_chain(chain, 2**40, "chen")) > most


@pytest.mark.slow
def test_a_thousand_equal_stages_are_solved_in_seconds():
    """A recurrent network unrolled: a chain too long for tables of all segments, were they not all alike."""
    chain = Chain.from_arrays([1.0] * 1000, [2.0] * 1000, [3] * 1001, [40] * 1000)
    start = time.process_time()
    found = solve_optimal(chain, 2500)
    assert time.process_time() - start < 60  # about 1 on one idle core
    assert simulate(chain, found.schedule).peak <= 2500
    assert found.seconds < 1.5 * chain.plain_seconds


def test_a_schedule_over_the_budget_is_an_internal_error(monkeypatch):
    wrong = Solver("wrong", lambda chain, _: solve_chain(chain, 2**62, "keep_all"), "ignores the budget")
    monkeypatch.setattr("rematplan.scheduler.solvers.SOLVERS", {**SOLVERS, "wrong": wrong})
    with pytest.raises(RuntimeError, match="internal: solver 'wrong'"):
        solve_chain(random_chain(2), 1, "wrong")


def test_the_registry_is_keyed_by_name():
    assert all(name == solver.name and solver.summary for name, solver in SOLVERS.items())


def test_solvers_work_where_torch_is_absent():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from rematplan.scheduler.core.chain import Chain\nfrom rematplan.scheduler.solvers import SOLVERS, solve_chain\n"
        "chain = Chain.from_arrays([1.0] * 3, [1.0] * 3, [1] * 4, [5] * 3)\n"
        "print(*(len(solve_chain(chain, 100, name)) for name, solver in SOLVERS.items() if not solver.required))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[:4] == ["6", "8", "7", "6"]


# Speed


@pytest.mark.parametrize("options", [1, 4])
@pytest.mark.slow
def test_two_hundred_unlike_stages_are_solved_in_seconds_and_within_two_percent(options):
    chain = random_chain(200, options)
    low, high = smallest_budget(chain, "optimal"), smallest_budget(chain, "keep_all")
    start = time.process_time()
    found = solve_optimal(chain, low + (high - low) // 3)
    assert time.process_time() - start < 15  # about 2 on one idle core
    assert found.seconds <= 1.02 * found.lower_bound
