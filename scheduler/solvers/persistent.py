"""Build persistent schedules, and choose among ready-made ones.

A schedule is *persistent* if a boundary, once held, stays until the stages after it are reversed. Such
a schedule is a tree of decisions about segments s..t of the chain whose input x_s is live:

* keep stage s with option k: ``Keep(s, k)``, then the segment s+1..t, then ``Backward(s)``;
* hold x_s and split at j, s < j <= t: ``Checkpoint(s)``, ``Forward(s+1)`` .. ``Forward(j-1)``, then the
  segment j..t, then, from x_s again, the segment s..j-1. The last segment of the chain may also be split
  at j = t + 1: it is run to its end, and then again; that gains nothing, but is what people do by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Forward, Keep, Schedule

__all__ = ["build", "first_fit", "run_ends"]


def build(length: int, decide: Callable[[int, int], tuple[int, int]]) -> Schedule:
    """Return the persistent schedule of ``length`` stages that ``decide`` describes.

    Args:
        length: number of stages L.
        decide: from the first and last stage of a segment (both inclusive) to (option, 0), which keeps the
            first with that option, or (-1, j), which splits at j.
    """
    actions: list[Action] = []
    # What is left to do, last first: an explicit stack, for chains deeper than Python's recursion limit.
    stack: list[Action | tuple[int, int]] = [(0, length - 1)]
    while stack:
        item = stack.pop()
        if not isinstance(item, tuple):
            actions.append(item)
            continue
        s, t = item
        option, at = decide(s, t)
        if option >= 0:
            actions.append(Keep(s, option))
            stack.append(Backward(s))
            at = s + 1
        else:
            if not s < at <= t + (t == length - 1):
                raise ValueError(f"build: a split of stages {s}..{t} at {at} leaves a part empty")
            actions += [Checkpoint(s), *map(Forward, range(s + 1, at))]
            stack.append((s, at - 1))
        if at <= t:
            stack.append((at, t))
    return Schedule(tuple(actions))


def run_ends(again: Sequence[bool]) -> list[int]:
    """Return (L,) for each stage, the last stage of its maximal run of stages that may run ``again`` (L,).

    A stage that may not is a run of its own. No split may carry it along uncovered, so the solvers that place
    checkpoints by position place them inside these runs.
    """
    ends = list(range(len(again)))
    for i in range(len(again) - 2, -1, -1):
        if again[i] and again[i + 1]:
            ends[i] = ends[i + 1]
    return ends


def first_fit(chain: Chain, budget: int, schedules: Iterable[Schedule], solver: str) -> Schedule:
    """Return the first of ``schedules`` whose peak, by the referee, is at most ``budget`` (bytes).

    Raises:
        InfeasibleBudget: none fits; ``smallest`` is the least of their peaks.
    """
    peaks = []
    for schedule in schedules:
        peaks.append(simulate(chain, schedule).peak)
        if peaks[-1] <= budget:
            return schedule
    raise InfeasibleBudget(budget, min(peaks), solver)
