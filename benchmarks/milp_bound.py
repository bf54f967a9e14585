"""Claim: the tight formulation solves chains of ten stages in seconds, to proven optimality, on HiGHS alone.

Beside it the optimum over all schedules of the chain (`exhaustive`), and the bound of the linear relaxation.
"""

from __future__ import annotations

import math
import time

import numpy as np

from benchmarks.persistence import like_blocks, random_chain
from rematplan.scheduler.bounds.dag import Dag, Drop, Op, Run, chain_dag, simulate_dag
from rematplan.scheduler.bounds.milp import relaxed_seconds, solve_dag
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import SOLVERS, solve_chain
from tests.shared.helpers import smallest

LENGTHS = (4, 6, 8, 10, 12, 16)
TIME_LIMIT = 15.0  # seconds of one call
SHARE = 0.25  # of the way from the smallest persistent budget to keeping all
HEAD = [
    "| graph | ops | seconds | gap | over the plain step | relaxation's gap | of exhaustive |",
    "|---|---|---|---|---|---|---|",
]


def residual(blocks: int) -> Dag:
    """Forward and backward ops of residual blocks: x + down(act(up(norm(x)))); sizes in units of x.

    Backward ops read what autograd saves: norm and the products their inputs, the activation its own.
    """
    ops: list[Op] = []
    sizes = [4]

    def op(
        name: str, seconds: float, reads: list[int], writes: list[int], *, once: bool = False
    ) -> list[int]:
        at = list(range(len(sizes), len(sizes) + len(writes)))
        sizes.extend(writes)
        ops.append(Op(name, seconds, tuple((v,) for v in reads), tuple(at), once=once))
        return at

    x, saved = 0, []
    for b in range(blocks):
        (normal, scale) = op(f"norm {b}", 1.0, [x], [4, 1])
        (up,) = op(f"up {b}", 8.0, [normal], [16])
        (act,) = op(f"act {b}", 1.0, [up], [16])
        (down,) = op(f"down {b}", 8.0, [act], [4])
        saved.append((x, normal, scale, up, act))
        (x,) = op(f"add {b}", 0.5, [x, down], [4])
    (gradient,) = op("loss", 1.0, [x], [4], once=True)
    for b in range(blocks - 1, -1, -1):
        x, normal, scale, up, act = saved[b]
        (g,) = op(f"down' {b}", 16.0, [gradient, act], [16], once=True)
        (g,) = op(f"act' {b}", 1.0, [g, up], [16], once=True)
        (g,) = op(f"up' {b}", 16.0, [g, normal], [4], once=True)
        (g,) = op(f"norm' {b}", 2.0, [g, x, scale], [4], once=True)
        (gradient,) = op(f"add' {b}", 0.5, [g, gradient], [4], once=True)
    return Dag.plain(ops, sizes, inputs=[0], outputs=[gradient])


def row(name: str, dag: Dag, budget: int, plain: float, best: float = math.nan) -> str:
    """One row of the table."""
    began = time.perf_counter()
    try:
        found = solve_dag(dag, budget, time_limit=TIME_LIMIT)
    except TimeoutError as error:
        return f"| {name} | {len(dag.ops)} | {TIME_LIMIT:.0f} | no plan: {error} | | | |"
    took = time.perf_counter() - began
    relaxed = 1 - relaxed_seconds(dag, budget) / found.seconds
    of = "" if math.isnan(best) else f"{found.seconds / best:.4f}"
    over = found.seconds / plain - 1
    return f"| {name} | {len(dag.ops)} | {took:.2f} | {found.gap:.2%} | {over:.2%} | {relaxed:.1%} | {of} |"


def chain_row(name: str, chain: Chain) -> str:
    """The row of a chain."""
    low = smallest(chain, "optimal")
    budget = low + int((smallest(chain, "keep_all") - low) * SHARE)
    best = math.nan
    if len(chain) <= SOLVERS["exhaustive"].most_stages:
        best = simulate(chain, solve_chain(chain, budget, "exhaustive")).seconds
    return row(f"{name}, {len(chain)} stages", chain_dag(chain), budget, chain.plain_seconds, best)


def report() -> str:
    """The tables, as Markdown."""
    rng = np.random.default_rng(0)
    lines = [
        "# The MILP bound",
        "",
        (
            f"`solve_dag`, at most {TIME_LIMIT:.0f} s a call, HiGHS on one core. `gap`: between the plan found and the bound proven. "
            "`relaxation's gap`: between that plan and the bound of one LP. `of exhaustive`: the plan's seconds over the "
            f"optimum over all schedules of the chain. Chains at {SHARE:.0%} of the way from the smallest persistent budget to "
            "keeping all."
        ),
        "",
        *HEAD,
    ]
    for length in LENGTHS:
        lines.append(chain_row("equal", like_blocks(length)))
        lines.append(chain_row("unlike", random_chain(rng, length, 1)))
    lines += [
        "",
        (
            "Where the last column is below 1, the DAG's plan feeds a backward a boundary just made, which the chain's "
            "actions cannot say."
        ),
        "",
        "Not a chain: residual blocks op by op, half-way from the least peak to that of keeping all, and at the least.",
        "",
        *HEAD,
    ]
    for blocks in (1, 2, 3, 4):
        dag = residual(blocks)
        plain = simulate_dag(dag, kept_all(dag))
        least = least_peak(dag)
        for share in (0.5, 0.0):
            budget = least + int((plain.peak - least) * share)
            name = f"{blocks} residual blocks, {budget} of {plain.peak}"
            lines.append(row(name, dag, budget, plain.seconds))
    return "\n".join(lines)


def least_peak(dag: Dag) -> int:
    """The smallest budget of the dag."""
    try:
        return solve_dag(dag, 1, time_limit=TIME_LIMIT).peak
    except InfeasibleBudget as error:
        return error.smallest


def kept_all(dag: Dag) -> list[Run | Drop]:
    """The plan that runs each op once, and drops each value after its last reader."""
    last = dag.last_use
    actions: list[Run | Drop] = []
    for o in range(len(dag.ops)):
        actions.append(Run(o))
        actions += [
            Drop(v) for v in range(len(dag.sizes)) if last[v] == o and v not in dag.inputs | dag.outputs
        ]
    return actions
