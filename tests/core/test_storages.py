"""The referee's account by storage: against a literal definition, golden cases, and the chain's sums."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Carried, Chain, Option, Stage
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Keep, Schedule
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.solvers import solve_chain
from rematplan.scheduler.solvers.frontier import pareto
from rematplan.scheduler.solvers.optimal import solve_optimal
from tests.shared.brute_force import persistent_schedules
from tests.shared.steps import each_model, plan_for

# Stage 0 makes a (10); stage 1 makes b (20) of it and saves nothing; stage 2 makes c (4) of b and saves c.
A, B, C = 0, 1, 2


def stage(enters: Sequence[int], saved: int, keeps: Sequence[int], size: Sequence[int], **more: int) -> Stage:
    option = Option(saved, keeps=tuple(keeps), backward_overhead=more.pop("backward_overhead", 0))
    made = Stage("s", 1.0, 2.0, sum(size[v] for v in enters), (option,), enters=tuple(enters))
    return replace(made, **more)  # type: ignore[arg-type] # bytes only


def chain_of_three() -> Chain:
    size = (10, 20, 4)
    return Chain(
        (
            stage((), 10, (), size, backward_overhead=-10),
            stage((A,), 20, (), size, backward_overhead=-20),
            stage((B,), 4, (C,), size),
        ),
        output=0,
        output_grad=1,
        fixed=100,
        values=size,
    )


def test_what_no_backward_needs_goes_when_the_next_stage_has_run() -> None:
    plain = Schedule((Keep(0), Keep(1), Keep(2), Backward(2), Backward(1), Backward(0)))
    line = simulate(chain_of_three(), plain)
    # a while stage 1 runs, b while stage 2 does; c stays, and the gradient of the output (1) appears.
    assert line.live == (110, 120, 105, 100, 100, 100)
    assert line.during == (110, 130, 124, 105, 100, 100)
    assert line.peak == 130 < simulate_by_sums(chain_of_three(), plain)


def simulate_by_sums(chain: Chain, schedule: Schedule) -> int:
    stages = tuple(
        replace(s, enters=(), options=tuple(replace(option, keeps=()) for option in s.options))
        for s in chain.stages
    )
    return simulate(replace(chain, stages=stages, values=(), carried=()), schedule).peak


def test_a_value_that_crosses_two_boundaries_is_there_once() -> None:
    size = (10, 3)
    chain = Chain(
        (
            stage((), 10, (), size),
            stage((0,), 3, (), size),  # makes 1, and 0 goes on
            stage((0, 1), 0, (0,), size),
        ),
        output=0,
        output_grad=0,
        values=size,
    )
    line = simulate(chain, (Keep(0), Checkpoint(1), Keep(2), Backward(2), Keep(1), Backward(1), Backward(0)))
    assert line.live[1] == 13  # x_1 is held, and x_2 has the same 10 bytes
    assert line.live[2] == 10


def test_a_carried_value_stays_for_those_who_may_need_it_again() -> None:
    size = (8,)
    stages = (
        stage((), 0, (), size, carried=8),
        stage((), 0, (), size),
        stage((), 0, (), size, carried_change=-8),
    )

    def chain(savers: tuple[int, ...], freed: int | None) -> Chain:
        last = stages[2] if freed is not None else stage((), 0, (), size)
        long_lived = Carried(0, made=0, readers=(2,), savers=savers, freed=freed)
        return Chain((*stages[:2], last), 0, 0, values=size, carried=(long_lived,))

    kept = Schedule((Keep(0), Keep(1), Keep(2), Backward(2), Backward(1), Backward(0)))
    assert simulate(chain((), 2), kept).live == (8, 8, 0, 0, 0, 0)  # the sweep handed it on; nobody needs it
    assert simulate(chain((2,), 2), kept).live == (8, 8, 8, 0, 0, 0)
    assert simulate(chain((), None), kept).live == (8,) * 6  # the user holds it
    again = Schedule((Keep(0), Keep(1), Checkpoint(2), Keep(2), Backward(2), Backward(1), Backward(0)))
    assert simulate(chain((), 2), again).live[2:5] == (8, 8, 0)  # stage 2 reads it again


def test_a_run_just_before_the_backward_makes_no_output() -> None:
    size = (50, 7)
    first = Option(57, keeps=(1,), rerun_overhead=7 - 57, backward_overhead=-50)
    stages = (
        Stage("a", 1.0, 1.0, 0, (first,)),
        Stage("b", 1.0, 1.0, 50, (Option(0),), enters=(0,)),
    )
    chain = Chain(stages, 0, 0, values=size)
    line = simulate(chain, (Checkpoint(0), Keep(1), Backward(1), Keep(0), Backward(0)))
    assert line.during == (50, 50, 0, 7, 7)


# ---- against a literal definition ----------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Chain:
    """A random line of stages whose values are read by the next stages, each saved by some."""
    count = draw(st.integers(2, 5))
    size: list[int] = []
    made: list[list[int]] = []
    for _ in range(count):
        made.append([len(size) + i for i in range(draw(st.integers(1, 3)))])
        size += [draw(st.integers(1, 9)) for _ in made[-1]]
    last = {v: draw(st.integers(k, min(k + 2, count - 1))) for k, own in enumerate(made) for v in own}
    enters = [[v for own in made[:k] for v in own if last[v] >= k] for k in range(count)]
    stages = []
    for k in range(count):
        after = enters[k + 1] if k + 1 < count else []
        options = []
        for j in range(draw(st.integers(1, 2))):
            saves = {v for v in (*enters[k], *made[k]) if draw(st.booleans())} | (
                set(enters[k]) if j else set()
            )
            saved = sum(size[v] for v in {*saves, *after} - set(enters[k]))
            options.append(
                Option(
                    saved,
                    float(j),
                    backward_overhead=draw(st.integers(-saved, 9)),
                    keeps=tuple(sorted(saves)),
                )
            )
        stages.append(
            Stage(
                str(k), 1.0, 1.0, sum(size[v] for v in enters[k]), tuple(options), enters=tuple(enters[k]),
                input_grad=draw(st.integers(0, 9)), grad=draw(st.integers(0, 3)),
            )
        )  # fmt: skip
    return Chain(tuple(stages), 0, draw(st.integers(0, 9)), fixed=5, values=tuple(size))


def literal(chain: Chain, schedule: Schedule) -> list[int]:
    """Bytes live after each action: the union of what holds something, spelled out with objects in lists."""
    holders: dict[tuple[str, int], list[tuple[int, object]]] = {("held", 0): []}
    reversed_, ran, after = 0, set[int](), []
    count = len(chain)
    for index, action in enumerate(schedule):
        i = action.stage  # type: ignore[union-attr] # persistent schedules have stages only
        if isinstance(action, Backward):
            for key in (("kept", i), ("held", i), ("out", i + 1)):
                holders.pop(key, None)
            reversed_ += 1
        else:
            for key in [key for key in holders if key[0] == "working" and key[1] != i]:
                del holders[key]
            inputs = next(holders[key] for key in (("working", i), ("held", i), ("out", i)) if key in holders)
            again = i in ran and schedule.actions[index + 1] == Backward(i) and isinstance(action, Keep)
            ran.add(i)
            there = dict(inputs)
            copies: dict[int, object] = {}

            def copy(
                value: int, there: dict[int, object] = there, copies: dict[int, object] = copies
            ) -> tuple[int, object]:
                return value, there[value] if value in there else copies.setdefault(value, object())

            outputs = [copy(v) for v in (chain.stages[i + 1].enters if i + 1 < count else ())]
            holders.pop(("working", i), None)
            if isinstance(action, Keep):
                kept = [copy(v) for v in chain.stages[i].options[action.option].keeps]
                holders.pop(("held", i), None)
                holders.pop(("out", i), None)
                holders["kept", i] = kept
                if not again:
                    holders["out", i + 1] = outputs
            else:
                if isinstance(action, Checkpoint):
                    holders["held", i] = inputs
                if ("held", i + 1) not in holders:
                    holders["working", i + 1] = outputs
        alive = {(value, id(thing)) for held in holders.values() for value, thing in held}
        grads = sum(s.grad for s in chain.stages[count - reversed_ :])
        hand = 0
        if reversed_:
            hand = chain.stages[count - reversed_].input_grad if reversed_ < count else 0
        elif len(ran) == count:
            hand = chain.output_grad
        after.append(chain.fixed + grads + hand + sum(chain.values[v] for v, _ in alive))
    return after


@given(graphs(), st.integers(0, 2**32))
def test_bytes_after_each_action_are_the_literal_union(chain: Chain, seed: int) -> None:
    schedules = list(persistent_schedules(chain))
    for schedule in random.Random(seed).sample(schedules, min(20, len(schedules))):
        assert list(simulate(chain, schedule).live) == literal(chain, schedule)


@st.composite
def long_lived(draw: st.DrawFn) -> Chain:
    """Such a line of stages with values that outlive the next stages, and states for runs again."""
    chain = draw(graphs())
    count, values, carried = len(chain), list(chain.values), []
    made, change = [0] * count, [draw(st.integers(0, 3)) for _ in chain.stages]
    for _ in range(draw(st.integers(0, 3))):
        origin = draw(st.integers(0, count - 1))
        readers = tuple(i for i in range(origin + 1, count) if draw(st.booleans()))
        savers = tuple(i for i in readers if draw(st.booleans()))
        freed, last = draw(st.none() | st.just(origin)), draw(st.none() | st.integers(origin, count - 1))
        carried.append(Carried(len(values), origin, readers, savers, freed, last))
        values.append(draw(st.integers(1, 9)))
        made[origin] += values[-1]
        change[origin] -= values[-1] if freed is not None else 0
    stages = tuple(
        replace(each, carried=made[i], carried_change=change[i], rerun_state=draw(st.integers(0, 4)))
        for i, each in enumerate(chain.stages)
    )
    fixed = chain.fixed + sum(each.rerun_state for each in stages)
    return replace(chain, stages=stages, fixed=fixed, values=tuple(values), carried=tuple(carried))


def literal_long_lived(chain: Chain, schedule: Schedule) -> list[int]:
    """Bytes after each action of carried values, their gradients and states, by stages run and reversed."""
    whole: dict[int, bool] = {}  # of each stage that has run, whether its first run kept all
    reversed_: set[int] = set()
    after = []
    for action in schedule:
        if isinstance(action, Backward):
            reversed_.add(action.stage)
        else:
            whole.setdefault(action.stage, action == Keep(action.stage))  # type: ignore[union-attr] # no boundaries
        waiting = whole.keys() - reversed_
        total = sum(chain.stages[i].rerun_state for i in waiting if not whole[i])
        for each in chain.carried:
            handed_on = (len(chain) - 1 if each.last is None else each.last) not in whole
            needed = any(i in waiting and (not whole[i] or i in each.savers) for i in each.readers)
            alive = each.made in whole and (each.freed is None or handed_on or needed)
            total += chain.values[each.value] * (alive + (each.freed in reversed_))
        after.append(total + sum(chain.stages[i].carried_change for i in reversed_))
    return after


@given(long_lived(), st.integers(0, 2**32))
def test_long_lived_bytes_are_those_of_the_literal_definition(chain: Chain, seed: int) -> None:
    schedules = list(persistent_schedules(chain))
    states = sum(each.rerun_state for each in chain.stages)
    for schedule in random.Random(seed).sample(schedules, min(20, len(schedules))):
        both = zip(literal(chain, schedule), literal_long_lived(chain, schedule), strict=True)
        assert list(simulate(chain, schedule).live) == [short + long - states for short, long in both]


def test_the_literal_union_bites() -> None:
    chain = chain_of_three()
    schedule = Schedule((Keep(0), Keep(1), Keep(2), Backward(2), Backward(1), Backward(0)))
    assert literal(chain, schedule) == list(simulate(chain, schedule).live)
    held = Chain((*chain.stages[:2], stage((B,), 4, (B, C), chain.values)), 0, 1, 100, values=chain.values)
    assert literal(held, schedule)[2] == literal(chain, schedule)[2] + 20


# ---- solvers -------------------------------------------------------------------------------------------


@each_model(["tiny", "unet"])
def test_storages_never_take_more_than_the_sums(name: str) -> None:
    plan: Plan = plan_for(name, "graph")
    chain = plan.chain
    assert chain.values
    points = pareto(chain, step=2**18)
    for point in points:
        schedule = points.schedule(point)
        assert (
            point.peak
            == simulate(chain, schedule).peak
            <= simulate_by_sums(chain, schedule) + sum(s.rerun_state for s in chain.stages)
        )
    assert Chain.from_json(json.loads(json.dumps(chain.to_json()))) == chain


@given(graphs(), st.integers(0, 100))
@pytest.mark.slow
def test_every_schedule_found_fits_and_the_bound_holds(chain: Chain, share: int) -> None:
    lines = [simulate(chain, schedule) for schedule in persistent_schedules(chain)]
    least, most = min(line.peak for line in lines), max(line.peak for line in lines)
    budget = max(1, least + (most - least) * share // 100)
    try:
        found = solve_optimal(chain, budget)
    except InfeasibleBudget as error:
        smallest = error.smallest
        found = None
    else:
        smallest = budget
    if found is None:
        assert smallest > budget
        assert simulate(chain, solve_chain(chain, smallest)).peak <= smallest
        return
    assert simulate(chain, found.schedule).peak <= budget
    fastest = min(line.seconds for line in lines if line.peak <= budget)
    assert found.lower_bound <= fastest <= found.seconds
