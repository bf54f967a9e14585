"""Forwards that need grad: forces by autograd.grad, hooks on tensors; and weights that pre-hooks make."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematplan import CaptureError, solve
from tests.shared.state_training import BATCH, WIDTH, Layer, Stack, assert_trains_like_plain

DEPTH = 4


class Forces(Layer):
    """Adds the gradient of its own output, which it makes by autograd.grad."""

    guarded = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.guarded or torch.is_grad_enabled()):
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            y = self.inner(x)
            (force,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y + 0.1 * torch.tanh(force)


class Guarded(Forces):
    guarded = True


class Hooked(Layer):
    """Scales a gradient by a hook on a tensor, and retains that of another, which it leaves on itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y.register_hook(lambda grad: grad * 0.5)
        self.kept = y * 2
        self.kept.retain_grad()
        return self.kept


@pytest.mark.parametrize("kind", [Forces, Guarded, Hooked])
@pytest.mark.slow
def test_a_block_that_needs_grad_trains_as_it_does_plainly(kind: Any) -> None:
    assert_trains_like_plain(lambda: Stack(*(kind() for _ in range(DEPTH))))


def test_a_gradient_taken_outside_of_the_blocks_is_refused_with_what_to_do() -> None:
    class Energy(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            y = x
            for layer in self.layers:
                y = layer(y)
            (force,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return y.square().mean() + force.square().mean()

    model = Energy(*(Layer() for _ in range(DEPTH))).train()
    with pytest.raises(CaptureError, match=r"autograd\.grad.* outside of layers\.0"):
        solve(model, "1GiB", sample=torch.randn(BATCH, WIDTH), capture="modules")


@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.slow
def test_a_weight_made_by_a_pre_hook_is_made_within_the_block(
    make: Callable[[nn.Module], nn.Module], inside: bool
) -> None:
    def model() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            linears = [make(nn.Linear(WIDTH, WIDTH)) for _ in range(DEPTH)]
        return Stack(*(nn.Sequential(nn.Tanh(), each) if inside else each for each in linears))

    assert_trains_like_plain(model)
