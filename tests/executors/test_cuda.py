"""The executor's promises on a CUDA device; skipped without one."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rematplan import Plan, PlanMismatch, execute, measure_peak, rehearse, solve
from rematplan.scheduler.costs.meters.clock import Spans, wait
from rematplan.scheduler.costs.meters.cuda_overheads import expandable_segments, workspace_bytes
from tests.shared.helpers import smallest
from tests.shared.models import SEVEN, Case
from tests.shared.steps import assert_equal, on_device, peak_of_a_step, replan, restored, train

pytestmark = pytest.mark.cuda  # conftest.py: under deterministic algorithms
CONTEXTS: dict[str, Callable[[], Any]] = {
    "float32": contextlib.nullcontext,
    "bfloat16": functools.partial(torch.autocast, "cuda", dtype=torch.bfloat16),
}
FIVE = ("gpt2", "llama", "resnet", "vit", "unet")
EACH_CONTEXT = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)


@pytest.fixture
def expandable(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Expandable segments, on or off for one test."""
    before, wanted = expandable_segments(torch.device("cuda")), bool(request.param)
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{wanted}")
    yield wanted
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{before}")


ON = pytest.mark.parametrize("expandable", [True], indirect=True, ids=["expandable"])
OFF = pytest.mark.parametrize("expandable", [False], indirect=True, ids=["plain"])
EITHER = pytest.mark.parametrize("expandable", [True, False], indirect=True, ids=["expandable", "plain"])


def on_cuda(name: str) -> Case:
    """A case with its model and batch on the device."""
    return on_device(SEVEN[name](), "cuda")


def budgets(plan: Plan) -> list[int]:
    """Four, between the smallest and the plain peak."""
    low, high = smallest(plan.chain), plan.plain.peak
    return [low + int(share * (high - low)) for share in (0.0, 0.3, 0.6, 0.9)]


@pytest.mark.parametrize("capture", ["graph", "modules"])
@pytest.mark.parametrize("name", SEVEN)
def test_planned_training_on_cuda_is_bit_equal_and_within_its_budget(name: str, capture: str) -> None:
    case = on_cuda(name)
    plan = solve(case.model, 2**50, sample=case.sample, capture=capture)
    with restored(case.model):
        expected = train(case, case.model)
    for budget in budgets(plan):
        tight = replan(plan, budget)
        planned = execute(tight, case.model)
        with restored(case.model):
            assert_equal(train(case, planned), expected)
        with restored(case.model):
            measured = peak_of_a_step(case, planned)
        assert measured.peak <= budget
        assert tight.predicted_peak == pytest.approx(measured.peak, rel=0.05)


def test_a_plan_for_the_cpu_is_refused_on_cuda() -> None:
    case = SEVEN["mlp"]()
    plan = solve(case.model, 2**40, sample=case.sample)
    with pytest.raises(ValueError, match="made for cpu"):
        execute(plan, case.model.cuda())


def test_dropout_on_cuda_is_replayed_and_the_generator_left_as_the_plain_step_leaves_it() -> None:
    model = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)) for _ in range(8))
    )
    model.cuda().train()
    batch = torch.randn(512, 64, device="cuda")
    case = Case(model, batch, (batch,))
    plan = solve(model, 2**40, sample=batch)
    planned = execute(replan(plan, smallest(plan.chain)), model)
    with restored(model):
        expected = train(case, model)
    with restored(model):
        assert_equal(train(case, planned), expected)


# ---- the account of bytes ----------------------------------------------------------------------------


@ON
@EACH_CONTEXT
@pytest.mark.parametrize("name", FIVE)
@pytest.mark.usefixtures("expandable")
def test_with_expandable_segments_peaks_are_predicted_within_1_percent(
    name: str, context: Callable[[], Any]
) -> None:
    case = on_cuda(name)
    with context():
        plan = solve(case.model, 2**50, sample=case.sample)
    assert plan.resident["allocator slack"] == 0
    for budget in budgets(plan):
        tight = replan(plan, budget)
        planned = execute(tight, case.model)
        with restored(case.model):
            measured = peak_of_a_step(case, planned, context)
        assert measured.peak <= budget
        assert tight.predicted_peak == pytest.approx(measured.peak, rel=0.01)
        assert measured.requested is not None
        assert measured.requested <= measured.peak


