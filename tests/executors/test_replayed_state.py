"""Parameters, buffers, random numbers and autocast under the replay executor, against the plain model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematplan import Schedule, execute, measure_peak, solve
from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Keep
from tests.shared.helpers import smallest
from tests.shared.models import BUILDERS, Block, Case, gpt2, resnet, tiny
from tests.shared.steps import (
    EACH_CAPTURE,
    EITHER_CAPTURE,
    OVERLAPPING,
    Record,
    assert_equal,
    assert_same,
    loss_of,
    planned,
    planned_tiny,
    replan,
    restored,
    scheduled,
    state,
    train,
    within,
)

pytestmark = OVERLAPPING


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
@pytest.mark.slow
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
    batch = torch.randn(256, 16)  # a random-number state weighs as much as 79 rows
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
    """A layer whose weight is frozen is not run again: its backward reads the weight alone."""
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
@pytest.mark.slow
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


class Narrowing(nn.Module):
    """Sets autocast itself, and sets it off for a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            with torch.autocast("cpu", torch.bfloat16, enabled=number % 3 > 0):
                x = block(x.float())
        return x


@EITHER_CAPTURE
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.slow
def test_autocast_that_the_model_s_own_code_sets_around_blocks(capture: str, outside: bool) -> None:
    torch.manual_seed(0)
    batch = torch.randn(256, 16)
    case = Case(Narrowing().train(), batch, (batch,))

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside)

    with autocast():
        model = planned(case, capture)
    with restored(case.model):
        got = train(case, model, context=autocast)
    with restored(case.model):
        assert_equal(got, train(case, case.model, context=autocast))


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


def wide() -> Case:
    """Layers whose weights outweigh what they save."""
    torch.manual_seed(0)
    batch = torch.randn(16, 256)
    layers = [nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(12)]
    return Case(nn.Sequential(*layers).train(), batch, (batch,))


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(functools.partial(gpt2, 2), id="gpt2", marks=pytest.mark.slow),
        pytest.param(functools.partial(resnet, 8), id="resnet", marks=pytest.mark.slow),
        pytest.param(BUILDERS["unet"], id="unet", marks=pytest.mark.slow),
        wide,
    ],
)
def test_under_autocast_the_peak_is_predicted_and_casts_of_weights_do_not_pile_up(
    build: Callable[[], Case],
) -> None:
    case = build()

    def step(model: nn.Module) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = case(model)
        loss_of(output).backward()
        return output

    step(case.model)  # gradients exist from here on
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = solve(case.model, "1GiB", sample=case.sample, capture="graph")
    least = smallest(whole.chain)
    for plan in (whole, replan(whole, (whole.predicted_peak + least) // 2), replan(whole, least)):
        model = execute(plan, case.model)
        step(model)
        peak = measure_peak(
            functools.partial(step, model), resident=[case.model, case.args, case.kwargs]
        ).peak
        assert peak <= plan.predicted_peak <= 1.02 * peak
