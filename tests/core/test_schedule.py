"""The referee: legality, seconds and bytes of each action."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import (
    COPY_ACTIONS,
    Action,
    Backward,
    Checkpoint,
    Forward,
    Free,
    IllegalAction,
    Keep,
    Schedule,
)
from rematplan.scheduler.solvers import SOLVERS, solve_chain
from tests.shared.brute_force import replay
from tests.shared.brute_force_host import legal_walk
from tests.shared.chains import chains

# Every size and time is a different digit, so that a sum says what is in it.
TWO = Chain(
    (
        Stage(
            "a", 1.0, 0.5, 1, (Option(200, 0.0, 5, 6),), 3, input_grad=4, grad=7, carried=30, carried_change=9
        ),
        Stage("b", 2.0, 0.25, 10, (Option(4000, 0.0, 50, 60), Option(3000, 0.125, 70, 80)), 20, 40, grad=8),
    ),
    output=100,
    output_grad=90,
    fixed=10**6,
)
BASE = 10**6 + 1  # fixed bytes and x_0
THREE = Chain.from_arrays([1.0] * 3, [1.0] * 3, [1, 2, 4, 8], [16, 32, 64])
END: list[Action] = [Keep(1), Backward(1), Keep(0), Backward(0)]


def test_the_bytes_of_a_schedule_that_keeps_all():
    line = simulate(TWO, [Keep(0), Keep(1), Backward(1), Backward(0)])
    kept = BASE + 30 + 200  # carried by the first run of stage 0
    # Backward(1) adds the gradient of x_2, the gradient of x_1 and the transient; Backward(0) finds parameter
    # gradients of stage 1 and the gradient of x_1.
    assert line.during == (
        kept + 5,
        kept + 4000 + 50,
        kept + 4000 + 90 + 40 + 60,
        kept + 8 + 40 + 4 + 6,
    )
    # The gradient of x_2 is there once stage 1 has run.
    assert line.live == (kept, kept + 4000 + 90, kept + 8 + 40, 10**6 + 30 + 8 + 7 + 9)
    assert line.seconds == 1 + 2 + 0.25 + 0.5
    assert (line.peak, line.peak_action, line.runs) == (kept + 4190, 2, (1, 1))


def test_the_bytes_of_a_schedule_that_runs_a_stage_again():
    line = simulate(TWO, [Checkpoint(0), Keep(1, 1), Backward(1), Keep(0), Backward(0)])
    base = BASE + 30
    assert line.during == (
        base + 10 + 3,  # x_1 and the transient of a forward that keeps nothing
        base + 10 + 3000 + 70,
        base + 10 + 3000 + 90 + 40 + 80,
        base + 8 + 40 + 200 + 5,  # x_1 went with Backward(1); nothing is carried twice
        base + 8 + 40 + 200 + 4 + 6,
    )
    assert line.live == (base + 10, base + 3010 + 90, base + 8 + 40, base + 248, 10**6 + 30 + 8 + 7 + 9)
    assert line.seconds == 1 + 2 + 0.25 + 0.125 + 1 + 0.5
    assert line.runs == (2, 1)


def test_a_working_boundary_goes_when_the_next_stage_has_run():
    line = simulate(THREE, [Forward(0), Forward(1), Keep(2), Backward(2), Forward(0), *END])
    assert line.during[:3] == (1 + 2, 1 + 2 + 4, 1 + 4 + 64)
    assert line.live[:4] == (1 + 2, 1 + 4, 1 + 4 + 64 + 8, 1 + 4)


def test_a_checkpoint_holds_its_input_until_the_stage_is_reversed():
    line = simulate(THREE, [Forward(0), Checkpoint(1), Keep(2), Backward(2), *END])
    assert line.live[:6] == (1 + 2, 1 + 2 + 4, 1 + 2 + 4 + 64 + 8, 1 + 2 + 4, 1 + 2 + 32 + 4, 1 + 2)


def test_a_freed_boundary_costs_nothing_and_is_not_there_any_more():
    start: list[Action] = [Forward(0), Checkpoint(1), Keep(2), Free(1)]
    line = simulate(THREE, [*start, Backward(2), Forward(0), *END])
    assert line.live[3] == 1 + 4 + 64 + 8
    with pytest.raises(IllegalAction, match="x_1 is not there"):
        simulate(THREE, [*start, Backward(2), *END])


def test_a_stage_run_again_before_the_first_backward_finds_the_gradient_of_the_output_there():
    again: list[Action] = [Forward(0), Checkpoint(1), Checkpoint(2), Keep(2), Backward(2)]
    line = simulate(THREE, [*again, *END])
    assert line.during[2] == 1 + 2 + 4 + 8  # x_3, and no gradient yet
    assert line.during[3] == 1 + 2 + 4 + 64 + 8
    assert line.runs[2] == 2


def test_a_second_copy_of_a_held_boundary_costs_while_it_is_made():
    start: list[Action] = [Forward(0), Checkpoint(1), Forward(0), Checkpoint(1)]
    line = simulate(THREE, [*start, Keep(2), Backward(2), *END])
    assert line.during[2] == 1 + 2 + 2
    assert line.live[2] == 1 + 2


@pytest.mark.parametrize(
    ("actions", "why"),
    [
        ([], "end of the schedule: stage 2 is not reversed yet"),
        ([Keep(3)], r"action 0, Keep\(stage=3, option=0\): there is no such stage"),
        ([Forward(-1)], "there is no such stage"),
        ([Backward(3)], "there is no such stage"),
        ([Forward(1)], "x_1 is not there"),
        ([Forward(0), Forward(1), Forward(1)], "x_1 is not there"),
        ([Keep(0), Forward(0)], "stage 0 is kept already"),
        ([Keep(0, 1)], "stage 0 has 1 options"),
        ([Keep(0, -1)], "stage 0 has 1 options"),
        ([Keep(0), Keep(1), Backward(1)], "stage 2 is to be reversed next"),
        ([Forward(0), Forward(1), Forward(2), Backward(2)], "the saved tensors of stage 2 are not there"),
        ([Forward(0), Forward(1), Keep(2), Free(2), Backward(2)], "x_2 is neither held nor inside"),
        ([Keep(0), Keep(1), Keep(2), Backward(2), Keep(2)], "stage 2 is reversed already"),
        ([Keep(0), Keep(1), Keep(2), Backward(2), Backward(2)], "stage 1 is to be reversed next"),
        ([Free(1)], "x_1 is not held"),
        ([Keep(0), Keep(1), Keep(2), *map(Backward, (2, 1, 0)), Backward(0)], "all stages are reversed"),
        ([Keep(0), Keep(1), Keep(2), *map(Backward, (2, 1, 0)), Keep(0)], "stage 0 is reversed already"),
    ],
)
def test_an_illegal_action_is_refused_with_its_reason(actions, why):
    with pytest.raises(IllegalAction, match=why) as caught:
        simulate(THREE, actions)
    assert caught.value.index == max(len(actions) - 1, 0)
    assert caught.value.action == (actions[-1] if actions else None)


def test_a_stage_that_may_run_only_once_is_not_run_again():
    stages = [Stage(str(i), 1.0, 1.0, 1, (Option(1),), recomputable=i > 0) for i in range(2)]
    with pytest.raises(IllegalAction, match="stage 0 may run only once"):
        simulate(Chain(tuple(stages), 1, 1), [Checkpoint(0), Keep(1), Backward(1), Keep(0)])


def mutations(chain: Chain, actions: tuple[Action, ...], data: st.DataObject) -> tuple[Action, ...]:
    """``actions`` with one dropped, doubled, swapped with another, altered, or put in."""
    changed = list(actions)
    here = data.draw(st.integers(0, len(actions) - 1))
    how = data.draw(st.sampled_from(["drop", "double", "swap", "alter", "insert", "insert"]))
    if how == "drop":
        del changed[here]
    elif how == "double":
        changed.insert(here, changed[here])
    elif how == "swap":
        there = data.draw(st.integers(0, len(actions) - 1))
        changed[here], changed[there] = changed[there], changed[here]
    elif how == "alter":
        changed[here] = data.draw(any_action(chain))
    else:
        changed.insert(here, data.draw(any_action(chain)))
    return tuple(changed)


def any_action(chain: Chain) -> st.SearchStrategy[Action]:
    stage = st.integers(-1, len(chain))
    kinds: list[st.SearchStrategy[Action]] = [st.builds(Keep, stage, st.integers(-1, 2))]
    kinds += [st.builds(Forward, stage), st.builds(Checkpoint, stage)]
    kinds += [st.builds(Backward, stage), st.builds(Free, stage)]
    return st.one_of(kinds)


def a_schedule(chain: Chain, data: st.DataObject) -> tuple[Action, ...]:
    solver = data.draw(st.sampled_from(sorted(name for name in SOLVERS if not SOLVERS[name].required)))
    try:
        return solve_chain(chain, data.draw(st.integers(1, 300)), solver).actions
    except InfeasibleBudget as error:
        return solve_chain(chain, max(error.smallest, 1), solver).actions


@pytest.mark.slow
@settings(max_examples=100)
@given(chains(6, signed=True), st.integers(0, 2**32), st.sampled_from([0, 0, 0, 1, 2]), st.data())
def test_the_referee_is_the_literal_definition(chain, seed, changes, data):
    actions = legal_walk(chain, HostMemory(0, 1.0, 1.0), seed)
    actions = tuple(action for action in actions if not isinstance(action, COPY_ACTIONS))
    for _ in range(changes):
        actions = mutations(chain, actions, data)
        assume(actions)
    literal = replay(chain, Schedule(actions))
    try:
        line = simulate(chain, actions)
    except IllegalAction:
        assert literal is None
    else:
        assert literal == (line.seconds, line.during, line.live)
        assert line.peak == max(line.during)


@settings(max_examples=150)
@given(chains(6), st.data())
@pytest.mark.slow
def test_no_change_to_a_schedule_goes_unnoticed(chain, data):
    stages = tuple(  # nothing is free, and no two options are alike
        Stage(
            stage.name,
            stage.forward + 1,
            stage.backward + 1,
            stage.input + 1,
            tuple(Option(100 * (k + 1), option.recompute) for k, option in enumerate(stage.options)),
            input_grad=stage.input_grad + 1,
        )
        for stage in chain.stages
    )
    chain = Chain(stages, chain.output + 1, chain.output_grad + 1)
    actions = a_schedule(chain, data)
    changed = mutations(chain, actions, data)
    assume(changed != actions)
    # Running a stage whose input is held already, or inside a kept stage, holds nothing new: the two words
    # for it mean the same there.
    plain = [Forward(a.stage) if isinstance(a, Checkpoint) else a for a in actions]
    assume(plain != [Forward(a.stage) if isinstance(a, Checkpoint) else a for a in changed])
    try:
        line = simulate(chain, changed)
    except IllegalAction:
        return
    assert line != simulate(chain, actions)


def test_forgetting_to_hold_a_boundary_is_noticed():
    simulate(THREE, [Checkpoint(0), Checkpoint(1), Keep(2), Backward(2), *END])
    with pytest.raises(IllegalAction, match="x_1 is not there"):
        simulate(THREE, [Checkpoint(0), Forward(1), Keep(2), Backward(2), *END])


def test_a_schedule_survives_json():
    schedule = Schedule((Checkpoint(0), Forward(1), Keep(2, 1), Free(1), Backward(2)))
    text = json.dumps(schedule.to_json())
    assert Schedule.from_json(json.loads(text)) == schedule
    assert schedule.to_json()["actions"][2] == ["keep", 2, 1]


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"format": 2, "actions": []},
        {"format": 1},
        {"format": 1, "actions": [["jump", 1]]},
        {"format": 1, "actions": [["keep", 1]]},
        {"format": 1, "actions": [["forward", 1.0]]},
        {"format": 1, "actions": [["forward", True]]},
        {"format": 1, "actions": [[["forward"], 1]]},
        {"format": 1, "actions": ["forward"]},
        {"format": 1, "actions": [[]]},
    ],
)
def test_json_that_is_no_schedule_is_a_value_error(data):
    with pytest.raises(ValueError, match=r"Schedule\.from_json"):
        Schedule.from_json(data)


def test_a_schedule_is_inert_data():
    schedule = Schedule((Keep(0), Backward(0)))
    assert schedule == Schedule([Keep(0, 0), Backward(0)])  # type: ignore[arg-type] # any iterable will do
    assert hash(schedule) == hash(Schedule((Keep(0), Backward(0))))
    assert (len(schedule), list(schedule)) == (2, [Keep(0), Backward(0)])
    with pytest.raises(ValueError, match="no action"):
        Schedule(("keep",))  # type: ignore[arg-type] # on purpose
