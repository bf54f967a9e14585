"""Run a persistent schedule as nested calls of a framework's own checkpoint function.

Slower than ``rematplan.executors.step`` and limited in depth by Python's recursion, but none of its code runs
in the backward: the tests compare the replay executor with it. For PyTorch ``checkpoint`` is ``lambda f, x:
torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)``, for JAX ``lambda f, x: jax.checkpoint(f)(x)``.

A persistent schedule of stages s..t is a tree. Either it keeps stage s and goes on with s+1..t, or it
splits: it advances from x_s to x_j without keeping anything, reverses j..t, and then reverses s..j-1 from
x_s by a schedule of its own. A split is ``checkpoint(stages s..j-1, x_s)`` followed by the rest; when the
checkpointed function is run again for its backward, the splits inside it become checkpoints in their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Forward, Keep, Schedule

__all__ = ["nested"]

T = TypeVar("T")
# In the order in which they run: a kept stage, or the parts of a checkpointed segment.
Parts: TypeAlias = "list[int | Parts]"


def nested(
    schedule: Schedule, stages: Sequence[Callable[[T], T]], checkpoint: Callable[[Callable[[T], T], T], T]
) -> Callable[[T], T]:
    """Return the composition of ``stages``, whose backward follows ``schedule``.

    Args:
        schedule: persistent, for as many stages; every kept stage with its option 0, which keeps all.
        checkpoint: (function, x) -> function(x), running the function again when its backward comes.

    Raises:
        ValueError: the schedule is not of that class.
    """
    parts, end = _parse(schedule.actions, 0, 0, len(stages))
    if end != len(schedule):
        raise ValueError(f"nested: action {end}, {schedule.actions[end]}, comes after the last backward")

    def run(parts: Parts, x: T) -> T:
        for part in parts:
            if isinstance(part, int):
                x = stages[part](x)
            else:
                x = checkpoint(lambda y, inner=part: run(inner, y), x)  # type: ignore[misc] # a bound default
        return x

    return lambda x: run(parts, x)


def _parse(actions: tuple[Action, ...], at: int, start: int, stop: int) -> tuple[Parts, int]:
    """Return the tree of the actions from index ``at`` that reverse stages start..stop-1, and their end."""

    def expect(action: Action) -> None:
        if at >= len(actions) or actions[at] != action:
            got = actions[at] if at < len(actions) else "the end"
            raise ValueError(f"nested: not a persistent schedule: action {at} is {got}, expected {action}")

    if start == stop:
        return [], at
    if at < len(actions) and actions[at] == Keep(start):
        rest, at = _parse(actions, at + 1, start + 1, stop)
        expect(Backward(start))
        return [start, *rest], at + 1
    # x_0 is held from the start, and x_start may be held by an enclosing split: Forward will do then.
    if at >= len(actions) or actions[at] != Forward(start):
        expect(Checkpoint(start))
    middle, at = start + 1, at + 1
    while middle < stop and at < len(actions) and actions[at] == Forward(middle):
        middle, at = middle + 1, at + 1
    right, at = _parse(actions, at, middle, stop)
    left, at = _parse(actions, at, start, middle)
    return [left, *right], at
