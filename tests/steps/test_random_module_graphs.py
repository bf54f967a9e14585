"""Module graphs drawn at random train bit for bit like the plain model in budget, or are refused."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.shared.module_graph_steps import judge, recipe_by
from tests.shared.steps import OVERLAPPING


@OVERLAPPING
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of mixed precision and of flattened weights
@pytest.mark.slow
def test_random_module_graphs_train_bit_equal_and_within_budget_or_are_refused() -> None:
    """benchmarks/random_module_graphs.py runs a thousand; each costs half a second."""
    found: Counter[str] = Counter()
    for seed in range(5000, 5008):
        found[judge(recipe_by(random.Random(seed).choice)).kind] += 1
    assert found["refused"] <= 0.2 * found.total()
    assert min(found["graph"], found["modules"]) >= 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(63, id="random-number states that torch's checkpoint holds in a block that is dropped"),
        pytest.param(180, id="an input whose gradient comes from several stages"),
        pytest.param(270, id="slices of an input, under autocast"),
        pytest.param(452, id="an output of a block that nobody uses"),
        pytest.param(598, id="an output of blocks that no loss is made of, and the user holds"),
        pytest.param(912, id="a view, changed in place between blocks"),
        pytest.param(920, id="a recurrent layer under autocast, kept by a re-run while others run"),
    ],
)
def test_module_graphs_that_were_over_budget(seed: int) -> None:
    assert judge(recipe_by(random.Random(seed).choice)).ratio is not None
