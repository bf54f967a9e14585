"""Models of ops that sort, index, scatter, view and write in place train bit-equal and within budget."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from rematplan.executors.host_arena import Arena
from rematplan.executors.host_copies import Store
from rematplan.scheduler.core.schedule import Free, FreeSaved, Offload, OffloadSaved
from rematplan.scheduler.torch_layer.preserve import on_gradient
from tests.shared.op_graphs import judge
from tests.shared.steps import CPU


@pytest.mark.parametrize("seed", [seed for seed in range(24) if seed not in (11, 13, 23)])
def test_a_random_graph_of_ops_trains_bit_equal_and_within_each_budget(seed: int) -> None:
    """benchmarks/random_op_graphs.py runs a thousand."""
    assert isinstance(judge(seed), list)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(11, id="an index that passes on through a boundary nobody holds, with copies"),
        pytest.param(13, id="an index of the input, saved by a stage and no longer needed, with copies"),
        pytest.param(23, id="a value that passes on through a boundary nobody holds, with copies"),
        pytest.param(55, id="an index that only one stage saves"),
        pytest.param(138, id="an index whose node dies within its stage, with copies"),
        pytest.param(599, id="an output that the loss reads the shape of, and nothing else"),
        pytest.param(
            731, id="the gradient of a boundary that is a part of a larger one, beside one that is two"
        ),
        pytest.param(95, id="a view that is written to between stages"),
        pytest.param(266, id="a linear layer's output that is written to and crosses a cut"),
    ],
)
def test_graphs_of_ops_that_were_over_budget_or_ended_the_process(seed: int) -> None:
    assert isinstance(judge(seed), list)


def test_a_boundary_that_was_only_passed_on_keeps_nothing_on_the_device() -> None:
    store, value = Store(Arena(2**10, CPU)), torch.arange(8.0)
    store.ran(0, (value,), set(), kept=False)
    store.ran(1, (value,), set(), kept=False)
    store.passed(1)
    moved = store.hold(2, (value,), own=False)[0]
    store.move(Offload(2))
    store.move(Free(2))
    assert moved.storage.on_device is None
    assert torch.equal(moved.tensor(), torch.arange(8.0))


def test_what_a_node_saved_that_died_within_its_stage_is_not_kept() -> None:
    store, value = Store(Arena(2**10, CPU)), torch.arange(8.0)
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
