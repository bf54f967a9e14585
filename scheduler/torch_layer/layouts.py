"""Give storages, bytes and bits of tensors; of sparse ones by the plain tensors that they consist of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rematplan.scheduler.torch_layer.private import coo_parts, storage_id

__all__ = [
    "INTEGERS",
    "equal_bits",
    "held_bytes",
    "is_strided",
    "nonzeros",
    "parts",
    "room",
    "storage_key",
    "storage_keys",
    "storage_of",
    "tensor_bytes",
    "unused_room",
    "unusual",
]

ROWS = (torch.sparse_csr, torch.sparse_bsr)
COLUMNS = (torch.sparse_csc, torch.sparse_bsc)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor is a view of one storage: dense, and not nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the plain tensors that a tensor consists of: itself, or indices and values of a sparse one."""
    if tensor.layout is torch.strided:
        return (tensor,)
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return coo_parts(tensor)
    if tensor.layout in ROWS:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in COLUMNS:
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def room(tensor: Tensor) -> int | None:
    """Return the elements that a plan allows a sparse tensor, at most an eighth more; None if dense."""
    count = nonzeros(tensor)
    if count is None:
        return None
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def unused_room(tensor: Tensor) -> int:
    """Return the bytes by which a sparse tensor may grow within its ``room``; 0 for any other."""
    *_, values = parts(tensor)
    more = room(tensor)
    return 0 if not more or not len(values) else (more - len(values)) * tensor_bytes(tensor) // len(values)


def nonzeros(tensor: Tensor) -> int | None:
    """Return how many elements a sparse tensor has; None for any other."""
    return None if tensor.layout is torch.strided else parts(tensor)[-1].shape[0]


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements, and of the indices of a sparse one."""
    return sum(part.numel() * part.element_size() for part in parts(tensor))


def storage_of(tensor: Tensor) -> Any:
    """Return the storage of a tensor or of a sparse one's values; None if none (within torch.func)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        *_, values = parts(tensor)
        return None if values is tensor else values.untyped_storage()


def storage_key(tensor: Tensor) -> int | None:
    """Return the identity of ``storage_of(tensor)``, unique while it lives; None if there is none."""
    storage = storage_of(tensor)
    return None if storage is None else int(storage_id(storage))


def storage_keys(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Return the ``storage_key`` of each tensor that has one."""
    return frozenset(key for key in map(storage_key, tensors) if key is not None)


def held_bytes(tensor: Tensor) -> int:
    """Return the bytes of the storages that a tensor holds."""
    return sum(part.untyped_storage().nbytes() for part in parts(tensor))


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs and signs of zeros included, whatever their strides."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout is not b.layout:
        return False
    if a.layout is not torch.strided:
        return all(map(equal_bits, parts(a), parts(b)))
    return bool(torch.equal(_integers(a), _integers(b)))


def _integers(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor's elements as integers, without a copy."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(INTEGERS[tensor.element_size()])


def unusual(tensor: Tensor) -> str | None:
    """Describe a tensor whose bytes are unknown; None for dense and sparse ones."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout not in (torch.strided, torch.sparse_coo, *ROWS, *COLUMNS):
        return f"a tensor of layout {tensor.layout}"
    return None
