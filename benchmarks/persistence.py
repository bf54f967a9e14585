"""Claim: persistence costs 1 or 2 % on average, 8 % at times; none on equal stages of ten boundaries.

The seconds of the fastest persistent schedule over those of the fastest of all, at budgets spread over the
range in which both exist and something must be recomputed.
"""

from __future__ import annotations

import time

import numpy as np

from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import solve_chain
from tests.shared.helpers import smallest

LENGTHS = (6, 8, 10)
CHAINS = 20  # of each length
SHARES = (0.02, 0.1, 0.25, 0.5, 0.75)  # of the way from the smallest persistent budget to keeping all


def random_chain(rng: np.random.Generator, length: int, options: int) -> Chain:
    """Unlike stages: sizes without a common divisor; an option that keeps a share recomputes the rest."""

    def size(most: float) -> int:
        return int(rng.integers(10**7, int(most)))

    boundary = [size(1e9) for _ in range(length + 1)]
    stages = []
    for i in range(length):
        forward, saved = rng.uniform(0.5, 5), boundary[i + 1] + size(3e9)
        shares = [1.0, *sorted(rng.uniform(0.3, 0.9, options - 1), reverse=True)]
        kept = tuple(
            Option(max(int(saved * share), boundary[i + 1]), forward * (1 - share), size(3e8), size(5e8))
            for share in shares
        )
        stages.append(
            Stage(str(i), forward, 2 * forward, boundary[i], kept, size(3e8), boundary[i], grad=size(2e8))
        )
    return Chain(tuple(stages), boundary[-1], boundary[-1], fixed=10**9)


def like_blocks(length: int) -> Chain:
    """Equal stages, as the blocks of a transformer: the saved tensors take ten boundaries."""
    return Chain.from_arrays(
        [1.0] * length, [2.0] * length, [100] * (length + 1), [1000] * length, [100] * length, [150] * length
    )


def ratios(chain: Chain) -> tuple[list[float], float]:
    """Persistent over exhaustive seconds at each share; smallest budgets, exhaustive over persistent."""
    low = smallest(chain, "optimal")
    high = max(smallest(chain, "keep_all"), low)
    found = []
    for share in SHARES:
        budget = low + int((high - low) * share)
        persistent, best = (
            simulate(chain, solve_chain(chain, budget, s)).seconds for s in ("optimal", "exhaustive")
        )
        found.append(persistent / best)
    return found, smallest(chain, "exhaustive") / low


def report() -> str:
    """The tables, as Markdown."""
    rng = np.random.default_rng(0)
    lines = [
        "# What persistence costs",
        "",
        (
            "Seconds of `optimal` (the fastest persistent schedule) over those of `exhaustive` (the fastest of all), less 1. "
            f"{CHAINS} random chains in a row, at {', '.join(f'{share:.0%}' for share in SHARES)} of the way from the smallest "
            "persistent budget to keeping all. `equal`: how often both take the same time. `least bytes`: the smallest "
            "budget of `exhaustive` over that of `optimal`, mean and least."
        ),
        "",
        "| stages | options | equal | mean | median | 90 % | most | least bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    began = time.perf_counter()
    by_share = []
    for length in LENGTHS:
        for options in (1, 2):
            rows, bytes_ = zip(
                *(ratios(random_chain(rng, length, options)) for _ in range(CHAINS)), strict=True
            )
            cost = np.array(rows) - 1
            by_share.append(cost)
            mean, median, high, most = cost.mean(), np.median(cost), np.quantile(cost, 0.9), cost.max()
            lines.append(
                f"| {length} | {options} | {(cost < 1e-9).mean():.0%} | {mean:.2%} | {median:.2%} | {high:.2%} "
                f"| {most:.2%} | {np.mean(bytes_):.3f}, {min(bytes_):.3f} |"
            )
    means = np.concatenate(by_share).mean(axis=0)
    lines += [
        "",
        "Mean by budget: " + ", ".join(f"{m:.2%} at {s:.0%}" for m, s in zip(means, SHARES, strict=True)),
    ]
    lines[-1] += "."
    lines += ["", "Equal stages, whose saved tensors take ten boundaries:", ""]
    lines += ["| stages | " + " | ".join(f"{share:.0%}" for share in SHARES) + " | least bytes |"]
    lines += ["|---" * (len(SHARES) + 2) + "|"]
    for length in (6, 8, 10, 12):
        row, bytes_of = ratios(like_blocks(length))
        lines.append(f"| {length} | " + " | ".join(f"{r - 1:.2%}" for r in row) + f" | {bytes_of:.3f} |")
    lines += [
        "",
        (
            "Where persistence loses, as a rule the faster schedule keeps a stage, lets its input go, and runs the stages before it "
            "again to bring that input back for the backward: the same runs serve two ends."
        ),
        "",
        f"All of this took {time.perf_counter() - began:.0f} s.",
    ]
    return "\n".join(lines)
