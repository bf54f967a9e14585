"""Out of memory: a tighter plan runs the forward or the whole step again, bit for bit like the plain step."""

from __future__ import annotations

import functools
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rematplan import Plan, execute, measure_peak, plan_of, run_step, solve
from rematplan.scheduler.core.errors import PeakWarning
from tests.shared.helpers import smallest
from tests.shared.models import Block
from tests.shared.steps import EITHER_CAPTURE, Record, assert_equal, loss_of, outcome, restored, state

WIDTH = 16
ROWS = 64


class RunsOut(TorchDispatchMode):
    """Let the ``nth`` call of an op run out of memory within the block; again at each in ``also``.

    Attributes:
        alive: at the first op after that, how many of the activations that were made before it are alive.
    """

    def __init__(self, op: str, nth: int, also: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.op, self.at, self.count = op, {nth, *also}, 0
        self.made: list[weakref.ref[Tensor]] = []
        self.alive: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.count >= min(self.at) and self.alive is None:
            self.alive = sum(each() is not None for each in self.made)
        if str(func).startswith(f"aten.{self.op}."):
            self.count += 1
            if self.count in self.at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        result = func(*args, **(kwargs or {}))
        if self.alive is None and str(func) in ("aten.addmm.default", "aten.gelu.default"):
            self.made.append(weakref.ref(result))
        return result


@functools.cache
def four() -> nn.Module:
    """Four blocks, with BatchNorm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH) for _ in range(4)), nn.Linear(WIDTH, 4)).train()


@functools.cache
def plan_of_four(capture: str) -> Plan:
    """A little below what keeping everything takes."""
    plan = solve(four(), "1GiB", sample=torch.zeros(ROWS, WIDTH), capture=capture)
    return plan.within(plan.plain.peak - 1)


def planned_four(capture: str, plan: Plan | None = None) -> nn.Module:
    return execute(plan or plan_of_four(capture), four(), on_oom="replan")


def train(model: nn.Module, context: Callable[[int], Any] | None = None) -> Record:
    """Three steps; ``context`` gives what each forward and backward runs within."""
    record: Record = {}
    for step in range(3):
        batch = torch.randn(ROWS, WIDTH)

        def forward_and_backward(batch: Tensor = batch) -> Tensor:
            loss = loss_of(model(batch))
            loss.backward()
            return loss.detach()

        if context is None:
            record[f"loss {step}"] = forward_and_backward()
        else:
            with context(step):
                record[f"loss {step}"] = run_step(model, forward_and_backward)
        record |= {f"{step}: {name}": value for name, value in state(model).items()}
        model.zero_grad()
    return record


@functools.cache
def plain_steps() -> Record:
    return outcome(four(), train)


def peak_of(model: nn.Module) -> int:
    plan = plan_of(model)
    assert plan is not None
    return plan.predicted_peak


# ---- forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [1, 3, 5])
@EITHER_CAPTURE
@pytest.mark.slow
def test_a_forward_that_runs_out_is_run_again_by_a_tighter_plan(capture: str, nth: int) -> None:
    planned = planned_four(capture)
    before = peak_of(planned)
    mode = RunsOut("addmm", nth)
    with pytest.warns(
        PeakWarning, match=r"out of memory in the forward; .* the forward is run again"
    ) as said:
        got = outcome(planned, lambda m: train(m, lambda step: mode if step == 1 else nullcontext()))
    assert_equal(got, plain_steps())
    assert len(said) == 1
    assert mode.alive == 0, "the forward that ran out still holds tensors"
    assert peak_of(planned) <= 0.9 * before + 1


@EITHER_CAPTURE
def test_the_very_first_forward_can_be_run_again_too(capture: str) -> None:
    planned = planned_four(capture)
    with pytest.warns(PeakWarning, match="in the forward"):
        got = outcome(
            planned, lambda m: train(m, lambda step: nullcontext() if step else RunsOut("addmm", 4))
        )
    assert_equal(got, plain_steps())


def hooked(exception: type[Exception], times: int) -> tuple[Any, list[int]]:
    """A hook on the third block that raises so many times."""
    raised: list[int] = []

    def hook(module: nn.Module, args: Any) -> None:
        if len(raised) < times:
            raised.append(1)
            raise exception("CUDA out of memory")

    return four()[2].register_forward_pre_hook(hook), raised  # type: ignore[index] # a Sequential


def test_a_hook_of_the_model_that_runs_out_is_an_out_of_memory_like_any_other() -> None:
    planned = planned_four("modules")
    handle, raised = hooked(torch.OutOfMemoryError, 1)
    try:
        with pytest.warns(PeakWarning, match="in the forward"):
            got = outcome(planned, train)
    finally:
        handle.remove()
    assert raised
    assert_equal(got, plain_steps())


def test_other_errors_are_not_ours() -> None:
    planned = planned_four("modules")
    handle, raised = hooked(RuntimeError, 1)
    try:
        with restored(four()), pytest.raises(RuntimeError, match="CUDA out of memory"):
            planned(torch.randn(ROWS, WIDTH))
    finally:
        handle.remove()
    assert len(raised) == 1
    assert plan_of(planned) is plan_of_four("modules")


def test_a_second_time_the_error_is_raised_and_the_next_forward_is_tighter_still() -> None:
    planned, batch = planned_four("graph"), torch.randn(ROWS, WIDTH)
    with restored(four()):
        with (
            pytest.warns(PeakWarning, match="in the forward"),
            RunsOut("addmm", 2, also=(4,)),
            pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"),
        ):
            planned(batch)
        once = peak_of(planned)
        with pytest.warns(PeakWarning, match="in the last step"):
            planned(batch)
        assert peak_of(planned) < once


def test_where_no_plan_is_tighter_the_error_says_so() -> None:
    plan = plan_of_four("graph").within(smallest(plan_of_four("graph").chain))
    planned = planned_four("graph", plan)
    with (
        restored(four()),
        RunsOut("addmm", 2),
        pytest.raises(torch.OutOfMemoryError, match=r"no schedule takes less.*Tried to allocate"),
    ):
        planned(torch.randn(ROWS, WIDTH))


def test_raise_raises_and_keeps_the_plan_and_is_the_default_on_the_cpu() -> None:
    for options in ({"on_oom": "raise"}, {}):
        planned = execute(plan_of_four("graph"), four(), **options)  # type: ignore[call-overload] # one keyword
        with restored(four()), RunsOut("addmm", 2), pytest.raises(torch.OutOfMemoryError):
            planned(torch.randn(ROWS, WIDTH))
        assert plan_of(planned) is plan_of_four("graph")


def test_python_s_generators_are_put_back_too() -> None:
    planned, batch = planned_four("modules"), torch.randn(ROWS, WIDTH)
    handle = four()[0].register_forward_pre_hook(lambda *_: random.random() and None)  # type: ignore[index] # a Sequential
    try:
        with restored(four()):
            random.seed(3)
            planned(batch)
            expected = random.random()
            random.seed(3)
            with pytest.warns(PeakWarning), RunsOut("addmm", 3):
                planned(batch)
            assert random.random() == expected
    finally:
        handle.remove()


class Late(nn.Module):
    """Changes a buffer from the second forward on, after its blocks have run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(WIDTH) for _ in range(4)))
        self.register_buffer("total", torch.zeros(()))
        self.total: Tensor
        self.runs = 0

    def forward(self, x: Tensor) -> Any:
        self.runs += 1
        if self.runs > 1:
            self.total += 1
        return self.blocks(x)


