"""Reverse segments recursively: O(log n) boundaries held, O(n log n) stages run (Chen et al. 2016).

Source: Chen, Xu, Zhang & Guestrin, *Training Deep Nets with Sublinear Memory Cost*, arXiv:1604.06174, section
4.2. A segment of n stages holds k boundaries that cut it into k + 1 parts of (nearly) equal length, and each
part is reversed in the same way, from the last to the first, down to single stages. With g(n) = k + g(n / (k
+ 1)), at most k·⌈log_{k+1} n⌉ boundaries are held at once, besides the input of the chain, and each stage
runs at most once more per level.

Claim: of the schedules for k = 1 .. n - 1 the fastest that fits is returned, and
``InfeasibleBudget.smallest`` is the least of their peaks. Positions count, seconds and bytes do not:
``revolve`` needs no more runs for as many boundaries.

Stages that may run only once are kept, and each maximal run of the others is reversed in this way.
"""

from __future__ import annotations

import numpy as np

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.candidates import fastest_fit, trees_by_runs
from rematplan.scheduler.solvers.optimal_peaks import Ints, compiled

__all__ = ["solve"]


@compiled
def recursive_tree(length: int, inner: int) -> Ints:
    """Return the tree in which every segment holds ``inner`` boundaries, or all it has."""
    tree = np.zeros(2 * length - 1, np.int64)
    stack = np.empty((length, 3), np.int64)  # segments s..t and how many parts they are still to be cut into
    stack[0] = 0, length - 1, 1
    depth = 1
    for node in range(tree.size):
        depth -= 1
        s, t, parts = stack[depth]
        if s == t:
            continue
        if parts == 1:  # a part of a longer segment is a segment of its own
            parts = min(inner + 1, t - s + 1)
        at = s + (t - s + parts) // parts  # the first part is the longest
        tree[node] = at
        stack[depth] = s, at - 1, 1
        stack[depth + 1] = at, t, parts - 1
        depth += 2
    return tree


def solve(chain: Chain, memory_budget: int) -> Schedule:
    """Return the fastest recursive schedule, over all k, within ``memory_budget`` bytes.

    Raises:
        InfeasibleBudget: no k fits.
        ValueError: sums of the chain's sizes or seconds overflow.
    """
    trees = trees_by_runs(chain, recursive_tree, lambda longest: range(1, max(longest, 2)))
    return fastest_fit(chain, memory_budget, trees, "recursive")
