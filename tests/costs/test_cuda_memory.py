"""Bytes that CUDA takes beside tensors: in the account of a described device, estimated by simulation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from rematplan import DeviceSpec, Plan, estimate, rehearse, solve
from rematplan.scheduler.costs.meters import cuda_overheads as cuda_memory
from rematplan.scheduler.costs.meters.cuda_allocator import CachingAllocator, block_bytes
from rematplan.scheduler.costs.meters.cuda_overheads import SAFETY, simulated_slack, stays, workspace_bytes
from rematplan.scheduler.costs.meters.live_storages import Event
from rematplan.scheduler.costs.meters.peak import count_bytes
from rematplan.scheduler.torch_layer.target import Target
from tests.shared.helpers import smallest
from tests.shared.steps import replan

MIB = 2**20
CARD = DeviceSpec("a card", memory=2**34, bandwidth=1e12, flops={"float32": 2e13})
EXPANDABLE = replace(CARD, expandable_segments=True)


def odd_sizes() -> tuple[nn.Module, torch.Tensor]:
    """A model without data whose activations and weights fill no segment."""
    widths = [611, 1237, 733, 1499, 857, 1013, 611, 1237]
    with torch.device("meta"):
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.GELU()]
        return nn.Sequential(*layers), torch.empty(1531, widths[0])


def stream(*changes: tuple[int, int]) -> list[Event]:
    """Events of a step from (storage, bytes that come or go)."""
    return [Event("op", change, 0, storage) for storage, change in changes]


def test_slack_is_what_blocks_have_too_much_at_the_peak() -> None:
    # 11 MiB have a segment of 12 MiB, and 1 MiB is not split off.
    assert simulated_slack([11 * MIB], [], []) == MIB
    # 12.5 MiB split theirs of 14 MiB; state of 11 MiB comes after the first step.
    assert simulated_slack([25 * MIB // 2], [11 * MIB], []) == MIB
    # 13.25 MiB have a whole segment of 14 MiB, at the peak of the step and not before.
    step = stream((0, 53 * MIB // 4), (0, -53 * MIB // 4))
    assert simulated_slack([512], [], step) == 3 * MIB // 4
    # Where the peak is another moment it does not matter: 30 MiB fill their segment.
    assert simulated_slack([512], [], [*step, *stream((1, 30 * MIB), (1, -30 * MIB))]) == 0


def test_a_storage_that_changes_its_size_is_another_block() -> None:
    assert simulated_slack([], [], stream((0, 30 * MIB), (0, -19 * MIB), (0, 19 * MIB), (0, -30 * MIB))) == 0


@pytest.mark.slow
def test_slack_and_workspaces_are_parts_of_the_account() -> None:
    model, batch = odd_sizes()
    plan = solve(model, 2**33, sample=batch, device=CARD)
    slack = plan.resident["allocator slack"]
    assert 0 < slack < 0.05 * plan.predicted_peak
    assert f"allocator slack {slack / MIB:.2f} MiB" in str(plan)
    assert f"workspaces {2 * CARD.workspace / MIB:.2f} MiB" in str(plan)
    without = solve(model, 2**33, sample=batch, device=EXPANDABLE)
    assert without.resident["allocator slack"] == 0
    assert plan.predicted_peak - without.predicted_peak == slack
    found = estimate(model, batch, device=CARD)
    assert (found.allocator_slack, found.workspaces) == (slack, 2 * CARD.workspace)
    assert "allocator slack" in str(found)
    assert "allocator slack" not in str(estimate(model, batch, device=EXPANDABLE))


def test_on_the_cpu_there_are_neither() -> None:
    batch = torch.zeros(4, 4)
    plan = solve(nn.Linear(4, 4), "1GiB", sample=batch)
    assert plan.resident["workspaces"] == plan.resident["allocator slack"] == 0
    host = DeviceSpec("a host", memory=2**34, bandwidth=1e10, flops={"float32": 5e10}, kind="cpu")
    assert workspace_bytes(Target(host)) == workspace_bytes(torch.device("cpu")) == 0


def test_optimizer_state_takes_part_in_the_slack() -> None:
    model, batch = odd_sizes()
    without = solve(model, 2**33, sample=batch, device=CARD).resident["allocator slack"]
    optimizer = torch.optim.AdamW(model.parameters())
    assert (
        solve(model, 2**33, sample=batch, device=CARD, optimizer=optimizer).resident["allocator slack"]
        > without
    )


@pytest.mark.parametrize("capture", ["graph", "modules"])
@pytest.mark.slow
def test_rehearsed_steps_of_tighter_schedules_stay_within_the_slack(capture: str) -> None:
    model, batch = odd_sizes()
    plan = solve(model, 2**33, sample=batch, device=CARD, capture=capture)
    low, high = smallest(plan.chain), plan.plain.peak
    standing = [t.nbytes for t in [*model.parameters(), batch]]
    most = 0
    for share in (0.0, 0.3, 0.6, 0.9):
        tight = replan(plan, low + int(share * (high - low)))
        most = max(most, simulated_slack(standing, [], rehearsed(tight, model, batch)))
    assert 0 < most <= plan.resident["allocator slack"]
    assert plan.resident["allocator slack"] <= 3 * SAFETY * most


def test_small_tensors_have_no_slack() -> None:
    with torch.device("meta"):
        model, batch = nn.Sequential(nn.Linear(301, 307), nn.GELU(), nn.Linear(307, 5)), torch.empty(703, 301)
    assert solve(model, 2**33, sample=batch, device=CARD).resident["allocator slack"] == 0


class Counters:
    """A simulated allocator behind the counters that torch reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocator = CachingAllocator()
        self.count = self.most = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.reset())
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: self.stats())

    def allocate(self, size: int) -> int:
        self.count += 1
        self.most = max(self.most, self.count)
        return self.allocator.allocate(size)

    def free(self, address: int) -> None:
        self.count -= 1
        self.allocator.free(address)

    def reset(self) -> None:
        self.allocator.reset_peaks()
        self.most = self.count

    def stats(self) -> dict[str, dict[str, dict[str, int]]]:
        now, peaks = self.allocator, self.allocator.peaks
        return {
            "allocated_bytes": {"all": {"current": now.allocated, "peak": peaks.allocated}},
            "requested_bytes": {"all": {"current": now.requested, "peak": peaks.requested}},
            "allocation": {"all": {"current": self.count, "peak": self.most}},
        }


