"""The actions of a schedule, as inert data; ``referee.py`` defines what each of them means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rematplan.scheduler.core.checks import is_integer
from rematplan.scheduler.core.json_data import check_format, shown

__all__ = [
    "COPY_ACTIONS",
    "Action",
    "Backward",
    "Checkpoint",
    "CopyAction",
    "DeviceAction",
    "Forward",
    "Free",
    "FreeHost",
    "FreeSaved",
    "IllegalAction",
    "Keep",
    "Offload",
    "OffloadSaved",
    "Prefetch",
    "PrefetchSaved",
    "Schedule",
    "has_copies",
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
    """Release held boundary ``boundary`` before stage ``boundary`` is reversed."""

    boundary: int


@dataclass(frozen=True, slots=True)
class Offload:
    """Start to copy held boundary ``boundary`` to the host."""

    boundary: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Claim the bytes of boundary ``boundary`` on the device, start to copy it there, and hold it."""

    boundary: int


@dataclass(frozen=True, slots=True)
class FreeHost:
    """Release the host's own copy of boundary ``boundary``."""

    boundary: int


@dataclass(frozen=True, slots=True)
class OffloadSaved:
    """Start to copy the saved tensors of kept stage ``stage`` to the host."""

    stage: int


@dataclass(frozen=True, slots=True)
class PrefetchSaved:
    """Claim the bytes of the saved tensors of stage ``stage`` on the device, and start to copy them there."""

    stage: int


@dataclass(frozen=True, slots=True)
class FreeSaved:
    """Release the device copy of the saved tensors of stage ``stage``; x_{stage+1} stays, held."""

    stage: int


CopyAction: TypeAlias = Offload | Prefetch | FreeHost | OffloadSaved | PrefetchSaved | FreeSaved
DeviceAction: TypeAlias = Forward | Checkpoint | Keep | Backward | Free
Action: TypeAlias = DeviceAction | CopyAction
COPY_ACTIONS = (Offload, Prefetch, FreeHost, OffloadSaved, PrefetchSaved, FreeSaved)


def has_copies(actions: Iterable[Action]) -> bool:
    """Whether any of the actions copies between device and host."""
    return not frozenset(COPY_ACTIONS).isdisjoint(map(type, actions))


_KINDS: dict[str, type] = {
    "forward": Forward,
    "checkpoint": Checkpoint,
    "keep": Keep,
    "backward": Backward,
    "free": Free,
    "offload": Offload,
    "prefetch": Prefetch,
    "free_host": FreeHost,
    "offload_saved": OffloadSaved,
    "prefetch_saved": PrefetchSaved,
    "free_saved": FreeSaved,
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
    """The actions of a training step, in order; ``simulate`` judges whether they are legal."""

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
        """Return the schedule as JSON-ready data: ``["keep", 3, 0]`` is ``Keep(3, 0)``."""
        rows = [[_NAMES[type(each)], *(getattr(each, slot) for slot in each.__slots__)] for each in self]
        return {"format": SCHEDULE_FORMAT, "actions": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """Return the schedule that ``to_json`` wrote.

        Raises:
            ValueError: the data is no schedule, or of an unknown format.
        """
        check_format("Schedule.from_json", data, SCHEDULE_FORMAT)
        actions = []
        rows = data.get("actions")
        if not isinstance(rows, list):
            raise ValueError("Schedule.from_json: 'actions' must be a list")
        for i, row in enumerate(rows):
            if (
                not isinstance(row, list)
                or not row
                or not isinstance(row[0], str)
                or row[0] not in _KINDS
                or not all(map(is_integer, row[1:]))
                or len(row) - 1 != len(_KINDS[row[0]].__slots__)  # type: ignore[attr-defined] # a slotted dataclass
            ):
                raise ValueError(f"Schedule.from_json: actions[{i}] is {shown(row)}, which is no action")
            actions.append(_KINDS[row[0]](*row[1:]))
        return cls(tuple(actions))
