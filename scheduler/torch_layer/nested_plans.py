"""Run planned models plainly within another plan, which is for the whole step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["inner_plans_left_out", "within_a_plan"]


class _Thread(threading.local):
    within = False


_THREAD = _Thread()


def within_a_plan() -> bool:
    """Whether this thread plans a model, or runs a step of one by its plan."""
    return _THREAD.within


@contextmanager
def inner_plans_left_out() -> Iterator[None]:
    """Have planned models run their plain forward in this thread, within the block."""
    before, _THREAD.within = _THREAD.within, True
    try:
        yield
    finally:
        _THREAD.within = before
