"""Schedules, and the one referee that judges them all.

A schedule is inert data: a tuple of actions. ``simulate`` is the only place that says what an action
means for memory and time; no solver's own bookkeeping counts.

The words, for stage i with input x_i:

* ``Forward(i)`` is read as: run stage i without keeping its saved tensors; x_i goes unless it is held.
* ``Checkpoint(i)`` is read as: run stage i without keeping its saved tensors, and hold on to x_i.
* ``Keep(i, k)`` is read as: run stage i keeping what its option k keeps, and hold on to x_i.
* ``Backward(i)`` is read as: reverse stage i; its saved tensors, the gradient of x_{i+1} and a held
  x_i are let go; the gradient of x_i is there.
* ``Free(i)`` is read as: let go of the held x_i before its stage is reversed.

Memory rules. Live bytes are the chain's fixed bytes, held boundaries, kept saved tensors, the working
boundary, the gradient at hand, and what the reversed stages retain (parameter gradients, long-lived
values). x_{i+1} lies inside the saved tensors of a kept stage i and costs nothing on top. x_0 is held
from the start. The gradient of x_L appears with the first backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from scheduler.chain import Chain

__all__ = [
    "Action",
    "Backward",
    "Checkpoint",
    "Forward",
    "Free",
    "IllegalAction",
    "Keep",
    "Schedule",
    "Timeline",
    "simulate",
]

SCHEDULE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Forward:
    """Run stage ``stage`` without keeping its saved tensors."""

    stage: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Run stage ``stage`` without keeping its saved tensors, and hold on to its input."""

    stage: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Run stage ``stage`` keeping what its option ``option`` keeps, and hold on to its input."""

    stage: int
    option: int = 0


@dataclass(frozen=True, slots=True)
class Backward:
    """Reverse stage ``stage``."""

    stage: int


@dataclass(frozen=True, slots=True)
class Free:
    """Let go of held boundary ``boundary`` before stage ``boundary`` is reversed."""

    boundary: int


Action: TypeAlias = Forward | Checkpoint | Keep | Backward | Free

_KINDS: dict[str, type] = {
    "forward": Forward,
    "checkpoint": Checkpoint,
    "keep": Keep,
    "backward": Backward,
    "free": Free,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class IllegalAction(ValueError):
    """An action that cannot be carried out where it stands.

    Attributes:
        index: position in the schedule (the number of actions, if the schedule ends too early).
        action: the action, or None at the end.
    """

    def __init__(self, index: int, action: Action | None, why: str) -> None:
        self.index = index
        self.action = action
        where = "the end of the schedule" if action is None else f"action {index}, {action}"
        super().__init__(f"simulate: {where}: {why}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is run, held, kept and reversed, in order. Legality is the referee's business."""

    actions: tuple[Action, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(self.actions))
        for action in self.actions:
            if type(action) not in _NAMES:
                raise ValueError(f"Schedule: {action!r} is no action")

    def __len__(self) -> int:
        return len(self.actions)

    def __iter__(self) -> Iterator[Action]:
        return iter(self.actions)

    def to_json(self) -> dict[str, Any]:
        """The schedule as JSON-ready data: ``["keep", 3, 0]`` is ``Keep(3, 0)``."""
        rows: list[list[Any]] = []
        for action in self.actions:
            fields = [getattr(action, slot) for slot in action.__slots__]
            rows.append([_NAMES[type(action)], *fields])
        return {"format": SCHEDULE_FORMAT, "actions": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """The schedule that ``to_json`` wrote.

        Raises:
            ValueError: the data is no schedule, or of an unknown format.
        """
        if not isinstance(data, Mapping) or data.get("format") != SCHEDULE_FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else data
            raise ValueError(f"Schedule.from_json: format {found!r}, expected {SCHEDULE_FORMAT}")
        actions = []
        rows = data.get("actions")
        if not isinstance(rows, list):
            raise ValueError("Schedule.from_json: 'actions' must be a list")
        for row in rows:
            if (
                not isinstance(row, list)
                or not row
                or not isinstance(row[0], str)
                or row[0] not in _KINDS
                or not all(isinstance(v, int) and not isinstance(v, bool) for v in row[1:])
                or len(row) - 1 != len(_KINDS[row[0]].__slots__)  # type: ignore[attr-defined] # a slotted dataclass
            ):
                raise ValueError(f"Schedule.from_json: {row!r} is no action")
            actions.append(_KINDS[row[0]](*row[1:]))
        return cls(tuple(actions))


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the referee saw.

    Attributes:
        seconds: of the whole step.
        peak: the most bytes live at once, ``chain.fixed`` included.
        live: (actions,) bytes live after each action.
        during: (actions,) the most bytes live while each action runs.
        runs: (L,) how often each stage ran forward.
        peak_action: index of the action during which the peak is reached.
    """

    seconds: float
    peak: int
    live: tuple[int, ...]
    during: tuple[int, ...]
    runs: tuple[int, ...]
    peak_action: int


def simulate(chain: Chain, schedule: Schedule | Iterable[Action]) -> Timeline:
    """Carry out ``schedule`` on ``chain`` by the memory rules above. The one referee.

    Returns:
        the Timeline: seconds, bytes, runs.

    Raises:
        IllegalAction: an action that cannot be carried out, or something left over at the end.
    """
    stages = chain.stages
    count = len(stages)
    held: dict[int, int] = {0: stages[0].input}
    kept: dict[int, int] = {}
    working: int | None = None  # a boundary that is neither held nor inside a kept stage
    runs = [0] * count
    to_reverse = count - 1
    base = chain.fixed + stages[0].input  # fixed, held, kept and long-lived bytes
    gradient = 0
    seconds = 0.0
    live: list[int] = []
    during: list[int] = []

    for index, action in enumerate(schedule):
        working_bytes = chain.input_bytes(working) if working is not None else 0
        if isinstance(action, Backward):
            i = action.stage
            if not 0 <= i < count:
                raise IllegalAction(index, action, f"there is no such stage; stages are 0..{count - 1}")
            if i != to_reverse:
                raise IllegalAction(
                    index,
                    action,
                    "all stages are reversed"
                    if to_reverse < 0
                    else f"stage {to_reverse} is to be reversed next",
                )
            if i not in kept:
                raise IllegalAction(
                    index, action, f"the saved tensors of stage {i} are not there; Keep({i}) first"
                )
            if i not in held and i - 1 not in kept:
                raise IllegalAction(index, action, f"x_{i} is neither held nor inside the kept stage {i - 1}")
            stage, option = stages[i], stages[i].options[kept[i]]
            if i == count - 1:
                gradient = chain.output_grad
            peak = base + working_bytes + gradient + stage.input_grad + option.backward_overhead
            seconds += stage.backward + option.recompute
            base += stage.retained - option.saved - held.pop(i, 0)
            del kept[i]
            gradient = stage.input_grad
            to_reverse -= 1
            if working is not None and working > i:
                working, working_bytes = None, 0
            if i == 0:
                gradient = 0
            during.append(max(peak, base + working_bytes + gradient))
            live.append(base + working_bytes + gradient)
            continue
        if isinstance(action, Free):
            if action.boundary not in held:
                raise IllegalAction(index, action, f"x_{action.boundary} is not held")
            base -= held.pop(action.boundary)
            during.append(base + working_bytes + gradient)
            live.append(base + working_bytes + gradient)
            continue

        i = action.stage
        if not 0 <= i < count:
            raise IllegalAction(index, action, f"there is no such stage; stages are 0..{count - 1}")
        stage = stages[i]
        if i > to_reverse:
            raise IllegalAction(index, action, f"stage {i} is reversed already")
        if i in kept:
            raise IllegalAction(index, action, f"stage {i} is kept already")
        if runs[i] and not stage.recomputable:
            raise IllegalAction(index, action, f"stage {i} may run only once")
        inside = i - 1 in kept
        if i not in held and not inside and working != i:
            raise IllegalAction(
                index, action, f"x_{i} is not there: neither held, nor kept, nor just computed"
            )
        if working is not None and working != i:
            working, working_bytes = None, 0  # superseded: this run starts from another boundary
        if not runs[i]:
            base += stage.carried
        runs[i] += 1
        seconds += stage.forward
        if isinstance(action, (Checkpoint, Keep)) and working == i:
            held[i] = working_bytes
            base += working_bytes
            working, working_bytes = None, 0
        if isinstance(action, Keep):
            if not 0 <= action.option < len(stage.options):
                raise IllegalAction(index, action, f"stage {i} has {len(stage.options)} options")
            option = stage.options[action.option]
            kept[i] = action.option
            base += option.saved
            during.append(base + gradient + option.forward_overhead)
            working, working_bytes = None, 0
        else:
            produced = chain.input_bytes(i + 1)
            during.append(base + working_bytes + gradient + produced + stage.forward_overhead)
            # A second copy of a held boundary is let go at once.
            working, working_bytes = (None, 0) if i + 1 in held else (i + 1, produced)
        live.append(base + working_bytes + gradient)

    end = len(live)
    if to_reverse >= 0:
        raise IllegalAction(end, None, f"stage {to_reverse} is not reversed yet")
    if held or kept or working is not None:
        raise IllegalAction(
            end, None, f"left over: held {sorted(held)}, kept {sorted(kept)}, working {working}"
        )
    peak_action = max(range(end), key=during.__getitem__)
    return Timeline(seconds, max(during), tuple(live), tuple(during), tuple(runs), peak_action)
