"""The public names say what they do, a verb first, with an example that runs."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import rematplan
from rematplan.scheduler.bounds.dag import chain_dag

FUNCTIONS = [name for name in rematplan.__all__ if inspect.isfunction(getattr(rematplan, name))]
NEVER_RAISE = ("format_bytes", "plan_of", "plans_of")


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples may use beside the public names."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))
    batch = torch.randn(32, 64)
    chain = rematplan.Chain.from_arrays([1.0] * 8, [2.0] * 8, [10] * 9, [40] * 8)
    plan = rematplan.solve(model, "2MiB", sample=batch)
    public = {name: getattr(rematplan, name) for name in FUNCTIONS}
    return {**public, "model": model, "batch": batch, "chain": chain, "dag": chain_dag(chain), "plan": plan}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_public_function_runs(name: str, names: dict[str, Any]) -> None:
    examples = doctest.DocTestFinder(recurse=False).find(getattr(rematplan, name), name, globs=dict(names))
    assert examples, f"{name} has no example"
    assert examples[0].examples, f"{name} has no example"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples[0], out=said.append)
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_docstring_begins_with_a_verb_and_says_what_is_raised(name: str) -> None:
    text = inspect.getdoc(getattr(rematplan, name)) or ""
    first = text.split()[0]
    assert first[0].isupper()
    assert first not in {"A", "An", "The", "What", "Which", "All", "Of", "Bytes", "How"}, f"{name}: {first}"
    assert "Raises:" in text or name in NEVER_RAISE, f"{name} does not say what it raises"
