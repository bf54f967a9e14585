"""What a plan predicts of a step's live bytes over time, by category: the referee's account, action by action."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from scheduler.actions import has_copies
from scheduler.host import apart
from scheduler.memory_timeline import Block, MemoryTimeline, Point, category_of, in_words
from scheduler.schedule import (
    Backward,
    Checkpoint,
    Forward,
    Free,
    FreeSaved,
    Keep,
    Prefetch,
    PrefetchSaved,
)
from scheduler.storages import follow

if TYPE_CHECKING:
    from scheduler.chain import Chain
    from scheduler.plan import Plan

__all__ = ["predicted"]

STATE = "constants and replay state"
_HELD = {
    "carried": "carried values",
    "kept": "kept saved tensors",
    "held": "boundaries held",
    "passing": "transient",
}


class _Ledger:
    """Blocks as they come and go, by a key of one's own."""

    def __init__(self) -> None:
        self.open: dict[Any, tuple[str, str, int, int]] = {}
        self.blocks: list[Block] = []
        self.now = 0
        self.total = 0

    def put(self, key: Any, category: str, size: int, name: str = "") -> None:
        """From now on the key stands for this many bytes; what it stood for before goes."""
        self.drop(key)
        if size:
            self.open[key] = (name or category, category, size, self.now)
            self.total += size

    def drop(self, key: Any) -> int:
        """The key's bytes go; gives their number."""
        if key not in self.open:
            return 0
        name, category, size, begin = self.open.pop(key)
        self.total -= size
        if begin < self.now:
            self.blocks.append(Block(name, category, size, begin, self.now))
        return size


def predicted(plan: Plan) -> MemoryTimeline:
    """The referee's account of a plan, split by category by its own rules; every total is compared with its own.

    Two points an action: while it runs, and after it.
    """
    chain, judged = plan.chain, plan.timeline
    if has_copies(plan.schedule):  # then the referee goes by these sums
        chain = apart(chain)
    ledger = _Ledger()
    parts = dict(plan.resident)
    parts[STATE] = parts.get(STATE, 0) + chain.fixed - sum(parts.values())
    if chain.values:  # by storage it is known when that is there
        parts[STATE] -= sum(stage.rerun_state for stage in chain.stages)
    for part, size in parts.items():
        ledger.put(part, category_of(part), size, part)
    account = _by_storage(plan, ledger) if chain.values else _by_sums(plan, chain, ledger)
    points: list[Point] = []
    for index, action in enumerate(plan.schedule):
        words = in_words(action)
        next(account)  # the ledger is as while the action runs, but for transients
        ledger.put("transient", "transient", judged.during[index] - ledger.total, words)
        points.append(Point(index, words))
        ledger.now += 1
        ledger.drop("transient")
        next(account)  # and now as after it
        if ledger.total != judged.live[index]:
            raise RuntimeError(
                f"MemoryTimeline: action {index}, {action}, leaves {ledger.total} bytes by category and "
                f"{judged.live[index]} by the referee; please report this"
            )
        points.append(Point(index, f"after: {words}"))
        ledger.now += 1
    for key in list(ledger.open):
        ledger.drop(key)
    return MemoryTimeline(
        "predicted",
        plan.memory_budget,
        tuple(map(in_words, plan.schedule)),
        tuple(points),
        tuple(ledger.blocks),
    )


