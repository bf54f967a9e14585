"""Check copies to the host: whether they change bits or bytes, and whether they run beside the compute."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import baselines
from benchmarks.cuda.findings import Findings
from benchmarks.cuda.machine import Machine
from benchmarks.cuda.steps import MIB, Training, capture_words, difference, timed
from benchmarks.cuda.transformer import gpt
from rematplan import HostMemory, Plan, execute
from rematplan.scheduler.core.schedule import Offload, OffloadSaved, Prefetch, PrefetchSaved
from tests.shared.helpers import smallest

__all__ = ["copied_bytes", "copies", "link", "two_level"]


def copies(found: Findings, machine: Machine) -> None:
    """Train a GPT by a plan that copies to the host: equal steps, peak, copies that run beside compute."""
    with sdpa_kernel(SDPBackend.MATH):  # which repeats itself, so that only the copies are judged
        _copies(found, machine)


def _copies(found: Findings, machine: Machine) -> None:
    host = link(machine)
    found.add("GB/s to the host, from it", [host.write_bandwidth / 1e9, host.read_bandwidth / 1e9])
    training = Training(gpt(machine, 0.1, layers=8, width=512, batch=8, tokens=512), machine)
    want = training.outcome(training.model)
    twice = difference(training.outcome(training.model), want)
    found.add("the plain step twice", twice or "equal")
    whole = training.solve(capture="graph")
    found.add("captured as", capture_words(whole))
    low = smallest(whole.chain, "two_level", host=host)
    moved = two_level(whole, low + (whole.predicted_peak - low) * 3 // 10, host)
    planned = execute(moved, training.model)
    for step in ("first", "second"):
        found.equal(f"{step} planned step", difference(training.outcome(planned), want), repeatable=not twice)
    measured = training.peaks(planned)
    figures = {"predicted MiB": moved.predicted_peak / MIB, **measured}
    found.add("peak", figures, measured["measured bytes"] <= moved.predicted_peak)
    times = timed(
        training, {"plain": baselines.plain, "with copies": baselines.planned(moved)}, machine.pick(7, 1)
    )
    sizes = copied_bytes(moved)
    alone = 1e3 * (sizes[0] / host.write_bandwidth + sizes[1] / host.read_bandwidth)
    plain, step_ms = times["plain"]["step ms"], times["with copies"]["step ms"]
    figures = {
        "MiB to the host": sizes[0] / MIB,
        "MiB from it": sizes[1] / MIB,
        "copies alone ms": alone,
        "plain step ms": plain,
        "predicted extra of compute": moved.predicted_overhead,
        "predicted wait ms": 1e3 * moved.timeline.stall,
        "step with copies ms": step_ms,
        "plain step and copies one after the other ms": plain + alone,
    }
    found.add("beside the compute", figures)


def link(machine: Machine) -> HostMemory:
    """Measure the link to the host's memory: a large copy each way, of the kind that a plan makes."""
    size = machine.pick(256 * MIB, 4 * MIB)
    on_device = torch.empty(size, dtype=torch.uint8, device=machine.device)
    on_host = torch.empty(size, dtype=torch.uint8, pin_memory=machine.cuda)

    def rate(target: Tensor, source: Tensor) -> float:
        target.copy_(source)
        machine.wait()
        began = time.perf_counter()
        for _ in range(3):
            target.copy_(source, non_blocking=True)
        machine.wait()
        return 3 * size / (time.perf_counter() - began)

    capacity = machine.pick(64, 1) * 2**30
    return HostMemory(capacity, rate(on_host, on_device), rate(on_device, on_host), asynchronous=True)


def two_level(plan: Plan, budget: int, host: HostMemory) -> Plan:
    """Plan again with copies to the host."""
    return plan.within(budget, solver="two_level", parameters={"host": host})


def copied_bytes(plan: Plan) -> tuple[int, int]:
    """Count the bytes that a step copies to the host, and back."""
    stages, written, read = plan.chain.apart().stages, 0, 0
    for action in plan.schedule:
        if isinstance(action, Offload):
            written += stages[action.boundary].input
        elif isinstance(action, Prefetch):
            read += stages[action.boundary].input
        elif isinstance(action, OffloadSaved):
            written += stages[action.stage].options[plan.option(action.stage)].saved
        elif isinstance(action, PrefetchSaved):
            read += stages[action.stage].options[plan.option(action.stage)].saved
    return written, read
