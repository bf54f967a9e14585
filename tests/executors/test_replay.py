"""The replay executor under every use of autograd, each against the plain model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.shared.models import Block, Case, tiny
from tests.shared.steps import (
    EACH_CAPTURE,
    OVERLAPPING,
    Record,
    assert_equal,
    assert_same,
    end_of,
    loss_of,
    planned,
    planned_tiny,
    restored,
    state,
    train,
    within,
)

pytestmark = OVERLAPPING


@EACH_CAPTURE
def test_a_second_backward_through_a_retained_graph(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        loss.backward(retain_graph=True)
        first = state(model)
        loss.backward(retain_graph=True)
        loss.backward()
        return {f"first {name}": value for name, value in first.items()}

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_a_second_backward_through_a_released_graph_is_autograd_s_error(capture: str) -> None:
    case, planned = planned_tiny(capture)
    with restored(case.model):
        loss = loss_of(case(planned))
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@EACH_CAPTURE
def test_autograd_grad_gives_gradients_and_leaves_none_behind(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        grads = torch.autograd.grad(loss_of(case(model)), list(model.parameters()))
        return {f"grad {i}": grad for i, grad in enumerate(grads)}

    assert_same(case.model, planned, procedure)
    with restored(case.model):
        procedure(planned)
        assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("block", [0, 2, 5])
@EACH_CAPTURE
def test_backward_for_some_inputs_only(capture: str, block: int) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss_of(case(model)).backward(inputs=list(within(model, str(block)).parameters()))
        return {}

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_grad_of_one_block_after_another_from_one_graph(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        record: Record = {}
        for block in (4, 0, 5, 2):
            weight = within(model, f"{block}.linear").weight
            record[f"block {block}"] = torch.autograd.grad(loss, [weight], retain_graph=True)[0]
        loss.backward()
        return record

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_the_gradient_of_an_input(capture: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 16, requires_grad=True)
    model = tiny().model
    case = Case(model, batch, (batch,))

    def procedure(model: nn.Module) -> Record:
        batch.grad = None
        loss_of(case(model)).backward()
        return {"input": batch.grad}

    assert_same(model, planned(case, capture), procedure)
    assert batch.grad is not None


@EACH_CAPTURE
def test_gradients_accumulate_over_several_steps(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        for _ in range(3):
            loss_of(model(torch.randn(64, 16))).backward()
        return {}

    assert_same(case.model, planned, procedure)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@EACH_CAPTURE
def test_several_forwards_are_alive_at_once_and_reversed_in_any_order(
    capture: str, order: tuple[int, ...]
) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        losses = [loss_of(model(torch.randn(64, 16))) for _ in range(3)]
        for i in order:
            losses[i].backward()
        return {}

    def all_at_once(model: nn.Module) -> Record:
        torch.stack([loss_of(model(torch.randn(64, 16))) for _ in range(3)]).sum().backward()
        return {}

    assert_same(case.model, planned, procedure)
    assert_same(case.model, planned, all_at_once)


class TwoOutputs(nn.Module):
    """Returns what comes out halfway, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halfway = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 2:
                halfway = x
        return self.head(halfway), self.head(x)


@functools.cache
def two_outputs(capture: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, batch = TwoOutputs().train(), torch.randn(64, 16)
    return model, planned(Case(model, batch, (batch,)), capture)


@pytest.mark.parametrize(
    "order", ["early, late", "late, early", "early alone", "late alone", "sum", "early, sum"]
)
@EACH_CAPTURE
@pytest.mark.slow
def test_losses_on_parts_of_the_output_in_any_order(capture: str, order: str) -> None:
    model, planned = two_outputs(capture)
    batch = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))

    def procedure(model: nn.Module) -> Record:
        early, late = model(batch)
        losses = {
            "early": loss_of(early),
            "late": loss_of(late),
            "early alone": loss_of(early),
            "late alone": loss_of(late),
            "sum": loss_of(early) + 2 * loss_of(late),
        }
        names = order.split(", ")
        for name in names:
            losses[name].backward(retain_graph=name != names[-1])
        return {}

    assert_same(model, planned, procedure)


