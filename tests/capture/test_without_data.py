"""Planning and estimating for a device that is missing: on meta, on fake tensors, on a model with data."""

from __future__ import annotations

import functools
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from rematplan import CaptureError, DeviceSpec, InfeasibleBudget, Plan, PlanMismatch, estimate, execute, solve
from rematplan.scheduler.capture.bit_equal_step import difference, step_result
from rematplan.scheduler.torch_layer.loss import find_loss
from tests.shared.helpers import smallest
from tests.shared.models import Block, Case, gpt2, llama, mlp, residual, resnet, tiny
from tests.shared.steps import each_model

HOST = DeviceSpec("a host", memory=2**34, bandwidth=1e10, flops={"float32": 5e10}, kind="cpu", workspace=0)
CUDA = DeviceSpec("a card", memory=2**34, bandwidth=1e12, flops={"float32": 2e13, "bfloat16": 2e14})
# Convolutions, batch norms and mixed kernels of the CPU take scratch space of their own, which a count
# without data cannot see.
BLIND = {"mlp": 0.03, "residual": 0.06, "resnet": 0.035}
# Two layers of each kind: the second one is priced as the first.
MODELS: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "residual": residual,
    "gpt2": functools.partial(gpt2, 2),
    "llama": functools.partial(llama, 2),
    "resnet": resnet,
    "tiny": tiny,
}


@pytest.mark.slow
@each_model(["mlp", "residual", "gpt2", "llama", "resnet"])
def test_a_chain_without_data_is_the_chain_with_it(name: str) -> None:
    case = MODELS[name]()
    real = solve(case.model, "8GiB", sample=case.sample, costs="roofline", capture="graph")
    dry = solve(case.model, "8GiB", sample=case.sample, device=HOST, capture="graph")
    assert dry.capture.graph == real.capture.graph
    assert dry.capture.model == real.capture.model
    assert dry.capture.random == real.capture.random
    assert dry.capture.changed == real.capture.changed
    assert dry.resident == real.resident
    for a, b in zip(real.chain.stages, dry.chain.stages, strict=True):
        assert (a.input, a.carried, a.carried_change, a.grad) == (
            b.input,
            b.carried,
            b.carried_change,
            b.grad,
        )
        # Autograd keeps a few numbers as tensors, which only a count on real ones shows.
        assert 0 <= a.options[0].saved - b.options[0].saved <= 64
        assert b.forward > 0
    below = 1 - dry.plain.peak / real.plain.peak
    assert -0.001 <= below <= BLIND.get(name, 0.001)


@pytest.mark.slow
def test_blocks_without_data_are_the_blocks_with_it() -> None:
    case = residual()
    real = solve(case.model, "8GiB", sample=case.sample, costs="roofline", capture="modules")
    dry = solve(case.model, "8GiB", sample=case.sample, device=HOST, capture="modules")
    assert dry.capture.stages == real.capture.stages
    assert dry.capture.random == real.capture.random
    assert dry.capture.changed == real.capture.changed
    assert [s.options[0].saved for s in dry.chain.stages] == [s.options[0].saved for s in real.chain.stages]


