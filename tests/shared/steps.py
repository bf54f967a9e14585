"""Record training steps bit for bit, and plan for the models of ``tests.shared.models``."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rematplan import MeasuredPeak, Plan, Schedule, execute, measure_peak, simulate, solve
from rematplan.executors.plain import plans_within
from rematplan.scheduler.core.schedule import Backward, Keep
from rematplan.scheduler.costs.meters.peak import count_bytes
from tests.shared.helpers import smallest
from tests.shared.models import BUILDERS, Case

Record = dict[str, Tensor | None]
EACH_CAPTURE = pytest.mark.parametrize("capture", ["graph", "modules", "options"])
EITHER_CAPTURE = pytest.mark.parametrize("capture", ["graph", "modules"])
# Of tests that reverse a graph more than once, or have several steps under way, whatever the budget.
OVERLAPPING = pytest.mark.filterwarnings(
    r"ignore:planned \w+. (another forward runs|a backward (retains|makes)):rematplan.scheduler.core.errors.PeakWarning"
)
CPU = torch.device("cpu")
# Planning one of these takes seconds: what they show beside the small ones is left out by -m "not slow".
LARGE = ("gpt2", "llama", "resnet", "vit", "unet")
Procedure = Callable[[nn.Module], Record]


def each_model(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrize ``name`` with these models of ``tests.shared.models``, the large ones marked ``slow``."""
    marked = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in names]
    return pytest.mark.parametrize("name", marked)


def loss_of(output: Any) -> Tensor:
    """What a training loop would reverse: the model's loss, or one made of its output."""
    if isinstance(output, Tensor):
        return output if output.ndim == 0 else (output * output.detach().cos()).mean()
    found = getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else loss_of(output[0])


