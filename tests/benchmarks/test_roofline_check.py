"""Estimated seconds of single ops, and the report that compares them with measured ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import roofline_check
from benchmarks.roofline_check import OpTime, kind_of, rank_correlation, rows
from rematplan.scheduler.core.device import DeviceSpec
from rematplan.scheduler.costs import roofline
from rematplan.scheduler.costs.roofline import MAPPED, Rates, Tally, device_rates
from rematplan.scheduler.torch_layer.target import Target
from tests.shared.models import tiny

aten = torch.ops.aten


def test_the_report_on_a_small_model_is_consistent() -> None:
    torch.manual_seed(0)
    found = roofline_check.check(tiny(), 2)
    table = rows(found.ops)
    assert sum(row.ops for row in table) == len(found.ops)
    assert sum(row.share for row in table) == pytest.approx(1)
    assert sum(row.estimated for row in table) == pytest.approx(1)
    assert all(row.ratios is None or row.ratios == tuple(sorted(row.ratios)) for row in table)
    assert {"products", "norm", "heavy pointwise", "random"} <= {row.kind for row in table}
    for measured, estimated in zip(found.measured.stages, found.estimated.stages, strict=True):
        assert [o.saved for o in measured.options] == [o.saved for o in estimated.options]
        assert measured.input == estimated.input
        assert (estimated.forward > 0, estimated.backward > 0) == (True, True)
    assert [b.share for b in found.budgets] == list(roofline_check.SHARES)
    assert all(b.roofline >= b.measured * (1 - 1e-9) for b in found.budgets), "the optimum in its own seconds"
    assert found.overheads
    page = "\n".join(roofline_check.summary({"six blocks": found}))
    assert page.count("| six blocks |") == 1 + len(found.budgets)


def test_shares_and_quantiles_of_a_kind_are_those_of_its_ops() -> None:
    ops = [OpTime("a", 1.0, ratio) for ratio in range(1, 12)] + [OpTime("views", 11.0, 0.0)]
    first, second = rows(ops)
    assert {first.kind, second.kind} == {"a", "views"}
    by_kind = {row.kind: row for row in (first, second)}
    assert by_kind["views"] == ("views", 1, 0.5, 0.0, None)
    assert by_kind["a"] == ("a", 11, 0.5, 1.0, (2.0, 6.0, 10.0))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear", "products"),
        ("conv2d", "convolution"),
        ("mul", "pointwise"),
        ("tanh", "heavy pointwise"),
        ("dropout", "random"),
        ("dropout_", "random"),
        ("cross_entropy_loss", "softmax, loss"),
        ("scaled_dot_product_attention", "attention"),
    ],
)
def test_kinds_are_told_by_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_rank_correlation_is_one_where_there_is_no_order() -> None:
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 1
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


RATES = Rates(1e12, 1e9, 1e-6, element={aten.tanh: 1e-7}, fresh=1e-9)


def _seconds(rates: Rates, run: object, *shapes: tuple[int, ...]) -> float:
    """Of one op on fake tensors of these shapes."""
    with FakeTensorMode():
        tensors = [torch.empty(shape) for shape in shapes]
        with Tally(rates) as tally:
            run(*tensors)  # type: ignore[operator] # a function of tensors
    return tally.seconds


def test_an_op_that_computes_much_with_each_element_takes_the_longer_of_that_and_its_bytes() -> None:
    assert _seconds(RATES, torch.tanh, (1000,)) == pytest.approx(1000 * 1e-7)
    assert _seconds(RATES, torch.neg, (1000,)) == pytest.approx(2 * 4 * 1000 / 1e9)
    assert _seconds(RATES, torch.neg, (1,)) == 1e-6


def test_only_new_storages_that_the_system_maps_anew_cost_more() -> None:
    count = MAPPED // 4
    moved = 2 * MAPPED / 1e9
    assert _seconds(RATES, torch.neg, (count,)) == pytest.approx(moved + MAPPED * 1e-9)
    assert _seconds(RATES, lambda t: t.neg_(), (count,)) == pytest.approx(moved)
    assert _seconds(RATES, torch.neg, (count - 1,)) == pytest.approx(moved, rel=1e-6)


def test_attention_pays_for_products_and_for_scores() -> None:
    rates = Rates(1e12, 1e15, 0.0, element={aten._scaled_dot_product_flash_attention_for_cpu: 1e-9})

    def attend(query: Tensor, key: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, key)

    scores = 2 * 3 * 50 * 70
    want = scores * (4 * 16 / 1e12 + 1e-9)
    assert _seconds(rates, attend, (2, 3, 50, 16), (2, 3, 70, 16)) == pytest.approx(want)


def test_measured_rates_are_positive_and_leave_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    rates = device_rates(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert min(rates.flops, rates.bandwidth, rates.launch) > 0
    assert rates.fresh >= 0
    assert all(math.isfinite(each) and each > 0 for each in rates.element.values())
    assert rates.element[aten.bernoulli_] > rates.element[aten.sqrt], (
        "a random number takes longer than a root"
    )


def test_rates_are_those_outside_of_autocast_and_of_each_dtype() -> None:
    device = torch.device("cpu")
    roofline._measured_rates.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen: list[torch.dtype] = []

        class Noting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if str(func) == "aten.mm.default":
                    seen.append(result.dtype)
                return result

        with Noting():
            rates = device_rates(device)
            assert set(seen) == {torch.float32}
            slow = rates.flops_on(torch.bfloat16)
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert rates.flops_on(torch.bfloat16) == slow > 0
    assert rates.flops_on(torch.float32) == rates.flops
    assert rates.flops_on(torch.int8) > 0


def test_a_described_device_is_bound_by_its_two_rates_alone() -> None:
    rates = device_rates(Target(DeviceSpec.of("H200")))
    assert (rates.element, rates.fresh) == ({}, 0.0)
