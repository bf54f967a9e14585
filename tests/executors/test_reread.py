"""Re-runs read the values of the first run, or an error names them: swaps through .data before backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rematplan import execute, solve
from rematplan.executors.as_read import AsRead, Sampler, changed_samples
from tests.shared.state_training import WIDTH, Layer
from tests.shared.steps import (
    EACH_CAPTURE,
    EITHER_CAPTURE,
    at_its_tightest,
    case_of,
    loss_of,
    planned_tiny,
    restored,
    tightest,
)


def _swap(p: Tensor) -> None:
    p.data = p.data.clone() * 0.5


def _scale(p: Tensor) -> None:
    p.data.mul_(0.5)


def _step(p: Tensor) -> None:
    with torch.no_grad():
        p.add_(1.0)


@pytest.mark.parametrize("change", [_swap, _scale])
@EITHER_CAPTURE
def test_a_parameter_changed_through_data_between_forward_and_backward_is_named(
    capture: str, change: Callable[[Tensor], None]
) -> None:
    case, planned = planned_tiny(capture)
    with restored(case.model):
        loss = loss_of(case(planned))
        change(case.model.get_parameter("0.linear.weight"))
        with pytest.raises(RuntimeError, match=r"0\.linear\.weight.*through \.data"):
            loss.backward()


@pytest.mark.parametrize("change", [_swap, _scale])
@EITHER_CAPTURE
def test_an_input_changed_through_data_gives_the_gradients_of_before_or_an_error(
    capture: str, change: Callable[[Tensor], None]
) -> None:
    case, planned = planned_tiny(capture)
    batch = case.args[0].clone()
    with restored(case.model):
        torch.manual_seed(0)
        loss = loss_of(planned(batch))
        change(batch)
        try:
            loss.backward()
        except RuntimeError as error:
            assert "through .data" in str(error)  # noqa: PT017 # or no error at all
            return
        got = [p.grad for p in case.model.parameters()]
    with restored(case.model):
        torch.manual_seed(0)
        loss_of(case.model(case.args[0].clone())).backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(got, case.model.parameters(), strict=True))  # type: ignore[arg-type]


def test_without_a_check_only_versions_and_addresses_are_compared() -> None:
    case = case_of("tiny")
    plan = at_its_tightest(case, "modules")
    planned = execute(plan, case.model, check="none")
    with restored(case.model):
        loss = loss_of(case(planned))
        _scale(case.model.get_parameter("0.linear.weight"))
        loss.backward()  # as plain torch: nobody looks
    with restored(case.model):
        loss = loss_of(case(planned))
        _swap(case.model.get_parameter("0.linear.weight"))
        with pytest.raises(RuntimeError, match=r"0\.linear\.weight"):
            loss.backward()


@EACH_CAPTURE
def test_an_optimizer_that_steps_in_the_backward_trains(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def trained(model: nn.Module) -> list[Tensor]:
        def step(p: Tensor) -> None:
            assert p.grad is not None
            with torch.no_grad():
                p.sub_(0.1 * p.grad)
            p.grad = None

        with restored(case.model):
            handles = [p.register_post_accumulate_grad_hook(step) for p in case.model.parameters()]
            for seed in range(3):
                torch.manual_seed(seed)
                loss_of(case(model)).backward()
            for handle in handles:
                handle.remove()
            return [p.detach().clone() for p in case.model.parameters()]

    assert all(map(torch.equal, trained(planned), trained(case.model)))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "sliced", "scalar", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64])
def test_a_sample_sees_all_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    whole = torch.ones(12, 20).to(dtype)
    tensor = {
        "contiguous": whole,
        "transposed": whole.t(),
        "expanded": whole[:1].expand(7, 20),
        "sliced": whole[:, 3:17:2],
        "scalar": whole[0, 0],
        "empty": whole[:0],
    }[layout]
    read = AsRead([tensor], Sampler())
    assert not changed_samples([read])
    if tensor.numel():
        whole.data.zero_()
        assert changed_samples([read]) == [(0, 0)]


def test_a_sample_compares_bits() -> None:
    tensor = torch.full((4,), float("nan"))
    read = AsRead([tensor], Sampler())
    assert not changed_samples([read])
    zeros = torch.zeros(4)
    read = AsRead([zeros], Sampler())
    zeros.data.neg_()
    assert changed_samples([read]) == [(0, 0)]


def test_a_tensor_that_hangs_on_a_block_and_is_changed_between_forward_and_backward_is_named() -> None:
    class Scaled(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    model = nn.Sequential(*(Scaled() for _ in range(4))).train()
    batch = torch.randn(256, WIDTH)
    plan = solve(model, "1GiB", sample=batch, capture="modules")
    planned = execute(tightest(plan), model)
    for change in (_step, _scale):
        loss = planned(batch).square().mean()
        change(model[0].scale)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r"0\.scale of block 0"):
            loss.backward()
