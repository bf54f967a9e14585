"""Scheduler: decide what a training step keeps and what it recomputes.

``solve(model, memory_budget, sample=batch)`` gives a Plan. The torch-free core (``scheduler.chain``,
``scheduler.schedule``, ``scheduler.solvers``) can be imported, and solves, without torch; hence ``solve``,
``estimate`` and ``CallableChain`` are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scheduler.chain import Chain as Chain
from scheduler.chain import Option as Option
from scheduler.chain import Stage as Stage
from scheduler.device import DeviceSpec as DeviceSpec
from scheduler.errors import CaptureError as CaptureError
from scheduler.errors import InfeasibleBudget as InfeasibleBudget
from scheduler.errors import PlanMismatch as PlanMismatch
from scheduler.host import HostMemory as HostMemory
from scheduler.plan import Plan as Plan
from scheduler.schedule import Schedule as Schedule
from scheduler.schedule import simulate as simulate
from scheduler.solvers import solve_chain as solve_chain

if TYPE_CHECKING:
    from scheduler.capture.callables import CallableChain as CallableChain
    from scheduler.estimating import estimate as estimate
    from scheduler.planning import solve as solve

__all__ = [
    "CallableChain",
    "CaptureError",
    "Chain",
    "DeviceSpec",
    "HostMemory",
    "InfeasibleBudget",
    "Option",
    "Plan",
    "PlanMismatch",
    "Schedule",
    "Stage",
    "estimate",
    "simulate",
    "solve",
    "solve_chain",
]


def __getattr__(name: str) -> Any:
    if name == "solve":
        from scheduler.planning import solve

        return solve
    if name == "estimate":
        from scheduler.estimating import estimate

        return estimate
    if name == "CallableChain":
        from scheduler.capture.callables import CallableChain

        return CallableChain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