@pytest.mark.parametrize("slack", [True, False])
def test_counters_are_read_between_marks_and_above_those_of_the_start(
    slack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Counters(monkeypatch)
    counters.allocate(11 * MIB)  # has 12

    def work(mark: Callable[[], None]) -> str:
        first = counters.allocate(53 * MIB // 4)  # has 14
        mark()
        counters.free(first)
        second = counters.allocate(100)
        counters.free(counters.allocate(20 * MIB))
        mark()
        counters.free(second)
        return "done"

    counted = count_bytes(work, torch.device("cuda"), slack=slack)
    # Without its slack a block is at most 512 bytes larger than what was asked for.
    first = 14 * MIB if slack else 53 * MIB // 4 + 512
    assert (counted.marks, counted.end, counted.result) == ((first, 512), 0, "done")
    assert counted.peaks == (first, 20 * MIB + 512, 512)
    assert counted.peak == 20 * MIB + 512
    assert counted.requested == 20 * MIB + 100


def rehearsed(plan: Plan, model: nn.Module, batch: torch.Tensor) -> list[Event]:
    """The allocations of a planned step, each of its own storage, from the blocks of its timeline."""
    blocks = rehearse(plan, model, batch).timeline.blocks
    changes = [(b.begin, 1, i, block_bytes(b.size)) for i, b in enumerate(blocks) if b.begin]
    # What goes at a point goes before what comes there.
    changes += [(b.end, 0, i, -block_bytes(b.size)) for i, b in enumerate(blocks) if b.begin]
    return [Event("op", change, 0, i) for _, _, i, change in sorted(changes)]


@pytest.mark.parametrize(
    ("forward", "backward", "known", "expected"),
    [
        pytest.param(32, 32, None, 64, id="each thread takes its own"),
        pytest.param(32, 0, None, 32, id="one for the stream"),
        pytest.param(0, 32, None, 64, id="this thread had multiplied before"),
        pytest.param(0, 0, None, 16, id="both had: what one has by default"),
        pytest.param(0, 0, 64, 64, id="known"),
        pytest.param(32, 0, 64, 64, id="one was cleared, and taken again"),
    ],
)
def test_workspaces_are_what_stays_when_threads_multiply(
    forward: int, backward: int, known: int | None, expected: int
) -> None:
    assert stays(forward, backward, known, lambda: 8) == expected


def test_workspaces_are_measured_once_and_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator that has what two threads have taken: a device is not at hand."""
    readings = iter([(32 * MIB, 32 * MIB), (0, 0)])
    monkeypatch.setattr(cuda_memory, "_KNOWN", {})
    monkeypatch.setattr(cuda_memory, "_taken", lambda index: next(readings))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", None, raising=False)
    device = torch.device("cuda:1")
    assert workspace_bytes(device) == workspace_bytes(device) == 64 * MIB


@pytest.mark.parametrize(
    ("setting", "capability", "expected"),
    [
        ("", (9, 0), 32 * MIB),
        ("", (8, 0), (2 * 4096 + 8 * 16) * 1024),
        (":4096:8", (8, 0), 32 * MIB),
        (":16:8", (9, 0), 128 * 1024),
    ],
)
def test_a_workspace_has_the_bytes_that_aten_chooses(
    setting: str, capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", setting)
    monkeypatch.delattr(torch.backends.cuda, "cublas_workspace_size", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert cuda_memory._default_bytes(0) == expected
