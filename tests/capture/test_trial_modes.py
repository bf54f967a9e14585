"""State that planning sets aside: outer plans, torch.autograd.grad, random numbers that choose layers."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch

from rematplan.scheduler.capture.blocks.layer_drop import VALUES, Effort, fixed_draws
from rematplan.scheduler.capture.graph.inner_gradients import noted_gradients
from rematplan.scheduler.torch_layer.nested_plans import inner_plans_left_out, within_a_plan


def test_a_thread_is_within_a_plan_until_the_outermost_ends() -> None:
    elsewhere: list[bool] = []
    with pytest.raises(KeyError), inner_plans_left_out():  # noqa: PT012 # what it sees on the way
        with inner_plans_left_out():
            thread = threading.Thread(target=lambda: elsewhere.append(within_a_plan()))
            thread.start()
            thread.join()
        assert within_a_plan()
        raise KeyError
    assert not within_a_plan()
    assert elsewhere == [False]


def test_gradients_that_code_takes_are_noted_and_taken() -> None:
    original = torch.autograd.grad
    x = torch.ones(2, requires_grad=True)
    with noted_gradients() as seen:
        assert not seen
        assert torch.equal(torch.autograd.grad((x * 3).sum(), x)[0], torch.full((2,), 3.0))
    assert seen == ["torch.autograd.grad"]
    assert torch.autograd.grad is original


@pytest.mark.parametrize("value", VALUES)
def test_few_random_numbers_are_fixed_and_many_are_not(value: float) -> None:
    draws: list[Any] = [
        lambda: float(torch.rand(1)),
        lambda: float(torch.rand(5)[3]),
        lambda: float(torch.empty(()).uniform_()),
        lambda: float(random.random()),
        lambda: float(np.random.rand()),  # noqa: NPY002 # what models call
    ]
    with fixed_draws(value) as fixed:
        assert [draw() for draw in draws] == pytest.approx([value] * len(draws))
        assert random.uniform(2.0, 6.0) == pytest.approx(2 + 4 * value)
        assert torch.bernoulli(torch.tensor(0.5)).item() == round(value)
        assert fixed.count == len(draws) + 2
        assert len(torch.rand(1000).unique()) > 900
        assert len(torch.rand(4, 4).unique()) > 1
        assert fixed.count == len(draws) + 2
    assert random.random() != random.random()


def test_draws_are_counted_and_left_alone() -> None:
    with fixed_draws(None, counting=True) as counted:
        assert random.random() != random.random()
        torch.rand(1)
    assert counted.count == 3
    with fixed_draws(None) as left:
        torch.rand(1)
    assert left.count == 0


def test_the_numbers_drawn_leave_generators_as_the_plain_code_does() -> None:
    torch.manual_seed(3)
    torch.rand(1)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with fixed_draws(0.0):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), after)


def test_an_effort_is_the_number_of_ops() -> None:
    x = torch.ones(2)
    with Effort() as effort:
        (x + 1).mul_(2).view(2, 1)
    assert effort.ops == 3
