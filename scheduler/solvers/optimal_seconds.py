"""The table C of ``optimal.py``: least extra seconds of segments on a grid of bytes, and readings of it.

*Extra* seconds are those above one forward and one backward of each stage: what is run again, and what the
chosen options recompute. The bytes of a segment are those above its base (``optimal_peaks.py``). Segments on
the grid end before a boundary where splits are tried (``Arrays.split``).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from rematplan.scheduler.solvers.optimal_peaks import (
    NEVER,
    TILE,
    Arrays,
    Floats,
    Ints,
    Peaks,
    compiled,
    keep_need,
    peaks_of,
    run_need,
)

__all__ = ["Grid", "Reading", "filled_grid", "read_off", "root_values"]


class Grid(NamedTuple):
    """C for r units left above base, which are r * unit + phase bytes.

    The phase is the budget's remainder: nothing is lost where all sizes are multiples of the unit.
    """

    unit: int  # bytes
    phase: int  # bytes
    interpolate: bool  # between grid points; otherwise sizes are rounded down
    least: Ints  # (L, L) P where splits are tried at ``Arrays.split`` only, and segments end there
    least_to: Ints  # (L, L) the same by t and s
    lo: Ints  # (L, L) units; with fewer ``least`` does not fit
    hi: Ints  # (L, L) units; with as many A fits, or so many are never left
    offset: Ints  # (L, L) where the values of the segment start, see ``_row``
    values: Floats  # extra seconds


class Reading(NamedTuple):
    """A schedule read off a grid.

    The decisions are in the order in which ``persistent.build`` asks for them: at most 2L - 1, for
    each either keeps a stage or splits at a boundary, and no boundary is split at twice.
    """

    option: Ints  # of the stage that is kept; -1 for a split
    at: Ints  # the boundary of the split
    extra: float  # seconds
    spare: int  # bytes of the budget that are never used


@compiled
def _row(g: Grid, s: int, t: int) -> Floats:
    """Return C(s,t) at lo-1 .. hi units: first a margin, lo's or the worst value; last A's seconds."""
    return g.values[g.offset[s, t] : g.offset[s, t] + g.hi[s, t] - g.lo[s, t] + 2]


@compiled
def _units(g: Grid, need: int) -> int:
    """Return the fewest units with room for ``need`` bytes."""
    return -((g.phase - need) // g.unit)


@partial(compiled, fastmath={"nnan", "nsz"})
def _relax(row: Floats, start: int, end: int, cost: float, x: Floats, shift: int, y: Floats, at: int) -> None:
    """Set row[i] = min(row[i], cost + x[i - shift] + y[i - at]) for start <= i < end.

    Beyond the end of x or y its last value stands. No value is a NaN, and saying so lets the loops become
    vector code.
    """
    x_end, y_end = min(end, x.size + shift), min(end, y.size + at)
    if start < min(x_end, y_end):
        size = min(x_end, y_end) - start
        out, one, other = row[start:], x[start - shift :], y[start - at :]
        for i in range(size):
            out[i] = min(out[i], cost + one[i] + other[i])
        start += size
    if start < x_end:
        out, one = row[start:], x[start - shift :]
        for i in range(x_end - start):
            out[i] = min(out[i], cost + y[-1] + one[i])
        start = x_end
    if start < y_end:
        out, other = row[start:], y[start - at :]
        for i in range(y_end - start):
            out[i] = min(out[i], cost + x[-1] + other[i])
        start = y_end
    for i in range(start, end):
        row[i] = min(row[i], cost + x[-1] + y[-1])


@compiled
def _shifted(g: Grid, s: int, t: int, size: int, out: Floats) -> Floats:
    """Return C(s,t) with ``size`` bytes less than the grid says, to be read ``size // unit`` units higher."""
    row = _row(g, s, t)
    part = (size % g.unit) / g.unit
    if not g.interpolate or part == 0:
        return row
    out[0] = row[0]
    for i in range(1, row.size):
        out[i] = (1 - part) * row[i] + part * row[i - 1]
    return out[: row.size]


