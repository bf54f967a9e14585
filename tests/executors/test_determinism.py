"""Replayed tensors are compared with those of the first run: code that runs unequally is found and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rematplan import Plan, ReplayError, execute, solve, trace_of
from rematplan.executors.fingerprints import checksum, difference, metadata
from rematplan.scheduler.core.errors import PeakWarning
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Forward, Keep, Schedule
from tests.shared.models import Case
from tests.shared.runs import CountsRuns
from tests.shared.steps import (
    EACH_CAPTURE,
    assert_same,
    case_of,
    loss_of,
    plan_for,
    restored,
    scheduled,
    thinnest,
    tightest,
    train,
)

WIDTH = 16


def checked(capture: str, check: str, name: str = "tiny", **options: Any) -> tuple[Case, nn.Module]:
    case = case_of(name)
    plan = thinnest(plan_for(name, "graph")) if capture == "options" else tightest(plan_for(name, capture))
    return case, execute(plan, case.model, check=check, **options)


@pytest.mark.parametrize("check", ["none", "metadata", "values"])
@pytest.mark.parametrize("name", ["tiny", "residual"])
@EACH_CAPTURE
@pytest.mark.slow
def test_a_deterministic_model_trains_bit_equal_under_every_check(
    capture: str, name: str, check: str
) -> None:
    case, planned = checked(capture, check, name)
    assert_same(case.model, planned, lambda m: {"loss": train(case, m, steps=1)[0]["loss"]})


# ---- ops that do not do the same twice -------------------------------------------------------------------


class Counting(CountsRuns):
    """A block whose result depends on the count of its runs; ``change`` makes it of the input and the count.

    It is ``steady`` while it is planned for: solve() refuses a block that does not repeat itself on the
    sample.
    """

    def __init__(self, change: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.linear, self.change, self.steady = nn.Linear(WIDTH, WIDTH), change, True

    def forward(self, x: Tensor) -> Tensor:
        self.runs += not self.steady
        result: Tensor = self.change(self.linear(x), self.runs).exp()
        return result


class Late(Counting):
    """One that changes its result where autograd saves nothing any more."""

    def forward(self, x: Tensor) -> Tensor:
        self.runs += not self.steady
        return self.change(self.linear(x).tanh(), self.runs)


def by_counter(x: Tensor, runs: int) -> Tensor:
    return x / (runs + 1)


def by_numpy(x: Tensor, runs: int) -> Tensor:
    noise = np.random.default_rng(None if runs else 0).random(WIDTH, dtype=np.float32)
    return x * torch.from_numpy(noise)


def by_shuffling(x: Tensor, runs: int) -> Tensor:
    return x.roll(runs, 0)


def by_shape(x: Tensor, runs: int) -> Tensor:
    return torch.cat([x, x])[: len(x) + runs].exp()[: len(x)]


def by_layout(x: Tensor, runs: int) -> Tensor:
    return x.t().contiguous().t() if runs % 2 else x.contiguous()


def by_dtype(x: Tensor, runs: int) -> Tensor:
    return x.double() if runs > 1 else x


def by_offset(x: Tensor, runs: int) -> Tensor:
    return x + float(runs > 1)


def counting(
    change: Callable[[Tensor, int], Tensor], kind: type[Counting] = Counting, **options: Any
) -> tuple[Case, nn.Module]:
    """Four blocks, the second of which counts, all re-run."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)]
    model = nn.Sequential(blocks[0], kind(change), *blocks[2:]).train()
    batch = torch.randn(32, WIDTH)
    plan = solve(model, "1GiB", sample=batch, capture=[*model])
    unsteady(model)
    return Case(model, batch, (batch,)), execute(rerunning(plan), model, **options)


def unsteady(model: nn.Module) -> None:
    """From now on its blocks count."""
    for block in model.children():
        if isinstance(block, Counting):
            block.steady, block.runs = False, 0


