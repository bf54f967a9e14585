"""Measured peak bytes of a function, on CUDA and on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.costs.meters.cuda_overheads import workspace_bytes
from rematplan.scheduler.costs.meters.peak import count_bytes
from rematplan.scheduler.costs.resident import storage_bytes
from rematplan.scheduler.torch_layer.leaves import tensors_in

__all__ = ["MeasuredPeak", "measure_peak"]


@dataclass(frozen=True, slots=True)
class MeasuredPeak:
    """The bytes that ``measure_peak`` counted.

    Attributes:
        peak: the most bytes live at once: those of ``resident`` and those that the function allocated.
        resident: bytes live before; on CUDA with cuBLAS's workspaces.
        added: the most bytes above those live at the start.
        result: what the function returned.
        requested: on CUDA as ``peak``, but with the bytes that the function requested instead of the blocks
            it got, without rounding and the slack of unsplit blocks; None elsewhere.
    """

    peak: int
    resident: int
    added: int
    result: Any = field(repr=False)
    requested: int | None = None


def measure_peak(
    fn: Callable[[], Any], *, resident: Iterable[Any] = (), device: torch.device | str | None = None
) -> MeasuredPeak:
    """Run ``fn()`` and count the most device bytes live at once.

    On the CPU every allocation and release of torch's allocator is counted (by the autograd profiler's memory
    events), not RSS. On CUDA the caching allocator's counters are read, after a synchronisation; the
    allocator's own peak statistics are reset; blocks count as in ``torch.cuda.max_memory_allocated``.
    cuBLAS's workspaces, which stay once allocated, are allocated before and part of ``resident``; those of
    cuDNN live within the function, and count with it. Run the function once before, to leave other lazy
    initialisation out. Python's cyclic garbage collector is off meanwhile.

    Args:
        fn: for instance one training step. What it returns stays alive, and counts.
        resident: what is live all the while, and counts: modules (parameters, gradients, buffers), tensors,
            or containers of tensors such as a batch or an optimizer's state.
        device: default: that of the first tensor in ``resident``, else CUDA if there is one, else the CPU.

    Raises:
        RuntimeError: an autograd profiler is active already (CPU).

    Example:
        >>> measure_peak(step, resident=[model, batch]).peak  # doctest: +SKIP
    """
    tensors: list[Tensor] = []
    for item in resident:
        if isinstance(item, nn.Module):
            tensors += [*item.parameters(), *item.buffers()]
            tensors += [p.grad for p in item.parameters() if p.grad is not None]
        elif isinstance(item, torch.optim.Optimizer):
            tensors += tensors_in(dict(item.state))
        else:
            tensors += tensors_in(item)
    if device is None:
        fallback = "cuda" if torch.cuda.is_available() else "cpu"
        device = tensors[0].device if tensors else torch.device(fallback)
    device = torch.device(device)
    there = storage_bytes(tensors, device) + workspace_bytes(device)
    counted = count_bytes(lambda mark: fn(), device)
    requested = None if counted.requested is None else there + counted.requested
    return MeasuredPeak(there + counted.peak, there, counted.peak, counted.result, requested)
