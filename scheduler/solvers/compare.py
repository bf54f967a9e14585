"""Compare every solver at every budget."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget, SearchLimit
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.text_table import lines_of, new_table
from rematplan.scheduler.solvers import SOLVERS, checked_solver, solve_chain
from rematplan.scheduler.solvers.checks import checked_budget, checked_chain

__all__ = ["Cell", "Comparison", "compare"]


@dataclass(frozen=True, slots=True)
class Cell:
    """The outcome of one solver at one budget.

    Attributes:
        seconds: of a step, by the referee; None if no schedule of the solver fits.
        peak: bytes, by the referee; if none fits, the smallest budget at which one would.
        solve_seconds: how long the solver took.
    """

    seconds: float | None
    peak: int
    solve_seconds: float


@dataclass(frozen=True)
class Comparison:
    """A table of solvers and budgets; ``print`` it.

    Attributes:
        chain: the chain.
        budgets: (B,) bytes.
        cells: for each solver, (B,) cells.
        left_out: for each solver that was not run, why.
    """

    chain: Chain
    budgets: tuple[int, ...]
    cells: Mapping[str, tuple[Cell, ...]]
    left_out: Mapping[str, str]

    def overhead(self, solver: str, index: int) -> float | None:
        """Return extra seconds / seconds of the plain step, at ``budgets[index]``; None if nothing fits."""
        seconds, plain = self.cells[solver][index].seconds, self.chain.plain_seconds
        if seconds is None:
            return None
        return max((seconds - plain) / plain, 0.0) if plain else 0.0  # sums may differ in the last bits

    def __str__(self) -> str:
        table = new_table(f"{self.chain.name}: overhead of a step, by budget")
        table.add_column("budget", justify="right")
        for solver in self.cells:
            table.add_column(solver, justify="right")
        for index, budget in enumerate(self.budgets):
            overheads = (self.overhead(solver, index) for solver in self.cells)
            table.add_row(format_bytes(budget), *("-" if o is None else f"{o:.1%}" for o in overheads))
        table.add_section()
        least = ((cell.peak for cell in cells if cell.seconds is None) for cells in self.cells.values())
        sizes = (next(peaks, None) for peaks in least)
        table.add_row("smallest", *("" if size is None else format_bytes(size) for size in sizes))
        longest = (max(cell.solve_seconds for cell in cells) for cells in self.cells.values())
        table.add_row("longest solve", *(f"{seconds:.3f} s" for seconds in longest))
        left_out = (f"{solver} was left out: {why}" for solver, why in self.left_out.items())
        return "\n".join(lines_of(20 + 14 * len(self.cells), table, *left_out))


def compare(
    chain: Chain,
    memory_budgets: Sequence[int],
    solvers: Sequence[str] | None = None,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
) -> Comparison:
    """Run every solver at every budget.

    Args:
        chain: what each stage costs.
        memory_budgets: (B,) bytes of the whole step, ``chain.fixed`` included.
        solvers: keys of ``SOLVERS``; by default all of them. Of these, one that needs a parameter which is
            not given, takes shorter chains only, or gives up is left out, and the table says why.
        parameters: keyword arguments for solvers, by their names.

    Returns:
        the Comparison.

    Raises:
        TypeError, ValueError: as ``solve_chain``, for budgets, values of parameters, and solvers that are
            asked for by name.
        SearchLimit: a solver that is asked for by name gives up.

    Example:
        >>> from rematplan import Chain
        >>> chain = Chain.from_arrays([1.0] * 4, [2.0] * 4, boundary=[10] * 5, saved=[50] * 4)
        >>> round(compare(chain, [150], ["optimal", "sqrt"]).overhead("optimal", 0), 3)
        0.167
    """
    checked_chain("compare", chain)
    if not isinstance(memory_budgets, Iterable) or isinstance(memory_budgets, str):
        raise TypeError(f"compare: memory_budgets={memory_budgets!r} must be a list of ints (bytes)")
    budgets = tuple(checked_budget("compare", budget) for budget in memory_budgets)
    if not budgets:
        raise ValueError("compare: memory_budgets is empty; give at least one budget (bytes)")
    given = parameters or {}
    if unknown := [name for name in (*given, *(solvers or ())) if name not in SOLVERS]:
        raise ValueError(f"compare: no solver {unknown[0]!r}; there are {', '.join(SOLVERS)}")
    for name, values in given.items():
        if not isinstance(values, Mapping):
            raise TypeError(
                f"compare: parameters[{name!r}]={values!r} must map names of keyword arguments to values"
            )
    cells: dict[str, tuple[Cell, ...]] = {}
    left_out: dict[str, str] = {}
    for name in SOLVERS if solvers is None else solvers:
        try:
            checked_solver("compare", name, given.get(name, {}), chain)
        except (TypeError, ValueError) as error:
            if solvers is not None:
                raise
            left_out[name] = str(error).removeprefix("compare: ")
            continue
        try:
            cells[name] = tuple(_cell(chain, budget, name, given.get(name, {})) for budget in budgets)
        except (SearchLimit, ValueError) as error:  # it gives up, or takes no chain of this size
            wrong_parameter = name in given and not isinstance(error, SearchLimit)
            if solvers is not None or wrong_parameter:
                raise
            left_out[name] = str(error)
    return Comparison(chain, budgets, cells, left_out)


def _cell(chain: Chain, budget: int, solver: str, parameters: Mapping[str, Any]) -> Cell:
    began = time.perf_counter()
    try:
        schedule = solve_chain(chain, budget, solver, **parameters)
    except InfeasibleBudget as error:
        return Cell(None, error.smallest, time.perf_counter() - began)
    took = time.perf_counter() - began
    line = simulate(chain, schedule, parameters.get("host"))
    return Cell(line.seconds, line.peak, took)
