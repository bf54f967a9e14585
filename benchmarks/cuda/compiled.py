"""Compare compiled models under activation memory budgets with plans within their peaks: time and bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.cuda.findings import Findings
from benchmarks.cuda.machine import Machine
from benchmarks.cuda.step_times import MODELS, add_times, plan_file, planned, whole_plan
from benchmarks.cuda.steps import MIB
from rematplan import InfeasibleBudget, Plan

__all__ = ["gpt2_compiled", "llama_compiled", "resnet_compiled"]

BUDGETS = (1.0, 0.5, 0.25)  # torch's own unit: 1 keeps what the partitioner would, 0 recomputes all
# Without code generation the partitioner works as it does with it.
DRY_BACKEND = "aot_eager_decomp_partition"


def gpt2_compiled(found: Findings, machine: Machine) -> None:
    """Train the same GPT-2 compiled, at three activation memory budgets, and by plans within its peaks."""
    _compare(found, machine, "gpt2")


def llama_compiled(found: Findings, machine: Machine) -> None:
    """Train the same Llama compiled, likewise."""
    _compare(found, machine, "llama")


def resnet_compiled(found: Findings, machine: Machine) -> None:
    """Train the same ResNet-50 compiled, likewise."""
    _compare(found, machine, "resnet")


def _compare(found: Findings, machine: Machine, name: str) -> None:
    training = MODELS[name](machine)
    repeats = machine.pick(10, 1)
    peaks = {}
    add_times(found, training, {"plain": baselines.plain}, repeats)
    for budget in machine.pick(BUDGETS, BUDGETS[1:2]):
        rival = f"torch.compile, activation budget {budget:g}"
        with found.attempt(rival):
            torch._dynamo.reset()  # or the code of the budget before is found again
            torch._dynamo.utils.counters.clear()
            method = compiled(budget, "inductor" if machine.cuda else DRY_BACKEND)
            began = time.perf_counter()
            with method(training.model) as trained:
                figures = training.peaks(trained)
            breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
            found.add(
                rival, {"first steps s": time.perf_counter() - began, "graph breaks": breaks, **figures}
            )
            peaks[rival] = int(figures["measured bytes"])
            add_times(found, training, {"plain": baselines.plain, rival: method}, repeats)
    torch._dynamo.reset()
    with found.attempt("plan"):
        file = plan_file(found, name)
        whole = Plan.load(file) if file.exists() else whole_plan(found, training, file)
        ours = {}
        for rival, peak in peaks.items():
            ours_name = f"plan at the peak of {rival}"
            try:
                ours[ours_name] = baselines.op_level(whole, peak)
            except InfeasibleBudget as error:
                found.add(ours_name, {"does not fit": f"the least is {error.smallest / MIB:.1f} MiB"})
        add_times(found, training, {"plain": baselines.plain, **planned(found, training, ours)}, repeats)


def compiled(budget: float, backend: str) -> baselines.Method:
    """The compiled model, its partitioner told to keep so much."""
    made: dict[nn.Module, nn.Module] = {}

    @contextlib.contextmanager
    def method(model: nn.Module) -> Iterator[nn.Module]:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            if model not in made:
                made[model] = torch.compile(model, backend=backend)  # type: ignore[assignment]
            yield made[model]

    return method
