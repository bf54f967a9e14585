"""A third kind of capture, known to this file alone, is planned, trained, saved and loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rematplan import CaptureError, Plan, execute, solve
from rematplan.executors.engine import Engine, Executor
from rematplan.executors.recapture import ENGINES
from rematplan.scheduler.capture.bit_equal_step import difference, step_result
from rematplan.scheduler.capture.protocol import Asked, Capture, Producer, StageEffects
from rematplan.scheduler.capture.trial_step import TrialStep
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.costs.assemble import StageFacts, Values, assemble, parameter_grads
from rematplan.scheduler.costs.stage_run import Enter, StageRun, fresh_grads, measure_stage
from rematplan.scheduler.plan.kinds import KINDS, Kind
from rematplan.scheduler.torch_layer.leaves import tree_leaves
from rematplan.scheduler.torch_layer.preserve import preserved
from rematplan.scheduler.torch_layer.target import Target
from tests.shared.helpers import smallest
from tests.shared.models import Case
from tests.shared.nested import nested
from tests.shared.steps import assert_equal, restored, train


@dataclass(slots=True)
class Members(Capture):
    """The members of a Sequential as stages."""

    names: list[str]
    device: torch.device
    effects: list[StageEffects]
    target: Target | None = None
    kind = "members"

    def __len__(self) -> int:
        return len(self.names)

    def record(self) -> dict[str, Any]:
        return {}

    def without_data(self, device: torch.device, fake: Any) -> Members:
        return replace(self, device=device)


def members(model: nn.Module) -> Members:
    if not isinstance(model, nn.Sequential):
        raise CaptureError("no Sequential")
    effects = [StageEffects(random=isinstance(member, Block)) for member in model]
    return Members([name for name, _ in model.named_children()], torch.device("cpu"), effects)


def alone(member: nn.Module, x: Tensor, entering: bool, enter: Enter) -> list[Tensor]:
    """Run a member; the input of the first one gets no gradient."""
    return [member(enter(0, x) if entering else x)]


class OfMembers(Producer):
    """Runs each member in isolation, on what the one before gives."""

    def capture(self, step: TrialStep, asked: Asked, refused: str) -> tuple[Members, str]:
        return members(step.model), "asked for"

    def price(
        self,
        captured: Members,
        step: TrialStep,
        *,
        resident: int,
        clock: bool,
        options: bool,
    ) -> Chain:
        model, (x,) = step.model, tree_leaves(step.call)
        values, facts = Values(), []
        readers = {p: [k] for k, member in enumerate(model.children()) for p in member.parameters()}
        created, _ = parameter_grads(readers, (), [0] * len(captured), captured.place)
        boundary: tuple[int, ...] = ()
        with preserved(model):
            for k, member in enumerate(model.children()):
                run = StageRun(
                    functools.partial(alone, member, x, k > 0), fresh_grads(member.parameters(), ())
                )
                cost = measure_stage(run, captured.place, clock=clock)
                facts.append(
                    StageFacts(
                        name=captured.names[k],
                        forward=1.0,
                        backward=2.0,
                        enters=boundary,
                        options=[((values.new(cost.kept), *boundary), cost.whole)],
                        dropping_peak=cost.dropping_peak,
                        boundary_grad=x.nbytes if k else 0,
                        lead=cost.lead,
                        arriving=cost.output_grads,
                        created=created[k],
                        appearing=created[k],
                    )
                )
                with torch.no_grad():
                    x = member(x)
                boundary = (values.new(x.nbytes),)
        return assemble(facts, values, captured, model, resident=resident, held=0, output_grad=4)


class Checkpointed(Executor):
    """Trains by torch's own checkpoint, nested as the schedule is."""

    def __init__(self, capture: Members, plan: Plan, model: nn.Module, check: str) -> None:
        super().__init__(capture, plan, check)
        stages = [model.get_submodule(name) for name in capture.names]
        self.run = nested(plan.schedule, stages, lambda f, x: checkpoint(f, x, use_reentrant=False))

    def forward(self, flat: list[Any], call: Any) -> Any:
        return self.run(flat[0])


def again(plan: Plan, model: nn.Module, call: Any) -> Members:
    found = members(model)
    if tuple(each.random for each in found.effects) != plan.capture.random:
        raise CaptureError("other members draw random numbers than in the plan")
    return found


class Block(nn.Sequential):
    """Runs are counted."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + super().forward(x)


class Loss(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A model; the table and the engines have a row more."""
    monkeypatch.setitem(KINDS, "members", Kind(OfMembers, runs_code=True, stages="members of a Sequential"))
    monkeypatch.setitem(ENGINES, "members", Engine(Checkpointed, again))
    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    return Case(nn.Sequential(*(Block(16) for _ in range(6)), Loss()).train(), batch, (batch,))


def plan_of(case: Case) -> Plan:
    """A plan in which blocks run again."""
    plan = solve(case.model, "1GiB", sample=case.sample, capture="members", costs="roofline")
    return plan.within(smallest(plan.chain))


def test_a_third_kind_is_planned_and_trains_bit_equal(case: Case) -> None:
    plan = plan_of(case)
    assert plan.capture.kind == "members"
    assert plan.predicted_peak < plan.plain.peak
    assert "7 stages: members of a Sequential" in plan.table()
    planned = execute(plan, case.model)
    with restored(case.model):
        expected = train(case, case.model)
    block = case.model.get_submodule("0")
    assert isinstance(block, Block)
    block.runs = 0
    with restored(case.model):
        assert_equal(train(case, planned), expected)
    assert block.runs > 2, "of two steps, no block ran again"


def test_it_is_saved_loaded_and_captured_again(case: Case) -> None:
    plan = Plan.from_json(plan_of(case).to_json())
    with restored(case.model):
        expected = train(case, case.model)
    with restored(case.model):
        assert_equal(train(case, execute(plan, case.model)), expected)
    other = replace(plan, capture=replace(plan.capture, random=(False,) * 7))
    with pytest.raises(ValueError, match="other members draw random numbers"):
        train(case, execute(other, case.model))


def test_a_new_shape_is_planned_by_it_too(case: Case) -> None:
    planned = execute(plan_of(case), case.model)
    smaller = Case(case.model, case.sample[:24], (case.sample[:24],))
    with restored(case.model):
        expected = train(smaller, case.model)
    with restored(case.model):
        assert_equal(train(smaller, planned), expected)


def test_a_buffer_that_a_step_leaves_otherwise_is_a_difference() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(), torch.randn(8, 4)
    seen = torch.zeros(3)
    model.register_buffer("seen", seen)

    def spoilt() -> Tensor:
        output: Tensor = model(batch)
        seen[2] += 1
        return output

    plain = step_result(model, lambda: model(batch))
    assert difference(plain, step_result(model, lambda: model(batch))) is None
    assert difference(plain, step_result(model, spoilt)) == "buffer seen differs by up to 1"