def state(model: nn.Module) -> Record:
    """Copies of all that a step changes: parameters, gradients, buffers, random-number state."""
    record: Record = {"rng": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        record["cuda rng"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        record[f"parameter {name}"] = parameter.detach().clone()
        record[f"gradient {name}"] = None if parameter.grad is None else parameter.grad.detach().clone()
    for name, buffer in model.named_buffers():
        record[f"buffer {name}"] = buffer.detach().clone()
    return record


def train(
    case: Case,
    model: nn.Module,
    steps: int = 2,
    context: Callable[[], Any] | None = None,
) -> list[Record]:
    """Train for a few steps of SGD from a fixed seed; a record of each step, taken before its update."""
    torch.manual_seed(11)
    records = []
    for _ in range(steps):
        if context is None:
            output = case(model)
        else:
            with context():
                output = case(model)
        loss = loss_of(output)
        loss.backward()
        records.append({"loss": loss.detach().clone(), **tensors(output), **state(model)})
        del output, loss
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
                    parameter.grad = None
    records.append(state(model))
    return records


def tensors(output: Any) -> Record:
    """Copies of the tensors in an output, by position."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return {f"output {i}": leaf.detach().clone() for i, leaf in enumerate(leaves)}


def assert_equal(got: Record | list[Record], expected: Record | list[Record]) -> None:
    """Fail, naming the first difference, unless both records are equal bit for bit."""
    if isinstance(expected, list):
        assert isinstance(got, list)
        assert len(got) == len(expected)
        for step, (a, b) in enumerate(zip(got, expected, strict=True)):
            _compare(a, b, f"step {step}: ")
        return
    assert isinstance(got, dict)
    _compare(got, expected, "")


def _compare(got: Record, expected: Record, where: str) -> None:
    assert got.keys() == expected.keys(), where
    for name, want in expected.items():
        found = got[name]
        assert (found is None) == (want is None), f"{where}{name} is {found}, expected {want}"
        if found is None or want is None:
            continue
        assert found.dtype == want.dtype, f"{where}{name} is {found.dtype}, expected {want.dtype}"
        same = torch.equal(found, want)
        assert same, f"{where}{name} differs by up to {(found.double() - want.double()).abs().max()}"


@functools.cache
def case_of(name: str) -> Case:
    """The case, built once; tests put its model back as they found it, or train copies of it."""
    return BUILDERS[name]()


@functools.cache
def plan_for(name: str, capture: str) -> Plan:
    """A plan of that case under a budget that keeps everything; ``replan`` gives tighter ones."""
    case = case_of(name)
    return solve(case.model, "64GiB", sample=case.sample, capture=capture)


def replan(plan: Plan, budget: int) -> Plan:
    """The same captured model under another budget."""
    return plan.within(budget, solver="optimal")


def scheduled(plan: Plan, schedule: Schedule) -> Plan:
    """The same captured model with a schedule of the test's own."""
    return replace(plan, memory_budget=max(1, simulate(plan.chain, schedule).peak), schedule=schedule)


def tightest(plan: Plan) -> Plan:
    """The same captured model under the smallest budget."""
    return replan(plan, smallest(plan.chain))


def thinnest(plan: Plan) -> Plan:
    """The same captured model, every stage kept with the option that keeps least."""
    stages = plan.chain.stages
    keep = [Keep(k, len(stage.options) - 1) for k, stage in enumerate(stages)]
    return scheduled(plan, Schedule((*keep, *map(Backward, reversed(range(len(stages)))))))


def at_its_tightest(case: Case, capture: str) -> Plan:
    """The least memory under a capture; under "options", stages kept in part and none run again whole."""
    if capture == "options":
        return thinnest(solve(case.model, "1GiB", sample=case.sample, capture="graph"))
    return tightest(solve(case.model, "1GiB", sample=case.sample, capture=capture))


def on_device(case: Case, device: str) -> Case:
    """The case with its model, which is moved, and its batch on a device."""
    batch = (case.sample, case.args, case.kwargs)
    return Case(case.model.to(device), *pytree.tree_map_only(Tensor, lambda t: t.to(device), batch))


def peak_of_a_step(
    case: Case, model: nn.Module, context: Callable[[], Any] = contextlib.nullcontext
) -> MeasuredPeak:
    """Measured peak of a step with no gradients yet; its model, gradients and batch included."""

    def step() -> Any:
        with context():
            output = case(model)
        loss_of(output).backward()
        return output

    step()  # a warm-up
    model.zero_grad()
    measured = measure_peak(step, resident=[model, case.args, case.kwargs])
    model.zero_grad()
    return measured


class restored:  # noqa: N801 # reads as a verb: with restored(model)
    """Within it a model may train; on leaving it has the parameters, buffers and gradients of before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> nn.Module:
        self.before = copy.deepcopy(self.model.state_dict())
        self.grads = [p.grad for p in self.model.parameters()]
        for parameter in self.model.parameters():
            parameter.grad = None
        return self.model

    def __exit__(self, *_: object) -> None:
        self.model.load_state_dict(self.before)
        for parameter, grad in zip(self.model.parameters(), self.grads, strict=True):
            parameter.grad = grad


def within(model: nn.Module, path: str) -> Any:
    """A submodule by its dotted name."""
    return model.get_submodule(path)


def executor_of(model: nn.Module) -> Any:
    """The executor inside a planned model."""
    executor = plans_within(model).first.executor
    assert executor is not None
    return executor


def planned_tiny(capture: str) -> tuple[Case, nn.Module]:
    """The tiny case and its model, planned as tightly as it can be."""
    case = case_of("tiny")
    if capture == "options":
        return case, execute(thinnest(plan_for("tiny", "graph")), case.model)
    return case, execute(tightest(plan_for("tiny", capture)), case.model)


def planned(case: Case, capture: str) -> nn.Module:
    """The model of another case, planned as tightly as it can be."""
    plan = at_its_tightest(case, capture)
    assert max(plan.timeline.runs) > 1 or any(plan.program.kept), "nothing is recomputed"
    return execute(plan, case.model)


def outcome(model: nn.Module, procedure: Procedure) -> Record:
    """What a procedure returns, and the state that it leaves behind, from a fixed seed."""
    with restored(model):
        torch.manual_seed(17)
        return {**procedure(model), **state(model)}


def assert_same(plain: nn.Module, planned: nn.Module, procedure: Procedure) -> None:
    """The procedure has the same outcome with the planned model as with the plain one, bit for bit."""
    assert_equal(outcome(planned, procedure), outcome(plain, procedure))


def end_of(step: Callable[[], Any], between: Callable[[], None] = lambda: None) -> int:
    """Bytes that a step leaves alive, after another step and ``between``, once garbage is collected."""
    step()
    between()
    gc.collect()
    return count_bytes(lambda _: step(), CPU).end
