"""The protocol between a step and the stages of either capture, which run again as it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from rematplan.executors.compare_replay import Comparison
from rematplan.scheduler.capture.graph.recompute import Rebuild

__all__ = ["Stages"]


class Stages(Protocol):
    """How the stages of one step run again: ``graph_stages.py`` and ``block_stages.py``.

    It does not hold the step, which holds it: a circle would keep both until Python's collector runs. A
    re-run has ``comparison.check_reads`` compare its inputs first.

    Attributes:
        compiled: whether stages have code that torch.compile has compiled.
        reversing: stages that call autograd.grad on what they have made, in their runs.
    """

    compiled: bool
    reversing: frozenset[int]

    def run(self, stage: int, boundary: tuple[Tensor, ...], comparison: Comparison) -> tuple[Tensor, ...]:
        """Re-run a stage on the tensors of its boundary; return those of the next boundary.

        Called in grad mode, as the first run was: ops choose their kernels by it (LSTMs, attention).

        Args:
            boundary: requires grad where it did.
        """

    def rebuilds(self, stage: int, option: int) -> Sequence[Rebuild]:
        """Return the programs that recompute what an option (not the first) of the stage drops."""

    def arguments(
        self, stage: int, boundary: tuple[Tensor, ...], comparison: Comparison, rebuild: Rebuild
    ) -> list[Any]:
        """Return the stage's arguments as its first run found them, for such a program."""

    def release(self, stage: int, rerunnable: Sequence[bool]) -> None:
        """Release what is held for re-runs of this stage, and not for those that are still ``rerunnable``."""

    def ran_out(self) -> None:
        """Note that a replay ran out of memory."""

    def name(self, stage: int) -> str:
        """Return the stage's name."""

    def saved_name(self, stage: int, index: int) -> str:
        """Return a saved tensor of the stage, and where it comes from, in words."""
