"""Hooks on tensors and modules, exceptions, and outputs that the user holds or changes, as in plain steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematplan import CaptureError, execute, solve
from rematplan.scheduler.capture.graph.export import unfired_hook
from tests.shared.models import Block, Case
from tests.shared.steps import (
    EACH_CAPTURE,
    EITHER_CAPTURE,
    OVERLAPPING,
    Record,
    assert_equal,
    assert_same,
    loss_of,
    outcome,
    planned,
    planned_tiny,
    restored,
    tightest,
    within,
)


class Halves(nn.Module):
    """Blocks; gives the last hidden state and that of half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks[:3]:
            x = block(x)
        half = x
        for block in self.blocks[3:]:
            x = block(x)
        return x, half


def halves(model: type[nn.Module] = Halves) -> Case:
    torch.manual_seed(0)
    batch = torch.randn(256, 16)
    return Case(model().train(), batch, (batch,))


@EITHER_CAPTURE
def test_hooks_on_outputs_fire_once_and_may_change_the_gradient(capture: str) -> None:
    case = halves()

    def procedure(model: nn.Module) -> Record:
        last, half = case(model)
        fired: list[Tensor] = []

        def doubled(grad: Tensor) -> Tensor:
            fired.append(grad.clone())
            return 2 * grad

        last.register_hook(lambda grad: fired.append(grad.clone()))
        half.register_hook(doubled)
        half.retain_grad()
        (loss_of(last) + loss_of(half)).backward()
        assert len(fired) == 2
        return {"last": fired[0], "half": fired[1], "retained": half.grad}

    assert_same(case.model, planned(case, capture), procedure)


