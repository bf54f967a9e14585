"""The fastest persistent schedule, with options; its peaks exact in bytes.

Source: Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly & Shilova 2019, *Optimal checkpointing for
heterogeneous chains: how to train deep neural networks with limited memory*, arXiv:1911.13214,
Theorem 1. Generalised to several options a stage, to parameter gradients and long-lived values that
appear as the step goes, to stages that may run only once, and to transients of any size.

For a segment s..t with h bytes held (boundaries and saved tensors, x_s among them) the least seconds are

    C(s,t,h) = min of
      keep k:   forward_s + recompute_k + backward_s + C(s+1, t, h + saved_k)
      split j:  forward_s + .. + forward_{j-1} + C(j, t, h + input_j) + C(s, j-1, h),   s < j <= t

a keep where h + ``keep_need`` fits the budget, a split where h + ``run_need`` of each stage it runs fits:
what the referee counts, on top of h, while those actions run (``tables.py``). Two tables need no memory
axis, because h shifts every peak of a segment by the same amount:

    P(s,t): the least peak above h of any schedule of the segment; one fits iff h + P(s,t) <= budget
    A(s,t): the peak above h if every stage is kept with its fastest option; where that fits, C is known

So C is tabulated only between P and A, on a grid of ``unit`` bytes. The grid *estimates seconds* and
nothing else: the schedule is read off in exact bytes, and P decides at each step what fits. No rounding
can break the budget, and none strands a part of it.

What is claimed: the schedule is within the budget; one is found iff some persistent schedule fits
(``InfeasibleBudget.smallest`` is exact); and it is the fastest persistent schedule wherever the greatest
common divisor of all boundaries and saved tensors is affordable as the unit. Elsewhere two tables are
made. With sizes rounded down C is a lower bound; interpolated between grid points it estimates best. A
schedule is read off each and the faster one returned; ``Optimum.exact`` says whether it meets the bound.
Measured on random chains without a common divisor: exact at 50 stages; at 200 stages the bound is 0.1 to
1.3 % below the schedule, and grids three times finer find schedules at most 0.1 % faster. Time grows with
L^3, two seconds at 200 stages; past 400 the grid gets too coarse to estimate well: merge stages first.

What is not claimed: that no other schedule is faster. One that is not persistent (it lets a held boundary
go early, or keeps a stage in one run and not in another) could be; exhaustive search found none on the
oracles' 40 chains, nor on 1500 random ones of up to five stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from scheduler.chain import Chain
from scheduler.errors import InfeasibleBudget
from scheduler.schedule import Schedule, simulate
from scheduler.solvers.persistent import Decision, KeepStage, Split, build
from scheduler.solvers.tables import Arrays, Grid, Peaks, arrays_of, decide_one, filled_grid, peaks_of

__all__ = ["Optimum", "solve", "solve_optimal"]

TABLE_BYTES = 128 * 2**20  # of one table of C; two are never there at once
TABLE_STEPS = 10**9  # additions to fill one, unless that leaves the grid fewer than MIN_SLOTS
MIN_SLOTS = 200  # of the whole chain; fewer estimate badly


@dataclass(frozen=True, slots=True)
class Optimum:
    """What ``solve_optimal`` found.

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


def _unit(chain: Chain, a: Arrays, p: Peaks, budget: int) -> tuple[int, int]:
    """The unit (bytes) of the finest grid affordable, a multiple of the divisor, and that divisor."""
    sizes = [int(size) for size in a.boundary] + [o.saved for stage in chain.stages for o in stage.options]
    divisor = math.gcd(*sizes) or 1
    room = budget - int(a.boundary[0])
    spread = np.triu(np.minimum(p.fastest, room) - p.least).clip(min=0).astype(float)  # bytes between P and A
    stage = np.arange(len(chain))
    branches = np.triu(stage[None, :] - stage[:, None] + a.choices[:, None])
    by_steps = min(float((spread * branches).sum()) / TABLE_STEPS, room / MIN_SLOTS)
    by_bytes = float(spread.sum()) * 8 / TABLE_BYTES
    return math.ceil(max(by_steps, by_bytes, 1) / divisor) * divisor, divisor


def solve_optimal(chain: Chain, memory_budget: int) -> Optimum:
    """The fastest persistent schedule within ``memory_budget`` (bytes), as far as the module says.

    Raises:
        InfeasibleBudget: no persistent schedule fits; ``smallest`` is exact.
        ValueError: the chain's sizes add up to 2**62 bytes or more.
    """
    a = arrays_of(chain)
    p = peaks_of(a)
    # Every backward is followed by an action that costs at least what it leaves behind, except the last.
    smallest = max(chain.input_bytes(0) + int(p.least[0, -1]), int(a.after[0]) + chain.stages[0].retained)
    if memory_budget < smallest:
        raise InfeasibleBudget(memory_budget, smallest, "optimal")
    budget = min(memory_budget, max(smallest, chain.input_bytes(0) + int(p.fastest[0, -1])))  # more is no use
    unit, divisor = _unit(chain, a, p, budget)

    def read_off(g: Grid) -> tuple[float, Schedule]:
        def decide(s: int, t: int, room: int) -> Decision[int]:
            option, at = decide_one(a, p, g, s, t, room)
            if option >= 0:
                return KeepStage(option, room - chain.stages[s].options[option].saved)
            return Split(at, room - chain.input_bytes(at), room)

        schedule = build(len(chain), decide, budget - chain.input_bytes(0))
        return simulate(chain, schedule).seconds, schedule

    g, lower_bound = filled_grid(a, p, budget, unit, False)
    seconds, schedule = read_off(g)
    if unit > divisor and seconds > lower_bound:
        del g  # before the next table
        g, _ = filled_grid(a, p, budget, unit, True)
        seconds, schedule = min((seconds, schedule), read_off(g), key=itemgetter(0))
    return Optimum(schedule, seconds, lower_bound, unit)


def solve(chain: Chain, memory_budget: int) -> Schedule:
    """The schedule of ``solve_optimal``."""
    return solve_optimal(chain, memory_budget).schedule
