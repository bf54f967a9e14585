"""Claim: on 100,000 random chains no schedule exceeds its budget; the optimum is the literal recurrence's.

Sizes without a common divisor and with one, transients up to five times the sizes, several options, stages
that run once. Every tenth chain is solved by the literal recurrence too: infeasible exactly when it says so,
and as fast.
"""

from __future__ import annotations

import math
import time

import numpy as np

from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import solve_chain
from rematplan.scheduler.solvers.optimal import solve_optimal
from tests.shared.brute_force import fastest_persistent

CHAINS = 100_000
LITERAL = 10  # every so many chains
HEURISTICS = ("revolve", "sqrt", "chen", "recursive", "periodic")


def random_chain(rng: np.random.Generator) -> Chain:
    """Up to eight stages; transients up to five times the sizes."""
    count, largest = int(rng.integers(1, 9)), int(rng.choice([4, 30, 1000]))
    scale = [int(largest * rng.choice([0, 1, 5])) for _ in range(5)]

    def size(most: int) -> int:
        return int(rng.integers(0, most + 1))

    def stage(number: int) -> Stage:
        carried = size(scale[4] // 5)
        options = tuple(
            Option(size(2 * largest), float(size(5)), size(scale[0]), size(scale[1]), str(k))
            for k in range(int(rng.integers(1, 4)))
        )
        return Stage(
            str(number), float(size(9)), float(size(9)), size(largest), options, size(scale[2]), size(scale[3]),
            size(scale[4]), carried, size(2 * carried) - carried, recomputable=rng.random() > 0.1,
        )  # fmt: skip # the fields in order

    return Chain(tuple(stage(i) for i in range(count)), size(largest), size(scale[3]), size(9))


def report() -> str:
    """What was found, as Markdown."""
    rng = np.random.default_rng(2026)
    over = wrong = infeasible = literal = 0
    began, solving = time.perf_counter(), 0.0
    for number in range(CHAINS):
        chain = random_chain(rng)
        ceiling = 1.2 * (chain.fixed + sum(s.options[0].saved + s.input for s in chain.stages)) + 20
        budget = int(rng.integers(1, int(ceiling) * 2))
        start = time.perf_counter()
        try:
            found = solve_optimal(chain, budget)
            seconds, peak = found.seconds, simulate(chain, found.schedule).peak
        except InfeasibleBudget as error:
            seconds, peak = math.inf, 0
            infeasible += 1
            # What it says would fit does fit, exactly.
            over += simulate(chain, solve_chain(chain, max(error.smallest, 1))).peak > error.smallest
        solving += time.perf_counter() - start
        over += peak > budget
        heuristic = HEURISTICS[number % len(HEURISTICS)]
        try:
            other = simulate(chain, solve_chain(chain, budget, heuristic))
            over += other.peak > budget
            wrong += other.seconds < seconds
        except InfeasibleBudget:
            pass
        if number % LITERAL == 0:
            literal += 1
            wrong += fastest_persistent(chain, budget) != seconds
    return "\n".join(
        [
            "# Random chains",
            "",
            (
                f"{CHAINS:,} random chains of up to eight stages, transients up to five times the sizes, one random budget each, "
                f"in {time.perf_counter() - began:.0f} s ({solving / CHAINS * 1e3:.2f} ms to solve one)."
            ),
            "",
            "| claim | tried | violated |",
            "|---|---|---|",
            f"| peak within the budget, by the referee (optimal and one heuristic each) | {2 * CHAINS:,} | {over} |",
            f"| seconds, and infeasibility, are those of the literal recurrence; no heuristic is faster | {literal:,} | {wrong} |",
            "",
            f"{infeasible:,} of the budgets were infeasible.",
        ]
    )
