"""The dynamic program behind ``optimal.py``, compiled. Its docstring has the recurrence and the names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scheduler.chain import Chain

__all__ = ["Arrays", "Grid", "Peaks", "arrays_of", "decide_one", "filled_grid", "peaks_of"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NEVER = np.int64(2**62)  # bytes; ``arrays_of`` refuses chains that come near it

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F, **options: Any) -> F:
    """``function`` compiled at its first call, and kept on disk where there is a place for it."""
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba's word for: neither the package's folder nor the user's can be written
        return njit(**options)(function)


class Arrays(NamedTuple):
    """The chain for compiled code. L stages, at most K options; seconds as floats, bytes as ints."""

    forward: Floats  # (L,)
    backward: Floats  # (L,)
    boundary: Ints  # (L + 1,)
    grad: Ints  # (L + 1,) gradients of the boundaries
    overhead: Ints  # (L,) transient of a forward that keeps nothing
    recomputable: NDArray[np.bool_]  # (L,)
    choices: Ints  # (L,) number of options
    saved: Ints  # (L, K)
    recompute: Floats  # (L, K)
    forward_overhead: Ints  # (L, K)
    backward_overhead: Ints  # (L, K)
    first: Ints  # (L,) fixed and long-lived bytes while stage i runs for the first time
    after: Ints  # (L,) the same once stages i+1.. are reversed


class Peaks(NamedTuple):
    """What needs no memory axis, for each segment s..t: (L, L)."""

    least: Ints  # P: bytes above h
    fastest: Ints  # A: bytes above h
    seconds: Floats  # C where A fits


class Grid(NamedTuple):
    """C for r units of memory left above h, which are r * unit + phase bytes.

    The phase is the budget's remainder: nothing is lost where all sizes are multiples of the unit.
    """

    unit: int  # bytes
    phase: int  # bytes
    interpolate: bool  # between grid points; otherwise sizes are rounded down
    lo: Ints  # (L, L) units; with fewer P does not fit
    hi: Ints  # (L, L) units; with as many A fits, or so many are never left
    offset: Ints  # (L, L) where the values of the segment start, see ``_row``
    values: Floats  # seconds


def arrays_of(chain: Chain) -> Arrays:
    """The chain as arrays, or a ValueError where its sizes could overflow them."""
    stages = chain.stages
    total = chain.fixed + chain.output + chain.output_grad
    for stage in stages:
        total += stage.input + stage.input_grad + stage.forward_overhead + stage.carried + stage.grad
        total += abs(stage.carried_change)
        total += sum(o.saved + o.forward_overhead + o.backward_overhead for o in stage.options)
    if total >= NEVER:
        raise ValueError(f"optimal: the chain's sizes add up to {total} bytes; they must stay below 2**62")
    width = max(len(stage.options) for stage in stages)

    def table(field: str, dtype: type) -> NDArray[Any]:
        rows = [[getattr(o, field) for o in stage.options] for stage in stages]
        return np.array([row + [0] * (width - len(row)) for row in rows], dtype)

    boundaries = range(len(stages) + 1)
    carried = np.array([stage.carried for stage in stages], np.int64)
    retained = np.array([stage.retained for stage in stages], np.int64)
    return Arrays(
        forward=np.array([stage.forward for stage in stages]),
        backward=np.array([stage.backward for stage in stages]),
        boundary=np.array([chain.input_bytes(i) for i in boundaries], np.int64),
        grad=np.array([chain.grad_bytes(i) for i in boundaries], np.int64),
        overhead=np.array([stage.forward_overhead for stage in stages], np.int64),
        recomputable=np.array([stage.recomputable for stage in stages]),
        choices=np.array([len(stage.options) for stage in stages], np.int64),
        saved=table("saved", np.int64),
        recompute=table("recompute", np.float64),
        forward_overhead=table("forward_overhead", np.int64),
        backward_overhead=table("backward_overhead", np.int64),
        first=chain.fixed + np.cumsum(carried),
        after=chain.fixed + carried.sum() + np.cumsum(retained[::-1])[::-1] - retained,
    )


@compiled
def keep_need(a: Arrays, s: int, t: int, k: int) -> int:
    """Bytes above h to keep stage s of s..t with option k, and to reverse it once s+1..t are reversed."""
    # A segment that ends at L-1 runs before any backward: no gradient yet, long-lived bytes so far.
    base = a.first[s] if t == a.forward.size - 1 else a.after[t] + a.grad[t + 1]
    backward = a.after[s] + a.grad[s + 1] + a.grad[s] + a.backward_overhead[s, k]
    return int(a.saved[s, k] + max(base + a.forward_overhead[s, k], backward))


@compiled
def run_need(a: Arrays, s: int, t: int, i: int) -> int:
    """Bytes above h to run stage i of s..t on the way from x_s, which is in h, to a split."""
    if not a.recomputable[i]:
        return int(NEVER)
    base = a.first[i] if t == a.forward.size - 1 else a.after[t] + a.grad[t + 1]
    return int(base + (a.boundary[i] if i > s else 0) + a.boundary[i + 1] + a.overhead[i])


@compiled
def peaks_of(a: Arrays) -> Peaks:
    """The tables P and A, and the seconds of A."""
    length = a.forward.size
    least = np.full((length, length), NEVER)
    fastest = np.full((length, length), NEVER)
    seconds = np.zeros((length, length))
    for s in range(length - 1, -1, -1):
        quick = 0
        for k in range(1, a.choices[s]):
            if (a.recompute[s, k], a.saved[s, k]) < (a.recompute[s, quick], a.saved[s, quick]):
                quick = k
        for t in range(s, length):
            best = int(NEVER)
            for k in range(a.choices[s]):
                peak = keep_need(a, s, t, k)
                if t > s:
                    peak = max(peak, a.saved[s, k] + least[s + 1, t])
                best = min(best, peak)
            fastest[s, t] = keep_need(a, s, t, quick)
            seconds[s, t] = a.forward[s] + a.backward[s] + a.recompute[s, quick]
            if t > s:
                fastest[s, t] = max(fastest[s, t], a.saved[s, quick] + fastest[s + 1, t])
                seconds[s, t] += seconds[s + 1, t]
            run = 0
            for j in range(s + 1, t + 1):
                run = max(run, run_need(a, s, t, j - 1))
                best = min(best, max(run, a.boundary[j] + least[j, t], least[s, j - 1]))
            least[s, t] = best
    return Peaks(least, fastest, seconds)


@compiled
def _units(g: Grid, need: int) -> int:
    """The fewest units with room for ``need`` bytes."""
    return -((g.phase - need) // g.unit)


@compiled
def _row(g: Grid, s: int, t: int) -> Floats:
    """C(s,t) at lo-1 .. hi units; the margin below repeats lo, the one above is the seconds of A."""
    return g.values[g.offset[s, t] : g.offset[s, t] + g.hi[s, t] - g.lo[s, t] + 2]


@partial(compiled, fastmath={"nnan", "nsz"})
def _relax(
    row: Floats, start: int, cost: float, x: Floats, shift: int, part: float, y: Floats, at: int
) -> None:
    """row[i] = min(row[i], cost + X(i) + Y(i)) for start <= i < row.size.

    X(i) is ``part`` of the way from x[i - shift] to x[i - shift - 1], and Y(i) is y[i - at]; beyond the end
    of x or y its last value stands. No value is a NaN, and saying so lets the loops become vector code.
    """
    x_end, y_end = min(row.size, x.size + shift), min(row.size, y.size + at)
    here, below = 1 - part, part
    if start < min(x_end, y_end):
        size = min(x_end, y_end) - start
        out, near, next_, other = row[start:], x[start - shift :], x[start - shift - 1 :], y[start - at :]
        for i in range(size):
            out[i] = min(out[i], cost + here * near[i] + below * next_[i] + other[i])
        start += size
    if start < x_end:
        out, near, next_ = row[start:], x[start - shift :], x[start - shift - 1 :]
        for i in range(x_end - start):
            out[i] = min(out[i], cost + here * near[i] + below * next_[i] + y[-1])
        start = x_end
    if start < y_end:
        out, other = row[start:], y[start - at :]
        for i in range(y_end - start):
            out[i] = min(out[i], cost + x[-1] + other[i])
        start = y_end
    for i in range(start, row.size):
        row[i] = min(row[i], cost + x[-1] + y[-1])


@compiled
def _fill(a: Arrays, p: Peaks, g: Grid) -> None:
    """Compute ``g.values``: C on the grid, segment after segment from the end of the chain."""
    length = a.forward.size
    zero = np.zeros(1)
    for s in range(length - 1, -1, -1):
        for t in range(s, length):
            row = _row(g, s, t)
            row[:] = np.inf
            first = g.lo[s, t] - 1  # the units of row[0]
            for k in range(a.choices[s]):
                cost = a.forward[s] + a.backward[s] + a.recompute[s, k]
                need = keep_need(a, s, t, k)
                if s == t:
                    _relax(row, max(_units(g, need) - first, 1), cost, zero, 0, 0.0, zero, 0)
                    continue
                # What fits is decided by exact bytes here too, so that the values from lo on are finite.
                need = max(need, a.saved[s, k] + p.least[s + 1, t])
                shift = a.saved[s, k] // g.unit
                part = (a.saved[s, k] - shift * g.unit) / g.unit * g.interpolate
                rest = g.lo[s + 1, t] - 1 + shift - first
                _relax(row, max(_units(g, need) - first, 1), cost, _row(g, s + 1, t), rest, part, zero, 0)
            cost = 0.0
            run = 0
            for j in range(s + 1, t + 1):
                cost += a.forward[j - 1]
                run = max(run, run_need(a, s, t, j - 1))
                need = max(run, a.boundary[j] + p.least[j, t], p.least[s, j - 1])
                start = max(_units(g, need) - first, 1)
                if start >= row.size:
                    continue
                shift = a.boundary[j] // g.unit
                part = (a.boundary[j] - shift * g.unit) / g.unit * g.interpolate
                right = g.lo[j, t] - 1 + shift - first
                left = g.lo[s, j - 1] - 1 - first
                _relax(row, start, cost, _row(g, j, t), right, part, _row(g, s, j - 1), left)
            row[-1] = p.seconds[s, t]
            row[0] = row[1]


@compiled
def _estimate(p: Peaks, g: Grid, s: int, t: int, room: int) -> float:
    """C of s..t with ``room`` bytes above h, by the grid; the caller has seen that P fits."""
    if room >= p.fastest[s, t]:
        return float(p.seconds[s, t])
    row = _row(g, s, t)
    up = -((g.phase - room) // g.unit)  # units, rounded up; always over lo - 1
    i = min(up - (g.lo[s, t] - 1), row.size - 1)
    part = (up * g.unit + g.phase - room) / g.unit
    return float((1 - part) * row[i] + part * row[i - 1])


@compiled
def decide_one(a: Arrays, p: Peaks, g: Grid, s: int, t: int, room: int) -> tuple[int, int]:
    """What to do with s..t and ``room`` bytes above h: (option, 0) to keep s, or (-1, j) to split at j.

    Exact in bytes; only the seconds are the grid's. Ties go to keep, and to the first.
    """
    best, option, at = np.inf, -1, 0
    for k in range(a.choices[s]):
        rest = room - a.saved[s, k]
        if keep_need(a, s, t, k) > room or (t > s and p.least[s + 1, t] > rest):
            continue
        seconds = a.forward[s] + a.backward[s] + a.recompute[s, k]
        if t > s:
            seconds += _estimate(p, g, s + 1, t, rest)
        if seconds < best:
            best, option = seconds, k
    cost = 0.0
    for j in range(s + 1, t + 1):
        cost += a.forward[j - 1]
        if run_need(a, s, t, j - 1) > room:
            break
        rest = room - a.boundary[j]
        if p.least[j, t] > rest or p.least[s, j - 1] > room:
            continue
        seconds = cost + _estimate(p, g, j, t, rest) + _estimate(p, g, s, j - 1, room)
        if seconds < best:
            best, option, at = seconds, -1, j
    return option, at


def filled_grid(a: Arrays, p: Peaks, budget: int, unit: int, interpolate: bool) -> tuple[Grid, float]:
    """The grid of ``unit`` bytes, filled, and its seconds for the whole chain within ``budget``."""
    phase = budget % unit
    root = budget // unit - int(a.boundary[0]) // unit  # units left above x_0
    lo = np.minimum(-((phase - p.least) // unit), root + 1)
    hi = np.maximum(np.minimum(-((phase - p.fastest) // unit), root + 1), lo)
    ends = np.cumsum(np.triu(hi - lo + 2))
    offset = np.concatenate(([0], ends[:-1])).reshape(lo.shape)
    g = Grid(unit, phase, interpolate, lo, hi, offset, np.empty(ends[-1]))
    _fill(a, p, g)
    last = len(a.forward) - 1
    return g, float(_row(g, 0, last)[min(root, hi[0, last]) - lo[0, last] + 1])
