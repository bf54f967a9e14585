"""Plans are data: saved, loaded and refused without running anything."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from rematplan import Chain, InfeasibleBudget, Plan, solve_chain
from rematplan.scheduler.core.budget import free_machine_bytes, parse_budget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Free, Keep, Schedule
from rematplan.scheduler.plan.plan import CaptureRecord


def _plan(budget: int = 150) -> Plan:
    chain = Chain.from_arrays(
        forward=[1.0, 2.0, 1.5],
        backward=[2.0, 4.0, 3.0],
        boundary=[10, 10, 10, 10],
        saved=[40, 60, 50],
        names=["embed", "block", "head"],
    )
    record = CaptureRecord(
        "graph", "for a test", "cpu", "structure", "[]", "model", cuts=(4, 9), random=(False, True, False)
    )
    return Plan(
        chain, solve_chain(chain, budget), budget, "optimal", "measure", record, {"parameters": 0}, "2.13"
    )


def test_a_plan_comes_back_from_its_file_equal(tmp_path: Path) -> None:
    plan = _plan()
    plan.save(tmp_path / "a.json")
    loaded = Plan.load(tmp_path / "a.json")
    assert loaded == plan
    assert loaded.timeline == plan.timeline
    assert loaded.program == plan.program
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_predictions_are_the_referees() -> None:
    plan = _plan()
    timeline = simulate(plan.chain, plan.schedule)
    assert plan.predicted_peak == timeline.peak <= 150
    assert plan.predicted_overhead == pytest.approx(timeline.seconds / plan.chain.plain_seconds - 1)
    assert plan.predicted_overhead > 0
    assert plan.plain.seconds == plan.chain.plain_seconds
    assert plan.plain.peak > plan.predicted_peak


def test_a_plan_gives_plans_for_other_budgets_from_the_same_costs() -> None:
    plan = _plan()
    other = plan.within("1KiB")
    assert other.chain is plan.chain
    assert other.memory_budget == 1024
    assert other.predicted_overhead == 0 < plan.predicted_overhead
    assert other.within(150) == plan
    periodic = plan.within(150, solver="periodic", parameters={"every": 1})
    assert periodic.solver == "periodic"
    assert periodic.within(150) == plan  # what a solver took is not known any more
    with pytest.raises(InfeasibleBudget) as caught:
        plan.within(1)
    assert plan.within(caught.value.smallest).predicted_peak == caught.value.smallest
    with pytest.raises(ValueError, match="executors cannot follow"):
        plan.within(150, solver="exhaustive")
    with pytest.raises(ValueError, match=r"Plan\.within"):
        plan.within(150, solver="none such")


def test_a_plan_over_its_budget_cannot_be_made() -> None:
    plan = _plan()
    with pytest.raises(ValueError, match="over memory_budget=100"):
        dataclasses.replace(plan, memory_budget=100)


def test_a_schedule_that_frees_what_autograd_holds_is_no_plan() -> None:
    plan = _plan(1000)
    actions = (Checkpoint(0), Keep(1), Keep(2), Free(1), Backward(2), Keep(0), Backward(1), Backward(0))
    assert simulate(plan.chain, actions).peak < 1000  # legal, and cheaper than an executor can be
    with pytest.raises(ValueError, match=r"Free\(boundary=1\) while stage 1 is kept.*Choose a solver"):
        dataclasses.replace(plan, schedule=Schedule(actions))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    _plan().save(path)
    before = path.read_bytes()
    broken = dataclasses.replace(_plan(), resident={"parameters": object()})  # type: ignore[dict-item] # no JSON
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _without(key: str) -> Any:
    data = _plan().to_json()
    del data[key]
    return data


def _with(**changes: Any) -> Any:
    return {**_plan().to_json(), **changes}


def _illegal() -> Any:
    data = _plan().to_json()
    data["schedule"]["actions"] = data["schedule"]["actions"][:-1]
    return data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "format"),
        ({}, "format"),
        (_with(format=99), "format 99"),
        (_without("chain"), "chain"),
        (_without("capture"), "capture"),
        (_with(capture={"kind": "graph", "unknown": 1}), "not a plan"),
        (_with(chain={"format": 1, "stages": []}), r"plan\.chain has no field 'output'"),
        (_illegal(), "not reversed"),
        (_with(memory_budget=1), "over memory_budget"),
    ],
)
def test_what_is_no_plan_is_refused(data: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        Plan.load(path)


def test_text_that_is_no_json_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\x80\x04 not json")
    with pytest.raises(ValueError, match=r"plan\.json is not JSON"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "missing.json")


def test_reading_a_plan_never_runs_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "plan.json"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="not JSON"):
        Plan.load(path)
    assert not (tmp_path / "exploded").exists()


def test_the_table_shows_stages_runs_totals_and_the_budget() -> None:
    plan = _plan()
    text = str(plan)
    for word in ("embed", "block", "head", "total", "budget 150 B", "predicted peak", "for a test"):
        assert word in text
    rows = [line.split() for line in text.splitlines()]
    runs = {row[1]: row for row in rows if row[:1] and row[0] in "012" and len(row) > 5}
    assert [int(runs[name][3]) for name in ("embed", "block", "head")] == list(plan.timeline.runs)
    assert any(row[:2] == ["total", str(sum(plan.timeline.runs))] for row in rows)


def test_a_share_of_memory_is_one_of_the_device_that_the_plan_is_for() -> None:
    plan = _plan()

    def planned_for(device: str, memory: int) -> Plan:
        record = dataclasses.replace(plan.capture, target=device, target_memory=memory)
        return dataclasses.replace(plan, capture=record)

    assert plan.within("50%").memory_budget == parse_budget("50%")  # the CPU's memory is this machine's
    assert (
        planned_for("T4", 0).within("50%").memory_budget == 8 * 10**9
    )  # as plans of old versions are written
    mine = planned_for("mine", 4000)
    assert mine.within("50%").memory_budget == 2000
    assert mine.within("auto").memory_budget == 4000 - 200
    assert Plan.from_json(json.loads(json.dumps(mine.to_json()))).within("100%").memory_budget == 4000
    free, alive = free_machine_bytes(), 10**15
    there = dataclasses.replace(plan, resident={"parameters": alive, "allocator slack": alive}, live=object())
    assert 0 < there.within("auto - 1B").memory_budget - alive < 2 * free < alive
    assert plan.within("auto - 1B").memory_budget < alive
