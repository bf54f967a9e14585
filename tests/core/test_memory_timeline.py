"""Timelines of live bytes: a plan's predictions, and the formats they are written in."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.cuda import _memory_viz as viz

from rematplan import rehearse
from rematplan.scheduler.plan.timeline import CATEGORIES, Allocation, MemoryTimeline, Moment
from tests.shared.steps import case_of, each_model, plan_for, replan, tightest

pytestmark = pytest.mark.filterwarnings("ignore:device argument is deprecated")


@each_model(["tiny", "gpt2", "unet"])
def test_the_categories_of_a_plan_add_up_to_what_the_referee_says(name: str) -> None:
    plan = plan_for(name, "graph")
    for each in (plan, tightest(plan), replan(plan, plan.plain.peak - 1)):
        timeline = MemoryTimeline.of(each)
        assert timeline.live[::2] == each.timeline.during
        assert timeline.live[1::2] == each.timeline.live
        assert timeline.peak == each.predicted_peak
        assert list(timeline.by_category) == [c for c in CATEGORIES if c in timeline.by_category]
        assert timeline.by_category["parameters"] == (each.resident["parameters"],) * len(timeline.points)
        assert timeline.by_category["gradients"][-1] == sum(s.grad for s in each.chain.stages)


def test_a_checkpointed_step_holds_boundaries_and_a_plain_one_keeps_saved_tensors() -> None:
    plan = plan_for("tiny", "graph")
    tight, plain = MemoryTimeline.of(tightest(plan)), MemoryTimeline.of(plan)
    assert max(tight.by_category["boundaries held"]) > 0
    assert max(tight.by_category["kept saved tensors"]) < max(plain.by_category["kept saved tensors"])


def test_json_gives_the_timeline_back() -> None:
    timeline = MemoryTimeline.of(tightest(plan_for("tiny", "graph")))
    data = json.loads(json.dumps(timeline.to_json()))
    assert MemoryTimeline.from_json(data) == timeline
    assert data["live"] == list(timeline.live)
    assert {name: tuple(series) for name, series in data["by_category"].items()} == timeline.by_category


@pytest.mark.parametrize(
    "broken", [None, {}, {"format": 2}, {"format": 1}, {"format": 1, "title": "", "budget": 1}]
)
def test_what_is_no_timeline_is_refused(broken: object) -> None:
    with pytest.raises(ValueError, match=r"MemoryTimeline\.from_json"):
        MemoryTimeline.from_json(broken)  # type: ignore[arg-type] # on purpose


def test_a_block_outside_the_points_is_refused() -> None:
    with pytest.raises(ValueError, match="lies outside"):
        MemoryTimeline("", 1, ("run",), (Moment(0, "op"),), (Allocation("a", "inputs", 1, 0, 2),))


@st.composite
def timelines(draw: st.DrawFn) -> MemoryTimeline:
    """Blocks of any sizes and lifetimes."""
    count = draw(st.integers(1, 12))
    blocks = []
    for number in range(draw(st.integers(0, 20))):
        begin = draw(st.integers(0, count - 1))
        end = draw(st.integers(begin + 1, count))
        category = draw(st.sampled_from(CATEGORIES))
        blocks.append(Allocation(f"op {number}", category, draw(st.integers(1, 1000)), begin, end))
    points = tuple(Moment(0, f"op {i}") for i in range(count))
    return MemoryTimeline("any", 10, ("run stage 0",), points, tuple(blocks))


def replayed(timeline: MemoryTimeline) -> list[int]:
    """Live bytes after each point, from the snapshot alone; no two live blocks may overlap."""
    snapshot = timeline.to_snapshot()
    (trace,) = snapshot["device_traces"]
    live: dict[int, int] = {}
    result = [0] * len(timeline.points)
    for event in trace:
        address, size = event["addr"], event["size"]
        if event["action"] == "alloc":
            assert all(address + size <= a or a + s <= address for a, s in live.items())
            live[address] = size
        elif event["action"] == "free_completed":
            assert live.pop(address) == size
        for later in range(event["time_us"], len(result)):
            result[later] = sum(live.values())
    (segment,) = snapshot["segments"]
    active = {b["address"]: b["size"] for b in segment["blocks"] if b["state"] == "active_allocated"}
    assert active == live
    assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"]
    return result


@given(timelines())
@settings(max_examples=50, deadline=None)
def test_a_snapshot_has_the_bytes_of_the_timeline_at_every_point(timeline: MemoryTimeline) -> None:
    assert tuple(replayed(timeline)) == timeline.live


@pytest.mark.parametrize("observed", [False, True])
def test_torch_reads_the_snapshot(observed: bool, tmp_path: Path) -> None:
    plan, case = tightest(plan_for("tiny", "graph")), case_of("tiny")
    timeline = rehearse(plan, case.model, case.sample).timeline if observed else MemoryTimeline.of(plan)
    timeline.save_snapshot(tmp_path / "step.pickle")
    with (tmp_path / "step.pickle").open("rb") as file:
        snapshot = pickle.load(file)
    assert snapshot == timeline.to_snapshot()
    assert f"{len(snapshot['device_traces'][0])} entries" in viz.trace(snapshot)
    assert f"total_allocated: {viz.Bytes(timeline.live[-1])}" in viz.segsum(snapshot)
    assert "Active Memory Timeline" in viz.trace_plot(snapshot)
    assert "Allocator State History" in viz.segment_plot(snapshot)
    lines: list[str] = []
    viz.segments(snapshot, format_flamegraph=lines.append)
    assert "parameters" in lines[0]
    left = viz.filter_alloc_free_pairs(snapshot)["device_traces"][0]
    assert sum(event["size"] for event in left) == timeline.live[-1]


def test_the_figure_stacks_to_the_total_and_shows_budget_and_observed() -> None:
    pytest.importorskip("matplotlib")
    plan, case = tightest(plan_for("tiny", "graph")), case_of("tiny")
    timeline = MemoryTimeline.of(plan)
    seen = rehearse(plan, case.model, case.sample).timeline
    (axes,) = timeline.figure(seen).axes
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [*timeline.by_category, "rehearsed without data", "budget"]
    highest = max(np.asarray(path.vertices)[:, 1].max() for c in axes.collections for path in c.get_paths())
    assert highest == pytest.approx(plan.predicted_peak / 2**20)
    budget = next(line for line in axes.lines if line.get_label() == "budget")
    assert np.asarray(budget.get_ydata())[0] == plan.memory_budget / 2**20


def test_figures_of_two_schedules_are_not_mixed() -> None:
    plan = plan_for("tiny", "graph")
    with pytest.raises(ValueError, match="different schedules"):
        MemoryTimeline.of(plan).figure(MemoryTimeline.of(tightest(plan)))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'rematplan\[plot\]'"):
        MemoryTimeline.of(plan_for("tiny", "graph")).figure()


def test_a_timeline_that_disagrees_with_the_referee_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(plan_for("tiny", "graph"))
    wrong = dataclasses.replace(plan.timeline, live=tuple(x + 1 for x in plan.timeline.live))
    plan.__dict__["timeline"] = wrong
    with pytest.raises(RuntimeError, match="by the referee"):
        MemoryTimeline.of(plan)
