"""Split a schedule into what an executor runs: the first sweep and the replay. Inert data.

In the first sweep every stage runs once, in order, while autograd builds its graph; each stage's saved
tensors are either kept or dropped. The replay runs between the backwards of the stages: it advances, saving
nothing, holds and frees boundaries, and recomputes dropped saved tensors just in time. Both copy between
device and host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rematplan.scheduler.core import schedule as acts

__all__ = ["ReplayProgram"]


@dataclass(frozen=True, slots=True)
class ReplayProgram:
    """The two parts of a schedule for L stages.

    Attributes:
        kept: (L,) the option whose saved tensors stay after the first run, or None if all are dropped.
        held: boundaries that the executor holds after the first sweep, on the device or on the host. The
            input of a kept stage is not among them: autograd holds what that stage's backward needs.
        replay: the actions once every stage has run: autograd begins its backward.
        backward_at: (L,) index in ``replay`` of the backward of each stage.
        moves: (L,) the copies that follow the first run of each stage, and what they release.
        copies: whether anything is copied between device and host.
    """

    kept: tuple[int | None, ...]
    held: frozenset[int]
    replay: tuple[acts.Action, ...]
    backward_at: tuple[int, ...]
    moves: tuple[tuple[acts.CopyAction | acts.Free, ...], ...] = ()
    copies: bool = False

    @classmethod
    def from_schedule(cls, schedule: acts.Schedule, stages: int) -> ReplayProgram:
        """Split a legal schedule.

        Raises:
            ValueError: the first sweep does not run each of the stages once, in order; the schedule releases
                of the input of a kept stage that is not on the host, or copies what a stage keeps that is run
                again.
        """
        kept: list[int | None] = []
        held: set[int] = set()
        actions = tuple(schedule)
        away = _checked_places(actions)
        moves: list[list[acts.CopyAction | acts.Free]] = [[] for _ in range(stages)]
        split = 0
        while split < len(actions) and len(kept) < stages:
            action = actions[split]
            split += 1
            if isinstance(action, acts.Free) and split - 1 not in away:
                held.discard(action.boundary)
                continue
            if isinstance(action, (acts.Free, *acts.COPY_ACTIONS)):
                moves[max(len(kept) - 1, 0)].append(action)
                continue
            if isinstance(action, acts.Backward) or action.stage != len(kept):
                raise ValueError(
                    f"ReplayProgram: {action} in the first sweep, expected a run of stage {len(kept)}; an executor "
                    "runs every stage once, in order, before anything else"
                )
            # The input of stage 0 is live, and that of a stage after a kept one lies in what that one saved.
            there = not kept or kept[-1] is not None
            kept.append(action.option if isinstance(action, acts.Keep) else None)
            if isinstance(action, acts.Checkpoint) or (isinstance(action, acts.Forward) and there):
                held.add(action.stage)
        if len(kept) != stages:
            raise ValueError(f"ReplayProgram: the first sweep runs {len(kept)} stages of {stages}")
        replay = actions[split:]
        backward_at = [-1] * stages
        for index, action in enumerate(replay):
            if isinstance(action, acts.Backward):
                backward_at[action.stage] = index
        if min(backward_at) < 0:
            raise ValueError(f"ReplayProgram: stage {backward_at.index(-1)} is never reversed")
        copies = acts.has_copies(actions)
        return cls(tuple(kept), frozenset(held), replay, tuple(backward_at), tuple(map(tuple, moves)), copies)

    def without_options(self) -> ReplayProgram:
        """Return the program for stages that are kept whole, whatever the option."""
        kept = tuple(None if option is None else 0 for option in self.kept)
        replay = tuple(acts.Keep(each.stage) if isinstance(each, acts.Keep) else each for each in self.replay)
        return replace(self, kept=kept, replay=replay)


def _checked_places(actions: tuple[acts.Action, ...]) -> frozenset[int]:
    """Return the places of the ``Free`` actions whose boundary is on the host by then.

    Refuses what no executor follows: autograd holds what it saved of the input of a kept stage, so that this
    input may go only while the host has it; and what a run again keeps stays on the device.
    """
    away: set[int] = set()
    kept: set[int] = set()
    again: set[int] = set()
    seen: set[int] = set()
    there: set[tuple[str, int]] = set()  # what the host has
    gone: set[int] = set()  # boundaries whose device copy was freed
    for index, action in enumerate(actions):
        if isinstance(action, (acts.Forward, acts.Checkpoint, acts.Keep)):
            if isinstance(action, acts.Keep):
                kept.add(action.stage)
                again |= {action.stage} & seen
            seen.add(action.stage)
            gone.discard(action.stage)
        elif isinstance(action, acts.Backward):
            kept.discard(action.stage)
            again.discard(action.stage)
            there -= {("boundary", action.stage), ("saved", action.stage)}
        elif isinstance(action, (acts.OffloadSaved, acts.PrefetchSaved, acts.FreeSaved)):
            if isinstance(action, acts.OffloadSaved):
                there.add(("saved", action.stage))
            _refuse_again(action, action.stage, again)
        else:
            b = action.boundary
            _refuse_again(action, b, again)
            if isinstance(action, acts.Offload):
                there.add(("boundary", b))
            elif isinstance(action, acts.FreeHost):
                there.discard(("boundary", b))
            elif isinstance(action, acts.Prefetch):
                gone.discard(b)
            else:
                gone.add(b)
            on_host = ("boundary", b) in there or ("saved", b - 1) in there
            if isinstance(action, acts.Free) and on_host:
                away.add(index)
            if b in kept and b in gone and not on_host:
                raise ValueError(
                    f"ReplayProgram: {action} while stage {b} is kept and its input is nowhere else; what autograd saved of it "
                    "stays until its backward, so that the step would take more bytes than the schedule says. Choose a "
                    "solver whose schedules are persistent (optimal), or one that copies it to the host (two_level)"
                )
    return frozenset(away)


def _refuse_again(action: acts.Action, stage: int, again: set[int]) -> None:
    """Refuse to move what belongs to a stage that is run again and kept."""
    if stage in again:
        raise ValueError(
            f"ReplayProgram: {action} while stage {stage} is kept by a run again; what such a run keeps stays on the device "
            "until its backward, so that the step would take more bytes than the schedule says. Choose another solver"
        )
