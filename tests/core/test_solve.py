"""solve(): clear errors before any change, true accounts, and the model restored."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rematplan
from rematplan import CaptureError, InfeasibleBudget, Plan, execute, measure_peak, solve
from rematplan.scheduler.core.budget import format_bytes, parse_budget
from rematplan.scheduler.core.device import DeviceSpec
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.costs.resident import optimizer_bytes, optimizer_step_bytes
from rematplan.scheduler.solvers import SOLVERS
from rematplan.scheduler.torch_layer.target import Target

CPU = torch.device("cpu")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)
    ]
    return nn.Sequential(*layers).train()


def _batch() -> Tensor:
    return torch.randn(256, 32, generator=torch.Generator().manual_seed(1))


def _state(model: nn.Module) -> list[Tensor]:
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]
    return [torch.get_rng_state(), *(t.detach().clone() for t in tensors)]


def _unchanged(model: nn.Module, before: list[Tensor], modes: list[bool]) -> None:
    after = _state(model)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(
    ("budget", "error", "says"),
    [
        (0, ValueError, "more than 0"),
        (-5, ValueError, "more than 0"),
        (float("nan"), ValueError, "whole number"),
        (float("inf"), ValueError, "whole number"),
        (0.5, ValueError, '"50%"'),
        (1e9, ValueError, "whole number"),
        (True, TypeError, "bool"),
        (None, TypeError, "NoneType"),
        ("6 GB please", ValueError, "6GiB"),
        ("", ValueError, "cannot be read"),
        ("-1GiB", ValueError, "cannot be read"),
        ("0%", ValueError, "above 0%"),
        ("101%", ValueError, "at most 100%"),
        ("12 parsecs", ValueError, "parsecs"),
        ("1.5", ValueError, "no unit"),
        ("0MB", ValueError, "more than 0"),
        (2**63, ValueError, r"2\^63"),
        ("9999999TiB", ValueError, r"2\^63"),
    ],
)
def test_a_budget_that_is_none_says_how_to_write_one(budget: Any, error: type[Exception], says: str) -> None:
    model = _model()
    before, modes = _state(model), [m.training for m in model.modules()]
    with pytest.raises(error, match=says):
        solve(model, budget, sample=_batch())
    _unchanged(model, before, modes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 * 2**30),
        ("6 GiB", 6 * 2**30),
        ("800MB", 800 * 10**6),
        ("1.5 kb", 1500),
        ("512", 512),
        ("512B", 512),
        ("2g", 2 * 2**30),
        ("75%", 750),
        ("0.1%", 1),
        (4096, 4096),
        (np.int64(4096), 4096),
    ],
)
def test_a_budget_is_read(text: Any, expected: int) -> None:
    assert parse_budget(text, 1000) == expected


def test_a_percentage_is_of_the_devices_memory() -> None:
    assert parse_budget("100%") > 2**30
    assert parse_budget("50%") == pytest.approx(parse_budget("100%") / 2, abs=1)


def test_auto_is_what_is_free_less_a_reserve() -> None:
    assert parse_budget("auto", 1000, lambda: 700) == 650
    assert parse_budget(" auto-600B", 1000, lambda: 700) == 100
    assert parse_budget("auto - 10%", 1000, lambda: 700) == 600
    with pytest.raises(ValueError, match=r"700 B are free, no more than the reserve of 800 B"):
        parse_budget("auto - 800B", 1000, lambda: 700)
    assert 2**28 < parse_budget("auto") < parse_budget("100%")
    model, batch = _model(), _batch()
    plan = solve(model, "auto - 1MiB", sample=batch, solver="keep_all")
    assert plan.resident["parameters"] < plan.memory_budget < parse_budget("100%")


def test_bytes_are_written_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1536, 3 * 2**20, 2**40)] == [
        "0 B",
        "1.50 KiB",
        "3.00 MiB",
        "1.00 TiB",
    ]


class _Returns(nn.Module):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.layer(x))


def _frozen() -> nn.Module:
    return _model().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "keywords", "error", "says"),
    [
        (_model, {"sample": torch.randn(3, 7)}, ValueError, "rejects the sample"),
        (_model, {"sample": {"wrong": torch.randn(3, 32)}}, ValueError, "does not fit"),
        (_model, {"sample": (torch.randn(3, 32), torch.randn(3, 32))}, ValueError, "does not fit"),
        (_model, {"sample": "text"}, TypeError, "pass a tensor"),
        (_model, {"sample": torch.randn(3, 32, device="meta")}, ValueError, "move the sample"),
        (_frozen, {"sample": torch.randn(3, 32)}, ValueError, "requires grad"),
        (lambda: _model().eval(), {"sample": torch.randn(3, 32)}, ValueError, r"model\.train\(\)"),
        (
            lambda: _Returns(lambda y: {"text": "hi"}),
            {"sample": torch.randn(3, 4)},
            ValueError,
            "holds no tensor",
        ),
        (
            lambda: _Returns(lambda y: y.detach()),
            {"sample": torch.randn(3, 4)},
            ValueError,
            "that requires grad",
        ),
        (_model, {"sample": torch.randn(3, 32), "solver": "magic"}, ValueError, "optimal, revolve"),
        (_model, {"sample": torch.randn(3, 32), "capture": "jit"}, ValueError, "auto, graph, modules"),
        (_model, {"sample": torch.randn(3, 32), "costs": "guess"}, ValueError, "measure, roofline"),
        (_model, {"sample": torch.randn(3, 32), "optimizer": "adam"}, TypeError, "Optimizer"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_changed(
    model: Callable[[], nn.Module], keywords: dict[str, Any], error: type[Exception], says: str
) -> None:
    made = model()
    before, modes = _state(made), [m.training for m in made.modules()]
    with pytest.raises(error, match=says):
        solve(made, "1GiB", **keywords)
    _unchanged(made, before, modes)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        solve("a model", "1GiB", sample=torch.zeros(1))  # type: ignore[arg-type] # that is the point


@pytest.mark.parametrize("capture", ["graph", "modules"])
def test_solving_leaves_gradients_buffers_random_numbers_and_modes_as_they_were(capture: str) -> None:
    model = _model()
    model(_batch()).sum().backward()
    before, modes = _state(model), [m.training for m in model.modules()]
    pointers = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    solve(model, "1GiB", sample=_batch(), capture=capture)
    _unchanged(model, before, modes)
    assert pointers == [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]


class _Scaling(nn.Module):
    """Scales its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = _model()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x.mul_(0.5))
        return out


