"""A plan file is untrusted data: it is refused by name, or trains like the plain model."""

from __future__ import annotations

import copy
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rematplan import (
    CaptureError,
    HostMemory,
    InfeasibleBudget,
    Plan,
    PlanMismatch,
    ReplayError,
    execute,
    solve,
)
from tests.shared.models import Case, tiny
from tests.shared.steps import assert_equal, plan_for, thinnest, tightest, train

KINDS = ("graph", "options", "modules", "two_level")
K = object()  # the first stage that has options
HOST = HostMemory(2**30, 1e9, 1e9, asynchronous=True)
ALLOWED = (ValueError, PlanMismatch, InfeasibleBudget, CaptureError, ReplayError)


@functools.cache
def _written(kind: str) -> str:
    plan = plan_for("tiny", "modules" if kind == "modules" else "graph")
    if kind == "options":
        plan = thinnest(plan)
    elif kind == "two_level":
        budget = (tightest(plan).memory_budget + plan.plain.peak) // 2
        plan = plan.within(budget, solver="two_level", parameters={"host": HOST})
    else:
        plan = tightest(plan)
    return json.dumps(plan.to_json())


def _data(kind: str) -> Any:
    return json.loads(_written(kind))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


STRANGE = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**62, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"),
        float("inf"), "", "x", "0", "\ud800", "0.linear", "1.norm.running_mean", [], {}, [[]], [[], []], [0], [None],
        {"format": 1}, [["keep", 0, 0]], ["keep", 0, 99], ["backward", 5], ["offload", 1], json.loads("[" * 200 + "]" * 200),
    ]
)  # fmt: skip # one list


@st.composite
def _edited(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, most: int = 3) -> Any:
    """A plan's data with fields taken away, doubled, swapped, or replaced."""
    data = _data(draw(st.sampled_from(kinds)))
    for _ in range(draw(st.integers(1, most))):
        parts = [p for p in ("capture", "chain", "schedule") if p in data and draw(st.integers(0, 3))]
        root = draw(st.sampled_from(parts)) if parts else None
        places = [p for p in _places(data) if root is None or p[0] == root]
        if not places:
            continue
        path = places[draw(st.integers(0, len(places) - 1))]
        holder = functools.reduce(lambda value, key: value[key], path[:-1], data)
        key, how = path[-1], draw(st.sampled_from(["drop", "strange", "twice", "number", "swap", "flip"]))
        old = holder[key]
        if how == "drop":
            del holder[key]
        elif how == "strange":
            holder[key] = draw(STRANGE)
        elif how == "twice" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(old))
        elif how == "number" and isinstance(old, (int, float)) and not isinstance(old, bool):
            holder[key] = old + draw(st.sampled_from([-1, 1, -old, 10**6]))
        elif how == "flip" and isinstance(old, bool):
            holder[key] = not old
        elif how == "swap" and isinstance(holder, list) and len(holder) > 1:
            other = draw(st.integers(0, len(holder) - 1))
            holder[key], holder[other] = holder[other], old
    return data


@given(_edited())
@pytest.mark.slow
def test_an_edited_plan_is_loaded_or_refused_by_a_value_error(data: Any) -> None:
    began = time.process_time()
    try:
        plan = Plan.from_json(data)
        str(plan)
        if plan.capture.ops:
            plan.explain(0)
    except ValueError:
        pass
    assert time.process_time() - began < 10