@OFF
@EACH_CONTEXT
@pytest.mark.parametrize("name", FIVE)
@pytest.mark.usefixtures("expandable")
def test_without_them_the_slack_that_is_set_aside_covers_the_blocks(
    name: str, context: Callable[[], Any]
) -> None:
    case = on_cuda(name)
    with context():
        plan = solve(case.model, 2**50, sample=case.sample)
    slack = plan.resident["allocator slack"]
    for budget in budgets(plan):
        tight = replan(plan, budget)
        planned = execute(tight, case.model)
        with restored(case.model):
            measured = peak_of_a_step(case, planned, context)
        assert measured.peak <= tight.predicted_peak <= budget
        assert tight.predicted_peak - slack <= 1.01 * measured.peak
        assert measured.requested is not None
        assert measured.requested <= measured.peak


@EITHER
def test_the_setting_is_read_from_the_allocator(expandable: bool) -> None:
    assert expandable_segments(torch.device("cuda")) is expandable


@EITHER
@pytest.mark.usefixtures("expandable")
def test_workspaces_have_the_bytes_that_they_are_counted_with() -> None:
    device = torch.device("cuda")
    workspace_bytes(device)  # the libraries are loaded
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    counted = workspace_bytes(device)
    assert torch.cuda.memory_allocated() - before == counted > 0
    assert workspace_bytes(device) == counted  # and no more are taken
    assert torch.cuda.memory_allocated() - before == counted


def test_workspaces_are_in_the_plan_and_in_the_measured_peak_and_counted_once() -> None:
    case = on_cuda("mlp")
    there = workspace_bytes(torch.device("cuda"))
    plan = solve(case.model, 2**50, sample=case.sample)
    assert plan.resident["workspaces"] == there
    assert "workspaces" in str(plan)
    assert max(stage.forward_overhead for stage in plan.chain.stages) < there
    torch._C._cuda_clearCublasWorkspaces()
    resident = [case.model, case.args, case.kwargs]
    cold = measure_peak(lambda: case(case.model), resident=resident)
    warm = measure_peak(lambda: case(case.model), resident=resident)
    assert cold.peak == warm.peak > there


def test_a_rehearsal_for_real_says_what_was_asked_for() -> None:
    case = on_cuda("gpt2")
    plan = solve(case.model, 2**50, sample=case.sample)
    seen = rehearse(plan, case.model, case.sample, real=True)
    assert seen.requested is not None
    assert 0.9 * seen.peak < seen.requested <= seen.peak
    assert "asked for at most" in str(seen)
    assert rehearse(plan, case.model, case.sample).requested is None


# ---- what GPUs alone have ------------------------------------------------------------------------------


