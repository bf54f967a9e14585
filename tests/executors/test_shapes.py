"""Calls of other shapes are planned for on demand, bit for bit like the plain model, without side effects."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rematplan import (
    CaptureError,
    InfeasibleBudget,
    Plan,
    PlanMismatch,
    execute,
    measure_peak,
    plan_of,
    plans_of,
    solve,
)
from rematplan.scheduler.core.errors import NewShapeWarning
from tests.shared.helpers import smallest
from tests.shared.models import Block, ResidualNet, make_gpt2
from tests.shared.steps import (
    EITHER_CAPTURE,
    OVERLAPPING,
    Record,
    assert_equal,
    assert_same,
    loss_of,
    restored,
    state,
)

WIDTH = 16


@functools.cache
def three() -> nn.Module:
    """Three blocks, with BatchNorm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH) for _ in range(3)), nn.Linear(WIDTH, 4)).train()


def batch(rows: int) -> Tensor:
    return torch.randn(rows, WIDTH)


@functools.cache
def plan_of_three(capture: str) -> Plan:
    """Half-way between the least bytes and keeping all of 64 rows."""
    plan = solve(three(), "1GiB", sample=torch.zeros(64, WIDTH), capture=capture)
    return plan.within((smallest(plan.chain) + plan.plain.peak) // 2)


def planned_three(capture: str = "modules", **options: Any) -> nn.Module:
    return execute(plan_of_three(capture), three(), **options)


def epochs(model: nn.Module, sizes: tuple[int, ...]) -> Record:
    """Steps of SGD on batches of these sizes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for rows in sizes:
        loss = loss_of(model(batch(rows)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)}


# ---- planned on demand -----------------------------------------------------------------------------------


@EITHER_CAPTURE
def test_the_last_smaller_batch_trains_bit_equal_by_a_plan_of_its_own(capture: str) -> None:
    model, planned = three(), planned_three(capture)
    assert_same(model, planned, lambda m: epochs(m, (64, 64, 40, 64, 40)))
    first, second = plans_of(planned)
    assert first is plan_of(planned) is plan_of_three(capture)
    assert second.memory_budget == first.memory_budget
    assert (second.solver, second.costs, second.capture.kind) == (first.solver, first.costs, capture)
    assert plans_of(model) == ()


@EITHER_CAPTURE
def test_a_larger_batch_is_within_the_same_budget(capture: str) -> None:
    model = three()
    planned = planned_three(capture)
    larger = batch(80)

    def step() -> None:
        loss_of(planned(larger)).backward()

    with restored(model):
        step()
        model.zero_grad()
        assert measure_peak(step, resident=[model, larger]).peak <= plan_of_three(capture).memory_budget
    assert plans_of(planned)[1].plain.peak > plan_of_three(capture).memory_budget


@pytest.mark.slow
def test_buckets_of_sequences_train_bit_equal() -> None:
    torch.manual_seed(0)
    case = make_gpt2(4, 48, 64, n_layer=2, n_embd=32, n_head=2)
    plan = solve(case.model, "1GiB", sample=case.sample, capture="graph")
    planned = execute(plan.within((smallest(plan.chain) + plan.plain.peak) // 2), case.model)

    def procedure(model: nn.Module) -> Record:
        for tokens in (48, 32, 48, 32):
            ids = torch.randint(0, 64, (4, tokens))
            model(input_ids=ids, labels=ids).loss.backward()
        return {}

    assert_same(case.model, planned, procedure)
    assert [plan.capture.kind for plan in plans_of(planned)] == ["graph", "graph"]


def test_a_call_with_other_arguments_is_another_shape() -> None:
    torch.manual_seed(0)
    model = ResidualNet(4, 2).train()
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
    planned = execute(solve(model, "1GiB", sample=(images, labels), capture="modules"), model)

    def procedure(model: nn.Module) -> Record:
        model(images, labels).backward()
        nn.functional.cross_entropy(model(images), labels).backward()
        return {}

    assert_same(model, planned, procedure)
    assert len(plans_of(planned)) == 2


@EITHER_CAPTURE
def test_planning_in_the_middle_of_accumulation_counts_gradients_and_leaves_them_alone(capture: str) -> None:
    model, planned = three(), planned_three(capture)

    def procedure(model: nn.Module) -> Record:
        loss_of(model(batch(64))).backward()
        before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        output = model(batch(40))
        for parameter, (grad, value) in zip(model.parameters(), before, strict=True):
            assert grad is not None
            assert value is not None
            assert parameter.grad is grad
            assert torch.equal(grad, value)
        loss_of(output).backward()
        return {}

    assert_same(model, planned, procedure)
    gradients = sum(4 * p.numel() for p in model.parameters())
    assert plans_of(planned)[0].resident["existing gradients"] == 0
    assert plans_of(planned)[1].resident["existing gradients"] >= gradients


def test_where_the_first_plan_counts_gradients_that_exist_a_new_one_does_so_before_there_are_any() -> None:
    model = three()
    with restored(model):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        plan = solve(model, "1GiB", sample=batch(64), capture="modules")
    planned = execute(plan, model)
    with restored(model):
        planned(batch(40))
        assert all(p.grad is None for p in model.parameters())
    first, second = plans_of(planned)
    assert second.resident["existing gradients"] == first.resident["existing gradients"] > 0


@OVERLAPPING
@EITHER_CAPTURE
def test_a_shape_is_planned_for_while_another_step_waits_for_its_backward(capture: str) -> None:
    model, planned = three(), planned_three(capture)

    def procedure(model: nn.Module) -> Record:
        first = loss_of(model(batch(64)))
        second = loss_of(model(batch(40)))
        (first + 2 * second).backward()
        return {}

    assert_same(model, planned, procedure)
    assert len(plans_of(planned)) == 2


def test_the_first_step_of_each_plan_is_watched() -> None:
    model, planned = three(), planned_three(watch=True)
    assert_same(model, planned, lambda m: epochs(m, (64, 40, 40, 64, 64)))
    measure_peak(lambda: None, device="cpu")  # the profiler is free again


@EITHER_CAPTURE
def test_planning_leaves_buffers_and_every_generator_as_they_are(capture: str) -> None:
    model, planned = three(), planned_three(capture)

    def draw(module: nn.Module, args: Any) -> None:
        random.random()
        np.random.rand()  # noqa: NPY002 # the generator that old code draws from

    def procedure(model: nn.Module) -> Record:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 # likewise
        model(batch(40))
        return {
            "python": torch.tensor(random.random(), dtype=torch.float64),
            "numpy": torch.tensor(np.random.rand(), dtype=torch.float64),  # noqa: NPY002 # likewise
        }

    # A graph with hooks in it is refused; blocks run them.
    handle = next(model.children()).register_forward_pre_hook(draw) if capture == "modules" else None
    try:
        assert_same(model, planned, procedure)
    finally:
        if handle is not None:
            handle.remove()


def test_an_optimizer_in_a_hook_sees_no_gradient_of_a_trial() -> None:
    model = three()
    planned = planned_three()
    stepped: list[int] = []

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        stepped.append(1)
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    handles += [p.register_hook(lambda grad: 2 * grad) for p in model.parameters()]
    try:
        assert_same(model, planned, lambda m: epochs_without_optimizer(m, (64, 40)))
    finally:
        for handle in handles:
            handle.remove()
    assert len(stepped) == 2 * 2 * len(handles) // 2


def epochs_without_optimizer(model: nn.Module, sizes: tuple[int, ...]) -> Record:
    for rows in sizes:
        loss_of(model(batch(rows))).backward()
    return {}


@EITHER_CAPTURE
def test_an_input_with_a_history_is_reversed_once_and_by_the_real_step(capture: str) -> None:
    model = three()
    torch.manual_seed(1)
    upstream = nn.Linear(WIDTH, WIDTH)
    plan = solve(model, "1GiB", sample=torch.zeros(64, WIDTH, requires_grad=True), capture=capture)
    planned = execute(plan.within(smallest(plan.chain)), model)

    def procedure(model: nn.Module) -> Record:
        upstream.zero_grad()
        for rows in (64, 40):
            loss_of(model(upstream(batch(rows)).tanh())).backward()
        return {"upstream": upstream.weight.grad}

    assert_same(model, planned, procedure)
    assert len(plans_of(planned)) == 2


@EITHER_CAPTURE
def test_under_autocast_the_new_plan_is_made_under_the_same_autocast(capture: str) -> None:
    model = three()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = solve(model, "1GiB", sample=torch.zeros(64, WIDTH), capture=capture)
    planned = execute(plan.within(smallest(plan.chain)), model)

    def procedure(model: nn.Module) -> Record:
        for rows in (64, 40, 40):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(batch(rows))
            assert output.dtype == torch.bfloat16
            loss_of(output.float()).backward()
        return {}

    assert_same(model, planned, procedure)
    assert [plan.capture.kind for plan in plans_of(planned)] == [capture, capture]


def test_a_loaded_plan_gets_others_too(tmp_path: Path) -> None:
    plan_of_three("graph").save(tmp_path / "plan.json")
    model = copy.deepcopy(three())
    planned = execute(Plan.load(tmp_path / "plan.json"), model)
    assert_same(three(), planned, lambda m: epochs(m, (40, 64)))
    assert len(plans_of(planned)) == 2


def test_what_the_solver_was_given_it_is_given_again() -> None:
    model = three()
    plan = solve(
        model, "1GiB", sample=batch(64), capture="modules", solver="selective", parameters={"keep": "^1$"}
    )
    planned = execute(plan, model)
    again = execute(Plan.from_json(plan.to_json()), model)
    with restored(model):
        planned(batch(40))
        again(batch(40))
    new = plans_of(planned)[1]
    assert new.solver == "selective"
    assert new.program.kept == plan.program.kept
    assert plans_of(again)[1].solver == "optimal"  # the data of a plan do not have it


# ---- how much is said, and how often ---------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the project's logger said, from WARNING on: shown by a script that has set up no logging."""
    return [r.getMessage() for r in caplog.records if r.name == "rematplan" and r.levelno >= logging.WARNING]


def test_a_new_plan_is_announced_with_the_shape_and_a_known_shape_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, planned = three(), planned_three()
    with restored(model):
        planned(batch(40))
        said = lines(caplog)
        planned(batch(64))
        planned(batch(40))
    assert len(said) == 2
    assert "shape (40, 16)" in said[0]
    assert "instead of a tensor of shape (64, 16)" in said[0]
    assert "planned in" in said[1]
    assert lines(caplog) == said


def test_plain_runs_other_shapes_plainly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model, planned = three(), planned_three(on_new_shape="plain")
    assert_same(model, planned, lambda m: epochs(m, (40, 64, 40)))
    assert len(plans_of(planned)) == 1
    assert [line for line in lines(caplog) if "run without a plan" in line] == lines(caplog)[:1]
    assert len(lines(caplog)) == 1


def test_error_refuses_other_shapes() -> None:
    planned = planned_three(on_new_shape="error")
    with pytest.raises(PlanMismatch, match=r"made for a tensor of shape \(64, 16\).*got.*\(40, 16\)"):
        planned(batch(40))


def test_the_least_recently_used_plan_goes_and_the_first_time_that_is_said() -> None:
    model, planned = three(), planned_three(max_plans=3)

    def rows() -> list[int]:
        return [int(plan.capture.leaves.split("[")[3].split(",")[0]) for plan in plans_of(planned)]

    with restored(model):
        for size in (40, 32, 64, 40):
            planned(batch(size))
        assert rows() == [64, 32, 40]
        with pytest.warns(NewShapeWarning, match=r"max_plans=3 .*Pad batches to fewer shapes"):
            planned(batch(24))
        assert rows() == [64, 40, 24]
        planned(batch(32))  # again, without a warning
        assert rows() == [64, 24, 32]


def test_plans_for_several_shapes_can_be_given_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model, first = three(), plan_of_three("modules")
    second = solve(model, first.memory_budget, sample=batch(40), capture="modules")
    planned = execute([first, second], model)
    assert_same(model, planned, lambda m: epochs(m, (40, 64)))
    assert lines(caplog) == []
    assert plans_of(planned) == (first, second)


def test_copies_take_all_plans_and_options_along(caplog: pytest.LogCaptureFixture) -> None:
    model, planned = three(), planned_three(max_plans=5)
    with restored(model):
        planned(batch(40))
    said = len(lines(caplog))
    for double in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        assert plans_of(double) == plans_of(planned)
        assert_same(copy.deepcopy(model), double, lambda m: epochs(m, (64, 40)))
    assert len(lines(caplog)) == said
    error = copy.deepcopy(planned_three(on_new_shape="error"))
    with pytest.raises(PlanMismatch):
        error(batch(40))


# ---- what cannot be planned ------------------------------------------------------------------------------


@EITHER_CAPTURE
def test_a_budget_that_a_shape_cannot_meet_is_an_error_that_names_it_and_changes_nothing(
    capture: str,
) -> None:
    model, planned = three(), planned_three(capture)
    with restored(model):
        loss_of(planned(batch(64))).backward()
        before = state(model)
        larger = torch.zeros(640, WIDTH)
        with pytest.raises(InfeasibleBudget, match=r"shape \(640, 16\)") as caught:
            planned(larger)
        assert caught.value.smallest > caught.value.budget == plan_of_three(capture).memory_budget
        assert_equal(state(model), before)
        loss_of(planned(batch(64))).backward()


class Skipping(nn.Module):
    """Leaves out a block where the batch is small."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[1:] if len(x) < 32 else self.blocks:
            x = block(x)
        return x


def test_a_shape_that_cannot_be_captured_is_an_error_that_says_what_to_do() -> None:
    torch.manual_seed(0)
    model = Skipping().train()
    plan = solve(model, "1GiB", sample=batch(64), capture=[*model.blocks])
    with pytest.raises(CaptureError, match=r"shape \(16, 16\).*on_new_shape='plain'"):
        execute(plan, model)(batch(16))
    assert_same(model, execute(plan, model, on_new_shape="plain"), lambda m: epochs(m, (64, 16)))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class Together(nn.Module):
    """A mean over all ranks between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
            mean = x.detach().mean(0)
            torch.distributed.all_reduce(mean)
            x = x - mean
        return x


@pytest.mark.usefixtures("process_group")
def test_a_trial_that_would_wait_for_other_ranks_is_not_run_and_the_shape_runs_plainly() -> None:
    torch.manual_seed(0)
    model = Together().train()
    planned = execute(solve(model, "1GiB", sample=torch.randn(64, 16), capture=[*model.blocks]), model)
    with pytest.warns(
        NewShapeWarning, match=r"all_?reduce.* waits for other ranks.*pass plans for all shapes"
    ):
        assert_same(model, planned, lambda m: epochs(m, (40, 64)))
    assert len(plans_of(planned)) == 1


@pytest.mark.usefixtures("process_group")
def test_parameters_are_the_model_s_own_again_when_a_shape_was_planned_for() -> None:
    model, planned = three(), planned_three()
    before = [(p, p.grad) for p in planned.parameters()]
    assert_same(model, planned, lambda m: epochs(m, (40, 64)))
    assert len(plans_of(planned)) == 2
    assert all(p is other for (p, _), other in zip(before, planned.parameters(), strict=True))


def test_while_a_profiler_counts_the_shape_runs_plainly() -> None:
    model, planned = three(), planned_three()
    with (
        restored(model),
        torch.profiler.profile(profile_memory=True, acc_events=True),
        pytest.warns(NewShapeWarning, match="a profiler is running"),
    ):
        planned(batch(40))
    assert len(plans_of(planned)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_new_shape": "guess"}, r"on_new_shape='guess'.*'plan', 'plain', 'error'"),
        ({"max_plans": 1}, r"max_plans=1, expected an int of at least 2"),
        ({"on_oom": "pray"}, r"on_oom='pray'"),
        ({"check": "all"}, r"check='all'.*'none', 'metadata', 'values'"),
    ],
)
def test_options_that_are_unknown_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned_three(**options)


def test_a_list_of_no_plans_is_a_type_error() -> None:

    with pytest.raises(TypeError, match="plan is a list"):
        execute([], three())
