"""Scratch bytes of kernels: as many on zeros as on data, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.profiler import profile
from torch.utils import _pytree as pytree

from rematplan.scheduler.costs.meters import kernel_scratch as scratch
from rematplan.scheduler.costs.meters.kernel_scratch import Scratch
from rematplan.scheduler.costs.meters.live_storages import LiveBytes
from rematplan.scheduler.costs.meters.peak import count_bytes

CPU = torch.device("cpu")
aten = torch.ops.aten

IMAGES, KERNEL = torch.randn(8, 8, 32, 32), torch.randn(8, 8, 3, 3)
CONVOLVED = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
HEADS = torch.randn(2, 4, 64, 16)
ATTENDED, SUMS = aten._scaled_dot_product_flash_attention_for_cpu.default(HEADS, HEADS, HEADS)

Op = tuple[Any, tuple[Any, ...]]
OPS: dict[str, Op] = {
    "convolution": (aten.convolution.default, (IMAGES, KERNEL, None, *CONVOLVED)),
    "its backward": (
        aten.convolution_backward.default,
        (IMAGES, IMAGES, KERNEL, None, *CONVOLVED, [True, True, False]),
    ),
    "attention": (aten._scaled_dot_product_flash_attention_for_cpu.default, (HEADS, HEADS, HEADS)),
    "its backward too": (
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        (HEADS, HEADS, HEADS, HEADS, ATTENDED, SUMS, 0.0, False),
    ),
    "batch norm's backward": (
        aten.native_batch_norm_backward.default,
        (IMAGES, IMAGES, torch.ones(8), None, None, torch.ones(8), torch.ones(8), True, 1e-5, [True] * 3),
    ),
    "a cast operand": (aten.mul.Tensor, (torch.randn(64, 64), torch.randn(64, 64).to(torch.bfloat16))),
    "a product": (aten.mm.default, (torch.randn(64, 64), torch.randn(64, 64))),
}


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_KNOWN", {})


def counted(account: Scratch, func: Any, args: tuple[Any, ...]) -> int:
    """The scratch bytes of an op on fake tensors like ``args``."""
    with FakeTensorMode() as mode:
        fake = pytree.tree_map_only(Tensor, mode.from_tensor, args)
        return account(func, fake, {}, func(*fake))


def profiled(func: Any, args: tuple[Any, ...]) -> int:
    """The literal definition: the most that torch's profiler sees live, less what stays."""
    func(*args)
    with profile(profile_memory=True, acc_events=True) as seen:
        result = func(*args)
    live = most = 0
    assert seen.profiler is not None
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    del result
    return most - live


@pytest.mark.parametrize("name", OPS)
def test_scratch_on_zeros_is_what_the_profiler_sees_on_data(name: str) -> None:
    account = Scratch(CPU)
    found = counted(account, *OPS[name])
    assert found == profiled(*OPS[name])
    assert (found > 0) == (name != "a product")
    assert not account.uncounted


def test_it_is_counted_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = counted(Scratch(CPU), *OPS["convolution"])

    def never(*_: Any) -> Any:
        raise AssertionError("counted again")

    monkeypatch.setattr(scratch, "count_bytes", never)
    assert counted(Scratch(CPU), *OPS["convolution"]) == wanted


