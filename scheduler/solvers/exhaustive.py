"""Find the fastest of all schedules of a short chain, persistent or not: A* over the referee's states.

Source: Hart, Nilsson & Raphael 1968, *A formal basis for the heuristic determination of minimum cost paths*,
doi:10.1109/TSSC.1968.300136. The class that it is held against, persistent schedules: arXiv:1911.13214.
A schedule that is not persistent wins, as a rule, by keeping a stage and releasing that stage's input: the
runs that bring the input back for the backward also keep the stages before it.

A state is what the referee holds: the stages left to reverse, the held boundaries (x_0 always), the option of
each kept stage, the working boundary, and the stages run so far. Three rules shrink the search, and lose
nothing:

1. ``Checkpoint`` stands in for ``Forward``: both need the same bytes while they run, and ``Free`` undoes the
   difference. So a boundary that a run leaves behind is held until its bytes are needed: an action over the
   budget is tried after each smallest set of ``Free`` that lets it fit, and ``Free`` is tried nowhere else.
2. A backward that fits, and leaves no more bytes than it found, is done at once: what was to come before it
   fits after it as well.
3. A stage is not run while its output is live, unless that is the only way to hold its input.

The heuristic never exceeds the seconds that are left: each backward, one run of each stage that is not kept,
and what memory forces on top. Take stages s..j such that none is kept, x_s is live and x_{s+1}..x_j are not.
Each runs before j is reversed, and those not kept at that moment run again later. Which of them can be kept
then is a knapsack, solved once for every s, j and room (``_knapsacks``). Such runs of stages are disjoint, so
their extra seconds add up.

Claim: the schedule is the fastest of all that the referee calls legal and within the budget (to rounding of
seconds, 1e-12 of the step), and ``InfeasibleBudget.smallest`` is the least peak of any. Where no schedule
beats the fastest persistent one, that one is returned. The number of states grows exponentially with the
stages: past ``states`` of them the search is given up with an error.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numba import types
from numba.typed import Dict

from rematplan.scheduler.core import schedule as acts
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget, SearchLimit
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import optimal
from rematplan.scheduler.solvers.checks import checked_count
from rematplan.scheduler.solvers.optimal_peaks import Arrays, Floats, Ints, arrays_of, compiled

__all__ = ["MOST_STAGES", "solve"]

MOST_STAGES = 12
STATES = 3_000_000  # about 400 MB
ROUNDING = 1e-12  # relative; sums of the same seconds in another order differ by less
FIELD = 5  # bits of a stage's number
CODE = 20  # bits of an action's code: the option of a Keep, or one of the two below
RUN, REVERSE = 2**CODE - 2, 2**CODE - 1


class LongLived(NamedTuple):
    """What is live besides boundaries and saved tensors; bytes."""

    carried: Ints  # (L,) what the first run of stage i leaves behind
    ran: Ints  # (L + 1,) once i stages have run, and none is reversed; at L, the gradient of x_L too
    left: Ints  # (L + 1,) with i stages left to reverse, the gradient of x_i too


class Knapsacks(NamedTuple):
    """For each s..j, by room in bytes: the seconds of recomputation that a state cannot avoid."""

    source: Ints  # (L,) the least bytes that x_i takes when i is reversed, if stage i-1 is not kept yet
    start: Ints  # (L, L) where the list of s..j begins
    end: Ints  # (L, L)
    room: Ints  # ascending in each list
    seconds: Floats  # descending in each list


def _long_lived(chain: Chain, a: Arrays) -> LongLived:
    carried = np.array([stage.carried for stage in chain.stages], np.int64)
    ran = chain.fixed + np.concatenate(([0], np.cumsum(carried)))
    ran[-1] += chain.output_grad
    end = [a.after[0] + chain.stages[0].retained]
    return LongLived(carried, ran, np.concatenate((end, a.after + a.grad[1:])))


def _front(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the points (bytes, seconds) that no other point beats in both."""
    front: list[tuple[int, float]] = []
    for room, seconds in sorted(points):
        if not front or seconds < front[-1][1]:
            front.append((room, seconds))
    return front


