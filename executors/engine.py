"""The protocol of a kind of capture: how its plans are captured again, and how steps and stages run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rematplan.executors.compare_replay import ReplayCheck, ReplayError
from rematplan.executors.host_arena import Arena
from rematplan.executors.trace import Observer
from rematplan.scheduler.capture.graph.recompute import Rebuild
from rematplan.scheduler.capture.protocol import Capture
from rematplan.scheduler.core.program import ReplayProgram
from rematplan.scheduler.plan.plan import CaptureRecord, Plan
from rematplan.scheduler.torch_layer.call import Call

__all__ = ["Engine", "Executor", "Stages"]


class Executor(ABC):
    """Runs the steps of one model by one plan.

    Args:
        capture: of the plan.
        check: how recomputed tensors are compared; a key of ``rematplan.executors.fingerprints.CHECKS``.

    Attributes:
        observe: is told where each step is.
        ran_out: whether a replay ran out of memory.
        arena: for copies on the host, if the program makes any.
        compiled: whether stages run code of torch.compile.
        reversing: stages whose runs call autograd.grad on what they have computed.
    """

    arena: Arena | None = None
    compiled = False
    reversing: frozenset[int] = frozenset()

    def __init__(self, capture: Any, plan: Plan, check: str) -> None:
        self.capture, self.program, self.check = capture, self.program_of(plan), check
        self.device, self.random = capture.device, [each.random for each in capture.effects]
        self.observe: Observer | None = None
        self.ran_out = False

    def program_of(self, plan: Plan) -> ReplayProgram:
        """Return the program that its steps follow."""
        return plan.program

    @abstractmethod
    def forward(self, flat: list[Any], call: Call) -> Any:
        """Run one training forward; ``flat`` are the leaves of ``call``."""


@dataclass(frozen=True, slots=True)
class Engine:
    """Runs captures of one kind; a row of ``rematplan.executors.recapture.ENGINES``.

    Attributes:
        executor: (capture, its plan, model, check) -> what trains the model.
        again: (plan, plain model, canonical call of which nothing outside needs the tensors) -> the capture
            that the plan describes; raises CaptureError or PlanMismatch where the model gives another.
        alike: (record, plain model, call) -> whether the model's code takes the path of the record; nothing
            runs.
    """

    executor: Callable[[Any, Plan, nn.Module, str], Executor]
    again: Callable[[Plan, nn.Module, Call], Capture]
    alike: Callable[[CaptureRecord, nn.Module, Call], bool] = lambda *_: True


class Stages(ABC):
    """The stages of one step: what their first runs read, and how they run again.

    It does not hold the step, which holds it: a cycle would keep both until Python's collector runs.
    """

    def __init__(self, executor: Any) -> None:
        self.executor = executor

    @abstractmethod
    def run(self, stage: int, boundary: tuple[Tensor, ...], comparison: ReplayCheck) -> tuple[Tensor, ...]:
        """Re-run a stage on the tensors of its boundary; return those of the next boundary.

        Called in grad mode, as the first run was: ops choose their kernels by it (LSTMs, attention).
        The implementation calls ``comparison.check_reads`` before it runs anything.

        Args:
            boundary: requires grad where it did.
        """

    def rebuilds(self, stage: int, option: int) -> Sequence[Rebuild]:  # noqa: ARG002
        """Return the programs that recompute what an option (not the first) of the stage drops."""
        return ()

    def arguments(self, stage: int, boundary: Any, comparison: ReplayCheck, rebuild: Rebuild) -> list[Any]:  # noqa: ARG002
        """Return the arguments of the stage's first run, for such a program."""
        raise ReplayError(f"{self.name(stage)} was kept in part")

    @abstractmethod
    def release(self, stage: int, rerunnable: Sequence[bool]) -> None:
        """Release what re-runs of this stage read, and those of stages still ``rerunnable`` do not."""

    @abstractmethod
    def name(self, stage: int) -> str:
        """Return the stage's name."""

    @abstractmethod
    def saved_name(self, stage: int, index: int) -> str:
        """Return a saved tensor of the stage, and where it comes from, in words."""
