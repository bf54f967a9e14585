"""Find the fastest persistent schedule, with options; its peaks are exact in bytes.

Source: Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly & Shilova 2019, *Optimal checkpointing for
heterogeneous chains: how to train deep neural networks with limited memory*, arXiv:1911.13214, Theorem 1.
Generalised to several options a stage, to parameter gradients and long-lived values that appear as the step
goes, to stages that may run only once, and to transients of any size.

For a segment s..t with h bytes held (boundaries and saved tensors, x_s among them) the least seconds are

    C(s,t,h) = min of
      keep k:   forward_s + recompute_k + backward_s + C(s+1, t, h + saved_k)
      split j:  forward_s + .. + forward_{j-1} + C(j, t, h + input_j) + C(s, j-1, h),   s < j <= t

a keep where h + ``keep_need`` fits the budget, a split where h + ``run_need`` of each stage it runs fits:
what the referee counts, on top of h, while those actions run (``optimal_peaks.py``). Two tables need no
memory axis, because h shifts every peak of a segment by the same amount:

    P(s,t): the least peak above h of any schedule of the segment; one fits iff h + P(s,t) <= budget
    A(s,t): the peak above h if every stage is kept with its fastest option; where that fits, C is known

So C is tabulated only between P and A, on a grid of ``unit`` bytes. The grid *estimates seconds* and nothing
else: the schedule is read off in exact bytes, and P decides at each step what fits, so that no rounding
breaks the budget or strands a part of it. Equal segments, as transformer blocks make them, are tabulated
once: a chain of equal blocks takes time with L^2. One table answers every budget below its own
(``frontier.py``).

Claims: the schedule is within the budget; one is found iff some persistent schedule fits
(``InfeasibleBudget.smallest`` is exact); and it is the fastest persistent schedule wherever the greatest
common divisor of boundaries, saved tensors and what stages retain is affordable as the unit. Elsewhere two
tables are made: with sizes rounded down C is a lower bound; interpolated between grid points it estimates
best. A schedule is read off each and the faster one returned; ``Optimum.lower_bound`` is the better of that
bound and the knapsack's (``knapsack_bound.py``), and ``Optimum.exact`` says whether the schedule meets it.
Past some 500 unlike stages splits are tried at the smallest of every few boundaries only (``Arrays.split``),
elsewhere only where nothing else fits; the knapsack's is then the only bound (docs/solver_speed.md).

Where the chain knows its values, the referee counts fewer bytes than the sums, and ``ByStorage`` finds a
budget by the sums that uses what is left. The schedule is the fastest for that budget by the sums; the bound
is the knapsack's, and ``smallest`` the least that a schedule takes of a few that the sums suggest.

Not claimed: that no other schedule is faster. ``exhaustive`` finds those that release a boundary early and
recompute it with what comes before it: one to two percent faster on chains of ten unlike stages, up to eight,
and nothing where stages are alike (docs/persistence.md). What autograd saved cannot be released like that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import Timeline, simulate
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.checks import checked_budget, checked_chain
from rematplan.scheduler.solvers.knapsack_bound import Knapsack
from rematplan.scheduler.solvers.optimal_peaks import arrays_of, peaks_of
from rematplan.scheduler.solvers.optimal_seconds import Reading, filled_grid, read_off, root_values
from rematplan.scheduler.solvers.persistent import build

__all__ = ["Optimum", "Table", "solve", "solve_many", "solve_optimal"]

# One table of C takes about so many bytes, and additions to fill it,
TABLE_BYTES, TABLE_STEPS = 128 * 2**20, 10**9
# unless that leaves the whole chain fewer slots than MIN_SLOTS: fewer estimate badly. More than MAX_SLOTS are
# of use only to a grid that is exact; before one much finer than that, a grid of QUICK_SLOTS is tried.
MIN_SLOTS, MAX_SLOTS, QUICK_SLOTS = 500, 6000, 1000
# Where MIN_SLOTS take more than so many, splits are tried at some of the boundaries only, one in MOST_WINDOW
# at least.
MOST_BYTES, MOST_STEPS, MOST_WINDOW = 384 * 2**20, 8 * 10**9, 100
# Where values are known, the budgets by the sums that are tried at first, and steps between those that may
# follow.
SUMS_FIRST, SUMS_TRIED = 8, 1000
MOST_STAGES = 5000  # P alone takes a minute there, and each table of segments 200 MB


@dataclass(frozen=True, slots=True)
class Optimum:
    """The outcome of ``solve_optimal``.

    Attributes:
        schedule: within the budget.
        seconds: of the step, by the referee.
        lower_bound: seconds that no persistent schedule within the budget can beat.
        unit: bytes of one slot of the grid.
    """

    schedule: Schedule
    seconds: float
    lower_bound: float
    unit: int

    @property
    def exact(self) -> bool:
        """Whether no persistent schedule within the budget is faster (to rounding of seconds)."""
        return self.seconds <= self.lower_bound * (1 + 1e-9)


class Table:
    """The tables of the dynamic program for one chain; they answer every budget up to ``most``.

    Args:
        chain: what each stage costs.
        most: the largest budget to be answered (bytes); what exceeds ``largest`` is no use and costs nothing.
        many: whether other budgets will be asked for.

    Attributes:
        smallest: the smallest budget for which a persistent schedule fits (bytes).
        largest: the smallest budget for which every stage is kept with its fastest option (bytes).
        most: the largest budget that makes a difference, ``largest`` at most (bytes).
        unit: bytes of one slot of the grid.
        knapsack: a bound on seconds.

    Raises:
        InfeasibleBudget: no persistent schedule fits ``most``.
        ValueError: sums of the chain's sizes or seconds overflow.
    """

    def __init__(self, chain: Chain, most: int, *, many: bool = False) -> None:
        self.chain = chain
        self._a = a = arrays_of("optimal", chain, 1)
        self._p = p = peaks_of(a, np.ones(len(chain) + 1, np.bool_))
        self._held = int(a.boundary[0] + a.after[-1])  # base of the whole chain
        # Every backward is followed by an action that costs at least what it leaves behind, except the last.
        self._end = int(a.after[0]) + chain.stages[0].retained
        self.smallest = max(self._held + int(p.least[0, -1]), self._end)
        self.largest = max(self._held + int(p.fastest[0, -1]), self._end)
        if most < self.smallest:
            raise InfeasibleBudget(most, self.smallest, "optimal")
        self.most = min(most, self.largest)
        self.knapsack = Knapsack(chain)
        room = self.most - a.boundary[0] - a.after  # (L,) the most for segments up to t
        stage = np.arange(len(chain))
        distinct = np.triu(a.origin == stage[:, None])
        # Bytes between P and A, and the additions that one unit of them costs, over all distinct segments.
        spread = np.where(distinct, np.minimum(p.fastest, room) - p.least, 0).clip(min=0).astype(float)
        steps = float((spread * (stage[None, :] - stage[:, None] + a.choices[:, None])).sum())
        size = 8 * float(spread.sum())
        coarse = max((self.most - self._held) / MIN_SLOTS, 1)
        window = max(math.sqrt(steps / coarse / MOST_STEPS), size / coarse / MOST_BYTES, 1)
        window = min(math.ceil(window), MOST_WINDOW)
        if window > 1:
            self._a = a = arrays_of("optimal", chain, window)
            steps, size = steps / window**2, size / window
        divisor = self._divisor()
        fine = min(max(steps / TABLE_STEPS, size / TABLE_BYTES, 1), coarse)
        if (
            fine > divisor and not many
        ):  # nothing will be exact by construction, and finer than this is no better
            fine = max(fine, (self.most - self._held) / MAX_SLOTS)
        quick = (self.most - self._held) / QUICK_SLOTS
        self._window, self._many = window, many
        # A coarse grid often proves its schedule optimal at once.
        for about in (fine,) if many or quick < 2 * MAX_SLOTS / QUICK_SLOTS * fine else (quick, fine):
            self.unit = math.ceil(about / divisor) * divisor
            if self._tabulate(self.unit > divisor):
                break

    def _tabulate(self, rounds: bool) -> bool:
        """Fill the grid, or both, if it ``rounds``; return whether ``most``'s schedule is proven optimal."""
        a, p = self._a, self._p
        phase = (self.most - self._held) % self.unit
        g = filled_grid(a, p, self.most, self.unit, phase, False)
        # Sizes are rounded down: a lower bound, if all splits are tried. The whole chain's values are all it
        # takes.
        self._bounds = root_values(g) if self._window == 1 else None
        self._first = read_off(a, p, g, self.most)
        if rounds and (self._many or self._first.extra > self._bound(self.most)):
            del g  # before the next table
            g = filled_grid(a, p, self.most, self.unit, phase, True)
        self._g = g
        return self.read(self.most).extra <= self._bound(self.most)

    def _divisor(self) -> int:
        """Return the greatest common divisor (bytes) of the sizes that are added up in what is held."""
        stages = self.chain.stages
        sizes = [stage.input for stage in stages[1:]] + [stage.retained for stage in stages[1:]]
        return math.gcd(*sizes, *(option.saved for stage in stages for option in stage.options)) or 1

    def _bound(self, budget: int) -> float:
        """Return extra seconds that no persistent schedule within ``budget`` can beat."""
        least = self.knapsack.extra(budget)
        if self._bounds is None:
            return least
        lo, values = self._bounds
        # What the grid says of a budget up to one unit larger holds for this one too.
        up = -(((self.most - self._held) % self.unit - (budget - self._held)) // self.unit)
        return max(least, float(values[min(max(up - lo, 0), len(values) - 1)]))

    def read(self, budget: int) -> Reading:
        """Return the best schedule found within ``budget`` (bytes), undecoded; ``smallest`` fits."""
        budget = min(budget, self.most)
        reading = read_off(self._a, self._p, self._g, budget)
        return self._first if budget == self.most and self._first.extra < reading.extra else reading

    def peak(self, budget: int, reading: Reading) -> int:
        """Return bytes that the schedule of ``reading``, which was for ``budget``, takes."""
        return max(min(budget, self.most) - reading.spare, self._end)

    def lower_bound(self, budget: int) -> float:
        """Return seconds of a step that no persistent schedule within ``budget`` (bytes) can beat."""
        return self.chain.plain_seconds + self._bound(min(budget, self.most))

    def schedule(self, reading: Reading) -> Schedule:
        """Return the schedule of a reading."""
        decisions = zip(reading.option.tolist(), reading.at.tolist(), strict=True)
        return build(len(self.chain), lambda s, t: next(decisions))

    def solve(self, budget: int) -> Optimum:
        """Return the fastest persistent schedule within ``budget`` (bytes), as far as the module says.

        Raises:
            InfeasibleBudget: no persistent schedule fits; ``smallest`` is exact.
        """
        if budget < self.smallest:
            raise InfeasibleBudget(budget, self.smallest, "optimal")
        schedule = self.schedule(self.read(budget))
        return Optimum(schedule, simulate(self.chain, schedule).seconds, self.lower_bound(budget), self.unit)


class ByStorage:
    """Schedules of a chain that knows its values, whose peaks the referee counts by storage.

    Args:
        chain: what each stage costs; ``values`` are known.

    Attributes:
        table: of the chain's sums, which are at least what the referee counts.
        smallest: the smallest budget that is met (bytes).
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.table = Table(chain, 2**63 - 1, many=True)
        self._tried: dict[int, tuple[Schedule, Timeline]] = {}
        low, high = self.table.smallest, self.table.largest
        # Fewer bytes by the sums are not always fewer by storage.
        first = {low + (high - low) * part // SUMS_FIRST for part in range(SUMS_FIRST + 1)}
        self.smallest = min(self.tried(by_sums)[1].peak for by_sums in sorted(first))

    def tried(self, by_sums: int) -> tuple[Schedule, Timeline]:
        """Return the table's schedule for a budget by the sums (bytes), and what the referee says of it."""
        if by_sums not in self._tried:
            schedule = self.table.schedule(self.table.read(by_sums))
            self._tried[by_sums] = schedule, simulate(self.chain, schedule)
        return self._tried[by_sums]

    def solve(self, budget: int) -> Optimum:
        """Return the fastest schedule within ``budget`` (bytes), by bisection over budgets by the sums.

        Raises:
            InfeasibleBudget: no schedule that was tried fits.
        """
        if budget < self.smallest:
            raise InfeasibleBudget(budget, self.smallest, "optimal")
        if self.table.smallest <= budget:
            self.tried(min(budget, self.table.largest))
        low = max(by_sums for by_sums, (_, line) in self._tried.items() if line.peak <= budget)
        high = min((by_sums for by_sums in self._tried if by_sums > low), default=low)
        step = max((self.table.largest - self.table.smallest) // SUMS_TRIED, 1)
        while high - low > step:
            middle = (low + high) // 2
            low, high = (middle, high) if self.tried(middle)[1].peak <= budget else (low, middle)
        fitting = [found for found in self._tried.values() if found[1].peak <= budget]
        schedule, line = min(fitting, key=lambda found: (found[1].seconds, found[1].peak))
        bound = self.chain.plain_seconds + self.table.knapsack.extra(budget)
        return Optimum(schedule, line.seconds, bound, self.table.unit)


def solve_optimal(chain: Chain, memory_budget: int) -> Optimum:
    """Return the fastest persistent schedule within ``memory_budget`` (bytes), as far as the module says.

    Raises:
        InfeasibleBudget: no persistent schedule fits; ``smallest`` is exact.
        TypeError, ValueError: an argument of the wrong kind, a budget not in 1 .. 2**63 - 1; sums of the
            chain's sizes or seconds that overflow.
    """
    memory_budget = checked_budget("solve_optimal", memory_budget)
    if checked_chain("solve_optimal", chain).values:
        return ByStorage(chain).solve(memory_budget)
    return Table(chain, memory_budget).solve(memory_budget)


def solve(chain: Chain, memory_budget: int) -> Schedule:
    """Return the schedule of ``solve_optimal``."""
    return solve_optimal(chain, memory_budget).schedule


def solve_many(chain: Chain, memory_budgets: Sequence[int]) -> list[Schedule]:
    """Return a schedule for each budget (bytes), all from one table; raises as ``solve_optimal`` does."""
    table = ByStorage(chain) if chain.values else Table(chain, max(memory_budgets), many=True)
    if min(memory_budgets) < table.smallest:
        raise InfeasibleBudget(min(memory_budgets), table.smallest, "optimal")
    return [table.solve(budget).schedule for budget in memory_budgets]
