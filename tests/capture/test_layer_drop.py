"""Layers that are dropped at random: planned with all running, trained by that plan when some do not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.shared.state_training import WIDTH, Layer, assert_trains_like_plain, planned_like

DEPTH = 5


class Dropped(nn.Module):
    """Decides for each layer, in one of several ways, whether it runs."""

    def __init__(self, how: str, share: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.how, self.share = how, share
        self.scale = nn.Parameter(torch.ones(()))

    def leaves_out(self, index: int) -> bool:
        if self.how == "a tensor":
            return bool(torch.rand([]) < self.share)
        if self.how == "survival":
            return torch.rand(1).item() > 1 - self.share
        if self.how == "python":
            return random.random() < self.share
        if self.how == "uniform":
            return random.uniform(0, 1) < self.share
        if self.how == "bernoulli":
            return not torch.bernoulli(torch.tensor(1 - self.share))
        return bool(self.chosen[index] < self.share)

    def forward(self, x: Tensor) -> Tensor:
        self.chosen = torch.rand(DEPTH) if self.how == "at once" else torch.zeros(0)
        for index, layer in enumerate(self.layers):
            if not (self.training and self.leaves_out(index)):
                x = layer(x)
        return (x * self.scale).square().mean()


@pytest.mark.parametrize("how", ["a tensor", "survival", "python", "uniform", "bernoulli", "at once"])
@pytest.mark.slow
def test_a_step_that_leaves_layers_out_is_met_within_the_plan_of_all(how: str) -> None:
    assert_trains_like_plain(lambda: Dropped(how), steps=8)


class Pairs(nn.Module):
    """Hands two values on from layer to layer, and leaves layers out; glue makes the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Pair() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = x * 0.5
        for layer in self.layers:
            if torch.rand(()) < 0.4:
                continue
            x, y = layer(x, y)
        return (x * y).square().mean()


class Pair(Layer):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z = self.inner(x + y)
        return z, torch.tanh(y + z)


def test_two_values_pass_by_layers_that_are_left_out() -> None:
    assert_trains_like_plain(Pairs, steps=8)


class Path(Layer):
    """Stochastic depth within the layer, for the whole batch or for each row."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        if not self.rows:
            return x if torch.rand(1) < 0.5 else self.inner(x)
        mask = x.new_empty((x.shape[0], 1)).bernoulli_(0.5)
        return x + (self.inner(x) - x) * mask


class Paths(nn.Module):
    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Path(rows) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.mark.parametrize("rows", [False, True])
def test_stochastic_depth_within_layers_is_priced_with_all_of_them_run(rows: bool) -> None:
    assert_trains_like_plain(lambda: Paths(rows), steps=6)


def test_the_plan_has_all_layers_whatever_the_share_that_is_left_out() -> None:
    for share in (0.1, 0.9):
        _, plan = planned_like(lambda share=share: Dropped("a tensor", share))  # type: ignore[misc]
        assert len(plan.chain) == DEPTH + 2


def test_a_step_that_leaves_all_layers_out_is_met(caplog: Any) -> None:
    caplog.set_level("INFO", logger="rematplan")
    assert_trains_like_plain(lambda: Dropped("a tensor"), before=_all_left_out)
    assert f"left out {DEPTH} of {DEPTH} blocks" in caplog.text


def _all_left_out(model: nn.Module, step: int) -> None:
    model.share = 1.0 if step in (0, 3) else 0.0  # type: ignore[assignment]