def rerunning(plan: Plan) -> Plan:
    """Only the input of the first block is held, so that the others are run over again."""
    actions: list[Any] = [
        Keep(0),
        Checkpoint(1),
        Forward(2),
        Forward(3),
        Keep(4),
        Keep(5),
        Backward(5),
        Backward(4),
    ]
    actions += [
        Forward(1),
        Forward(2),
        Keep(3),
        Backward(3),
        Forward(1),
        Keep(2),
        Backward(2),
        Keep(1),
        Backward(1),
    ]
    return scheduled(plan, Schedule((*actions, Backward(0))))


@pytest.mark.parametrize("change", [by_counter, by_numpy, by_shuffling])
def test_values_names_the_stage_and_the_tensor_of_a_block_that_does_not_run_twice_alike(change: Any) -> None:
    case, planned = counting(change, check="values")
    loss = loss_of(case(planned))
    with pytest.raises(
        ReplayError, match=r"stage 2 \(1\): saved tensor \d+ of block 1 .*other values.*make it deterministic"
    ):
        loss.backward()


@pytest.mark.parametrize("change", [by_counter, by_numpy, by_shuffling])
def test_metadata_cannot_see_values(change: Any) -> None:
    case, planned = counting(change)
    loss_of(case(planned)).backward()


@pytest.mark.parametrize("check", ["metadata", "values"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            by_shape,
            r"saved tensor \d+ of block 1 was \(513, 16\) .* and is \(\d+, 16\) torch.float32 in the re-run",
        ),
        (
            by_layout,
            r"stage 2 \(1\): .* of shape \(512, 16\) had strides \(1, 512\) in the first run and has \(16, 1\)",
        ),
    ],
)
def test_another_shape_or_layout_is_refused_by_default(change: Any, message: str, check: str) -> None:
    torch.manual_seed(0)
    blocks = [Counting(each) for each in (lambda x, _: x, change, lambda x, _: x)]
    model = nn.Sequential(*blocks)
    batch = torch.randn(512, WIDTH)  # a random-number state of a block weighs as much as 79 rows
    plan = solve(model, "1GiB", sample=batch, capture=[*model])
    again: list[Any] = [Forward(1), Keep(2), Backward(2), Keep(1), Backward(1), Backward(0)]
    first: list[Any] = [Keep(0), Checkpoint(1), Forward(2), Keep(3), Keep(4), Backward(4), Backward(3)]
    planned = execute(scheduled(plan, Schedule((*first, *again))), model, check=check)
    unsteady(model)
    with pytest.raises(ReplayError, match=message):
        loss_of(planned(batch)).backward()


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (by_dtype, "metadata", r"was \(32, 16\) torch.float32 .* and is \(32, 16\) torch.float64"),
        (by_offset, "values", r"of shape \(32, 16\), torch.float32, has other values"),
    ],
)
def test_a_re_run_whose_output_alone_differs_is_refused(change: Any, check: str, message: str) -> None:
    case, planned = counting(change, Late, check=check)
    loss = loss_of(case(planned))
    with pytest.raises(ReplayError, match=rf"stage 2 \(1\): its output 0 {message}"):
        loss.backward()


SWITCH = {"step": 0.0, "factor": 1.0}


@torch.library.custom_op("rematplan_tests::mask", mutates_args=())
def mask(x: Tensor) -> Tensor:
    """An op whose result, with the switch on, is another at each run."""
    SWITCH["factor"] += SWITCH["step"]
    return (x > 0).to(x.dtype) * SWITCH["factor"]


