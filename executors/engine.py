"""``Engine``: how a kind of capture is run, and made again for a plan that was loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import nn

from rematplan.executors.trace import Observer
from rematplan.scheduler.capture.protocol import Capture
from rematplan.scheduler.plan.plan import CaptureRecord, Plan
from rematplan.scheduler.torch_layer.call import Call

__all__ = ["Engine", "Executor"]


class Executor(Protocol):
    """Runs the steps of one model by one plan.

    Attributes:
        capture: that it runs.
        observe: is told where each step is.
        ran_out: whether a replay of a step ran out of memory.
    """

    capture: Any
    observe: Observer | None
    ran_out: bool


class Engine(ABC):
    """Runs captures of one kind; named in ``rematplan.executors.recapture.ENGINES``."""

    @abstractmethod
    def executor(self, capture: Any, plan: Plan, model: nn.Module, check: str) -> Executor:
        """Return what trains ``model`` by ``plan``, of which ``capture`` is.

        Args: check: what a replayed tensor is compared by; a key of
            ``rematplan.executors.fingerprints.CHECKS``.
        """

    @abstractmethod
    def forward(self, executor: Any, flat: list[Any], call: Call) -> Any:
        """Run one training forward; ``flat`` are the leaves of ``call``."""

    @abstractmethod
    def again(self, plan: Plan, model: nn.Module, call: Call) -> Capture:
        """Capture a plain model as the plan has it.

        Args:
            call: canonical, one that the plan is for; nothing outside needs its tensors.

        Raises:
            CaptureError, PlanMismatch: it does not come out as the plan has it; says why.
        """

    def alike(self, record: CaptureRecord, model: nn.Module, call: Call) -> bool:  # noqa: ARG002
        """Whether the code of a plain model takes the way of the record; nothing is run."""
        return True
