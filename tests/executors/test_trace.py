"""The account of a step as text: each run, re-run and release, once and in order."""

from __future__ import annotations

import torch

from rematplan.executors.trace import Trace
from tests.shared.steps import plan_for, tightest


def test_events_carry_the_bytes_of_their_storages_each_counted_once() -> None:
    trace = Trace(plan_for("tiny", "graph"), "Model")
    base = torch.zeros(8)
    trace("held", 0, (base, base[:2], torch.zeros(2)))
    trace("freed", 0, ())
    assert trace.events == [("held", 0, 40), ("freed", 0, 0)]
    assert trace.text().splitlines()[1:] == ["  held       boundary 0, 40 B", "  freed      boundary 0"]


def test_the_text_names_stages_and_says_why_they_run() -> None:
    plan = tightest(plan_for("tiny", "graph"))
    trace = Trace(plan, "Model")
    names = [stage.name for stage in plan.chain.stages]
    for what, where in (
        ("first", 0),
        ("first", 0),
        ("first", 1),
        ("advance", 0),
        ("rebuild", 1),
        ("part", 0),
    ):
        trace(what, where)
    trace("backward", 1)
    trace("backward", 1)  # what is left of it after a replay
    trace("replay", 3)  # an action, which its runs tell of
    assert trace.text().splitlines() == [
        f"Model: {len(names)} stages, budget {trace.text().splitlines()[0].partition('budget ')[2]}",
        f"  run        stage 0 {names[0]}; kept: {plan.kept(0)}",
        f"  run        stage 1 {names[1]}; kept: {plan.kept(1)}",
        f"  run again  stage 0 {names[0]}; for its output",
        f"  run again  stage 1 {names[1]}; for what autograd saves",
        f"  run again  stage 0 {names[0]}; the ops that make what was not kept",
        f"  backward   stage 1 {names[1]}",
    ]