def test_a_buffer_that_changed_unforeseen_cannot_be_put_back_and_the_error_says_so() -> None:
    torch.manual_seed(0)
    model, batch = Late().train(), torch.randn(ROWS, WIDTH)
    plan = solve(model, "1GiB", sample=batch, capture=[*model.blocks])
    model.runs = 0
    planned = execute(plan, model, on_oom="replan")
    planned(batch)
    with RunsOut("addmm", 3), pytest.raises(torch.OutOfMemoryError) as caught:
        planned(batch)
    assert "buffer 'total' has changed, which it did not at the first forward" in caught.value.__notes__[0]


# ---- the whole step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [1, 4, 8])
@EITHER_CAPTURE
@pytest.mark.slow
def test_a_backward_that_runs_out_is_run_again_with_its_forward(capture: str, nth: int) -> None:
    planned = planned_four(capture)
    before = peak_of(planned)
    mode = RunsOut("mm", nth)  # backwards of the linear maps, two each
    with pytest.warns(PeakWarning, match=r"out of memory in a step; .* the step is run again") as said:
        got = outcome(planned, lambda m: train(m, lambda step: mode if step == 1 else nullcontext()))
    assert_equal(got, plain_steps())
    assert len(said) == 1
    assert mode.alive == 0, "the step that ran out still holds tensors"
    assert peak_of(planned) < before


