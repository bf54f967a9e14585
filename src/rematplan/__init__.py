"""Fit the training of a PyTorch model into a memory budget at the least extra time.

``solve(model, memory_budget, sample=batch)`` gives a :class:`Plan`; ``execute(plan, model)`` gives a model
that trains by it.

This is the whole public interface: modules below ``rematplan.scheduler`` and ``rematplan.executors`` are
private unless README.md names them, and may change with any release. What needs no torch (chains, schedules,
the referee, solvers) is imported with the package; what needs it is imported when it is first asked for.

Example:
    >>> from rematplan import execute, solve
    >>> plan = solve(model, "6GiB", sample=batch)  # doctest: +SKIP
    >>> model = execute(plan, model)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rematplan.scheduler.bounds.dag import Dag, Op, Turn
from rematplan.scheduler.bounds.floor import dag_floor
from rematplan.scheduler.bounds.milp import solve_dag
from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.device import DeviceSpec
from rematplan.scheduler.core.errors import (
    CaptureError,
    InfeasibleBudget,
    NewShapeWarning,
    PeakWarning,
    PlanMismatch,
    SampleError,
    SearchLimit,
)
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.core.referee import Timeline, simulate
from rematplan.scheduler.core.schedule import (
    Backward,
    Checkpoint,
    Forward,
    Free,
    FreeHost,
    FreeSaved,
    IllegalAction,
    Keep,
    Offload,
    OffloadSaved,
    Prefetch,
    PrefetchSaved,
    Schedule,
)
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.plan.timeline import MemoryTimeline
from rematplan.scheduler.solvers import SOLVERS, OnlineRevolve, revolve_actions, solve_chain
from rematplan.scheduler.solvers.compare import Comparison, compare
from rematplan.scheduler.solvers.frontier import Frontier, pareto
from rematplan.scheduler.solvers.hrevolve import solve_uniform

if TYPE_CHECKING:
    from rematplan.executors.compare_replay import ReplayError
    from rematplan.executors.distributed import broadcast_plan
    from rematplan.executors.execute import execute, plan_of, plans_of, trace_of
    from rematplan.executors.lightning import Rematerialize
    from rematplan.executors.measured_peak import MeasuredPeak, measure_peak
    from rematplan.executors.out_of_memory import run_step
    from rematplan.executors.rehearsal import Rehearsal
    from rematplan.executors.rehearse import rehearse
    from rematplan.scheduler.capture.blocks.callables import CallableChain
    from rematplan.scheduler.estimate import Estimate, estimate
    from rematplan.scheduler.solve import solve

__all__ = [
    "SOLVERS",
    "Backward",
    "CallableChain",
    "CaptureError",
    "Chain",
    "Checkpoint",
    "Comparison",
    "Dag",
    "DeviceSpec",
    "Estimate",
    "Forward",
    "Free",
    "FreeHost",
    "FreeSaved",
    "Frontier",
    "HostMemory",
    "IllegalAction",
    "InfeasibleBudget",
    "Keep",
    "MeasuredPeak",
    "MemoryTimeline",
    "NewShapeWarning",
    "Offload",
    "OffloadSaved",
    "OnlineRevolve",
    "Op",
    "Option",
    "PeakWarning",
    "Plan",
    "PlanMismatch",
    "Prefetch",
    "PrefetchSaved",
    "Rehearsal",
    "Rematerialize",
    "ReplayError",
    "SampleError",
    "Schedule",
    "SearchLimit",
    "Stage",
    "Timeline",
    "Turn",
    "broadcast_plan",
    "compare",
    "dag_floor",
    "estimate",
    "execute",
    "format_bytes",
    "measure_peak",
    "pareto",
    "plan_of",
    "plans_of",
    "rehearse",
    "revolve_actions",
    "run_step",
    "simulate",
    "solve",
    "solve_chain",
    "solve_dag",
    "solve_uniform",
    "trace_of",
]

__version__ = "0.1.0"

_EXECUTORS, _SCHEDULER = "rematplan.executors", "rematplan.scheduler"
# Imported when first asked for: these import torch, and the last of them Lightning.
_LATE = {
    "CallableChain": f"{_SCHEDULER}.capture.blocks.callables",
    "Estimate": f"{_SCHEDULER}.estimate",
    "MeasuredPeak": f"{_EXECUTORS}.measured_peak",
    "Rehearsal": f"{_EXECUTORS}.rehearsal",
    "Rematerialize": f"{_EXECUTORS}.lightning",
    "ReplayError": f"{_EXECUTORS}.compare_replay",
    "broadcast_plan": f"{_EXECUTORS}.distributed",
    "estimate": f"{_SCHEDULER}.estimate",
    "execute": f"{_EXECUTORS}.execute",
    "measure_peak": f"{_EXECUTORS}.measured_peak",
    "plan_of": f"{_EXECUTORS}.execute",
    "plans_of": f"{_EXECUTORS}.execute",
    "rehearse": f"{_EXECUTORS}.rehearse",
    "run_step": f"{_EXECUTORS}.out_of_memory",
    "solve": f"{_SCHEDULER}.solve",
    "trace_of": f"{_EXECUTORS}.execute",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(_LATE[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
