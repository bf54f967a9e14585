"""Bytes and storages of dense tensors, of views, and of the parts of sparse tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rematplan.scheduler.torch_layer.layouts import (
    held_bytes,
    is_strided,
    nonzeros,
    parts,
    room,
    storage_key,
    storage_keys,
    storage_of,
    tensor_bytes,
    unused_room,
    unusual,
)

# bytes: of COO, two int64 and a float a value; of rows or columns, an int64 and a float a value, and seven
# bounds
SPARSE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "coo": (Tensor.to_sparse, 6 * (16 + 4)),
    "csr": (Tensor.to_sparse_csr, 6 * (8 + 4) + 7 * 8),
    "csc": (Tensor.to_sparse_csc, 6 * (8 + 4) + 7 * 8),
    "bsr": (lambda dense: dense.to_sparse_bsr((2, 2)), 3 * (8 + 16) + 4 * 8),
}


@pytest.mark.filterwarnings("ignore:Sparse .* beta:UserWarning")
@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_tensor_is_what_it_consists_of(name: str) -> None:
    convert, size = SPARSE[name]
    tensor = convert(torch.eye(6))
    assert not is_strided(tensor)
    assert tensor_bytes(tensor) == size
    assert held_bytes(tensor) >= size
    assert nonzeros(tensor) == (3 if name == "bsr" else 6)
    assert storage_key(tensor) == storage_key(parts(tensor)[-1])
    assert unusual(tensor) is None


def test_views_share_a_storage_and_hold_all_of_it() -> None:
    whole = torch.zeros(10)
    view = whole[2:5]
    assert is_strided(view)
    assert (tensor_bytes(view), held_bytes(view)) == (12, 40)
    assert storage_keys([whole, view]) == {storage_key(whole)}
    assert storage_key(torch.zeros(10)) != storage_key(whole)
    assert nonzeros(view) is room(view) is None
    assert unused_room(view) == 0


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@given(st.integers(0, 5000))
def test_the_room_is_the_count_rounded_up_by_at_most_an_eighth(count: int) -> None:
    tensor = torch.sparse_coo_tensor(torch.zeros(1, count, dtype=torch.long), torch.zeros(count), (5,))
    found = room(tensor)
    assert found is not None
    assert count <= found <= count + max(0, count) / 8
    assert unused_room(tensor) == (found - count) * 12
    below = torch.sparse_coo_tensor(torch.zeros(1, found, dtype=torch.long), torch.zeros(found), (5,))
    assert room(below) == found  # one kind


def test_tensors_without_a_storage_have_no_key() -> None:
    keys: list[int | None] = []

    def look(x: Tensor) -> Tensor:
        keys.append(storage_key(x))
        return x.sum()

    torch.func.vmap(look)(torch.zeros(3, 2))
    assert keys == [None]
    assert storage_keys([]) == frozenset()
    assert storage_of(torch.zeros(2)).nbytes() == 8


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_cannot_be_counted_is_said() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    assert unusual(nested) == "a nested tensor"
    assert not is_strided(nested)
