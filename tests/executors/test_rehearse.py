"""A rehearsed step takes the bytes of the plan and of measurements: three judges of one program."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from rematplan import Plan, PlanMismatch, Rehearsal, Schedule, execute, measure_peak, rehearse, solve
from rematplan.executors.plain import plans_within
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Forward, Keep
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import preserved
from tests.shared.helpers import smallest
from tests.shared.models import SEVEN, Block, Case, gpt2
from tests.shared.steps import (
    case_of,
    each_model,
    plan_for,
    replan,
    restored,
    scheduled,
    state,
    thinnest,
    tightest,
)


def at(plan: Plan, share: float) -> Plan:
    """The plan under a budget between the smallest one and the plain step's peak."""
    least = smallest(plan.chain)
    return replan(plan, int(least + share * (plan.plain.peak - least)))


def measured(plan: Plan, case: Case) -> int:
    """The peak of a planned step, as ``measure_peak`` counts it."""
    planned = execute(plan, case.model)

    def step() -> Any:
        output = case(planned)
        loss = find_loss(output)[0]
        loss.backward()
        return output, loss

    with preserved(case.model):
        step()
    with preserved(case.model):
        constants = getattr(plans_within(planned).first.executor.capture, "constants", {})
        return measure_peak(
            step, resident=[case.model, case.args, case.kwargs, list(constants.values())]
        ).peak


