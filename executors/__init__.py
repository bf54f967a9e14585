"""Executors: train a PyTorch model by a plan.

``execute(plan, model)`` gives a model that shares the given model's parameters and trains by the plan.
``measure_peak(fn)`` counts the bytes that a step really takes; ``rehearse(plan, model, sample)`` shows where in the
step they are taken, on tensors without data or for real. ``broadcast_plan(plan)`` gives all ranks one plan.
"""

from executors.distributed import broadcast_plan as broadcast_plan
from executors.memory import MeasuredPeak as MeasuredPeak
from executors.memory import measure_peak as measure_peak
from executors.planned import execute as execute
from executors.planned import plan_of as plan_of
from executors.rehearsal import Rehearsal as Rehearsal
from executors.rehearse import rehearse as rehearse
from executors.replay import ReplayError as ReplayError

__all__ = [
    "MeasuredPeak",
    "Rehearsal",
    "ReplayError",
    "broadcast_plan",
    "execute",
    "measure_peak",
    "plan_of",
    "rehearse",
]
