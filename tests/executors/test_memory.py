"""measure_peak counts allocated bytes exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rematplan import measure_peak
from rematplan.scheduler.costs.meters.cuda_overheads import workspace_bytes


def test_the_peak_is_the_most_bytes_live_at_once_not_their_sum() -> None:
    def work() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(5000, dtype=torch.uint8)
        del second
        third = torch.empty(2000, dtype=torch.uint8)
        del first
        return third

    measured = measure_peak(work, device="cpu")
    assert measured.peak == measured.added == 6000
    assert measured.resident == 0
    assert measured.result.numel() == 2000


def test_what_is_resident_counts_once_however_often_it_is_named() -> None:
    model = nn.Linear(10, 10)
    batch = torch.zeros(3, 10)
    measured = measure_peak(
        lambda: torch.empty(64, dtype=torch.uint8), resident=[model, batch, [batch, model.weight]]
    )
    assert measured.resident == (110 + 30) * 4
    assert measured.peak == measured.resident + 64


def test_existing_gradients_and_optimizer_state_are_resident() -> None:
    model = nn.Linear(10, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert state > 2 * 110 * 4
    assert measure_peak(lambda: None, resident=[model, optimizer]).peak == 2 * 110 * 4 + state


def test_of_a_storage_that_others_use_too_only_the_part_seen_counts() -> None:
    whole = torch.zeros(1000)
    assert measure_peak(lambda: None, resident=[whole[:10]]).resident == 40
    assert measure_peak(lambda: None, resident=[whole[:10].expand(10)]).resident == 40
    assert measure_peak(lambda: None, resident=[torch.zeros(1).expand(100)]).resident == 4


def test_memory_that_an_op_takes_inside_is_counted() -> None:
    logits, target = torch.randn(256, 64, requires_grad=True), torch.zeros(256, dtype=torch.long)
    logits_bytes = logits.nbytes

    def work() -> torch.Tensor:
        return nn.functional.cross_entropy(logits, target)

    # The log-softmax that cross_entropy saves is nowhere in Python.
    assert measure_peak(work, device="cpu").added >= logits_bytes


def test_an_exception_leaves_the_profiler_off() -> None:
    def fails() -> None:
        raise KeyError("from the step")

    with pytest.raises(KeyError, match="from the step"):
        measure_peak(fails, device="cpu")
    assert measure_peak(lambda: None, device="cpu").peak == 0


def test_a_running_profiler_is_a_clear_error() -> None:
    with torch.autograd.profiler.profile(use_kineto=True), pytest.raises(RuntimeError, match="profiler"):
        measure_peak(lambda: None, device="cpu")


@pytest.mark.cuda
def test_on_cuda_the_allocator_is_asked() -> None:
    size = 10 * 2**20 - 100
    measured = measure_peak(lambda: torch.empty(size, dtype=torch.uint8, device="cuda"), device="cuda")
    assert 10 * 2**20 <= measured.added < 12 * 2**20
    assert measured.requested == measured.resident + size
    assert measured.resident == workspace_bytes(torch.device("cuda"))


def test_what_was_asked_for_is_known_on_cuda_alone() -> None:
    assert measure_peak(lambda: torch.empty(100), device="cpu").requested is None