@pytest.mark.parametrize("fails", [False, True])
def test_generators_and_arguments_are_left_alone(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fails:

        def fail(fn: Any, device: torch.device) -> Any:
            fn(lambda: None)
            raise RuntimeError

        monkeypatch.setattr(scratch, "count_bytes", fail)
    given = torch.ones(100)
    before = torch.get_rng_state()
    own = torch.Generator()
    seed = own.get_state()
    account = Scratch(CPU)
    account(aten.bernoulli_.float, (given,), {"generator": own}, given)
    counted(account, aten.native_dropout.default, (given, 0.5, True))
    assert len(account.uncounted) == 2 * fails
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(seed, own.get_state())
    assert torch.equal(given, torch.ones(100))


def test_indices_overlaps_and_gaps_have_stand_ins() -> None:
    account = Scratch(CPU)
    table, ids = torch.randn(10, 4), torch.full((6,), 9)
    counted(account, aten.embedding.default, (table, ids))
    counted(account, aten.embedding_dense_backward.default, (torch.randn(6, 4), ids, 10, -1, False))
    counted(account, aten.add.Tensor, (torch.randn(4).expand(3, 4), torch.randn(12, 12)[::4, ::3]))
    counted(account, aten.index.Tensor, (table, [ids, None]))
    counted(account, aten.sum.default, (torch.randn(0, 4),))
    assert not account.uncounted
    assert len(scratch._KNOWN) == 5


def test_what_is_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Scratch(CPU)
    assert counted(account, aten.t.default, (KERNEL[0, 0],)) == 0  # a view has nothing to count
    assert not account.uncounted
    assert counted(account, aten.multinomial.default, (torch.ones(3), 1)) == 0  # zeros are no distribution
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "free_machine_bytes", lambda: 4 * 2**20)
        small = Scratch(CPU)
        assert counted(small, aten.mm.default, (torch.zeros(512, 512), torch.zeros(512, 512))) == 0
    assert small.uncounted == ("aten.mm.default (3.00 MiB, too large to try)",)
    with torch.library._scoped_library("rematplan_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        func, x = torch.ops.rematplan_test.twice.default, torch.ones(3)
        assert account(func, (x,), {}, func(x)) == 0
    assert account.uncounted == (
        "aten.multinomial.default (checks the values that it is given)",
        "rematplan_test.twice.default (of another library)",
    )


def test_it_needs_the_profiler_for_itself() -> None:
    with profile(acc_events=True), pytest.raises(RuntimeError, match="profiler"):
        Scratch(CPU)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_live_bytes_of_a_step_without_data_are_those_of_the_step(autocast: bool) -> None:
    def step(images: Tensor, kernel: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            torch.conv2d(images, kernel, padding=1).float().sum().backward()

    def fresh() -> Tensor:
        return KERNEL.clone().requires_grad_()

    step(IMAGES, fresh())
    kernel = fresh()
    truth = count_bytes(lambda mark: step(IMAGES, kernel), CPU)
    account, kernel = Scratch(CPU), fresh()
    with FakeTensorMode() as mode:
        images, kernel = mode.from_tensor(IMAGES), mode.from_tensor(kernel)
        with LiveBytes(record=True, scratch=account) as live:
            step(images, kernel)
    assert not account.uncounted
    assert sum(size > 1000 for size in scratch._KNOWN.values()) == 2  # the convolution and its backward
    assert live.peak == max(event.live for event in live.events) == truth.peak
    assert live.live == truth.end


@pytest.mark.parametrize(("dropout", "run"), [(0.1, False), (0.0, True)])
def test_ops_that_read_seeds_are_not_run_on_made_up_ones(
    dropout: float, run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def noting(fn: Any, device: Any) -> Any:
        ran.append(device)
        raise RuntimeError("an op of CUDA's")

    monkeypatch.setattr(scratch, "count_bytes", noting)
    account = Scratch(torch.device("cpu"))
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    q, seed = torch.zeros(1, 2, 8, 4), torch.zeros((), dtype=torch.int64)
    mask = [True, True, True, False]
    account(backward, (q, q, q, q, None, q, q, seed, seed, dropout, mask), {}, (q, q, q, None))
    assert bool(ran) is run
    (text,) = account.uncounted
    assert ("seed of random numbers" in text) is not run


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (torch.ops.aten._assert_async.msg, (torch.zeros(()), "never")),
        (torch.ops.aten.multinomial.default, (torch.zeros(4), 1)),
    ],
)
def test_ops_that_check_values_are_not_run_on_zeros(
    op: Any, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "count_bytes", None)  # would raise
    account = Scratch(torch.device("cpu"))
    assert account(op, arguments, {}, None) == 0
    assert "checks the values" in account.uncounted[0]
