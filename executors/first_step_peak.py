"""Measure the first planned step, and tighten the plan where its peak exceeds the budget."""

from __future__ import annotations

import warnings
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.core.errors import InfeasibleBudget, PeakWarning
from rematplan.scheduler.costs.meters.clock import wait
from rematplan.scheduler.costs.meters.cuda_overheads import workspace_bytes
from rematplan.scheduler.costs.meters.peak import CpuEvents, CudaBytes
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.leaves import tensors_in
from rematplan.scheduler.torch_layer.private import at_end_of_backward

__all__ = ["PeakWatch", "step_bytes", "tightened"]


MARKER = 1_000_033  # bytes of an allocation that nothing else asks for


class PeakWatch:
    """Counts the bytes of one step, from now until a backward from its output ends.

    On CUDA by the caching allocator's counters, whose peak statistics are reset now, once cuBLAS has its
    workspaces. On the CPU by the autograd profiler's memory events: it stays on until ``stop``, for autograd
    restores its thread's old profiler when a backward ends; an allocation of a unique size marks the end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.queued = False
        self.peak = -1  # bytes above those live at the start; below 0 until the backward has ended
        self.requested: int | None = None  # on CUDA, as the peak, of what was asked for
        self.events: CpuEvents | None = None
        if device.type == "cuda":
            workspace_bytes(device)  # or the first step's would count as its own
            torch.cuda.reset_peak_memory_stats(device)
            self.before = CudaBytes.read(device)
        else:
            self.events = CpuEvents()

    def until_backward_ends(self, output: Any) -> None:
        """Note that the forward returned ``output``."""
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(self._reversing)

    def _reversing(self, _: Tensor) -> None:
        if not self.queued:
            self.queued = True
            at_end_of_backward(self._end)

    def _end(self) -> None:
        if self.device.type == "cuda":
            wait(self.device)
            now = CudaBytes.read(self.device)
            self.peak = now.highest - self.before.allocated
            self.requested = now.highest_requested - self.before.requested
        else:
            torch.empty(MARKER, dtype=torch.uint8)

    def stop(self) -> int | None:
        """Stop; return the most bytes live above those of the start, None if no backward has ended."""
        if self.events is not None:
            sizes = [size for kind, _, size in self.events.stop() if kind == "memory_alloc"]
            if MARKER in sizes:
                self.peak = max(accumulate(sizes[: sizes.index(MARKER)], initial=0))
        return self.peak if self.peak >= 0 else None


def step_bytes(plan: Plan) -> int:
    """Return the bytes that a step takes, by the plan, above those live before it."""
    there = ("parameters", "existing gradients", "buffers", "inputs", "optimizer state", "workspaces")
    return plan.predicted_peak - sum(plan.resident.get(name, 0) for name in there)


def tightened(plan: Plan, measured: int, name: str, requested: int | None = None) -> Plan | None:
    """Return a plan that is lower by what the first step exceeded the budget by, if it did and there is one.

    Args:
        measured: bytes that the step took above those live before it.
        name: of the model.
        requested: as ``measured``, of the bytes requested; None off CUDA.

    Warns:
        PeakWarning: the measured peak is above the predicted one.
    """
    excess = measured - step_bytes(plan)
    if excess <= 0:
        return None
    peak = plan.predicted_peak + excess
    text = (
        f"planned {name}: the first step peaked at {format_bytes(peak)}, {format_bytes(excess)} ({excess / peak:.1%}) more "
        "than predicted"
    )
    if requested is not None:
        text += f" ({format_bytes(measured - requested)} of it by CUDA's rounding up to blocks)"
    found = None
    if peak <= plan.memory_budget:
        text += f", within the budget of {format_bytes(plan.memory_budget)}"
    else:
        text += f", over the budget of {format_bytes(plan.memory_budget)}; "
        try:
            found = plan.within(max(1, plan.memory_budget - excess))
        except InfeasibleBudget as error:
            text += (
                f"no schedule is tighter by so much: raise the budget by {format_bytes(error.smallest + excess - plan.memory_budget)}, "
                "or shorten the batch"
            )
        else:
            text += f"from now on it trains by a schedule of {format_bytes(found.predicted_peak + excess)}"
    warnings.warn(text, PeakWarning, stacklevel=2)
    return found
