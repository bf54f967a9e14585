"""Binomial checkpointing (Griewank & Walther 2000), on the chain as if it were uniform.

Source: *Algorithm 799: Revolve*, ACM Transactions on Mathematical Software 26(1), 2000,
https://doi.org/10.1145/347837.347846. With c slots for boundaries (x_0 in one of them) and r the least
number with C(c + r, c) >= n, a chain of n stages is reversed with r·n - C(c + r, r - 1) runs that keep
nothing, besides the n runs that keep one stage each; no schedule that keeps one stage at a time needs
fewer. That is a claim about counts: on a chain whose stages differ it is not optimal, and keeping more
than one stage at a time can beat it even on a uniform one.

Where stages may run only once they are kept, and each maximal run of recomputable stages between them
is reversed with c slots of its own.
"""

from __future__ import annotations

from math import comb

from scheduler.chain import Chain
from scheduler.schedule import Schedule
from scheduler.solvers.persistent import Decision, KeepStage, Split, build, first_fit, run_ends

__all__ = ["schedule_with_slots", "solve"]


def advance(length: int, slots: int) -> int:
    """How many of ``length`` >= 2 stages to run before the next boundary is held (``slots`` >= 1).

    Any number j with C(c+r-2, c) <= j <= C(c+r-1, c) and C(c+r-2, c-1) <= n - j <= C(c+r-1, c-1) is
    optimal (section 3); this is the largest.
    """
    r = 1
    while comb(slots + r, slots) < length:
        r += 1
    return min(comb(slots + r - 1, slots), length - comb(slots + r - 2, slots - 1))


def schedule_with_slots(chain: Chain, slots: int) -> Schedule:
    """The binomial schedule that holds at most ``slots`` >= 1 boundaries, besides the working one."""
    ends = run_ends(chain)

    def decide(s: int, t: int, free: int) -> Decision[int]:
        # ``free`` counts the slots of this segment, the one of x_s among them.
        if s == t or not chain.stages[s].recomputable:
            return KeepStage(0, free)
        if ends[s] < t:
            return Split(ends[s] + 1, free, free)
        return Split(s + advance(t - s + 1, free), free - 1, free)

    return build(len(chain), decide, slots)


def solve(chain: Chain, memory_budget: int) -> Schedule:
    """The binomial schedule with the most slots, and so the fewest runs, that fits.

    Args:
        memory_budget: bytes.

    Raises:
        InfeasibleBudget: no number of slots fits.
    """
    ends = run_ends(chain)
    most = max(end - i for i, end in enumerate(ends)) or 1  # more slots than that change nothing
    schedules = (schedule_with_slots(chain, slots) for slots in range(most, 0, -1))
    return first_fit(chain, memory_budget, schedules, "revolve")
