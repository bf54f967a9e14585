"""Observers of a planned step, which are told what it runs, replays and frees; one records it as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.layouts import held_bytes, storage_key

__all__ = ["Observer", "Trace", "silent"]

AGAIN = {
    "advance": "for its output",
    "rebuild": "for what autograd saves",
    "part": "the ops that make what was not kept",
}


class Observer(Protocol):
    """Is told where a step is."""

    def __call__(self, what: str, where: int, tensors: Sequence[Tensor] = ()) -> None:
        """Note that something begins.

        Args:
            what: of stage ``where`` "first", its first run; "again", a rebuild that the program lacks;
                "backward", its reversal, or the rest of it after a replay; "replay", action ``where`` of the
                replay program; of boundary ``where`` "held" and "freed". What a replay really does with stage
                ``where``: "advance", run it for its output; "rebuild", for what autograd saves; "part", run
                some of its ops.
            tensors: of the boundary that is held or freed.
        """


def silent(what: str, where: int, tensors: Sequence[Tensor] = ()) -> None:
    """Ignore what training steps tell."""


class Trace:
    """The observer of one step.

    Attributes:
        events: (what, where, bytes of the tensors), in the order in which they came.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.name = plan, name
        self.events: list[tuple[str, int, int]] = []

    def __call__(self, what: str, where: int, tensors: Sequence[Tensor] = ()) -> None:
        """Note an event."""
        sizes = {storage_key(t): held_bytes(t) for t in tensors}
        self.events.append((what, where, sum(sizes.values())))

    def text(self) -> str:
        """Return the step, one event a line."""
        stages = self.plan.chain.stages
        lines = [f"{self.name}: {len(stages)} stages, budget {format_bytes(self.plan.memory_budget)}"]
        latest = {"first": -1, "backward": -1}  # both are told more than once
        for what, where, size in self.events:
            if what in latest:
                if where != latest[what] and where < len(stages):
                    kept = f"kept: {self.plan.kept(where)}" if what == "first" else ""
                    lines.append(self._line("run" if what == "first" else what, where, kept))
                latest[what] = where
            elif what in ("held", "freed"):
                lines.append(f"  {what:<10} boundary {where}" + (f", {format_bytes(size)}" if size else ""))
            elif what in AGAIN:
                lines.append(self._line("run again", where, AGAIN[what]))
        return "\n".join(lines)

    def _line(self, what: str, stage: int, rest: str = "") -> str:
        text = f"  {what:<10} stage {stage} {self.plan.chain.stages[stage].name}"
        return f"{text}; {rest}" if rest else text
