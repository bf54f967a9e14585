"""Each kind of state, shape of a step and event between forward and backward trains alone as it does plainly.

Five steps at the smallest budget, then five at a middle one; all that a step may change is compared after
each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.shared.state_examples import EXAMPLES, assert_trains_as_plainly
from tests.shared.state_kinds import STATES
from tests.shared.training_loop_steps import judge
from tests.shared.training_loops import EXTRAS, MIDWAY, SHAPES
from tests.shared.training_models import LATE, LEVELS, ROOTS, Held, Recipe, Step

# These may be refused: more is live than under the plan's budget, or the forward itself has made another
# model of it.
REFUSED = ("Optional", "Int", "LazyParameter", "frozen at first")

BASE = Recipe(
    seed=5,
    blocks=("mlp", "norm", "drop"),
    layout="list",
    output="loss",
    root="plain",
    states=(),
    steps=(Step(),) * 10,
    optimizer="momentum",
    frozen=False,
    to_none=True,
    input_grad=False,
    smaller=False,
    handle="planned",
    capture="auto",
    shares=(0.0, 0.5),
)


def cases(names: Iterable[str]) -> Any:
    """Each name with each capture."""
    found = []
    for name, capture in itertools.product(names, ("auto", "modules")):
        found.append(pytest.param(name, capture, id=f"{name}, {capture}"))
    return pytest.mark.parametrize(("name", "capture"), found)


def trains_as_plainly(recipe: Recipe, *also: str) -> None:
    verdict = judge(recipe)
    assert verdict.kind in ("graph", "modules", *also), f"{verdict.kind}: {verdict.reason}\n{verdict.where}"


def odd(**of_steps: Any) -> tuple[Step, ...]:
    """Plain steps, and two odd ones under either budget."""
    return tuple(replace(Step(), **of_steps) if number % 5 in (1, 3) else Step() for number in range(10))


@cases(STATES)
def test_a_kind_of_state_at_the_root_and_in_a_block_is_as_the_plain_step_has_it(
    name: str, capture: str
) -> None:
    states = (Held(name, LATE, "each"), Held(name, 1, "each"))
    allowed = ["refused"] if name in REFUSED else []
    trains_as_plainly(replace(BASE, states=states, capture=capture), *allowed)


@cases(LEVELS)
def test_a_number_that_changes_so_is_met(name: str, capture: str) -> None:
    states = (Held("Float", LATE, name), Held("DictEntry", 1, name))
    trains_as_plainly(replace(BASE, states=states, capture=capture))


@cases(["Float", "Counter", "ReboundBuffer"])
def test_state_is_shared_by_the_planned_model_and_the_one_that_was_planned(name: str, capture: str) -> None:
    states = (Held(name, LATE, "two"), Held(name, 1, "two"))
    trains_as_plainly(replace(BASE, states=states, capture=capture, handle="model"))


@cases(SHAPES)
def test_a_step_of_several_forwards_or_backwards_is_right(name: str, capture: str) -> None:
    trains_as_plainly(replace(BASE, steps=odd(shape=name), capture=capture))


@cases(EXTRAS)
def test_a_step_is_right_after(name: str, capture: str) -> None:
    trains_as_plainly(replace(BASE, steps=odd(extras=(name,)), capture=capture))


@cases(MIDWAY)
def test_between_forward_and_backward_there_may_be_or_is_refused(name: str, capture: str) -> None:
    read = tuple(Held(kind, i, "never") for i, kind in enumerate(("DropoutP", "Eps", "Float")))
    # The weight that is swapped is the one of this number: of a block that is run again.
    recipe = replace(BASE, seed=9, states=read, steps=odd(midway=name), capture=capture)
    trains_as_plainly(recipe, "refused")


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"root: {root}": {"root": root} for root in ROOTS},
    "stepped in the backward": {"optimizer": "in the backward"},
    "frozen at first": {"frozen": True, "steps": odd(extras=("freezing toggled",))},
    "zeros as gradients": {"to_none": False},
    "an input that requires grad": {"input_grad": True},
    "a last batch that is smaller": {"smaller": True},
    "blocks in a Sequential": {"layout": "sequential", "output": "rows"},
    "code that depends on data": {"blocks": ("mlp", "item", "batch")},
}


@cases(VARIANTS)
def test_a_loop_is_right_with(name: str, capture: str) -> None:
    allowed = ["refused"] if name in REFUSED else []
    trains_as_plainly(replace(BASE, **VARIANTS[name], capture=capture), *allowed)


@cases(EXAMPLES)
def test_a_small_program_trains_as_it_does_plainly(name: str, capture: str) -> None:
    assert_trains_as_plainly(EXAMPLES[name], capture)
