"""Record why the stages of a plan begin where they do, and say it in words."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rematplan.scheduler.core.budget import format_bytes

__all__ = ["LEFT_OUT", "REASONS", "Cut", "explain_cut", "summary"]

# Why a cut is there. "given": it repeats an earlier capture.
REASONS = {
    "valley": "fewer values live than around",
    "frozen": "the first op that needs a gradient",
    "given": "repeated from an earlier capture",
}
# Why a gap that could have been a cut is none.
LEFT_OUT = {"dip": "dips among many live values", "small": "beside stages too small to matter"}


class Cut(NamedTuple):
    """Why a stage begins at its first op. Values that need no gradient do not count.

    Attributes:
        reason: a key of ``REASONS``.
        values: number of values live there, carried ones included.
        bytes: that they hold.
        before, after: bytes held at the nearest gaps between ops on either side where it is not the same.
        inside: the innermost module that the ops on both sides belong to ("" for the model itself).
    """

    reason: str
    values: int
    bytes: int
    before: int
    after: int
    inside: str


def _values(count: int) -> str:
    return "1 value" if count == 1 else f"{count} values"


def explain_cut(cut: Cut) -> str:
    """Say in one line why a stage begins where it does."""
    place = f"inside {cut.inside}" if cut.inside else "between the model's own modules"
    return (
        f"begins {place}: {REASONS[cut.reason]}; {_values(cut.values)} live, {format_bytes(cut.bytes)}, where "
        f"the nearest other gaps hold {format_bytes(cut.before)} before and {format_bytes(cut.after)} after it"
    )


def summary(cuts: Sequence[Cut], left_out: Mapping[str, int]) -> list[str]:
    """Say in two lines what the cuts are, which modules they divide, and what was left out."""
    if not cuts:
        return ["1 stage: no gap between ops where a cut would pay"]
    reasons = ", ".join(
        f"{n} where {REASONS[reason]}" for reason, n in Counter(c.reason for c in cuts).items()
    )
    count = statistics.median_low(cut.values for cut in cuts)
    size = statistics.median_low(cut.bytes for cut in cuts)
    modules = Counter(re.sub(r"\d+", "*", cut.inside) or "the model" for cut in cuts)
    inside = ", ".join(f"{name} ({n})" for name, n in modules.most_common(4))
    more = len(modules) - 4
    missed = "".join(f"; left out: {n} {LEFT_OUT[kind]}" for kind, n in left_out.items() if n)
    return [
        f"{len(cuts) + 1} stages, cuts: {reasons} (at the median {_values(count)}, {format_bytes(size)})",
        f"they divide {inside}" + (f", {more} more" if more > 0 else "") + missed,
    ]
