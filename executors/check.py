"""What a replayed tensor is compared by with the one of the first run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scheduler.capture.layouts import nonzeros, parts

__all__ = ["CHECKS", "Fingerprint", "checksum", "difference"]

Fingerprint = tuple[Any, ...]
CHUNK = 2**22  # elements that are summed at once: bounds what the checksum of a large tensor takes
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def nothing(_: Tensor) -> Fingerprint:
    """Equal for all tensors."""
    return ()


def metadata(tensor: Tensor) -> Fingerprint:
    """(shape, dtype, strides, device); of a sparse tensor, its layout and how many elements it has instead of strides."""
    if tensor.layout is not torch.strided:
        return tensor.shape, tensor.dtype, (tensor.layout, nonzeros(tensor)), tensor.device
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


def values(tensor: Tensor) -> Fingerprint:
    """The metadata, and a checksum."""
    return *metadata(tensor), checksum(tensor)


CHECKS: dict[str, Callable[[Tensor], Fingerprint]] = {
    "none": nothing,
    "metadata": metadata,
    "values": values,
}


def checksum(tensor: Tensor) -> tuple[int, int]:
    """The sum of a tensor's elements, their bits read as integers, and the sum weighted by position, modulo 2**64.

    The second one sees elements that have changed places, as in another permutation or dropout mask. Integers add up to
    the same in any order, so that it does not depend on threads. It waits for the device.
    """
    if tensor.layout is not torch.strided:
        *_, tensor = parts(tensor)
    with torch.no_grad():
        flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        bits = flat.view(INTEGERS[flat.element_size()])
        sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
        for start in range(0, bits.numel(), CHUNK):
            part = bits[start : start + CHUNK].to(torch.int64)
            places = torch.arange(start + 1, start + 1 + part.numel(), device=bits.device)
            sums += torch.stack([part.sum(), (part * places).sum()])
        plain, weighted = sums.tolist()
        return plain, weighted


def difference(first: Fingerprint, again: Fingerprint) -> str | None:
    """How a replayed tensor differs from the first one, in words; None if it only has other strides where none matter."""
    if first == again:
        return None
    shape, dtype, strides, device, *sums = first
    shape2, dtype2, strides2, device2, *sums2 = again
    if (shape, dtype, device) != (shape2, dtype2, device2):
        there = f" on {device}" if device != device2 else ""
        here = f" on {device2}" if device != device2 else ""
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
