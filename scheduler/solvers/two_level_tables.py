"""The dynamic program behind ``two_level.py``, compiled. Its docstring has the recurrence and the names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.solvers.checks import MOST_SECONDS
from rematplan.scheduler.solvers.optimal_peaks import (
    NEVER,
    Arrays,
    Floats,
    Ints,
    compiled,
    keep_need,
    peaks_of,
    run_need,
)

__all__ = [
    "EARLY",
    "GOES",
    "INSIDE",
    "LOOSE",
    "OFF",
    "STAYS",
    "Frontiers",
    "Grid",
    "Numbers",
    "decide_again",
    "decide_sweep",
    "filled",
    "frontiers",
    "numbers_of",
    "peaks",
    "place",
    "suffix_peak",
]

# Where x_s is when the first sweep comes to stage s: on the device by itself; inside the saved tensors of
# stage s-1 there; or (OFF + k) on the device by itself while those of option k, it among them, are on the
# host.
LOOSE, INSIDE, OFF = 0, 1, 2
# What becomes of x_s once stage s has run: it stays; it goes, and comes back by itself; it goes, and comes
# back with the saved tensors of stage s-1, earlier than stage s-1 itself would need them.
STAYS, GOES, EARLY = 0, 1, 2

NONE = MOST_SECONDS  # nothing fits
MOST_POINTS = 1024  # of one frontier; above that neighbours are merged to the cautious side


class Numbers(NamedTuple):
    """The chain and its copies for compiled code; ``a.after`` is without ``chain.fixed``.

    Copies are charged with seconds as weighed, and host bytes, 0 where the host has room for all.
    """

    a: Arrays
    write: Floats  # (L,) of x_i
    read: Floats  # (L,)
    saved_copy: Floats  # (L, K) there and back
    host_boundary: Ints  # (L,)
    host_saved: Ints  # (L, K)


class Grid(NamedTuple):
    """C and F on grids: r units of device memory are r * unit + phase bytes, q units of host memory alike."""

    unit: int
    phase: int
    host_unit: int
    host_phase: int
    interpolate: bool  # between grid points; otherwise sizes are rounded down
    # Column c of a row is for c - 1 units; the margin, column 0, and what does not fit repeat the first that
    # does.
    again: Floats  # C (L, L, columns)
    sweep: Floats  # F (2 + K, L, host units, columns)


class Frontiers(NamedTuple):
    """For each place f of x_s, least peaks by host bytes: ``size[f, s]`` from ``start[f, s]`` on."""

    start: Ints  # (2 + K, L)
    size: Ints  # (2 + K, L)
    host: Ints  # ascending
    peak: Ints  # descending: bytes above h


def numbers_of(a: Arrays, host: HostMemory, weight: float, bounded: bool) -> Numbers:
    """Add copies at ``weight`` times their seconds; ``bounded``: the host is too small for all."""

    def seconds(copy: Callable[[int], float], sizes: Ints) -> Floats:
        return np.array([weight * copy(size) for size in sizes.ravel().tolist()]).reshape(sizes.shape)

    def there_and_back(size: int) -> float:
        return host.write_seconds(size) + host.read_seconds(size)

    boundary = a.boundary[:-1]
    return Numbers(
        a,
        write=seconds(host.write_seconds, boundary),
        read=seconds(host.read_seconds, boundary),
        saved_copy=seconds(there_and_back, a.saved),
        host_boundary=boundary * bounded,
        host_saved=a.saved * bounded,
    )


@compiled
def _keep_need(n: Numbers, s: int, t: int, k: int, x: int = 0, back: int = 0) -> int:
    """Return ``keep_need`` in bytes above h."""
    return keep_need(n.a, s, t, k, x, back) + int(n.a.after[t])


@compiled
def _run_need(n: Numbers, s: int, t: int, j: int) -> int:
    """Return ``run_need`` in bytes above h."""
    return run_need(n.a, s, t, j) + int(n.a.after[t])


@compiled
def _ways(n: Numbers, f: int, s: int) -> int:
    """Return how many of STAYS, GOES and EARLY there are for x_s."""
    return 1 if f == INSIDE or s == n.a.forward.size - 1 else 2 if f == LOOSE else 3


@compiled
def place(n: Numbers, f: int, s: int, way: int) -> tuple[int, int, int, int, float]:
    """Return bytes of x_s while s runs, after that, of what has it later; host bytes, seconds of copies."""
    x = 0 if f == INSIDE else n.a.boundary[s]
    if way == STAYS:
        return x, x, x, 0, 0.0
    if way == EARLY:
        return x, 0, n.a.saved[s - 1, f - OFF], 0, 0.0
    return (x, 0, x, n.host_boundary[s], n.read[s] + n.write[s]) if f == LOOSE else (x, 0, x, 0, n.read[s])


def peaks(n: Numbers) -> Ints:
    """Return P (L, L): the least peak above h, which has x_s in it, of any one-level schedule of s..t."""
    return peaks_of(n.a, n.a.split).least + n.a.after


def _merged(host: list[Ints], peak: list[Ints], capacity: int) -> tuple[Ints, Ints]:
    """Return the points that no other one beats in both host bytes and peak."""
    h, p = np.concatenate(host), np.concatenate(peak)
    fits = (h <= capacity) & (p < NEVER)
    h, p = h[fits], p[fits]
    order = np.lexsort((p, h))
    h, p = h[order], p[order]
    lowest = np.minimum.accumulate(p)
    better = np.concatenate(([True], lowest[1:] < lowest[:-1]))[: len(p)]
    h, p = h[better], p[better]
    if len(h) > MOST_POINTS:  # every point left is one that can be met
        some = np.unique(np.linspace(0, len(h) - 1, MOST_POINTS).astype(np.int64))
        h, p = h[some], p[some]
    return h, p


def frontiers(n: Numbers, least: Ints, capacity: int) -> Frontiers:
    """Return P2: what a suffix s..L-1 needs at least on the device, for each number of host bytes."""
    length = n.a.forward.size
    places = OFF + n.a.saved.shape[1]
    points: dict[tuple[int, int], tuple[Ints, Ints]] = {}
    for s in range(length - 1, -1, -1):
        runs = [_run_need(n, s, length - 1, j) for j in range(s + 1, length)]
        for f in range(places):
            hosts, tops = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
            # Where x_s is OFF it matters for EARLY alone with which option.
            for way in range(_ways(n, f, s)):
                if way == EARLY and s > 0 and f - OFF >= n.a.choices[s - 1]:
                    continue
                x, stays, back, copied, _ = place(n, f, s, way)
                for k in range(n.a.choices[s]):
                    need = _keep_need(n, s, length - 1, k, x, back)
                    if s == length - 1:
                        hosts.append(np.zeros(1, np.int64))
                        tops.append(np.array([need]))
                        continue
                    h, p = points[INSIDE, s + 1]
                    hosts.append(h + copied)
                    tops.append(np.maximum(need, p + stays + n.a.saved[s, k]))
                    h, p = points[OFF + k, s + 1]
                    hosts.append(h + copied + n.host_saved[s, k])
                    tops.append(np.maximum(need, p + stays))
                for j in range(s + 1, length):
                    need = max(x + runs[0], stays + runs[j - 1 - s])
                    if need >= NEVER:
                        break
                    h, p = points[LOOSE, j]
                    hosts.append(h + copied)
                    tops.append(np.maximum(max(need, back + int(least[s, j - 1])), p + stays))
            points[f, s] = _merged(hosts, tops, capacity)
    keys = [(f, s) for f in range(places) for s in range(length)]
    size = np.array([len(points[key][0]) for key in keys], np.int64)
    return Frontiers(
        (np.cumsum(size) - size).reshape(places, length),
        size.reshape(places, length),
        np.concatenate([points[key][0] for key in keys]),
        np.concatenate([points[key][1] for key in keys]),
    )


@compiled
def suffix_peak(p: Frontiers, f: int, s: int, host_room: int) -> int:
    """Return the least peak above h of s..L-1 with ``host_room`` host bytes left; NEVER if nothing fits."""
    low, high = p.start[f, s], p.start[f, s] + p.size[f, s]
    at = low + np.searchsorted(p.host[low:high], host_room, side="right") - 1
    return int(p.peak[at]) if at >= low and host_room >= 0 else int(NEVER)


@compiled
def _host_less(g: Grid, q: int, size: int) -> int:
    """Return host units left of q when ``size`` bytes are taken; negative if they do not fit."""
    if size > q * g.host_unit + g.host_phase:
        return -1
    return max(q - (size + g.interpolate * (g.host_unit // 2)) // g.host_unit, 0)


@compiled
def _columns(g: Grid, need: int) -> int:
    """Return the first column of a row with room for ``need`` bytes."""
    return max(1 - (g.phase - need) // g.unit, 1)


@partial(compiled, fastmath={"nnan", "nsz"})
def _relax(g: Grid, row: Floats, start: int, cost: float, x: Floats, size: int, y: Floats) -> None:
    """Set row[c] = min(row[c], cost + y[c] + x with ``size`` bytes less than c says) for start <= c.

    ``start`` leaves room for ``size`` bytes. No value is a NaN, and saying so lets the loop become vector
    code.
    """
    count = row.size - start
    if count <= 0:
        return
    shift = size // g.unit
    below = (size - shift * g.unit) / g.unit * g.interpolate
    here = 1 - below
    out, other, near, next_ = row[start:], y[start:], x[start - shift :], x[start - shift - 1 :]
    for c in range(count):
        out[c] = min(out[c], cost + other[c] + here * near[c] + below * next_[c])


@compiled
def _close(row: Floats) -> None:
    """Repeat the first value of the row in front of it, so that interpolation never leaves what fits."""
    first = 1
    while first < row.size - 1 and row[first] >= NONE:
        first += 1
    row[:first] = row[first]


@compiled
def _fill_again(n: Numbers, least: Ints, g: Grid) -> None:
    """Fill C: least seconds of s..t < L-1 with one level, run again when its gradient is live."""
    length, columns = n.a.forward.size, g.again.shape[2]
    zero = np.zeros(columns)
    for s in range(length - 2, -1, -1):
        for t in range(s, length - 1):
            row = g.again[s, t]
            row[:] = NONE
            for k in range(n.a.choices[s]):
                cost = n.a.forward[s] + n.a.backward[s] + n.a.recompute[s, k]
                need = _keep_need(n, s, t, k)
                if s == t:
                    _relax(g, row, _columns(g, need), cost, zero, 0, zero)
                else:
                    need = max(need, n.a.saved[s, k] + least[s + 1, t])
                    _relax(g, row, _columns(g, need), cost, g.again[s + 1, t], n.a.saved[s, k], zero)
            cost = 0.0
            for j in range(s + 1, t + 1):
                cost += n.a.forward[j - 1]
                need = max(_run_need(n, s, t, j), n.a.boundary[j] + least[j, t], least[s, j - 1])
                start = _columns(g, need)
                _relax(g, row, start, cost, g.again[j, t], n.a.boundary[j], g.again[s, j - 1])
            _close(row)


@compiled
def _fill_sweep(n: Numbers, least: Ints, p: Frontiers, g: Grid) -> None:  # noqa: C901 - a compiled recurrence
    """Fill F: least seconds of s..L-1 in the first sweep and after it."""
    length = n.a.forward.size
    hosts, columns = g.sweep.shape[2:]
    left, zero = np.empty(columns), np.zeros(columns)
    last = length - 1
    places = g.sweep.shape[0]
    tops = np.full((places, length, hosts), NEVER)
    for s in range(last, -1, -1):
        for f in range(places):
            if f >= OFF and (s == 0 or f - OFF >= n.a.choices[s - 1]):
                continue
            for q in range(hosts):
                tops[f, s, q] = suffix_peak(p, f, s, q * g.host_unit + g.host_phase)
            rows = g.sweep[f, s]
            rows[:] = NONE
            for way in range(_ways(n, f, s)):
                x, stays, back, copied, fee = place(n, f, s, way)
                for k in range(n.a.choices[s]):
                    need = _keep_need(n, s, last, k, x, back)
                    cost = fee + n.a.forward[s] + n.a.backward[s] + n.a.recompute[s, k]
                    for q in range(hosts):
                        if s == last:
                            _relax(g, rows[q], _columns(g, need), cost, zero, 0, zero)
                            continue
                        for off in range(2):
                            taken = stays if off else stays + n.a.saved[s, k]
                            rest = _host_less(g, q, copied + (n.host_saved[s, k] if off else 0))
                            where = OFF + k if off else INSIDE
                            if rest < 0 or tops[where, s + 1, rest] >= NEVER:
                                continue
                            start = _columns(g, max(need, taken + tops[where, s + 1, rest]))
                            seconds = cost + (n.saved_copy[s, k] if off else 0.0)
                            _relax(g, rows[q], start, seconds, g.sweep[where, s + 1, rest], taken, zero)
                cost = fee
                for j in range(s + 1, length):
                    cost += n.a.forward[j - 1]
                    run = max(x + _run_need(n, s, last, s + 1), stays + _run_need(n, s, last, j))
                    if run >= NEVER:
                        break
                    first = max(run, back + least[s, j - 1])
                    if _columns(g, first) >= columns:
                        continue
                    left[:] = NONE
                    _relax(g, left, _columns(g, first), 0.0, g.again[s, j - 1], back, zero)
                    for q in range(hosts):
                        rest = _host_less(g, q, copied)
                        if rest < 0 or tops[LOOSE, j, rest] >= NEVER:
                            continue
                        start = _columns(g, max(first, stays + tops[LOOSE, j, rest]))
                        _relax(g, rows[q], start, cost, g.sweep[LOOSE, j, rest], stays, left)
            for q in range(hosts):
                _close(rows[q])


@compiled
def _look_up(g: Grid, row: Floats, room: int) -> float:
    """Return the value of ``row`` with ``room`` bytes."""
    column = _columns(g, room)
    part = ((column - 1) * g.unit + g.phase - room) / g.unit * g.interpolate
    return float((1 - part) * row[column] + part * row[column - 1])


@compiled
def _look_up_sweep(g: Grid, f: int, s: int, room: int, host_room: int) -> float:
    """Look up F with ``room`` bytes of the device and ``host_room`` of the host."""
    q = -((g.host_phase - host_room + g.interpolate * (g.host_unit // 2)) // g.host_unit)
    return _look_up(g, g.sweep[f, s, min(max(q, 0), g.sweep.shape[2] - 1)], room)


@compiled
def decide_again(n: Numbers, least: Ints, g: Grid, s: int, t: int, room: int) -> tuple[int, int]:
    """Decide on s..t < L-1 with ``room`` bytes above h: (option, 0) to keep s, or (-1, j) to split at j.

    Exact in bytes; only the seconds are the grid's. Ties go to keep, and to the first.
    """
    best, option, at = np.inf, -1, 0
    for k in range(n.a.choices[s]):
        rest = room - n.a.saved[s, k]
        if _keep_need(n, s, t, k) > room or (t > s and least[s + 1, t] > rest):
            continue
        seconds = n.a.forward[s] + n.a.backward[s] + n.a.recompute[s, k]
        if t > s:
            seconds += _look_up(g, g.again[s + 1, t], rest)
        if seconds < best or option < 0:
            best, option = seconds, k
    cost = 0.0
    for j in range(s + 1, t + 1):
        cost += n.a.forward[j - 1]
        if _run_need(n, s, t, j) > room:
            break
        rest = room - n.a.boundary[j]
        if least[j, t] > rest or least[s, j - 1] > room:
            continue
        seconds = cost + _look_up(g, g.again[j, t], rest) + _look_up(g, g.again[s, j - 1], room)
        if seconds < best or (option < 0 and at == 0):
            best, option, at = seconds, -1, j
    return option, at


@compiled
def decide_sweep(
    n: Numbers, least: Ints, p: Frontiers, g: Grid, f: int, s: int, room: int, host_room: int
) -> tuple[int, int, int, int]:
    """Decide on stage s in the first sweep: (option or -1, split or 0, way of x_s, saved tensors go).

    Exact in bytes, ``room`` above h without x_s and ``host_room`` of the host; only the seconds are the
    grid's.
    """
    last = n.a.forward.size - 1
    best, found = np.inf, (-1, 0, 0, 0)
    for way in range(_ways(n, f, s)):
        x, stays, back, copied, fee = place(n, f, s, way)
        here, there = room - stays, host_room - copied
        for k in range(n.a.choices[s]):
            if _keep_need(n, s, last, k, x, back) > room:
                continue
            cost = fee + n.a.forward[s] + n.a.backward[s] + n.a.recompute[s, k]
            for off in range(1 if s == last else 2):
                rest = here if off else here - n.a.saved[s, k]
                host_rest = there - (n.host_saved[s, k] if off else 0)
                seconds = cost + (n.saved_copy[s, k] if off else 0.0)
                if s < last:
                    where = OFF + k if off else INSIDE
                    if suffix_peak(p, where, s + 1, host_rest) > rest:
                        continue
                    seconds += _look_up_sweep(g, where, s + 1, rest, host_rest)
                if seconds < best or found[0] + found[1] < 0:
                    best, found = seconds, (k, 0, way, off)
        cost = fee
        for j in range(s + 1, last + 1):
            cost += n.a.forward[j - 1]
            if max(x + _run_need(n, s, last, s + 1), stays + _run_need(n, s, last, j)) > room:
                break
            if back + least[s, j - 1] > room or suffix_peak(p, LOOSE, j, there) > here:
                continue
            seconds = cost + _look_up(g, g.again[s, j - 1], room - back)
            seconds += _look_up_sweep(g, LOOSE, j, here, there)
            if seconds < best or found[0] + found[1] < 0:
                best, found = seconds, (-1, j, way, 0)
    return found


def filled(
    n: Numbers,
    least: Ints,
    p: Frontiers,
    room: int,
    host_room: int,
    units: tuple[int, int],
    interpolate: bool,
    again: Floats | None,
) -> Grid:
    """Return the grid of ``units`` bytes (device, host) for ``room`` and ``host_room`` bytes, filled.

    Args:
        again: C of an earlier grid of the same chain, room and units; it does not depend on the copies.
    """
    length = n.a.forward.size
    columns, hosts = room // units[0] + 2, host_room // units[1] + 1
    table = np.empty((length, length, columns)) if again is None else again
    sweep = np.empty((OFF + n.a.saved.shape[1], length, hosts, columns))
    g = Grid(units[0], room % units[0], units[1], host_room % units[1], interpolate, table, sweep)
    if again is None:
        _fill_again(n, least, g)
    _fill_sweep(n, least, p, g)
    return g
