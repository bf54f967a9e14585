"""A step's live bytes over time, by category: as a plan predicts it, or as it was observed. Inert data.

``MemoryTimeline.of(plan)`` is the prediction; ``executors.rehearse`` makes the observed one. Both can be drawn,
written as JSON, and written as a snapshot that torch's memory_viz page shows.
"""

from __future__ import annotations

import os
import pickle
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scheduler.schedule import Backward, Checkpoint, Forward, Free, Keep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scheduler.plan import Plan
    from scheduler.schedule import Action

__all__ = ["CATEGORIES", "Block", "MemoryTimeline", "Point", "category_of", "in_words"]

FORMAT = 1
_COLORS = {
    "parameters": "C0",
    "buffers": "C9",
    "optimizer state": "C6",
    "inputs": "C8",
    "constants and replay state": "C4",
    "gradients": "C5",
    "boundaries held": "C2",
    "kept saved tensors": "C1",
    "carried values": "khaki",
    "gradient at hand": "C3",
    "transient": "0.8",
}
CATEGORIES = tuple(_COLORS)
_WORDS = {
    Forward: "run stage {} without keeping",
    Checkpoint: "run stage {}, holding its input",
    Keep: "run stage {} and keep it",
    Backward: "backward of stage {}",
    Free: "free boundary {}",
}


