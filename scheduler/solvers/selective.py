"""Keep the stages that the user names, recompute the others: "keep attention, recompute the MLPs".

Each maximal run of stages that do not match is a segment of which only the input is held, and which is run
again, keeping all, when it is reversed. Stages that may run only once are kept too. No claim of optimality:
there is one such schedule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.candidates import fastest_fit, segment_tree
from rematplan.scheduler.solvers.persistent import run_ends

__all__ = ["solve"]


def _matches(chain: Chain, keep: object) -> list[bool]:
    """Return (L,) whether each stage is named by ``keep``; or an error that says what to pass."""
    names = [stage.name for stage in chain.stages]
    if isinstance(keep, (str, re.Pattern)):
        try:
            pattern = re.compile(keep)
        except re.error as error:
            raise ValueError(f"selective: keep={keep!r} is no regular expression: {error}") from error
        found = [bool(pattern.search(name)) for name in names]
    elif callable(keep):
        found = [bool(keep(name)) for name in names]
    elif isinstance(keep, Iterable):
        wanted = set(keep)
        unknown = sorted(map(str, wanted.difference(names)))
        if unknown:
            raise ValueError(f"selective: keep names {', '.join(unknown)}; the chain has {', '.join(names)}")
        found = [name in wanted for name in names]
    else:
        raise TypeError(
            f"selective: keep={keep!r} must be a function of a stage's name, a regular expression, or names"
        )
    if not any(found):
        raise ValueError(f"selective: keep={keep!r} matches no stage; the chain has {', '.join(names)}")
    return found


def solve(
    chain: Chain, memory_budget: int, *, keep: str | re.Pattern[str] | Callable[[str], bool] | Iterable[str]
) -> Schedule:
    """Return the schedule that keeps the stages that ``keep`` names and recomputes the others.

    Args:
        memory_budget: bytes.
        keep: a function from a stage's name to whether it is kept; or a regular expression that is searched
            in the names; or the names themselves.

    Raises:
        InfeasibleBudget: it does not fit.
        TypeError: ``keep`` is none of these.
        ValueError: ``keep`` matches no stage, names one that is not there, or is no valid regular expression;
            or sums of the chain's sizes or seconds overflow.
    """
    kept = _matches(chain, keep)
    again = [stage.recomputable and not each for stage, each in zip(chain.stages, kept, strict=True)]
    tree = segment_tree(np.array(run_ends(again)), np.array(again, np.int64))
    return fastest_fit(chain, memory_budget, [tree], "selective")
