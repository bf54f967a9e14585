"""Reverse any number of steps by binomial checkpointing, action by action (Griewank & Walther 2000).

Source: *Algorithm 799: Revolve*, ACM Transactions on Mathematical Software 26(1), 2000,
https://doi.org/10.1145/347837.347846. All steps cost the same, a slot holds one boundary, and one step at a
time is kept (recorded) and reversed at once.

*Slots* include the one of the initial state x_0, which is never given up before the end; the working
boundary, and the step that is being reversed, are outside them. Solvers that take the input as given have
one slot fewer.

There are two conventions of the last forward:

* one sweep (``two_phase=False``): the first sweep ends by keeping its last step, which is reversed at once.
  With p(l, c) = r·l - C(c + r, r - 1) and r the least number with C(c + r, c) >= l, the steps run l + p(l, c)
  times: l times keeping, p(l, c) times not. No schedule that keeps one step at a time needs fewer
  (Theorem 1). That is a claim about counts of equal steps, and about such schedules only.
* two phases (``two_phase=True``): the first sweep runs all l steps, keeps none and loses its last state, as
  the forward of an ``autograd.Function`` does; every step is run again to be kept. With segments of s_1 ..
  s_k steps, k <= c, between the boundaries that the sweep leaves held, the steps run 2·l + sum of
  p(s_j, c - j + 1) times. p is convex in l, with slope r from C(c + r - 1, c) to C(c + r, c), so that
  segments that fill these slopes evenly make the sum least; no two-phase schedule needs fewer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import comb

import numpy as np

from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Forward, Keep
from rematplan.scheduler.solvers.checks import checked_count
from rematplan.scheduler.solvers.optimal_peaks import Ints, compiled

__all__ = ["PACKED", "advance", "repetitions", "reverse", "revolve_actions", "revolve_packed", "revolve_runs"]

PACKED = (Forward, Checkpoint, Keep, Backward)  # the kinds in ``revolve_packed``
FORWARD, CHECKPOINT, KEEP, BACKWARD = range(4)
RUN, HOLD = -1, -2  # what ``_fill`` is to do besides reversing segments

PACKED_STEPS = 2**31 - 1  # the products of ``advance`` stay below 2**62
CHUNK = 2**16  # actions
POOL = 2**14  # actions


def _checked(call: str, steps: int, slots: int) -> tuple[int, int]:
    """Return both as plain ints, no more slots than are of use; or an error that names ``call``."""
    steps = checked_count(call, "steps", steps)
    return steps, min(checked_count(call, "slots", slots), steps)


def _least(enough: Callable[[int], bool]) -> int:
    """Return the least r >= 0 that is enough, in time logarithmic in it."""
    below, r = -1, 0  # nothing up to ``below`` is enough
    while not enough(r):
        below, r = r, 2 * r + 1
    while r - below > 1:
        middle = (below + r) // 2
        below, r = (below, middle) if enough(middle) else (middle, r)
    return r


def repetitions(steps: int, slots: int) -> int:
    """Return r: the least number with C(slots + r, slots) >= steps."""
    return _least(lambda r: comb(slots + r, slots) >= steps)


def _sweep(steps: int, slots: int) -> list[tuple[int, int, int]]:
    """Cut into the segments (first step, steps, slots) that the first of two phases leaves held."""
    # With r repetitions at most, C(c + r, c) + .. + C(1 + r, 1) = C(c + r + 1, c) - 1 steps are reached.
    r = _least(lambda r: comb(slots + r + 1, slots) > steps)
    segments = []
    start, left = 0, steps - sum(comb(c + r - 1, c) for c in range(slots, 0, -1))
    for c in range(slots, 0, -1):
        size = comb(c + r - 1, c)
        more = min(left, comb(c + r, c) - size)
        segments.append((start, size + more, c))
        start, left = start + size + more, left - more
    return segments


def revolve_runs(steps: int, slots: int, *, two_phase: bool = False) -> int:
    """Return how often steps run forward, all told, by the closed form; exact at any size.

    Args:
        steps: l >= 1.
        slots: c >= 1 boundaries that may be held, the initial state among them.
        two_phase: the convention of the last forward, see the module.

    Raises:
        TypeError, ValueError: not an int, or below 1.
    """
    steps, slots = _checked("revolve_runs", steps, slots)
    if two_phase:
        return steps + sum(revolve_runs(n, c) for _, n, c in _sweep(steps, slots))
    r = repetitions(steps, slots)
    return steps + (r * steps - comb(slots + r, r - 1) if r else 0)


def revolve_actions(steps: int, slots: int, *, two_phase: bool = False) -> Iterator[Action]:
    """Return the schedule of fewest runs, action after action; O(slots) memory, nothing computed ahead.

    As a ``Schedule`` it is what the referee accepts for a chain of ``steps`` stages. Any number of steps will
    do: the arithmetic is in Python's ints. A split of n steps with c slots goes on for j steps, where
    C(c+r-2, c) <= j <= C(c+r-1, c) and C(c+r-2, c-1) <= n - j <= C(c+r-1, c-1); any such j is optimal
    (section 3), this takes the largest.

    Args:
        steps: l >= 1.
        slots: c >= 1 boundaries held at most, the initial state among them.
        two_phase: the convention of the last forward, see the module.

    Raises:
        TypeError, ValueError: at once; not an int, or below 1.

    Example:
        >>> [type(action).__name__ for action in revolve_actions(2, 1)]
        ['Checkpoint', 'Keep', 'Backward', 'Keep', 'Backward']
    """
    return _actions(*_checked("revolve_actions", steps, slots), two_phase)


def _actions(steps: int, slots: int, two_phase: bool) -> Iterator[Action]:
    segments = [(0, steps, slots)]
    if two_phase:
        segments = _sweep(steps, slots)
        for start, n, _ in segments:
            yield Checkpoint(start)
            yield from map(Forward, range(start + 1, start + n))
    yield from reverse(segments)


def reverse(segments: Iterable[tuple[int, int, int]]) -> Iterator[Action]:
    """Reverse segments, the last one first.

    Args:
        segments: first step, whose input is there; steps; and slots, the one of that input among them.
    """
    # Segments still to reverse, the last on top: first step, steps n, slots c, some r, and C(c + r - 1, c).
    stack = []
    for start, n, c in segments:
        r = repetitions(n, c)
        stack.append((start, n, c, r, comb(c + r - 1, c)))
    base = end = 0
    pool: list[
        Forward
    ] = []  # the actions of steps base..end-1, made once: short segments run them again and again
    while stack:
        start, n, c, r, most = stack.pop()
        if n <= POOL and not base <= start < end:
            base, end = start, start + n
            pool = list(map(Forward, range(base, end)))
        while n > 1:
            while most >= n:  # r repetitions are more than it takes
                most = most * (r - 1) // (c + r - 1)
                r -= 1
            rest = most * c // (c + r - 1)  # C(c + r - 2, c - 1)
            j = min(most, n - rest)
            yield Checkpoint(start)
            if base <= start < end:
                yield from pool[start + 1 - base : start + j - base]
            else:
                yield from map(Forward, range(start + 1, start + j))
            stack.append((start, j, c, r, most))
            start, n, c, most = start + j, n - j, c - 1, rest
        yield Keep(start)
        yield Backward(start)


@compiled
def advance(n: int, c: int) -> int:
    """Return how many of n >= 2 steps to run before the next boundary is held: the j of ``revolve_actions``.

    For n up to PACKED_STEPS and c < n: then c + r <= n, and no product here reaches 2**62.
    """
    if c == 1:
        return n - 1
    r, reach = 1, c + 1  # C(c + r, c)
    while reach < n:
        r += 1
        reach = reach * (c + r) // r
    most = reach * r // (c + r)  # C(c + r - 1, c)
    return min(most, n - most * c // (c + r - 1))


@compiled
def _fill(stack: Ints, depth: int, out: Ints) -> tuple[int, int]:
    """Write actions to ``out`` until it or the stack is full, or all is done; return depth and actions.

    A row of the stack is (first step, steps, c): with c >= 0 a segment to reverse with c slots, with RUN
    steps to run forward, with HOLD the same, the input of the first held.
    """
    size, room = 0, out.shape[1]
    while depth and size + 2 <= room and depth + 2 <= stack.shape[0]:
        depth -= 1
        start, n, c = stack[depth]
        if c < 0:
            count = min(n, room - size)
            for i in range(count):
                out[0, size + i] = FORWARD
                out[1, size + i] = start + i
            if c == HOLD:
                out[0, size] = CHECKPOINT
            size += count
            if count < n:
                stack[depth] = start + count, n - count, RUN
                depth += 1
        elif n == 1:
            out[0, size], out[1, size] = KEEP, start
            out[0, size + 1], out[1, size + 1] = BACKWARD, start
            size += 2
        else:
            j = advance(n, min(c, n - 1))
            stack[depth] = start, j, c
            stack[depth + 1] = start + j, n - j, c - 1
            stack[depth + 2] = start, j, HOLD
            depth += 3
    return depth, size


def revolve_packed(steps: int, slots: int, *, two_phase: bool = False, chunk: int = CHUNK) -> Iterator[Ints]:
    """Return the actions of ``revolve_actions``, packed: many times faster, in the same memory.

    Args:
        steps: 1 <= l <= 2**31 - 1.
        slots: c >= 1 boundaries held at most, the initial state among them.
        two_phase: the convention of the last forward, see the module.
        chunk: most actions at a time, at least 2.

    Returns:
        an iterator of arrays (2, up to chunk) int64: row 0 the kinds, as indices into ``PACKED``; row 1 the
        stages.

    Raises:
        TypeError, ValueError: at once; not an int, or out of range.
    """
    steps, slots = _checked("revolve_packed", steps, slots)
    if steps > PACKED_STEPS:
        raise ValueError(
            f"revolve_packed: steps={steps} must be at most 2**31 - 1; revolve_actions takes any number"
        )
    return _packed(steps, slots, two_phase, checked_count("revolve_packed", "chunk", chunk, 2))


def _packed(steps: int, slots: int, two_phase: bool, chunk: int) -> Iterator[Ints]:
    rows = [(0, steps, slots)]
    if two_phase:
        rows = _sweep(steps, slots)
        rows += [(start, n, HOLD) for start, n, _ in reversed(rows)]  # the sweep, its first part on top
    depth = len(rows)
    stack = np.array(rows + [(0, 0, 0)] * 32, np.int64)
    while depth:
        if depth + 2 > len(stack):
            stack = np.concatenate([stack, stack])
        out = np.empty((2, chunk), np.int64)
        depth, size = _fill(stack, depth, out)
        if size:
            yield out[:, :size]