def _knapsacks(chain: Chain) -> Knapsacks:
    """Solve each s..j, none kept and x_j not live unless s = j: bytes at the backward of j, and seconds.

    The bytes are those of kept stages s..j, x_j if it is not inside stage j-1, and the transient of the
    backward. The seconds are those of recomputation, second runs of stages s..j-1 included.
    """
    stages = chain.stages
    lists: dict[tuple[int, int], list[tuple[int, float]]] = {}
    again = [min(o.recompute for o in stage.options) + stage.forward for stage in stages]
    for j, stage in enumerate(stages):
        points = [(o.saved + stage.input_grad + o.backward_overhead, o.recompute) for o in stage.options]
        lists[j, j] = points = _front(points)
        for s in range(j - 1, -1, -1):
            grown = [
                (room + o.saved, seconds + o.recompute) for room, seconds in points for o in stages[s].options
            ]
            if stages[s].recomputable:
                outside = chain.input_bytes(j) if s == j - 1 else 0
                grown += [(room + outside, seconds + again[s]) for room, seconds in points]
            lists[s, j] = points = _front(grown)
    source = [chain.input_bytes(0)]
    for stage, after in pairwise(stages):
        source.append(min([after.input, *(o.saved for o in stage.options)]))  # held, or inside a kept stage
    start = np.zeros((len(chain), len(chain)), np.int64)
    end = np.zeros_like(start)
    flat: list[tuple[int, float]] = []
    for (s, j), points in lists.items():
        start[s, j], end[s, j] = len(flat), len(flat) + len(points)
        flat += points
    rooms, seconds = zip(*flat, strict=True)
    return Knapsacks(np.array(source, np.int64), start, end, np.array(rooms, np.int64), np.array(seconds))


@compiled
def _unpack(key: int, length: int, bits: int, kept: Ints) -> tuple[int, int, int, int]:
    """Unpack (held, working, left, ran); ``kept[i]`` becomes 1 + the option of stage i, or 0."""
    held = key & ((1 << length) - 1)
    key >>= length
    for i in range(length):
        kept[i] = key & ((1 << bits) - 1)
        key >>= bits
    mask = (1 << FIELD) - 1
    return held, key & mask, (key >> FIELD) & mask, (key >> (2 * FIELD)) & mask


@compiled
def _pack(held: int, kept: Ints, working: int, left: int, ran: int, length: int, bits: int) -> int:
    """Pack the state into one int; the stages run so far matter only until the first backward."""
    key = np.int64(ran if left == length else 0)
    key = (key << FIELD) | left
    key = (key << FIELD) | working
    for i in range(length - 1, -1, -1):
        key = (key << bits) | kept[i]
    return int((key << length) | held)


@compiled
def _seconds_left(
    a: Arrays, v: LongLived, n: Knapsacks, budget: int, held: int, kept: Ints, working: int, left: int
) -> float:
    """Return seconds that are left at least; inf where no schedule can go on from here."""
    seconds = 0.0
    below = np.int64(0)  # bytes of kept stages so far
    first = 0  # the run of stages that are not kept starts here
    for j in range(left):
        seconds += a.backward[j]
        room = budget - v.left[j + 1] - below - (a.boundary[0] if j > 0 else 0)
        if kept[j]:
            k = kept[j] - 1
            seconds += a.recompute[j, k]
            room -= a.saved[j, k] + a.grad[j] + a.backward_overhead[j, k]
            if j == 0 or not kept[j - 1]:
                room -= n.source[j]
            if room < 0:
                return np.inf
            below += a.saved[j, k]
            first = j + 1
            continue
        seconds += a.forward[j]
        if held >> j & 1 or working == j:
            first = j
        ends = j + 1 == left or kept[j + 1] or held >> (j + 1) & 1 or working == j + 1
        if not ends:
            continue
        if first == j and (j == 0 or not kept[j - 1]):
            room -= n.source[j]
        start, end = n.start[first, j], n.end[first, j]
        at = np.searchsorted(n.room[start:end], room, side="right") - 1
        if at < 0:
            return np.inf
        seconds += n.seconds[start + at]
        first = j + 1
    return seconds


