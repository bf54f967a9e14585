"""Outputs beside the loss: the predicted peak has them and the tensors that autograd saved for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rematplan import execute, solve
from tests.shared.helpers import smallest
from tests.shared.models import Case
from tests.shared.steps import assert_equal, peak_of_a_step, replan, restored, tightest, train


class Hidden(nn.Module):
    """Returns the loss and the last hidden state, which an op in place has made and saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6))
        self.last = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)).requires_grad_(False)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            x = layer(x)
        x = self.last(x) + x
        return self.head(x := torch.relu_(x)).square().mean(), x


class Levels(Hidden):
    """Returns the loss, and a level that each layer adds to and no loss is made of."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        level = x.new_zeros(())
        for layer in self.layers:
            x = layer(x)
            level = level + (x * 1.5).square().mean()
        return self.head(x.tanh()).square().mean(), level


class Unused(Levels):
    """Makes a level that it does not return."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x)[:1]


@pytest.mark.parametrize("build", [Hidden, Levels, Unused])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.slow
def test_what_a_loss_does_not_reach_is_within_the_budget(build: type[nn.Module], share: float) -> None:
    torch.manual_seed(0)
    batch = torch.randn(2048, 32)
    case = Case(build().train(), batch, (batch,))
    plan = solve(case.model, "1GiB", sample=batch, capture="graph", costs="roofline")
    low = smallest(plan.chain)
    plan = replan(plan, low + int(share * (plan.plain.peak - low)))
    peak = peak_of_a_step(case, execute(plan, case.model)).peak
    assert peak <= plan.predicted_peak <= 1.5 * peak


class Spoilt(Hidden):
    """Returns a level whose backward would raise, for what it saved is changed in place."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        level = x.new_zeros(())
        for layer in self.layers:
            x = layer(x) + x
            level = level + x.square().mean()
            x.mul_(0.9)
        return self.head(x.tanh()).square().mean(), level


@pytest.mark.parametrize("costs", ["roofline", "measure"])
def test_what_no_loss_reaches_is_not_reversed_by_planning(costs: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 32)
    case = Case(Spoilt().train(), batch, (batch,))
    plan = solve(case.model, "1GiB", sample=batch, capture="graph", costs=costs)
    with restored(case.model):
        expected = train(case, case.model)
    with restored(case.model):
        assert_equal(train(case, execute(tightest(plan), case.model)), expected)
