"""Tell numbers from bools, which are ints to Python; numpy's numbers count as numbers."""

from __future__ import annotations

import numbers
from typing import Any

__all__ = ["is_integer", "is_number"]


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number, Python's or numpy's, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, infinite and NaN included, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
