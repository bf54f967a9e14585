"""Checkpoint a loop whose number of steps is not known before it ends.

The problem is that of Stumm & Walther 2010, *New algorithms for optimal online checkpointing*, SIAM Journal
on Scientific Computing 32(2), https://doi.org/10.1137/080742439: c slots, x_0 in one of them; before each
step its input may be held, in the place of another; when the loop has ended after n steps, all of them are
reversed from what is held. The loop runs its last step before it knows that it was the last, so that the
count is that of two phases (``revolve_counts.py``).

Backward. With s_1 .. s_c steps between the boundaries held, 2n + sum of p(s_j, c - j + 1) steps run: each gap
is reversed by Revolve, with all slots but those of the boundaries before it. No schedule that keeps one step
at a time and gives up no held boundary before its turn runs fewer. (Giving some up would help only from a
much worse placement; with the placement below it never did, n up to 600 and c up to 10.)

Placement. Before each step: whatever is held if the loop ends right after it at the least count, of holding
the input of the step in the place of any other, or not at all; ties go to the place of the earliest.

Claims:

* up to n = C(c + 2, 2) steps no online or offline schedule has a lower count (checked for all n and all c
  up to 64; the bound that Stumm & Walther prove for their Algorithm 1). Beyond that no online placement can
  be optimal at each n: the tests show it by exhaustive search for c from 2 to 5, at n = C(c + 2, 2) + 1.
* beyond, the count is near the offline optimum, which knows n: measured, at most 10.4 % above it with 2
  slots, 6 % with 3 and 4, and 3.6 % with 5 or more (all n up to 3000 and c up to 40; no more up to n =
  20000 with 2, 3, 5, 10 and 20). Stumm & Walther's Algorithm 2 and the dynamic placement of Wang, Moin &
  Iaccarino 2009 (https://doi.org/10.1137/080727890) are other answers there, by rules instead of counts.
* not claimed: the least possible ratio to the offline optimum for all n.

A step takes constant time, except where the placement is looked at, every r steps at most (r: the repetitions
that the offline optimum needs): that takes time proportional to c.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from math import comb

from rematplan.scheduler.core.schedule import Action, Checkpoint, Forward, Free
from rematplan.scheduler.solvers.checks import checked_count
from rematplan.scheduler.solvers.revolve_counts import reverse, revolve_runs

__all__ = ["OnlineRevolve"]


@lru_cache(maxsize=2**16)
def _again(steps: int, slots: int) -> int:
    """Return p(l, c): runs that keep nothing, to reverse a segment from its held input."""
    return revolve_runs(steps, slots) - steps


class OnlineRevolve:
    """Where to hold boundaries of a loop of unknown length, and how to reverse it from there.

    Call ``step()`` before each step of the loop and carry out what it says; when the loop is over, carry
    out ``backward_actions()``. All actions together are a legal ``Schedule`` of as many stages as there were
    steps.

    Args:
        slots: c >= 1 boundaries held at most, the initial state among them.

    Attributes:
        slots: as given.
        steps: steps run so far, n.
        held: the boundaries held, first to last; O(slots) memory is all that there is.

    Raises:
        TypeError, ValueError: ``slots`` is no int, or below 1.

    Example:
        >>> loop = OnlineRevolve(slots=2)
        >>> [loop.step() for _ in range(2)]
        [(Checkpoint(stage=0),), (Checkpoint(stage=1),)]
    """

    def __init__(self, slots: int) -> None:
        self.slots = checked_count("OnlineRevolve", "slots", slots)
        self.steps = 0
        self.held: tuple[int, ...] = ()
        self._repetitions = 0  # r that the next step needs if two-phase Revolve had known
        self._reach = self.slots  # C(c + r + 1, c) - 1: the most steps with as few

    def step(self) -> tuple[Action, ...]:
        """Decide on the next step n: hold its input or not, in the place of which other; run it."""
        n = self.steps
        self.steps += 1
        while self.steps > self._reach:
            self._repetitions += 1
            self._reach = comb(self.slots + self._repetitions + 1, self.slots) - 1
        if n < self.slots:
            self.held += (n,)
            return (Checkpoint(n),)
        # In the optimum, no gap but the last of all is that short.
        if n - self.held[-1] < self._repetitions or self.slots == 1:
            return (Forward(n),)
        dropped = self._least_useful(n)
        if dropped == n:
            return (Forward(n),)
        self.held = (*(x for x in self.held if x != dropped), n)
        return (Free(dropped), Checkpoint(n))

    def _least_useful(self, n: int) -> int:
        """Find which of the held boundaries and x_n to do without, if the loop ends after step n."""
        places = (*self.held, n, n + 1)
        sizes = [
            end - start for start, end in pairwise(places)
        ]  # c + 1 gaps; one boundary goes, two gaps join
        after = sum(_again(size, self.slots - i) for i, size in enumerate(sizes[1:]))
        before, best, found = 0, None, n
        for k in range(1, len(sizes)):
            after -= _again(sizes[k], self.slots - k + 1)
            cost = before + _again(sizes[k - 1] + sizes[k], self.slots - k + 1) + after
            if best is None or cost < best:
                best, found = cost, places[k]
            before += _again(sizes[k - 1], self.slots - k + 1)
        return found

    def _segments(self) -> list[tuple[int, int, int]]:
        """Return first step, steps and slots of each gap, were the loop to end here."""
        gaps = pairwise((*self.held, self.steps))
        return [(start, end - start, self.slots - i) for i, (start, end) in enumerate(gaps)]

    @property
    def runs(self) -> int:
        """How often steps run forward, all told, were the loop to end here."""
        return 2 * self.steps + sum(_again(size, slots) for _, size, slots in self._segments())

    def backward_actions(self) -> Iterator[Action]:
        """Reverse all steps run so far: what is left to do, were the loop to end here; O(slots) memory."""
        return reverse(self._segments())
