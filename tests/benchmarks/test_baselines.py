"""The benchmarks' baselines train like the plain step and restore the model."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.shared.models import Case
from tests.shared.steps import Record, assert_equal, case_of, loss_of, plan_for, restored

baselines: Any = importlib.import_module("benchmarks.baselines")
op_level: Any = importlib.import_module("benchmarks.op_level")


@pytest.fixture(params=["residual", "gpt2", pytest.param("unet", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest) -> Any:
    found = case_of(request.param)
    config: Any = getattr(found.model, "config", None)
    caches = getattr(config, "use_cache", None)
    if caches is not None:
        config.use_cache = False  # keys would be cached again by each recompute
    yield found
    if caches is not None:
        config.use_cache = caches


def step(case: Case, model: nn.Module) -> Record:
    """Loss and gradients of one step from a fixed seed."""
    with restored(case.model):
        torch.manual_seed(5)
        loss = loss_of(case(model))
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in case.model.named_parameters()}


def test_each_baseline_has_the_loss_and_gradients_of_the_plain_step_and_undoes_itself(case):
    expected = step(case, case.model)
    before = {name: set(vars(module)) for name, module in case.model.named_modules()}
    for method in baselines.methods(case.model).values():
        with method(case.model) as trained:
            assert_equal(step(case, trained), expected)
    for name, module in case.model.named_modules():
        assert "forward" not in set(vars(module)) - before[name], name
        assert not getattr(module, "gradient_checkpointing", False), name


def test_the_baselines_run_the_blocks_again_that_they_say():
    case = case_of("tiny")
    listed = baselines.blocks(case.model)
    runs = {}
    for name, method in {"plain": baselines.plain, **baselines.methods(case.model)}.items():
        before = [block.runs for block in listed]
        with method(case.model) as trained:
            step(case, trained)
        runs[name] = [block.runs - b for block, b in zip(listed, before, strict=True)]
    assert runs == {
        "plain": [1, 1, 1, 1, 1, 1],
        "per-block": [2, 2, 2, 2, 2, 2],
        "every 2nd": [2, 1, 2, 1, 2, 1],
        "every 3rd": [2, 1, 1, 2, 1, 1],
        "2 segments": [2, 2, 2, 1, 1, 1],
        "3 segments": [2, 2, 2, 2, 1, 1],
        "selective": [2, 2, 2, 2, 2, 2],
    }


@pytest.mark.slow
def test_plans_of_both_levels_have_the_gradients_of_the_plain_step_and_fit():
    case, plan = case_of("gpt2"), plan_for("gpt2", "graph")
    expected = step(case, case.model)
    budget = math.ceil(0.6 * plan.plain.peak)
    fine, whole = baselines.op_level(plan, budget), baselines.stage_level(plan, budget)
    for made in (fine, whole):
        assert made.predicted_peak <= budget
        with baselines.planned(made)(case.model) as trained:
            assert_equal(step(case, trained), expected)
    assert fine.predicted_overhead <= whole.predicted_overhead
    assert all(option in (None, 0) for option in whole.program.kept)
    assert any(option not in (None, 0) for option in fine.program.kept)


def test_the_report_has_a_section_a_model_and_tells_of_every_method():
    (title,) = op_level.SMALL
    found = op_level.compare(title, op_level.SMALL[title](), repeats=1)
    text = op_level.report({title: found})
    assert f"## {title}" in text
    for name in ("per-block", "every 2nd", "every 3rd", "2 segments", "selective"):
        assert f"| {name} |" in text
    runs = [*found.op_level.values(), *found.stage_level.values()]
    assert all(run is None or (run.peak <= run.budget and not run.differs) for run in runs)
