"""Split a step's live bytes over time by category, as predicted by a plan or as observed. Inert data.

``MemoryTimeline.of(plan)`` is the prediction, the referee's account split by category, action by action;
``rematplan.rehearse`` makes the observed one. Both can be drawn, written as JSON, and written as a snapshot.
"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rematplan.scheduler.core import schedule as acts
from rematplan.scheduler.core.account import Account
from rematplan.scheduler.core.json_data import check_format
from rematplan.scheduler.core.referee import Referee
from rematplan.scheduler.plan.figure import COLORS, drawn
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.plan.snapshot import snapshot_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part: TypeAlias = tuple[str, int, str]  # category, bytes, name
Parts: TypeAlias = dict[Any, Part]

__all__ = ["CATEGORIES", "Allocation", "MemoryTimeline", "Moment", "category_of", "in_words"]

FORMAT = 1
CATEGORIES = tuple(COLORS)
STATE = "constants and replay state"
NO_PART: Part = ("gradient at hand", 0, "")
_HELD = {
    "carried": "carried values",
    "kept": "kept saved tensors",
    "held": "boundaries held",
    "passing": "transient",
}
_WORDS = {
    acts.Forward: "run stage {} without keeping",
    acts.Checkpoint: "run stage {}, holding its input",
    acts.Keep: "run stage {} and keep it",
    acts.Backward: "backward of stage {}",
    acts.Free: "free boundary {}",
    acts.Offload: "copy boundary {} to the host",
    acts.Prefetch: "fetch boundary {} from the host",
    acts.FreeHost: "free boundary {} on the host",
    acts.OffloadSaved: "copy what stage {} saved to the host",
    acts.PrefetchSaved: "fetch what stage {} saved from the host",
    acts.FreeSaved: "free what stage {} saved",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment of the step.

    Attributes:
        action: the action of the schedule that runs then.
        label: what happens, in words: an op, for instance.
    """

    action: int
    label: str


@dataclass(frozen=True, slots=True)
class Allocation:
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
    points: tuple[Moment, ...]
    blocks: tuple[Allocation, ...]

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
        return {name: tuple(accumulate(changes[name][:-1])) for name in CATEGORIES if name in changes}

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
        """Predict by a plan: two points an action, while it runs and after it; totals are the referee's."""
        return _predicted(plan)

    # ---- written down --------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return the timeline as JSON-ready data, with the sums of each category and of all."""
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
        """Return the timeline that ``to_json`` wrote.

        Raises:
            ValueError: the data is no timeline.
        """
        check_format("MemoryTimeline.from_json", data, FORMAT)
        try:
            return cls(
                data["title"],
                data["budget"],
                tuple(data["actions"]),
                tuple(Moment(*row) for row in data["points"]),
                tuple(Allocation(*row) for row in data["blocks"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"MemoryTimeline.from_json: not a timeline: {error!r}") from error

    def to_snapshot(self) -> dict[str, Any]:
        """Return a snapshot in the form of torch's, for https://pytorch.org/memory_viz.

        Addresses are made up, first fit in one segment. Frames name the action, the category and the op.
        """
        return snapshot_of(self)

    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_snapshot()`` as a pickle, the file that the memory_viz page takes."""
        with Path(path).open("wb") as file:
            pickle.dump(self.to_snapshot(), file)

    def figure(self, observed: MemoryTimeline | None = None) -> Figure:
        """Draw live bytes over the actions of the schedule, stacked by category, with the budget.

        Args:
            observed: another timeline of the same schedule; its total is drawn as a line on top.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: ``observed`` is of another schedule.
        """
        if observed is not None and observed.actions != self.actions:
            raise ValueError("figure: the two timelines are of different schedules")
        return drawn(self, observed)


def in_words(action: acts.Action) -> str:
    """Say an action of a schedule in words."""
    return _WORDS[type(action)].format(*(getattr(action, name) for name in action.__slots__))


def category_of(part: str) -> str:
    """Return the category of a part of ``Plan.resident``."""
    if part in CATEGORIES:
        return part
    return "gradients" if part == "existing gradients" else STATE


# ---- predicted ---------------------------------------------------------------------------------------


class _Ledger:
    """Blocks that begin and end, by key."""

    def __init__(self) -> None:
        self.open: dict[Any, tuple[Part, int]] = {}
        self.blocks: list[Allocation] = []
        self.now = 0
        self.total = 0

    def put(self, key: Any, part: Part) -> None:
        """Begin a block of this part under the key, in the place of the one before."""
        self.drop(key)
        if part[1]:
            self.open[key] = part, self.now
            self.total += part[1]

    def drop(self, key: Any) -> None:
        """End the block of the key."""
        if key in self.open:
            (category, size, name), begin = self.open.pop(key)
            self.total -= size
            if begin < self.now:
                self.blocks.append(Allocation(name or category, category, size, begin, self.now))

    def update(self, before: Parts, after: Parts) -> None:
        """Replace the parts ``before`` by ``after``."""
        for key in before.keys() - after.keys():
            self.drop(key)
        for key, part in after.items():
            if before.get(key) != part:
                self.put(key, part)


def _parts(account: Account) -> Parts:
    """Return what is live, but for what is fixed."""
    parts: Parts = {copy: (_HELD[how], size, name) for copy, how, size, name in account.copies()}
    parts["gradients"] = ("gradients", account.grads, "")
    parts["state"] = (STATE, account.rerun_state, "for runs again")
    parts["boundary gradient"] = ("gradient at hand", account.boundary_grad, "")
    parts["carried gradients"] = ("gradient at hand", account.carried, "of carried values")
    if not account.chain.values:  # a sum, from which the gradients cannot be told
        parts["carried gradients"] = (_HELD["carried"], account.carried, "")
    return parts


def _predicted(plan: Plan) -> MemoryTimeline:
    """Split the referee's account of a plan by category, and compare every total with its own."""
    judged = plan.timeline
    referee = Referee(plan.chain, plan.schedule, plan.host)
    chain = referee.chain
    ledger = _Ledger()
    resident = dict(plan.resident)
    resident[STATE] = resident.get(STATE, 0) + chain.fixed - sum(resident.values())
    if chain.values:  # by value it is known when that is live
        resident[STATE] -= sum(stage.rerun_state for stage in chain.stages)
    for name, size in resident.items():
        ledger.put(name, (category_of(name), size, name))
    points: list[Moment] = []
    live: Parts = {}
    for index, (action, account) in enumerate(zip(plan.schedule, referee.steps(), strict=True)):
        words, after = in_words(action), _parts(account)
        # What a backward needs is live while it runs; what a forward makes is, too. By sums, the gradient of
        # x_L is not.
        during = (
            after if chain.values else {**after, "boundary gradient": live.get("boundary gradient", NO_PART)}
        )
        if isinstance(action, acts.Backward) and ledger.total <= account.during:
            during = live
        ledger.update(live, during)
        ledger.put("transient", ("transient", judged.during[index] - ledger.total, words))
        points.append(Moment(index, words))
        ledger.now += 1
        ledger.drop("transient")
        ledger.update(during, after)
        live = after
        if ledger.total != judged.live[index]:
            raise RuntimeError(
                f"MemoryTimeline: action {index}, {action}, leaves {ledger.total} bytes by category and "
                f"{judged.live[index]} by the referee; please report this"
            )
        points.append(Moment(index, f"after: {words}"))
        ledger.now += 1
    for key in list(ledger.open):
        ledger.drop(key)
    actions = tuple(map(in_words, plan.schedule))
    return MemoryTimeline("predicted", plan.memory_budget, actions, tuple(points), tuple(ledger.blocks))
