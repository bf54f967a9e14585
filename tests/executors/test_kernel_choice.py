"""Settings that choose kernels (attention, determinism, precision) are the first run's in re-runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rematplan import execute, solve
from rematplan.scheduler.torch_layer.environment import switched, switches
from tests.shared.helpers import smallest
from tests.shared.steps import EITHER_CAPTURE, Record, assert_equal, state

WIDTH, HEADS = 32, 4
BATCH = torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Attention with a residual connection, under a context of its own."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        super().__init__()
        self.read, self.write, self.context = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), context

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.read(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        with self.context():
            found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.write(found.transpose(1, 2).reshape(x.shape)).tanh()


def math() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def rounding() -> Any:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def step(called: nn.Module, model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> Record:
    """A forward within the context, its backward outside."""
    model.zero_grad()
    with context():
        loss = called(BATCH).square().mean()
    before = switches("cpu")
    loss.backward()
    assert switches("cpu") == before
    return {"loss": loss.detach(), **state(model)}


@EITHER_CAPTURE
@pytest.mark.parametrize("context", [math, rounding, deterministic])
@pytest.mark.slow
def test_a_backward_outside_of_the_context_of_its_forward_is_the_plain_one(
    context: Callable[[], AbstractContextManager[Any]], capture: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention() for _ in range(4)))
    with context():
        plan = solve(model, "1GiB", sample=BATCH, capture=capture)
    tight = plan.within(smallest(plan.chain))
    assert None in tight.program.kept
    planned = execute(tight, model, on_new_shape="error", check="values")
    for _ in range(2):
        assert_equal(step(planned, model, context), step(model, model, context))


def test_a_block_under_a_context_of_the_models_own_runs_again_under_it() -> None:
    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Attention() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for number, block in enumerate(self.blocks):
                with math() if number % 2 else nullcontext():
                    x = block(x)
            return x

    torch.manual_seed(0)
    model = Within()
    plan = solve(model, "1GiB", sample=BATCH, capture="modules")
    planned = execute(plan.within(smallest(plan.chain)), model, check="values")
    assert_equal(step(planned, model, nullcontext), step(model, model, nullcontext))


class Ramp(nn.Module):
    """Makes a tensor on the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh()) * torch.linspace(0.5, 1, WIDTH)


@EITHER_CAPTURE
@pytest.mark.parametrize("set_", [False, True])
def test_tensors_are_made_where_the_first_run_made_them(capture: str, set_: bool) -> None:
    """A backward on a GPU has its own thread, without a default device; another thread stands for that."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Ramp() for _ in range(4)))
    plan = solve(model, "1GiB", sample=BATCH, capture=capture)
    planned = execute(plan.within(smallest(plan.chain)), model)
    records = []
    for called in (planned, model):
        model.zero_grad()
        if set_:
            torch.set_default_device("cpu")
        try:
            loss = called(BATCH).square().mean()
        finally:
            torch.set_default_device(None)
        with torch.device("meta"):
            loss.backward()
            assert torch.empty(1).device.type == "meta"
        records.append(state(model))
    assert_equal(*records)


def test_precision_that_backends_are_told_one_by_one_is_known_and_put_back() -> None:
    torch.set_float32_matmul_precision(
        "highest"
    )  # as below: a process that was told nothing has other switches
    then = switches("cuda")
    model = nn.Sequential(*(Attention() for _ in range(2)))
    planned = execute(solve(model, "1GiB", sample=BATCH), model)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix"):
            torch.get_float32_matmul_precision()
        mixed = switches("cuda")
        assert mixed != then
        with switched(then, "cuda"):
            assert switches("cuda") == then
        assert switches("cuda") == mixed
        assert_equal(step(planned, model, nullcontext), step(model, model, nullcontext))
        solve(model, "1GiB", sample=BATCH)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
    assert switches("cuda") == then


def test_switches_of_cuda_are_put_back_too() -> None:
    then, cudnn = switches("cuda"), torch.backends.cudnn
    try:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = True, True, False
        now = switches("cuda")
        assert now != then
        with switched(then, "cuda"):
            assert switches("cuda") == then
        assert switches("cuda") == now
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, False, True
    assert switches("cuda") == then


class Doubled(torch.overrides.TorchFunctionMode):
    """Doubles what GELU gives, for code within it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.nn.functional.gelu else result


def test_a_function_mode_of_some_steps_has_a_plan_of_its_own() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
    x = torch.randn(4, 8)
    planned = execute(solve(model, "1MiB", sample=x), model)
    for context in (nullcontext(), Doubled(), nullcontext(), Doubled()):
        with context:
            expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
            found = torch.autograd.grad(planned(x).sum(), list(planned.parameters()))
        assert all(map(torch.equal, expected, found))
