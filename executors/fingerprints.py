"""Fingerprints, by which a recomputed tensor is compared with that of the first run."""

from __future__ import annotations

import ctypes
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rematplan.scheduler.torch_layer.layouts import INTEGERS, nonzeros, parts
from rematplan.scheduler.torch_layer.preserve import may_be_seed
from rematplan.scheduler.torch_layer.private import neg_view

__all__ = ["CHECKS", "Fingerprint", "checksum", "difference", "sums"]

Fingerprint = tuple[Any, ...]
BUFFER = 2**18  # bytes that are copied at once of a tensor that does not lie in one piece, on the CPU
# Elements along a dimension, each with a sum of its own: bounds the bytes of a checksum on a device.
LONGEST = 2**12
COPIED = 2**15  # elements that are copied at once where they are not aligned, on a device
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio in 64 bits: multiples of it are spread evenly


def nothing(_: Tensor) -> Fingerprint:
    """Return the same for all tensors."""
    return ()


def metadata(tensor: Tensor) -> Fingerprint:
    """Return (shape, dtype, strides, device); a sparse tensor has layout and count for strides."""
    if tensor.layout is not torch.strided:
        return tensor.shape, tensor.dtype, (tensor.layout, nonzeros(tensor)), tensor.device
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


def values(tensor: Tensor) -> Fingerprint:
    """Return the metadata, and a checksum; of what may be a seed, the metadata alone."""
    return metadata(tensor) if may_be_seed(tensor) else (*metadata(tensor), checksum(tensor))


CHECKS: dict[str, Callable[[Tensor], Fingerprint]] = {
    "none": nothing,
    "metadata": metadata,
    "values": values,
}


def checksum(tensor: Tensor) -> tuple[int, ...]:
    """Return a checksum of a tensor's bits, in which their order counts, as of a permutation or mask.

    On the CPU the bytes are read in place, and torch allocates nothing. On a device it allocates up to 1 MiB
    there, and waits for the device.

    Bits are read in the order in which they lie in memory: those of tensors with other strides do not
    compare.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):  # what wraps tensors has no memory of its own
        inner, _ = tensor.__tensor_flatten__()
        return tuple(number for name in inner for number in checksum(getattr(tensor, name)))
    lazy = tensor.is_conj() | tensor.is_neg() << 1  # how the bits are to be read
    if not tensor.numel():
        return (lazy,)
    return lazy, *(crc if tensor.device.type == "cpu" else sums)(tensor)


def _as_it_lies(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Return sizes and strides of the elements in memory order, in the fewest dimensions."""
    shape: list[int] = []
    strides: list[int] = []
    dims = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    for stride, size in sorted(dims, reverse=True):
        if size == 1 or stride == 0:  # an expanded dimension has the same elements over and over
            continue
        if strides and strides[-1] == stride * size:
            shape[-1] *= size
            strides[-1] = stride
        else:
            shape.append(size)
            strides.append(stride)
    return shape, strides


# ---- on the CPU ------------------------------------------------------------------------------------------


def crc(tensor: Tensor) -> tuple[int]:
    """Return the CRC-32 of the bytes of a tensor on the CPU, of any dtype, as they lie in memory."""
    shape, strides = _as_it_lies(tensor)
    storage, size = tensor.untyped_storage(), tensor.element_size()
    memory: Any = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    start = int(tensor.storage_offset()) * size
    return (_crc(np.ndarray(shape, f"V{size}", memory, start, [stride * size for stride in strides]), 0),)


