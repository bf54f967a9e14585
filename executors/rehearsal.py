"""``Rehearsal``: the live bytes of a rehearsed step beside those predicted."""

from __future__ import annotations

from dataclasses import dataclass

from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.core.referee import Timeline
from rematplan.scheduler.core.text_table import lines_of, new_table
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.plan.timeline import MemoryTimeline

__all__ = ["Difference", "Rehearsal"]

TELLING = 0.01  # share of the peak by which predicted and observed bytes may differ unmentioned


@dataclass(frozen=True, slots=True)
class Difference:
    """One action of the schedule: the most bytes live while it ran, predicted and observed.

    Attributes:
        action: its index in the schedule.
        predicted: by the referee, bytes.
        observed: bytes; None if nothing came or went while it ran.
        op: the op at which the most bytes were seen.
    """

    action: int
    predicted: int
    observed: int | None
    op: str


@dataclass(frozen=True)
class Rehearsal:
    """The result of ``rehearse``. Print it for the table.

    Attributes:
        plan: what was followed.
        real: whether on tensors with data.
        resident: bytes live during the whole step, by kind.
        timeline: the live bytes observed over the step.
        rows: one for each action of the schedule.
        uncounted: ops whose scratch bytes are not in the figures, and why; None if no op's are.
        requested: on CUDA with ``real``, the peak of the bytes requested (``peak`` counts the allocator's
            blocks); else None.
    """

    plan: Plan
    real: bool
    resident: dict[str, int]
    timeline: MemoryTimeline
    rows: tuple[Difference, ...]
    uncounted: tuple[str, ...] | None
    requested: int | None = None

    @property
    def peak(self) -> int:
        """The most bytes live at once, resident ones included."""
        return self.timeline.peak

    @property
    def predicted(self) -> Timeline:
        """The referee's timeline."""
        return self.plan.timeline

    @property
    def differences(self) -> tuple[Difference, ...]:
        """The actions where predicted and observed bytes differ by more than 1 % of the peak."""
        limit = TELLING * self.plan.predicted_peak
        return tuple(r for r in self.rows if r.observed is not None and abs(r.observed - r.predicted) > limit)

    def table(self) -> str:
        """Return predicted and observed bytes per action, then where and by how much the two differ."""
        table = new_table()
        table.add_column("#", justify="right")
        table.add_column("action", no_wrap=True)
        for heading in ("predicted", "observed", "difference"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("most at", overflow="ellipsis", no_wrap=True, max_width=44)
        peak = self.plan.predicted_peak
        for row in self.rows:
            seen = "" if row.observed is None else format_bytes(row.observed)
            off = "" if row.observed is None else f"{(row.observed - row.predicted) / peak:+.2%}"
            words = self.timeline.actions[row.action]
            table.add_row(str(row.action), words, format_bytes(row.predicted), seen, off, row.op)
        lines = lines_of(130, table, markup=False, emoji=False, color_system=None)
        kind = "measured" if self.real else "rehearsed without data"
        lines.append(
            f"\npeak: predicted {format_bytes(peak)}, {kind} {format_bytes(self.peak)} "
            f"({self.peak / peak - 1:+.2%}); budget {format_bytes(self.plan.memory_budget)}"
        )
        if self.requested is not None:
            lines.append(
                f"asked for at most {format_bytes(self.requested)}; the rest of the peak is CUDA's rounding up to blocks"
            )
        aside = self.plan.chain.fixed - sum(self.resident.values())
        if aside > TELLING * peak:
            lines.append(
                f"of it {format_bytes(aside)} are set aside for the whole step, for generator states and small "
                "tensors that come and go"
            )
        lines += [self._told(row) for row in self.differences]
        if self.uncounted is None:
            lines.append(
                "temporaries inside kernels are not counted; rehearse counts them where the plan's device is at hand"
            )
        elif self.uncounted:
            lines.append(f"temporaries inside these kernels are not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def _told(self, row: Difference) -> str:
        assert row.observed is not None
        action = self.plan.schedule.actions[row.action]
        stage = getattr(action, action.__slots__[0])  # or boundary
        more = "more" if row.observed > row.predicted else "less"
        name = self.plan.chain.stages[stage].name
        return (
            f"action {row.action}, {self.timeline.actions[row.action]} ({name}): "
            f"{format_bytes(abs(row.observed - row.predicted))} {more} than predicted; most at {row.op}"
        )
