"""Emulated GPU kernels: backwards that sum in no fixed order, random state outside of the generator."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from rematplan import CaptureError, Plan, PlanMismatch, execute, solve
from rematplan.scheduler.capture.graph.graph_capture import draws_elsewhere_in
from rematplan.scheduler.capture.graph.op_graph import Op
from rematplan.scheduler.capture.repeat import deterministic, in_backward_of, rounds_alike
from rematplan.scheduler.torch_layer.preserve import in_backward
from tests.shared.helpers import smallest
from tests.shared.steps import CPU, Record, assert_equal, state

WIDTH, ROWS = 16, 128
CALLS = itertools.count()


# ---- a backward whose last bits are others each time -------------------------------------------------------


@torch.library.custom_op("rematplan_tests::atomic", mutates_args=())
def atomic(x: Tensor, supported: bool) -> Tensor:
    """The sine; its backward adds in an unknown order, except under deterministic algorithms."""
    return x.sin()


@torch.library.custom_op("rematplan_tests::atomic_backward", mutates_args=())
def atomic_backward(grad: Tensor, x: Tensor, supported: bool) -> Tensor:
    """The gradient, with noise in its last bits."""
    exact = grad * x.cos()
    if torch.are_deterministic_algorithms_enabled():
        if not supported:
            raise RuntimeError("atomic_backward does not have a deterministic implementation")
        return exact
    return exact * (1 + 1e-6 * (next(CALLS) % 7))


@atomic.register_fake
def _(x: Tensor, supported: bool) -> Tensor:
    return torch.empty_like(x)


@atomic_backward.register_fake
def _(grad: Tensor, x: Tensor, supported: bool) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.supported = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return atomic_backward(grad, *ctx.saved_tensors, ctx.supported), None


atomic.register_autograd(_backward, setup_context=_setup)


class Noisy(nn.Module):
    """Layers with noisy backwards; with ``jitter``, a number of the system's that a graph would freeze."""

    def __init__(self, supported: bool, jitter: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.supported, self.jitter = supported, jitter

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + atomic(layer(x), self.supported)
        if self.jitter:
            x = x * (1 + self.jitter * int.from_bytes(os.urandom(2)) / 2**16)
        return x.square().mean()


def planned_noisily(supported: bool, jitter: float = 0.0, capture: str = "auto") -> tuple[Noisy, Plan]:
    torch.manual_seed(0)
    model = Noisy(supported, jitter)
    return model, solve(model, "1GiB", sample=torch.randn(ROWS, WIDTH), capture=capture)


def test_a_noisy_backward_is_tried_under_deterministic_algorithms() -> None:
    _, plan = planned_noisily(supported=True)
    assert plan.capture.kind == "graph"
    assert (
        "bit-equal to the plain model under deterministic algorithms; by default plain steps differ: the gradient"
        in (plan.capture.reason)
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_where_there_are_none_plain_steps_say_how_much_a_step_may_differ() -> None:
    _, plan = planned_noisily(supported=False)
    assert plan.capture.kind == "graph"
    assert (
        "gradients of one step differ from the plain ones as those do from one another: the gradient of"
        in plan.capture.reason
    )


@pytest.mark.parametrize("supported", [True, False])
def test_noise_does_not_cover_a_graph_that_is_another_model(supported: bool) -> None:
    with pytest.raises(
        CaptureError,
        match=r"does not train like the plain model.* more than rounding.*is not deterministic.*use_deterministic_algorithms",
    ):
        planned_noisily(supported, jitter=1e-2, capture="graph")


class Sometimes(nn.Module):
    """Takes another way now and then, by a number of Python's or of NumPy's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layers, self.draw = nn.ModuleList(Plain() for _ in range(4)), draw

    def forward(self, x: Tensor) -> Tensor:
        if self.draw() < 0.1:
            x = -x
        for layer in self.layers:
            x = layer(x)
        return x


def by_numpy() -> float:
    return float(np.random.random_sample())  # noqa: NPY002 # the global one


@pytest.mark.parametrize("draw", [random.random, by_numpy])
def test_a_way_that_is_taken_seldom_is_not_left_out_of_a_graph(draw: Callable[[], float]) -> None:
    torch.manual_seed(0)
    model, batch = Sometimes(draw), torch.randn(ROWS, WIDTH)
    with pytest.raises(CaptureError, match="generators of Python or NumPy"):
        solve(model, "1GiB", sample=batch, capture="graph")
    plan = solve(model, "1GiB", sample=batch)
    planned = execute(plan.within(smallest(plan.chain)), model)
    records: list[list[Record]] = []
    for called in (model, planned):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        steps = []
        for _ in range(40):
            model.zero_grad()
            loss = called(batch).square().mean()
            loss.backward()
            steps.append({"loss": loss.detach(), **state(model)})
        records.append(steps)
    assert_equal(records[1], records[0])
    assert len({float(step["loss"]) for step in records[0] if step["loss"] is not None}) == 2


class Healthy(nn.Module):
    """Noisy, with gradients that are zero but for rounding, sparse ones and complex ones."""

    def __init__(self, supported: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH, sparse=True)
        self.layer, self.norm = (
            nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH),
        )  # which takes the bias out again
        self.phase = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
        self.blocks, self.supported = nn.Sequential(Plain(), Plain()), supported

    def forward(self, ids: Tensor) -> Tensor:
        x = atomic(self.norm(self.layer(self.embed(ids))), self.supported)
        return self.blocks((x * self.phase).real).square().mean()


@pytest.mark.parametrize("supported", [True, False])
def test_gradients_that_are_zero_sparse_or_complex_are_judged_too(supported: bool) -> None:
    torch.manual_seed(0)
    plan = solve(Healthy(supported), "1GiB", sample=torch.randint(0, 32, (ROWS,)))
    assert plan.capture.kind == "graph", plan.capture.reason
    assert (
        "from one another" in plan.capture.reason or "under deterministic algorithms" in plan.capture.reason
    )


@pytest.mark.parametrize("supported", [True, False])
def test_a_noisy_model_trains_by_its_graph_as_exactly_as_its_kernels_allow(supported: bool) -> None:
    model, plan = planned_noisily(supported)
    batch = torch.randn(ROWS, WIDTH)
    planned = execute(plan.within(smallest(plan.chain)), model)

    def step(called: nn.Module) -> Record:
        model.zero_grad()
        called(batch).backward()
        return state(model)

    if supported:
        with deterministic(CPU):
            assert_equal(step(planned), step(model))
    else:
        for a, b in zip(step(planned).values(), step(model).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- random state outside of the generator, as cuDNN keeps it for the dropout of RNNs
# ------------------------


class Outside:
    """The state of the emulated library: it advances by calls, and restarts when the generator is set."""

    seed, calls, was_set = 0, 0, True


@pytest.fixture(autouse=True)
def noticing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library notice that the generator is set."""
    real = torch.set_rng_state

    def noticed(state: Tensor) -> None:
        Outside.was_set = True
        real(state)

    monkeypatch.setattr(torch, "set_rng_state", noticed)


@torch.library.custom_op("rematplan_tests::outside", mutates_args=())
def outside(x: Tensor) -> Tensor:
    """A mask of the library's own random numbers, times the input's size."""
    if Outside.was_set:
        Outside.was_set, Outside.calls = False, 0
        Outside.seed = int(torch.randint(1 << 30, ()))
    Outside.calls += 1
    generator = torch.Generator().manual_seed(Outside.seed + Outside.calls)
    return torch.rand(x.shape, generator=generator)


@outside.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Masked(nn.Module):
    """A layer whose dropout is the emulated library's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh() * outside(x[:, :1].detach()))


class Dropped(Masked):
    """A layer whose dropout is torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.dropout(self.up(x).tanh(), 0.2))


class Plain(Masked):
    """The same without dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


def test_a_stage_with_random_state_of_its_own_is_found_and_runs_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Plain(), Masked(), Plain(), Plain(), Masked(), Plain())
    batch = torch.randn(ROWS, WIDTH)
    plan = solve(model, "1GiB", sample=batch, capture="graph")
    assert sum(not stage.recomputable for stage in plan.chain.stages) == 2
    assert "run once: run again on the same random numbers, it gives other values" in plan.capture.reason
    tight = plan.within(smallest(plan.chain))
    assert None in tight.program.kept
    planned = execute(tight, model)
    records: list[list[Record]] = []
    for called in (model, planned):
        Outside.was_set, Outside.seed, Outside.calls = False, 7, 0
        steps = []
        for _ in range(3):
            model.zero_grad()
            called(batch).square().mean().backward()
            steps.append(state(model))
        records.append(steps)
    assert_equal(records[1], records[0])


@torch.library.custom_op("rematplan_tests::fickle", mutates_args=())
def fickle(x: Tensor) -> Tensor:
    """A mask of numbers of its own; under deterministic algorithms always the same."""
    seed = 0 if torch.are_deterministic_algorithms_enabled() else next(CALLS)
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))


@fickle.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Fickle(Masked):
    """A layer whose mask is fixed under deterministic algorithms alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh() * fickle(x[:, :1].detach()))


