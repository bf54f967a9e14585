"""A mixed-integer program, written variable by variable and row by row, and solved by HiGHS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

__all__ = ["Program"]


class Program:
    """Minimise the cost of variables from 0 on under linear constraints."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self._upper: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[tuple[Sequence[int], Sequence[float], float, float]] = []

    def variable(self, cost: float = 0.0, upper: float = 1.0, *, integer: bool = True) -> int:
        """Add a variable from 0 to ``upper``; return its number."""
        self.cost.append(cost)
        self._upper.append(upper)
        self._integer.append(integer)
        return len(self.cost) - 1

    def row(
        self, at: Sequence[int], factors: Sequence[float], least: float = -math.inf, most: float = math.inf
    ) -> None:
        """Demand that the variables ``at``, times their factors, add up to ``least`` .. ``most``."""
        self._rows.append((at, factors, least, most))

    def solve(self, time_limit: float, gap: float, *, relaxed: bool = False) -> Any:
        """Return the result of ``scipy.optimize.milp`` within a relative ``gap``.

        Args:
            time_limit: seconds.
            relaxed: whether no variable need be an integer.
        """
        variables, factors, least, most = zip(*self._rows, strict=True)
        places = np.repeat(np.arange(len(self._rows)), list(map(len, variables)))
        entries = (np.concatenate(factors), (places, np.concatenate(variables).astype(np.int64)))
        matrix = coo_array(entries, shape=(len(self._rows), len(self.cost))).tocsr()
        return milp(
            self.cost,
            integrality=np.zeros(len(self.cost)) if relaxed else np.array(self._integer, int),
            bounds=Bounds(0.0, np.array(self._upper)),
            constraints=LinearConstraint(matrix, least, most),
            options={"time_limit": time_limit, "mip_rel_gap": gap},
        )
