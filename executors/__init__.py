"""Executors: train a PyTorch model by a plan.

``execute(plan, model)`` gives a model that shares the given model's parameters and trains by the plan.
``measure_peak(fn)`` counts the bytes that a step really takes; ``rehearse(plan, model, sample)`` shows where in the
step they are taken, on tensors without data or for real; ``trace_of(model)`` tells what the latest step did, and
``run_step(model, step)`` runs a step again that ran out of memory. ``broadcast_plan(plan)`` gives all ranks one plan.
"""

from executors.compare_replay import ReplayError as ReplayError
from executors.distributed import broadcast_plan as broadcast_plan
from executors.memory import MeasuredPeak as MeasuredPeak
from executors.memory import measure_peak as measure_peak
from executors.planned import execute as execute
from executors.planned import plan_of as plan_of
from executors.planned import plans_of as plans_of
from executors.planned import trace_of as trace_of
from executors.rehearsal import Rehearsal as Rehearsal
from executors.rehearse import rehearse as rehearse
from executors.retry import run_step as run_step

__all__ = [
    "MeasuredPeak",
    "Rehearsal",
    "ReplayError",
    "broadcast_plan",
    "execute",
    "measure_peak",
    "plan_of",
    "plans_of",
    "rehearse",
    "run_step",
    "trace_of",
]
