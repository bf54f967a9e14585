"""Schedules that copy to a host run bit-equal, within the budget, and leave nothing on the host."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import rematplan.executors.step_state
from rematplan import HostMemory, Plan, Schedule, execute, rehearse, solve
from rematplan.executors.host_arena import Arena
from rematplan.executors.host_copies import Store
from rematplan.scheduler.core.program import ReplayProgram
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import (
    COPY_ACTIONS,
    Action,
    Backward,
    Checkpoint,
    Forward,
    Free,
    FreeHost,
    FreeSaved,
    Keep,
    Offload,
    OffloadSaved,
    Prefetch,
    PrefetchSaved,
)
from rematplan.scheduler.plan.timeline import MemoryTimeline
from tests.shared.brute_force_host import legal_walk
from tests.shared.helpers import smallest
from tests.shared.models import Case
from tests.shared.steps import (
    CPU,
    OVERLAPPING,
    Record,
    assert_equal,
    assert_same,
    case_of,
    each_model,
    loss_of,
    on_device,
    peak_of_a_step,
    restored,
    train,
)

pytestmark = OVERLAPPING

HOST = HostMemory(2**34, 1e12, 1e12)  # so fast that copies beat runs again
BESIDE = dataclasses.replace(HOST, asynchronous=True)
SLOW = HostMemory(2**34, 2e9, 2e9, asynchronous=True)


@functools.cache
def plan_of(name: str) -> Plan:
    """A graph plan of a case that keeps all; the seconds of its chain are the roofline's, always the same."""
    case = case_of(name)
    return solve(case.model, "64GiB", sample=case.sample, capture="graph", costs="roofline")


@functools.cache
def least_of(name: str, host: HostMemory) -> int:
    """The least bytes that a plan with copies meets."""
    return smallest(plan_of(name).chain, "two_level", host=host)


def two_level(name: str, fraction: float, host: HostMemory = HOST) -> Plan:
    """A plan by two_level; the budget lies so far between the smallest and the peak of the plain step."""
    plan = plan_of(name)
    low = least_of(name, host)
    budget = low + int(fraction * (plan.plain.peak - low))
    return plan.within(budget, solver="two_level", parameters={"host": host})


def copies(plan: Plan) -> int:
    return sum(isinstance(action, COPY_ACTIONS) for action in plan.schedule)


def of_actions(name: str, actions: tuple[Action, ...]) -> Plan:
    plan = plan_of(name)
    peak = simulate(plan.chain, actions, HOST).peak
    return dataclasses.replace(plan, memory_budget=peak, schedule=Schedule(actions), host=HOST)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The host's side of every step from here on."""
    sides: list[Any] = []

    class Noted(Store):
        def __init__(self, arena: Arena) -> None:
            super().__init__(arena)
            sides.append(self.side)

    monkeypatch.setattr(rematplan.executors.step_state, "Store", Noted)
    return sides


@functools.cache
def plain_records(name: str) -> list[Record]:
    case = case_of(name)
    return train(case, copy.deepcopy(case.model))


@pytest.mark.parametrize(
    ("name", "fraction", "host"),
    [
        pytest.param("gpt2", 0.0, HOST, id="gpt2-least", marks=pytest.mark.slow),
        pytest.param("gpt2", 0.1, SLOW, id="gpt2-beside", marks=pytest.mark.slow),
        pytest.param("gpt2", 0.5, HOST, id="gpt2-half"),
        pytest.param("resnet", 0.0, HOST, id="resnet-least", marks=pytest.mark.slow),
        pytest.param("resnet", 0.1, SLOW, id="resnet-beside", marks=pytest.mark.slow),
        pytest.param("unet", 0.0, HOST, id="unet-least", marks=pytest.mark.slow),  # values that stages carry
    ],
)
@pytest.mark.slow
def test_a_step_with_copies_is_bit_equal_and_within_its_budget(
    name: str, fraction: float, host: HostMemory, stores: list[Any]
) -> None:
    case, plan = case_of(name), two_level(name, fraction, host)
    assert plan.predicted_peak <= plan.memory_budget
    assert_equal(train(case, execute(plan, copy.deepcopy(case.model))), plain_records(name))
    assert peak_of_a_step(case, execute(plan, copy.deepcopy(case.model))).peak <= plan.predicted_peak
    if host is HOST:
        assert copies(plan), "nothing is copied"
    for side in stores:
        assert side.bytes == 0
        assert side.peak <= plan.timeline.host_peak
        # What the referee counts and is not copied: storages that nobody asks for again, and those that live
        # on anyway.
        assert side.peak > 0.5 * plan.timeline.host_peak


