"""Bound from below the seconds of any schedule, by a knapsack at the first backward.

When ``Backward(L-1)`` runs, every stage whose saved tensors are not live must run forward once more. Which
stages are kept, and with which option, is a multiple-choice knapsack with the budget as its capacity; its
linear relaxation is solved for every budget at once by taking the steps of each stage's lower convex hull in
order of the seconds they spare per byte (Sinha & Zoltners 1979, *The multiple-choice knapsack problem*,
Operations Research 27(3), https://doi.org/10.1287/opre.27.3.503).

It holds for schedules of every class, and is tight where no stage runs a third time.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from rematplan.scheduler.core.chain import Chain, Stage

__all__ = ["Knapsack"]


def _hull(stage: Stage, sizes: list[int]) -> list[tuple[int, float]]:
    """Return the stage's choices at the first backward, (bytes, extra seconds), on their lower convex hull.

    Args:
        sizes: bytes of each option.
    """
    choices = [(size, option.recompute) for size, option in zip(sizes, stage.options, strict=True)]
    if stage.recomputable:
        choices.append((0, stage.forward + min(option.recompute for option in stage.options)))
    hull: list[tuple[int, float]] = []
    for size, seconds in sorted(choices):
        if hull and seconds >= hull[-1][1]:
            continue
        # The last point goes if it lies on or above the line from the one before it to the new one.
        while len(hull) > 1:
            (s0, e0), (s1, e1) = hull[-2:]
            if (e1 - e0) * (size - s0) < (seconds - e0) * (s1 - s0):
                break
            hull.pop()
        if hull and hull[-1][0] == size:
            hull.pop()
        hull.append((size, seconds))
    return hull


def _top(chain: Chain) -> int:
    """Return the least bytes above what is kept while the last stage is kept and reversed."""
    last = chain.stages[-1]
    gradients = chain.output_grad + last.input_grad
    return min(
        max(min(o.forward_overhead, o.transient(again=True)), gradients + o.backward_overhead)
        for o in last.options
    )


def _own(chain: Chain) -> list[list[int]]:
    """Return (L, options) bytes of values that a stage makes, keeps and hands to no other."""
    shared = {value for stage in chain.stages for value in stage.enters} | {c.value for c in chain.carried}
    return [
        [sum(chain.values[v] for v in option.keeps if v not in shared) for option in stage.options]
        for stage in chain.stages
    ]


class Knapsack:
    """The bound of one chain, for every budget.

    Args:
        chain: what each stage costs; its sizes and seconds must not overflow floats.
    """

    def __init__(self, chain: Chain) -> None:
        held = chain.fixed + chain.input_bytes(0)
        if chain.values:
            held += chain.output_grad + sum(chain.values[c.value] for c in chain.carried if c.freed is None)
            held -= sum(stage.rerun_state for stage in chain.stages)
            sizes = _own(chain)
        else:
            held += sum(stage.carried for stage in chain.stages) + _top(chain)
            sizes = [[option.saved for option in stage.options] for stage in chain.stages]
        hulls = [_hull(*each) for each in zip(chain.stages, sizes, strict=True)]
        steps = [(b[0] - a[0], b[1] - a[1]) for hull in hulls for a, b in pairwise(hull)]
        steps.sort(key=lambda step: step[1] / step[0])
        amounts = [held + sum(hull[0][0] for hull in hulls), *(size for size, _ in steps)]
        extra = [sum(hull[0][1] for hull in hulls), *(seconds for _, seconds in steps)]
        self._bytes = np.cumsum(np.array(amounts, float))
        self._extra = np.cumsum(extra).clip(min=0.0)

    def extra(self, budget: int) -> float:
        """Return the seconds above the plain step that no schedule within ``budget`` (bytes) beats."""
        return float(np.interp(budget, self._bytes, self._extra))
