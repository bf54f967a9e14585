"""Helpers of tests and benchmarks that need neither torch nor hypothesis."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers import solve_chain
from rematplan.scheduler.solvers.candidates import schedule_of, trees_by_runs
from rematplan.scheduler.solvers.revolve import binomial_tree

ROOT = Path(__file__).resolve().parents[2]  # the checkout
PATH = os.pathsep.join([str(ROOT / "src"), str(ROOT)])  # of modules: the checkout's
ORACLES = ROOT / "tests" / "oracles"


@functools.lru_cache(maxsize=64)
def smallest(chain: Chain, solver: str = "optimal", **parameters: Any) -> int:
    """Return the solver's smallest feasible budget in bytes; parameters as ``solve_chain`` takes them."""
    try:
        schedule = solve_chain(chain, 1, solver, **parameters)
    except InfeasibleBudget as error:
        return error.smallest
    return simulate(chain, schedule, parameters.get("host")).peak


def oracle(name: str) -> Any:
    """What ``tests/oracles/name`` holds."""
    return json.loads((ORACLES / name).read_text(encoding="utf-8"))


def oracle_chain(data: dict[str, Any]) -> Chain:
    """A chain in the oracles' notation: xbar[i + 1] is what stage i saves."""
    count = len(data["fwd"])
    return Chain.from_arrays(
        data["fwd"], data["bwd"], data["x"], data["xbar"][1:], data["fwd_tmp"], data["bwd_tmp"][:count]
    )


def schedule_with_slots(chain: Chain, slots: int) -> Schedule:
    """The binomial schedule that holds at most ``slots`` >= 1 boundaries, besides the working one."""
    return schedule_of(next(trees_by_runs(chain, binomial_tree, lambda _: [slots])), len(chain))