class Recurrent(torch.nn.Module):
    """Two LSTMs whose dropout cuDNN draws, between layers with dropout of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.LSTM(64, 64, 2, dropout=0.5, batch_first=True)
        self.second = torch.nn.LSTM(64, 64, 2, dropout=0.5, batch_first=True)
        self.drop, self.head = torch.nn.Dropout(0.2), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.drop(self.head(self.first(x)[0]).tanh()))[0]
        return self.head(found).tanh()


def test_dropout_that_cudnn_draws_is_not_drawn_again() -> None:
    torch.manual_seed(0)
    model, batch = Recurrent().cuda().train(), torch.randn(16, 32, 64, device="cuda")
    plan = solve(model, 2**40, sample=batch, capture="graph")
    assert "run once" in plan.capture.reason
    case = Case(model, batch, (batch,))
    planned = execute(replan(plan, smallest(plan.chain)), model)
    with restored(model):
        expected = train(case, model)
    with restored(model):
        assert_equal(train(case, planned), expected)


def test_a_model_whose_kernels_sum_in_no_fixed_order_is_a_graph_all_the_same() -> None:
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).cuda().train()
    batch = torch.randn(4, 1024, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plan = solve(model, 2**40, sample=batch)
    assert plan.capture.kind == "graph", plan.capture.reason
    assert not torch.are_deterministic_algorithms_enabled()


def test_values_are_compared_where_attention_leaves_seeds_unset() -> None:
    case = on_cuda("gpt2")
    plan = solve(case.model, 2**50, sample=case.sample)
    planned = execute(replan(plan, smallest(plan.chain)), case.model, check="values")
    with restored(case.model):
        expected = train(case, case.model)
    with restored(case.model):
        assert_equal(train(case, planned), expected)


def test_ops_are_timed_by_events_one_by_one() -> None:
    device = torch.device("cuda")
    small, large = torch.ones(8, device=device), torch.ones(8192, 8192, device=device)
    spans = Spans(device)
    for work in (lambda: small + 1, lambda: large @ large, lambda: small.view(-1), lambda: small + 1):
        with spans.span():
            work()
    add, product, view, again = spans.seconds()
    assert 0 <= view < add + again < 100e-6 < product
    began = time.perf_counter()
    for _ in range(10):
        large @ large
    wait(device)
    assert product == pytest.approx((time.perf_counter() - began) / 10, rel=0.3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_plan_of_one_device_trains_on_another_that_is_not_current() -> None:
    plan = solve(
        on_device(SEVEN["gpt2"](), "cuda:0").model, 2**50, sample=on_device(SEVEN["gpt2"](), "cuda:0").sample
    )
    other = on_device(SEVEN["gpt2"](), "cuda:1")
    assert torch.cuda.current_device() == 0
    loaded = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    planned = execute(replan(loaded, smallest(plan.chain)), other.model)
    with restored(other.model):
        expected = train(other, other.model)
    with restored(other.model):
        assert_equal(train(other, planned), expected)
    assert rehearse(plan, other.model, other.sample, real=True).peak > 0


def test_a_planned_step_is_not_recorded_as_a_cuda_graph() -> None:
    model, batch = torch.nn.Linear(8, 8).cuda(), torch.randn(4, 8, device="cuda")
    planned = execute(solve(model, 2**40, sample=batch), model)
    with pytest.raises(PlanMismatch, match="a CUDA graph records"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        planned(batch)


# In a process of its own: the trace must have everything since the first allocation.
TRACED = """
import json, torch
from rematplan.scheduler.costs.meters.cuda_allocator import CachingAllocator

torch.cuda.init()
torch.cuda.memory._record_memory_history("all", context=None, max_entries=1_000_000)
width = 777
layers = [torch.nn.Conv2d(3, 24, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(width)]
for _ in range(6):
    layers += [torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)]
model = torch.nn.Sequential(*layers)
model(torch.zeros(1, 3, 27, 27))
model.cuda()
optimizer = torch.optim.AdamW(model.parameters())
for batch in (331, 331, 250):
    model(torch.randn(batch, 3, 27, 27, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
torch.cuda.synchronize()
stats = torch.cuda.memory_stats()
allocator = CachingAllocator(expandable_segments=EXPANDABLE)
at = {}
for entry in torch.cuda.memory._snapshot()["device_traces"][0]:
    if entry["action"] == "alloc":
        at[entry["addr"]] = allocator.allocate(entry["size"])
    elif entry["action"] == "free_requested":
        allocator.free(at.pop(entry["addr"]))
names = ("requested", "allocated", "reserved")
print(json.dumps({n: (getattr(allocator.peaks, n), stats[f"{n}_bytes.all.peak"]) for n in names}))
"""


@pytest.mark.parametrize("expandable", [True, False], ids=["expandable", "plain"])
def test_the_simulated_allocator_counts_a_traced_step_as_the_real_one(expandable: bool) -> None:
    settings = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"}
    code = TRACED.replace("EXPANDABLE", str(expandable))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settings
    )
    simulated, real = zip(*json.loads(done.stdout.splitlines()[-1]).values(), strict=True)
    assert simulated[0] == real[0]
    if expandable:
        assert simulated[1] == real[1]
    else:  # of equal blocks the driver's addresses decide, which are not those of the simulation
        assert simulated[1] == pytest.approx(real[1], rel=0.001)
    assert simulated[2] == pytest.approx(real[2], rel=0.05)