@compiled
def _search(  # noqa: C901 - the loop of A*, compiled in one piece
    a: Arrays, v: LongLived, n: Knapsacks, budget: int, bits: int, limit: int, upper: float
) -> tuple[int, Ints, Ints, Ints, int]:
    """Search by A* from the start to the state with nothing left.

    Args:
        bits: of one entry of ``kept`` in a packed state.
        limit: most states.
        upper: seconds that the schedule must stay below.

    Returns:
        (goal, keys, parents, actions, states): the index of the goal, -1 if there is none below ``upper``,
        -2 if the limit was reached; for each state its packed form, where it came from, and by what action.
    """
    length = a.forward.size
    keys = np.empty(1024, np.int64)
    cost = np.empty(1024, np.float64)
    parents = np.empty(1024, np.int64)
    actions = np.empty(1024, np.int64)
    index = Dict.empty(types.int64, types.int64)
    kept = np.zeros(length, np.int64)
    keys[0] = _pack(1, kept, 0, length, 0, length, bits)
    cost[0], parents[0], actions[0] = 0.0, -1, -1
    index[keys[0]] = 0
    size = 1
    queue = [(0.0, length, 0, 0.0)]
    while len(queue) > 0:
        _, left, newest, seconds = heapq.heappop(queue)
        here = -newest
        if seconds > cost[here]:
            continue
        if left == 0:
            return here, keys, parents, actions, size
        held, working, left, ran = _unpack(keys[here], length, bits, kept)
        live = v.left[left] if left < length else v.ran[ran]
        for i in range(left):
            if held >> i & 1:
                live += a.boundary[i]
            if kept[i]:
                live += a.saved[i, kept[i] - 1]
        if working:
            live += a.boundary[working]

        # The actions, as (stage, code): the backward first, since it may make the others needless.
        j = left - 1
        for choice in range(-1, left * (a.saved.shape[1] + 1)):
            if choice < 0:
                i, code = j, REVERSE
                if not kept[j] or not (held >> j & 1 or (j > 0 and kept[j - 1])):
                    continue
                k = kept[j] - 1
                change = v.left[j] - (v.left[left] if left < length else v.ran[ran]) - a.saved[j, k]
                peak = live + max(
                    a.grad[j] + a.backward_overhead[j, k], change - (a.boundary[j] if held >> j & 1 else 0)
                )
                spent = a.backward[j] + a.recompute[j, k]
                # Rule 2; x_j does not count in ``change``, since another run may bring it back.
                only = peak <= budget and (change <= 0 or j == 0)
            else:
                i = choice // (a.saved.shape[1] + 1)
                code = choice % (a.saved.shape[1] + 1) - 1
                if kept[i] or code >= a.choices[i]:
                    continue
                if not (held >> i & 1 or working == i or (i > 0 and kept[i - 1])) or (
                    i == 0 and not held & 1
                ):
                    continue
                peak = live
                if working and working != i:
                    peak -= a.boundary[working]
                if left == length and ran == i:
                    peak += v.carried[i]
                spent = a.forward[i]
                if code >= 0:
                    peak += a.saved[i, code] + a.forward_overhead[i, code]
                else:
                    code = RUN
                    there = i == j or held >> (i + 1) & 1 or working == i + 1
                    if not a.recomputable[i] or (there and working != i):
                        continue
                    peak += a.running[i]
                only = False

            # What may be released first: all held boundaries but the one that the action starts from.
            loose = held & ~1  # x_0 is needed at the end, and nothing brings it back
            if i > 0 and not kept[i - 1]:
                loose &= ~(1 << i)
            excess = peak - budget
            gone = loose if excess > 0 else 0
            while True:
                freed, least = 0, budget
                if gone:
                    for b in range(left):
                        if gone >> b & 1:
                            freed += a.boundary[b]
                            least = min(least, a.boundary[b])
                if freed >= excess and (gone == 0 or freed - least < excess):
                    to_held, to_kept, to_working, to_left, to_ran = held & ~gone, kept[i], working, left, ran
                    if code == REVERSE:
                        kept[i] = 0
                        to_held &= ~(1 << i)
                        to_left = i
                    else:
                        to_ran = max(ran, i + 1)
                        if working == i and i > 0:
                            to_held |= 1 << i
                        if code == RUN:
                            to_working = 0 if to_held >> (i + 1) & 1 else i + 1
                        else:
                            to_working = 0
                            kept[i] = code + 1
                    total = seconds + spent
                    rest = _seconds_left(a, v, n, budget, to_held, kept, to_working, to_left)
                    if total + rest < upper:
                        key = _pack(to_held, kept, to_working, to_left, to_ran, length, bits)
                        if key in index:
                            at = index[key]
                        else:
                            if size == limit:
                                return -2, keys, parents, actions, size
                            if size == keys.size:
                                keys = np.concatenate((keys, np.empty_like(keys)))
                                cost = np.concatenate((cost, np.empty_like(cost)))
                                parents = np.concatenate((parents, np.empty_like(parents)))
                                actions = np.concatenate((actions, np.empty_like(actions)))
                            at = size
                            index[key] = at
                            keys[at] = key
                            cost[at] = np.inf
                            size += 1
                        if total < cost[at]:
                            cost[at], parents[at], actions[at] = total, here, i << CODE | code
                            heapq.heappush(queue, (total + rest, to_left, -at, total))
                    kept[i] = to_kept
                if gone == 0:
                    break
                gone = (gone - 1) & loose
            if only:
                break
    return -1, keys, parents, actions, size


