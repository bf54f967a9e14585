"""Hold the inputs of √n segments of √n stages (Chen, Xu, Zhang & Guestrin 2016).

Source: *Training Deep Nets with Sublinear Memory Cost*, arXiv:1604.06174, section 3: ⌈√n⌉ segments of
(nearly) equal length; the last one is kept as it runs, every other one is run again, keeping all, when it is
reversed. One extra forward of all but the last segment.

No claim of optimality: positions count, seconds and bytes do not. Where stages may run only once, each
maximal run of recomputable stages between them is cut into its own √n segments.
"""

from __future__ import annotations

import math

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.persistent import build, first_fit, run_ends

__all__ = ["solve"]


def segment_ends(chain: Chain) -> list[int]:
    """Return (L,) for each stage, the last stage of its segment."""
    ends: list[int] = []
    runs = run_ends([stage.recomputable for stage in chain.stages])
    while len(ends) < len(chain):
        first = len(ends)
        length = runs[first] + 1 - first
        segments = math.isqrt(length - 1) + 1  # the square root, rounded up
        # Segment p of a run holds its stages ⌊p·n/k⌋ .. ⌊(p+1)·n/k⌋ - 1.
        for p in range(segments):
            last = first + (p + 1) * length // segments - 1
            ends.extend([last] * (last + 1 - len(ends)))
    return ends


def solve(chain: Chain, memory_budget: int) -> Schedule:
    """Return the √n schedule, within ``memory_budget`` bytes.

    Raises:
        InfeasibleBudget: it does not fit; there is only one such schedule.
    """
    ends = segment_ends(chain)

    def decide(s: int, t: int) -> tuple[int, int]:
        return (0, 0) if ends[s] >= t or not chain.stages[s].recomputable else (-1, ends[s] + 1)

    return first_fit(chain, memory_budget, [build(len(chain), decide)], "sqrt")
