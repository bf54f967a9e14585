"""Claims: how fast the optimal solver is, and how far from its lower bound.

Heterogeneous chains of 200 stages in 1.5 s on one core and 400 MB, of 1,000 stages in 30 s; a transformer of
126 equal blocks in 0.1 s; the whole frontier of 100 stages in three times one budget; and, at the limits of
the oracle, at or below the reference's rounded optimum.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import solve_chain
from rematplan.scheduler.solvers.frontier import pareto
from rematplan.scheduler.solvers.optimal import Optimum, Table, solve_optimal
from tests.shared.helpers import oracle, oracle_chain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MB = 2**20
LENGTHS = (20, 30, 50, 100, 200, 300, 400, 500, 700, 1000)
SHARES = (0.5, 0.2)  # of the bytes that keeping everything takes


def synthetic(length: int) -> Chain:
    """A random heterogeneous chain whose sizes share no large divisor."""
    rng = np.random.default_rng(0)
    boundary = rng.integers(1_000_001, 64_000_001, length + 1).tolist()
    saved = [b + int(s) for b, s in zip(boundary[1:], rng.integers(0, 200_000_001, length), strict=True)]
    return Chain.from_arrays(
        rng.uniform(0.2, 5, length).tolist(),
        rng.uniform(0.4, 10, length).tolist(),
        boundary,
        saved,
        rng.integers(0, 32_000_001, length).tolist(),
        rng.integers(0, 60_000_001, length).tolist(),
        name=f"synthetic L={length}",
    )


def transformer(blocks: int) -> Chain:
    """Equal blocks between an embedding and a head; parameter gradients appear; no common divisor."""

    def stage(name: str, forward: float, size: int, saved: int, grad: int, transient: int = 0) -> Stage:
        option = Option(saved, 0.0, transient, 13 * transient)
        return Stage(name, forward, 2.1 * forward, size, (option,), transient, size, grad)

    middle = [
        stage(f"block {i}", 0.01, 12 * MB, 131 * MB + 32768, 28 * MB + 12345, 3 * MB) for i in range(blocks)
    ]
    ends = (
        stage("embedding", 0.001, 64 * 1024, 13 * MB, 150 * MB),
        stage("head", 0.03, 12 * MB, 800 * MB, 150 * MB),
    )
    return Chain((ends[0], *middle, ends[1]), 4, 4, 10**9, f"{blocks} equal blocks and two ends")


def keep_all_bytes(chain: Chain) -> int:
    """Bytes that keeping everything takes, transients aside."""
    return chain.fixed + chain.input_bytes(0) + sum(s.options[0].saved for s in chain.stages)


def _gap(found: Optimum) -> float:
    return max(found.seconds / found.lower_bound - 1, 0.0)  # sums may differ in the last bits


@cache
def timed(length: int, share: float) -> tuple[float, float, float]:
    """Seconds to solve ``synthetic(length)``, and the schedule's seconds and gap to its lower bound."""
    chain = synthetic(length)
    budget = int(keep_all_bytes(chain) * share)
    began = time.perf_counter()
    found = solve_optimal(chain, budget)
    return time.perf_counter() - began, found.seconds, _gap(found)


def peak_megabytes(length: int) -> float:
    """Peak resident memory of a process that solves ``synthetic(length)`` and nothing else."""
    code = (
        "from pathlib import Path; from benchmarks.solver_speed import timed; "
        f"timed({length}, 0.5); print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    where = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=os.environ, capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


def _median(run: object, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()  # type: ignore[operator] # a callable
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def report() -> str:
    """The tables, as Markdown."""
    data = oracle("hetero_L50.json")
    chain, rows = oracle_chain(data["chain"]), data["rows"]
    Table(synthetic(12), 2**62, many=True)  # warm-up: numba compiles
    solve_chain(chain, int(rows[-1]["limit"]))
    lines = [
        "# Speed of the optimal solver",
        "",
        "Seconds on one core after warm-up. *Gap* is how far the schedule's time may be above the optimum of its class, by the",
        "solver's own lower bound; *of reference* is its time over the reference's rounded optimum (500 slots).",
        "",
        "| oracle L=50, MiB | solve s | schedule s | of reference |",
        "|---|---|---|---|",
    ]
    for row in rows:
        began = time.perf_counter()
        schedule = solve_chain(chain, int(row["limit"]))
        took = time.perf_counter() - began
        seconds = simulate(chain, schedule).seconds
        lines.append(
            f"| {row['limit'] / MB:.0f} | {took:.3f} | {seconds:.3f} | {seconds / row['persistent']:.5f} |"
        )
    lines += ["", "![seconds to solve against length](solver_speed.svg)", ""]
    lines += [
        "| random chain | budget, share of keep-all | solve s | schedule s | gap |",
        "|---|---|---|---|---|",
    ]
    for length in LENGTHS:
        for share in SHARES:
            took, seconds, gap = timed(length, share)
            lines.append(f"| L={length} | {share:.0%} | {took:.3f} | {seconds:.3f} | {gap:.2%} |")
    lines += [
        "",
        (
            f"A process that solves L=200 peaks at {peak_megabytes(200):.0f} MiB resident, one that solves L=1000 at "
            f"{peak_megabytes(1000):.0f} MiB; one that solves L=20 at {peak_megabytes(20):.0f} MiB."
        ),
        "",
        "| transformer, 126 equal blocks | solve s (median of 5) | overhead | gap |",
        "|---|---|---|---|",
    ]
    equal = transformer(126)
    table = Table(equal, 2**62)
    for share in (0.1, 0.3, 0.5, 0.8):
        budget = int(table.smallest + share * (table.largest - table.smallest))
        found = solve_optimal(equal, budget)
        took = _median(lambda budget=budget: solve_optimal(equal, budget))
        overhead = found.seconds / equal.plain_seconds - 1
        gap = _gap(found)
        lines.append(f"| {share:.0%} of the way to keep-all | {took:.3f} | {overhead:.2%} | {gap:.2%} |")
    chain = synthetic(100)
    budget = int(keep_all_bytes(chain) * 0.5)
    one, whole = _median(lambda: solve_optimal(chain, budget)), _median(lambda: pareto(chain))
    frontier = pareto(chain)
    lines += [
        "",
        (
            f"The frontier of L=100 ({len(frontier)} points) takes {whole:.2f} s, one budget {one:.2f} s: "
            f"{whole / one:.2f} times as long. At that budget its schedule takes "
            f"{frontier.within(budget).seconds / solve_optimal(chain, budget).seconds:.5f} of the time of the one solved alone."
        ),
    ]
    return "\n".join(lines)


def figure() -> Figure:
    """Seconds to solve against length."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    for share in SHARES:
        axes.loglog(
            LENGTHS, [timed(length, share)[0] for length in LENGTHS], "o-", label=f"budget {share:.0%}"
        )
    axes.set(xlabel="stages", ylabel="seconds to solve", title="Random heterogeneous chains")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    return drawn
