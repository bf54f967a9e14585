"""Measure the gathering of a block's parameters that fully_shard (FSDP2) has sharded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rematplan.scheduler.costs.meters.clock import wait
from rematplan.scheduler.costs.meters.peak import count_bytes
from rematplan.scheduler.costs.resident import storage_bytes
from rematplan.scheduler.costs.stage_run import StageCost
from rematplan.scheduler.torch_layer.fsdp import own_parameters, unshard

__all__ = ["Gather", "measure_gather", "resharding", "standing_bytes", "with_gather"]

REPEATS = 3  # fixed: every rank must take part in the same collectives


@dataclass(frozen=True, slots=True)
class Gather:
    """Costs of one all-gather of a block's parameters.

    Attributes:
        seconds: median.
        peak: most bytes while it runs: the buffer that is gathered into, and the parameters copied out of it.
        kept: bytes of the parameters.
    """

    seconds: float = 0.0
    peak: int = 0
    kept: int = 0


def resharding(outer: Sequence[Any]) -> list[Any]:
    """Reshard, unshard, and return the modules whose parameters were released in between. Collective."""
    _shard(outer)  # does nothing within the forward of a module that keeps its parameters
    return unshard(outer)


def _shard(modules: Sequence[Any]) -> None:
    for module in modules:
        module.reshard()


def measure_gather(modules: Sequence[Any], device: torch.device) -> Gather:
    """Gather the parameters of ``modules`` a few times; they are sharded before and after. Collective."""
    if not modules:
        return Gather()
    unshard(modules)  # a warm-up
    kept = storage_bytes((p for module in modules for p in own_parameters(module)), device)
    _shard(modules)
    counted = count_bytes(lambda _: unshard(modules), device, slack=False)
    _shard(modules)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        unshard(modules)
        wait(device)
        seconds.append(time.perf_counter() - began)
        _shard(modules)
    return Gather(statistics.median(seconds), counted.peak, kept)


def with_gather(cost: StageCost, gather: Gather) -> StageCost:
    """Return the cost of a block whose every run gathers its parameters, and its backward too.

    Bytes that are gathered for its backward are in ``standing_bytes``. That the next gather runs beside the
    compute is not assumed.
    """
    return replace(
        cost,
        forward=cost.forward + gather.seconds,
        backward=cost.backward + gather.seconds,
        dropping_peak=max(gather.peak, gather.kept + cost.dropping_peak),
        keeping_peak=max(gather.peak, gather.kept + cost.keeping_peak),
    )


def standing_bytes(gathers: Sequence[Gather]) -> int:
    """Return the most bytes, over the blocks, that are live while a block is reversed or others re-run.

    They are its own parameters; those of the block before, which fully_shard gathers ahead; and the gradients
    of the block after, which are being reduced.
    """
    padded = [Gather(), *gathers, Gather()]
    return max(sum(g.kept for g in padded[k : k + 3]) for k in range(len(gathers)))