@pytest.mark.slow
@settings(max_examples=24, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(_edited(most=1))
def test_an_edited_plan_trains_like_the_plain_model_or_is_refused(data: Any) -> None:
    case = tiny()
    try:
        plan = Plan.from_json(data)
        got = train(case, execute(plan, case.model), steps=1)
        plan.within(plan.memory_budget)
    except ALLOWED:
        return
    assert_equal(got, _plain())


@functools.cache
def _plain() -> Any:
    case = tiny()
    return train(case, case.model, steps=1)


# ---- files that are no plans -----------------------------------------------------------------------------

FILES: dict[str, bytes] = {
    "is not JSON.*Expecting value": b"",
    "is not JSON.*utf-8": b"\xff\xfe\x00plan",
    "is not JSON.*nested too deeply": b"[" * 10**6,
    "is not JSON.*'format' stands twice": b'{"format": 1, "format": 1}',
    "is not JSON.*integer string": b'{"format": ' + b"9" * 10**5 + b"}",
    "has no field 'memory_budget'": b'{"format": 1}',
    "format 'list'": b"[]",
}


@pytest.mark.parametrize("says", FILES)
def test_a_file_that_is_no_plan_is_refused_by_name(says: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(FILES[says])
    with pytest.raises(ValueError, match=rf"Plan\.load: .*some\.json.*{says}"):
        Plan.load(path)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"is no file; pass the path of a file that Plan\.save wrote"):
            Plan.load(path)


def test_a_file_larger_than_any_plan_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rematplan.scheduler.plan.plan_file.MOST_BYTES", 1000)
    (tmp_path / "plan.json").write_text(_written("graph"), encoding="utf-8")
    with pytest.raises(ValueError, match="has more than 1000 bytes"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="a plan file at most 1000"):
        tightest(plan_for("tiny", "graph")).save(tmp_path / "other.json")


def _with(kind: str, *path: Any, value: Any) -> Any:
    data = _data(kind)
    functools.reduce(lambda found, key: found[key], path[:-1], data)[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("solver",), "magic", "solver is 'magic', expected one of optimal"),
        (("solver",), "two_level", "host is None, expected the second memory"),
        (("format",), True, r"plan\.format is True, expected 1"),
        (("memory_budget",), True, r"plan\.memory_budget is True"),
        (("memory_budget",), 2**63, r"plan\.memory_budget is 9223372036854775808"),
        (("resident", "buffers"), -1, r"plan\.resident\['buffers'\] is -1"),
        (("chain", "stages", 1, "forward"), float("nan"), r"plan\.chain\.stages\[1\]\.forward is nan"),
        (("chain", "stages", 1, "forward"), 10**400, r"plan\.chain\.stages\[1\]\.forward"),
        (("chain", "stages", 1, "input"), "12", r"stages\[1\]\.input is '12', expected an integer"),
        (("chain", "stages", 0, "options"), [], "options=.* must hold at least one"),
        (("chain", "stages", 0, "surprise"), 1, r"stages\[0\] has an unknown field 'surprise'"),
        (("capture", "cuts"), [3, 2, 9], r"capture\.cuts has 3 entries"),
        (("capture", "cuts", 0), -1, r"plan\.capture\.cuts\[0\] is -1"),
        (("capture", "random"), [True], r"capture\.random has 1 entries, expected 0 or"),
        (("capture", "random", 0), 1, r"plan\.capture\.random\[0\] is 1, expected true or false"),
        (("capture", "leaves"), "{}", r"plan\.capture\.leaves is \{\}, expected a list"),
        (("capture", "leaves"), "[" * 10**5, "nested too deeply"),
        (("capture", "stages"), ["0"], r"capture\.stages is \('0',\), expected none"),
        (("schedule", "actions", 0), ["keep", 0, 10**6], "stage 0 has"),
        (("schedule", "actions", 0), ["keep", 10**6, 0], r"expected stages in 0 \.\."),
        (("schedule", "actions", 0), [["keep"]], r"actions\[0\] is \[\['keep'\]\], which is no action"),
        (("host",), {"capacity": 1, "write_bandwidth": 0, "read_bandwidth": 1}, r"host\.write_bandwidth is 0"),
        (("optimizer_step",), -1, r"plan\.optimizer_step is -1"),
    ],
)  # fmt: skip # one table
def test_a_field_out_of_its_range_is_named(path: tuple[Any, ...], value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"Plan\.from_json: not a plan: .*{says}.*make the plan again"):
        Plan.from_json(_with("graph", *path, value=value))


def test_a_schedule_that_nobody_could_judge_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rematplan.scheduler.plan.plan_file.MOST_WORK", 100)
    with pytest.raises(ValueError, match="more than can be judged"):
        Plan.from_json(_data("graph"))


@pytest.mark.parametrize(
    ("field", "value"), [("value", 99), ("made", 99), ("readers", [99]), ("freed", 99), ("last", 99)]
)
def test_a_long_lived_value_that_the_chain_does_not_have_is_refused(field: str, value: Any) -> None:
    data = _data("graph")
    entry = data["chain"]["carried"][0]
    entry[field] = value
    with pytest.raises(ValueError, match=r"does not fit \d+ stages and \d+ values"):
        Plan.from_json(data)


# ---- what the model knows better -------------------------------------------------------------------------


def _step(data: Any, case: Case | None = None) -> Any:
    case = case or tiny()
    return train(case, execute(Plan.from_json(data), case.model), steps=1)


def _stage(kind: str, field: str) -> int:
    """The first stage for which a field of the record says something."""
    return next(k for k, value in enumerate(_data(kind)["capture"][field]) if value)


@pytest.mark.parametrize("kind", ["graph", "options", "two_level"])
@pytest.mark.slow
def test_a_graph_stage_that_draws_or_changes_buffers_cannot_be_said_not_to(kind: str) -> None:
    k = _stage(kind, "random")
    with pytest.raises(PlanMismatch, match=rf"stage {k} \(.*\) draws random numbers, and the plan says"):
        _step(_with(kind, "capture", "random", k, value=False))
    k = _stage(kind, "changed")
    with pytest.raises(PlanMismatch, match=rf"stage {k} \(.*\) changes buffer '.*', and the plan says"):
        _step(_with(kind, "capture", "changed", k, value=[]))


