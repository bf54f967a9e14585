"""The first planned step is measured: silence if as predicted, else a warning and a tighter schedule."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from rematplan import Plan, execute, measure_peak, solve
from rematplan.executors.execute import plan_of
from rematplan.executors.first_step_peak import step_bytes, tightened
from rematplan.scheduler.core.errors import PeakWarning
from tests.shared.helpers import smallest
from tests.shared.models import Case
from tests.shared.steps import assert_equal, loss_of, restored, train


def planned() -> tuple[Case, Plan]:
    """Six equal blocks, and their plan half-way between the least bytes and keeping all."""
    torch.manual_seed(0)
    batch = torch.randn(512, 32)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Tanh()) for _ in range(6)))
    plan = solve(model, "1GiB", sample=batch, capture="graph")
    least = smallest(plan.chain)
    return Case(model, batch, (batch,)), plan.within((least + plan.predicted_peak) // 2)


def boastful(plan: Plan, share: float) -> Plan:
    """The plan with backwards that take more bytes than they say, by a share of the peak."""
    hidden = int(share * plan.predicted_peak)
    stages = tuple(
        replace(
            s,
            options=tuple(
                replace(o, backward_overhead=max(0, o.backward_overhead - hidden)) for o in s.options
            ),
        )
        for s in plan.chain.stages
    )
    return replace(plan, chain=replace(plan.chain, stages=stages, fixed=plan.chain.fixed - hidden))


def step(case: Case, model: nn.Module) -> None:
    loss_of(case(model)).backward()


def test_a_step_as_predicted_says_nothing_and_is_measured_once() -> None:
    case, plan = planned()
    model = execute(plan, case.model, watch=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(case, model)
        case.model.zero_grad()
        step(case, model)
    assert plan_of(model) is plan
    case.model.zero_grad()
    assert (
        measure_peak(lambda: step(case, model), resident=[case.model, case.args]).peak <= plan.memory_budget
    )


def test_a_step_over_its_budget_warns_and_later_ones_are_within_it() -> None:
    case, honest = planned()
    plan = boastful(honest, 0.05).within(honest.memory_budget)
    budget = plan.predicted_peak
    plan = replace(plan, memory_budget=budget)
    with restored(case.model):
        expected = train(case, case.model)
    model = execute(plan, case.model, watch=True)
    step(case, model)
    case.model.zero_grad()
    with pytest.warns(PeakWarning, match=r"over the budget of .* from now on it trains by a schedule of"):
        step(case, model)
    tighter = plan_of(model)
    assert tighter is not None
    assert tighter.predicted_peak < plan.predicted_peak
    case.model.zero_grad()
    assert measure_peak(lambda: step(case, model), resident=[case.model, case.args]).peak <= budget
    with restored(case.model):
        assert_equal(train(case, model), expected)


def test_a_step_above_its_prediction_but_within_its_budget_only_warns() -> None:
    case, honest = planned()
    plan = replace(boastful(honest, 0.05), memory_budget=2 * honest.memory_budget)
    model = execute(plan, case.model, watch=True)
    step(case, model)
    with pytest.warns(PeakWarning, match="more than predicted, within the budget"):
        step(case, model)
    assert plan_of(model) is plan


def test_where_nothing_is_tighter_the_warning_says_how_much_is_missing() -> None:
    case, honest = planned()
    loose = boastful(honest, 0.05)
    plan = loose.within(smallest(loose.chain))
    model = execute(plan, case.model, watch=True)
    step(case, model)
    with pytest.warns(PeakWarning, match="no schedule is tighter by so much: raise the budget by"):
        step(case, model)


def test_a_forward_that_is_never_reversed_is_watched_no_longer_than_to_the_next() -> None:
    case, plan = planned()
    model = execute(plan, case.model, watch=True)
    abandoned = case(model)
    with pytest.warns(PeakWarning, match="another forward runs while an earlier one waits"):
        step(case, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.model.zero_grad()
        step(case, model)
    del abandoned
    measure_peak(lambda: None, device="cpu")  # the profiler is free again


def test_without_being_asked_the_cpu_is_not_watched() -> None:
    case, plan = planned()
    model = execute(boastful(plan, 0.05).within(plan.memory_budget), case.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(case, model)
        step(case, model)


@pytest.mark.cuda
def test_on_cuda_the_first_step_is_watched_unasked() -> None:
    case, _ = planned()
    model, batch = case.model.cuda(), case.args[0].cuda()
    on_cuda = Case(model, batch, (batch,))
    honest = solve(model, "1GiB", sample=batch, capture="graph")
    plan = boastful(honest, 0.05)
    watched = execute(replace(plan, memory_budget=plan.predicted_peak), model)
    step(on_cuda, watched)
    with pytest.warns(PeakWarning):
        step(on_cuda, watched)


def test_a_step_that_is_over_by_more_than_the_budget_is_said() -> None:
    _, plan = planned()
    with pytest.warns(PeakWarning, match="no schedule is tighter by so much"):
        assert tightened(plan, step_bytes(plan) + 2 * plan.memory_budget, "Net") is None