@dataclass(frozen=True, slots=True)
class Point:
    """A moment of the step.

    Attributes:
        action: the action of the schedule that runs then.
        label: what happens, in words: an op, for instance.
    """

    action: int
    label: str


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes that are live together, from point ``begin`` until before point ``end``."""

    name: str
    category: str
    size: int
    begin: int
    end: int


@dataclass(frozen=True)
class MemoryTimeline:
    """Live bytes over one step.

    Attributes:
        title: what this is.
        budget: bytes.
        actions: the actions of the schedule, in words.
        points: moments, in order.
        blocks: what is live when; sizes in bytes.
    """

    title: str
    budget: int
    actions: tuple[str, ...]
    points: tuple[Point, ...]
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        for block in self.blocks:
            if block.category not in CATEGORIES or block.size <= 0:
                raise ValueError(f"MemoryTimeline: {block} has no known category, or no bytes")
            if not 0 <= block.begin < block.end <= len(self.points):
                raise ValueError(f"MemoryTimeline: {block} lies outside the {len(self.points)} points")

    @cached_property
    def by_category(self) -> dict[str, tuple[int, ...]]:
        """(points,) live bytes of each category that occurs, in the order of ``CATEGORIES``."""
        changes: dict[str, list[int]] = defaultdict(lambda: [0] * (len(self.points) + 1))
        for block in self.blocks:
            changes[block.category][block.begin] += block.size
            changes[block.category][block.end] -= block.size
        result = {}
        for category in CATEGORIES:
            if category in changes:
                live, series = 0, []
                for change in changes[category][:-1]:
                    live += change
                    series.append(live)
                result[category] = tuple(series)
        return result

    @cached_property
    def live(self) -> tuple[int, ...]:
        """(points,) live bytes in all."""
        nothing = (0,) * len(self.points)
        return tuple(map(sum, zip(nothing, *self.by_category.values(), strict=True)))

    @property
    def peak(self) -> int:
        """The most bytes live at once."""
        return max(self.live)

    @classmethod
    def of(cls, plan: Plan) -> MemoryTimeline:
        """What the plan predicts: two points an action, while it runs and after it; totals are the referee's."""
        from scheduler.predicted_timeline import predicted

        return predicted(plan)

    # ---- written down --------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The timeline as JSON-ready data; the sums of each category and of all are written out too."""
        return {
            "format": FORMAT,
            "title": self.title,
            "budget": self.budget,
            "actions": list(self.actions),
            "points": [[point.action, point.label] for point in self.points],
            "blocks": [[b.name, b.category, b.size, b.begin, b.end] for b in self.blocks],
            "by_category": {name: list(series) for name, series in self.by_category.items()},
            "live": list(self.live),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryTimeline:
        """The timeline that ``to_json`` wrote.

        Raises:
            ValueError: the data is no timeline.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"MemoryTimeline.from_json: format {found!r}, expected {FORMAT}")
        try:
            return cls(
                data["title"],
                data["budget"],
                tuple(data["actions"]),
                tuple(Point(*row) for row in data["points"]),
                tuple(Block(*row) for row in data["blocks"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"MemoryTimeline.from_json: not a timeline: {error!r}") from error

    def to_snapshot(self) -> dict[str, Any]:
        """The timeline as ``torch.cuda.memory._snapshot()`` gives one, for https://pytorch.org/memory_viz.

        Addresses are made up, first fit in one segment. Frames name the action, the category and the op.
        """
        return _snapshot(self)

    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_snapshot()`` as a pickle, the file that the memory_viz page takes."""
        with Path(path).open("wb") as file:
            pickle.dump(self.to_snapshot(), file)

    def figure(self, observed: MemoryTimeline | None = None) -> Figure:
        """Live bytes over the actions of the schedule, stacked by category, with the budget.

        Args:
            observed: another timeline of the same schedule; its total is drawn as a line on top.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: ``observed`` is of another schedule.
        """
        if observed is not None and observed.actions != self.actions:
            raise ValueError("figure: the two timelines are of different schedules")
        return _drawn(self, observed)


def in_words(action: Action) -> str:
    """An action of a schedule."""
    return _WORDS[type(action)].format(*(getattr(action, name) for name in action.__slots__))


def category_of(part: str) -> str:
    """The category of a part of ``Plan.resident``."""
    if part in CATEGORIES:
        return part
    return "gradients" if part == "existing gradients" else "constants and replay state"


# ---- drawn and written -------------------------------------------------------------------------------


def _places(points: Sequence[Point]) -> list[float]:
    """Where each point stands on the axis of actions: those of one action are spread evenly over it."""
    amount: dict[int, int] = defaultdict(int)
    for point in points:
        amount[point.action] += 1
    passed: dict[int, int] = defaultdict(int)
    places = []
    for point in points:
        places.append(point.action + passed[point.action] / amount[point.action])
        passed[point.action] += 1
    return places


def _drawn(timeline: MemoryTimeline, observed: MemoryTimeline | None) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "MemoryTimeline.figure needs matplotlib, which is not installed: pip install 'rematplan[plot]'"
        ) from error
    unit = 2**20 if timeline.budget < 2**33 else 2**30
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    end = float(len(timeline.actions))
    places = [*_places(timeline.points), end]
    floor = [0.0] * len(places)
    for category, series in timeline.by_category.items():
        top = [below + size / unit for below, size in zip(floor, [*series, series[-1]], strict=True)]
        color = _COLORS[category]
        axes.fill_between(places, floor, top, step="post", label=category, color=color, linewidth=0)
        floor = top
    if observed is not None:
        line = [size / unit for size in observed.live]
        axes.step(
            [*_places(observed.points), end],
            [*line, line[-1]],
            where="post",
            color="black",
            linewidth=0.8,
            label=observed.title,
        )
    axes.axhline(timeline.budget / unit, color="red", linestyle="--", linewidth=1, label="budget")
    axes.set_xlim(0, end)
    axes.set_ylim(0)
    axes.set_xlabel("action of the schedule")
    axes.set_ylabel("live MiB" if unit == 2**20 else "live GiB")
    line_too = "" if observed is None else f"; the line: {observed.title}"
    axes.set_title(f"One training step, {timeline.title}{line_too}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    return figure


class _Addresses:
    """Made-up addresses: first fit from a base on."""

    BASE = 0x7F0000000000

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: dict[int, int] = {}
        self.highest = self.BASE

    def take(self, size: int) -> int:
        """An address with this many bytes free behind it."""
        where = self.BASE
        position = 0
        for position, begin in enumerate(self.begins):  # noqa: B007 # where it stopped is where it goes
            if begin - where >= size:
                break
            where = self.ends[begin]
        else:
            position = len(self.begins)
        self.begins.insert(position, where)
        self.ends[where] = where + size
        self.highest = max(self.highest, where + size)
        return where

    def give(self, address: int) -> None:
        """Free what was taken there."""
        del self.begins[bisect_left(self.begins, address)]
        del self.ends[address]


def _snapshot(timeline: MemoryTimeline) -> dict[str, Any]:
    comes: dict[int, list[Block]] = defaultdict(list)
    goes: dict[int, list[Block]] = defaultdict(list)
    for block in timeline.blocks:
        comes[block.begin].append(block)
        goes[block.end].append(block)
    addresses = _Addresses()
    at: dict[int, int] = {}  # by identity of the block
    trace: list[dict[str, Any]] = []

    def event(action: str, block: Block, time: int) -> dict[str, Any]:
        return {
            "action": action,
            "addr": at[id(block)],
            "size": block.size,
            "stream": 0,
            "frames": _frames(timeline, block),
            "category": block.category,
            "time_us": time,
        }

    for time in range(len(timeline.points)):
        for block in goes[time]:
            trace += [event("free_requested", block, time), event("free_completed", block, time)]
            addresses.give(at[id(block)])
        for block in comes[time]:
            at[id(block)] = addresses.take(block.size)
            trace.append(event("alloc", block, time))
    last = {at[id(block)]: block for block in goes[len(timeline.points)]}
    return {
        "segments": [_segment(timeline, last, addresses)],
        "device_traces": [trace],
        "allocator_settings": {},
    }


def _segment(timeline: MemoryTimeline, last: dict[int, Block], addresses: _Addresses) -> dict[str, Any]:
    """One segment with all that is live at the end; what lies between is free."""
    blocks: list[dict[str, Any]] = []

    def free(begin: int, end: int) -> None:
        if end > begin:
            row = {"address": begin, "size": end - begin, "requested_size": 0}
            blocks.append({**row, "state": "inactive", "frames": []})

    where = addresses.BASE
    for address, block in sorted(last.items(), key=lambda item: item[0]):
        free(where, address)
        where = address + block.size
        row = {"address": address, "size": block.size, "requested_size": block.size}
        blocks.append({**row, "state": "active_allocated", "frames": _frames(timeline, block)})
    free(where, addresses.highest)
    live = sum(block.size for block in last.values())
    return {
        "device": 0,
        "address": addresses.BASE,
        "total_size": addresses.highest - addresses.BASE,
        "allocated_size": live,
        "active_size": live,
        "requested_size": live,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }


def _frames(timeline: MemoryTimeline, block: Block) -> list[dict[str, Any]]:
    """What stands in the place of a Python stack: op, category, action, innermost first."""
    point = timeline.points[block.begin]
    rows: Iterable[tuple[str, str]] = (
        (block.name, "op"),
        (block.category, "category"),
        (timeline.actions[point.action], "schedule"),
    )
    return [{"filename": file, "line": point.action, "name": name} for name, file in rows]
