"""Step functions are planned whole: several calls and models, an outside loss, gradients within them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematplan import CaptureError, Plan, PlanMismatch, execute, measure_peak, solve
from rematplan.executors.execute import plan_of
from tests.shared.helpers import smallest
from tests.shared.step_functions import CASES, ROWS, SECOND_ORDER, WIDTH, Encoder, StepCase, rows, simcse
from tests.shared.steps import Record, assert_equal, state

LATE = Encoder(1)  # of which the functions below know by its name alone


def names_a_global(x: Tensor) -> Tensor:
    return through_a_helper(x).square().mean()


def through_a_helper(x: Tensor) -> Tensor:
    found: Tensor = LATE(x)
    return found


def loss_in(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def train(case: StepCase, step: Callable[..., Any], steps: int = 5) -> list[Record]:
    """Train from a fixed seed; a record of each step. The modules are put back."""
    everything = nn.ModuleList(case.modules)
    before = copy.deepcopy(everything.state_dict())
    optimizer = torch.optim.SGD(everything.parameters(), lr=1e-3)
    torch.manual_seed(11)
    records = []
    for _ in range(steps):
        loss = loss_in(step(*case.batch))
        loss.backward()
        records.append({"loss": loss.detach().clone(), **state(everything)})
        optimizer.step()
        optimizer.zero_grad()
    everything.load_state_dict(before)
    return records


def peak(case: StepCase, step: Callable[..., Any]) -> int:
    """The measured peak of one step without gradients at its start."""

    def once() -> None:
        loss_in(step(*case.batch)).backward()

    measured = measure_peak(once, resident=[*case.modules, case.batch]).peak
    for module in case.modules:
        module.zero_grad()
    return measured


@functools.cache
def planned(build: Callable[[], StepCase], capture: str) -> tuple[StepCase, Plan]:
    """A case, and the plan that keeps everything."""
    torch.manual_seed(0)
    case = build()
    return case, solve(case.function, "1GiB", sample=case.batch, capture=capture)


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_a_step_function_trains_as_it_does_plainly_and_within_its_budget(
    build: Callable[[], StepCase],
) -> None:
    case, keeps = planned(build, "graph")
    least = smallest(keeps.chain)
    assert least < 0.97 * keeps.predicted_peak
    want = train(case, case.function)
    for budget in (least, (least + keeps.predicted_peak) // 2):
        step = execute(keeps.within(budget), case.function)
        assert_equal(train(case, step), want)
        assert peak(case, step) <= budget


@pytest.mark.parametrize(
    "build", [build for build in CASES if build not in SECOND_ORDER], ids=lambda build: build.__name__
)
def test_each_call_of_a_module_is_a_block_of_a_step_function(build: Callable[[], StepCase]) -> None:
    case, keeps = planned(build, "modules")
    least = smallest(keeps.chain)
    want = train(case, case.function, steps=2)
    for budget in (least, (least + keeps.predicted_peak) // 2):
        step = execute(keeps.within(budget), case.function)
        assert_equal(train(case, step, steps=2), want)
        assert peak(case, step) <= budget


def test_a_module_called_twice_is_two_rows_of_blocks() -> None:
    _, plan = planned(simcse, "modules")
    assert plan.capture.stages.count("encoder.layers.0.0") == 2


@pytest.mark.parametrize("build", SECOND_ORDER, ids=lambda build: build.__name__)
def test_blocks_of_a_step_that_reverses_them_itself_are_refused(build: Callable[[], StepCase]) -> None:
    case = build()
    with pytest.raises(CaptureError, match=r"autograd\.grad, or a backward, runs in the forward outside of"):
        solve(case.function, "1GiB", sample=case.batch, capture="modules")


def test_blocks_that_a_step_reverses_itself_are_left_to_glue() -> None:
    torch.manual_seed(0)
    critic, other = Encoder(dropout=0.0), Encoder(dropout=0.0)

    def penalised(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
        return slope.square().mean() + other(x).square().mean()

    case = StepCase(penalised, [critic, other], rows(1))
    plan = solve(penalised, "1GiB", sample=case.batch, capture="modules")
    assert {name.partition(".")[0] for name in plan.capture.stages} == {"other"}
    least = smallest(plan.chain)
    step = execute(plan.within(least), penalised)
    assert_equal(train(case, step, steps=2), train(case, penalised, steps=2))
    assert peak(case, step) <= least


def test_what_the_code_cuts_off_stays_cut_off_beside_an_inner_gradient() -> None:
    torch.manual_seed(0)
    generator, critic = Encoder(1), Encoder(2, dropout=0.0)

    def critic_loss(real: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            fake = generator(noise)
        also = generator(noise).detach()
        leaf = (0.5 * real + 0.5 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(leaf).tanh().sum(), leaf, create_graph=True)
        (constant,) = torch.autograd.grad(critic(leaf).sum(), leaf)  # without a graph of its own
        return (slope - constant).square().mean() + critic(also).mean()

    case = StepCase(critic_loss, [generator, critic], rows(2))
    plan = solve(critic_loss, "1GiB", sample=case.batch, capture="graph")
    step = execute(plan.within(smallest(plan.chain)), critic_loss)
    assert_equal(train(case, step), train(case, critic_loss))


def test_a_model_whose_forward_takes_forces_is_planned_as_a_graph() -> None:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(
                nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)
            )

        def forward(self, positions: Tensor, target: Tensor) -> Tensor:
            leaf = positions.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(leaf).sum(), leaf, create_graph=True)
            return (slope + target).square().mean()

    torch.manual_seed(0)
    model = Forces()
    batch = torch.randn(64, 8), torch.randn(64, 8)
    plan = solve(model, "1GiB", sample=batch)
    assert plan.capture.kind == "graph"
    case = StepCase(model, [model], batch)
    step = execute(plan.within(smallest(plan.chain)), model)
    assert_equal(train(case, step), train(case, model))


def test_modules_among_the_arguments_belong_to_the_step() -> None:
    torch.manual_seed(0)
    encoder = Encoder()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model(x).square().mean()
        return found

    case = StepCase(loss, [encoder], (encoder, *rows(1)))
    plan = solve(loss, "1GiB", sample=case.batch)
    step = execute(plan.within(smallest(plan.chain)), loss)
    assert_equal(train(case, step), train(case, loss))
    with pytest.raises(ValueError, match="planned loss: an argument is a Linear that the plan was not made"):
        step(nn.Linear(WIDTH, WIDTH), case.batch[1])


def test_a_global_variable_that_a_function_or_its_helper_names_is_found() -> None:
    plan = solve(names_a_global, "1GiB", sample=rows(1))
    step = execute(plan, names_a_global)
    assert dict(step.named_modules())["LATE"] is LATE
    assert type(step).__name__ == "names_a_global"


def test_modules_in_defaults_and_in_plain_objects_are_found_once() -> None:
    class Holder:
        def __init__(self) -> None:
            self.inner = {"parts": [Encoder(1)]}
            self.outer = self

    holder, default = Holder(), Encoder(1)
    part = holder.inner["parts"][0]

    def loss(x: Tensor, net: nn.Module = default) -> Tensor:
        found: Tensor = (net(x) + holder.inner["parts"][0](x) + part.head(x)).mean()
        return found

    step = execute(solve(loss, "1GiB", sample=rows(1)), loss)
    assert set(step.children()) == {part, default}


def test_a_plan_that_was_saved_runs_the_same_function_of_new_modules(tmp_path: Path) -> None:
    _, keeps = planned(simcse, "graph")
    keeps.within(smallest(keeps.chain)).save(tmp_path / "plan.json")
    torch.manual_seed(3)
    other = simcse()
    step = execute(Plan.load(tmp_path / "plan.json"), other.function)
    assert_equal(train(other, step, steps=2), train(other, other.function, steps=2))


def test_a_plan_is_not_for_another_function() -> None:
    _, keeps = planned(simcse, "graph")
    encoder = Encoder()

    def another(x: Tensor) -> Tensor:
        found: Tensor = encoder(x).mean()
        return found

    with pytest.raises(PlanMismatch, match="the plan was made for another another"):
        execute(keeps, another)


def test_a_step_is_planned_while_a_module_trains_and_runs_plainly_without_grad() -> None:
    case, keeps = planned(simcse, "graph")
    step = execute(keeps, case.function)
    (encoder,) = case.modules
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            got = step(*case.batch)
            torch.manual_seed(0)
            assert torch.equal(got, case.function(*case.batch))
        encoder.eval()
        assert not step.training
        assert torch.equal(step(*case.batch), case.function(*case.batch))
        with pytest.raises(ValueError, match="eval mode"):
            solve(case.function, "1GiB", sample=case.batch)
    finally:
        encoder.train()
    assert step.training
    assert plan_of(step) is keeps


def test_another_shape_is_planned_for_as_of_a_model() -> None:
    torch.manual_seed(0)
    case = simcse()
    plan = solve(case.function, "1GiB", sample=case.batch)
    step = execute(plan, case.function)
    shorter = StepCase(case.function, case.modules, (case.batch[0][:64],))
    assert_equal(train(shorter, step, steps=2), train(shorter, case.function, steps=2))


def test_what_no_plan_can_follow_is_refused_by_name() -> None:
    encoder, loose = Encoder(1), nn.Parameter(torch.ones(WIDTH))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    before = copy.deepcopy(encoder.state_dict())

    def scaled(x: Tensor) -> Tensor:
        found: Tensor = (encoder(x) * loose).mean()
        return found

    def trains(x: Tensor) -> Tensor:
        loss: Tensor = encoder(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    def clears(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        found: Tensor = encoder(x).mean()
        return found

    batch = rows(1)
    for function, text in (
        (scaled, r"scaled uses a tensor of shape \(32,\) that requires grad and belongs to no module"),
        (trains, r"trains calls backward\(\) itself; let it return the loss"),
        (clears, r"clears calls zero_grad\(\) itself"),
        (lambda x: x.mean(), r"no module was found in the step function .*<lambda>"),
    ):
        with pytest.raises(ValueError, match=text):
            solve(function, "1GiB", sample=batch)
    assert_equal(encoder.state_dict(), before)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_step_function_of_a_planned_model_is_refused() -> None:
    encoder = Encoder(1)
    model = execute(solve(encoder, "1GiB", sample=rows(1)), encoder)
    with pytest.raises(ValueError, match="calls 'model', which trains by a plan already"):
        solve(lambda x: model(x).mean(), "1GiB", sample=rows(1))


def test_a_step_function_is_not_copied() -> None:
    case, keeps = planned(simcse, "graph")
    with pytest.raises(TypeError, match="is a step function, whose copy would still use the modules"):
        copy.deepcopy(execute(keeps, case.function))


def test_a_class_is_no_step_function() -> None:
    with pytest.raises(TypeError, match="model is a type, expected"):
        solve(nn.Linear, "1GiB", sample=rows(1))


def test_the_loss_outside_of_the_model_counts() -> None:
    torch.manual_seed(0)
    encoder, labels = Encoder(1), torch.randint(0, 4096, (ROWS,))
    table = torch.randn(WIDTH, 4096)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(encoder(x) @ table, labels)

    case = StepCase(loss, [encoder], rows(1))
    plan = solve(loss, "1GiB", sample=case.batch)
    step = execute(plan.within(smallest(plan.chain)), loss)
    assert peak(case, step) <= plan.within(smallest(plan.chain)).memory_budget
    assert smallest(plan.chain) > 2 * ROWS * 4096 * 4  # logits and their gradient