class Reversing(Halves):
    """Turns the gradient around half-way, by a hook that its own forward sets."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 2 and x.requires_grad:
                x.register_hook(torch.neg)
        return x, x


class Watching(Halves):
    """Notes the norm of a gradient, by a hook that its own forward sets."""

    norms: tuple[list[Tensor], ...] = ([],)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 2 and x.requires_grad:
                x.register_hook(lambda grad: self.norms[0].append(grad.norm()))
        return x, x


@pytest.mark.parametrize("build", [Reversing, Watching])
@pytest.mark.slow
def test_hooks_that_a_forward_sets_fire_once_in_blocks_and_refuse_a_graph(build: type[Halves]) -> None:
    case = halves(build)
    with pytest.raises(CaptureError, match="sets a hook"):
        solve(case.model, "1GiB", sample=case.sample, capture="graph")
    plan = tightest(solve(case.model, "1GiB", sample=case.sample))
    assert plan.capture.kind == "modules"

    def procedure(model: nn.Module) -> Record:
        norms = Watching.norms[0]
        norms.clear()
        loss_of(case(model)).backward()
        return {f"norm {i}": norm for i, norm in enumerate(norms)}

    assert_same(case.model, execute(plan, case.model), procedure)
    assert len(Watching.norms[0]) == (build is Watching)


def test_full_backward_hooks_on_submodules_refuse_a_graph_and_fire_once_in_blocks() -> None:
    case = halves()
    fired: list[Tensor] = []

    def note(_: nn.Module, before: Any, after: Any) -> tuple[Tensor, ...]:
        fired.append(after[0].clone())
        return tuple(2 * grad for grad in before)

    within(case.model, "blocks.1").register_full_backward_hook(note)
    with pytest.raises(CaptureError, match="has hooks"):
        solve(case.model, "1GiB", sample=case.sample, capture="graph")
    plan = tightest(solve(case.model, "1GiB", sample=case.sample))
    assert max(plan.timeline.runs) > 1

    def procedure(model: nn.Module) -> Record:
        fired.clear()
        loss_of(case(model)).backward()
        assert len(fired) == 1
        return {"after": fired[0]}

    assert_same(case.model, execute(plan, case.model), procedure)


@EITHER_CAPTURE
def test_an_output_changed_in_place_before_backward_raises_or_makes_no_difference_as_in_the_plain_model(
    capture: str,
) -> None:
    case = halves()
    model = planned(case, capture)

    def changing(which: int, one: nn.Module) -> Record | str:
        def procedure(one: nn.Module) -> Record:
            outputs = case(one)
            loss = loss_of(outputs[1 - which])
            with torch.no_grad():
                outputs[which].mul_(2.0)
            loss.backward()
            return {}

        try:
            return outcome(one, procedure)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017 # either may raise
            return "raises"

    for which in (0, 1):
        found, expected = changing(which, model), changing(which, case.model)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == "raises", which  # a replay may read what the plain backward does not
        else:
            assert_equal(found, expected)


@OVERLAPPING
@EITHER_CAPTURE
@pytest.mark.slow
def test_outputs_that_are_kept_after_backward_stay_as_they_were(capture: str) -> None:
    case = halves()

    def procedure(model: nn.Module) -> Record:
        kept = [case(model) for _ in range(2)]
        before = [t.detach().clone() for pair in kept for t in pair]
        for last, _ in kept:
            loss_of(last).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, (t for pair in kept for t in pair), strict=True))
        return {f"output {i}": t for i, t in enumerate(before)}

    assert_same(case.model, planned(case, capture), procedure)


@EACH_CAPTURE
def test_after_an_exception_in_forward_the_next_step_is_right(capture: str) -> None:
    case, model = planned_tiny(capture)
    weight = within(case.model, "3.linear").weight

    def procedure(one: nn.Module) -> Record:
        whole = weight.data
        weight.data = whole[:, :7]
        with pytest.raises(RuntimeError):
            case(one)
        weight.data = whole
        torch.manual_seed(3)
        loss_of(case(one)).backward()
        return {}

    with restored(case.model):
        assert_same(case.model, model, procedure)


def _as_peft_has_it(module: Any, given: Any, output: Any) -> None:  # a hook's arguments
    output.requires_grad_(True)


def _by_keyword(module: Any, given: Any, output: Any) -> None:  # a hook's arguments
    output.requires_grad_(requires_grad=True)


RAN: list[int] = []


def _counts(module: Any, given: Any, output: Any) -> None:  # a hook's arguments
    RAN.append(1)
    output.requires_grad_(True)


def _counts_in_a_default(module: Any, given: Any, output: Any, seen: list[int] = RAN) -> None:  # likewise
    seen += [1]
    output.requires_grad_(True)


def _closes_over(seen: list[int]) -> Any:
    def hook(module: Any, given: Any, output: Any) -> None:  # a hook's arguments
        nonlocal seen
        seen += [1]
        output.requires_grad_(True)

    return hook


def _doubles(module: Any, given: Any, output: Any) -> None:  # a hook's arguments
    output *= 2
    output.requires_grad_(True)


def _writes(module: Any, given: Any, output: Any) -> None:
    given[0][0] = 0
    output.requires_grad_(True)


def _now_and_then(module: Any, given: Any, output: Any) -> None:  # a hook's arguments
    if output:
        output.requires_grad_(True)


def _replaces(module: Any, given: Any, output: Any) -> Any:  # a hook's arguments
    output.requires_grad_(True)
    return -output


def _cuts(module: Any, given: Any, output: Any) -> None:  # a hook's arguments
    output.requires_grad_(False)


class _Method:
    def hook(self, module: Any, given: Any, output: Any) -> None:  # a hook's arguments
        output.requires_grad_(True)


@pytest.mark.parametrize(
    ("hook", "harmless"),
    [
        (_as_peft_has_it, True),
        (_by_keyword, True),
        (_counts, False),
        (_counts_in_a_default, False),
        (_closes_over(RAN), False),
        (_doubles, False),
        (_writes, False),
        (_now_and_then, False),
        (_replaces, False),
        (_cuts, False),
        (_Method().hook, False),
        (functools.partial(_as_peft_has_it), False),
    ],
)
def test_a_hook_is_left_out_of_a_graph_if_all_it_does_is_to_set_requires_grad(
    hook: Any, harmless: bool
) -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    model[0].register_forward_hook(hook)
    RAN.clear()
    assert (unfired_hook(model) is None) == harmless
    assert not RAN  # it has not been run to see
