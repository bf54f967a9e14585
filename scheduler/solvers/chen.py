"""Hold the inputs of segments of nearly equal bytes (Chen, Xu, Zhang & Guestrin 2016).

Source: *Training Deep Nets with Sublinear Memory Cost*, arXiv:1604.06174, Algorithm 3 (memory planning with
budget). Stages are gathered into a segment until what they save exceeds b bytes; there the next one begins.
The last segment is kept as it runs; every other one is run again, keeping all, when it is reversed.

The paper tries a few b around the square root of the bytes held times the bytes of the largest segment. Here
every b that makes a difference is tried: as b grows from segments of one stage, the cuts change next where b
reaches the bytes of the smallest segment that was cut, up to the plain step (one segment).

Claim: the schedule is the fastest of those that Algorithm 3 gives for any b whatever, and
``InfeasibleBudget.smallest`` is the least of their peaks; all by the referee's rules, transients included.
It is not the fastest schedule of segments: the greedy rule knows no seconds. There are at most L·(L + 1)/2
values of b, in practice far fewer, and each takes time proportional to L.

Stages that may run only once are kept, and segments end before them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.candidates import fastest_fit, segment_tree
from rematplan.scheduler.solvers.optimal_peaks import Ints, compiled
from rematplan.scheduler.solvers.persistent import run_ends

__all__ = ["solve"]


@compiled
def cut(saved: Ints, runs: Ints, limit: int, ends: Ints) -> int:
    """Write the segments for b = ``limit`` to ``ends`` (see ``segment_tree``); return the next b, or -1.

    Args:
        saved: (L,) bytes that stay when stage i is kept.
        runs: (L,) for each stage, the last stage of its run: no segment goes beyond it.
    """
    following = -1
    first = gathered = 0
    for i in range(saved.size):
        gathered += saved[i]
        if gathered > limit or i == runs[i]:
            if i < runs[i] and (following < 0 or gathered < following):
                following = gathered
            ends[first : i + 1] = i
            first, gathered = i + 1, 0
    return following


def _trees(chain: Chain) -> Iterator[Ints]:
    """Yield the tree of every b, from the smallest segments to the largest."""
    saved = np.array([stage.options[0].saved for stage in chain.stages], np.int64)
    again = np.array([stage.recomputable for stage in chain.stages])
    runs = np.array(run_ends(again.tolist()), np.int64)
    ends = np.empty(len(chain), np.int64)
    limit, more = -1, True  # every segment exceeds -1
    while more:
        limit = cut(saved, runs, limit, ends)
        yield segment_tree(ends, np.where(again & (ends < len(chain) - 1), 1, 0))
        more = limit >= 0


def solve(chain: Chain, memory_budget: int) -> Schedule:
    """Return the fastest schedule of Algorithm 3, over all b, within ``memory_budget`` bytes.

    Raises:
        InfeasibleBudget: none fits.
        ValueError: sums of the chain's sizes or seconds overflow.
    """
    return fastest_fit(chain, memory_budget, _trees(chain), "chen")
