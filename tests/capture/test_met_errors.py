"""Any error of a model's code during capture becomes a CaptureError, and modes it entered are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from rematplan import CaptureError, execute, solve
from rematplan.scheduler.capture.graph import graph_capture
from rematplan.scheduler.costs import graph_chain
from rematplan.scheduler.torch_layer.unwind import met, unwound
from tests.shared.met import WIDTH, check, rows, tower


class Noting(TorchDispatchMode):
    """A mode that does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        return func(*args, **(kwargs or {}))


def surroundings() -> tuple[Any, ...]:
    """What ops of this thread run within."""
    return (
        functorch.get_dynamic_layer_stack_depth(),
        forward_ad._current_level,
        _get_current_dispatch_mode_stack(),
        torch._C._len_torch_function_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


ENTERED = {
    "a vmap": lambda: functorch._vmap_increment_nesting(3, "error"),
    "a functional gradient": functorch._grad_increment_nesting,
    "a dual level": torch._C._enter_dual_level,
    "fake tensors": lambda: FakeTensorMode().__enter__(),
    "a dispatch mode": lambda: Noting().__enter__(),
    "a function mode": lambda: BaseTorchFunctionMode().__enter__(),
    "a default device": lambda: torch.set_default_device("meta"),
    "a default dtype": lambda: torch.set_default_dtype(torch.float64),
    "hooks for saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(
        torch.clone, torch.clone
    ).__enter__(),
    "no gradients": lambda: torch.no_grad().__enter__(),
    "inference mode": lambda: torch.inference_mode().__enter__(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16).__enter__(),
    "anomaly mode": lambda: torch.set_anomaly_enabled(True),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
}


@pytest.mark.parametrize("what", ENTERED)
def test_what_was_entered_and_not_left_is_left(what: str) -> None:
    before = surroundings()

    def fail() -> None:
        with unwound():
            ENTERED[what]()
            raise KeyError(what)

    with pytest.raises(KeyError):
        fail()
    assert surroundings() == before
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]


def test_what_surrounds_a_trial_stays_entered() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), Noting(), torch.no_grad():
        before = surroundings()
        with unwound():
            torch.autocast("cpu", enabled=False).__enter__()
            torch.enable_grad().__enter__()
        assert surroundings() == before


def test_out_of_memory_comes_out_as_it_is() -> None:
    with pytest.raises(torch.OutOfMemoryError), met("a trial"):
        raise torch.OutOfMemoryError("of 1 GiB")


class Raising(nn.Module):
    """Leaves things entered, and raises, wherever it meets tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            functorch._vmap_increment_nesting(3, "error")
            torch.set_default_dtype(torch.float64)
            raise KeyError("no data")
        result: Tensor = self.tower(x).square().mean()
        return result


def test_a_model_that_raises_in_export_is_planned_as_blocks_and_leaves_nothing_entered() -> None:
    before = surroundings()
    plan = check(Raising, rows())
    assert plan.capture.kind == "modules"
    assert "torch.export failed: KeyError: 'no data'" in plan.capture.reason
    assert surroundings() == before


def test_a_model_that_raises_without_grad_is_refused_with_the_cause_and_what_to_do() -> None:
    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower()

        def forward(self, x: Tensor) -> Tensor:
            def row(each: Tensor) -> Tensor:
                if not torch.is_grad_enabled() or isinstance(x, FakeTensor):
                    raise KeyError("wants grad")
                return torch.tanh(each)

            result: Tensor = self.tower(torch.vmap(row)(x)).square().mean()
            return result

    before = surroundings()
    with pytest.raises(CaptureError, match=r"KeyError: 'wants grad'.*; pass capture=\[blocks\]"):
        solve(Within(), "1GiB", sample=torch.randn(4, WIDTH))
    assert surroundings() == before
    torch.randn(2)


def test_a_step_that_raises_in_its_backward_is_refused_with_the_cause() -> None:
    class Cursed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise IndexError("in the backward")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Cursed.apply(self.tower(x)).mean()
            return result

    with pytest.raises(
        CaptureError, match="a plain step of Model on the sample raises: IndexError: in the backward"
    ):
        solve(Model(), "1GiB", sample=torch.randn(4, WIDTH))


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (graph_capture, "linearize"),
        (graph_capture, "compile_stages"),
        (graph_chain, "measure_stage"),
        (graph_chain, "measure_options"),
    ],
)
def test_a_graph_that_fails_wherever_it_may_gives_way_to_blocks(
    module: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError(f"in {function}")

    monkeypatch.setattr(module, function, fail)
    plan = solve(tower(), "1GiB", sample=torch.randn(4, WIDTH))
    assert plan.capture.kind == "modules"
    assert f"AssertionError: in {function}" in plan.capture.reason


def test_planning_for_a_new_shape_in_a_forward_meets_what_is_raised() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4 and not torch.is_grad_enabled():
                functorch._vmap_increment_nesting(3, "error")
                raise KeyError("long")
            result: Tensor = self.tower(x).square().mean()
            return result

    model = Short()
    plan = solve(model, "1GiB", sample=torch.randn(4, WIDTH), capture="modules")
    planned = execute(plan, model)
    before = surroundings()
    with pytest.raises(
        CaptureError, match=r"KeyError: 'long'.*; on_new_shape='plain' runs such calls plainly"
    ):
        planned(torch.randn(8, WIDTH))
    assert surroundings() == before
