"""What stands in autograd's graph for saved tensors, by the rules that replay.py numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from scheduler.capture.private import version_of
from scheduler.capture.recompute import Rebuild

if TYPE_CHECKING:
    from executors.first_sweep import FirstSweep
    from executors.offload import Moved

__all__ = ["Handle", "Held", "Thinned"]


class Handle:
    """Stands in autograd's graph for a dropped saved tensor (rules 1 and 3)."""

    __slots__ = ("index", "stage", "step")

    def __init__(self, step: FirstSweep, stage: int, index: int) -> None:
        self.step, self.stage, self.index = step, stage, index
        step.handles[stage] += 1

    def __del__(self) -> None:
        step, stage = self.step, self.stage
        # Nobody wants it again: it was reversed, or an output that no loss is made of is gone.
        step.prints[stage][self.index] = None
        step.filled[stage].pop(self.index, None)
        step.handles[stage] -= 1
        if not step.handles[stage] and not step.sweeping:
            step.stage_is_done(stage)


class Held:
    """A saved tensor that lives on anyway, with the version that autograd saw (rule 9)."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # A non-leaf is detached, for a node must not own its own output.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = version_of(tensor)


class Thinned:
    """A stage kept with an option, until all that it dropped is made again (rule 5).

    Attributes:
        parts: what is still to be run, by the index of each saved tensor that it makes.
        sources: kept packs that the parts read.
        boundary: of the stage.
    """

    __slots__ = ("boundary", "parts", "sources")

    def __init__(self, parts: Sequence[Rebuild], boundary: tuple[Tensor | Moved, ...]) -> None:
        self.parts = {index: part for part in parts for index in part.dropped}
        self.sources: dict[int, Held | Moved] = {}
        self.boundary = boundary

    def reads(self) -> set[int]:
        """The packs that the parts still to be run read."""
        return {index for part in set(self.parts.values()) for index, _ in part.sources}

    def ran(self, part: Rebuild) -> None:
        """Let go of what only this part read."""
        for index in part.dropped:
            del self.parts[index]
        for index in self.sources.keys() - self.reads():
            del self.sources[index]
