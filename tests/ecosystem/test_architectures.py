"""Whole architectures that were once refused, and small models of the causes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage import row
from benchmarks.coverage_cases import FAMILIES
from rematplan import CaptureError, execute, solve
from tests.shared.models import Case, keywords
from tests.shared.steps import assert_equal, restored, tightest, train

ARCHITECTURES = {name: make for cases in FAMILIES.values() for name, make in cases.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Mixtral", "graph"),  # an op of torch.library with a backward, and hooks that collect router logits
        ("Whisper", "graph"),  # a convolution whose gradient comes out of a permutation
        ("Switch Transformers", "modules"),  # use_cache among keyword arguments
        ("Wav2Vec2", "modules"),  # leaves layers out at random
        ("ProphetNet", "modules"),  # glue that makes tensors between an encoder and its decoder
    ],
)
def test_the_architecture_is_planned_bit_equal_and_within_budget(name: str, kind: str) -> None:
    found = row(name, ARCHITECTURES[name])
    assert (found.verdict, found.capture) == ("equal", kind), found


@pytest.mark.parametrize(
    ("name", "what_to_do"),
    [("Jamba", "Pass use_cache=False")],
)
def test_the_architecture_is_refused_with_what_to_do(name: str, what_to_do: str) -> None:
    case = ARCHITECTURES[name]()
    with pytest.raises((CaptureError, ValueError), match=what_to_do):
        solve(case.model, "1GiB", sample=case.sample)


def _trains_equally(case: Case, **options: Any) -> str:
    """Plan the model as tightly as can be, and train it beside the plain one; how it was captured."""
    plan = tightest(solve(case.model, "1GiB", sample=case.sample, **options))
    with restored(case.model):
        plain = train(case, case.model)
    with restored(case.model):
        assert_equal(train(case, execute(plan, case.model)), plain)
    return plan.capture.reason


class Sines(nn.Module):
    """Linear, and a sine by an op of torch.library whose backward is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + _sine(self.linear(x))


@torch.library.custom_op("rematplan_tests::sine", mutates_args=())
def _sine(x: Tensor) -> Tensor:
    return x.sin()


_sine.register_fake(torch.empty_like)
_sine.register_autograd(
    lambda ctx, grad: grad * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def _blocks(*blocks: nn.Module) -> Case:
    torch.manual_seed(0)
    batch = torch.randn(64, 32)
    return Case(nn.Sequential(*blocks).train(), batch, (batch,))


def test_an_op_of_torch_library_keeps_its_backward_in_the_graph() -> None:
    assert "torch.export" in _trains_equally(_blocks(*(Sines() for _ in range(4))), capture="graph")


class Noisy(nn.Module):
    """Draws from the system, whose numbers nobody can have again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) * (1 + int.from_bytes(os.urandom(2)))
        return result


def test_a_block_that_does_not_repeat_itself_is_left_out() -> None:
    case = _blocks(Sines(), Noisy(), Sines(), Sines())
    plan = solve(case.model, "1GiB", sample=case.sample, capture="modules")
    assert plan.capture.stages == ("0", "2", "3")


def test_a_model_of_blocks_that_do_not_repeat_themselves_is_refused() -> None:
    case = _blocks(Noisy(), Noisy())
    with pytest.raises(
        CaptureError, match=r"0 does not do the same when it is run again.*it gives other values"
    ):
        solve(case.model, "1GiB", sample=case.sample)
    with pytest.raises(CaptureError, match="does not do the same"):
        solve(case.model, "1GiB", sample=case.sample, capture=[*case.model.children()])


class Collecting(nn.Module):
    """A part of the loss is what a hook collects inside the blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [Sines() for _ in range(4)]
        self.layers = nn.ModuleList(blocks)
        self.collected: list[Tensor] = []
        for block in blocks:
            block.linear.register_forward_hook(self._collect)

    def _collect(self, _module: nn.Module, _given: Any, output: Tensor) -> None:
        self.collected.append(output.square().mean())

    def forward(self, x: Tensor) -> Tensor:
        self.collected.clear()
        for layer in self.layers:
            x = layer(x)
        return x.square().sum() + torch.stack(self.collected).sum()


def test_what_hooks_collect_inside_blocks_is_trained_on() -> None:
    torch.manual_seed(0)
    assert "blocks" in _trains_equally(keywords(Collecting(), x=torch.randn(64, 32)), capture="modules")


class Counting(nn.Module):
    """Reads a number of its input, which no tensor without data has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        torch._check(lengths.sum().item() >= 0)
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def test_a_graph_that_reads_its_input_gives_way_to_blocks() -> None:
    torch.manual_seed(0)
    case = keywords(Counting(), x=torch.randn(64, 32), lengths=torch.arange(4))
    assert "not as a graph, since" in _trains_equally(case)