def test_what_a_plan_leaves_out_is_found_on_the_model() -> None:
    data = _data("graph")
    del data["capture"]["random"], data["capture"]["changed"]
    assert_equal(_step(data), _plain())
    data = _data("modules")
    data["capture"]["random"] = [not each for each in data["capture"]["random"]]
    data["capture"]["changed"] = [[] for _ in data["capture"]["changed"]]
    assert_equal(_step(data), _plain())


@pytest.mark.parametrize(
    ("kind", "path", "value", "says"),
    [
        ("graph", ("changed", 0), ["nowhere"], "names 'nowhere', which is no buffer of this model"),
        ("graph", ("evaluating",), ["nowhere"], "names 'nowhere', which is no submodule of this model"),
        ("graph", ("uncached",), True, "made within autocast"),
        ("modules", ("stages", 0), "nowhere", "names 'nowhere', which is no submodule"),
        ("modules", ("stages", 0), "", "names '', which is no submodule"),
        ("modules", ("fed", 1), [[0, 1, 1]], r"is fed \(\(0, 0, 1\),\).* and \(\(0, 1, 1\),\) in the plan"),
        ("options", ("dropped", K, 0), [0], "option 0 keeps all"),
        ("options", ("dropped", K, 1), [10**6], "makes no saved tensor 1000000"),
        ("options", ("dropped", K, 1), [], "more than the plan counts for it"),
    ],
)  # fmt: skip # one table
def test_what_does_not_fit_the_model_is_named(kind: str, path: Any, value: Any, says: str) -> None:
    with pytest.raises(PlanMismatch, match=says):
        _step(_with(kind, "capture", *[_thinned() if each is K else each for each in path], value=value))


def _thinned() -> int:
    """The first stage with options that keep less than all."""
    return next(k for k, stage in enumerate(_data("options")["chain"]["stages"]) if len(stage["options"]) > 1)


def test_code_between_blocks_cannot_be_said_to_run_again() -> None:
    with pytest.raises(PlanMismatch, match=r"stage 0 \(before\) must run once \(it is code between blocks\)"):
        _step(_with("modules", "chain", "stages", 0, "recomputable", value=True))


class InPlace(nn.Module):
    """A residual block that changes a value in place while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x)
        kept = hidden.tanh()
        return x + kept + hidden.add_(1).sin()


def test_a_cut_where_a_live_value_is_changed_in_place_later_is_refused() -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    case = Case(nn.Sequential(*(InPlace() for _ in range(4))).train(), batch, (batch,))
    data = json.loads(
        json.dumps(tightest(solve(case.model, "1GiB", sample=batch, capture="graph")).to_json())
    )
    plain = copy.deepcopy(case.model)
    assert_equal(_step(data, case), train(Case(plain, batch, (batch,)), plain, steps=1))
    refused = 0
    for cut in range(1, data["capture"]["cuts"][1] if len(data["capture"]["cuts"]) > 1 else 8):
        if cut == data["capture"]["cuts"][0]:
            continue
        edited = copy.deepcopy(data)
        edited["capture"]["cuts"][0] = cut
        case.model.load_state_dict(plain.state_dict())
        try:
            _step(edited, case)
        except PlanMismatch as error:
            refused += "changed in place later" in str(error)
    assert refused


@torch.library.custom_op("rematplan_tests::moody", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def moody(x: Tensor) -> Tensor:
    """A mask that is random only where the input is positive on average."""
    return (torch.rand_like(x) > 0.5).to(x.dtype) if x.mean() > 0 else torch.ones_like(x)


@moody.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x).tanh()
        return x + (hidden * moody(x.detach())).exp()


def test_a_graph_stage_that_draws_on_some_data_only_is_known_by_the_tags_of_its_ops() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Moody() for _ in range(4))).train()
    quiet, loud = torch.full((64, 16), -100.0), torch.full((64, 16), 1.0)
    plan = tightest(solve(model, "1GiB", sample=quiet, capture="graph"))
    assert any(plan.capture.random)
    loaded = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    case = Case(model, loud, (loud,))
    plain = copy.deepcopy(model)
    want = train(Case(plain, loud, (loud,)), plain, steps=2)
    for each in (plan, loaded):
        twin = copy.deepcopy(model) if each is loaded else model
        before = copy.deepcopy(model.state_dict())
        assert_equal(train(case, execute(each, twin), steps=2), want)
        model.load_state_dict(before)
