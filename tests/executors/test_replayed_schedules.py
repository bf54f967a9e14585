"""Schedules run as stated: the runs of each stage, in the order of nested checkpoints."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rematplan import Chain, InfeasibleBudget, Plan, Schedule, execute, solve, solve_chain
from rematplan.scheduler.core.schedule import (
    COPY_ACTIONS,
    Action,
    Backward,
    Checkpoint,
    DeviceAction,
    Forward,
    Free,
    Keep,
)
from rematplan.scheduler.costs.meters.peak import count_bytes
from rematplan.scheduler.solvers import SOLVERS
from tests.shared.brute_force import persistent_schedules
from tests.shared.helpers import smallest
from tests.shared.models import Block, Case
from tests.shared.nested import nested
from tests.shared.runs import CountsRuns
from tests.shared.steps import (
    CPU,
    EITHER_CAPTURE,
    OVERLAPPING,
    Record,
    assert_equal,
    assert_same,
    case_of,
    executor_of,
    loss_of,
    plan_for,
    replan,
    restored,
    scheduled,
    state,
    tightest,
    within,
)

pytestmark = OVERLAPPING


@contextmanager
def counted_stages(model: nn.Module) -> Iterator[list[int]]:
    """How often each stage of a planned model runs forward within it; glue counts as one run."""
    executor = executor_of(model)
    if hasattr(executor, "stages"):
        counts, stages = [0] * len(executor.stages), executor.stages

        def counting(k: int, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                counts[k] += 1
                return function(*arguments)

            return run

        executor.stages = [replace(s, function=counting(k, s.function)) for k, s in enumerate(stages)]
        try:
            yield counts
        finally:
            executor.stages = stages
        return
    counts = [1 if index is None else 0 for index in executor.capture.stages]
    handles = []
    for block in executor.capture.blocks:
        module = executor.modules[block.name]
        inner = module.linear if isinstance(module, Block) else module

        def count(*_: Any, stage: int = block.stage) -> None:
            counts[stage] += 1

        if isinstance(module, Block):
            handles.append(inner.register_forward_pre_hook(count))
        else:  # the executor calls the forward itself, so that a hook on the block sees the first run only
            forward = module.forward
            module.forward = lambda *a, f=forward, c=count: (c(), f(*a))[1]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        for module in executor.modules.values():
            module.__dict__.pop("forward", None)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
@EITHER_CAPTURE
def test_every_stage_runs_as_often_as_the_plan_says(capture: str, fraction: float) -> None:
    case, plan = case_of("tiny"), plan_for("tiny", capture)
    low = smallest(plan.chain)
    plan = replan(plan, low + int(fraction * (plan.plain.peak - low)))
    model = execute(plan, case.model)
    with restored(case.model), counted_stages(model) as runs:
        loss_of(case(model)).backward()
        assert tuple(runs) == plan.timeline.runs


class Smooth(CountsRuns):
    """Linear, GELU, Dropout: no buffers, for ``checkpoint`` would change them at every run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.2)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        result: Tensor = x + 0.1 * self.drop(nn.functional.gelu(self.linear(x)))
        return result


def smooth(blocks: int) -> Case:
    torch.manual_seed(0)
    batch = torch.randn(32, 16)
    return Case(nn.Sequential(*(Smooth() for _ in range(blocks))).train(), batch, (batch,))


@functools.cache
def smooth_plan(blocks: int) -> tuple[Case, Plan]:
    case = smooth(blocks)
    return case, solve(case.model, "1GiB", sample=case.sample, capture="modules")


def of_blocks(schedule: Schedule, blocks: int) -> Schedule:
    """A schedule of [glue, blocks, glue] without the glue, which is kept throughout."""

    def shifted(action: DeviceAction) -> DeviceAction:
        if isinstance(action, Free):
            return Free(action.boundary - 1)
        return replace(action, stage=action.stage - 1)

    actions = [a for a in schedule if not isinstance(a, COPY_ACTIONS)]
    inside = [a for a in actions if isinstance(a, Free) or 1 <= a.stage <= blocks]
    assert [a for a in schedule if a not in inside] == [
        Keep(0),
        Keep(blocks + 1),
        Backward(blocks + 1),
        Backward(0),
    ]
    return Schedule(tuple(shifted(action) for action in inside))


def recompute(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result: Tensor = checkpoint(function, x, use_reentrant=False)
    return result


def run_and_count(case: Case, model: Callable[[Tensor], Tensor]) -> tuple[Record, list[int]]:
    """Gradients and random-number state after a step, and how often each block ran."""
    blocks = list(case.model.children())
    for block in blocks:
        block.runs = 0  # type: ignore[assignment] # a plain counter
    with restored(case.model):
        torch.manual_seed(3)
        loss_of(model(case.args[0])).backward()
        return state(case.model), [block.runs for block in blocks]  # type: ignore[misc] # a plain counter


def assert_agrees_with_nested(case: Case, plan: Plan) -> None:
    """Gradients and counts of the replay executor are those of nested checkpoints, and of the referee."""
    blocks = list(case.model.children())
    oracle = nested(of_blocks(plan.schedule, len(blocks)), blocks, recompute)
    expected, counts = run_and_count(case, oracle)
    got, runs = run_and_count(case, execute(plan, case.model))
    assert runs == counts
    assert runs == list(plan.timeline.runs[1:-1])
    assert_equal(got, expected)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0])
def test_solved_schedules_run_as_nested_checkpoints_do(fraction: float) -> None:
    case, plan = smooth_plan(10)
    low = smallest(plan.chain)
    assert_agrees_with_nested(case, replan(plan, low + int(fraction * (plan.plain.peak - low))))


