"""Solvers: Chain and budget in, Schedule out. Nothing here imports torch.

To add a solver, write one file with ``solve(chain, memory_budget) -> Schedule`` and one line in SOLVERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from types import MappingProxyType

from scheduler.chain import Chain
from scheduler.schedule import Schedule, simulate
from scheduler.solvers import keep_all, optimal, revolve, sqrt

__all__ = ["SOLVERS", "Solver", "solve_chain"]


@dataclass(frozen=True, slots=True)
class Solver:
    """A solver and what it can do.

    Attributes:
        name: its key in SOLVERS.
        solve: chain and budget (bytes) to schedule; raises InfeasibleBudget.
        summary: one line.
        exact: whether it claims the least seconds of all persistent schedules.
        options: whether it chooses among a stage's options; others keep all or nothing.
        uniform_only: whether it treats all stages as alike.
        two_level: whether it uses a second memory.
    """

    name: str
    solve: Callable[[Chain, int], Schedule]
    summary: str
    exact: bool = False
    options: bool = False
    uniform_only: bool = False
    two_level: bool = False


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        solver.name: solver
        for solver in (
            Solver("optimal", optimal.solve, "fastest persistent schedule", exact=True, options=True),
            Solver("revolve", revolve.solve, "binomial checkpointing", uniform_only=True),
            Solver("sqrt", sqrt.solve, "segments of √n stages, inputs held", uniform_only=True),
            Solver("keep_all", keep_all.solve, "the plain step"),
        )
    }
)


def solve_chain(chain: Chain, memory_budget: int, solver: str = "optimal") -> Schedule:
    """A schedule of ``chain`` whose peak, by the referee, is at most ``memory_budget``.

    Args:
        chain: what each stage costs.
        memory_budget: bytes of the whole step, ``chain.fixed`` included.
        solver: a key of ``SOLVERS``.

    Returns:
        the Schedule.

    Raises:
        TypeError: the budget is not an int.
        ValueError: the budget is not in 1 .. 2**63 - 1, or there is no such solver.
        InfeasibleBudget: no schedule of this solver fits; ``smallest`` says what would.
    """
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, Integral):
        raise TypeError(f"solve_chain: memory_budget={memory_budget!r} must be an int number of bytes")
    budget = int(memory_budget)
    if not 0 < budget < 2**63:
        raise ValueError(f"solve_chain: memory_budget={budget} must be in 1 .. 2**63 - 1 (bytes)")
    if solver not in SOLVERS:
        raise ValueError(f"solve_chain: no solver {solver!r}; there are {', '.join(SOLVERS)}")
    schedule = SOLVERS[solver].solve(chain, budget)
    peak = simulate(chain, schedule).peak
    if peak > budget:
        raise RuntimeError(
            f"internal: solver {solver!r} returned a schedule of {peak} bytes for a budget of {budget}; "
            "please report this with Chain.to_json()"
        )
    return schedule
