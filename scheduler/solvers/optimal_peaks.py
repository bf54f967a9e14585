"""The dynamic program behind ``optimal.py``: the chain as arrays, equal segments found, P and A.

``optimal.py`` has the recurrence and the names, ``optimal_seconds.py`` the seconds. A segment s..t is written
in bytes above its *base*: what is held (h) and ``after[t]``, what lives once stages t+1.. are reversed. So
written, all that counts lies in the segment itself, and equal segments (the same blocks elsewhere in a
transformer) have equal tables: each is computed once, at its *origin*.

Segments are computed in blocks of TILE values of s, from the end of the chain; in each by t, then by s from
above.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rematplan.scheduler.core.chain import Chain, Stage
from rematplan.scheduler.solvers.checks import MOST_BYTES, checked_sums

__all__ = [
    "NEVER",
    "Arrays",
    "Floats",
    "Ints",
    "Peaks",
    "arrays_of",
    "compiled",
    "keep_need",
    "peaks_of",
    "quickest",
    "run_need",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TILE = 8
NEVER = np.int64(MOST_BYTES)  # of no chain that ``arrays_of`` takes

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F, **options: Any) -> F:
    """Compile ``function`` at its first call, and keep it on disk where a place can be written."""
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba's word for: neither the package's folder nor the user's can be written
        return njit(**options)(function)


class Arrays(NamedTuple):
    """The chain in sums for compiled code. L stages, at most K options; seconds as floats, bytes as ints.

    What follows ``after`` is for tables of segments, and empty for solvers that have none.
    """

    forward: Floats  # (L,)
    backward: Floats  # (L,)
    boundary: Ints  # (L + 1,)
    grad: Ints  # (L + 1,) gradients of the boundaries
    recomputable: NDArray[np.bool_]  # (L,)
    running: Ints  # (L,) what a run that keeps nothing adds: its output and its transient
    choices: Ints  # (L,) number of options
    saved: Ints  # (L, K)
    recompute: Floats  # (L, K)
    forward_overhead: Ints  # (L, K)
    rerun_overhead: Ints  # (L, K) the same just before the backward
    backward_overhead: Ints  # (L, K)
    first: Ints  # (L,) bytes above base while stage i runs for the first time: never over 0
    after: Ints  # (L,) fixed and long-lived bytes once stages i+1.. are reversed
    ahead: Floats  # (L + 1,) seconds of the forwards of the stages before i
    quick: Floats  # (L + 1,) seconds of the fastest options' recomputation of the stages before i
    fastest: Ints  # (L,) the option of least recomputation
    kept: Ints  # (L + 1,) bytes saved under the fastest options by the stages before i
    run: Ints  # (2, L, L) see ``run_need``
    split: NDArray[
        np.bool_
    ]  # (L + 1,) boundaries at which the grid tries splits; the output always counts as one
    origin: Ints  # (L, L) where the segment equal to s..t starts whose tables count for both


class Peaks(NamedTuple):
    """What needs no memory axis, for each segment s..t: (L, L), bytes above its base."""

    least: Ints  # P
    least_to: Ints  # P, by t and s
    fastest: Ints  # A


def _origins(chain: Chain, split: NDArray[np.bool_]) -> Ints:
    """Return (L, L) for s..t the s' of the first of those computed that have the same stages in it.

    A segment that ends the chain runs first when there is no gradient yet: it equals none but itself.
    """
    length = len(chain)
    known: dict[Any, int] = {}
    keys = []
    for i, stage in enumerate(chain.stages):
        options = tuple(
            (o.saved, o.recompute, o.forward_overhead, o.backward_overhead, o.transient(again=True))
            for o in stage.options
        )
        numbers = (stage.forward, stage.backward, stage.input, stage.forward_overhead, stage.input_grad)
        after = (
            stage.retained,
            stage.recomputable,
            chain.input_bytes(i + 1),
            chain.grad_bytes(i + 1),
            split[i],
        )
        keys.append(known.setdefault((*numbers, *after, options), len(known)))
    origin = np.tile(np.arange(length)[:, None], (1, length))
    if len(known) == length:
        return origin
    key = np.array(keys)
    same = np.zeros(length, np.int64)  # the class of the segment of the last length that starts at s
    for size in range(length - 1):
        starts = np.arange(length - 1 - size)
        content = same[starts] * len(known) + key[starts + size]
        in_order = np.lexsort((starts, -(starts // TILE)))
        _, first, place = np.unique(content[in_order], return_index=True, return_inverse=True)
        same = np.empty_like(place)
        same[in_order] = place
        origin[starts, starts + size] = in_order[first[same]]
    return origin


def quickest(stage: Stage) -> int:
    """Return the option of least recomputation, and of those the smallest."""
    return min(range(len(stage.options)), key=lambda k: (stage.options[k].recompute, stage.options[k].saved))


def arrays_of(call: str, chain: Chain, window: int = 0) -> Arrays:
    """Return the chain as arrays.

    Args:
        call: whose error it is that sums overflow.
        window: the grid tries splits at the smallest of every ``window`` boundaries; 0 for no tables of
            segments.

    Raises:
        ValueError: the sizes or seconds of the chain could overflow.
    """
    checked_sums(call, chain)
    stages = chain.stages
    length = len(stages)
    options = [option for stage in stages for option in stage.options]
    choices = np.array([len(stage.options) for stage in stages], np.int64)
    exists = np.arange(choices.max()) < choices[:, None]

    def table(field: str, dtype: type = np.int64) -> NDArray[Any]:
        """Return (L, K), 0 where a stage has fewer than K options."""
        found: NDArray[Any] = np.zeros(exists.shape, dtype)
        found[exists] = list(map(attrgetter(field), options))
        return found

    def each(field: str, dtype: type = np.int64) -> NDArray[Any]:
        return np.array(list(map(attrgetter(field), stages)), dtype)

    rerun = np.zeros(exists.shape, np.int64)
    rerun[exists] = [option.transient(again=True) for option in options]
    carried = each("carried")
    retained = each("retained")
    boundary = np.array([chain.input_bytes(i) for i in range(length + 1)], np.int64)
    first = np.cumsum(carried) - carried.sum()
    running = boundary[1:] + each("forward_overhead")
    quick = [quickest(stage) for stage in stages]
    chosen = [stage.options[k] for stage, k in zip(stages, quick, strict=True)]
    split = np.zeros(length + 1, np.bool_)
    split[length] = True
    for j in range(1, length, window) if window else ():
        split[j + np.argmin(boundary[j : min(j + window, length)])] = True
    recomputable = each("recomputable", np.bool_)
    return Arrays(
        forward=each("forward", np.float64),
        backward=each("backward", np.float64),
        boundary=boundary,
        grad=np.array([chain.grad_bytes(i) for i in range(length + 1)], np.int64),
        recomputable=recomputable,
        running=running,
        choices=choices,
        saved=table("saved"),
        recompute=table("recompute", np.float64),
        forward_overhead=table("forward_overhead"),
        rerun_overhead=rerun,
        backward_overhead=table("backward_overhead"),
        first=first,
        after=chain.fixed + carried.sum() + np.cumsum(retained[::-1])[::-1] - retained,
        ahead=np.concatenate(([0.0], np.cumsum([stage.forward for stage in stages]))),
        quick=np.concatenate(([0.0], np.cumsum([option.recompute for option in chosen]))),
        fastest=np.array(quick, np.int64),
        kept=np.cumsum([0, *(option.saved for option in chosen)], dtype=np.int64),
        run=_runs(boundary[:-1], running, first, recomputable) if window else np.empty((2, 0, 0), np.int64),
        split=split,
        origin=_origins(chain, split) if window else np.empty((0, 0), np.int64),
    )


def _runs(boundary: Ints, running: Ints, first: Ints, recomputable: NDArray[np.bool_]) -> Ints:
    """Return (2, L, L) the most bytes above base while stages s..i run from x_s; see ``run_need``."""
    length = len(running)
    run = np.empty((2, length, length), np.int64)
    for which, base in enumerate((np.zeros_like(first), first)):
        here = np.where(recomputable, boundary + running + base, NEVER)
        on_the_way = np.triu(np.broadcast_to(here, (length, length)), 1)
        # x_s itself is in h, not above it.
        np.fill_diagonal(on_the_way, np.where(recomputable, here - boundary, NEVER))
        lowest = -NEVER * np.tri(length, k=-1, dtype=np.int64)
        run[which] = np.maximum.accumulate(on_the_way + lowest, axis=1)
    return run


@compiled
def keep_need(a: Arrays, s: int, t: int, k: int, x: int = 0, back: int = 0) -> int:
    """Return bytes above base to keep stage s of s..t with option k, and to reverse it after s+1..t.

    Args:
        x, back: bytes of what has x_s in it, unless it is in h, when s runs and when it is reversed.
    """
    # A segment that ends at L-1 runs before any backward: no gradient yet, long-lived bytes so far.
    now = a.first[s] if t == a.first.size - 1 else a.grad[t + 1]
    # A stage that ends a segment, but for the last of the chain, is run again just before its backward.
    again = s == t and t < a.first.size - 1
    now += a.rerun_overhead[s, k] if again else a.forward_overhead[s, k]
    backward = a.after[s] - a.after[t] + a.grad[s + 1] + a.grad[s] + a.backward_overhead[s, k]
    return int(a.saved[s, k] + max(x + now, back + backward))


@compiled
def run_need(a: Arrays, s: int, t: int, j: int) -> int:
    """Return bytes above base to run stages s..j-1 of s..t, from x_s in h; NEVER or more if one runs once."""
    if t == a.first.size - 1:
        return int(a.run[1, s, j - 1])
    return int(a.run[0, s, j - 1] + a.grad[t + 1])


@compiled
def peaks_of(a: Arrays, split: NDArray[np.bool_]) -> Peaks:
    """Return the tables P and A, for splits at ``split`` (L + 1,) and segments that end there."""
    length = a.first.size
    least = np.full((length, length), NEVER)
    least_to = np.full((length, length), NEVER)
    fastest = np.full((length, length), NEVER)
    for block in range((length - 1) // TILE, -1, -1):
        low, high = block * TILE, min(block * TILE + TILE, length) - 1
        for t in range(low, length):
            if not split[t + 1]:
                continue
            for s in range(min(high, t), low - 1, -1):
                o = a.origin[s, t]
                if o != s:
                    least[s, t] = least_to[t, s] = least[o, o + t - s]
                    fastest[s, t] = fastest[o, o + t - s]
                    continue
                best = int(NEVER)
                for k in range(a.choices[s]):
                    peak = keep_need(a, s, t, k)
                    if t > s:
                        peak = max(peak, a.saved[s, k] + least[s + 1, t])
                    best = min(best, peak)
                quick = a.fastest[s]
                fastest[s, t] = keep_need(a, s, t, quick)
                if t > s:
                    fastest[s, t] = max(fastest[s, t], a.saved[s, quick] + fastest[s + 1, t])
                run, base = (a.run[1, s], 0) if t == length - 1 else (a.run[0, s], a.grad[t + 1])
                for j in range(s + 1, t + 1):
                    if split[j]:
                        left = least[s, j - 1] + a.after[j - 1] - a.after[t]
                        best = min(best, max(run[j - 1] + base, a.boundary[j] + least_to[t, j], left))
                least[s, t] = least_to[t, s] = best
    return Peaks(least, least_to, fastest)