def with_glue(schedule: Schedule, blocks: int) -> Schedule:
    """A schedule of the blocks alone, with the glue before and after them kept throughout."""
    actions = [
        Free(a.boundary + 1) if isinstance(a, Free) else replace(a, stage=a.stage + 1)
        for a in schedule
        if not isinstance(a, COPY_ACTIONS)
    ]
    last = blocks + 1
    turn = 1 + next(i for i, a in enumerate(actions) if not isinstance(a, Free) and a.stage == blocks)
    return Schedule((Keep(0), *actions[:turn], Keep(last), Backward(last), *actions[turn:], Backward(0)))


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("solver", [s.name for s in SOLVERS.values() if s.executable and not s.required])
def test_schedules_of_every_solver_run_as_nested_checkpoints_do(solver: str, slots: int) -> None:
    case, plan = smooth_plan(10)
    uniform = Chain.from_arrays([1.0] * 10, [2.0] * 10, [10] * 11, [30] * 10)
    try:
        schedule = solve_chain(uniform, 60 + 10 * slots, solver)
    except InfeasibleBudget as error:
        schedule = solve_chain(uniform, error.smallest, solver)
    assert_agrees_with_nested(case, scheduled(plan, with_glue(schedule, 10)))


@pytest.mark.slow
def test_every_persistent_schedule_of_four_blocks_runs_as_nested_checkpoints_do() -> None:
    case, plan = smooth_plan(4)
    schedules = list(persistent_schedules(plan.chain))
    assert len(schedules) > 20
    for schedule in schedules:
        assert_agrees_with_nested(case, scheduled(plan, schedule))


@pytest.mark.slow
def test_under_every_persistent_schedule_gradients_come_right_in_any_order() -> None:
    """Partial, repeated and out-of-order backwards, of graphs retained or not, leave nothing behind."""
    case, plan = smooth_plan(4)
    parameters = list(case.model.parameters())
    generator = random.Random(0)

    def procedure(order: list[int], retained: bool, model: nn.Module) -> Record:
        loss = loss_of(case(model))
        record: Record = {}
        for turn, i in enumerate(order):
            record[f"{turn}: {i}"] = torch.autograd.grad(loss, [parameters[i]], retain_graph=True)[0]
        loss.backward(retain_graph=retained)
        if retained:
            loss.backward()
        return record

    for schedule in persistent_schedules(plan.chain):
        model = execute(scheduled(plan, schedule), case.model)
        order = generator.choices(range(len(parameters)), k=generator.randint(1, 5))
        steps = functools.partial(procedure, order, generator.random() < 0.5)
        assert_same(case.model, model, steps)
        with restored(case.model):
            left = count_bytes(lambda mark, run=steps, model=model: [run(model)].clear(), CPU).end  # type: ignore[misc]
        assert left == sum(p.nbytes for p in parameters)


def freeing() -> tuple[Case, Plan]:
    """Four blocks under a schedule that is not persistent: boundaries 3 and 2 go before their backwards."""
    case, plan = smooth_plan(4)
    actions = (
        *(Keep(0), Checkpoint(1), Checkpoint(2), Checkpoint(3), Keep(4), Keep(5), Backward(5), Backward(4)),
        *(Free(3), Forward(2), Keep(3), Backward(3)),
        *(Free(2), Forward(1), Keep(2), Backward(2)),
        *(Keep(1), Backward(1), Backward(0)),
    )
    return case, scheduled(plan, Schedule(actions))


def test_a_schedule_that_frees_boundaries_early_trains_bit_equal_and_runs_as_often_as_it_says() -> None:
    case, plan = freeing()
    got, runs = run_and_count(case, execute(plan, case.model))
    expected, _ = run_and_count(case, case.model)
    assert_equal(got, expected)
    assert runs == list(plan.timeline.runs[1:-1]) == [3, 3, 2, 1]


@pytest.mark.parametrize("order", [(3, 3), (0, 3, 0), (2, 1, 3), (1, 2, 1, 2)])
def test_where_the_schedule_let_go_of_a_boundary_the_nearest_one_serves(order: tuple[int, ...]) -> None:
    case, plan = freeing()

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        record: Record = {}
        for turn, block in enumerate(order):
            weight = within(case.model, f"{block}.linear").weight
            record[f"{turn}"] = torch.autograd.grad(loss, [weight], retain_graph=True)[0]
        loss.backward(retain_graph=True)
        loss.backward()
        return record

    assert_same(case.model, execute(plan, case.model), procedure)


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        ((Checkpoint(0), Keep(1), Backward(1), Free(0), Keep(0), Backward(0)), "action 3 is Free"),
        ((Keep(0), Keep(1), Backward(1)), "action 3 is the end, expected Backward"),
        ((Keep(0), Keep(1), Backward(1), Backward(0), Backward(0)), "after the last backward"),
        ((Keep(0), Keep(1, 1), Backward(1), Backward(0)), "expected Checkpoint"),
        ((), "action 0 is the end"),
    ],
)
def test_nested_refuses_what_is_no_persistent_schedule(actions: tuple[Action, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        nested(Schedule(actions), [nn.Identity(), nn.Identity()], recompute)


@pytest.mark.slow
def test_deep_chains_do_not_hit_python_s_recursion_limit() -> None:
    case = smooth(300)
    plan = tightest(solve(case.model, "1GiB", sample=case.sample, capture="modules", costs="roofline"))
    plain = copy.deepcopy(case.model)
    got, runs = run_and_count(case, execute(plan, case.model))
    assert max(runs) > 1
    assert_equal(got, run_and_count(Case(plain, case.sample, case.args), plain)[0])