@each_model(["tiny", "residual", "llama"])
@pytest.mark.parametrize("device", [HOST, CUDA], ids=["cpu rules", "cuda rules"])
@pytest.mark.slow
def test_a_plan_made_without_data_trains_like_the_plain_model(name: str, device: DeviceSpec) -> None:
    case = MODELS[name]()
    whole = solve(case.model, "8GiB", sample=case.sample, device=device)
    plan = whole.within((smallest(whole.chain) + whole.plain.peak) // 2)
    assert plan.predicted_overhead > 0
    assert plan.capture.target == device.name
    assert "not tried against the plain model: no data" in str(plan)
    plan = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    planned = execute(plan, case.model)
    want = step_result(case.model, lambda: case(case.model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = step_result(planned, lambda: case(planned))
    # The caches of generation, which a plan leaves out, come last.
    assert difference(replace(want, outputs=want.outputs[: len(got.outputs)]), got) is None


@pytest.mark.slow
def test_models_on_meta_and_fake_models_give_the_plan_of_a_real_one() -> None:
    model = mlp_like(layers=2)
    real = solve(model, "3MB", sample=torch.randn(1024, 64), device=HOST)
    assert real.predicted_overhead > 0
    with torch.device("meta"):
        on_meta = mlp_like(layers=2)
        batch = torch.empty(1024, 64)
    with FakeTensorMode():
        fake = mlp_like(layers=2)
        fake_batch = torch.empty(1024, 64)
    for empty, sample in ((on_meta, batch), (fake, fake_batch), (on_meta, torch.empty(1024, 64))):
        plan = solve(empty, "3MB", sample=sample, device=HOST)
        assert plan.schedule == real.schedule
        assert plan.chain == real.chain
        execute(plan, model)  # a model of the same structure, with data
    assert next(on_meta.parameters()).device.type == "meta"


def mlp_like(layers: int = 8) -> nn.Module:
    """The model of ``tests.shared.models.mlp``, or one with fewer layers."""
    found: list[nn.Module] = []
    for _ in range(layers):
        found += [nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1), nn.BatchNorm1d(64)]
    return nn.Sequential(*found, nn.Linear(64, 16)).train()


def test_a_real_model_is_left_as_it_is() -> None:
    case = tiny()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    state = torch.get_rng_state()
    solve(case.model, "80MB", sample=case.sample, device="H100")
    assert all(torch.equal(before[name], value) for name, value in case.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not case.model.__dict__.get("forward")
    assert not any(isinstance(m, Block) and m.runs for m in case.model.modules())


def test_rates_go_by_dtype_and_bytes_by_the_allocator() -> None:
    class Products(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.weights = nn.ParameterList(
                nn.Parameter(torch.empty(2048, 2048, dtype=dtype)) for _ in range(4)
            )

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.weights:
                x = torch.relu(x @ weight)
            return x.sum()

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            plan = solve(Products(dtype), "1GB", sample=torch.empty(2048, 2048, dtype=dtype), device=CUDA)
        seconds[dtype] = plan.chain.plain_seconds
        assert plan.resident["workspaces"] == 2 * CUDA.workspace  # of two threads
        assert all(stage.input % 512 == 0 for stage in plan.chain.stages)
    # The products take 10 times as long, what moves memory twice.
    assert 4 < seconds[torch.float32] / seconds[torch.bfloat16] < 10


def test_attention_keeps_no_matrix_of_scores_and_its_products_count() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 192)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.inner(x).view(1, 4096, 3, 4, 16).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).square().sum()

    with torch.device("meta"):
        plan = solve(Attention(), "1GB", sample=torch.empty(1, 4096, 64), device=CUDA)
    assert plan.plain.peak < 4 * 4096 * 4096 * 4
    products = 2 * 2 * 4 * 4096 * 4096 * 16 / CUDA.rate("float32")
    assert sum(s.forward for s in plan.chain.stages) > products


def test_what_cannot_be_is_refused_with_what_to_do() -> None:
    case = tiny()
    with torch.device("meta"):
        model = mlp_like()
    with pytest.raises(ValueError, match=r"the model has no data .* pass device="):
        solve(model, "1GB", sample=torch.empty(8, 64, device="meta"))
    with pytest.raises(ValueError, match="costs='measure' needs the device"):
        solve(case.model, "1GB", sample=case.sample, device="H100", costs="measure")
    with pytest.raises(ValueError, match="is not built in"):
        solve(case.model, "1GB", sample=case.sample, device="H1000")
    with pytest.raises(InfeasibleBudget, match=r"workspaces 64.00 MiB"):
        solve(case.model, "1MB", sample=case.sample, device="H100")


def test_code_that_asks_for_values_is_refused() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y.sum() if bool(y.max() > 0) else y.mean()

    with pytest.raises(CaptureError, match="asks for the values of tensors"):
        solve(Asks(), "1GB", sample=torch.empty(2, 4), device="H100")


def test_a_plan_that_does_not_train_like_the_model_is_found_out_when_it_first_runs() -> None:
    class Draws(nn.Module):
        """Its loss differs from one step to the next."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x.sum() * (1.0 + random.random())

    model = Draws()
    plan = solve(model, "1GB", sample=torch.randn(4, 8), device=HOST)
    with pytest.raises(PlanMismatch):
        execute(plan, model)(torch.randn(4, 8))


def test_hooks_do_not_see_the_gradients_of_the_trial() -> None:
    case = tiny()
    plan = solve(case.model, "1MB", sample=case.sample, device=HOST)
    seen: list[Tensor] = []
    next(case.model.parameters()).register_hook(seen.append)
    planned = execute(plan, case.model)
    find_loss(case(planned))[0].backward()
    assert len(seen) == 1


@pytest.mark.slow
def test_optimizer_state_counts_without_data() -> None:
    case = mlp()
    optimizer = torch.optim.AdamW(case.model.parameters())
    with torch.device("meta"):
        model = mlp_like()
    want = solve(case.model, "8GiB", sample=case.sample, optimizer=optimizer, costs="roofline").resident
    found = solve(
        model, "8GiB", sample=case.sample, optimizer=torch.optim.AdamW(model.parameters()), device=HOST
    ).resident
    assert found["optimizer state"] == want["optimizer state"]


@pytest.mark.slow
def test_an_estimate_has_the_bytes_of_the_plain_step() -> None:
    case = llama(layers=2)
    optimizer = torch.optim.AdamW(case.model.parameters())
    found = estimate(case.model, case.sample, device=HOST, optimizer=optimizer)
    plan = solve(case.model, "8GiB", sample=case.sample, device=HOST, optimizer=optimizer)
    parameters = sum(p.numel() * 4 for p in case.model.parameters())
    assert found.parameters == found.gradients == parameters
    assert found.optimizer_state == plan.resident["optimizer state"]
    assert found.peak == plan.plain.peak
    assert found.batch == 8
    assert found.smallest < found.peak
    assert next(iter(found.activations)) == "model.layers.*"
    text = str(found)
    assert "model.layers.*" in text
    assert "peak of the plain step" in text
    assert (found.budget, found.largest_plain) == (None, None)


@pytest.mark.slow
def test_the_largest_batches_fit_and_one_more_does_not() -> None:
    with torch.device("meta"):
        model = mlp_like(layers=2)
    found = estimate(model, torch.empty(32, 64), "3MB", device=HOST)
    assert found.largest_plain is not None
    assert found.largest_planned is not None
    assert 32 < found.largest_plain < found.largest_planned

    def peaks(batch: int) -> Any:
        return estimate(model, torch.empty(batch, 64), device=HOST)

    assert peaks(found.largest_plain).peak <= 3_000_000 < peaks(found.largest_plain + 1).peak
    assert peaks(found.largest_planned).smallest <= 3_000_000 < peaks(found.largest_planned + 1).smallest
    assert f"a batch of {found.largest_plain} without a plan" in str(found)
    tight = estimate(model, torch.empty(32, 64), 10_000, device=HOST)
    assert (tight.largest_plain, tight.largest_planned) == (0, 0)