def _by_storage(plan: Plan, ledger: _Ledger) -> Iterator[None]:
    """The ledger while each action runs, and after it, by the storages that the referee follows."""
    names = {value: stage.name for stage in reversed(plan.chain.stages) for value in _named(stage)}
    there: dict[Any, tuple[str, int, str]] = {}
    for moment, action in zip(follow(plan.chain, plan.schedule.actions), plan.schedule, strict=True):
        now: dict[Any, tuple[str, int, str]] = {
            copy: (_HELD[how], size, names.get(copy[0], "")) for copy, how, size in moment.storages.held()
        }
        now["gradients"] = ("gradients", moment.grads, "")
        now["state"] = (STATE, moment.state, "for runs again")
        now["carried gradients"] = ("gradient at hand", moment.carried_grads, "of carried values")
        now["at hand"] = ("gradient at hand", moment.at_hand, "")
        # What a backward needs is there while it runs; what a forward makes is, too.
        late = isinstance(action, Backward) and ledger.total <= moment.during
        if late:
            yield
        for key in there.keys() - now.keys():
            ledger.drop(key)
        for key, entry in now.items():
            if there.get(key) != entry:
                ledger.put(key, *entry)
        there = now
        if not late:
            yield
        yield


def _named(stage: Any) -> set[int]:
    return {*stage.enters, *(value for option in stage.options for value in option.keeps)}


def _by_sums(plan: Plan, chain: Chain, ledger: _Ledger) -> Iterator[None]:
    """The same by the chain's sums."""
    stages = chain.stages
    count = len(stages)
    grads = carried = 0
    left = count  # stages that are not reversed
    working: int | None = None
    seen: set[int] = set()
    kept: dict[int, int] = {}
    ledger.put(("held", 0), "boundaries held", stages[0].input, "boundary 0")

    def hold(boundary: int) -> None:
        nonlocal working
        if working == boundary:
            ledger.put(("held", boundary), "boundaries held", ledger.drop("working"), f"boundary {boundary}")
            working = None

    def carry(change: int) -> None:
        nonlocal carried
        carried += change
        ledger.put("carried", "carried values", carried)

    for index, action in enumerate(plan.schedule):
        i: int = getattr(action, action.__slots__[0])  # its stage or boundary
        if isinstance(action, (Forward, Checkpoint, Keep)):
            if working != i:
                ledger.drop("working")
                working = None
            if i not in seen:
                seen.add(i)
                carry(stages[i].carried)
            if not isinstance(action, Forward):
                hold(i)
        if isinstance(action, Free):
            ledger.drop(("held", i))
        elif isinstance(action, Prefetch):
            ledger.put(("held", i), "boundaries held", stages[i].input, f"boundary {i}")
        elif isinstance(action, PrefetchSaved):
            ledger.put(("kept", i), "kept saved tensors", stages[i].options[kept[i]].saved, stages[i].name)
        elif isinstance(action, FreeSaved):
            ledger.drop(("kept", i))
            if i + 1 < left and ("held", i + 1) not in ledger.open:
                ledger.put(("held", i + 1), "boundaries held", stages[i + 1].input, f"boundary {i + 1}")
        elif isinstance(action, Keep):
            kept[i] = action.option
            ledger.put(
                ("kept", i), "kept saved tensors", stages[i].options[action.option].saved, stages[i].name
            )
        yield
        if isinstance(action, Backward):
            left = i
            ledger.drop(("kept", i))
            ledger.drop(("held", i))
            carry(stages[i].carried_change)
            grads += stages[i].grad
            ledger.put("gradients", "gradients", grads)
            ledger.put("at hand", "gradient at hand", stages[i].input_grad if i else 0)
        elif isinstance(action, (Forward, Checkpoint)):
            ledger.drop("working")
            working = None
            if ("held", i + 1) not in ledger.open:
                working = i + 1
                ledger.put("working", "transient", chain.input_bytes(i + 1), f"boundary {i + 1}")
        elif isinstance(action, Keep):
            working = None
        if isinstance(action, (Forward, Checkpoint, Keep)) and i == count - 1:
            ledger.put("at hand", "gradient at hand", chain.output_grad)
        # Of what a run just before its backward leaves, or a backward, the referee may know that it is less.
        over = ledger.total - plan.timeline.live[index]
        newest = ("kept", i - 1 if isinstance(action, Backward) else i)
        if over > 0 and newest in ledger.open:
            size = ledger.open[newest][2]
            ledger.put(newest, "kept saved tensors", size - over, stages[newest[1]].name)
        yield
