"""Solvers and definitions against answers computed elsewhere: ``tests/oracles``."""

from __future__ import annotations

import math

import pytest

from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import optimal, solve_chain
from rematplan.scheduler.solvers.optimal import solve_optimal
from tests.shared.brute_force import fastest_of_all, fastest_persistent
from tests.shared.helpers import oracle, oracle_chain, schedule_with_slots

SMALL = oracle("small_chains.json")
TABLES = oracle("revolve.json")["tables"]
UNIFORM = [(tuple(map(int, key.split(","))), key) for key in TABLES["revolve_adv"]]
FULL = 10**6  # bytes; what one stage at work takes in the chains below


def seconds(chain: Chain, budget: int) -> float:
    """Seconds of ``optimal`` by the referee; inf if nothing fits."""
    try:
        return simulate(chain, solve_chain(chain, budget)).seconds
    except InfeasibleBudget:
        return math.inf


def expected(row: dict, key: str) -> float:
    return math.inf if row[key] is None else row[key]


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_optimal_lies_between_the_exact_optimum_and_the_persistent_one(number):
    chain = oracle_chain(SMALL[number])
    for row in SMALL[number]["rows"]:
        ours = seconds(chain, row["limit"])
        assert expected(row, "exact") <= ours <= expected(row, "persistent")


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_the_literal_definitions_agree_with_the_oracle(number):
    chain = oracle_chain(SMALL[number])
    for row in SMALL[number]["rows"]:
        assert fastest_persistent(chain, row["limit"]) == expected(row, "persistent")
        assert fastest_of_all(chain, row["limit"]) == expected(row, "exact")


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_keeping_all_needs_what_the_oracle_says(number):
    chain = oracle_chain(SMALL[number])
    with pytest.raises(InfeasibleBudget) as caught:
        solve_chain(chain, 1, "keep_all")
    assert caught.value.smallest == SMALL[number]["peak_store_all"]


@pytest.mark.parametrize("length", [10, 20, 50])
def test_optimal_loses_nothing_to_rounding_on_large_chains(length):
    data = oracle(f"hetero_L{length}.json")
    chain = oracle_chain(data["chain"])
    for row in data["rows"]:
        found = solve_optimal(chain, row["limit"])
        assert found.exact
        assert simulate(chain, found.schedule).peak <= row["limit"]
        assert found.seconds <= row["persistent"] + 1e-9


@pytest.mark.parametrize("slots", [50, 150, 400])
def test_on_grids_too_coarse_the_bound_stays_below_the_optimum_and_the_schedule_close(slots, monkeypatch):
    data = oracle("hetero_L20.json")
    chain = oracle_chain(data["chain"])
    truth = [solve_optimal(chain, row["limit"]) for row in data["rows"]]
    monkeypatch.setattr(optimal, "TABLE_BYTES", 1)
    for name in ("MIN_SLOTS", "MAX_SLOTS", "QUICK_SLOTS"):
        monkeypatch.setattr(optimal, name, slots)
    for row, best in zip(data["rows"], truth, strict=True):
        found = solve_optimal(chain, row["limit"])
        assert found.unit > best.unit
        assert simulate(chain, found.schedule).peak <= row["limit"]
        assert found.lower_bound <= best.seconds * (1 + 1e-9)
        assert best.seconds * (1 - 1e-9) <= found.seconds <= best.seconds * 1.1


@pytest.mark.parametrize("length", [10, 20, 50])
def test_the_referee_prices_the_plain_step_as_the_oracle_does(length):
    data = oracle(f"hetero_L{length}.json")
    chain = oracle_chain(data["chain"])
    line = simulate(chain, solve_chain(chain, 2**62, "keep_all"))
    assert line.peak == data["reference"]["peak_store_all"]
    assert line.seconds == pytest.approx(data["reference"]["time_no_recompute"])


@pytest.mark.parametrize(("numbers", "key"), UNIFORM)
def test_revolve_runs_stages_as_often_as_the_binomial_formula(numbers, key):
    length, slots = numbers
    chain = Chain.from_arrays([1.0] * length, [0.0] * length, [1] * (length + 1), [1] * length)
    runs = sum(simulate(chain, schedule_with_slots(chain, slots)).runs)
    assert runs == TABLES["revolve_total"][key]
    assert runs - length == TABLES["revolve_adv"][key]


def slotted(forward: list[float], boundary: list[int], saved: list[int]) -> Chain:
    """A chain at ``boundary[i]`` bytes a held boundary, whose work never takes more than FULL bytes.

    Transients fill every forward up to FULL above what is held. A stage saves ``saved[i]`` bytes; kept, it
    fits iff all that is held besides its input does.
    """
    stages = [
        Stage(
            str(i),
            forward=forward[i],
            backward=0.0,
            input=boundary[i],
            options=(Option(saved[i], 0.0, FULL - boundary[i] - saved[i], FULL - boundary[i] - saved[i]),),
            forward_overhead=FULL - boundary[i] - (boundary[i + 1] if i + 1 < len(boundary) else 0),
        )
        for i in range(len(forward))
    ]
    return Chain(tuple(stages), output=0, output_grad=0)


@pytest.mark.parametrize("case", oracle("checkpoint_only_chains.json")["cases"])
def test_optimal_is_optimal_where_only_boundaries_are_held(case):
    # Saved tensors of nearly FULL bytes: no two stages can be kept at once.
    chain = slotted(case["u"], case["w"], [FULL - size for size in case["w"]])
    advances = seconds(chain, case["W"] + FULL) - sum(case["u"])
    assert advances == case["dp_persistent"]
    assert advances >= case["adv_opt"]


@pytest.mark.parametrize(("numbers", "key"), [item for item in UNIFORM if item[0][0] <= 100])
def test_on_uniform_chains_that_hold_only_boundaries_optimal_equals_revolve(numbers, key):
    length, slots = numbers
    chain = slotted([1.0] * length, [1] * length, [FULL - 1] * length)
    assert seconds(chain, slots + FULL) == TABLES["revolve_total"][key]


@pytest.mark.parametrize(("numbers", "key"), [item for item in UNIFORM if item[0][0] <= 100])
def test_where_a_slot_holds_a_boundary_or_a_kept_stage_optimal_meets_the_mixed_optimum(numbers, key):
    length, slots = numbers
    chain = slotted([1.0] * length, [1] * length, [1] * length)
    assert seconds(chain, slots + FULL) == TABLES["mixed_total"][key]
