"""Code that asks whether two arguments are one (``query is key``) gets the plain answer, also in re-runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematplan import execute, solve
from tests.shared.helpers import smallest
from tests.shared.steps import EITHER_CAPTURE, Record, assert_equal, state

ROWS, OTHERS = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).unbind()


class Attend(nn.Module):
    """A layer that takes another way where its arguments are one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        scale = 0.5 if x is memory else 1.0
        return torch.tanh(self.query(x) * scale) * torch.tanh(self.key(memory))


class Attending(nn.Module):
    """Such layers, one after the other, and a counter for which there is no graph."""

    def __init__(self, glue: bool) -> None:
        super().__init__()
        self.glue, self.calls = glue, 0
        self.blocks = nn.ModuleList(Attend() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for block in self.blocks:
            x = x + block(x, x) if self.glue else block(x, x)
        return x.square().mean()


class SelfAttention(nn.Module):
    """torch's own, which asks ``query is key is value``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x.square().mean()


class TwoInputs(nn.Module):
    """A model that asks at its root."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        scale = 0.5 if x is memory else 1.0
        return (self.blocks(x) * scale + self.blocks(memory)).square().mean()


def step(called: nn.Module, model: nn.Module, *arguments: Any) -> Record:
    """The loss, and all that a step leaves behind."""
    model.zero_grad()
    loss = called(*arguments)
    loss.backward()
    return {"loss": loss.detach(), **state(model)}


@pytest.mark.parametrize("capture", ["auto", "modules"])
@pytest.mark.parametrize("make", [lambda: Attending(True), lambda: Attending(False), SelfAttention])
@pytest.mark.slow
def test_blocks_are_given_one_tensor_twice_in_re_runs_too(make: Any, capture: str) -> None:
    torch.manual_seed(0)
    model, batch = make(), ROWS[None]
    plan = solve(model, "1GiB", sample=batch, capture=capture)
    planned = execute(plan.within(smallest(plan.chain)), model)
    for _ in range(2):
        expected = step(model, model, batch)
        assert_equal(step(planned, model, batch), expected)


@EITHER_CAPTURE
@pytest.mark.parametrize("sample", [(ROWS, ROWS), (ROWS, OTHERS)], ids=["one tensor", "two tensors"])
@pytest.mark.slow
def test_a_model_may_be_called_with_one_tensor_or_with_two(sample: Any, capture: str) -> None:
    torch.manual_seed(0)
    model = TwoInputs()
    how = "auto" if capture == "graph" else capture
    planned = execute(solve(model, "1GiB", sample=sample, capture=how), model, on_new_shape="error")
    for arguments in ((ROWS, ROWS), (ROWS, OTHERS), (OTHERS, OTHERS)):
        assert_equal(step(planned, model, *arguments), step(model, model, *arguments))
