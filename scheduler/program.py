"""The replay program: what the executor runs, derived from a schedule. Inert data.

A training step has two parts. In the first sweep every stage runs once, in order, while autograd builds
its graph; each stage's saved tensors are either kept or dropped. The replay then runs between the
backwards of the stages: it advances without grad, holds and frees boundaries, and rebuilds dropped saved
tensors just in time.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.schedule import COPY_ACTIONS, Backward, Checkpoint, DeviceAction, Forward, Free, Keep, Schedule

__all__ = ["ReplayProgram"]


@dataclass(frozen=True, slots=True)
class ReplayProgram:
    """The two parts of a schedule for L stages.

    Attributes:
        kept: (L,) the option whose saved tensors stay after the first run, or None if all are dropped.
        held: boundaries that the executor holds after the first sweep. The input of a kept stage is not among
            them: autograd holds what that stage's backward needs.
        replay: the actions once every stage has run: autograd begins its backward.
        backward_at: (L,) index in ``replay`` of the backward of each stage.
    """

    kept: tuple[int | None, ...]
    held: frozenset[int]
    replay: tuple[DeviceAction, ...]
    backward_at: tuple[int, ...]

    @classmethod
    def from_schedule(cls, schedule: Schedule, stages: int) -> ReplayProgram:
        """Split a legal schedule.

        Raises:
            ValueError: the first sweep does not run each of the stages once, in order; the schedule lets go of
                the input of a kept stage, or copies between device and host, which no executor does yet.
        """
        kept: list[int | None] = []
        held: set[int] = set()
        actions = [action for action in schedule if not isinstance(action, COPY_ACTIONS)]
        if len(actions) < len(schedule):
            raise ValueError(
                "ReplayProgram: the schedule copies between device and host, and executors keep to one memory; "
                "choose a solver that is not two_level"
            )
        _refuse_freed_inputs(actions)
        split = 0
        while split < len(actions) and len(kept) < stages:
            action = actions[split]
            split += 1
            if isinstance(action, Free):
                held.discard(action.boundary)
                continue
            if isinstance(action, Backward) or action.stage != len(kept):
                raise ValueError(
                    f"ReplayProgram: {action} in the first sweep, expected a run of stage {len(kept)}; an executor "
                    "runs every stage once, in order, before anything else"
                )
            kept.append(action.option if isinstance(action, Keep) else None)
            if isinstance(action, Checkpoint) or (action.stage == 0 and isinstance(action, Forward)):
                held.add(action.stage)
        if len(kept) != stages:
            raise ValueError(f"ReplayProgram: the first sweep runs {len(kept)} stages of {stages}")
        replay = actions[split:]
        backward_at = [-1] * stages
        for index, action in enumerate(replay):
            if isinstance(action, Backward):
                backward_at[action.stage] = index
            elif not isinstance(action, (Forward, Checkpoint, Keep, Free)):
                raise ValueError(f"ReplayProgram: {action!r} is not an action of a replay")
        if min(backward_at) < 0:
            raise ValueError(f"ReplayProgram: stage {backward_at.index(-1)} is never reversed")
        return cls(tuple(kept), frozenset(held), tuple(replay), tuple(backward_at))


def _refuse_freed_inputs(actions: list[DeviceAction]) -> None:
    """Refuse a schedule that frees the input of a stage while the stage is kept: autograd holds it all the same."""
    kept: set[int] = set()
    for action in actions:
        if isinstance(action, Keep):
            kept.add(action.stage)
        elif isinstance(action, Backward):
            kept.discard(action.stage)
        elif isinstance(action, Free) and action.boundary in kept:
            raise ValueError(
                f"ReplayProgram: {action} while stage {action.boundary} is kept; what autograd saved of its input stays "
                "until its backward, so that the step would take more bytes than the schedule says. Choose a solver "
                "whose schedules are persistent (optimal)"
            )
