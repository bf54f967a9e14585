"""Stages kept in part: every way to drop saved tensors restores them bit for bit, at the stated price."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematplan import Plan, Schedule, execute, solve
from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.capture.graph.recompute import compile_rebuilds, divisible, packs_of, rerun
from rematplan.scheduler.core.schedule import Backward, Keep
from rematplan.scheduler.costs.option_costs import _fresh
from rematplan.scheduler.solvers.persistent import build
from rematplan.scheduler.torch_layer.preserve import RandomState, preserved
from tests.shared.helpers import smallest
from tests.shared.models import SEVEN, Case
from tests.shared.steps import (
    assert_equal,
    case_of,
    each_model,
    peak_of_a_step,
    plan_for,
    replan,
    restored,
    scheduled,
    thinnest,
    train,
)

MODELS = [name for name in SEVEN if name != "mlp"]


def capture_of(name: str) -> GraphCapture:
    live = plan_for(name, "graph").live[1]
    assert isinstance(live, GraphCapture)
    return live


def every_stage(case: Case, capture: GraphCapture, visit: Callable[[int, list[Any]], None]) -> None:
    """Call ``visit(stage, arguments)`` once for each distinct stage."""
    seen: set[str] = set()

    def once(k: int, arguments: list[Any]) -> None:
        if capture.stages[k].signature not in seen:
            seen.add(capture.stages[k].signature)
            visit(k, arguments)

    with preserved(case.model), torch.no_grad():
        capture.sweep(case.model, plan_call(case), once)


def plan_call(case: Case) -> Any:
    import inspect

    from rematplan.scheduler.torch_layer.call import canonical_call, read_sample

    args, kwargs = read_sample(case.sample)
    return canonical_call(inspect.signature(case.model.forward), args, kwargs)


@each_model(MODELS)
@pytest.mark.slow
def test_whatever_is_dropped_is_made_again_bit_for_bit(name: str) -> None:
    """Not only the options that pay: any set of storages that a stage makes and autograd saves."""
    case, capture = case_of(name), capture_of(name)
    generator = random.Random(0)
    tried = 0

    def visit(k: int, arguments: list[Any]) -> None:
        nonlocal tried
        if not divisible(capture.graph, capture.linear, k):
            return
        packs = packs_of(capture.graph, capture.linear, k)
        first = capture.linear.cuts[k]
        groups = sorted({p.group for p in packs if capture.graph.groups[p.group].producer >= first})
        for _ in range(6 if groups else 0):
            lost = {group for group in groups if generator.random() < 0.5} or set(groups)
            dropped = frozenset(n for n, pack in enumerate(packs) if pack.group in lost)
            stage = capture.stages[k]
            parts = compile_rebuilds(capture.graph, capture.linear, k, stage.argument_names, dropped)
            fresh = _fresh(capture, k, arguments)
            state = RandomState(capture.device)
            saved: list[Tensor] = []

            def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
                saved.append(tensor)
                return tensor

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, pack):
                stage.function(*fresh)
            assert len(saved) == len(packs)
            filled: dict[int, Tensor] = {}
            for part in generator.sample(parts, len(parts)):  # in any order
                state.restore()
                again = _fresh(capture, k, arguments)
                kept = [saved[n].detach().requires_grad_(flag) for n, flag in part.sources]
                made: dict[int, Tensor] = {}
                rerun(part, again, kept, made.__setitem__)
                assert made.keys() == part.dropped
                filled.update(made)
            assert filled.keys() == dropped
            for number, tensor in filled.items():
                assert torch.equal(tensor.nan_to_num(), saved[number].nan_to_num())
                assert tensor.stride() == saved[number].stride()
            tried += 1

    every_stage(case, capture, visit)
    assert tried > 5


def random_options(plan: Plan, generator: random.Random) -> Plan:
    """A persistent schedule that splits seldom and keeps with any option."""
    stages = plan.chain.stages

    def decide(s: int, t: int) -> tuple[int, int]:
        j = s + 1
        if s < t and stages[s].recomputable and generator.random() < 0.3:
            while j < t and stages[j].recomputable and generator.random() < 0.6:
                j += 1
            return -1, j
        return generator.randrange(len(stages[s].options)), 0

    return scheduled(plan, build(len(stages), decide))


@each_model(MODELS)
@pytest.mark.slow
def test_any_schedule_with_any_options_trains_bit_equal_and_within_its_peak(name: str) -> None:
    case = case_of(name)
    with restored(case.model):
        plain = train(case, case.model)
    for seed in range(4):
        plan = random_options(plan_for(name, "graph"), random.Random(seed))
        with restored(case.model):
            model = execute(plan, case.model)
            peak = peak_of_a_step(case, model).peak
        with restored(case.model):
            assert_equal(train(case, execute(plan, case.model)), plain)
        assert peak <= plan.predicted_peak


@each_model(["gpt2", "unet"])
def test_options_need_less_time_than_whole_stages_do(name: str) -> None:
    """At half of the activations, by the solver's own figures."""
    from dataclasses import replace

    plan = plan_for(name, "graph")
    whole = replace(
        plan,
        chain=replace(plan.chain, stages=tuple(replace(s, options=s.options[:1]) for s in plan.chain.stages)),
    )
    budget = (smallest(whole.chain) + plan.plain.peak) // 2
    assert replan(plan, budget).predicted_overhead < 0.7 * replan(whole, budget).predicted_overhead