@pytest.mark.parametrize("capture", ["graph", "modules"])
@pytest.mark.slow
def test_solving_leaves_no_gradient_on_the_sample_and_reverses_none_of_its_history(capture: str) -> None:
    leaf = _batch().requires_grad_()
    solve(_model(), "1GiB", sample=leaf, capture=capture)
    assert leaf.grad is None
    made = leaf * 2
    solve(_model(), "1GiB", sample=made, capture=capture)
    made.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


def test_a_sample_that_the_model_changes_in_place_is_as_it_was() -> None:
    batch = _batch()
    assert solve(_Scaling(), "1GiB", sample=batch).capture.kind == "modules"
    assert torch.equal(batch, _batch())


@pytest.mark.parametrize("solver", [s.name for s in SOLVERS.values() if s.executable and not s.required])
@pytest.mark.slow
def test_the_smallest_budget_that_the_error_names_is_met_by_a_real_step(solver: str) -> None:
    model, batch = _model(), _batch()
    with pytest.raises(InfeasibleBudget) as caught:
        solve(model, 1000, sample=batch, solver=solver)
    error = caught.value
    assert error.budget == 1000
    assert error.solver == solver
    assert "parameters" in str(error)
    with pytest.raises(InfeasibleBudget):
        solve(model, error.smallest // 2, sample=batch, solver=solver)
    plan = solve(model, error.smallest, sample=batch, solver=solver)
    planned = execute(plan, model)

    def step() -> Tensor:
        output: Tensor = planned(batch)
        output.pow(2).sum().backward()
        return output

    step()
    model.zero_grad()
    assert measure_peak(step, resident=[model, batch]).peak <= plan.memory_budget


def test_a_model_that_is_planned_again_meets_the_same_figures() -> None:
    model, batch = _model(), _batch()
    first = solve(model, "1GiB", sample=batch, capture="graph")
    again = solve(model, "2GiB", sample=batch, capture="graph")
    assert again.chain == first.chain
    other = solve(model, "1GiB", sample=batch[:128], capture="graph")
    assert other.chain != first.chain


def _optimizers() -> list[tuple[str, Callable[[Any], torch.optim.Optimizer]]]:
    return [
        ("AdamW", torch.optim.AdamW),
        ("SGD", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ("RMSprop", torch.optim.RMSprop),
    ]


@pytest.mark.parametrize(("name", "make"), _optimizers())
def test_the_state_of_an_optimizer_is_known_before_its_first_step(
    name: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model = _model()
    optimizer = make(model.parameters())
    foreseen = optimizer_bytes(optimizer, CPU)
    own = optimizer_step_bytes(optimizer, CPU)
    assert not optimizer.state
    model(_batch()).sum().backward()
    optimizer.step()
    real = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    assert foreseen == real == optimizer_bytes(optimizer, CPU)
    assert (real == 0) == (name == "SGD")
    assert own is not None
    assert own == pytest.approx(measure_peak(optimizer.step, device="cpu").added, abs=64)


@pytest.mark.parametrize(
    "device", [Target(DeviceSpec.of("H100")), pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]
)
def test_on_cuda_an_optimizer_steps_over_all_parameters_at_once(device: Any) -> None:
    parameters = [nn.Parameter(torch.zeros(512, 512)) for _ in range(16)]
    if isinstance(device, torch.device):
        parameters = [nn.Parameter(p.detach().to(device)) for p in parameters]
    size = sum(p.nbytes for p in parameters)
    unsaid = optimizer_step_bytes(torch.optim.AdamW(parameters), device)
    one_by_one = optimizer_step_bytes(torch.optim.AdamW(parameters, foreach=False), device)
    assert unsaid == optimizer_step_bytes(torch.optim.AdamW(parameters, foreach=True), device)
    assert unsaid is not None
    assert one_by_one is not None
    assert one_by_one < size / 2 < size <= unsaid
    if isinstance(device, torch.device):
        optimizer = torch.optim.AdamW(parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert measure_peak(optimizer.step, device=device).added == pytest.approx(unsaid, rel=0.01)


@pytest.mark.slow
def test_optimizer_state_and_existing_gradients_count_towards_the_budget() -> None:
    model, batch = _model(), _batch()
    plain = solve(model, "1GiB", sample=batch)
    size = sum(p.nbytes for p in model.parameters())
    with_state = solve(model, "1GiB", sample=batch, optimizer=torch.optim.AdamW(model.parameters()))
    assert with_state.chain.fixed - plain.chain.fixed == pytest.approx(2 * size, rel=0.01)
    assert with_state.optimizer_step
    assert f"optimizer's step: {format_bytes(with_state.optimizer_step)} of its own" in str(with_state)
    assert "optimizer's step" not in str(plain)
    assert sum(s.grad for s in plain.chain.stages) == size
    model(batch).sum().backward()
    accumulating = solve(model, "1GiB", sample=batch)
    assert accumulating.resident["existing gradients"] == size
    assert sum(s.grad for s in accumulating.chain.stages) == 0


@pytest.mark.parametrize("capture", ["graph", "modules"])
def test_roofline_costs_price_every_stage_without_timing(capture: str) -> None:
    plan = solve(_model(), "1GiB", sample=_batch(), costs="roofline", capture=capture)
    assert plan.costs == "roofline"
    assert all(0 < s.forward < 1 and 0 < s.backward < 1 for s in plan.chain.stages if s.recomputable)
    assert plan.chain.plain_seconds > 0


@pytest.mark.slow
def test_roofline_costs_grow_with_the_work() -> None:
    small, large = (
        solve(_model(), "1GiB", sample=torch.randn(rows, 32), costs="roofline", capture="modules")
        for rows in (1024, 65536)
    )
    assert large.chain.plain_seconds > 8 * small.chain.plain_seconds


def test_what_else_a_solver_takes_reaches_it() -> None:
    model, batch = _model(), _batch()
    name = solve(model, "1GiB", sample=batch).chain.stages[1].name
    plan = solve(model, "1GiB", sample=batch, solver="selective", parameters={"keep": [name]})
    assert [i for i, runs in enumerate(plan.timeline.runs) if runs == 1] == [1]
    with pytest.raises(TypeError, match="solver 'selective' needs the parameter 'keep'"):
        solve(model, "1GiB", sample=batch, solver="selective")


def test_a_solver_whose_schedules_no_executor_follows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"solver='exhaustive' .* choose another solver"):
        solve(_model(), "1GiB", sample=_batch(), solver="exhaustive")


def test_copies_take_a_graph_capture() -> None:
    host = {"host": HostMemory(1, 1.0, 1.0)}
    with pytest.raises(CaptureError, match="takes the ops of a graph"):
        solve(_model(), "1GiB", sample=_batch(), solver="two_level", parameters=host, capture="modules")


def test_a_planned_model_is_planned_anew() -> None:
    model, batch = _model(), _batch()
    first = execute(solve(model, "1GiB", sample=batch), model)
    plan = solve(first, "1GiB", sample=batch)
    assert plan.capture.model == solve(model, "1GiB", sample=batch).capture.model
    execute(plan, first)(batch).sum().backward()


def test_the_plan_says_how_and_why_it_was_captured() -> None:
    plan = solve(_model(), "1GiB", sample=_batch())
    assert isinstance(plan, Plan)
    assert plan.capture.kind == "graph"
    assert "bit-equal" in plan.capture.reason
    assert "captured as graph" in str(plan)


def test_progress_is_told_line_by_line() -> None:
    lines: list[str] = []
    solve(_model(), "1GiB", sample=_batch(), progress=lines.append)
    assert any("capturing" in line for line in lines)
    assert any("solving" in line for line in lines)


def test_the_core_solves_where_torch_is_absent(tmp_path: Path) -> None:
    script = tmp_path / "absent.py"
    script.write_text(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from rematplan.scheduler.core.chain import Chain\n"
        "from rematplan.scheduler.core.referee import simulate\n"
        "from rematplan.scheduler.solvers import SOLVERS, solve_chain\n"
        "chain = Chain.from_arrays([1] * 8, [2] * 8, [10] * 9, [40] * 8)\n"
        "assert simulate(chain, solve_chain(chain, 200)).peak <= 200\n"
        "import rematplan\n"
        "try:\n"
        "    rematplan.solve\n"
        "except ImportError:\n"
        "    print('solved', len(SOLVERS))\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-P", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(rematplan.__file__).parent.parent)},
    )
    assert done.stdout == f"solved {len(SOLVERS)}\n", done.stderr