def test_what_is_copied_is_what_the_referee_says(stores: list[Any]) -> None:
    """Every saved tensor of a plain Linear-GELU chain goes to the host, and every byte of it comes back."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU())]
    model, batch = nn.Sequential(*layers), torch.randn(128, 64)
    case = Case(model, batch, (batch,))
    plan = solve(model, "1GiB", sample=batch, capture="graph", costs="roofline")
    low = smallest(plan.chain, "two_level", host=HOST)
    plan = plan.within(low, solver="two_level", parameters={"host": HOST})
    assert copies(plan) > 6
    assert_equal(train(case, execute(plan, copy.deepcopy(model))), train(case, copy.deepcopy(model)))
    # The referee counts a scalar of each stage, which is no storage of its own.
    assert all(0 <= plan.timeline.host_peak - side.peak <= 4 * len(plan.chain) for side in stores)


def walks(plan: Plan, seed: int, count: int) -> Iterator[Plan]:
    """Plans of random legal schedules with copies that executors follow."""
    chain, found = plan.chain.apart(), 0
    for each in range(seed, seed + 100 * count):
        actions = legal_walk(chain, HOST, each, in_order=True)
        try:
            program = ReplayProgram.from_schedule(Schedule(actions), len(chain))
        except ValueError:
            continue
        # Of a stage that is kept by a run again, executors hand the output on to the next run and to no later
        # one.
        left = [
            action
            for action, following in pairwise(program.replay)
            if isinstance(action, Keep) and following not in (Backward(action.stage), Keep(action.stage + 1))
        ]
        if program.copies and not left:
            yield of_actions("tiny", actions)
            found += 1
        if found == count:
            return
    raise AssertionError(f"{found} schedules of {count}")


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in (1, 2))])
def test_random_schedules_with_copies_are_bit_equal_and_within_their_peaks(
    block: int, stores: list[Any]
) -> None:
    case = case_of("tiny")
    for walked in walks(plan_of("tiny"), 1000 * block, 4):
        stores.clear()
        assert_equal(train(case, execute(walked, copy.deepcopy(case.model))), plain_records("tiny"))
        measured = peak_of_a_step(case, execute(walked, copy.deepcopy(case.model)))
        assert measured.peak <= walked.predicted_peak, walked.schedule
        assert all(side.bytes == 0 and side.peak <= walked.timeline.host_peak for side in stores)


@pytest.mark.parametrize(
    ("name", "fraction"), [("tiny", 0.0), ("tiny", 0.3), pytest.param("resnet", 0.1, marks=pytest.mark.slow)]
)
def test_repeated_partial_and_out_of_order_backwards_come_right(
    name: str, fraction: float, stores: list[Any]
) -> None:
    case, plan = case_of(name), two_level(name, fraction)
    assert copies(plan)
    parameters = list(case.model.parameters())

    def procedure(model: nn.Module) -> Record:
        loss = loss_of(case(model))
        record: Record = {}
        for turn, i in enumerate((0, len(parameters) - 1, len(parameters) // 2, 0)):
            grads = torch.autograd.grad(loss, [parameters[i]], retain_graph=True, allow_unused=True)
            record[f"{turn}: {i}"] = grads[0]
        loss.backward(retain_graph=True)
        loss.backward()
        return record

    assert_same(case.model, execute(plan, case.model), procedure)
    gc.collect()
    assert all(side.bytes == 0 for side in stores)


def test_an_abandoned_step_lets_go_of_the_host(stores: list[Any]) -> None:
    case = case_of("tiny")
    model = execute(two_level("tiny", 0.0), case.model)
    with restored(case.model):
        loss = loss_of(case(model))
        assert stores[0].bytes > 0
        del loss
        assert stores[0].bytes == 0
        loss = loss_of(case(model))
        weight = next(p for p in case.model.parameters() if p.requires_grad)
        torch.autograd.grad(loss, [weight], retain_graph=True)
        del loss
        assert stores[1].bytes == 0


def test_a_plan_with_copies_is_written_down_and_trains_when_read() -> None:
    case, plan = case_of("tiny"), two_level("tiny", 0.2, BESIDE)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.host == BESIDE
    assert again.timeline == plan.timeline
    assert "on the host: at most" in str(again)
    assert_equal(train(case, execute(again, copy.deepcopy(case.model))), plain_records("tiny"))
    other = again.within(plan.predicted_peak)
    assert (other.solver, other.host) == ("two_level", BESIDE)
    assert plan.within(plan.memory_budget, solver="optimal").host is None


@each_model(["resnet", "gpt2"])
def test_a_plan_with_copies_is_rehearsed_and_drawn(name: str) -> None:
    case, plan = case_of(name), two_level(name, 0.1)
    assert copies(plan)
    drawn = MemoryTimeline.of(plan)
    assert drawn.peak == plan.predicted_peak
    assert any("to the host" in words for words in drawn.actions)
    fake = rehearse(plan, case.model, case.sample)
    real = rehearse(plan, case.model, case.sample, real=True)
    assert fake.peak <= plan.predicted_peak
    assert real.peak <= plan.predicted_peak
    assert abs(fake.peak - real.peak) <= 0.02 * real.peak
    assert "free what stage" in str(fake)


def test_what_was_changed_in_place_is_refused_wherever_it_was() -> None:
    store = Store(Arena(2**16, CPU))
    tensor = torch.arange(8.0)
    packed = store.pack(0, tensor[2:6])
    store.ran(0, (), set(), kept=True)
    store.move(OffloadSaved(0))
    tensor.add_(1)
    store.move(FreeSaved(0))  # the host has what it was before: it stays
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        packed.tensor()

    store, tensor = Store(Arena(2**16, CPU)), torch.arange(8.0)
    packed = store.pack(0, tensor[2:6])
    store.ran(0, (), set(), kept=True)
    for _ in range(2):
        store.move(OffloadSaved(0))
        store.move(FreeSaved(0))
        assert packed.storage.on_device is None
        store.move(PrefetchSaved(0))
        assert torch.equal(packed.tensor(), torch.tensor([2.0, 3.0, 4.0, 5.0]))
    packed.tensor().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        packed.tensor()


def test_tensors_come_back_as_they_lay() -> None:
    whole = torch.randn(6, 8, dtype=torch.complex64)
    views = [
        whole,
        whole.t()[1:5, ::2],
        whole.conj()[2],
        torch.view_as_real(whole),
        whole.real[:, 3],
        whole.conj().imag,
        whole[:0],
    ]
    store = Store(Arena(2**16, CPU))
    packed = [store.pack(0, view) for view in views]
    want = [view.clone() for view in views]
    store.ran(0, (), set(), kept=True)
    assert store.side.bytes == 0
    store.move(OffloadSaved(0))
    assert store.side.bytes == whole.nbytes  # once
    del whole, views
    store.move(FreeSaved(0))
    for moved, tensor in zip(packed, want, strict=True):
        assert torch.equal(moved.tensor(), tensor)
        assert moved.tensor().stride() == moved.view.stride
        assert moved.tensor().is_conj() == moved.view.conj


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        ((Keep(0), Keep(1), Free(1), Keep(2), Backward(2), Backward(1), Backward(0)), "is nowhere else"),
        (
            (Keep(0), Keep(1), Offload(1), Free(1), FreeHost(1), Keep(2), Backward(2), Backward(1), Backward(0)),
            "is nowhere else",
        ),
        (
            (Checkpoint(0), Forward(1), Keep(2), Backward(2), Forward(0), Keep(1), Offload(1), Backward(1), Keep(0), Backward(0)),
            "kept by a run again",
        ),
        (
            (Checkpoint(0), Forward(1), Keep(2), Backward(2), Forward(0), Keep(1), OffloadSaved(1), Backward(1), Keep(0), Backward(0)),
            "kept by a run again",
        ),
    ],
)  # fmt: skip # one schedule a line
def test_what_no_executor_follows_is_refused(actions: tuple[Action, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ReplayProgram.from_schedule(Schedule(actions), 3)


def test_the_program_has_the_copies_of_the_first_sweep_where_they_belong() -> None:
    actions = (
        *(Keep(0), Checkpoint(1), Offload(1), Free(1), OffloadSaved(0), FreeSaved(0), Keep(2), Free(2)),
        *(Backward(2), Prefetch(1), Keep(1), Backward(1), PrefetchSaved(0), Backward(0)),
    )
    program = ReplayProgram.from_schedule(Schedule((*actions[:7], *actions[8:])), 3)
    assert program.moves == ((), (Offload(1), Free(1), OffloadSaved(0), FreeSaved(0)), ())
    assert program.held == {1}
    assert program.replay == actions[8:]


@pytest.mark.cuda
@pytest.mark.parametrize("fraction", [0.1, 0.5])
@pytest.mark.parametrize("name", ["gpt2", "resnet", "unet"])
def test_on_a_gpu_copies_run_beside_the_compute(name: str, fraction: float, stores: list[Any]) -> None:
    case = on_device(case_of.__wrapped__(name), "cuda")
    plan = solve(case.model, "64GiB", sample=case.sample, capture="graph")
    low = smallest(plan.chain, "two_level", host=BESIDE)
    budget = low + int(fraction * (plan.plain.peak - low))
    plan = plan.within(budget, solver="two_level", parameters={"host": BESIDE})
    assert copies(plan)
    assert_equal(
        train(case, execute(plan, copy.deepcopy(case.model))), train(case, copy.deepcopy(case.model))
    )
    measured = peak_of_a_step(case, execute(plan, copy.deepcopy(case.model)))
    assert measured.peak <= plan.predicted_peak
    assert all(side.bytes == 0 and 0 < side.peak <= plan.timeline.host_peak for side in stores)
