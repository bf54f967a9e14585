"""Find the frontier of seconds against bytes, of persistent schedules, from one table of ``optimal.py``.

From the schedule that keeps everything on, each next budget is one byte (or one ``step``) below the peak of
the schedule found last: no budget is tried at which nothing changes, and where the grid is exact no point of
the frontier is missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.checks import checked_budget, checked_chain, checked_count
from rematplan.scheduler.solvers.optimal import Table

__all__ = ["Frontier", "Point", "pareto"]

POINTS = 1000  # by default, steps of the budget are the frontier's span over this


@dataclass(frozen=True, slots=True)
class Point:
    """One schedule of the frontier.

    Attributes:
        peak: bytes that it takes.
        seconds: of a step.
        lower_bound: seconds that no persistent schedule within ``peak`` bytes can beat.
        budget: the budget (bytes) that it was found for.
    """

    peak: int
    seconds: float
    lower_bound: float
    budget: int

    @property
    def exact(self) -> bool:
        """Whether no persistent schedule within ``peak`` bytes is faster (to rounding of seconds)."""
        return self.seconds <= self.lower_bound * (1 + 1e-9)


class Frontier:
    """Schedules of one chain, none of which another one beats in both seconds and bytes.

    Attributes:
        chain: the chain.
        points: from the least peak to the fastest; peaks rise, seconds fall.
        step: bytes between the budgets that were tried, at the least.
    """

    def __init__(self, chain: Chain, step: int | None = None) -> None:
        self.chain = chain
        self._table = table = Table(chain, 2**63 - 1, many=True)
        self.step = max((table.largest - table.smallest) // POINTS, 1) if step is None else step
        points: list[Point] = []
        budget = table.largest
        while budget >= table.smallest:
            reading = table.read(budget)
            seconds, peak = chain.plain_seconds + reading.extra, table.peak(budget, reading)
            counted, bound = peak, table.lower_bound(peak)
            if chain.values:  # the referee counts no more than the sums that the table has
                counted = simulate(chain, table.schedule(reading)).peak
                bound = chain.plain_seconds + table.knapsack.extra(counted)
            while points and seconds <= points[-1].seconds and counted <= points[-1].peak:
                points.pop()  # found for more bytes, and no faster
            if not points or counted < points[-1].peak:
                points.append(Point(counted, seconds, bound, budget))
            # The last budget tried is always the smallest that there is.
            budget = max(peak - self.step, table.smallest) if peak > table.smallest else peak - 1
        self.points = tuple(reversed(points))

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def within(self, memory_budget: int) -> Point:
        """Return the fastest point within ``memory_budget`` (bytes).

        Raises:
            InfeasibleBudget: no persistent schedule fits.
            TypeError, ValueError: the budget is no int, or not in 1 .. 2**63 - 1.
        """
        memory_budget = checked_budget("Frontier.within", memory_budget)
        fitting = [point for point in self.points if point.peak <= memory_budget]
        if not fitting:
            raise InfeasibleBudget(memory_budget, self.points[0].peak, "optimal")
        return fitting[-1]

    def schedule(self, point: Point) -> Schedule:
        """Return the schedule of one of ``points``."""
        return self._table.schedule(self._table.read(point.budget))


def pareto(chain: Chain, step: int | None = None) -> Frontier:
    """Return the persistent schedules of least seconds for every budget, from one table.

    Args:
        chain: what each stage costs.
        step: bytes between the budgets that are tried; by default a thousandth of what lies between the
            smallest feasible budget and that of keeping everything. With 1, every step of the frontier.

    Returns:
        the Frontier. It is exact where ``Point.exact`` says so (``optimal.py`` has the claim); every point's
        seconds and bytes are those of its schedule.

    Raises:
        TypeError, ValueError: ``step`` is no int of at least 1, or the chain has more than
            5,000 stages.

    Example:
        >>> from rematplan import Chain
        >>> chain = Chain.from_arrays([1.0] * 4, [2.0] * 4, boundary=[10] * 5, saved=[50] * 4)
        >>> [(point.peak, point.seconds) for point in pareto(chain)][:2]
        [(90, 18.0), (100, 16.0)]
    """
    return Frontier(
        checked_chain("pareto", chain), None if step is None else checked_count("pareto", "step", step)
    )
