"""Draw a memory timeline with matplotlib: live bytes over a schedule's actions, stacked by category."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rematplan.scheduler.plan.timeline import MemoryTimeline, Moment

__all__ = ["COLORS", "drawn"]

COLORS = {
    "parameters": "C0",
    "buffers": "C9",
    "optimizer state": "C6",
    "inputs": "C8",
    "constants and replay state": "C4",
    "gradients": "C5",
    "boundaries held": "C2",
    "kept saved tensors": "C1",
    "carried values": "khaki",
    "gradient at hand": "C3",
    "transient": "0.8",
}


def _places(points: Sequence[Moment]) -> list[float]:
    """Place each point on the axis of actions: those of one action are spread evenly over it."""
    amount = Counter(point.action for point in points)
    passed: Counter[int] = Counter()
    places = []
    for point in points:
        places.append(point.action + passed[point.action] / amount[point.action])
        passed[point.action] += 1
    return places


def drawn(timeline: MemoryTimeline, observed: MemoryTimeline | None) -> Figure:
    """Draw the timeline, and the total of ``observed`` as a line on top."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "MemoryTimeline.figure needs matplotlib, which is not installed: pip install 'rematplan[plot]'"
        ) from error
    unit = 2**20 if timeline.budget < 2**33 else 2**30
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    end = float(len(timeline.actions))
    places = [*_places(timeline.points), end]
    floor = [0.0] * len(places)
    for category, series in timeline.by_category.items():
        top = [below + size / unit for below, size in zip(floor, [*series, series[-1]], strict=True)]
        color = COLORS[category]
        axes.fill_between(places, floor, top, step="post", label=category, color=color, linewidth=0)
        floor = top
    if observed is not None:
        line = [size / unit for size in observed.live]
        axes.step(
            [*_places(observed.points), end],
            [*line, line[-1]],
            where="post",
            color="black",
            linewidth=0.8,
            label=observed.title,
        )
    axes.axhline(timeline.budget / unit, color="red", linestyle="--", linewidth=1, label="budget")
    axes.set_xlim(0, end)
    axes.set_ylim(0)
    axes.set_xlabel("action of the schedule")
    axes.set_ylabel("live MiB" if unit == 2**20 else "live GiB")
    line_too = "" if observed is None else f"; the line: {observed.title}"
    axes.set_title(f"One training step, {timeline.title}{line_too}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    return figure