def _read_off(length: int, goal: int, keys: Ints, parents: Ints, codes: Ints, bits: int) -> acts.Schedule:
    """Return the actions on the way to ``goal``; a boundary freed before its next use is never held."""
    path = [goal]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    path.reverse()
    actions: list[acts.Action] = []
    unused: dict[int, int] = {}  # held boundary -> index of the Checkpoint that first held it
    kept = np.zeros(length, np.int64)
    for before, after in pairwise(path):
        to_held = int(_unpack(keys[after], length, bits, kept)[0])
        held = int(_unpack(keys[before], length, bits, kept)[0])  # last, for ``kept``
        i, code = divmod(int(codes[after]), 2**CODE)
        for b in range(length):
            # A reversed stage lets its input go by itself; inside another stage it may have gone before.
            spare = not (code == REVERSE and b == i) or (i > 0 and kept[i - 1])
            if (held & ~to_held) >> b & 1 and spare:
                if b in unused:
                    actions[unused.pop(b)] = acts.Forward(b)
                else:
                    actions.append(acts.Free(b))
        unused.pop(i, None)
        if code == RUN and (to_held & ~held) >> i & 1:
            unused[i] = len(actions)
        actions.append(
            acts.Backward(i) if code == REVERSE else acts.Checkpoint(i) if code == RUN else acts.Keep(i, code)
        )
    return acts.Schedule(tuple(actions))


def _run(chain: Chain, budget: int, upper: float, states: int) -> acts.Schedule | None:
    """Return the fastest schedule within ``budget`` below ``upper`` seconds; None if none is."""
    bits = max(len(stage.options) for stage in chain.stages).bit_length()
    limit, a = upper * (1 - ROUNDING), arrays_of("exhaustive", chain)
    goal, keys, parents, codes, _ = _search(
        a, _long_lived(chain, a), _knapsacks(chain), budget, bits, states, limit
    )
    if goal == -2:
        raise SearchLimit(
            f"exhaustive: gave up after {states} states of a chain of {len(chain)} stages; pass states= (more "
            "of them, some 100 bytes each), merge stages, or use the solver 'optimal'"
        )
    return None if goal < 0 else _read_off(len(chain), goal, keys, parents, codes, bits)


def _few_options(chain: Chain) -> tuple[Chain, list[list[int]]]:
    """Drop options that another one of the stage beats in all; (L,) the numbers of the rest."""
    rest, numbers = [], []
    for stage in chain.stages:
        rows = [(o.recompute, o.saved, o.forward_overhead, o.backward_overhead) for o in stage.options]
        good = [
            k
            for k, row in enumerate(rows)
            if not any(
                all(x <= y for x, y in zip(other, row, strict=True)) and (other != row or at < k)
                for at, other in enumerate(rows)
            )
        ]
        numbers.append(good)
        rest.append(replace(stage, options=tuple(stage.options[k] for k in good)))
    return replace(chain, stages=tuple(rest)), numbers


def solve(chain: Chain, memory_budget: int, *, states: int = STATES) -> acts.Schedule:
    """Return the fastest schedule of all within ``memory_budget`` (bytes).

    Args:
        chain: up to ``MOST_STAGES`` stages.
        memory_budget: bytes of the whole step.
        states: the search is given up past so many; each takes some 100 bytes.

    Raises:
        InfeasibleBudget: no schedule fits; ``smallest`` is the least peak of all schedules.
        SearchLimit: given up past ``states`` states.
        TypeError, ValueError: ``states`` is no positive int; the stages and options of the chain do not pack
            into 63 bits, or sums of its sizes or seconds overflow.
    """
    states = checked_count("exhaustive", "states", states)
    few, numbers = _few_options(chain.as_sums())
    bits = len(few) * (1 + max(map(len, numbers)).bit_length()) + 3 * FIELD
    if bits > 63:
        raise ValueError(
            f"exhaustive: a state of {len(few)} stages with up to {max(map(len, numbers))} options takes {bits} "
            "bits, at most 63 are there; merge stages, or drop options"
        )
    try:
        best = optimal.solve(few, memory_budget)
    except InfeasibleBudget as error:
        found = _run(few, memory_budget, math.inf, states)
        if found is None:
            raise InfeasibleBudget(
                memory_budget, _least_peak(few, error.smallest, states), "exhaustive"
            ) from None
    else:
        found = _run(few, memory_budget, simulate(few, best).seconds, states) or best
    return acts.Schedule(
        tuple(
            acts.Keep(x.stage, numbers[x.stage][x.option]) if isinstance(x, acts.Keep) else x for x in found
        )
    )


def _least_peak(chain: Chain, peak: int, states: int) -> int:
    """Return the least peak of all schedules, if there is one of ``peak`` bytes."""
    free = tuple(
        replace(s, forward=0.0, backward=0.0, options=tuple(replace(o, recompute=0.0) for o in s.options))
        for s in chain.stages
    )
    timeless, _ = _few_options(
        replace(chain, stages=free)
    )  # where nothing costs time, the search asks only what fits
    while peak > 0 and (found := _run(timeless, peak - 1, math.inf, states)) is not None:
        peak = simulate(timeless, found).peak
    return peak
