"""The errors and warnings of this project, beside plain ``ValueError`` and ``TypeError`` for misuse."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "InfeasibleBudget",
    "NewShapeWarning",
    "PeakWarning",
    "PlanMismatch",
    "SampleError",
    "SearchLimit",
]


class InfeasibleBudget(ValueError):
    """No schedule of the solver's class fits the budget.

    Attributes:
        budget: what was asked for (bytes).
        smallest: the smallest budget that this solver can meet (bytes).
        solver: name of the solver.
    """

    def __init__(self, budget: int, smallest: int, solver: str, note: str = "") -> None:
        self.budget = budget
        self.smallest = smallest
        self.solver = solver
        self.note = note
        super().__init__(
            f"solver {solver!r}: no schedule fits memory_budget={budget} bytes; "
            f"the smallest budget it can meet is {smallest} bytes ({smallest / 2**20:.2f} MiB)."
            + (f" {note}" if note else "")
        )

    def __reduce__(self) -> tuple[type[InfeasibleBudget], tuple[int, int, str, str]]:
        return (type(self), (self.budget, self.smallest, self.solver, self.note))


class SearchLimit(RuntimeError):
    """A search was given up before it had an answer; the message says what would help."""


class CaptureError(RuntimeError):
    """The model cannot be captured as a chain that trains exactly like the plain model."""


class PlanMismatch(ValueError):
    """A plan was given to a model, or to inputs, other than those it was made for."""


class SampleError(ValueError):
    """The model's forward raises on the sample; its own error is the cause."""


class PeakWarning(UserWarning):
    """A planned step took more bytes than its plan predicted."""


class NewShapeWarning(UserWarning):
    """Calls of new shapes run without a plan, or are planned for over and over again."""
