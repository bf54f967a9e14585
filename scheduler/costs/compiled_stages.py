"""Measure the variants of a compiled stage, and choose those that are its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from rematplan.scheduler.capture.graph.compiled import CompiledCapture
from rematplan.scheduler.costs.stage_run import OptionCost, StageCost, StageRun, measure_stage

__all__ = ["measure_variants"]


def measure_variants(
    capture: CompiledCapture,
    k: int,
    isolated: Callable[[Callable[..., tuple[Tensor, ...]]], StageRun],
    *,
    split: bool,
) -> StageCost:
    """Return the cost of stage k, its options among it: the fastest variant, then each smaller one that pays.

    Args:
        isolated: function of the stage -> how it runs in isolation.
        split: whether to offer more than the fastest.
    """
    costs = [
        replace(measure_stage(isolated(variant.function), capture.place), variant=variant)
        for variant in capture.variants[k]
    ]
    whole = min(costs, key=_seconds)
    options: list[StageCost] = []
    for cost in sorted(costs, key=_bytes):  # each smaller than the next, and slower
        if _bytes(cost) < _bytes(whole) and split and (not options or _seconds(cost) < _seconds(options[-1])):
            options.append(cost)
    return replace(
        whole,
        dropping_peak=max(cost.dropping_peak for cost in (whole, *options)),
        options=tuple(_option(cost, whole) for cost in reversed(options)),
    )


def _seconds(cost: StageCost) -> float:
    return cost.forward + cost.backward


def _bytes(cost: StageCost) -> int:
    assert cost.variant is not None
    return cost.variant.made


def _option(cost: StageCost, whole: StageCost) -> OptionCost:
    assert cost.variant is not None
    shared: dict[str, Any] = {name: getattr(cost.whole, name) for name in ("rebuild_peak", "kept", "variant")}
    return OptionCost(
        frozenset(),
        max(0.0, _seconds(cost) - _seconds(whole)),
        cost.keeping_peak,
        cost.backward_peak,
        f"compiled to save {cost.variant.share:.0%}",
        **shared,
    )
