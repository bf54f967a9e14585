"""The counter of live storages sees all allocations but those within kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from rematplan.scheduler.costs.meters.live_storages import LiveBytes, rounded
from rematplan.scheduler.costs.meters.peak import count_bytes

CPU = torch.device("cpu")


def _chain(weights: list[Tensor], batch: Tensor) -> None:
    value = batch
    for weight in weights:
        value = torch.relu(value @ weight)
    value.sum().backward()


def _inplace(weights: list[Tensor], batch: Tensor) -> None:
    value = batch @ weights[0]
    value.add_(1.0)
    view = value[3:].t()
    rest = torch.cat([view.t(), batch[:3]])
    del value, view
    rest.mul_(batch[3])
    rest.unfold(0, 2, 1).sum(0).backward(torch.ones_like(rest[:, :2]))


def _resized(weights: list[Tensor], batch: Tensor) -> None:
    out = torch.empty(0)
    with torch.no_grad():
        torch.mul(batch, 2 * batch, out=out)
        other = torch.empty(7)
        other.resize_(1000)
        other.untyped_storage().resize_(0)
        out.add_(batch)


def _inputs() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    return [torch.randn(37, 37, requires_grad=True) for _ in range(4)], torch.randn(37, 37)


@pytest.mark.parametrize("step", [_chain, _inplace, _resized])
def test_it_counts_real_tensors_as_the_allocator_does(step: Callable[..., None]) -> None:
    weights, batch = _inputs()
    truth = count_bytes(lambda mark: step(weights, batch), CPU)
    for weight in weights:
        weight.grad = None
    with LiveBytes() as counter:
        step(weights, batch)
    assert (counter.peak, counter.live) == (truth.peak, truth.end)


def test_it_counts_fake_tensors_like_real_ones() -> None:
    weights, batch = _inputs()
    truth = count_bytes(lambda mark: _chain(weights, batch), CPU)
    with FakeTensorMode() as mode:
        fakes = [torch.empty(37, 37, requires_grad=True) for _ in weights]
        double = mode.from_tensor(batch)
        with LiveBytes() as counter:
            _chain(fakes, double)
    assert (counter.peak, counter.live) == (truth.peak, truth.end)
    del fakes
    assert counter.live == 0


def test_storages_made_before_do_not_count_and_views_of_them_neither() -> None:
    before = torch.ones(100)
    with LiveBytes() as counter:
        view = before.view(10, 10)[2:].detach()
        view.add_(1)
        assert counter.live == counter.peak == 0
        made = torch.tensor([1.0, 2.0])
        assert counter.live == made.nbytes


def test_sizes_are_rounded_by_the_rule_of_the_kind_of_device() -> None:
    assert (rounded(0, "cuda"), rounded(1, "cuda"), rounded(513, "cuda"), rounded(513, "cpu")) == (
        0,
        512,
        1024,
        513,
    )
    with LiveBytes("cuda") as counter:
        held = torch.ones(3)
    assert counter.live == 512
    del held
    assert counter.live == 0


def test_events_tell_the_op_the_bytes_and_what_is_live() -> None:
    with LiveBytes(record=True) as counter:
        counter.mark("begin")
        a = torch.zeros(8)
        b = a + 1
        del a
        counter.mark("end")
    events: list[Any] = [tuple(e) for e in counter.events]
    assert events[0] == ("begin", 0, 0, -1)
    assert [(e[1], e[2], e[3]) for e in events[1:4]] == [(32, 32, 0), (32, 64, 1), (-32, 32, 0)]
    assert "add" in events[2][0]
    assert events[4] == ("end", 0, 32, -1)
    assert b.nbytes == counter.live


def test_a_hundred_thousand_ops_take_seconds() -> None:
    value = torch.ones(4)
    with torch.no_grad(), LiveBytes() as counter:
        began = time.perf_counter()
        for _ in range(10_000):
            value = value + 1
        took = time.perf_counter() - began
    assert counter.peak == 32
    assert took < 1.5  # 0.2 s on an idle core
