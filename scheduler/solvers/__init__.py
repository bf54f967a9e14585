"""Solvers: Chain and budget in, Schedule out. Nothing here imports torch.

``SOLVERS`` has all that schedule a chain, with what each can do; ``solve_chain`` is the entry to them. Beside
it: ``compare.compare`` (all solvers at several budgets), ``frontier.pareto`` (every budget at once),
``hrevolve.solve_uniform`` (uniform chains with slots in memory and on disk), and the loops of
``revolve_actions``, ``revolve_packed`` and ``OnlineRevolve``.

To add a solver, write one file with ``solve(chain, memory_budget) -> Schedule`` and one line in SOLVERS. What
else a solver may be told (``periodic`` its period, ``selective`` its predicate) are keyword arguments of its
``solve``, named in ``Solver.parameters``, and reach it through ``solve_chain(..., **parameters)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, overload

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers import (
    chen,
    exhaustive,
    keep_all,
    optimal,
    periodic,
    recursive,
    revolve,
    selective,
    sqrt,
    two_level,
)
from rematplan.scheduler.solvers.checks import checked_budget, checked_chain
from rematplan.scheduler.solvers.online import OnlineRevolve
from rematplan.scheduler.solvers.revolve_counts import revolve_actions, revolve_packed, revolve_runs

__all__ = [
    "SOLVERS",
    "OnlineRevolve",
    "Solver",
    "revolve_actions",
    "revolve_packed",
    "revolve_runs",
    "solve_chain",
]


@dataclass(frozen=True, slots=True)
class Solver:
    """A solver and its properties.

    Attributes:
        name: its key in SOLVERS.
        solve: chain and budget (bytes) to schedule; raises InfeasibleBudget.
        summary: one line.
        exact_in: the class of schedules of which it claims the one of least seconds, or close to it with a
            bound on the loss where sizes must be rounded (its module says where); "" if it claims none.
        options: whether it chooses among a stage's options; others keep all or nothing.
        two_level: whether it uses a second memory.
        parameters: names of the keyword arguments that its ``solve`` takes.
        required: those of them without a default.
        most_stages: stages of the longest chain that it takes; 0 if any length will do.
        executable: whether executors can follow its schedules. They cannot release what autograd holds
            unless it is on the host.
        solve_many: chain and budgets to schedules, where that is quicker than one by one.
    """

    name: str
    solve: Callable[..., Schedule]
    summary: str
    exact_in: str = ""
    options: bool = False
    two_level: bool = False
    parameters: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    most_stages: int = 0
    executable: bool = True
    solve_many: Callable[..., list[Schedule]] | None = None

    @property
    def exact(self) -> bool:
        """Whether it claims the least seconds of a whole class of schedules, as ``exact_in`` says."""
        return bool(self.exact_in)


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        solver.name: solver
        for solver in (
            Solver(
                "optimal",
                optimal.solve,
                "fastest persistent schedule",
                "persistent schedules",
                options=True,
                most_stages=optimal.MOST_STAGES,
                solve_many=optimal.solve_many,
            ),
            Solver("revolve", revolve.solve, "binomial checkpointing"),
            Solver("sqrt", sqrt.solve, "segments of √n stages, inputs held"),
            Solver("keep_all", keep_all.solve, "the plain step"),
            Solver("chen", chen.solve, "segments of nearly equal bytes, inputs held"),
            Solver("recursive", recursive.solve, "segments within segments, k boundaries each"),
            Solver("periodic", periodic.solve, "a checkpoint every k stages", parameters=("every",)),
            Solver(
                "selective",
                selective.solve,
                "stages kept by name, the others recomputed",
                parameters=("keep",),
                required=("keep",),
            ),
            Solver(
                "exhaustive",
                exhaustive.solve,
                "fastest schedule of all, for short chains",
                "all schedules",
                options=True,
                parameters=("states",),
                most_stages=exhaustive.MOST_STAGES,
                executable=False,
            ),
            Solver(
                "two_level",
                two_level.solve,
                "recomputation and copies to a second memory",
                "schedules whose first sweep decides the copies, if those are synchronous",
                options=True,
                two_level=True,
                parameters=("host",),
                required=("host",),
                most_stages=two_level.MOST_STAGES,
            ),
        )
    }
)


def checked_solver(
    call: str, solver: str, parameters: Mapping[str, Any], chain: Chain | None = None
) -> Solver:
    """Return the solver of that name, fit for parameters and chain; or an error that names ``call``."""
    if solver not in SOLVERS:
        raise ValueError(f"{call}: no solver {solver!r}; there are {', '.join(SOLVERS)}")
    found = SOLVERS[solver]
    known = f"it takes {', '.join(found.parameters) or 'none'}"
    for name in parameters:
        if name not in found.parameters:
            raise TypeError(f"{call}: solver {solver!r} has no parameter {name!r}; {known}")
    for name in found.required:
        if name not in parameters:
            raise TypeError(f"{call}: solver {solver!r} needs the parameter {name!r}; {known}")
    if chain is not None and 0 < found.most_stages < len(chain):
        raise ValueError(
            f"{call}: solver {solver!r} takes chains of up to {found.most_stages} stages, got {len(chain)}; "
            "choose another solver, or merge stages"
        )
    return found


@overload
def solve_chain(chain: Chain, memory_budget: int, solver: str = "optimal", **parameters: Any) -> Schedule: ...


@overload
def solve_chain(
    chain: Chain, memory_budget: Sequence[int], solver: str = "optimal", **parameters: Any
) -> list[Schedule]: ...


def solve_chain(
    chain: Chain, memory_budget: int | Sequence[int], solver: str = "optimal", **parameters: Any
) -> Schedule | list[Schedule]:
    """Return a schedule of ``chain`` whose peak, by the referee, is at most ``memory_budget``.

    Args:
        chain: what each stage costs.
        memory_budget: bytes of the whole step, ``chain.fixed`` included; or several budgets, which
            ``optimal`` answers from one table.
        solver: a key of ``SOLVERS``.
        parameters: what else the solver takes, see ``Solver.parameters``.

    Returns:
        the Schedule; for several budgets, one for each.

    Raises:
        TypeError: no Chain; a budget that is no int; a parameter that the solver does not have, or lacks.
        ValueError: a budget is not in 1 .. 2**63 - 1, there is no such solver, or the chain is too long for
            it, or too large (sums of its sizes or seconds overflow).
        InfeasibleBudget: no schedule of this solver fits (the smallest of the budgets); ``smallest`` says
            what would.

    Example:
        >>> from rematplan import Chain, simulate
        >>> chain = Chain.from_arrays([1.0] * 4, [2.0] * 4, boundary=[10] * 5, saved=[50] * 4)
        >>> simulate(chain, solve_chain(chain, 150)).seconds
        14.0
    """
    checked_chain("solve_chain", chain)
    several = isinstance(memory_budget, Sequence) and not isinstance(memory_budget, str)
    given: Any = memory_budget if several else [memory_budget]
    budgets = [checked_budget("solve_chain", budget) for budget in given]
    found = checked_solver("solve_chain", solver, parameters, chain)
    if found.solve_many is not None and len(budgets) > 1:
        schedules = found.solve_many(chain, budgets, **parameters)
    else:
        by_budget = {budget: found.solve(chain, budget, **parameters) for budget in sorted(set(budgets))}
        schedules = [by_budget[budget] for budget in budgets]
    for budget, schedule in zip(budgets, schedules, strict=True):
        peak = simulate(chain, schedule, parameters.get("host")).peak
        if peak > budget:
            raise RuntimeError(
                f"internal: solver {solver!r} returned a schedule of {peak} bytes for a budget of {budget}; "
                "please report this with Chain.to_json()"
            )
    return schedules if several else schedules[0]