def test_a_hook_in_backward_that_runs_out() -> None:
    planned = planned_four("graph")
    weight = four()[1].linear.weight  # type: ignore[index] # a Sequential
    raised: list[int] = []

    def hook(grad: Tensor) -> None:
        if not raised:
            raised.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = weight.register_hook(hook)
    try:
        with pytest.warns(PeakWarning, match="the step is run again"):
            got = outcome(planned, lambda m: train(m, lambda _: nullcontext()))
    finally:
        handle.remove()
    assert_equal(got, plain_steps())


@pytest.mark.parametrize("copies", [False, True])
def test_gradients_that_were_added_to_in_part_need_copies(copies: bool) -> None:
    planned, batch = planned_four("graph"), torch.randn(ROWS, WIDTH)

    def step() -> None:
        loss_of(planned(batch)).backward()

    def twice(run: Callable[[], Any]) -> Record:
        with restored(four()):
            torch.manual_seed(1)
            step()
            run()
            return state(four())

    expected = twice(step)
    if copies:
        with pytest.warns(PeakWarning, match="in a step"):
            got = twice(lambda: within(RunsOut("mm", 6), lambda: run_step(planned, step, copies=True)))
        assert_equal(got, expected)
        return
    with pytest.raises(torch.OutOfMemoryError) as caught:
        twice(lambda: within(RunsOut("mm", 6), lambda: run_step(planned, step)))
    assert (
        "gradients that existed before it were added to in part; call zero_grad()"
        in caught.value.__notes__[0]
    )
    before = peak_of(planned)
    with restored(four()), pytest.warns(PeakWarning, match="in the last step"):
        step()
    assert peak_of(planned) < before


def within(mode: TorchDispatchMode, run: Callable[[], Any]) -> None:
    with mode:
        run()


def test_gradients_that_exist_and_were_not_reached_need_no_copies() -> None:
    planned, batch = planned_four("graph"), torch.randn(ROWS, WIDTH)

    def procedure(model: nn.Module) -> Record:
        loss_of(model(batch)).backward()
        step = lambda: loss_of(model(batch)).backward()  # noqa: E731 # two of a kind
        if model is planned:
            with pytest.warns(PeakWarning, match="in a step"), RunsOut("mm", 1):
                run_step(model, step)
        else:
            step()
        return {}

    assert_equal(outcome(planned, procedure), outcome(four(), procedure))


def test_gradients_of_other_modules_are_put_back_if_they_are_named() -> None:
    planned, batch, mode = planned_four("graph"), torch.randn(ROWS, WIDTH), RunsOut("mm", 7)
    torch.manual_seed(2)
    head = nn.Linear(4, 4)

    def procedure(model: nn.Module) -> Record:
        head.zero_grad()

        def step() -> None:
            loss_of(head(model(batch))).backward()

        if model is planned:
            with pytest.warns(PeakWarning, match="in a step"), mode:
                run_step(model, step, also=head.parameters())
        else:
            step()
        return {"head": head.weight.grad}

    assert_equal(outcome(planned, procedure), outcome(four(), procedure))


