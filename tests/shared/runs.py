"""Count the runs of a module's code where no plan can restore the count."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["CountsRuns"]

# Attributes are Python state, which a plan leaves as the plain step would. What hangs on this is nobody's
# attribute.
_RUNS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class CountsRuns(nn.Module):
    """A module with a count that re-runs add to, as nothing in Python state is."""

    @property
    def runs(self) -> int:
        """How often it has run."""
        return _RUNS.get(self, 0)

    @runs.setter
    def runs(self, count: int) -> None:
        _RUNS[self] = count
