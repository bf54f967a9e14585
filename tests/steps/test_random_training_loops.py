"""Random training loops train by a plan as plainly, or are refused; the comparison sees differences."""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.shared.state_kinds import STATES, State
from tests.shared.training_loop_steps import blamed, contents, difference, judge, run
from tests.shared.training_loops import draw, tidy
from tests.shared.training_models import LATE, Held, Recipe, Step, build

PLAIN = replace(
    draw(0),
    blocks=("mlp", "norm", "drop"),
    states=(),
    steps=(Step(),) * 3,
    root="plain",
    optimizer="momentum",
)


@pytest.mark.slow
def test_random_training_loops_train_bit_equal_and_within_budget_or_are_refused() -> None:
    """benchmarks/random_training_loops.py runs a thousand."""
    found: Counter[str] = Counter()
    for seed in range(2000, 2008):
        recipe = draw(seed)
        verdict = judge(recipe, measured=seed % 5 == 0)
        assert not verdict.bad, f"{verdict.kind}: {verdict.reason} | {recipe}"
        if recipe.capture != "graph":  # where a graph is asked for, there often is none
            found[verdict.kind] += 1
    assert found["refused"] <= 0.1 * found.total()


@pytest.mark.parametrize(
    "seed", [pytest.param(193, id="a copy of a planned model finds again which parameters its forward moves")]
)
def test_training_loops_that_were_wrong(seed: int) -> None:
    verdict = judge(draw(seed))
    assert not verdict.bad, verdict.reason


def test_a_seed_draws_one_recipe_and_most_of_what_there_is_is_drawn() -> None:
    assert draw(7) == draw(7)
    drawn = {name for seed in range(400) for name in blamed(draw(seed))}
    assert drawn >= {*STATES, "retain", "deep-copied", "midway: p.data = other", "root: __call__", "frozen"}


@pytest.mark.parametrize("kind", STATES)
def test_the_comparison_sees_a_kind_of_state_that_is_not_followed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop whose forward does without what it reads or writes differs from the plain one in some record."""
    recipe = replace(PLAIN, states=(Held(kind, 1, "each"),))
    expected = _records(recipe)
    assert len(expected) == len(recipe.steps)
    assert all(difference(a, b) is None for a, b in zip(_records(recipe), expected, strict=True))
    if STATES[kind].sort == "read":
        monkeypatch.setattr(type(STATES[kind]), "change", lambda self, owner, level: None)
    else:
        monkeypatch.setattr(type(STATES[kind]), "forward", _without)
        monkeypatch.setattr(type(STATES[kind]), "loss", lambda self, owner: None)
    found = _records(recipe)
    assert any(difference(a, b) for a, b in zip(found, expected, strict=True))


def _without(self: State, owner: Any, x: Tensor) -> Tensor:
    return x


def _records(recipe: Recipe) -> list[dict[str, Any]]:
    with tidy():
        model = build(recipe)
        return run(recipe, model, model).records


def test_the_comparison_sees_attributes_generators_and_gradients_of_leaves() -> None:
    recipe = replace(PLAIN, states=(Held("Latent", 0, "never"), Held("Deque", LATE, "never")))
    with tidy():
        model = build(recipe)
        loop = run(recipe, model, model).loop
        seen = functools.partial(_seen, loop)
        for spoil in (
            lambda: setattr(model, "layout", "other"),
            lambda: torch.rand(1),
            random.random,
            np.random.rand,
            lambda: loop.leaves()[0].grad.mul_(2),  # type: ignore[union-attr] # it has one
            lambda: model.latest.append(torch.zeros(16)),  # type: ignore[union-attr, operator] # a deque
            lambda: model.latest[0].add_(1),  # type: ignore[index] # a deque
            model.blocks.eval,
            lambda: model.head.requires_grad_(False),
        ):
            assert seen(spoil)


def _seen(loop: Any, spoil: Any) -> str | None:
    before = contents(loop)
    spoil()
    return difference(contents(loop), before)
