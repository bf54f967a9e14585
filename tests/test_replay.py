"""The replay executor under everything that autograd lets a user do, each against the plain model."""

from __future__ import annotations

import copy
import functools
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from executors import execute
from executors.nested import nested
from scheduler import Chain, InfeasibleBudget, Plan, Schedule, solve, solve_chain
from scheduler.costs.peak import count_bytes
from scheduler.schedule import COPY_ACTIONS, Action, Backward, Checkpoint, DeviceAction, Forward, Free, Keep
from scheduler.solvers import SOLVERS
from tests.brute_force import persistent_schedules
from tests.helpers import smallest
from tests.models import Block, Case, tiny
from tests.steps import (
    Record,
    assert_equal,
    at_its_tightest,
    case_of,
    executor_of,
    loss_of,
    plan_for,
    replan,
    restored,
    scheduled,
    state,
    thinnest,
    tightest,
    train,
    within,
)

EACH_CAPTURE = pytest.mark.parametrize("capture", ["graph", "modules", "options"])
EITHER_CAPTURE = pytest.mark.parametrize("capture", ["graph", "modules"])
CPU = torch.device("cpu")
Procedure = Callable[[nn.Module], Record]


def planned_tiny(capture: str) -> tuple[Case, nn.Module]:
    """The tiny case and its model, planned as tightly as it can be."""
    case = case_of("tiny")
    if capture == "options":
        return case, execute(thinnest(plan_for("tiny", "graph")), case.model)
    return case, execute(tightest(plan_for("tiny", capture)), case.model)


def planned(case: Case, capture: str) -> nn.Module:
    """The model of another case, planned as tightly as it can be."""
    plan = at_its_tightest(case, capture)
    assert max(plan.timeline.runs) > 1 or any(plan.program.kept), "nothing is recomputed"
    return execute(plan, case.model)


def outcome(model: nn.Module, procedure: Procedure) -> Record:
    """What a procedure returns, and the state that it leaves behind, from a fixed seed."""
    with restored(model):
        torch.manual_seed(17)
        return {**procedure(model), **state(model)}


def assert_same(plain: nn.Module, planned: nn.Module, procedure: Procedure) -> None:
    """The procedure has the same outcome with the planned model as with the plain one, bit for bit."""
    assert_equal(outcome(planned, procedure), outcome(plain, procedure))


# ---- ways to go backward ---------------------------------------------------------------------------------