def _crc(elements: Any, value: int) -> int:
    """Return the CRC-32 of an array's elements, contiguous ones at once; ``value`` is of what came before."""
    if elements.flags.c_contiguous:
        return zlib.crc32(elements, value)
    if elements.nbytes <= BUFFER:
        return zlib.crc32(np.ascontiguousarray(elements), value)  # type: ignore[arg-type] # an array is a buffer
    rows = max(1, BUFFER * len(elements) // elements.nbytes)
    for start in range(0, len(elements), rows):
        part = elements[start : start + rows]
        value = _crc(part[0] if rows == 1 else part, value)
    return value


# ---- on a device -----------------------------------------------------------------------------------------


def sums(tensor: Tensor) -> tuple[int]:
    """Return sums of a tensor's bits as integers, weighted by position; exact in any order of summation.

    Aligned bits are read as words of eight bytes: a sum of smaller integers would first copy all of them.
    """
    if tensor.layout is not torch.strided:
        *_, tensor = parts(tensor)
    with torch.no_grad():
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
        tensor = neg_view(tensor) if tensor.is_neg() else tensor
        bits = tensor.view(INTEGERS[tensor.element_size()]).as_strided(*_as_it_lies(tensor))
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for words in _words(bits):
            for part in _pieces(words):
                for each in _sums(part):
                    total.mul_(GOLDEN).add_(each)
        return (int(total),)


def _words(bits: Tensor) -> Iterator[Tensor]:
    """Yield the bits as 64-bit integers: views as far as they are aligned, small copies of the rest."""
    many = 8 // bits.element_size()  # elements in a word
    strides, offset = bits.stride(), int(bits.storage_offset())
    if many == 1:
        yield bits
    elif (
        bits.ndim and strides[-1] == 1 and bits.shape[-1] >= many and not any(s % many for s in strides[:-1])
    ):
        first = -offset % many
        if first:
            yield from _words(bits.narrow(-1, 0, first))
        whole = (bits.shape[-1] - first) // many * many
        if whole:
            yield bits.narrow(-1, first, whole).view(torch.int64)
        if first + whole < bits.shape[-1]:
            yield from _words(bits.narrow(-1, first + whole, bits.shape[-1] - first - whole))
    elif bits.numel() <= COPIED:
        yield bits.to(torch.int64)
    else:
        dim = max(range(bits.ndim), key=lambda d: bits.shape[d])
        half = bits.shape[dim] // 2
        yield from _words(bits.narrow(dim, 0, half))
        yield from _words(bits.narrow(dim, half, bits.shape[dim] - half))


def _pieces(words: Tensor) -> Iterator[Tensor]:
    """Yield views of all parts, each with no dimension longer than ``LONGEST``."""
    long = next((d for d, size in enumerate(words.shape) if size > LONGEST), None)
    if long is None:
        yield words
        return
    size = words.shape[long]
    width = min(LONGEST, math.isqrt(size))
    whole = size // width * width
    yield from _pieces(words.narrow(long, 0, whole).unflatten(long, (-1, width)))
    if whole < size:
        yield from _pieces(words.narrow(long, whole, size - whole))


def _sums(words: Tensor) -> Iterator[Tensor]:
    """Yield, for each dimension, the sum, and the sum weighted by a hash of the position along it."""
    if not words.ndim:
        yield words
    for dim in range(words.ndim):
        others = [other for other in range(words.ndim) if other != dim]
        along = words.sum(others) if others else words.clone()
        yield along.sum()
        # Not linear in the place: of two swaps in a mask, one would undo what the other does to a linear sum.
        weights = torch.arange(1, 1 + len(along), device=words.device).mul_(GOLDEN)
        weights.bitwise_xor_(weights >> 31).mul_(GOLDEN)
        yield along.mul_(weights).sum()


def difference(first: Fingerprint, again: Fingerprint) -> str | None:
    """Return how a recomputed tensor differs, in words; None if only in strides that do not matter."""
    if first == again:
        return None
    shape, dtype, strides, device, *sums = first
    shape2, dtype2, strides2, device2, *sums2 = again
    if (shape, dtype, device) != (shape2, dtype2, device2):
        there, here = (f" on {device}", f" on {device2}") if device != device2 else ("", "")
        return f"was {tuple(shape)} {dtype}{there} in the first run and is {tuple(shape2)} {dtype2}{here} in the re-run"
    if strides != strides2 and any(isinstance(each, torch.layout) for each in (*strides, *strides2)):
        return f"was laid out as {strides} in the first run and is as {strides2} in the re-run"
    # A step along a dimension of one element leads nowhere; of no elements, no step does.
    if shape.numel() and any(n > 1 and a != b for n, a, b in zip(shape, strides, strides2, strict=True)):
        return (
            f"of shape {tuple(shape)} had strides {strides} in the first run and has {strides2} in the re-run"
        )
    if sums != sums2:
        return f"of shape {tuple(shape)}, {dtype}, has other values in the re-run than in the first run"
    return None
