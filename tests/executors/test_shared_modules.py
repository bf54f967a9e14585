"""Modules and ops that a replay could meet in another state: shared, cached, or asking for grad mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rematplan import Schedule, execute, solve
from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Forward, Keep
from tests.shared.models import Case
from tests.shared.steps import assert_equal, executor_of, planned, restored, scheduled, thinnest, train


def assert_trains_alike(case: Case, model: nn.Module, context: Callable[[], Any] | None = None) -> None:
    with restored(case.model):
        expected = train(case, case.model, context=context)
    with restored(case.model):
        assert_equal(train(case, model, context=context), expected)


class Recurrent(nn.Module):
    """LSTMs, whose kernel for training is another than that for inference."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(16, 16, batch_first=True) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def test_ops_that_ask_whether_there_is_a_gradient_do_the_same_when_they_are_run_again() -> None:
    torch.manual_seed(0)
    batch = torch.randn(24, 16, 16)
    case = Case(Recurrent().train(), batch, (batch,))
    plan = solve(case.model, "1GiB", sample=batch, capture="graph")
    first = next(k for k, stage in enumerate(plan.chain.stages) if stage.recomputable)
    last = len(plan.chain) - 1
    # Every stage is run again without keeping anything, for each stage after it.
    actions: list[Action] = [
        *map(Keep, range(first)),
        Checkpoint(first),
        *map(Forward, range(first + 1, last)),
    ]
    actions += [Keep(last), Backward(last)]
    for k in reversed(range(first, last)):
        actions += [
            *([Checkpoint(first)] if k > first else []),
            *map(Forward, range(first + 1, k)),
            Keep(k),
            Backward(k),
        ]
    actions += map(Backward, reversed(range(first)))
    assert_trains_alike(case, execute(scheduled(plan, Schedule(tuple(actions))), case.model))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class Albert(nn.Module):
    """Two layers that run several times, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            for layer in self.layers:
                x = F.dropout(layer(x), 0.1)
        return x


def test_what_autocast_has_cached_for_an_earlier_stage_is_not_made_again_by_a_later_one() -> None:
    torch.manual_seed(0)
    batch = torch.randn(512, 16)
    case = Case(Albert().train(), batch, (batch,))

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    with autocast():
        plan = thinnest(solve(case.model, "1GiB", sample=batch, capture="graph"))
    assert any(plan.program.kept)
    assert_trains_alike(case, execute(plan, case.model), autocast)


class Wrapping(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.gate = inside, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x) * self.gate(x).sigmoid()
        return out


def test_a_block_that_runs_within_another_block_too_is_left_to_glue() -> None:
    torch.manual_seed(0)
    batch = torch.randn(512, 16)
    layers = [Layer() for _ in range(4)]
    case = Case(nn.Sequential(*layers, Wrapping(layers[1])).train(), batch, (batch,))
    model = planned(case, "modules")
    assert [block.name for block in executor_of(model).capture.blocks] == ["0", "2", "3", "4"]
    assert_trains_alike(case, model)