@mask.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Masked(nn.Module):
    """A linear map, and a mask of an op's own making."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        result: Tensor = (y * mask(y.detach())).tanh()
        return result


@pytest.mark.parametrize("how", [tightest, thinnest])
def test_in_a_graph_values_names_the_op_that_does_not_do_the_same_twice(how: Callable[[Plan], Plan]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Masked() for _ in range(4))).train()
    batch = torch.randn(64, WIDTH)
    plan = how(solve(model, "1GiB", sample=batch, capture="graph"))
    planned = execute(plan, model, check="values")
    loss_of(planned(batch)).backward()
    SWITCH["step"] = 0.25
    try:
        loss = loss_of(planned(batch))
        with pytest.raises(
            ReplayError,
            match=r"stage \d+ \(.*\): saved tensor \d+, made by rematplan_tests.mask.* and saved by aten.mul",
        ):
            loss.backward()
    finally:
        SWITCH.update(step=0.0, factor=1.0)


# ---- fingerprints ----------------------------------------------------------------------------------------

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_sees_a_changed_element_and_two_that_have_changed_places(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(7, 11) > 0).to(dtype)
    other, swapped = tensor.clone(), tensor.clone()
    other[3, 5] = 1 - int(other[3, 5].real.item() if dtype.is_complex else other[3, 5].item())
    rows = swapped[:, 0].real if dtype.is_complex else swapped[:, 0]
    one, zero = int(rows.to(torch.float32).argmax()), int(rows.to(torch.float32).argmin())
    swapped[[one, zero], 0] = swapped[[zero, one], 0]
    sums = {checksum(tensor), checksum(other), checksum(swapped)}
    assert len(sums) == 3
    assert checksum(tensor) == checksum(tensor.clone())


def test_a_checksum_is_the_same_whatever_strides_lead_nowhere() -> None:
    a, b = torch.zeros(1, 4).as_strided((1, 4), (4, 1)), torch.zeros(1, 4).as_strided((1, 4), (1, 1))
    assert checksum(a) == checksum(b)
    assert checksum(torch.tensor(2.0)) != checksum(torch.tensor(3.0))


def test_strides_count_only_where_they_lead_somewhere() -> None:
    a, b = torch.empty_strided((1, 4), (4, 1)), torch.empty_strided((1, 4), (1, 1))
    assert difference(metadata(a), metadata(b)) is None
    c, d = torch.empty_strided((2, 4), (4, 1)), torch.empty_strided((2, 4), (1, 2))
    assert "strides (4, 1) in the first run and has (1, 2)" in str(difference(metadata(c), metadata(d)))
    assert "on cpu in the first run" in str(difference(metadata(c), metadata(c.to("meta"))))


# ---- the trace -------------------------------------------------------------------------------------------


def test_the_trace_tells_what_was_run_held_run_again_and_freed_in_order() -> None:
    case, planned = counting(lambda x, _: x, debug=True)
    with pytest.raises(ValueError, match="has run no planned step yet"):
        trace_of(planned)
    loss_of(case(planned)).backward()
    head, *rows = [" ".join(line.split()) for line in trace_of(planned).splitlines()]
    assert head.startswith("Sequential: 6 stages, budget ")
    assert rows == [
        "run stage 0 before; kept: all (glue)",
        "run stage 1 0; kept: input",
        "held boundary 1, 2.00 KiB",
        "run stage 2 1; kept: nothing",
        "run stage 3 2; kept: nothing",
        "run stage 4 3; kept: all",
        "run stage 5 after; kept: all (glue)",
        "backward stage 4 3",
        "backward stage 3 2",
        "run again stage 1 0; for its output",
        "run again stage 2 1; for its output",
        "run again stage 3 2; for what autograd saves",
        "backward stage 2 1",
        "run again stage 1 0; for its output",
        "run again stage 2 1; for what autograd saves",
        "backward stage 1 0",
        "run again stage 1 0; for what autograd saves",
        "freed boundary 1, 2.00 KiB",
    ]


@EACH_CAPTURE
def test_a_trace_changes_nothing(capture: str) -> None:
    case, planned = checked(capture, "metadata", debug=True)
    assert_same(case.model, planned, lambda m: {"loss": train(case, m, steps=1)[0]["loss"]})
    assert "run again" in trace_of(planned)


def test_each_step_has_a_trace_of_its_own() -> None:
    case, planned = counting(lambda x, _: x, debug=True)
    first = loss_of(case(planned))
    with pytest.warns(PeakWarning, match="another forward runs"):
        second = loss_of(case(planned))
    before = trace_of(planned)
    first.backward()
    assert trace_of(planned) == before
    second.backward()
    assert "run again" in trace_of(planned)


def test_without_debug_there_is_no_trace() -> None:
    case, planned = counting(lambda x, _: x)
    for model in (case.model, planned):
        with pytest.raises(ValueError, match=r"debug=True to execute\(\)"):
            trace_of(model)
    with restored(case.model):
        case(planned)
