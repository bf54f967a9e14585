"""Persistent schedules: one builder, and one way to choose among ready-made schedules.

A schedule is *persistent* if a boundary, once held, stays until the stages after it are reversed. Such
a schedule is a tree of decisions about segments s..t of the chain whose input x_s is there:

* keep stage s with option k: ``Keep(s, k)``, then the segment s+1..t, then ``Backward(s)``;
* hold x_s and split at j, s < j <= t: ``Checkpoint(s)``, ``Forward(s+1)`` .. ``Forward(j-1)``, then the
  segment j..t, then, from x_s again, the segment s..j-1. The last segment of the chain may also be split
  at j = t + 1: it is run to its end, and then again; that gains nothing, but is what people do by hand.

A solver is whatever takes these decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import Action, Backward, Checkpoint, Forward, Keep, Schedule, simulate

__all__ = ["Decision", "KeepStage", "Split", "build", "first_fit", "run_ends"]

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class KeepStage(Generic[S]):
    """Keep the first stage of the segment with option ``option``; ``rest`` goes to the stages after it."""

    option: int
    rest: S


@dataclass(frozen=True, slots=True)
class Split(Generic[S]):
    """Hold the segment's input and go on from boundary ``at``; ``right`` and ``left`` go to the parts."""

    at: int
    right: S
    left: S


Decision: TypeAlias = KeepStage[S] | Split[S]


def build(length: int, decide: Callable[[int, int, S], Decision[S]], state: S) -> Schedule:
    """Return the persistent schedule of ``length`` stages that ``decide`` describes.

    Args:
        length: number of stages L.
        decide: called with a segment's first and last stage (both inclusive) and its state.
        state: the state of the whole chain, 0..L-1.
    """
    actions: list[Action] = []
    # What is left to do, last first: an explicit stack, for chains deeper than Python's recursion limit.
    stack: list[Action | tuple[int, int, S]] = [(0, length - 1, state)]
    while stack:
        item = stack.pop()
        if not isinstance(item, tuple):
            actions.append(item)
            continue
        s, t, here = item
        decision = decide(s, t, here)
        if isinstance(decision, KeepStage):
            actions.append(Keep(s, decision.option))
            stack.append(Backward(s))
            if s < t:
                stack.append((s + 1, t, decision.rest))
        else:
            if not s < decision.at <= t + (t == length - 1):
                raise ValueError(f"build: a split of stages {s}..{t} at {decision.at} leaves a part empty")
            actions.append(Checkpoint(s))
            actions.extend(Forward(i) for i in range(s + 1, decision.at))
            stack.append((s, decision.at - 1, decision.left))
            if decision.at <= t:
                stack.append((decision.at, t, decision.right))
    return Schedule(tuple(actions))


def run_ends(chain: Chain) -> list[int]:
    """Return (L,) for each stage, the last stage of its maximal run of recomputable stages.

    A stage that may run only once is a run of its own. No split may carry it along uncovered, so the
    solvers that place checkpoints by position place them inside these runs.
    """
    ends = list(range(len(chain)))
    for i in range(len(chain) - 2, -1, -1):
        if chain.stages[i].recomputable and chain.stages[i + 1].recomputable:
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
