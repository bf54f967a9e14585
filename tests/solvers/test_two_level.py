"""The second memory: what the referee charges for copies, and the solvers that plan them."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.core.program import ReplayProgram
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import (
    COPY_ACTIONS,
    Action,
    Backward,
    Checkpoint,
    Forward,
    Free,
    FreeHost,
    FreeSaved,
    IllegalAction,
    Keep,
    Offload,
    OffloadSaved,
    Prefetch,
    PrefetchSaved,
    Schedule,
)
from rematplan.scheduler.solvers import solve_chain, two_level, two_level_tables
from rematplan.scheduler.solvers.optimal import solve_optimal
from rematplan.scheduler.solvers.two_level import solve_two_level
from tests.shared.brute_force_host import (
    every_action,
    fastest_of_all_with_host,
    host_replay,
    legal_walk,
    overlapped_seconds,
    two_level_schedules,
)
from tests.shared.chains import chains
from tests.shared.helpers import smallest

# x_0..x_3 are 1, 2, 4, 8 bytes; stages save 16, 32, 64; no gradients.
THREE = Chain.from_arrays([1.0] * 3, [10.0] * 3, [1, 2, 4, 8], [16, 32, 64], boundary_grad=[0] * 4)
SLOW = HostMemory(capacity=100, write_bandwidth=2.0, read_bandwidth=4.0, latency=0.5)
BESIDE = HostMemory(capacity=100, write_bandwidth=2.0, read_bandwidth=4.0, latency=0.5, asynchronous=True)
PLAIN = 33.0  # seconds of the plain step
TURN: list[Action] = [Backward(2), Backward(1)]


@st.composite
def hosts(draw: st.DrawFn, asynchronous: bool = False) -> HostMemory:
    """Hosts from hopeless to generous; seconds that add up exactly."""
    speeds = st.sampled_from([0.5, 1.0, 4.0, math.inf])
    latency = draw(st.sampled_from([0.0, 0.25]))
    return HostMemory(draw(st.integers(0, 40)), draw(speeds), draw(speeds), latency, asynchronous)


def bounds(chain: Chain, host: HostMemory) -> tuple[int, int]:
    """The smallest device budget with ``host``, and one that keeps all (bytes)."""
    low = max(smallest(chain, "two_level", host=host), 1)
    return low, max(smallest(chain, "keep_all"), low)


# The referee


def test_offloaded_saved_tensors_cost_their_copies_and_leave_the_boundary_behind():
    actions: list[Action] = [Keep(0), OffloadSaved(0), FreeSaved(0), Keep(1), Keep(2)]
    actions += [Backward(2), PrefetchSaved(0), *TURN[1:], Backward(0)]
    line = simulate(THREE, actions, SLOW)
    assert line.live == (17, 17, 1 + 2, 35, 99, 35, 51, 17, 0)
    assert line.seconds == PLAIN + (0.5 + 16 / 2) + (0.5 + 16 / 4)
    assert (line.stall, line.host_peak) == (13.0, 16)


def test_an_offloaded_boundary_costs_its_copies_and_its_device_bytes_go_with_free():
    actions = [Keep(0), Offload(0), Free(0), Keep(1), Keep(2), *TURN, Prefetch(0), Backward(0)]
    line = simulate(THREE, actions, SLOW)
    assert line.live == (17, 17, 16, 48, 112, 48, 16, 17, 0)
    assert line.seconds == PLAIN + (0.5 + 1 / 2) + (0.5 + 1 / 4)
    assert line.host_peak == 1


def test_a_boundary_comes_back_out_of_the_saved_tensors_that_it_lies_in():
    actions: list[Action] = [Keep(0), OffloadSaved(0), FreeSaved(0), Keep(1), Free(1), Keep(2), Backward(2)]
    line = simulate(THREE, [*actions, Prefetch(1), Backward(1), PrefetchSaved(0), Backward(0)], SLOW)
    assert line.live[4:9] == (33, 97, 33, 35, 1)
    assert line.seconds == PLAIN + (0.5 + 16 / 2) + (0.5 + 2 / 4) + (0.5 + 16 / 4)
    early = simulate(THREE, [*actions, PrefetchSaved(0), Backward(1), Backward(0)], SLOW)
    assert early.seconds == line.seconds - (0.5 + 2 / 4)


def test_asynchronous_copies_cost_what_compute_waits_for_them():
    out: list[Action] = [Keep(0), OffloadSaved(0), Keep(1), Keep(2)]
    back: list[Action] = [PrefetchSaved(0), Backward(1), Backward(0)]
    # The write runs from 1 to 9.5 beside two forwards; freed at once after them, it is waited for.
    line = simulate(THREE, [*out, FreeSaved(0), Backward(2), *back], BESIDE)
    assert line.seconds == PLAIN + 6.5
    assert line.stall == 6.5
    # Freed after the backward it costs nothing; the read of 4.5 seconds is beside a backward of 10.
    line = simulate(THREE, [*out, Backward(2), FreeSaved(0), *back], BESIDE)
    assert line.seconds == PLAIN
    # A read just before its use is waited for.
    line = simulate(THREE, [*out, Backward(2), FreeSaved(0), Free(1), *back], BESIDE)
    assert line.seconds == PLAIN + 4.5


def test_each_channel_serves_its_copies_in_order_and_both_at_once():
    one = HostMemory(100, 1.0, 1.0, asynchronous=True)
    # Writes: x_0 from 1 to 2, saved_0 (16) to 18. The free of saved_0 waits for both; its read, from 30 to
    # 46, has the backward of stage 1 beside it.
    actions: list[Action] = [
        Keep(0),
        Offload(0),
        OffloadSaved(0),
        FreeSaved(0),
        Keep(1),
        Keep(2),
        Backward(2),
    ]
    line = simulate(THREE, [*actions, PrefetchSaved(0), Backward(1), Backward(0)], one)
    assert line.stall == (18 - 1) + (46 - 40)
    # A read is served while a write of something else is under way.
    actions = [
        Keep(0),
        Offload(0),
        Free(0),
        OffloadSaved(0),
        Prefetch(0),
        Keep(1),
        Keep(2),
        *TURN,
        Backward(0),
    ]
    assert simulate(THREE, actions, one).stall == 1  # the write of x_0, before it is freed
    # What is on its way to the device is written when it has arrived: x_1 comes from 19 to 21, and goes until
    # 23.
    there: list[Action] = [Keep(0), Keep(1), OffloadSaved(0), FreeSaved(0), Free(1), Keep(2)]
    back: list[Action] = [Prefetch(1), Offload(1), FreeHost(1), *TURN, PrefetchSaved(0), Backward(0)]
    assert simulate(THREE, [*there, *back], one).stall == (18 - 2) + (23 - 19) + 16


@pytest.mark.parametrize(
    ("actions", "why"),
    [
        ([Offload(1)], "x_1 is not held"),
        ([Offload(0), Offload(0)], "x_0 is on the host already"),
        ([OffloadSaved(0)], "the saved tensors of stage 0 are not on the device"),
        ([Keep(0), OffloadSaved(0), OffloadSaved(0)], "stage 0 are on the host already"),
        ([Keep(0), Keep(1), Keep(2), OffloadSaved(2), OffloadSaved(1), OffloadSaved(0)], "has 4 bytes left"),
        ([Prefetch(0)], "x_0 is on the device already"),
        ([Keep(0), Prefetch(1)], "x_1 is on the device already"),
        ([Forward(0), Prefetch(1)], "x_1 is on the device already"),
        ([Prefetch(2)], "x_2 is not on the host"),
        ([Prefetch(-1)], "x_-1 is not on the host"),
        ([FreeHost(0)], "x_0 is not on the host"),
        ([Offload(0), FreeHost(0), Free(0), Prefetch(0)], "x_0 is not on the host"),
        ([Keep(0), OffloadSaved(0), PrefetchSaved(0)], "stage 0 are not on the host alone"),
        ([Keep(0), FreeSaved(0)], r"not both on the device and on the host; OffloadSaved\(0\) first"),
        ([Keep(0), OffloadSaved(0), FreeSaved(0), Keep(0)], "stage 0 is kept already"),
        ([Keep(0), OffloadSaved(0), FreeSaved(0), Keep(1), Keep(2), *TURN, Backward(0)], "PrefetchSaved"),
        ([Offload(0), Free(0), Keep(0)], "x_0 is not there"),
    ],
)
def test_an_illegal_copy_is_refused_with_its_reason(actions, why):
    with pytest.raises(IllegalAction, match=why) as caught:
        simulate(THREE, actions, SLOW)
    assert caught.value.index == len(actions) - 1


@pytest.mark.parametrize("kind", COPY_ACTIONS)
def test_a_schedule_with_copies_needs_a_host(kind):
    with pytest.raises(ValueError, match="pass host=HostMemory"):
        simulate(THREE, [kind(0)])
    schedule = Schedule((Keep(0), Keep(1), Keep(2), kind(0), Backward(2), Backward(1), Backward(0)))
    assert ReplayProgram.from_schedule(schedule, 3).copies
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity", 1.0),
        ("capacity", True),
        ("capacity", -1),
        ("write_bandwidth", 0.0),
        ("write_bandwidth", "fast"),
        ("read_bandwidth", -1.0),
        ("read_bandwidth", math.nan),
        ("latency", math.inf),
        ("latency", -1.0),
        ("latency", math.nan),
        ("asynchronous", 1),
    ],
)
def test_a_host_that_makes_no_sense_is_a_value_error(field, value):
    given_: dict[str, Any] = {"capacity": 1, "write_bandwidth": 1.0, "read_bandwidth": 1.0, field: value}
    with pytest.raises(ValueError, match=field):
        HostMemory(**given_)


def changed(chain: Chain, actions: tuple[Action, ...], data: st.DataObject) -> tuple[Action, ...]:
    """``actions`` with up to two put in or left out."""
    some = list(actions)
    for _ in range(data.draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = data.draw(st.integers(0, len(some) - 1))
        if data.draw(st.integers(0, 3)):
            some.insert(at, data.draw(st.sampled_from(every_action(chain))))
        elif len(some) > 1:
            del some[at]
    return tuple(some)


@settings(max_examples=100)
@given(chains(4), hosts(), st.integers(0, 2**32), st.data())
def test_the_referee_is_the_literal_definition_of_synchronous_copies(chain, host, seed, data):
    actions = changed(chain, legal_walk(chain, host, seed), data)
    literal = host_replay(chain, host, Schedule(actions))
    try:
        line = simulate(chain, actions, host)
    except IllegalAction:
        assert literal is None
    else:
        assert literal == (line.seconds, line.during, line.live, line.host_peak)
        assert line.seconds == pytest.approx(simulate_compute(chain, actions) + line.stall)


def simulate_compute(chain: Chain, actions: tuple[Action, ...]) -> float:
    """Seconds of the forwards and backwards alone."""
    total = 0.0
    options: dict[int, int] = {}
    for action in actions:
        if isinstance(action, Keep):
            options[action.stage] = action.option
        if isinstance(action, (Forward, Checkpoint, Keep)):
            total += chain.stages[action.stage].forward
        elif isinstance(action, Backward):
            stage = chain.stages[action.stage]
            total += stage.backward + stage.options[options[action.stage]].recompute
    return total


@settings(max_examples=250)
@given(chains(4), hosts(asynchronous=True), st.integers(0, 2**32))
@pytest.mark.slow
def test_asynchronous_seconds_are_those_of_the_literal_definition(chain, host, seed):
    actions = legal_walk(chain, host, seed)
    line = simulate(chain, actions, host)
    assert line.seconds == overlapped_seconds(chain, host, Schedule(actions))
    assert line.seconds == pytest.approx(simulate_compute(chain, actions) + line.stall)


# Two levels


def one_level(chain: Chain, budget: int) -> float:
    """Seconds of ``optimal``; inf if nothing fits."""
    try:
        return solve_optimal(chain, budget).seconds
    except InfeasibleBudget:
        return math.inf


@settings(max_examples=50)
@given(chains(4), hosts())
@pytest.mark.slow
def test_two_level_traces_the_frontier_of_every_schedule_of_its_class(chain, host):
    assume(len(chain) < 4 or max(len(stage.options) for stage in chain.stages) == 1)
    # With room on the host all of them are legal.
    endless = dataclasses.replace(host, capacity=10**6)
    everything = [simulate(chain, schedule, endless) for schedule in two_level_schedules(chain)]
    lines = [line for line in everything if line.host_peak <= host.capacity]
    fastest = math.inf
    for peak, seconds in sorted({(line.peak, line.seconds) for line in lines}):
        if seconds < fastest - 1e-9:  # a budget at which something faster fits, and the one just below it
            if fastest == math.inf and peak > 1:
                with pytest.raises(InfeasibleBudget) as caught:
                    solve_two_level(chain, peak - 1, host)
                assert caught.value.smallest == peak
            elif peak > 1:
                assert solve_two_level(chain, peak - 1, host).seconds == pytest.approx(fastest)
            fastest = seconds
            found = solve_two_level(chain, max(peak, 1), host)
            assert found.seconds == pytest.approx(fastest)
            assert found.exact


def test_a_boundary_inside_offloaded_saved_tensors_is_read_alone_and_takes_no_host_bytes_of_its_own():
    # x_1 has to go while stage 2 is kept, and saved_0, 12 bytes, is too large to come back for the backward
    # of 1.
    overheads = [0, 16, 0]
    chain = Chain.from_arrays(
        [100.0, 100.0, 1.0], [1.0] * 3, [1, 4, 1, 1], [12, 20, 24], None, overheads, boundary_grad=[0] * 4
    )
    found = solve_two_level(chain, 45, HostMemory(12, 1.0, 1.0))
    assert found.exact
    assert found.seconds == chain.plain_seconds + 12 + 4 + 12
    assert Prefetch(1) in found.schedule.actions
    assert Offload(1) not in found.schedule.actions


@settings(max_examples=30)
@given(chains(2), hosts(), st.data())
def test_no_sequence_of_actions_at_all_is_slower_than_two_level(chain, host, data):
    budget = data.draw(st.integers(*bounds(chain, host)))
    assert (
        fastest_of_all_with_host(chain, budget, host) <= solve_two_level(chain, budget, host).seconds + 1e-9
    )


@given(chains(6, options=3), hosts(asynchronous=True), st.data())
def test_asynchronous_plans_keep_both_budgets_and_lie_between_the_bound_and_one_level(chain, host, data):
    low, high = bounds(chain, host)
    budget = data.draw(st.integers(low, high))
    found = solve_two_level(chain, budget, host)
    line = simulate(chain, found.schedule, host)
    assert line.peak <= budget
    assert line.host_peak <= host.capacity
    assert line.seconds == found.seconds
    assert found.lower_bound <= found.seconds + 1e-9
    assert found.seconds <= one_level(chain, budget)


@settings(max_examples=70)
@given(chains(6), hosts(), st.data())
def test_frees_made_later_and_prefetches_made_earlier_keep_the_budget_and_cost_nothing(chain, host, data):
    budget = data.draw(st.integers(*bounds(chain, host)))
    schedule = solve_two_level(chain, budget, host).schedule
    beside = dataclasses.replace(host, asynchronous=True)
    later = two_level._later_frees(schedule, simulate(chain, schedule, beside), budget)
    earlier = two_level._earlier_prefetches(later, simulate(chain, later, beside), budget)
    lines = [simulate(chain, actions, beside) for actions in (schedule, later, earlier)]
    assert max(line.peak for line in lines) <= budget
    assert lines[1].seconds <= lines[0].seconds + 1e-9


@given(chains(7, options=3), st.data())
def test_with_a_host_without_room_two_level_is_optimal(chain, data):
    nothing = HostMemory(0, 1.0, 1.0, latency=1.0)
    low, high = bounds(chain, nothing)
    budget = data.draw(st.integers(low, high))
    assert solve_two_level(chain, budget, nothing).seconds == pytest.approx(
        solve_optimal(chain, budget).seconds
    )


@given(chains(6, options=2, largest=1000), st.integers(0, 4000), st.booleans(), st.data())
@pytest.mark.slow
def test_on_grids_too_coarse_two_level_fits_and_its_bound_holds(chain, capacity, asynchronous, data):
    host = HostMemory(capacity, 500.0, 250.0, 0.0, asynchronous)
    low, high = bounds(chain, host)
    budget = data.draw(st.integers(low, high))
    truth = solve_two_level(chain, budget, host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_level, "TABLE_BYTES", data.draw(st.sampled_from([1, 10**4, 10**5])))
        patch.setattr(two_level, "HOST_SLOTS", data.draw(st.sampled_from([1, 5, 20])))
        patch.setattr(two_level_tables, "MOST_POINTS", data.draw(st.sampled_from([1, 3])))
        try:
            found = solve_two_level(chain, budget, host)
        except InfeasibleBudget:  # a frontier was thinned
            return
    line = simulate(chain, found.schedule, host)
    assert line.peak <= budget
    assert line.host_peak <= capacity
    assert found.lower_bound <= truth.seconds + 1e-9
    assert not truth.exact or asynchronous or truth.seconds <= found.seconds + 1e-9


def alike(length: int) -> Chain:
    """Blocks as of a transformer: 30 ms forward, 12 times as many bytes saved as cross a boundary."""
    mega = 2**20
    return Chain.from_arrays(
        [0.03] * length,
        [0.06] * length,
        [64 * mega] * (length + 1),
        [768 * mega] * length,
        [32 * mega] * length,
    )


def test_with_a_fast_host_two_level_beats_one_level_and_reaches_smaller_budgets():
    chain = alike(48)
    host = HostMemory(2**37, 25e9, 25e9)
    beside = HostMemory(2**37, 25e9, 25e9, asynchronous=True)
    with pytest.raises(InfeasibleBudget) as one:
        solve_optimal(chain, 1)
    with pytest.raises(InfeasibleBudget) as two:
        solve_two_level(chain, 1, host)
    assert two.value.smallest < one.value.smallest
    for budget in (one.value.smallest, 2 * 2**30, 8 * 2**30):  # keeping all takes 36 GiB
        alone = solve_optimal(chain, budget).seconds / chain.plain_seconds - 1
        stopping = solve_two_level(chain, budget, host).seconds / chain.plain_seconds - 1
        overlapping = solve_two_level(chain, budget, beside).seconds / chain.plain_seconds - 1
        assert alone > 0.25
        assert stopping < 0.75 * alone or stopping == pytest.approx(
            alone
        )  # at 8 GiB running again is cheaper
        assert overlapping < 0.4 * alone


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.slow
def test_fifty_unlike_stages_and_a_host_that_binds_are_solved_in_seconds(asynchronous):
    rng = np.random.default_rng(0)
    stages = []
    for i in range(50):
        forward, boundary, saved = (
            rng.uniform(0.5, 5),
            int(rng.integers(10**7, 10**9)),
            int(rng.integers(10**9, 4 * 10**9)),
        )
        stages.append(Stage(str(i), forward, 2 * forward, boundary, (Option(saved),), input_grad=boundary))
    chain = Chain(tuple(stages), 10**8, 10**8)
    host = HostMemory(24 * 10**9, 5e9, 5e9, 1e-4, asynchronous)
    start = time.process_time()
    found = solve_two_level(chain, 30 * 10**9, host)
    assert time.process_time() - start < 40  # about 2 on one idle core
    assert found.seconds <= solve_optimal(chain, 30 * 10**9).seconds
    assert found.seconds <= (1.04 if asynchronous else 1.015) * found.lower_bound


def test_what_two_level_cannot_take_is_refused():
    with pytest.raises(TypeError, match="must be a HostMemory"):
        solve_two_level(THREE, 100, 2**30)  # type: ignore[arg-type] # on purpose
    huge = Chain.from_arrays([1.0], [1.0], [2**61, 2**61], [0])
    with pytest.raises(ValueError, match=r"below 2\*\*62"):
        solve_two_level(huge, 2**61, SLOW)
    for slow in (
        HostMemory(100, 1e-300, 1.0),
        HostMemory(100, 1.0, 5e-324),
        HostMemory(100, 1.0, 1.0, 1e300),
    ):
        with pytest.raises(ValueError, match="more seconds than can be added up"):
            solve_two_level(THREE, 40, slow)
    with pytest.raises(TypeError, match="needs the parameter 'host'"):
        solve_chain(THREE, 100, "two_level")
    assert simulate(THREE, solve_chain(THREE, 100, "two_level", host=SLOW), SLOW).peak <= 100