@compiled
def _splits(  # noqa: C901 - a compiled recurrence
    a: Arrays, g: Grid, ss: tuple[int, int], ts: tuple[int, int], js: tuple[int, int], buffer: Floats
) -> None:
    """Try the splits at js[0] <= j < js[1] of every segment with ss[0] <= s < ss[1] and ts[0] <= t < ts[1].

    No more than TILE of s, nor of t; s < j <= t for all of them.
    """
    last = a.first.size - 1
    wanted = np.zeros(TILE, np.bool_)  # whether there is a segment to fill that ends at t
    for t in range(ts[0], ts[1]):
        for s in range(ss[0], ss[1]):
            wanted[t - ts[0]] |= a.split[t + 1] and a.origin[s, t] == s
    if not wanted.any():
        return
    # Values from here on cost less than any further split does by itself, and are left alone.
    ends = np.full((TILE, TILE), NEVER)
    for j in range(js[0], js[1]):
        if not a.split[j]:
            continue
        units = a.boundary[j] // g.unit
        for t in range(ts[0], ts[1]):
            if not wanted[t - ts[0]]:
                continue
            after_right = a.after[j - 1] - a.after[t]  # bytes that the right part leaves behind
            left_units = (after_right + g.interpolate * (g.unit - 1)) // g.unit
            need_right = a.boundary[j] + g.least_to[t, j]
            right = _shifted(g, j, t, a.boundary[j], buffer)
            for s in range(ss[0], ss[1]):
                if a.origin[s, t] != s:
                    continue
                row = _row(g, s, t)
                cost = a.ahead[j] - a.ahead[s]
                end = min(ends[s - ss[0], t - ts[0]], row.size - 1)
                while end > 1 and row[end - 1] <= cost:
                    end -= 1
                ends[s - ss[0], t - ts[0]] = end
                if end <= 1:
                    continue
                run = a.run[1, s, j - 1] if t == last else a.run[0, s, j - 1] + a.grad[t + 1]
                first = g.lo[s, t] - 1  # the units of row[0]
                need = max(run, need_right, after_right + g.least[s, j - 1])
                start = max(_units(g, need) - first, 1)
                if start < end:
                    to_right = g.lo[j, t] - 1 + units - first
                    to_left = g.lo[s, j - 1] - 1 + left_units - first
                    _relax(row, start, end, cost, right, to_right, _row(g, s, j - 1), to_left)


@compiled
def _keep(a: Arrays, g: Grid, s: int, t: int, buffer: Floats) -> None:
    """Try to keep stage s, with each of its options."""
    row, none = _row(g, s, t), np.zeros(1)
    first = g.lo[s, t] - 1
    for k in range(a.choices[s]):
        need = keep_need(a, s, t, k)
        rest, shift = none, int(-NEVER)
        if s < t:
            # What fits is decided by exact bytes here too, so that the values from lo on are finite.
            need = max(need, a.saved[s, k] + g.least[s + 1, t])
            rest = _shifted(g, s + 1, t, a.saved[s, k], buffer)
            shift = g.lo[s + 1, t] - 1 + a.saved[s, k] // g.unit - first
        start = max(_units(g, need) - first, 1)
        _relax(row, start, row.size - 1, a.recompute[s, k], rest, shift, none, int(-NEVER))


@compiled
def _keep_until(a: Arrays, g: Grid, s: int, i: int, t: int, buffer: Floats) -> None:
    """Try to keep stages s..i-1 with their fastest options: early, to leave ``_splits`` little to do."""
    row, none = _row(g, s, t), np.zeros(1)
    kept = a.kept[i] - a.kept[s]
    need = kept + g.least[i, t]
    for stage in range(s, i):
        need = max(need, a.kept[stage] - a.kept[s] + keep_need(a, stage, t, a.fastest[stage]))
    first = g.lo[s, t] - 1
    rest = _shifted(g, i, t, kept, buffer)
    shift = g.lo[i, t] - 1 + kept // g.unit - first
    start = max(_units(g, need) - first, 1)
    _relax(row, start, row.size - 1, a.quick[i] - a.quick[s], rest, shift, none, int(-NEVER))


@compiled
def _worst(a: Arrays, s: int, t: int) -> float:
    """Return the extra seconds of s..t reversed a stage at a time from x_s, as with little more than P."""
    return float((a.ahead[t] - a.ahead[s]) * (t - s + 1) + a.quick[t + 1] - a.quick[s])