def test_a_plan_with_options_saved_and_loaded_trains_bit_equal(tmp_path: Path) -> None:
    case = case_of("tiny")
    plan = thinnest(plan_for("tiny", "graph"))
    assert any(plan.program.kept)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    with restored(case.model):
        got = train(case, execute(loaded, case.model))
    with restored(case.model):
        assert_equal(got, train(case, case.model))


class InPlace(nn.Module):
    """Changes values in place: once before anything is saved of them, once after another op has read them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x))
        z = y + 1.0  # reads what y is before it changes
        y += x
        y.relu_()
        return torch.tanh(z) * torch.sigmoid(y) + x


def test_values_that_are_changed_in_place_are_made_again_as_they_were() -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    case = Case(nn.Sequential(*(InPlace() for _ in range(4))).train(), batch, (batch,))
    whole = solve(case.model, "1GiB", sample=batch, capture="graph")
    assert max(len(stage.options) for stage in whole.chain.stages) > 2
    with restored(case.model):
        plain = train(case, case.model)
    for plan in (thinnest(whole), *(random_options(whole, random.Random(seed)) for seed in range(4))):
        with restored(case.model):
            assert_equal(train(case, execute(plan, case.model)), plain)


class Twice(nn.Module):
    """One layer that is used twice, so that autocast casts its weight once for both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(torch.sin(self.layer(x)))).float()


def test_a_cast_that_several_ops_save_is_made_again() -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 32)
    case = Case(nn.Sequential(*(Twice() for _ in range(4))).train(), batch, (batch,))

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    with autocast():
        whole = solve(case.model, "1GiB", sample=batch, capture="graph")
    assert max(len(stage.options) for stage in whole.chain.stages) > 2
    with restored(case.model):
        plain = train(case, case.model, context=autocast)
    for plan in (thinnest(whole), *(random_options(whole, random.Random(seed)) for seed in range(4))):
        with restored(case.model):
            assert_equal(train(case, execute(plan, case.model), context=autocast), plain)


def test_explain_marks_what_is_kept_and_what_runs_again() -> None:
    plan = plan_for("gpt2", "graph")
    stages = plan.chain.stages
    keep = [Keep(k, min(1, len(stage.options) - 1)) for k, stage in enumerate(stages)]
    plan = scheduled(plan, Schedule((*keep, *map(Backward, reversed(range(len(stages)))))))
    k = next(k for k, stage in enumerate(stages) if len(stage.options) > 3)
    lines = plan.explain(k).splitlines()
    assert plan.chain.stages[k].name in lines[0]
    marked = [line.split()[1] for line in lines if line.startswith("  R ")]
    assert marked == [plan.capture.ops[k][i][0] for i in plan.capture.rerun[k][1]]
    assert any(line.startswith("  K ") for line in lines)
    kept_whole = replan(plan, 2**40)
    assert not any(line.startswith("  R ") for line in kept_whole.explain(k).splitlines())
    with pytest.raises(ValueError, match=r"expected 0 \.\. "):
        plan.explain(len(plan.chain))
    with pytest.raises(ValueError, match="modules"):
        plan_for("tiny", "modules").explain(0)


def test_numbers_that_no_stage_saves_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    plan = thinnest(plan_for("tiny", "graph"))
    spoilt = [tuple((999,) if option else () for option in options) for options in plan.capture.dropped]
    with pytest.raises(ValueError, match="makes no saved tensor 999"):
        execute(
            replace(plan, capture=replace(plan.capture, dropped=tuple(spoilt)), live=None),
            case_of("tiny").model,
        )(case_of("tiny").sample)
    with pytest.raises(ValueError, match=r"capture\.dropped has"):
        replace(plan, capture=replace(plan.capture, dropped=plan.capture.dropped[1:]))


def test_names_of_options_say_what_runs_again() -> None:
    names = {option.name for stage in plan_for("gpt2", "graph").chain.stages for option in stage.options}
    assert "all" in names
    assert any("layer_norm" in name for name in names)
    assert all(name == "all" or name.startswith("all but ") for name in names)
