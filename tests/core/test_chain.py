"""The chain checks its numbers and adds them up."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given

from rematplan.scheduler.core.chain import Chain, Option, Stage
from tests.shared.chains import chains

OPTION = Option(4)
STAGE = Stage("s", 1.0, 2.0, 3, (OPTION,))


@given(chains(5, options=3))
def test_a_chain_survives_json(chain):
    assert Chain.from_json(json.loads(json.dumps(chain.to_json()))) == chain


def test_from_arrays_says_which_number_is_which():
    chain = Chain.from_arrays(
        [1.0, 2.0],
        [3.0, 4.0],
        [5, 6, 7],
        [8, 9],
        [10, 11],
        [12, 13],
        grad=[14, 15],
        names=["a", "b"],
        fixed=16,
    )
    second = Stage("b", 2.0, 4.0, 6, (Option(9, 0.0, 11, 13),), 11, input_grad=6, grad=15)
    assert chain.stages[1] == second
    assert (chain.output, chain.output_grad, chain.fixed, len(chain)) == (7, 7, 16, 2)
    assert [chain.input_bytes(i) for i in range(3)] == [5, 6, 7]
    assert chain.plain_seconds == 10.0


def test_gradients_of_boundaries_are_as_large_as_the_boundaries_unless_said_otherwise():
    chain = Chain.from_arrays([1.0], [1.0], [5, 6], [7], boundary_grad=[1, 2])
    assert [chain.grad_bytes(i) for i in range(2)] == [1, 2]
    chain = Chain.from_arrays([1.0], [1.0], [5, 6], [7])
    assert [chain.grad_bytes(i) for i in range(2)] == [5, 6]


def test_numpy_numbers_become_plain_ones():
    stage = Stage("s", np.float32(1.0), 2.0, np.int64(3), [Option(np.int32(4))])  # type: ignore[arg-type] # on purpose
    assert stage == STAGE
    assert type(stage.input) is int
    assert type(stage.forward) is float


@pytest.mark.parametrize("value", [1.0, True, None, "1", float("nan")])
@pytest.mark.parametrize("field", ["saved", "forward_overhead", "backward_overhead"])
def test_bytes_of_an_option_are_whole(field, value):
    with pytest.raises(ValueError, match=field):
        Option(**{"saved": 1, field: value})


def test_a_forward_takes_no_less_than_nothing():
    assert Option(-3, forward_overhead=3, backward_overhead=-5).saved == -3  # lets go of a part of its input
    with pytest.raises(ValueError, match="must not be negative together"):
        Option(-3, forward_overhead=2)
    with pytest.raises(ValueError, match="forward_overhead=-1"):
        Option(3, forward_overhead=-1)
    with pytest.raises(ValueError, match="takes off more than its output has"):
        Chain((Stage("s", 1.0, 1.0, 1, (OPTION,), forward_overhead=-3),), output=2, output_grad=2)


@pytest.mark.parametrize("value", [-1, 1.5, False])
@pytest.mark.parametrize("field", ["input", "input_grad", "grad", "carried", "rerun_state"])
def test_bytes_of_a_stage_are_whole_and_not_negative(field, value):
    with pytest.raises(ValueError, match=field):
        Stage(
            **{"name": "s", "forward": 1.0, "backward": 1.0, "input": 1, "options": (OPTION,), field: value}
        )


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "1", None])
@pytest.mark.parametrize("field", ["forward", "backward"])
def test_seconds_are_finite_and_not_negative(field, value):
    with pytest.raises(ValueError, match=field):
        Stage(
            **{"name": "s", "forward": 1.0, "backward": 1.0, "input": 1, "options": (OPTION,), field: value}
        )


@pytest.mark.parametrize("value", [-1.0, float("nan"), True])
def test_seconds_of_recomputing_are_finite_and_not_negative(value):
    with pytest.raises(ValueError, match="recompute"):
        Option(1, value)


@pytest.mark.parametrize("changes", [{"options": ()}, {"options": (1,)}, {"name": 1}, {"recomputable": 1}])
def test_a_stage_without_options_name_or_flag_is_refused(changes):
    with pytest.raises(ValueError, match="Stage"):
        Stage(**{"name": "s", "forward": 1.0, "backward": 1.0, "input": 1, "options": (OPTION,), **changes})


def test_a_chain_has_at_least_one_stage():
    with pytest.raises(ValueError, match="at least one Stage"):
        Chain((), 1, 1)


def test_no_more_long_lived_bytes_can_go_than_there_are():
    def chain(change: int) -> Chain:
        return Chain((Stage("s", 1.0, 1.0, 1, (OPTION,), carried=5, carried_change=change),), 1, 1)

    assert chain(-5).stages[0].retained == -5
    with pytest.raises(ValueError, match="lets go of 1 carried bytes"):
        chain(-6)


@pytest.mark.parametrize(
    "field", ["backward", "boundary", "saved", "forward_overhead", "backward_overhead", "grad", "names"]
)
def test_arrays_of_unequal_length_are_refused(field):
    arrays = {"forward": [1.0], "backward": [1.0], "boundary": [1, 1], "saved": [1]}
    with pytest.raises(ValueError, match=f"{field} has 3 entries"):
        Chain.from_arrays(**{**arrays, field: [1, 1, 1]})  # type: ignore[arg-type] # on purpose


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"stages": 3},
        {"stages": [3]},
        {"stages": [{"name": "s"}]},
        {"stages": [{"surprise": 1}]},
        {"output": None},
    ],
)
def test_json_that_is_no_chain_is_a_value_error(change):
    with pytest.raises(ValueError, match="Chain"):
        Chain.from_json({**Chain((STAGE,), 1, 1).to_json(), **change})
    with pytest.raises(ValueError, match=r"Chain\.from_json"):
        Chain.from_json({"format": 1})


def test_chains_are_values():
    one, other = Chain((STAGE,), 1, 1), Chain([STAGE], 1, 1)  # type: ignore[arg-type] # any iterable will do
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(FrozenInstanceError):
        one.output = 2  # type: ignore[misc] # on purpose
