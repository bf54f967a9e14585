"""Apply binomial checkpointing (Griewank & Walther 2000) to the chain as if it were uniform.

``revolve_counts.py`` has the source and the claim about counts: with c slots for boundaries, x_0 in one of
them, no schedule that keeps one stage at a time runs fewer stages. On a chain whose stages differ that is no
claim about seconds, and keeping more than one stage at a time can beat it even on a uniform one.

Claim: of the binomial schedules for c = 1, 2, .. slots the fastest that fits is returned, and
``InfeasibleBudget.smallest`` is the least of their peaks. Neither seconds nor peaks need be monotone in c
where stages differ, so all c are priced.

Stages that may run only once are kept, and each maximal run of the others is reversed with c slots of its
own.
"""

from __future__ import annotations

import numpy as np

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.candidates import fastest_fit, trees_by_runs
from rematplan.scheduler.solvers.optimal_peaks import Ints, compiled
from rematplan.scheduler.solvers.revolve_counts import advance

__all__ = ["binomial_tree", "solve"]


@compiled
def binomial_tree(length: int, slots: int) -> Ints:
    """Return the tree with at most ``slots`` >= 1 boundaries held, the input's among them."""
    tree = np.zeros(2 * length - 1, np.int64)
    stack = np.empty((length, 3), np.int64)  # first stage, stages and slots of the segments still to do
    stack[0] = 0, length, slots
    depth = 1
    for node in range(tree.size):
        depth -= 1
        s, n, c = stack[depth]
        if n == 1:
            continue
        j = advance(n, min(c, n - 1))
        tree[node] = s + j
        stack[depth] = s, j, c
        stack[depth + 1] = s + j, n - j, c - 1
        depth += 2
    return tree


def solve(chain: Chain, memory_budget: int) -> Schedule:
    """Return the fastest binomial schedule, over all numbers of slots, within ``memory_budget`` bytes.

    Raises:
        InfeasibleBudget: no number of slots fits.
        ValueError: sums of the chain's sizes or seconds overflow.
    """
    # A run of n stages needs n - 1 slots at most.
    trees = trees_by_runs(chain, binomial_tree, lambda longest: range(max(longest - 1, 1), 0, -1))
    return fastest_fit(chain, memory_budget, trees, "revolve")