def reserve(plan: Plan) -> int:
    """What the plan sets aside for the whole step and a step takes only in parts of it."""
    return plan.resident.get("constants and replay state", 0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@each_model(SEVEN)
@pytest.mark.slow
def test_prediction_rehearsal_and_measurement_agree(name: str, share: float) -> None:
    plan, case = at(plan_for(name, "graph"), share), case_of(name)
    real = rehearse(plan, case.model, case.sample, real=True)
    assert real.peak == measured(plan, case)
    assert 0 <= plan.predicted_peak - real.peak <= 0.01 * plan.predicted_peak + reserve(plan)
    fake = rehearse(plan, case.model, case.sample)
    assert fake.uncounted == real.uncounted == ()
    assert abs(fake.peak - real.peak) <= 0.001 * real.peak
    # Action by action, the step without data is the real one, what kernels take within themselves included.
    # Where a re-run has nothing to compute, all there is to see is the comparison of what it reads, which
    # takes data.
    rows = list(zip(fake.rows, real.rows, strict=True))
    assert not [
        (seen, true)
        for seen, true in rows
        if (seen.observed is None) != (true.observed is None) and true.op != "aten::cat"
    ]
    for seen, true in rows:
        if seen.observed is None or true.observed is None:
            continue
        assert abs(true.observed - seen.observed) <= 0.001 * plan.predicted_peak, (seen, true)
        assert true.observed <= true.predicted + 0.005 * plan.predicted_peak


@each_model(["tiny", "gpt2", "vit"])
@pytest.mark.slow
def test_blocks_are_rehearsed_as_they_run(name: str) -> None:
    plan, case = at(plan_for(name, "modules"), 0.3), case_of(name)
    fake = rehearse(plan, case.model, case.sample)
    real = rehearse(plan, case.model, case.sample, real=True)
    assert real.peak == measured(plan, case)
    assert abs(fake.peak - real.peak) <= 0.002 * real.peak
    assert real.peak <= plan.predicted_peak


def test_stages_kept_in_part_are_rehearsed() -> None:
    plan, case = thinnest(plan_for("gpt2", "graph")), case_of("gpt2")
    fake, real = (rehearse(plan, case.model, case.sample, real=real) for real in (False, True))
    assert abs(fake.peak - real.peak) <= 0.001 * real.peak
    assert fake.peak <= plan.predicted_peak


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("capture", ["graph", "modules"])
def test_the_model_is_left_as_it_is(capture: str, real: bool) -> None:
    plan, case = tightest(plan_for("tiny", capture)), case_of("tiny")
    with restored(case.model) as model:
        planned = execute(plan, model)
        case(planned).sum().backward()  # with gradients, and buffers that have moved
        before, runs = state(model), [block.runs for block in model.modules() if isinstance(block, Block)]
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        rehearse(plan, planned, case.sample, real=real)
        after = state(model)
        assert before.keys() == after.keys()
        assert all(_same(before[key], after[key]) for key in before)
        now = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        assert all(a is b for a, b in zip(tensors, now, strict=True))
        if not real:
            assert runs == [block.runs for block in model.modules() if isinstance(block, Block)]
        assert (
            plans_within(planned).first.executor is None
            or plans_within(planned).first.executor.observe is None
        )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def test_the_actions_follow_one_another_as_scheduled() -> None:
    plan, case = tightest(plan_for("tiny", "graph")), case_of("tiny")
    timeline = rehearse(plan, case.model, case.sample).timeline
    order = [point.action for point in timeline.points]
    assert order == sorted(order)
    running = {i for i, a in enumerate(plan.schedule) if isinstance(a, (Forward, Checkpoint, Keep, Backward))}
    assert running - set(order) == set()


def test_random_schedules_of_recomputation_are_followed_action_by_action() -> None:
    plan, case = plan_for("tiny", "graph"), case_of("tiny")
    count = len(plan.chain)
    # Only boundary 0 is held: each backward runs everything before it once more.
    actions: list[Any] = [*map(Forward, range(count - 1)), Keep(count - 1), Backward(count - 1)]
    for k in reversed(range(count - 1)):
        actions += [*map(Forward, range(k)), Keep(k), Backward(k)]
    again = scheduled(plan, Schedule(tuple(actions)))
    fake = rehearse(again, case.model, case.sample)
    ran = {p.action for p in fake.timeline.points[1:]}
    # A re-run of a stage that has no more handles alive would serve nobody, and is left out.
    assert ran == {i for i, row in enumerate(fake.rows) if row.observed is not None}
    assert len(ran) > count * (count - 1) // 2
    assert fake.peak <= again.predicted_peak


def test_what_is_observed_has_its_categories() -> None:
    plan, case = at(plan_for("gpt2", "graph"), 0.3), case_of("gpt2")
    fake = rehearse(plan, case.model, case.sample)
    series = fake.timeline.by_category
    size = sum(p.numel() * 4 for p in case.model.parameters())
    assert set(series["parameters"]) == {size}
    assert series["gradients"][-1] == size
    assert series["gradients"][0] == 0
    assert max(series["boundaries held"]) > 0
    assert max(series["kept saved tensors"]) > 0
    assert series["transient"][-1] == 0
    assert series["kept saved tensors"][-1] == series["boundaries held"][-1] == 0


def _waster(plan: Plan, case: Case, stage: int, size: int) -> Rehearsal:
    """A rehearsal in which a stage holds on to bytes that it should not."""
    capture = plan.live[1]
    original = capture.stages[stage]
    held = []

    def wasteful(*arguments: Any) -> Any:
        held.append(torch.zeros(size, dtype=torch.uint8))
        return original.function(*arguments)

    capture.stages[stage] = dataclasses.replace(original, function=wasteful)
    try:
        return rehearse(plan, case.model, case.sample)
    finally:
        capture.stages[stage] = original


def test_the_report_names_the_stage_and_the_op_where_the_bytes_differ() -> None:
    plan, case = tightest(plan_for("gpt2", "graph")), case_of("gpt2")
    good, bad = rehearse(plan, case.model, case.sample), _waster(plan, case, 2, 10**6)
    assert bad.peak >= good.peak + 10**6
    first = next(row for row in bad.differences if row.observed is not None and row.observed > row.predicted)
    assert getattr(plan.schedule.actions[first.action], "stage", None) == 2
    name = plan.chain.stages[2].name
    told = next(line for line in str(bad).splitlines() if "more than predicted" in line)
    assert f"({name})" in told
    assert f"most at {first.op}" in told
    assert first.op.startswith("aten::")
    assert "more than predicted" not in str(good)


def test_the_table_has_a_row_for_each_action() -> None:
    plan, case = tightest(plan_for("tiny", "graph")), case_of("tiny")
    text = str(rehearse(plan, case.model, case.sample))
    numbers = [int(found) for found in re.findall(r"^ *(\d+)   \w", text, flags=re.MULTILINE)]
    assert numbers == list(range(len(plan.schedule)))
    assert "temporaries" not in text
    assert "temporaries" not in str(rehearse(plan, case.model, case.sample, real=True))


def test_scratch_space_is_left_out_where_nothing_may_be_computed() -> None:
    plan, case = at(plan_for("residual", "graph"), 0.3), case_of("residual")
    full, bare = (rehearse(plan, case.model, case.sample, scratch=scratch) for scratch in (True, False))
    assert bare.peak < 0.95 * full.peak
    assert (full.uncounted, bare.uncounted) == ((), None)
    assert "temporaries inside kernels are not counted" in str(bare)
    odd = dataclasses.replace(full, uncounted=("aten.mm.default (3.00 GiB, too large to try)",))
    assert "kernels are not counted: aten.mm.default (3.00 GiB, too large to try)" in str(odd)


@pytest.mark.slow
def test_a_loaded_plan_is_rehearsed_on_a_model_without_weights() -> None:
    case = case_of("gpt2")
    plan = at(plan_for("gpt2", "graph"), 0.3)
    loaded = Plan.from_json(plan.to_json())
    wanted = rehearse(plan, case.model, case.sample).peak
    assert rehearse(loaded, case.model, case.sample).peak == wanted
    with torch._subclasses.FakeTensorMode():
        empty = type(case.model)(case.model.config).train()
    assert rehearse(loaded, empty, case.sample).peak == wanted


@pytest.mark.parametrize("capture", ["graph", "modules"])
@pytest.mark.slow
def test_a_plan_for_a_device_that_is_not_there_is_rehearsed_by_its_rules(capture: str) -> None:
    case = gpt2(layers=2)
    with torch.device("meta"):
        empty = type(case.model)(case.model.config).train()
    batch = {name: value.to("meta") for name, value in case.kwargs.items()}
    plan = tightest(solve(empty, "8GiB", sample=batch, capture=capture, device="H200"))
    seen = rehearse(plan, empty, batch)
    assert 0 <= plan.predicted_peak - seen.peak <= 0.01 * plan.predicted_peak + reserve(plan)
    assert seen.uncounted is None  # nor by a kernel of this machine
    assert seen.resident["workspaces"] == plan.resident["workspaces"] > 0
    assert all(block.size % 512 == 0 for block in seen.timeline.blocks if block.begin)


@pytest.mark.slow
def test_existing_gradients_and_optimizer_state_count() -> None:
    case = gpt2(layers=2)
    model = copy.deepcopy(case.model)
    case(model).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    plan = tightest(solve(model, "1GiB", sample=case.sample, capture="graph", optimizer=optimizer))
    for real in (False, True):
        seen = rehearse(plan, model, case.sample, real=real)
        assert 0 <= plan.predicted_peak - seen.peak <= 0.01 * plan.predicted_peak + reserve(plan)
        for part in ("existing gradients", "optimizer state", "parameters"):
            assert seen.resident[part] == plan.resident[part]


@pytest.mark.slow
def test_autocast_around_the_call_is_rehearsed() -> None:
    case = gpt2(layers=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = tightest(solve(case.model, "1GiB", sample=case.sample, capture="graph"))
        fake, real = (rehearse(plan, case.model, case.sample, real=real) for real in (False, True))
    assert abs(fake.peak - real.peak) <= 0.002 * real.peak
    assert any("_to_copy" in point.label for point in fake.timeline.points)


def test_what_does_not_go_together_is_refused() -> None:
    plan, case = plan_for("tiny", "graph"), case_of("tiny")
    with pytest.raises(PlanMismatch, match="another"):
        rehearse(plan, nn.Linear(2, 2), case.sample)
    with pytest.raises(PlanMismatch, match="rehearse: Sequential"):
        rehearse(plan, case.model, torch.randn(3, 16))
    with pytest.raises(TypeError, match="Plan"):
        rehearse("plan", case.model, case.sample)  # type: ignore[arg-type] # on purpose


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_on_cuda_the_counters_give_the_measured_peak(name: str) -> None:
    case = SEVEN[name]()
    model = case.model.cuda()
    case = Case(model, *torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.cuda(), (case.sample, case.args, case.kwargs)
    ))  # fmt: skip # one call
    plan = tightest(solve(model, "8GiB", sample=case.sample, capture="graph"))
    real = rehearse(plan, model, case.sample, real=True)
    assert abs(real.peak - measured(plan, case)) <= 0.01 * plan.predicted_peak
    fake = rehearse(plan, model, case.sample)
    assert fake.peak <= plan.predicted_peak
