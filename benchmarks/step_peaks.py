"""Claim: a planned step is bit-equal to the plain one, within its budget, and as predicted.

Seven models, both captures, four budgets each between the smallest feasible and the plain peak. Plain and
planned steps are timed interleaved.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from rematplan import CaptureError, Plan, execute, measure_peak, solve
from rematplan.scheduler.capture.bit_equal_step import difference, step_result
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import preserved
from tests.shared.helpers import smallest
from tests.shared.models import SEVEN, Case

REPEATS = 7


def _step(case: Case, model: torch.nn.Module) -> Any:
    output = case(model)
    find_loss(output)[0].backward()
    return output


def _timed(case: Case, planned: torch.nn.Module) -> float:
    """Median of planned / plain - 1, the two interleaved."""
    plain: list[float] = []
    slower: list[float] = []
    for _ in range(REPEATS):
        for model, times in ((case.model, plain), (planned, slower)):
            with preserved(case.model):
                began = time.perf_counter()
                _step(case, model)
                times.append(time.perf_counter() - began)
    return statistics.median(slower) / statistics.median(plain) - 1


def _row(case: Case, name: str, plan: Plan) -> str:
    planned = execute(plan, case.model)
    torch.manual_seed(1)
    plain = step_result(case.model, lambda: case(case.model))
    equal = difference(plain, step_result(case.model, lambda: case(planned)))
    with preserved(case.model):
        _step(case, planned)
    with preserved(case.model):
        peak = measure_peak(lambda: _step(case, planned), resident=[case.model, case.args, case.kwargs]).peak
    return (
        f"| {name} | {plan.capture.kind} | {len(plan.chain)} | {plan.memory_budget / 2**20:.2f} "
        f"| {plan.predicted_peak / 2**20:.2f} | {peak / 2**20:.2f} | {plan.predicted_peak / peak - 1:+.2%} "
        f"| {'yes' if peak <= plan.memory_budget else 'NO'} | {'yes' if equal is None else equal} "
        f"| {plan.predicted_overhead:.1%} | {_timed(case, planned):.1%} |"
    )


def report() -> str:
    """The table, as Markdown."""
    columns = (
        "model", "capture", "stages", "budget", "predicted", "measured", "error", "within", "bit-equal",
        "predicted overhead", "measured overhead",
    )  # fmt: skip # the headings of one table
    about = f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; bytes in MiB; step times are medians "
    lines = [
        "# Planned steps: predicted and measured",
        "",
        about + f"of {REPEATS} interleaved repetitions of small models, and noisy.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, build in SEVEN.items():
        for kind in ("graph", "modules"):
            case = build()
            try:
                largest = solve(case.model, 2**50, sample=case.sample, capture=kind)
            except CaptureError as error:
                lines.append(f"| {name} | {kind} | | | | | | | {error} | | |")
                continue
            least = smallest(largest.chain)
            for share in (0.0, 0.25, 0.5, 0.9):
                budget = int(least + share * (largest.plain.peak - least))
                lines.append(_row(case, name, largest.within(budget)))
    return "\n".join(lines)