def test_what_deterministic_algorithms_fix_is_no_matter_of_rounding_if_it_is_large() -> None:
    model = nn.Sequential(Plain(), Fickle(), Plain(), Plain())
    with pytest.raises(CaptureError, match=r"between plain steps output 0 differs by more than rounding"):
        solve(model, "1GiB", sample=torch.randn(ROWS, WIDTH), capture="graph")
    plan = solve(model, "1GiB", sample=torch.randn(ROWS, WIDTH))
    assert plan.capture.stages == ("0", "2", "3")


def test_it_is_found_behind_stages_whose_generators_are_set_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Dropped(), Masked(), Dropped(), Masked())
    plan = solve(model, "1GiB", sample=torch.randn(ROWS, WIDTH), capture="graph")
    assert sum(not stage.recomputable for stage in plan.chain.stages) == 2


def test_such_a_block_is_no_stage_that_runs_again() -> None:
    model = nn.Sequential(Plain(), Masked(), Plain(), Plain())
    plan = solve(model, "1GiB", sample=torch.randn(ROWS, WIDTH), capture="modules")
    assert plan.capture.stages == ("0", "2", "3")
    with pytest.raises(
        CaptureError, match=r"1 does not do the same when it is run again.*on the same random numbers"
    ):
        solve(model, "1GiB", sample=torch.randn(ROWS, WIDTH), capture=[model[1]])


