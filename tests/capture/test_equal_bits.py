"""Equality of bits, where equal numbers differ in bits and unequal ones (NaN) do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rematplan.scheduler.torch_layer.layouts import equal_bits

NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0]), True),
        (torch.tensor(1.0), torch.tensor(1.0), True),
        (torch.tensor(1), torch.tensor(1.0), False),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), True),
        (torch.ones(2, dtype=torch.complex128), torch.ones(2, dtype=torch.complex128), True),
        (torch.ones(2, dtype=torch.complex64) * 1j, torch.ones(2, dtype=torch.complex64) * -1j, False),
    ],
)
def test_bits_are_compared_not_numbers(a: Tensor, b: Tensor, equal: bool) -> None:
    assert equal_bits(a, b) is equal


def test_another_payload_of_a_nan_is_another_tensor() -> None:
    a = torch.tensor([NAN])
    b = (a.view(torch.int32) + 1).view(torch.float32)
    assert b.isnan().all()
    assert not equal_bits(a, b)


def test_strides_and_lazy_bits_make_no_difference() -> None:
    tensor = torch.randn(3, 4)
    assert equal_bits(tensor.t(), tensor.t().contiguous())
    turned = torch.randn(3, dtype=torch.complex64)
    assert equal_bits(turned.conj(), turned.conj().resolve_conj())
    assert equal_bits(turned.conj().imag, turned.conj().imag.resolve_neg())


def test_sparse_tensors_are_equal_in_indices_and_values() -> None:
    def sparse(index: int, value: float) -> Tensor:
        return torch.sparse_coo_tensor(
            torch.tensor([[index]]), torch.tensor([value]), (3,), check_invariants=True
        )

    assert equal_bits(sparse(1, 2.0), sparse(1, 2.0))
    assert not equal_bits(sparse(1, 2.0), sparse(2, 2.0))
    assert not equal_bits(sparse(1, 0.0), sparse(1, -0.0))


def test_leaves_and_inference_tensors_are_compared_too() -> None:
    leaf = torch.ones(4, requires_grad=True)
    assert equal_bits(leaf, leaf.detach())
    with torch.inference_mode():
        assert equal_bits(torch.ones(4), leaf)
