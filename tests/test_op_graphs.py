"""Models of ops that sort, index, scatter, view and write in place train bit-equal and within budget, with copies and without."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from executors import execute
from executors.offload import Store
from scheduler import HostMemory, Plan, solve
from scheduler.capture.state import on_gradient
from scheduler.schedule import COPY_ACTIONS, Free, FreeSaved, Offload, OffloadSaved
from tests.helpers import smallest
from tests.models import Case
from tests.op_graphs import judge
from tests.steps import assert_equal, peak_of_a_step, restored, train

HOST = HostMemory(2**34, 1e12, 1e12)  # so fast that copies beat runs again


class Indexed(nn.Module):
    """Layers that sort, scatter by the order, gather, choose, and assign to a slice."""

    def __init__(self, layers: int = 3, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            order = h.argsort(dim=1)
            ranked = h.gather(1, order)
            scattered = torch.zeros_like(h).scatter_add(1, order, layer(ranked))
            out = torch.where(scattered > 0, scattered, h * 0.1)
            out = out.clone()
            out[:, 2:6] = ranked[:, :4]
            h = out
        return h.square().mean()


@functools.cache
def indexed() -> tuple[Case, Plan]:
    torch.manual_seed(0)
    batch = torch.randn(256, 16)
    case = Case(Indexed().train(), batch, (batch,))
    return case, solve(case.model, "1GiB", sample=batch, capture="graph", costs="roofline")


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5])
def test_copies_of_sorted_scattered_and_assigned_values_stay_within_the_budget(fraction: float) -> None:
    case, plan = indexed()
    low = smallest(plan.chain, "two_level", host=HOST)
    budget = low + int(fraction * (plan.plain.peak - low))
    plan = plan.within(budget, solver="two_level", parameters={"host": HOST})
    assert any(isinstance(action, COPY_ACTIONS) for action in plan.schedule)
    with restored(case.model):
        expected = train(case, case.model)
    planned = execute(plan, case.model)
    with restored(case.model):
        assert_equal(train(case, planned), expected)
    with restored(case.model):
        assert peak_of_a_step(case, planned).peak <= plan.memory_budget


@pytest.mark.parametrize("seed", range(20))
def test_a_random_graph_of_ops_trains_bit_equal_and_within_each_budget(seed: int) -> None:
    """benchmarks/random_op_graphs.py runs a thousand."""
    assert isinstance(judge(seed), list)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(23, id="a value that passes on through boundaries nobody holds, on the host"),
        pytest.param(55, id="an index that only one stage saves"),
        pytest.param(138, id="an index whose node dies within its stage"),
        pytest.param(95, id="a view that is written to between stages"),
        pytest.param(266, id="a linear layer's output that is written to and crosses a cut"),
    ],
)
def test_graphs_of_ops_that_were_over_budget_or_ended_the_process(seed: int) -> None:
    assert isinstance(judge(seed), list)


def test_a_boundary_that_was_only_passed_on_keeps_nothing_on_the_device() -> None:
    store, value = Store(), torch.arange(8.0)
    store.ran(0, (value,), set(), kept=False)
    store.ran(1, (value,), set(), kept=False)
    store.passed(1)
    moved = store.hold(2, (value,), own=False)[0]
    store.move(Offload(2))
    store.move(Free(2))
    assert moved.block.on_device is None
    assert torch.equal(moved.tensor(), torch.arange(8.0))


def test_what_a_node_saved_that_died_within_its_stage_is_not_kept() -> None:
    store, value = Store(), torch.arange(8.0)
    gone = weakref.ref(value.untyped_storage())
    packed = store.pack(0, value)
    del packed, value
    gc.collect()
    assert gone() is None
    assert not store.ran(0, (), set(), kept=True), (
        "the stage has nothing whose unpacking would tell of its backward"
    )
    assert store.side.bytes == 0
    store.move(OffloadSaved(0))
    store.move(FreeSaved(0))


def test_the_gradient_of_a_view_whose_base_was_written_to_is_told() -> None:
    hidden = nn.Linear(8, 8)(torch.randn(4, 6, 8))  # a view of a matrix
    hidden[:, 1:5] = torch.randn(4, 4, 8)
    seen: list[Tensor] = []
    on_gradient(hidden, seen.append)
    hidden.sum().backward()
    assert len(seen) == 1
