"""Claim: the optimal solver takes under a second at L=50 and a few seconds at L=200, heterogeneous.

And at the limits of the oracle it is at or below the reference's rounded persistent optimum.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import numpy as np

from scheduler.chain import Chain
from scheduler.schedule import simulate
from scheduler.solvers import solve_chain

ORACLES = Path(__file__).resolve().parent.parent / "tests" / "oracles"


def oracle(length: int) -> tuple[Chain, list[dict[str, float]]]:
    """The heterogeneous oracle chain of that length, and its rows."""
    data = json.loads((ORACLES / f"hetero_L{length}.json").read_text(encoding="utf-8"))
    c = data["chain"]
    chain = Chain.from_arrays(c["fwd"], c["bwd"], c["x"], c["xbar"][1:], c["fwd_tmp"], c["bwd_tmp"][:length])
    return chain, data["rows"]


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
    )


def report() -> str:
    """The table, as Markdown."""
    chain, rows = oracle(50)
    solve_chain(chain, int(rows[-1]["limit"]))  # warm-up: numba compiles
    lines = [
        "# Speed of the optimal solver",
        "",
        "Seconds after warm-up. `of reference` is the schedule's time over the reference's rounded optimum (500 slots).",
        "",
        "| chain | budget MiB | solve s | schedule s | of reference |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        began = time.perf_counter()
        schedule = solve_chain(chain, int(row["limit"]))
        took = time.perf_counter() - began
        seconds = simulate(chain, schedule).seconds
        lines.append(
            f"| oracle L=50 | {row['limit'] / 2**20:.0f} | {took:.3f} | {seconds:.3f} | {seconds / row['persistent']:.5f} |"
        )
    for length in (100, 200):
        chain = synthetic(length)
        keep_all = chain.fixed + chain.input_bytes(0) + sum(s.options[0].saved for s in chain.stages)
        for share in (0.5, 0.2):
            began = time.perf_counter()
            schedule = solve_chain(chain, int(keep_all * share))
            took = time.perf_counter() - began
            seconds = simulate(chain, schedule).seconds
            lines.append(
                f"| synthetic L={length} | {keep_all * share / 2**20:.0f} | {took:.3f} | {seconds:.3f} | |"
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines += ["", f"Peak resident memory of the process: {peak:.0f} MiB."]
    return "\n".join(lines)
