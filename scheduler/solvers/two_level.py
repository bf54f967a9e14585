"""Combine recomputation and offloading: a chain with byte budgets on the device and on the host.

Source: Beaumont, Eyraud-Dubois & Shilova 2021, *Efficient Combination of Rematerialization and Offloading
for Training DNNs* (POFO), NeurIPS 2021. As there, what is offloaded is decided in the first sweep, and what
is run again is run again with one level; unlike there, the host may be too small for all of it, stages have
options, and the referee's exact bytes decide what fits.

The class of schedules. The first sweep cuts the chain into items, in order: a stage that is kept, with one of
its options, or a segment s..j-1 of which only x_s is held. In each item

* the saved tensors of a kept stage stay on the device, or go to the host as soon as they exist;
* x_s, where it is a device copy of its own, stays, or goes as soon as the item's first stage has run. It
  needs no write if the saved tensors of stage s-1, it among them, are on the host already; then it comes
  back by itself, or early, with all of them.

After the sweep the items are reversed, last first. What went comes back just before its backward, or before
its segment is run again by the optimal persistent schedule (``optimal.py``). With R bytes free on the device,
x_s not counted, and H on the host, F_f(s,R,H) is the least seconds from stage s on, where f says where x_s
is, and x its bytes if it is a copy of its own (else 0; then it cannot go):

    F_f(s,R,H) = min over x_s stays, goes, or goes and comes early of its copies +
      keep k:        forward_s + recompute_k + backward_s + F_inside(s+1, R' - saved_k, H')
      keep k, gone:  the same + its copies               + F_off,k(s+1, R', H' - saved_k)
      split j:       forward_s + .. + forward_{j-1} + F_loose(j, R', H') + C(s, j-1, R - y),   s < j < L

where R' = R - x if x_s stays, and R otherwise; H' = H less its bytes if they are written; y = x, or
saved_{s-1} if x_s comes early with them; and C is the recurrence of ``optimal.py``. As there, the grids of C
and F only estimate seconds: what fits is decided in exact bytes, by the least peaks of segments and, for
suffixes of the chain, by the frontier of least peaks against host bytes.

Claims. No schedule is over either budget, and none is slower than that of ``optimal``. One is found iff one
of the class fits, and ``InfeasibleBudget.smallest`` is exact, unless a frontier has more than 1024 points and
is thinned. With synchronous copies it is the fastest of the class wherever the greatest common divisor of all
sizes is affordable as the unit of both grids. Elsewhere sizes rounded down give a lower bound, and of the
schedules read off that grid and off one that interpolates the faster one is returned.
``TwoLevelOptimum.lower_bound`` is a bound on the class either way.

With asynchronous copies the class is that of all orders of the same copies, and no optimality is claimed. A
step takes at least its compute, its writes, and its reads; hence at least the least
(compute + w (writes + reads)) / (1 + 2w) for any w >= 0, which is F with copies at w times their seconds. F
is solved for several w, and read off for the whole of R and for parts of it. Each solution's copies are
spread out, frees as late and prefetches as early as the device's bytes allow, and the referee picks the
fastest.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

from rematplan.scheduler.core import schedule as acts
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.core.referee import Timeline, simulate
from rematplan.scheduler.solvers import optimal
from rematplan.scheduler.solvers.checks import MOST_SECONDS, checked_budget, checked_chain
from rematplan.scheduler.solvers.optimal_peaks import Floats, Ints, arrays_of, quickest
from rematplan.scheduler.solvers.two_level_tables import (
    EARLY,
    GOES,
    INSIDE,
    LOOSE,
    OFF,
    STAYS,
    Frontiers,
    Grid,
    Numbers,
    decide_again,
    decide_sweep,
    filled,
    frontiers,
    numbers_of,
    peaks,
    place,
    suffix_peak,
)

__all__ = ["TwoLevelOptimum", "solve", "solve_two_level"]

MOST_STAGES = 500  # C takes the square of it in every slot
TABLE_BYTES = 96 * 2**20  # of C and F of one grid
TABLE_STEPS = 2 * 10**9  # additions to fill one for every weight
HOST_SLOTS = 100  # of the host's grid, where the divisor is not affordable
MOST_SLOTS = 2000  # of the device's, alike
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the seconds of asynchronous copies
# Parts of the bytes above the least, left to copies under way: what is freed late and fetched early.
RESERVES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)


@dataclass(frozen=True, slots=True)
class TwoLevelOptimum:
    """The outcome of ``solve_two_level``.

    Attributes:
        schedule: within both budgets.
        seconds: of the step, by the referee.
        lower_bound: seconds that no schedule of the class within both budgets can beat.
        unit, host_unit: bytes of one slot of the grids; 1 for a host with room for all.
    """

    schedule: acts.Schedule
    seconds: float
    lower_bound: float
    unit: int
    host_unit: int

    @property
    def exact(self) -> bool:
        """Whether no schedule of the class within both budgets is faster (to rounding of seconds)."""
        return self.seconds <= self.lower_bound * (1 + 1e-9)


def _units(n: Numbers, room: int, host_room: int, fills: int) -> tuple[int, int, bool]:
    """Return the units (bytes) of the finest affordable grids, and whether nothing is rounded."""
    length, options = n.a.saved.shape
    sizes = [int(size) for array in (n.a.boundary, n.a.saved) for size in array.flat]
    divisor = math.gcd(*sizes) or 1

    def slots(hosts: int) -> int:
        """Return how many slots of device memory are affordable with as many of the host."""
        steps = length**3 // 6 + (5 + options) * (length // 2 + 2 * options) * length * hosts
        numbers = length * length + (2 + options) * length * hosts
        return min(TABLE_STEPS // fills // steps, TABLE_BYTES // (8 * numbers))

    if room // divisor < slots(host_room // divisor + 1):
        return divisor, divisor, True
    host_unit = math.ceil(max(host_room / HOST_SLOTS, 1) / divisor) * divisor
    affordable = max(min(slots(host_room // host_unit + 1), MOST_SLOTS), 2)
    return math.ceil(max(room / (affordable - 1), 1) / divisor) * divisor, host_unit, False


def _read_off(
    chain: Chain, n: Numbers, least: Ints, p: Frontiers, g: Grid, room: int, host_room: int
) -> acts.Schedule:
    """Return the schedule that the grid describes, copies where they are asked for."""
    actions: list[acts.Action] = []
    last = len(chain) - 1
    # What is left to do, last first: actions, (s, t, room) to run again, (f, s, room, host room) of the first
    # sweep.
    stack: list[Any] = [(LOOSE, 0, room, host_room)]
    while stack:
        item = stack.pop()
        if not isinstance(item, tuple):
            actions.append(item)
        elif len(item) == 3:
            s, t, here = item
            option, j = decide_again(n, least, g, s, t, here)
            if option >= 0:
                actions.append(acts.Keep(s, option))
                stack += [
                    acts.Backward(s),
                    *([(s + 1, t, here - int(n.a.saved[s, option]))] if s < t else []),
                ]
            else:
                actions += [acts.Checkpoint(s), *(acts.Forward(i) for i in range(s + 1, j))]
                stack += [(s, j - 1, here), (j, t, here - int(n.a.boundary[j]))]
        else:
            f, s, here, there = item
            option, j, way, off = decide_sweep(n, least, p, g, f, s, here, there)
            _, stays, later, copied, _ = place(n, f, s, way)
            rest, host_rest = here - stays, there - copied
            actions.append(acts.Keep(s, option) if option >= 0 else acts.Checkpoint(s))
            actions += [acts.Offload(s)] if way == GOES and f == LOOSE else []
            actions += [acts.Free(s)] if way != STAYS else []
            # Early: the prefetch that stage s-1 left on the stack is taken from there.
            back: list[Any] = [stack.pop()] if way == EARLY else [acts.Prefetch(s)] if way == GOES else []
            if option < 0:
                actions += [acts.Forward(i) for i in range(s + 1, j)]
                stack += [(s, j - 1, here - later), *back, (LOOSE, j, rest, host_rest)]
                continue
            stack += [acts.Backward(s), *back]
            if off:
                actions += [acts.OffloadSaved(s), acts.FreeSaved(s)]
                stack += [
                    acts.PrefetchSaved(s),
                    (OFF + option, s + 1, rest, host_rest - int(n.host_saved[s, option])),
                ]
            elif s < last:
                stack.append((INSIDE, s + 1, rest - int(n.a.saved[s, option]), host_rest))
    return acts.Schedule(tuple(actions))


def _later_frees(schedule: acts.Schedule, line: Timeline, budget: int) -> acts.Schedule:
    """Free what was copied only when its bytes are needed; if they never are, do not copy it."""
    saved_off = {action.stage for action in schedule if isinstance(action, acts.OffloadSaved)}
    off = {action.boundary for action in schedule if isinstance(action, acts.Offload)}
    waiting: deque[tuple[acts.Free | acts.FreeSaved, int]] = deque()  # frees, oldest first, and their bytes
    actions: list[acts.Action] = []

    def make_room(live: int) -> None:
        """Free the oldest until ``live`` bytes fit; a free may add bytes (x_{i+1})."""
        while waiting and live + sum(s for _, s in waiting) + max(0, *(-s for _, s in waiting)) > budget:
            actions.append(waiting.popleft()[0])

    for index, action in enumerate(schedule):
        if isinstance(action, acts.FreeSaved) or (
            isinstance(action, acts.Free) and (action.boundary in off or action.boundary - 1 in saved_off)
        ):
            waiting.append((action, line.live[index - 1] - line.live[index]))
            make_room(line.live[index])
            continue
        if isinstance(action, (acts.Prefetch, acts.PrefetchSaved)):
            free = (
                acts.Free(action.boundary)
                if isinstance(action, acts.Prefetch)
                else acts.FreeSaved(action.stage)
            )
            inside = acts.Free(action.stage + 1) if isinstance(action, acts.PrefetchSaved) else None
            if inside and waiting and waiting[-1][0] == inside:  # x_{i+1} comes early, with what it is in
                waiting.pop()
                if not waiting or waiting[-1][0] != free:
                    actions.append(inside)
            if waiting and waiting[-1][0] == free:
                waiting.pop()
                copy = (
                    acts.Offload(free.boundary)
                    if isinstance(free, acts.Free)
                    else acts.OffloadSaved(free.stage)
                )
                if copy in actions:
                    actions.remove(copy)
                continue
        make_room(max(line.during[index], line.live[index]))
        actions.append(action)
    return acts.Schedule(tuple(actions))


def _earlier_prefetches(schedule: acts.Schedule, line: Timeline, budget: int) -> acts.Schedule:
    """Move prefetches forward, in the order in which they are needed, as far as the device has room."""
    moved: list[tuple[acts.Action, int]] = []  # and the most bytes live while it runs
    for index, action in enumerate(schedule):
        moved.append((action, line.during[index]))
        if not isinstance(action, (acts.Prefetch, acts.PrefetchSaved)):
            continue
        size = line.live[index] - line.live[index - 1]
        free = (
            acts.Free(action.boundary) if isinstance(action, acts.Prefetch) else acts.FreeSaved(action.stage)
        )
        at = index
        while (
            at > 0
            and not isinstance(moved[at - 1][0], (acts.Prefetch, acts.PrefetchSaved))
            and moved[at - 1][0] != free
            and moved[at - 1][1] + size <= budget
        ):
            at -= 1
            crossed = moved[at]
            moved[at], moved[at + 1] = moved[at + 1], (crossed[0], crossed[1] + size)
    return acts.Schedule(tuple(action for action, _ in moved))


def solve_two_level(chain: Chain, memory_budget: int, host: HostMemory) -> TwoLevelOptimum:
    """Return the fastest schedule of the class within ``memory_budget`` and ``host.capacity`` (bytes).

    Raises:
        InfeasibleBudget: no schedule of the class fits; ``smallest`` is the least device budget with this
            host.
        TypeError, ValueError: an argument of the wrong kind, a budget not in 1 .. 2**63 - 1; sizes of the
            chain, its seconds or those of its copies whose sums overflow.
    """
    chain = checked_chain("solve_two_level", chain).apart().as_sums()
    memory_budget = checked_budget("solve_two_level", memory_budget)
    if not isinstance(host, HostMemory):
        raise TypeError(f"solve_two_level: host={host!r} must be a HostMemory")
    kept = (acts.Keep(i, quickest(stage)) for i, stage in enumerate(chain.stages))
    plain = acts.Schedule((*kept, *(acts.Backward(i) for i in reversed(range(len(chain))))))
    line = simulate(chain, plain, host)
    if line.peak <= memory_budget:
        return TwoLevelOptimum(plain, line.seconds, line.seconds, 1, 1)
    everything = sum(max(o.saved for o in stage.options) + stage.input for stage in chain.stages)
    if not (host.write_seconds(everything) + host.read_seconds(everything)) * 2 * len(chain) < MOST_SECONDS:
        raise ValueError(
            f"solve_two_level: to copy the chain's {everything} bytes takes more seconds than can be added up with {host}; "
            "raise the bandwidths, or lower the latency"
        )
    bounded = host.capacity < everything
    host_room = host.capacity if bounded else 0
    a = arrays_of("two_level", chain, 1)
    a = a._replace(after=a.after - chain.fixed)
    n = numbers_of(a, host, 1.0, bounded)
    least = peaks(n)
    p = frontiers(n, least, host_room)
    needed = max(suffix_peak(p, LOOSE, 0, host_room), int(n.a.after[0]) + chain.stages[0].retained)
    smallest = chain.fixed + needed
    if memory_budget < smallest:
        raise InfeasibleBudget(memory_budget, smallest, "two_level")
    room = memory_budget - chain.fixed
    weights = WEIGHTS if host.asynchronous else (1.0,)
    unit, host_unit, exact = _units(n, room, host_room, len(weights))
    bound = 0.0
    schedules: dict[acts.Schedule, None] = {}  # a set, in order
    again: dict[bool, Floats | None] = {False: None, True: None}  # C does not depend on the weight
    for weight in weights:
        n = numbers_of(a, host, weight, bounded)
        for interpolate in (False,) if exact else (False, True):
            g = filled(n, least, p, room, host_room, (unit, host_unit), interpolate, again[interpolate])
            again[interpolate] = g.again
            if not interpolate:
                bound = max(bound, float(g.sweep[LOOSE, 0, -1, -1]) / (1 + 2 * weight * host.asynchronous))
            for reserve in RESERVES if host.asynchronous else (0.0,):
                spared = int((room - needed) * reserve) // unit * unit
                schedules[_read_off(chain, n, least, p, g, room - spared, host_room)] = None
    judged = cache(lambda schedule: simulate(chain, schedule, host))
    if host.asynchronous:
        for schedule in list(schedules):
            later = _later_frees(schedule, judged(schedule), memory_budget)
            schedules |= {later: None, _earlier_prefetches(later, judged(later), memory_budget): None}
    with suppress(InfeasibleBudget):
        schedules[optimal.solve(chain, memory_budget)] = None
    lines = [(judged(schedule), schedule) for schedule in schedules]
    fits = [(line.seconds, schedule) for line, schedule in lines if line.peak <= memory_budget]
    seconds, schedule = min(fits, key=itemgetter(0))
    return TwoLevelOptimum(schedule, seconds, bound, unit, host_unit)


def solve(chain: Chain, memory_budget: int, host: HostMemory) -> acts.Schedule:
    """Return the schedule of ``solve_two_level``."""
    return solve_two_level(chain, memory_budget, host).schedule
