"""Overlapping steps of one planned model are reported once, with their peak; others are silent."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from rematplan import Plan, ReplayError, execute, measure_peak, solve
from rematplan.executors.execute import plan_of
from rematplan.executors.in_flight import InFlight, later_peak, waiting_bytes
from rematplan.scheduler.core.errors import PeakWarning
from tests.shared.helpers import smallest
from tests.shared.steps import EITHER_CAPTURE, OVERLAPPING

BATCH = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Net(nn.Module):
    """Blocks and a mean: a model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Tanh()) for _ in range(6))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


def planned(capture: str = "graph", where: float = 0.5) -> nn.Module:
    """The model by a plan between the smallest budget (0) and that which keeps everything (1)."""
    torch.manual_seed(0)
    model = Net()
    plan = solve(model, "1GiB", sample=BATCH, capture=capture)
    least = smallest(plan.chain)
    return execute(plan.within(int(least + where * (plan.predicted_peak - least))), model)


def plan(model: nn.Module) -> Plan:
    found = plan_of(model)
    assert found is not None
    return found


@contextmanager
def silent() -> Iterator[None]:
    """Fail at a PeakWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeakWarning)
        yield


def expected_peak(text: str) -> float:
    """The peak that a warning tells of."""
    found = re.search(r"expect a peak of (?:about |at least )?([\d.]+) (\w+),", text)
    assert found is not None, text
    return float(found[1]) * UNITS[found[2]]


def measured(model: nn.Module, step: Callable[[], object]) -> int:
    """The peak of a step that finds no gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step()
        model.zero_grad()
        peak = measure_peak(step, resident=[model, BATCH]).peak
    model.zero_grad()
    return peak


@EITHER_CAPTURE
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.slow
def test_a_second_forward_before_the_backward_is_told_once_with_its_peak(capture: str, where: float) -> None:
    model = planned(capture, where)

    def step() -> None:
        first = model(BATCH)
        second = model(BATCH)
        first.backward()
        second.backward()

    first = model(BATCH)
    with pytest.warns(
        PeakWarning, match=r"planned Net: another forward runs while an earlier one waits"
    ) as found:
        second = model(BATCH)
    text = str(found[0].message)
    assert "step_function" in text
    assert "lower by" in text
    with silent():  # once
        third = model(BATCH)
    (first + second + third).backward()
    model.zero_grad()
    peak = measured(model, step)
    assert peak > plan(model).memory_budget
    assert peak <= 1.03 * expected_peak(text) <= 1.15 * peak


def test_steps_one_after_the_other_are_silent_whatever_is_kept_of_them() -> None:
    model = planned()
    with silent():
        losses = []
        for _ in range(3):  # gradients accumulate, loss objects live on
            loss = model(BATCH)
            loss.backward()
            losses.append(loss)


def test_forwards_without_grad_and_in_eval_mode_between_are_silent() -> None:
    model = planned()
    with silent():
        loss = model(BATCH)
        with torch.no_grad():
            model(BATCH)
        model.eval()
        model(BATCH)
        model.train()
        loss.backward()
        model(BATCH).backward()


def test_a_forward_whose_output_is_gone_is_silent() -> None:
    model = planned()
    with silent():
        for _ in range(3):
            model(BATCH)
        held = model(BATCH).detach()
        model(BATCH).backward()
    assert held.isfinite()


def test_what_was_made_of_an_output_keeps_its_step_in_flight() -> None:
    model = planned()
    losses = [model(BATCH) * 2]
    with pytest.warns(PeakWarning, match="an earlier one waits"):
        losses.append(model(BATCH) * 2)
    torch.stack(losses).sum().backward()


def test_a_plan_that_leaves_room_for_both_is_silent() -> None:
    model = planned()
    roomy = execute(plan(model).within("1GiB"), Net())
    with silent():
        (roomy(BATCH) + roomy(BATCH)).backward()
        loss = roomy(BATCH)
        loss.backward(retain_graph=True)
        loss.backward()