@compiled
def _fill(a: Arrays, g: Grid) -> None:
    """Compute ``g.values``, in blocks of TILE by TILE segments, so that what they read stays in the cache.

    A block is s_low..s_high by t_low..t_high. Splits at s_high < j <= t_low read other blocks only, each row
    for many segments of this one; the splits left over, inside the block, follow row by row.
    """
    length = a.first.size
    buffer = np.empty((g.hi - g.lo).max() + 2)
    g.values[:] = np.inf
    for s_block in range((length - 1) // TILE, -1, -1):
        s_low, s_high = s_block * TILE, min(s_block * TILE + TILE, length) - 1
        for t_low in range(s_low, length, TILE):
            t_high = min(t_low + TILE, length) - 1
            if t_low > s_low:
                for t in range(t_low, t_high + 1):
                    for s in range(s_low, s_high + 1):
                        if a.split[t + 1] and a.origin[s, t] == s:
                            _keep_until(a, g, s, s_high + 1, t, buffer)
                _splits(a, g, (s_low, s_high + 1), (t_low, t_high + 1), (s_high + 1, t_low + 1), buffer)
            for t in range(t_low, t_high + 1):
                for s in range(min(s_high, t), s_low - 1, -1):
                    if not a.split[t + 1] or a.origin[s, t] != s:
                        continue
                    _keep(a, g, s, t, buffer)
                    _splits(a, g, (s, s + 1), (t, t + 1), (s + 1, min(s_high, t) + 1), buffer)
                    _splits(a, g, (s, s + 1), (t, t + 1), (max(s_high, t_low) + 1, t + 1), buffer)
                    row = _row(g, s, t)
                    row[-1] = a.quick[t + 1] - a.quick[s]
                    row[0] = _worst(a, s, t) if g.interpolate else row[1]


@compiled
def _estimate(a: Arrays, p: Peaks, g: Grid, s: int, t: int, room: int) -> float:
    """C of s..t with ``room`` bytes above base, by the grid; the caller has seen that P fits."""
    if room >= p.fastest[s, t]:
        return float(a.quick[t + 1] - a.quick[s])
    if not a.split[t + 1] or room < g.least[s, t]:
        return _worst(a, s, t)  # not on the grid: it splits where the grid does not
    row = _row(g, s, t)
    up = -((g.phase - room) // g.unit)  # units, rounded up; always over lo - 1
    i = min(up - (g.lo[s, t] - 1), row.size - 1)
    part = (up * g.unit + g.phase - room) / g.unit
    return float((1 - part) * row[i] + part * row[i - 1])


@compiled
def _decide(a: Arrays, p: Peaks, g: Grid, s: int, t: int, room: int) -> tuple[int, int]:
    """Decide on s..t with ``room`` bytes above base: (option, 0) to keep s, or (-1, j) to split at j.

    Exact in bytes; only the seconds are the grid's. Ties go to keep, and to the first.
    """
    best, option, at = np.inf, -1, 0
    for k in range(a.choices[s]):
        rest = room - a.saved[s, k]
        if keep_need(a, s, t, k) > room or (t > s and p.least[s + 1, t] > rest):
            continue
        seconds = a.recompute[s, k]
        if t > s:
            seconds += _estimate(a, p, g, s + 1, t, rest)
        if seconds < best:
            best, option = seconds, k
    for j in range(s + 1, t + 1):
        seconds = a.ahead[j] - a.ahead[s]
        if seconds >= best or run_need(a, s, t, j) > room:
            break
        right, left = room - a.boundary[j], room - (a.after[j - 1] - a.after[t])
        if p.least_to[t, j] > right or p.least[s, j - 1] > left:
            continue
        seconds += _estimate(a, p, g, j, t, right) + _estimate(a, p, g, s, j - 1, left)
        if seconds < best:
            best, option, at = seconds, -1, j
    return option, at


@compiled
def read_off(a: Arrays, p: Peaks, g: Grid, budget: int) -> Reading:
    """Return the schedule for ``budget`` bytes, which P has been seen to fit."""
    length = a.first.size
    option, at = np.empty(2 * length, np.int64), np.empty(2 * length, np.int64)
    stack = np.empty((length + 1, 3), np.int64)  # segments to come and their room, in bytes above base
    stack[0] = (0, length - 1, budget - a.boundary[0] - a.after[-1])
    waiting, count, extra, spare = 1, 0, 0.0, budget
    while waiting:
        waiting -= 1
        s, t, room = stack[waiting]
        k, j = _decide(a, p, g, s, t, room)
        if k < 0 and j == 0:
            raise RuntimeError(
                "internal: nothing fits a segment that P fits; please report this with Chain.to_json()"
            )
        option[count], at[count] = k, j
        count += 1
        if k >= 0:
            extra += a.recompute[s, k]
            spare = min(spare, room - keep_need(a, s, t, k))
            if s < t:
                stack[waiting] = (s + 1, t, room - a.saved[s, k])
                waiting += 1
        else:
            extra += a.ahead[j] - a.ahead[s]
            spare = min(spare, room - run_need(a, s, t, j))
            stack[waiting] = (s, j - 1, room - (a.after[j - 1] - a.after[t]))
            stack[waiting + 1] = (j, t, room - a.boundary[j])
            waiting += 2
    return Reading(option[:count], at[:count], extra, spare)


def filled_grid(a: Arrays, p: Peaks, budget: int, unit: int, phase: int, interpolate: bool) -> Grid:
    """Return the grid of ``unit`` bytes for budgets up to ``budget`` (bytes), filled."""
    length = len(a.first)
    here = np.nonzero(np.triu(np.broadcast_to(a.split[1:], (length, length))))
    there = (a.origin[here], a.origin[here] + here[1] - here[0])
    most = np.broadcast_to(budget - a.boundary[0] - a.after, (length, length)).copy()
    np.maximum.at(most, there, most[here])
    top = -((phase - most) // unit)
    restricted = p if a.split.all() else peaks_of(a, a.split)
    lo = np.minimum(-((phase - restricted.least) // unit), top + 1)
    hi = np.maximum(np.minimum(-((phase - p.fastest) // unit), top + 1), lo)
    own = np.zeros((length, length), np.int64)
    own[there] = 1
    ends = np.cumsum((hi - lo + 2) * own)
    offset = np.concatenate(([0], ends[:-1])).reshape(lo.shape)
    for table in (lo, hi, offset):
        table[here] = table[there]
    g = Grid(
        unit, phase, interpolate, restricted.least, restricted.least_to, lo, hi, offset, np.empty(ends[-1])
    )
    _fill(a, g)
    return g


def root_values(g: Grid) -> tuple[int, Floats]:
    """Return the units from which the whole chain fits, and its extra seconds from there on, by units."""
    return int(g.lo[0, -1]), np.array(_row(g, 0, len(g.lo) - 1)[1:])
