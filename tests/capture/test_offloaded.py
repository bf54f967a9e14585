"""Saved tensors of trial steps wait on the host: equal gradients, each tensor once, within its room."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from rematplan import CaptureError
from rematplan.scheduler.capture.offloaded import offloaded

ROWS, WIDTH = 64, 32
SIZE = 4 * ROWS * WIDTH


class Twice(nn.Module):
    """Saves one tensor by two ops, a transposed view of it, and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        return ((y * self.scale) * y + (y.T @ y).sum()).sin().sum()


def gradients(model: nn.Module, batch: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(batch).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_gradients_are_those_of_the_plain_step_and_each_tensor_is_copied_once() -> None:
    torch.manual_seed(0)
    model, batch = Twice(), torch.randn(ROWS, WIDTH)
    want = gradients(model, batch)
    model.zero_grad()
    with offloaded([*model.parameters(), batch], "cpu") as held:
        loss = model(batch)
    # The output of tanh, its product with the scale, its transposed view (for the product's other factor),
    # and the sine's input.
    assert held.now == 4 * SIZE
    loss.backward()
    assert all(map(torch.equal, want, [p.grad for p in model.parameters() if p.grad is not None]))
    del loss
    gc.collect()
    assert held.now == 0


def test_a_tensor_in_the_place_of_another_is_copied_too() -> None:
    weight = torch.randn(ROWS, WIDTH, requires_grad=True)
    with offloaded([weight], "cpu"):
        loss = torch.zeros(())
        for number in range(5):
            factor = torch.full((ROWS, WIDTH), float(number))  # where the one before lay, as a rule
            loss = loss + (weight * factor).sum()
            factor.add_(1)  # after it was saved: the copy is of what was saved
            del factor
    loss.backward()
    assert torch.equal(weight.grad, torch.full_like(weight, sum(range(5))))  # type: ignore[arg-type]


def test_where_the_host_has_no_room_the_error_says_what_to_do() -> None:
    model, batch = Twice(), torch.randn(ROWS, WIDTH)
    with (
        offloaded([*model.parameters(), batch], "cpu", 2 * SIZE),
        pytest.raises(
            CaptureError,
            match=r"more .* than the 16.00 KiB of host memory that are free; pass a smaller sample",
        ),
    ):
        model(batch)


def test_tensors_of_other_devices_stay() -> None:
    model, batch = Twice(), torch.randn(ROWS, WIDTH)
    with offloaded([], "cuda") as held:
        model(batch).backward()
    assert held.now == 0
