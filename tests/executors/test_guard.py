"""A planned model that has changed since planning is refused, or trains as the plain one would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematplan import PlanMismatch, execute, solve
from rematplan.executors.model_guard import Trainable, benchmarks_convolutions, reject_recording
from tests.shared.models import Case, stack
from tests.shared.steps import (
    EITHER_CAPTURE,
    OVERLAPPING,
    assert_equal,
    planned,
    restored,
    tightest,
    train,
    within,
)

pytestmark = OVERLAPPING


@EITHER_CAPTURE
def test_a_submodule_that_was_replaced_or_added_is_refused(capture: str) -> None:
    case = stack()
    model = planned(case, capture)
    model(*case.args)
    head = case.model.head
    case.model.head = nn.Linear(16, 1)
    with pytest.raises(
        PlanMismatch, match=r"submodules of 'the model' were added, replaced or removed .* solve\(\)"
    ):
        model(*case.args)
    case.model.head = head
    model(*case.args)
    within(case.model, "blocks.2").register_module("adapter", nn.Linear(16, 16))
    with pytest.raises(PlanMismatch, match=r"submodules of 'blocks.2' were added"):
        model(*case.args)


def test_a_hook_that_a_replayed_graph_would_not_fire_is_refused() -> None:
    case = stack()
    model = planned(case, "graph")
    handle = within(case.model, "blocks.1.up").register_forward_hook(
        lambda _module, _given, output: 2 * output
    )
    with pytest.raises(PlanMismatch, match=r"submodule 'blocks.1.up' has hooks"):
        model(*case.args)
    handle.remove()
    model(*case.args)


def test_a_hook_that_comes_later_fires_where_blocks_are_stages() -> None:
    case = stack()
    model = planned(case, "modules")
    handle = within(case.model, "blocks.1.up").register_forward_hook(
        lambda _module, _given, output: 2 * output
    )
    with restored(case.model):
        expected = train(case, case.model)
    with restored(case.model):
        assert_equal(train(case, model), expected)
    handle.remove()


@EITHER_CAPTURE
@pytest.mark.parametrize("meanwhile", ["functional_call", "a new Parameter"])
def test_weights_that_are_others_by_the_time_of_the_backward(capture: str, meanwhile: str) -> None:
    """A re-run reads what the first run read, as autograd does."""
    case = stack()
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    models = {"plain": case.model, "planned": planned(case, capture)}
    others = {name: torch.randn_like(p).requires_grad_() for name, p in case.model.named_parameters()}
    grads: dict[str, list[Tensor]] = {}
    for name, model in models.items():
        if meanwhile == "functional_call":
            loss = torch.func.functional_call(model, others, case.args)
            grads[name] = list(torch.autograd.grad(loss, list(others.values())))
        else:
            before = list(case.model.parameters())
            loss = model(*case.args)
            first = within(case.model, "blocks.0.up")
            weight, first.weight = first.weight, nn.Parameter(torch.randn_like(first.weight))
            grads[name] = list(torch.autograd.grad(loss, before))
            first.weight = weight
    for one, other in zip(grads["plain"], grads["planned"], strict=True):
        assert torch.equal(one, other)


class Shifted(nn.Module):
    """Adds a buffer, and counts its calls in another one that stays as it is."""

    offset: Tensor
    scratch: Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("offset", torch.randn(width))
        self.register_buffer("scratch", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.scratch.fill_(1.0).zero_()
        y: Tensor = (self.linear(x) + self.offset + self.scratch).tanh()
        return y


@EITHER_CAPTURE
def test_a_buffer_changed_between_forward_and_backward_is_an_error(capture: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Shifted() for _ in range(6))).train()
    sample = torch.randn(256, 16)
    case: Case = Case(model, sample, (sample,))
    trained = planned(case, capture)
    with restored(model):
        expected = train(case, model)
    with restored(model):
        assert_equal(train(case, trained), expected)
    loss = trained(sample).square().mean()
    with torch.no_grad():
        within(model, "1").offset.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_that_is_kept_is_reversed_twice_though_blocks_fill_their_buffers_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Shifted() for _ in range(6))).train()
    sample = torch.randn(256, 16)
    trained = planned(Case(model, sample, (sample,)), "modules")
    loss = trained(sample).square().mean()
    found = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=again) for again in (True, False)
    ]
    expected = torch.autograd.grad(model(sample).square().mean(), list(model.parameters()))
    for grads in found:
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


class Moody(nn.Module):
    """Draws random numbers only for inputs of a positive sum."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x).tanh()
        if bool(x.sum() > 0):
            y = nn.functional.dropout(y, 0.5)
        return y


def test_blocks_that_draw_random_numbers_on_some_data_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Moody() for _ in range(6))).train()
    quiet = -torch.ones(8, 16)
    plan = solve(model, "1GiB", sample=quiet, capture=[*model])
    assert not any(plan.capture.random[:2])  # of this sample
    sample = torch.randn(8, 16).abs()
    case: Case = Case(model, sample, (sample,))
    trained: Any = execute(tightest(plan), model)
    with restored(model):
        expected = train(case, model)
    with restored(model):
        assert_equal(train(case, trained), expected)


class Scaled(nn.Module):
    """A linear layer and a scale of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("name", ["layer.weight", "layer.bias", "scale"])
def test_another_parameter_of_the_same_values_is_another_one(name: str) -> None:
    model = Scaled()
    trainable = Trainable(model)
    assert trainable.flags(model) == (True, True, True)
    path, _, key = name.rpartition(".")
    other = nn.Parameter(model.get_parameter(name).detach().clone(), requires_grad=False)
    setattr(model.get_submodule(path), key, other)
    flags = trainable.flags(model)
    assert [n for n, flag in zip(trainable.names, flags, strict=True) if not flag] == [name]
    assert any(p is other for p in trainable.known)


def test_a_planned_model_is_not_recorded_as_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        PlanMismatch, match=r"planned Scaled: called while a CUDA graph records .* record the plain model"
    ):
        reject_recording(Scaled())


def test_benchmarked_convolutions_are_known() -> None:
    convolving, cudnn, cuda = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.backends.cudnn, torch.device("cuda")
    try:
        assert not benchmarks_convolutions(convolving, cuda)
        cudnn.benchmark = True
        assert benchmarks_convolutions(convolving, cuda)
        assert not benchmarks_convolutions(convolving, torch.device("cpu"))
        assert not benchmarks_convolutions(Scaled(), cuda)
        cudnn.deterministic = True
        assert not benchmarks_convolutions(convolving, cuda)
    finally:
        cudnn.benchmark = cudnn.deterministic = False