@EACH_CAPTURE
def test_double_backward_of_a_gradient_penalty(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        penalty = torch.stack([grad.pow(2).sum() for grad in grads]).sum()
        (loss + 10 * penalty).backward()
        return {"penalty": penalty.detach()}

    assert_same(case.model, planned, procedure)


# ---- hooks and errors ------------------------------------------------------------------------------------


@EACH_CAPTURE
def test_parameter_hooks_fire_once_and_may_change_the_gradient(capture: str) -> None:
    case, planned = planned_tiny(capture)
    fired: list[str] = []

    def tripled(name: str, grad: Tensor) -> Tensor:
        fired.append(name)
        return 3 * grad

    def done(name: str, parameter: Tensor) -> None:
        fired.append(f"{name} done")

    def procedure(model: nn.Module) -> Record:
        handles: list[Any] = []
        for name, parameter in model.named_parameters():
            handles.append(parameter.register_hook(functools.partial(tripled, name)))
            handles.append(parameter.register_post_accumulate_grad_hook(functools.partial(done, name)))
        fired.clear()
        try:
            loss_of(case(model)).backward()
        finally:
            for handle in handles:
                handle.remove()
        names = [n for n, _ in model.named_parameters()]
        assert sorted(fired) == sorted([*names, *(f"{n} done" for n in names)])
        return {}

    assert_same(case.model, planned, procedure)


def test_module_hooks_fire_once_per_step_under_module_capture() -> None:
    case, planned = planned_tiny("modules")
    fired: list[str] = []

    def procedure(model: nn.Module) -> Record:
        block = within(model, "2")
        handles = [
            block.register_forward_pre_hook(lambda m, args: fired.append("before")),
            block.register_forward_hook(lambda m, args, out: fired.append("after")),
            block.register_full_backward_hook(lambda m, gi, go: fired.append("backward")),
        ]
        fired.clear()
        try:
            loss_of(case(model)).backward()
        finally:
            for handle in handles:
                handle.remove()
        assert fired == ["before", "after", "backward"]
        return {}

    assert_same(case.model, planned, procedure)


@EACH_CAPTURE
def test_after_an_exception_in_backward_the_next_step_is_right(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def fail(grad: Tensor) -> None:
        raise KeyError("from a hook")

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        handle = within(model, "2.linear").weight.register_hook(fail)
        try:
            with pytest.raises(KeyError, match="from a hook"):
                loss.backward()
        finally:
            handle.remove()
        del loss
        for parameter in model.parameters():
            parameter.grad = None
        loss_of(case(model)).backward()
        return {}

    assert_same(case.model, planned, procedure)


def test_after_an_exception_in_a_re_run_the_next_step_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    case, planned = planned_tiny("modules")
    with restored(case.model):
        expected = train(case, case.model)
    block = within(case.model, "1")
    assert isinstance(block, Block)
    with restored(case.model):
        loss = loss_of(case(planned))
        generators = torch.get_rng_state()
        with monkeypatch.context() as patch:
            # What is replaced on a module in between is as it was in the re-run; torch's own function is not.
            patch.setattr(torch.nn.functional, "gelu", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
        assert torch.equal(torch.get_rng_state(), generators)
        del loss
    with restored(case.model):
        assert_equal(train(case, planned), expected)


@EACH_CAPTURE
@pytest.mark.slow
def test_an_abandoned_forward_leaves_nothing_alive(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def forward() -> None:
        case(planned)

    with restored(case.model):
        assert end_of(forward) == 0


@EACH_CAPTURE
def test_a_step_leaves_nothing_alive_but_the_gradients(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def step() -> None:
        loss_of(case(planned)).backward()

    with restored(case.model):
        assert end_of(step, case.model.zero_grad) == sum(p.nbytes for p in case.model.parameters())


@EACH_CAPTURE
def test_a_partial_backward_that_is_abandoned_leaves_nothing_alive(capture: str) -> None:
    case, planned = planned_tiny(capture)

    def step() -> None:
        loss = loss_of(case(planned))
        torch.autograd.grad(loss, [within(case.model, "4.linear").weight], retain_graph=True)
        torch.autograd.grad(loss, [within(case.model, "3.linear").weight])

    with restored(case.model):
        assert end_of(step) == 0
