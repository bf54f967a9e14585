"""Executors: train a PyTorch model by a plan.

``execute(plan, model)`` gives a model that shares the given model's parameters and trains by the plan.
``measure_peak(fn)`` counts the bytes that a step really takes.
"""

from executors.memory import MeasuredPeak as MeasuredPeak
from executors.memory import measure_peak as measure_peak
from executors.planned import execute as execute
from executors.planned import plan_of as plan_of
from executors.replay import ReplayError as ReplayError

__all__ = ["MeasuredPeak", "ReplayError", "execute", "measure_peak", "plan_of"]