@EACH_CAPTURE
def test_a_second_backward_through_a_retained_graph(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        loss.backward(retain_graph=True)
        first = state(model)
        loss.backward(retain_graph=True)
        loss.backward()
        return {f"first {name}": value for name, value in first.items()}

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_a_second_backward_through_a_released_graph_is_autograd_s_error(capture: str) -> None:
    case, planned = planned_tiny(capture)
    with restored(case.model):
        loss = loss_of(case(planned))
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@EACH_CAPTURE
def test_autograd_grad_gives_gradients_and_leaves_none_behind(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        grads = torch.autograd.grad(loss_of(case(model)), list(model.parameters()))
        return {f"grad {i}": grad for i, grad in enumerate(grads)}

    assert_same(case.model, planned, procedure)
    with restored(case.model):
        procedure(planned)
        assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("block", [0, 2, 5])
@EACH_CAPTURE
def test_backward_for_some_inputs_only(capture: str, block: int) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss_of(case(model)).backward(inputs=list(within(model, str(block)).parameters()))
        return {}

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_grad_of_one_block_after_another_from_one_graph(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        record: Record = {}
        for block in (4, 0, 5, 2):
            weight = within(model, f"{block}.linear").weight
            record[f"block {block}"] = torch.autograd.grad(loss, [weight], retain_graph=True)[0]
        loss.backward()
        return record

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_the_gradient_of_an_input(capture: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 16, requires_grad=True)
    model = tiny().model
    case = Case(model, batch, (batch,))

    def procedure(model: nn.Module) -> Record:
        batch.grad = None
        loss_of(case(model)).backward()
        return {"input": batch.grad}

    assert_same(model, planned(case, capture), procedure)
    assert batch.grad is not None


@EACH_CAPTURE
def test_gradients_accumulate_over_several_steps(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        for _ in range(3):
            loss_of(model(torch.randn(64, 16))).backward()
        return {}

    assert_same(case.model, planned, procedure)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@EACH_CAPTURE
def test_several_forwards_are_alive_at_once_and_reversed_in_any_order(
    capture: str, order: tuple[int, ...]
) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        losses = [loss_of(model(torch.randn(64, 16))) for _ in range(3)]
        for i in order:
            losses[i].backward()
        return {}

    def all_at_once(model: nn.Module) -> Record:
        torch.stack([loss_of(model(torch.randn(64, 16))) for _ in range(3)]).sum().backward()
        return {}

    assert_same(case.model, planned, procedure)
    assert_same(case.model, planned, all_at_once)


class TwoOutputs(nn.Module):
    """Returns what comes out halfway, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halfway = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 2:
                halfway = x
        return self.head(halfway), self.head(x)


@functools.cache
def two_outputs(capture: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, batch = TwoOutputs().train(), torch.randn(64, 16)
    return model, planned(Case(model, batch, (batch,)), capture)


@pytest.mark.parametrize(
    "order", ["early, late", "late, early", "early alone", "late alone", "sum", "early, sum"]
)
@EACH_CAPTURE
def test_losses_on_parts_of_the_output_in_any_order(capture: str, order: str) -> None:
    model, planned = two_outputs(capture)
    batch = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))

    def procedure(model: nn.Module) -> Record:
        early, late = model(batch)
        losses = {
            "early": loss_of(early),
            "late": loss_of(late),
            "early alone": loss_of(early),
            "late alone": loss_of(late),
            "sum": loss_of(early) + 2 * loss_of(late),
        }
        names = order.split(", ")
        for name in names:
            losses[name].backward(retain_graph=name != names[-1])
        return {}

    assert_same(model, planned, procedure)


@EACH_CAPTURE
def test_double_backward_of_a_gradient_penalty(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        penalty = torch.stack([grad.pow(2).sum() for grad in grads]).sum()
        (loss + 10 * penalty).backward()
        return {"penalty": penalty.detach()}

    assert_same(case.model, planned, procedure)


# ---- hooks and errors ------------------------------------------------------------------------------------


@EACH_CAPTURE
def test_parameter_hooks_fire_once_and_may_change_the_gradient(capture: str) -> None:
    case, planned = planned_tiny(capture)
    fired: list[str] = []

    def tripled(name: str, grad: Tensor) -> Tensor:
        fired.append(name)
        return 3 * grad

    def done(name: str, parameter: Tensor) -> None:
        fired.append(f"{name} done")

    def procedure(model: nn.Module) -> Record:
        handles: list[Any] = []
        for name, parameter in model.named_parameters():
            handles.append(parameter.register_hook(functools.partial(tripled, name)))
            handles.append(parameter.register_post_accumulate_grad_hook(functools.partial(done, name)))
        fired.clear()
        try:
            loss_of(case(model)).backward()
        finally:
            for handle in handles:
                handle.remove()
        names = [n for n, _ in model.named_parameters()]
        assert sorted(fired) == sorted([*names, *(f"{n} done" for n in names)])
        return {}

    assert_same(case.model, planned, procedure)


def test_module_hooks_fire_once_per_step_under_module_capture() -> None:
    case, planned = planned_tiny("modules")
    fired: list[str] = []

    def procedure(model: nn.Module) -> Record:
        block = within(model, "2")
        handles = [
            block.register_forward_pre_hook(lambda m, args: fired.append("before")),
            block.register_forward_hook(lambda m, args, out: fired.append("after")),
            block.register_full_backward_hook(lambda m, gi, go: fired.append("backward")),
        ]
        fired.clear()
        try:
            loss_of(case(model)).backward()
        finally:
            for handle in handles:
                handle.remove()
        assert fired == ["before", "after", "backward"]
        return {}

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_after_an_exception_in_backward_the_next_step_is_right(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def fail(grad: Tensor) -> None:
        raise KeyError("from a hook")

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        handle = within(model, "2.linear").weight.register_hook(fail)
        try:
            with pytest.raises(KeyError, match="from a hook"):
                loss.backward()
        finally:
            handle.remove()
        del loss
        for parameter in model.parameters():
            parameter.grad = None
        loss_of(case(model)).backward()
        return {}

    assert_same(case.model, planned, procedure)


def test_after_an_exception_in_a_re_run_the_next_step_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    case, planned = planned_tiny("modules")
    with restored(case.model):
        expected = train(case, case.model)
    block = within(case.model, "1")
    assert isinstance(block, Block)
    with restored(case.model):
        loss = loss_of(case(planned))
        generators = torch.get_rng_state()
        with monkeypatch.context() as patch:
            patch.setattr(block.act, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
        assert torch.equal(torch.get_rng_state(), generators)
        del loss
    with restored(case.model):
        assert_equal(train(case, planned), expected)


@EACH_CAPTURE
def test_an_abandoned_forward_leaves_nothing_alive(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def forward(mark: Callable[[], None]) -> None:
        case(planned)

    with restored(case.model):
        forward(lambda: None)
        gc.collect()
        gc.disable()
        try:
            assert count_bytes(forward, CPU).end == 0
        finally:
            gc.enable()


@EACH_CAPTURE
def test_a_step_leaves_nothing_alive_but_the_gradients(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def step(mark: Callable[[], None]) -> None:
        loss_of(case(planned)).backward()

    with restored(case.model):
        step(lambda: None)
        case.model.zero_grad()
        gc.collect()
        gc.disable()
        try:
            end = count_bytes(step, CPU).end
        finally:
            gc.enable()
        assert end == sum(p.nbytes for p in case.model.parameters())


@EACH_CAPTURE
def test_a_partial_backward_that_is_abandoned_leaves_nothing_alive(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def step(mark: Callable[[], None]) -> None:
        loss = loss_of(case(planned))
        torch.autograd.grad(loss, [within(case.model, "4.linear").weight], retain_graph=True)
        torch.autograd.grad(loss, [within(case.model, "3.linear").weight])

    with restored(case.model):
        step(lambda: None)
        gc.collect()
        gc.disable()
        try:
            assert count_bytes(step, CPU).end == 0
        finally:
            gc.enable()


@EACH_CAPTURE
def test_a_parameter_changed_between_forward_and_backward_raises_or_makes_no_difference(capture: str) -> None:
    case, planned = planned_tiny(capture)
    raised = []

    def backward_after_change(model: nn.Module, name: str) -> Record | str:
        with restored(model):
            torch.manual_seed(0)
            loss = loss_of(case(model))
            with torch.no_grad():
                model.get_parameter(name).add_(1.0)
            try:
                loss.backward()
            except RuntimeError as error:
                return str(error)
            return state(model)

    for name, _ in case.model.named_parameters():
        got, expected = backward_after_change(planned, name), backward_after_change(case.model, name)
        if isinstance(got, str):
            assert "modified by an inplace operation" in got
            raised.append(name)
        else:
            assert not isinstance(expected, str), f"{name}: the plain model raises, the planned one does not"
            assert_equal(got, expected)
    # Of a block that is run again every parameter is read again, its bias too.
    block = 1 if capture == "options" else 0  # the first whose linear is run again
    assert {f"{block}.linear.weight", f"{block}.linear.bias", f"{block}.norm.bias"} <= set(raised)


@EACH_CAPTURE
def test_an_optimizer_step_before_backward_raises(capture: str) -> None:
    case, planned = planned_tiny(capture)
    with restored(case.model):
        optimizer = torch.optim.SGD(planned.parameters(), lr=0.1)
        loss_of(case(planned)).backward()
        loss = loss_of(case(planned))
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@EACH_CAPTURE
def test_an_input_changed_between_forward_and_backward_raises(capture: str) -> None:
    case, planned = planned_tiny(capture)
    batch = case.args[0].clone()
    with restored(case.model):
        loss = loss_of(planned(batch))
        batch.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- models ----------------------------------------------------------------------------------------------


def frozen_prefix() -> Case:
    case = tiny()
    for block in ("0", "1"):
        within(case.model, block).requires_grad_(False)
    return case


def frozen_in_between() -> Case:
    case = tiny()
    for part in ("1", "4", "3.linear"):
        within(case.model, part).requires_grad_(False)
    return case


def tied_weights() -> Case:
    case = tiny()
    within(case.model, "4.linear").weight = within(case.model, "0.linear").weight
    within(case.model, "5").linear = within(case.model, "1.linear")
    return case


def half_precision() -> Case:
    case = tiny()
    batch = case.args[0].bfloat16()
    return Case(case.model.bfloat16(), batch, (batch,))


@pytest.mark.parametrize("build", [frozen_prefix, frozen_in_between, tied_weights, half_precision])
@EACH_CAPTURE
def test_models_with_frozen_or_tied_or_narrow_parameters_train_bit_equal(
    capture: str, build: Callable[[], Case]
) -> None:
    case = build()
    model = planned(case, capture)
    with restored(case.model):
        got = train(case, model)
    with restored(case.model):
        assert_equal(got, train(case, case.model))


class Stateful(nn.Module):
    """Reads a buffer that it changes at every call, as spectral normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(16))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5).add_(self.linear.weight.mean(0).abs())
        return torch.tanh(self.linear(x) * self.scale.clone())


@EITHER_CAPTURE
def test_a_buffer_that_a_stage_reads_and_changes_is_for_a_re_run_what_it_was(capture: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    case = Case(nn.Sequential(*(Stateful() for _ in range(6))).train(), batch, (batch,))
    model = planned(case, capture)
    with restored(case.model):
        got = train(case, model, steps=3)
    with restored(case.model):
        assert_equal(got, train(case, case.model, steps=3))

    def two_at_once(model: nn.Module) -> Record:
        losses = [loss_of(case(model)) for _ in range(2)]
        losses[1].backward()
        losses[0].backward()
        return {}

    assert_same(case.model, model, two_at_once)


@EITHER_CAPTURE
def test_a_frozen_weight_changed_between_forward_and_backward_raises(capture: str) -> None:
    """Nothing is run again for a layer whose weight is frozen; the weight itself is what its backward reads."""
    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    layers = [nn.Linear(16, 16, bias=False) for _ in range(8)]
    for layer in layers[2:]:
        layer.requires_grad_(False)
    case = Case(nn.Sequential(*layers).train(), batch, (batch,))
    plan = solve(case.model, "1GiB", sample=case.sample, capture=capture)
    # Every saved tensor that the schedule may drop is dropped.
    inner = [k for k, stage in enumerate(plan.chain.stages) if stage.recomputable][:-1]
    glue = len(plan.chain) - len(inner)
    assert glue in (1, 3)
    count = len(plan.chain)
    first, last = inner[0], inner[-1]
    before, after = range(first), range(last + 1, count)
    actions: list[Action] = [*map(Keep, before), *map(Checkpoint, inner), *map(Keep, after)]
    actions += map(Backward, reversed(after))
    for k in reversed(inner):
        actions += [Keep(k), Backward(k)]
    actions += map(Backward, reversed(before))
    model = execute(scheduled(plan, Schedule(tuple(actions))), case.model)
    for number in (2, 4):
        with restored(case.model):
            loss = loss_of(case(model))
            with torch.no_grad():
                layers[number].weight.add_(1.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@EACH_CAPTURE
def test_forward_under_autocast_and_backward_outside(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    with restored(case.model):
        got = train(case, planned, context=autocast)
    with restored(case.model):
        expected = train(case, case.model, context=autocast)
    assert expected[0]["output 0"] is not None
    assert expected[0]["output 0"].dtype == torch.bfloat16
    assert_equal(got, expected)


@EACH_CAPTURE
def test_forward_outside_autocast_and_backward_inside(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
        return {}

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_random_numbers_drawn_between_forward_and_backward_are_those_of_the_plain_step(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        first = loss_of(case(model))
        drawn = torch.rand(3)
        second = loss_of(case(model))
        first.backward()
        drawn_too = torch.rand(3)
        second.backward()
        return {"drawn": drawn, "drawn too": drawn_too}

    assert_same(case.model, planned, procedure)


# ---- the executor does what the schedule says ------------------------------------------------------------


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
    for block, module in zip(executor.capture.blocks, executor.modules, strict=True):
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
        for module in executor.modules:
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


class Smooth(nn.Module):
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


def test_every_persistent_schedule_of_four_blocks_runs_as_nested_checkpoints_do() -> None:
    case, plan = smooth_plan(4)
    schedules = list(persistent_schedules(plan.chain))
    assert len(schedules) > 20
    for schedule in schedules:
        assert_agrees_with_nested(case, scheduled(plan, schedule))


def test_under_every_persistent_schedule_gradients_come_right_in_any_order() -> None:
    """Partial, repeated and out-of-order backwards, of graphs that are retained or not; then nothing is left."""
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
    """Four blocks under a schedule that is not persistent: boundaries 3 and 2 go before their stages are reversed."""
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


def test_deep_chains_do_not_hit_python_s_recursion_limit() -> None:
    case = smooth(300)
    plan = tightest(solve(case.model, "1GiB", sample=case.sample, capture="modules", costs="roofline"))
    plain = copy.deepcopy(case.model)
    got, runs = run_and_count(case, execute(plan, case.model))
    assert max(runs) > 1
    assert_equal(got, run_and_count(Case(plain, case.sample, case.args), plain)[0])
