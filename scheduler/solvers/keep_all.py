"""Keep everything: the plain training step, as a schedule."""

from __future__ import annotations

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.persistent import build, first_fit

__all__ = ["solve"]


def solve(chain: Chain, memory_budget: int) -> Schedule:
    """Run every stage once, keeping all its saved tensors (option 0), within ``memory_budget`` bytes.

    Raises:
        InfeasibleBudget: the plain step does not fit.
    """
    return first_fit(chain, memory_budget, [build(len(chain), lambda s, t: (0, 0))], "keep_all")
