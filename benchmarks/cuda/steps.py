"""Run training steps that can be compared: bit for bit, in bytes, and in seconds."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.cuda.findings import Findings
from benchmarks.cuda.machine import Machine
from rematplan import CaptureError, Plan, measure_peak, solve
from rematplan.scheduler.torch_layer.loss import find_loss
from tests.shared.helpers import smallest
from tests.shared.models import Case

__all__ = [
    "MIB",
    "Training",
    "capture_words",
    "difference",
    "planned_as",
    "said",
    "tight",
    "timed",
]

MIB = 2**20
SEED = 11
Outcome = dict[str, Tensor]


class Training:
    """A model in training, whose steps all begin alike: seed, no gradients, buffers as they were.

    Args:
        autocast: whether forwards run under bfloat16 autocast.
    """

    def __init__(self, case: Case, machine: Machine, *, autocast: bool = False) -> None:
        sample, args, kwargs = machine.moved((case.sample, case.args, case.kwargs))
        self.case = Case(case.model.to(machine.device), sample, args, kwargs)
        self.machine, self.model, self.autocast = machine, self.case.model, autocast
        if hasattr(getattr(self.model, "config", None), "use_cache"):
            self.model.config.use_cache = False  # type: ignore[union-attr] # checkpoints would fill the caches again
        self._buffers = [buffer.clone() for buffer in self.model.buffers()]

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Give what forwards and planning run in."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.machine.device.type, dtype=torch.bfloat16)

    def solve(self, **arguments: Any) -> Plan:
        """Plan the step with all the memory that there is."""
        with self.context():
            return solve(self.model, 2**50, sample=self.case.sample, **arguments)

    def fresh(self) -> None:
        """Put back seed, gradients and buffers."""
        torch.manual_seed(SEED)
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)

    def step(self, trained: Any) -> Any:
        """Run the forward and the backward of the model itself, or of one that stands for it."""
        with self.context():
            output = self.case(trained)
        find_loss(output)[0].backward()
        return output

    def outcome(self, trained: Any) -> Outcome:
        """Run a step from the start; copy what it gave and changed."""
        self.fresh()
        found = {"the loss": find_loss(self.step(trained))[0].detach().clone()}
        found |= {f"buffer {name}": buffer.clone() for name, buffer in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                found[f"the gradient of {name}"] = parameter.grad.clone()
        found["the generator"] = torch.cuda.get_rng_state() if self.machine.cuda else torch.get_rng_state()
        self.fresh()
        return found

    def peaks(self, trained: Any) -> dict[str, float]:
        """Measure a step after a warm-up: MiB allocated and, on CUDA, requested and reserved."""
        self.fresh()
        self.step(trained)
        self.fresh()
        if self.machine.cuda:
            gc.collect()
            torch.cuda.empty_cache()
        measured = measure_peak(
            lambda: self.step(trained), resident=[self.model, self.case.args, self.case.kwargs]
        )
        found = {"measured MiB": measured.peak / MIB, "measured bytes": measured.peak}
        if measured.requested is not None:
            found["requested MiB"] = measured.requested / MIB
            del measured
            found |= self._of_the_process(trained)
        self.fresh()
        return found

    def _of_the_process(self, trained: Any) -> dict[str, float]:
        """Measure a step as users do: the peaks of the whole process, with this class's copies of buffers."""
        self.fresh()
        torch.cuda.reset_peak_memory_stats()
        output = self.step(trained)
        self.machine.wait()
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        del output
        return dict(
            zip(
                ("max_memory_allocated MiB", "max_memory_reserved MiB"), (p / MIB for p in peaks), strict=True
            )
        )


def difference(got: Outcome, want: Outcome) -> str:
    """Say how two outcomes differ; "" if they do not, bit for bit."""
    if got.keys() != want.keys():
        return f"{', '.join(sorted(got.keys() ^ want.keys()))} only in one of the two"
    wrong = [name for name, value in want.items() if not torch.equal(value, got[name])]
    if not wrong:
        return ""
    worst = max(_relative(got[name], want[name]) for name in wrong)
    return f"{len(wrong)} of {len(want)} differ, {wrong[0]} first, by up to {worst:.1e} of the largest entry"


def _relative(got: Tensor, want: Tensor) -> float:
    largest = want.double().abs().max().clamp_min(1e-300)
    return float((got.double() - want.double()).abs().max() / largest)


def tight(plan: Plan, share: float) -> Plan:
    """Plan again, for a budget between the smallest (0) and that of keeping everything (1)."""
    low = smallest(plan.chain)
    return plan.within(int(low + share * (plan.predicted_peak - low)), solver="optimal")


def planned_as(found: Findings, training: Training, capture: str) -> Plan:
    """Plan by a capture; if a graph is refused (see ``determinism``), use deterministic algorithms from here.

    The check's process needs CUBLAS_WORKSPACE_CONFIG for that.
    """
    try:
        return training.solve(capture=capture)
    except CaptureError as error:
        if capture != "graph" or torch.are_deterministic_algorithms_enabled():
            raise
        found.add(
            "a graph at default settings", f"refused, so under deterministic algorithms: {str(error)[:300]}"
        )
    torch.use_deterministic_algorithms(True)
    return training.solve(capture=capture)


def capture_words(plan: Plan) -> str:
    """Say how a model was captured, and why so."""
    return f"{plan.capture.kind}: {plan.capture.reason[-300:]}"


@contextlib.contextmanager
def said() -> Any:
    """Give the list of the messages of the planner's warnings within."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(each.message)[:300] for each in caught if "planned" in str(each.message)]


# ---- seconds -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Times:
    """Seconds of the steps of one method.

    Attributes:
        whole: until the device was done.
        issued: until the host had given the device all its work; on the CPU that is the same.
        processor: of all threads of the process.
    """

    whole: list[float] = field(default_factory=list)
    issued: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, float]:
        """The medians, in ms."""
        names = {"step ms": self.whole, "issued after ms": self.issued, "processor ms": self.processor}
        return {name: 1e3 * statistics.median(seconds) for name, seconds in names.items()}


def timed(
    training: Training, methods: Mapping[str, baselines.Method], repeats: int
) -> dict[str, dict[str, float]]:
    """Time steps by each method, in turn; each is warmed up by a step of its own kind."""
    times = {name: Times() for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            with method(training.model) as trained:
                training.fresh()
                training.step(trained)
                training.fresh()
                _time(lambda trained=trained: training.step(trained), training.machine, times[name])  # type: ignore[misc]
    training.fresh()
    return {name: each.figures for name, each in times.items()}


def _time(step: Callable[[], Any], machine: Machine, times: Times) -> None:
    machine.wait()
    processor, began = time.process_time(), time.perf_counter()
    output = step()
    issued = time.perf_counter()
    machine.wait()
    times.whole.append(time.perf_counter() - began)
    times.issued.append(issued - began)
    times.processor.append(time.process_time() - processor)
    del output
