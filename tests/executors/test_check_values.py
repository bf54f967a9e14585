"""check="values": checksums of bits, which take no memory of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from rematplan import execute, measure_peak, solve
from rematplan.executors.fingerprints import checksum, sums
from rematplan.scheduler.costs.option_costs import _equal
from tests.shared.helpers import smallest
from tests.shared.steps import EITHER_CAPTURE, case_of, peak_of_a_step, plan_for, replan, restored

Checksum = Callable[[Tensor], tuple[int, ...]]
EACH_WAY = pytest.mark.parametrize(  # what a device would do works on the CPU, too
    ("device", "checksum"),
    [("cpu", checksum), ("cpu", sums), pytest.param("cuda", checksum, marks=pytest.mark.cuda)],
    ids=["crc", "sums", "cuda"],
)


def _laid_out() -> list[Tensor]:
    """Tensors that lie in memory in all kinds of ways; no two have the same bits."""
    torch.manual_seed(0)
    pair = torch.view_as_complex(torch.randn(300, 2))
    return [
        torch.randn(300, 200),
        torch.randn(200, 300).t(),
        torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last),
        torch.randn(64, 33, 3, 48)[:, :, 1],
        torch.randn(100, 70)[:, ::2],
        torch.randn(20_011)[::3],
        torch.randn(40, 1).expand(40, 50),
        torch.randn(70_001)[1:],
        torch.randn(30, 20).bfloat16(),
        torch.randn(30, 20) > 0,
        torch.randint(0, 9, (17, 3)),
        torch.tensor(3.0),
        pair,
        pair.conj()[1:],
        pair.conj().imag,
        pair.to(torch.complex128),
        torch.randn(30, 20).to(torch.float8_e4m3fn),
    ]


@EACH_WAY
def test_a_checksum_is_that_of_a_copy_and_sees_each_changed_bit(device: str, checksum: Checksum) -> None:
    found = []
    for tensor in _laid_out():
        there = tensor.to(device)
        copy = torch.empty(0, dtype=there.dtype, device=device)
        copy.set_(there.untyped_storage().clone(), there.storage_offset(), there.shape, there.stride())
        if not (tensor.is_conj() or tensor.is_neg()):
            assert checksum(copy) == checksum(there)
        found.append(checksum(there))
        bits = copy.as_strided((1,), (1,), copy.storage_offset() + _furthest(copy)).view(torch.uint8)
        before = checksum(copy)
        bits[0] ^= 1
        assert checksum(copy) != before, tensor.shape
    assert len(set(found)) == len(found)


def _furthest(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@EACH_WAY
def test_a_checksum_sees_what_has_changed_places(device: str, checksum: Checksum) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(6, 50, 40, device=device)
    moved = [
        tensor.flip(0),
        tensor.flip(2),
        tensor[torch.tensor([1, 0, 2, 3, 4, 5])],
        tensor.flatten()[torch.randperm(tensor.numel(), device=device)].view_as(tensor),
        tensor.transpose(1, 2).reshape(tensor.shape),
    ]
    assert len({checksum(each.contiguous()) for each in [tensor, *moved]}) == 1 + len(moved)
    mask = torch.tensor([1, 0, 0, 1, 1, 1], dtype=torch.bool, device=device)
    assert checksum(mask) != checksum(torch.tensor([0, 1, 1, 0, 1, 1], dtype=torch.bool, device=device))


@EACH_WAY
def test_a_checksum_goes_by_bits(device: str, checksum: Checksum) -> None:
    zero = torch.zeros(3, device=device)
    assert checksum(zero) != checksum(-zero)
    payloads = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32, device=device).view(torch.float32)
    assert payloads.isnan().all()
    assert checksum(payloads[:1]) != checksum(payloads[1:])
    assert checksum(payloads) == checksum(payloads.clone())


def test_a_checksum_of_nothing_is_one() -> None:
    assert checksum(torch.zeros(0, 3)) == checksum(torch.zeros(0, 3))


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_a_checksum_of_a_quantised_tensor_goes_by_its_integers() -> None:
    values = torch.arange(6.0)
    one, same, other = (
        torch.quantize_per_tensor(v, 0.5, 0, torch.qint8) for v in (values, values, values + 1)
    )
    assert checksum(one) == checksum(same) != checksum(other)


def test_a_checksum_takes_nothing_of_torchs_memory_on_the_cpu() -> None:
    for tensor in _laid_out():
        measured = measure_peak(lambda tensor=tensor: checksum(tensor))  # type: ignore[misc] # bound now
        assert measured.added == 0, tensor.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_sums_take_a_mebibyte_at_most(device: str) -> None:
    for tensor in [
        *_laid_out(),
        torch.randn(2**22 + 3)[1:],
        torch.randn(2048, 1024)[:, ::2],
        torch.randn(4, 256, 3, 768)[:, :, 1],
        torch.randn(1024, 2048).bfloat16().t(),
        torch.randn(2049, 1023) > 0,
    ]:
        there = tensor.to(device)
        measured = measure_peak(lambda there=there: sums(there), device=device)  # type: ignore[misc] # bound now
        assert measured.added <= 2**20, (tensor.shape, tensor.stride(), measured.added)


@pytest.mark.parametrize(
    "name",
    ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp", "residual", "gpt2", "resnet"))],
)
@EITHER_CAPTURE
def test_a_step_that_compares_values_stays_within_its_budget(capture: str, name: str) -> None:
    case, plan = case_of(name), plan_for(name, capture)
    least = smallest(plan.chain)
    for budget in (least, (least + plan.plain.peak) // 2):
        planned = execute(replan(plan, budget), case.model, check="values")
        with restored(case.model):
            assert peak_of_a_step(case, planned).peak <= budget


def test_values_of_what_wraps_tensors_are_compared() -> None:
    a, b = torch.randn(5), torch.randn(5)
    assert checksum(TwoTensor(a, b)) == checksum(TwoTensor(a.clone(), b)) != checksum(TwoTensor(b, a))


class _Fused(torch.autograd.Function):
    """Saves a seed that it never sets, as attention without dropout does on CUDA (``at::empty``)."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _Fused.calls += 1
        ctx.save_for_backward(x, torch.tensor(_Fused.calls))
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, _ = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


class Attends(nn.Module):
    """A layer with such an op."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Fused.apply(self.linear(x))
        return result


def test_seeds_that_nobody_has_set_are_not_compared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(Attends(), Attends(), Attends()) for _ in range(5)))
    batch = torch.randn(256, 16)
    plan = solve(model, "1GiB", sample=batch)
    tight = plan.within(smallest(plan.chain))
    assert max(tight.timeline.runs) > 1
    execute(tight, model, check="values")(batch).sum().backward()


def test_options_that_make_such_seeds_again_are_taken() -> None:
    a, b = torch.tensor(3), torch.tensor(4)
    assert _equal(a, b, data=True)
    assert _equal(torch.tensor([1, 2]), torch.tensor([1, 3]), data=True)
    assert not _equal(a.float(), b.float(), data=True)
    assert not _equal(torch.arange(3), torch.arange(3) + 1, data=True)