def test_several_forwards_that_wait_are_counted_where_two_would_fit() -> None:
    model = planned()
    keeps = plan(model)
    model = execute(keeps.within(keeps.predicted_peak + waiting_bytes(keeps) + 6 * 64 * 64 * 4 * 8), Net())
    held = waiting_bytes(plan(model))
    room = (plan(model).memory_budget - plan(model).predicted_peak) // held
    with silent():
        losses = [model(BATCH) for _ in range(room)]
    with pytest.warns(PeakWarning, match=r"earlier ones? waits?"):
        losses += [model(BATCH) for _ in range(3)]
    torch.stack(losses).sum().backward()


@EITHER_CAPTURE
@pytest.mark.parametrize("where", [0.0, 0.5])
def test_a_backward_that_retains_the_graph_is_told_once_with_its_peak(capture: str, where: float) -> None:
    model = planned(capture, where)

    def step() -> None:
        loss = model(BATCH)
        loss.backward(retain_graph=True)
        loss.backward()

    loss = model(BATCH)
    with pytest.warns(PeakWarning, match="a backward retains the graph") as found:
        loss.backward(retain_graph=True)
    with silent():
        loss.backward(retain_graph=True)
    with pytest.warns(PeakWarning, match="an earlier one waits"):  # the graph is still alive
        model(BATCH)
    del loss
    model.zero_grad()
    peak = measured(model, step)
    assert peak > plan(model).memory_budget
    assert peak <= 1.3 * expected_peak(str(found[0].message)) <= 1.5 * peak


def test_gradients_that_are_to_be_reversed_are_told_of() -> None:
    model = planned()
    with pytest.warns(PeakWarning, match="create_graph=True"):
        grads = torch.autograd.grad(model(BATCH), list(model.parameters()), create_graph=True)
    torch.stack([grad.square().sum() for grad in grads]).sum().backward()


def test_gradients_per_task_with_autograd_grad_are_told_of() -> None:
    model = planned()
    loss = model(BATCH)
    weights = list(model.parameters())
    with pytest.warns(PeakWarning, match="retains the graph"):
        torch.autograd.grad(loss, weights, retain_graph=True)
    with silent():
        torch.autograd.grad(2 * loss, weights)
        model(BATCH).backward()


