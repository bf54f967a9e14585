"""Compare the tensors that a re-run reads with those of the first run: versions, addresses, a few values.

``p.data = other`` changes no version, and ``p.data.mul_(2)`` changes no address either, so a few elements
spread over each tensor are compared. On CUDA they stay there, and nothing waits for the device before they
are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.layouts import INTEGERS
from rematplan.scheduler.torch_layer.private import FakeTensor, version_of

__all__ = ["AsRead", "Sampler", "address", "changed_samples"]

MANY = 16  # elements of a tensor that are compared
Sample = Any  # a tensor on the device, or an array of NumPy's
_EXACT = frozenset({Tensor, nn.Parameter, nn.Buffer})


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's values; 0 if it has none (sparse, fake)."""
    if isinstance(tensor, FakeTensor):
        return 0
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _elements(tensor: Tensor) -> Tensor | None:
    """Return a view of a few elements spread over a tensor, their bits as integers; None if it has none."""
    if type(tensor) not in _EXACT or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    whole = tensor.detach()
    count = whole.numel()
    if whole.is_contiguous():
        some = min(count, MANY)
        whole = whole.as_strided((some,), (count // max(some, 1),), whole.storage_offset())
    else:
        sizes, strides, left = [], [], MANY
        for dimension, (size, stride) in enumerate(zip(whole.shape, whole.stride(), strict=True)):
            some = max(1, min(size, round(left ** (1 / (whole.ndim - dimension)))))
            left = max(1, left // some)
            sizes.append(min(some, size))
            strides.append(stride * (size // some))
        whole = whole.as_strided(sizes, strides, whole.storage_offset())
    return whole.view(INTEGERS[whole.element_size()]) if whole.element_size() in INTEGERS else None


class Sampler:
    """Samples the same tensors repeatedly, by the same views of their elements."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._views: list[list[Tensor]] = []
        self._numbers: list[list[int]] = []  # by device: numbers of the tensors that the views are of

    def take(self, tensors: Sequence[Tensor], addresses: list[int]) -> list[Sample]:
        """Return the sampled elements, in one tensor for each device."""
        if addresses != self._addresses:
            by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
            for number, tensor in enumerate(tensors):
                view = _elements(tensor)
                if view is not None:
                    by_device.setdefault(view.device, []).append((number, view))
            self._views = [[view for _, view in group] for group in by_device.values()]
            self._numbers = [[number for number, _ in group] for group in by_device.values()]
            self._addresses = addresses
        return [_joined(views) for views in self._views]

    def unlike(self, before: Sequence[Sample], now: Sequence[Sample]) -> set[int]:
        """Return the numbers of the tensors whose samples differ."""
        found: set[int] = set()
        for numbers, views, a, b in zip(self._numbers, self._views, before, now, strict=True):
            ends = itertools.accumulate((view.numel() for view in views), initial=0)
            for number, (start, end) in zip(numbers, itertools.pairwise(ends), strict=True):
                if bool((a[start:end] != b[start:end]).any()):
                    found.add(number)
        return found


class AsRead:
    """Tensors as a first run read them; without a sampler by versions and addresses alone."""

    __slots__ = ("addresses", "sample", "sampler", "tensors", "versions")

    def __init__(self, tensors: Sequence[Tensor], sampler: Sampler | None = None) -> None:
        self.tensors, self.sampler = tensors, sampler
        self.versions = [*map(version_of, tensors)]
        self.addresses = [*map(address, tensors)]
        self.sample = [] if sampler is None else sampler.take(tensors, self.addresses)

    def changed(self) -> Sequence[int]:
        """Return the numbers of those changed in place since (by version), or with other data."""
        versions = [version_of(tensor) for tensor in self.tensors]
        addresses = [*map(address, self.tensors)]
        if versions == self.versions and addresses == self.addresses:
            return ()
        now, then = zip(versions, addresses, strict=True), zip(self.versions, self.addresses, strict=True)
        return [number for number, (a, b) in enumerate(zip(now, then, strict=True)) if a != b]

    def now(self) -> list[Tensor]:
        """Return the present sample."""
        return [] if self.sampler is None else self.sampler.take(self.tensors, [*map(address, self.tensors)])


def changed_samples(reads: Sequence[AsRead]) -> list[tuple[int, int]]:
    """Return (which of these, number of the tensor) of those whose values have changed, by their samples.

    Waits for the device once.
    """
    now = [read.now() for read in reads]
    then = itertools.chain.from_iterable(read.sample for read in reads)
    pairs = list(zip(then, itertools.chain.from_iterable(now), strict=True))
    on_host = all(np.array_equal(a, b) for a, b in pairs if isinstance(a, np.ndarray))
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for a, b in pairs:
        if not isinstance(a, np.ndarray):
            before, after = groups.setdefault(a.device, ([], []))
            before.append(a)
            after.append(b)
    if on_host and all(torch.equal(torch.cat(before), torch.cat(after)) for before, after in groups.values()):
        return []
    return [
        (which, number)
        for which, (read, current) in enumerate(zip(reads, now, strict=True))
        if read.sampler is not None
        for number in sorted(read.sampler.unlike(read.sample, current))
    ]


def _joined(parts: list[Tensor]) -> Sample:
    """Return copies of some elements; on the host outside torch's allocator."""
    flat = torch.cat([part if part.ndim == 1 else part.flatten() for part in parts])
    return flat.numpy().copy() if flat.device.type == "cpu" else flat
