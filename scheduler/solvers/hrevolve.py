"""Reverse uniform chains with two memories: slots on the device, and slots on a disk that costs time.

Sources: Aupy, Herrmann, Hovland & Robert 2016, *Optimal multistage algorithm for adjoint computation*, SIAM
Journal on Scientific Computing 38(3), https://doi.org/10.1137/15M1019222 (unlimited disk); Herrmann &
Pallez 2020, *H-Revolve: a framework for adjoint computation on synchronous hierarchical platforms*, ACM
Transactions on Mathematical Software 46(2), https://doi.org/10.1145/3378672 (slots on every level).

For l steps whose input x_0 is live, with m free slots in memory and d on disk besides that of x_0, the least
cost is M where x_0 has a slot in memory and D where it has one on disk:

    M(l,m,d) = min(write + D(l, m+1, d-1),  min over 0 < j < l: j + R(l-j, m, d) + M(j, m, d))
    D(l,m,d) =                              min over 0 < j < l: j + R(l-j, m, d) + read + L(j, m, d)
    R(l,m,d) = min(M(l, m-1, d), write + D(l, m, d-1)), or 0 if l = 1
    L(l,m,d) = min(D(l, m, d), M(l, m-1, d+1))
    M(1,m,d) = D(1,m,d) = 0

It allows what H-Revolve does not: x_0 moves between the levels in the middle of its life, and memory slots
before and after a slot on disk are shared freely.

Claim: the least cost of any sequence of forwards, writes, reads and reversals. That no schedule outside the
recurrence is cheaper is not proved; exhaustive search agrees on all 111 rows of the oracle ``two_level.json``
and on 1500 random problems of up to 7 steps, and the tests go on to search. Time is l^2 m for unlimited disk,
and l^2 m d where the disk binds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rematplan.scheduler.core import schedule as acts
from rematplan.scheduler.core.checks import is_number
from rematplan.scheduler.solvers.checks import checked_count
from rematplan.scheduler.solvers.optimal_peaks import Floats, compiled

__all__ = ["UniformOptimum", "solve_uniform"]

TABLE_BYTES = 2**31  # of all four tables


@dataclass(frozen=True, slots=True)
class UniformOptimum:
    """The outcome of ``solve_uniform``.

    Attributes:
        cost: runs that keep nothing, 1 each, and the costs of writes and reads. The one run of each step that
            keeps its saved tensors is not counted.
        schedule: for a chain of that many stages. Besides the slots, x_i and x_{i+1} of the stage that runs
            are on the device.
        writes, reads: how many there are.
        disk_slots: how many are in use at once.
    """

    cost: float
    schedule: acts.Schedule
    writes: int
    reads: int
    disk_slots: int


@compiled
def _fill(M: Floats, D: Floats, R: Floats, L: Floats, write: float, read: float, bounded: bool) -> None:  # noqa: C901 - a compiled recurrence
    """Fill the four tables (d, m, l) from l = 1 on; d = 0 is an unlimited disk if not ``bounded``."""
    disks, slots, lengths = M.shape
    for length in range(1, lengths):
        for d in range(disks):
            for m in range(slots):
                best = 0.0 if length == 1 else np.inf
                for j in range(1, length):
                    best = min(best, j + R[d, m, length - j] + L[d, m, j])
                D[d, m, length] = best if length == 1 else best + read
        for d in range(disks):
            less = d - 1 if bounded else d
            for m in range(slots):
                best = 0.0 if length == 1 else np.inf
                if less >= 0 and m + 1 < slots:
                    best = min(best, write + D[less, m + 1, length])
                for j in range(1, length):
                    best = min(best, j + R[d, m, length - j] + M[d, m, j])
                M[d, m, length] = best
                R[d, m, length] = 0.0 if length == 1 else np.inf
                if m > 0:
                    R[d, m, length] = min(R[d, m, length], M[d, m - 1, length])
                if less >= 0:
                    R[d, m, length] = min(R[d, m, length], write + D[less, m, length])
        for d in range(disks):
            more = d + 1 if bounded else d
            for m in range(slots):
                L[d, m, length] = D[d, m, length]
                if m > 0 and more < disks:
                    L[d, m, length] = min(L[d, m, length], M[more, m - 1, length])


class _Tables:
    """The four tables for up to ``steps`` steps, and the schedule that they describe."""

    def __init__(self, steps: int, slots: int, disk_slots: int | None, write: float, read: float) -> None:
        self.write, self.read, self.bounded = write, read, disk_slots is not None
        self.steps, self.slots, self.disks = steps, slots, disk_slots or 0
        # A memory slot more than there are is that of x_0, once x_0 is on disk.
        shape = (self.disks + 1, slots + 1, steps + 1)
        if 4 * 8 * math.prod(shape) > TABLE_BYTES:
            raise ValueError(
                f"solve_uniform: steps={steps} with {slots} memory slots and {self.disks} disk slots that bind "
                f"need tables of more than {TABLE_BYTES} bytes; ask for fewer steps or slots"
                + (", or an unlimited disk" if self.disks else "")
            )
        self.M, self.D, self.R, self.L = (np.full(shape, np.inf) for _ in range(4))
        _fill(self.M, self.D, self.R, self.L, write, read, self.bounded)

    def _split(self, left: Floats, right: Floats, length: int) -> int:
        """Find where to split: the first j that is best."""
        j = np.arange(1, length)
        return 1 + int(np.argmin(j + right[length - 1 : 0 : -1] + left[1:length]))

    def schedule(self) -> acts.Schedule:
        """Return the schedule of all steps, with all slots but that of x_0 free."""
        actions: list[acts.Action] = []
        M, D = self.M, self.D
        # (first, length, m, d, x_first has its slot on disk, x_first is still to be written there)
        stack: list[acts.Action | tuple[int, int, int, int, bool, bool]]
        stack = [(0, self.steps, self.slots - 1, self.disks, False, False)]
        while stack:
            item = stack.pop()
            if not isinstance(item, tuple):
                actions.append(item)
                continue
            s, length, m, d, on_disk, unwritten = item
            if length == 1:
                actions += [acts.Keep(s), acts.Backward(s)]
                continue
            less, more = (d - 1, d + 1) if self.bounded else (d, d)
            if (
                not on_disk
                and less >= 0
                and m < self.slots
                and M[d, m, length] == self.write + D[less, m + 1, length]
            ):
                stack.append((s, length, m + 1, less, True, True))
                continue
            j = self._split((self.L if on_disk else M)[d, m], self.R[d, m], length)
            actions.append(acts.Checkpoint(s))
            actions += [acts.Offload(s)] if unwritten else []
            actions += [acts.Free(s)] if on_disk else []
            actions += [acts.Forward(i) for i in range(s + 1, s + j)]
            if not on_disk:
                stack.append((s, j, m, d, False, False))
            elif D[d, m, j] <= self.L[d, m, j]:
                stack += [(s, j, m, d, True, False), acts.Prefetch(s)]
            else:
                stack += [(s, j, m - 1, more, False, False), acts.FreeHost(s), acts.Prefetch(s)]
            rest = length - j
            if m > 0 and M[d, m - 1, rest] <= self.R[d, m, rest]:
                stack.append((s + j, rest, m - 1, d, False, False))
            else:
                stack.append((s + j, rest, m, less, True, True))
        return acts.Schedule(tuple(actions))


def solve_uniform(
    steps: int, memory_slots: int, disk_slots: int | None, write: float, read: float
) -> UniformOptimum:
    """Return the cheapest way to reverse a uniform chain with slots in memory and on disk.

    Args:
        steps: number of steps l.
        memory_slots: boundaries held in memory at once, x_0 among them while it is in memory.
        disk_slots: boundaries on disk at once; None for as many as are of use.
        write, read: cost of one write to disk and of one read, where running one step costs 1.

    Raises:
        TypeError: steps or slots that are no ints.
        ValueError: too few of them, a cost that is not finite or is negative, or tables that would not fit.

    Example:
        >>> found = solve_uniform(8, memory_slots=2, disk_slots=None, write=1.0, read=1.0)
        >>> found.cost, found.writes, found.reads
        (13.0, 1, 1)
    """
    steps = checked_count("solve_uniform", "steps", steps)
    slots = min(checked_count("solve_uniform", "memory_slots", memory_slots), steps)
    most = None if disk_slots is None else checked_count("solve_uniform", "disk_slots", disk_slots, 0)
    for name, value in (("write", write), ("read", read)):
        if not is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"solve_uniform: {name}={value!r} must be a finite number, not negative")
    write, read = float(write), float(read)
    # If the best with an unlimited disk needs no more slots than there are, it is the best.
    tables = _Tables(steps, slots, None if most != 0 else 0, write, read)
    schedule = tables.schedule()
    used = _disk_slots(schedule)
    if most is not None and used > most:
        tables = _Tables(steps, slots, most, write, read)
        schedule = tables.schedule()
        used = _disk_slots(schedule)
    return UniformOptimum(
        float(tables.M[tables.disks, slots - 1, steps]),
        schedule,
        sum(isinstance(action, acts.Offload) for action in schedule),
        sum(isinstance(action, acts.Prefetch) for action in schedule),
        used,
    )


def _disk_slots(schedule: acts.Schedule) -> int:
    """Return the most boundaries on disk at once."""
    there: set[int] = set()
    most = 0
    for action in schedule:
        if isinstance(action, acts.Offload):
            there.add(action.boundary)
            most = max(most, len(there))
        elif isinstance(action, acts.FreeHost):
            there.discard(action.boundary)
        elif isinstance(action, acts.Backward):
            there.discard(action.stage)
    return most
