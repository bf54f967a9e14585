"""Write a memory timeline as ``torch.cuda.memory._snapshot()`` does, for https://pytorch.org/memory_viz."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rematplan.scheduler.plan.timeline import Allocation, MemoryTimeline

__all__ = ["snapshot_of"]


class _Addresses:
    """Hand out made-up addresses, first fit from a base on."""

    BASE = 0x7F0000000000

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: dict[int, int] = {}
        self.highest = self.BASE

    def take(self, size: int) -> int:
        """Return an address with this many bytes free behind it."""
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
        """Free the bytes taken at the address."""
        del self.begins[bisect_left(self.begins, address)]
        del self.ends[address]


def snapshot_of(timeline: MemoryTimeline) -> dict[str, Any]:
    """Return the timeline as a snapshot: its blocks are allocated and freed in one segment, first fit."""
    comes: dict[int, list[Allocation]] = defaultdict(list)
    goes: dict[int, list[Allocation]] = defaultdict(list)
    for block in timeline.blocks:
        comes[block.begin].append(block)
        goes[block.end].append(block)
    addresses = _Addresses()
    at: dict[int, int] = {}  # by identity of the block
    trace: list[dict[str, Any]] = []

    def event(action: str, block: Allocation, time: int) -> dict[str, Any]:
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


def _segment(timeline: MemoryTimeline, last: dict[int, Allocation], addresses: _Addresses) -> dict[str, Any]:
    """Return the one segment: what is live at the end, and free bytes between."""
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


def _frames(timeline: MemoryTimeline, block: Allocation) -> list[dict[str, Any]]:
    """Return the op, category and action in the place of a Python stack, innermost first."""
    point = timeline.points[block.begin]
    rows = ((block.name, "op"), (block.category, "category"), (timeline.actions[point.action], "schedule"))
    return [{"filename": file, "line": point.action, "name": name} for name, file in rows]