def test_a_plan_file_cannot_have_such_a_stage_run_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Plain(), Masked(), Plain(), Plain())
    batch = torch.randn(ROWS, WIDTH)
    plan = solve(model, "1GiB", sample=batch, capture="graph")
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    for stage in data["chain"]["stages"]:
        stage["recomputable"] = True
    (tmp_path / "plan.json").write_text(json.dumps(data))
    planned = execute(Plan.load(tmp_path / "plan.json"), model)
    with pytest.raises(PlanMismatch, match=r"must run once .*and the plan has it as recomputable"):
        planned(batch)


class Recurrent(nn.Module):
    """Two LSTMs with dropout between their layers, and layers with dropout of torch's and without."""

    def __init__(self, between: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.LSTM(WIDTH, WIDTH, 2, dropout=between, batch_first=True), Dropped(), Plain()] * 2
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            found = layer(x)
            x = found[0] if isinstance(found, tuple) else found
        return x


@pytest.mark.parametrize("between", [0.5, 0.0])
@pytest.mark.slow
def test_on_cuda_blocks_that_draw_beside_an_rnn_with_dropout_run_once(between: float) -> None:
    batch = torch.randn(8, 16, WIDTH)
    for device in ("H100", None):
        plan = solve(Recurrent(between), "8GiB", sample=batch, capture="modules", device=device)
        drawing = [k for k, random in enumerate(plan.capture.random) if random]
        assert len(drawing) >= 2
        once = device is not None and between > 0
        assert all(plan.chain.stages[k].recomputable is not once for k in drawing)
        assert any(stage.recomputable for stage in plan.chain.stages)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (torch.ops.aten.lstm.input, (None, (), (), True, 2)),
        (torch.ops.aten.gru.data, (None, None, None, (), True, 2)),
        (torch.ops.aten._cudnn_rnn.default, (None, (), 4, None, None, None, 2, WIDTH, 0, 2, True)),
    ],
)
def test_ops_whose_dropout_cudnn_draws_are_known(op: Any, arguments: tuple[Any, ...]) -> None:
    def found(dropout: float, train: bool) -> bool:
        node = fx.Graph().call_function(op, (*arguments, dropout, train))
        return draws_elsewhere_in(Op(node, (), (), (), True))

    assert found(0.5, True)
    assert not found(0.0, True)
    assert not found(0.5, False)
    assert not draws_elsewhere_in(
        Op(fx.Graph().call_function(torch.ops.aten.sin.default, (None,)), (), (), (), True)
    )


class Drawn(Masked):
    """A layer with stochastic depth: a number of torch's, or of a generator of its own."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3) if own else None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh()) * (torch.rand((), generator=self.generator) + 0.8).floor()


@pytest.mark.parametrize("own", [False, True])
def test_blocks_that_draw_one_number_repeat_themselves(own: bool) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Drawn(own) for _ in range(4))), torch.randn(ROWS, WIDTH)
    plan = solve(model, "1GiB", sample=batch, capture="modules")
    assert plan.capture.stages == ("0", "1", "2", "3")
    assert sum(stage.recomputable for stage in plan.chain.stages) == 4


# ---- the parts
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_code_runs_within_a_backward_in_the_callers_modes(grad: bool) -> None:
    def look() -> tuple[bool, bool, bool, torch.dtype]:
        return (
            in_backward(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        )

    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_backward_of(CPU, look) == (True, grad, True, torch.bfloat16)
    assert in_backward_of(CPU, look)[1:3] == (True, False)


def test_deterministic_algorithms_are_left_as_they_were() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(CPU):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_sums_in_another_order_are_told_from_other_values() -> None:
    values = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    one, other = values.sum(0), values.flip(0).cumsum(0)[-1]
    assert not torch.equal(one, other)
    assert rounds_alike(one, other)
    assert not rounds_alike(one, one * (1 + 1e-4))
    assert not rounds_alike(one, one.double())
    assert rounds_alike(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    assert not rounds_alike(torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 1.0]))
    assert not rounds_alike(torch.tensor([1, 2]), torch.tensor([1, 3]))
