"""The executor's promises on a CUDA device; skipped without one."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from executors import execute
from scheduler import Plan, solve
from tests.helpers import smallest
from tests.models import SEVEN, Case
from tests.steps import assert_equal, peak_of_a_step, replan, restored, train

pytestmark = pytest.mark.cuda


def on_cuda(name: str) -> Case:
    """A case with its model and batch on the device; convolutions pinned to one algorithm."""
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)

    def moved(value: object) -> object:
        return pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), value)

    case = SEVEN[name]()
    return Case(case.model.cuda(), moved(case.sample), moved(case.args), moved(case.kwargs))  # type: ignore[arg-type]


def budgets(plan: Plan) -> list[int]:
    """Four, between the smallest and the plain peak."""
    low, high = smallest(plan.chain), plan.plain.peak
    return [low + int(share * (high - low)) for share in (0.0, 0.3, 0.6, 0.9)]


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning")
@pytest.mark.parametrize("capture", ["graph", "modules"])
@pytest.mark.parametrize("name", SEVEN)
def test_planned_training_on_cuda_is_bit_equal_and_within_its_budget(name: str, capture: str) -> None:
    case = on_cuda(name)
    plan = solve(case.model, 2**50, sample=case.sample, capture=capture)
    with restored(case.model):
        expected = train(case, case.model)
    for budget in budgets(plan):
        tight = replan(plan, budget)
        planned = execute(tight, case.model)
        with restored(case.model):
            assert_equal(train(case, planned), expected)
        with restored(case.model):
            measured = peak_of_a_step(case, planned)
        assert measured.peak <= budget
        assert tight.predicted_peak == pytest.approx(measured.peak, rel=0.05)


def test_a_plan_for_the_cpu_is_refused_on_cuda() -> None:
    case = SEVEN["mlp"]()
    plan = solve(case.model, 2**40, sample=case.sample)
    with pytest.raises(ValueError, match="made for cpu"):
        execute(plan, case.model.cuda())


def test_dropout_on_cuda_is_replayed_and_the_generator_left_as_the_plain_step_leaves_it() -> None:
    model = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)) for _ in range(8))
    )
    model.cuda().train()
    batch = torch.randn(512, 64, device="cuda")
    case = Case(model, batch, (batch,))
    plan = solve(model, 2**40, sample=batch)
    planned = execute(replan(plan, smallest(plan.chain)), model)
    with restored(model):
        expected = train(case, model)
    with restored(model):
        assert_equal(train(case, planned), expected)
