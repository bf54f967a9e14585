"""Module graphs drawn by hypothesis train like the plain model, bit for bit, within their budgets, or are refused."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from tests.module_graph_steps import judge, recipes
from tests.module_graphs import Recipe


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of mixed precision and of flattened weights
def test_random_module_graphs_train_bit_equal_and_within_budget_or_are_refused() -> None:
    """benchmarks/random_module_graphs.py runs a thousand; each costs half a second."""
    found: Counter[str] = Counter()

    @settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
    @given(recipes())
    def drawn(recipe: Recipe) -> None:
        found[judge(recipe).kind] += 1

    drawn()
    assert found["refused"] <= 0.2 * found.total()
    assert min(found["graph"], found["modules"]) >= 10