def test_bytes_that_wait_are_those_that_a_forward_leaves() -> None:
    model = planned(where=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(BATCH)
        left = measure_peak(lambda: [model(BATCH) for _ in range(4)], resident=[]).added
        one = measure_peak(lambda: [model(BATCH)], resident=[]).added
    assert (left - one) / 3 == pytest.approx(waiting_bytes(plan(model)), rel=0.05)
    assert later_peak(plan(model), retained=True) > plan(model).predicted_peak


def gradients_of(model: nn.Module, contexts: int, others: nn.Module | None = None) -> list[Tensor]:
    """Peaks of a sum of two losses, their forwards within one autocast context or two, or around another."""
    weights = [p for each in (model, others) if each is not None for p in each.parameters()]
    for weight in weights:
        weight.grad = None
    losses: list[Tensor] = []
    for number in range(contexts):
        with torch.autocast("cpu", torch.bfloat16):
            for scale in (1.0, 0.7)[number : number + 3 - contexts]:
                losses.append(model(scale * BATCH))
                if others is not None:
                    losses.append(others(scale * BATCH))
    torch.stack([loss.float() for loss in losses]).sum().backward()
    return [weight.grad for weight in weights if weight.grad is not None]


def in_bfloat16(capture: str) -> tuple[nn.Module, nn.Module]:
    """A model, and the same by a plan for autocast."""
    torch.manual_seed(0)
    plain = Net()
    with torch.autocast("cpu", torch.bfloat16):
        found = solve(plain, "1GiB", sample=BATCH, capture=capture)
    return plain, execute(found.within(smallest(found.chain)), copy.deepcopy(plain))


@OVERLAPPING
@EITHER_CAPTURE
def test_forwards_within_one_autocast_context_share_casts_or_are_refused(capture: str) -> None:
    plain, model = in_bfloat16(capture)
    assert all(map(torch.equal, gradients_of(model, 2), gradients_of(plain, 2)))
    assert not all(
        map(torch.equal, gradients_of(plain, 1), gradients_of(plain, 2))
    )  # which the test is about
    if plan(model).capture.uncached:
        with pytest.raises(ReplayError, match=r"within the same torch\.autocast"):
            gradients_of(model, 1)
    else:
        assert all(map(torch.equal, gradients_of(model, 1), gradients_of(plain, 1)))
    # Microbatches, each reversed before the next, share no sum.
    for each in (plain, model):
        each.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            for scale in (1.0, 0.7):
                each(scale * BATCH).backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@EITHER_CAPTURE
def test_weights_that_change_within_an_autocast_context_are_refused(capture: str) -> None:
    _, model = in_bfloat16(capture)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        model(BATCH).backward()
        optimizer.step()
        with pytest.raises(ReplayError, match=r"weights have changed within the torch\.autocast"):
            model(BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        model(BATCH).backward()


@OVERLAPPING
@pytest.mark.parametrize("train_first", [False, True])
@EITHER_CAPTURE
@pytest.mark.slow
def test_forwards_in_eval_mode_share_casts_too(capture: str, train_first: bool) -> None:
    plain, model = in_bfloat16(capture)

    def both(called: nn.Module) -> list[Tensor]:
        called.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = [called.train(mode)(0.7 * BATCH) for mode in (train_first, not train_first)]
        called.train()
        (losses[0].float() + losses[1].float()).backward()
        return [p.grad for p in called.parameters() if p.grad is not None]

    if plan(model).capture.uncached:
        with pytest.raises(ReplayError, match=r"within the same torch\.autocast"):
            both(model)
    else:
        assert all(map(torch.equal, both(model), both(plain)))


@OVERLAPPING
@EITHER_CAPTURE
def test_forwards_within_cached_parametrizations_are_refused(capture: str) -> None:
    torch.manual_seed(0)
    norm = torch.nn.utils.parametrizations.weight_norm
    net = nn.Sequential(*(nn.Sequential(norm(nn.Linear(64, 64)), nn.GELU()) for _ in range(4)))
    model = execute(solve(net, "1GiB", sample=BATCH, capture=capture), net)
    with torch.nn.utils.parametrize.cached():
        first = model(BATCH).square().mean()
        with pytest.raises(ReplayError, match="cached"):
            model(0.7 * BATCH)
    first.backward()


@OVERLAPPING
def test_a_plan_leaves_what_autocast_has_cached_for_other_models() -> None:
    plain, model = in_bfloat16("graph")
    torch.manual_seed(1)
    other = Net()
    gradients_of(model, 2)  # the first forward verifies the plan
    expected = gradients_of(Pair(plain), 1, other)
    assert all(map(torch.equal, gradients_of(Pair(model), 1, other), expected))


class Pair(nn.Module):
    """A model whose second call runs nothing of the first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) if self.calls % 2 else x.square().mean()


@pytest.mark.slow
def test_looking_costs_no_more_than_an_op_on_a_few_numbers() -> None:
    model = planned()
    steps, made = InFlight("Net", torch.device("cpu")), plan(model)
    one = torch.ones(1, requires_grad=True)

    def least(look: Callable[[Tensor], object]) -> float:
        taken = []
        for _ in range(20):
            outputs = [one * 2 for _ in range(1000)]
            began = time.perf_counter()
            for output in outputs:
                look(output)
            taken.append(time.perf_counter() - began)
        return min(taken) / 1000

    def looked(output: Tensor) -> None:
        steps.begins(made)
        steps.gave(model, made, output)
        steps.graphs.clear()

    assert least(looked) < 2.5 * least(lambda output: output * 2)  # some 1 µs each