def test_a_step_that_has_changed_parameters_is_not_run_again() -> None:
    planned, batch = planned_four("graph"), torch.randn(ROWS, WIDTH)

    def update(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.mul_(0.9)

    last = four()[4].weight  # type: ignore[index] # a Sequential
    assert isinstance(last, nn.Parameter)
    handle = last.register_post_accumulate_grad_hook(update)
    try:
        with restored(four()), RunsOut("mm", 6), pytest.raises(torch.OutOfMemoryError) as caught:
            run_step(planned, lambda: loss_of(planned(batch)).backward())
    finally:
        handle.remove()
    assert "not run again: parameters have changed in it" in caught.value.__notes__[0]


def test_a_replay_that_runs_out_without_run_step_makes_the_next_forward_tighter() -> None:
    plan = replace(plan_of_four("graph"))
    low = smallest(plan.chain)
    planned, batch = (
        planned_four("graph", plan.within((low + plan.predicted_peak) // 2)),
        torch.randn(ROWS, WIDTH),
    )
    assert max(plan_of(planned).timeline.runs) > 1 or any(plan_of(planned).program.kept)  # type: ignore[union-attr] # planned
    with restored(four()):
        loss = loss_of(planned(batch))
        again = (RunsOut("native_batch_norm", 1), RunsOut("gelu", 1), RunsOut("addmm", 1))  # whatever it is
        with again[0], again[1], again[2], pytest.raises(torch.OutOfMemoryError):
            loss.backward()
        del loss
        before = peak_of(planned)
        with pytest.warns(PeakWarning, match=r"in the last step; .*run_step\(\)"):
            planned(batch)
        assert peak_of(planned) < before


def test_run_step_is_for_planned_models_and_returns_what_the_step_does() -> None:
    with pytest.raises(TypeError, match="Sequential does not train by a plan"):
        run_step(four(), lambda: 1)
    assert run_step(planned_four("graph"), lambda: 7) == 7
    assert run_step(execute(plan_of_four("graph"), four(), on_oom="raise"), lambda: 7) == 7
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_step(planned_four("graph"), functools.partial(_raise, torch.OutOfMemoryError("elsewhere")))
    assert "ran no forward by a plan in this step" in caught.value.__notes__[0]


def _raise(error: Exception) -> None:
    raise error


class Wide(nn.Module):
    """Takes most memory in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        spread: Tensor = (x.detach()[..., None] * torch.ones(64)).sum(-1)
        return x + spread


@EITHER_CAPTURE
@pytest.mark.slow
def test_copies_of_what_a_forward_changes_are_within_the_budget(capture: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()) for _ in range(12)), Wide()
    ).train()
    batch = torch.randn(64, 256)
    plan = solve(model, "1GiB", sample=batch, capture=capture)
    planned = execute(plan.within(plan.predicted_peak), model, on_oom="replan")

    def step() -> Tensor:
        loss = planned(batch).square().mean()
        loss.backward()
        return loss

    step()  # what a forward changes is found in the first
    model.zero_grad()
    held = plan_of(planned)
    assert held is not None
    assert measure_peak(step, resident=[model, batch]).peak <= held.memory_budget


def test_on_cuda_those_copies_are_in_the_plan() -> None:
    def fixed(*layers: nn.Module) -> int:
        batch = torch.randn(64, 64)
        return solve(
            nn.Sequential(*layers, nn.Linear(64, 64)), "1GiB", sample=batch, device="H100"
        ).chain.fixed

    norm = nn.BatchNorm1d(64)
    kept = nn.BatchNorm1d(64)
    kept.eval()
    copies = 3 * 512  # a block for each of mean, variance and count
    # Of what changes there is the buffer itself, its copy for a re-run, and that for a forward that runs out
    # of memory.
    assert fixed(nn.Linear(64, 64), norm) - fixed(nn.Linear(64, 64), kept) == 2 * copies


# ---- on the device ---------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("share", [0.35, 0.6])
def test_on_cuda_a_real_shortage_of_memory_is_met_by_a_tighter_plan(share: float) -> None:
    """The process gets less memory than the plan takes: what is live, and a share of the rest."""
    torch.manual_seed(0)
    width = 1024
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)) for _ in range(12))
    )
    model.cuda().train()
    batch = torch.randn(16384, width, device="cuda")
    plan = solve(model, "64GiB", sample=batch)

    def step(model: nn.Module) -> None:
        loss_of(model(batch)).backward()

    expected = outcome(model, lambda m: step(m) or {})  # type: ignore[func-returns-value] # None, then a record
    model.zero_grad()
    planned = execute(plan, model)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    least = smallest(plan.chain)
    limit = least + share * (plan.predicted_peak - least) + 2**28
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.warns(PeakWarning, match="out of memory in"):
            got = outcome(planned, lambda m: run_step(m, lambda: step(m)) or {})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_equal(got, expected)
    assert peak_of(planned) < plan.predicted_peak
