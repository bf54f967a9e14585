"""Count the bytes of the storages that are live while ops run, on tensors with data or without.

Every storage that an op returns is followed to its release. The scratch space of kernels is not seen but
asked for (``kernel_scratch.py`` counts it on the device itself). Not seen are the few bytes of numbers that
autograd's own code turns into tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rematplan.scheduler.costs.meters.cuda_allocator import block_bytes
from rematplan.scheduler.torch_layer.private import TorchDispatchMode, pytree, storage_id

__all__ = ["Event", "LiveBytes", "rounded"]


class Event(NamedTuple):
    """A storage was made, released or resized; or a mark was set.

    Attributes:
        label: of the last op, this one included; of a mark, its own.
        change: bytes made (positive) or released (negative); 0 for a mark.
        live: bytes live after it.
        storage: number of the storage, in the order of their making; -1 for a mark.
    """

    label: str
    change: int
    live: int
    storage: int


def rounded(size: int, kind: str) -> int:
    """Return the bytes that the allocator of a kind of device ("cuda", "cpu") takes for ``size`` bytes."""
    return block_bytes(size) if kind == "cuda" else size


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that ops make while it is entered; earlier ones do not count.

    The peak is taken after every op, when its results and its arguments are both live. For fake tensors it is
    entered after their mode, or without it. A tensor that is released after the block still counts as
    released.

    Args:
        kind: whose allocator's rounding is applied: "cuda" or "cpu"; by the device of each tensor if None.
        only: count only tensors on devices of this type; all if None.
        record: whether to note ``events``.
        scratch: returns the bytes that an op took and released within itself (func, args, kwargs, result).

    Attributes:
        live: bytes that are live now. peak: the most so far; ``restart`` forgets it.
        label: of the last op.
        events: in order.
    """

    def __init__(
        self,
        kind: str | None = None,
        *,
        only: str | None = None,
        record: bool = False,
        scratch: Callable[[Any, Any, Any, Any], int] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.only, self.record, self.scratch = kind, only, record, scratch
        self.live = self.peak = 0
        self.label = ""
        self.events: list[Event] = []
        self._made = 0
        # By identity: the storage, its bytes rounded and as it says, its number, the kind of its allocator.
        self._known: dict[int, tuple[weakref.ref[Any], int, int, int, str]] = {}

    def mark(self, label: str) -> None:
        """Put an event of no bytes into the stream."""
        if self.record:
            self.events.append(Event(label, 0, self.live, -1))

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage in the events; None if it was made before, or elsewhere."""
        storage = _storage(tensor)
        known = None if storage is None else self._known.get(storage_id(storage))
        return None if known is None else known[3]

    def restart(self) -> int:
        """Return the peak so far, and begin a new one at what is live now."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op and count."""
        kwargs = kwargs or {}
        self.label = str(func)
        result = func(*args, **kwargs)
        given: dict[int, Any] = {}
        # torch.tensor makes its storage without an op, and lets this one take it up.
        if func is not torch.ops.aten.lift_fresh.default:
            for leaf in pytree.tree_leaves((args, kwargs)) if kwargs else pytree.tree_leaves(args):
                if isinstance(leaf, Tensor):
                    storage = _storage(leaf)
                    if storage is not None:
                        given[storage_id(storage)] = storage
        for leaf in (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and (self.only is None or leaf.device.type == self.only):
                storage = _storage(leaf)
                if storage is not None and (key := storage_id(storage)) not in given:
                    self._follow(key, storage, self.kind or leaf.device.type)
                    given[key] = storage
        for key, storage in given.items():
            known = self._known.get(key)
            if known is not None and known[2] != storage.nbytes():
                reference, before, _, number, allocator = known
                counted = rounded(storage.nbytes(), allocator)
                self._known[key] = (reference, counted, storage.nbytes(), number, allocator)
                self._change(counted - before, number)
        taken = 0 if self.scratch is None else self.scratch(func, args, kwargs, result)
        self.peak = max(self.peak, self.live + taken)
        if taken:
            self._change(taken, self._made)
            self._change(-taken, self._made)
            self._made += 1
        return result

    def _follow(self, key: int, storage: Any, kind: str) -> None:
        if key in self._known:
            return

        def released(_: Any) -> None:
            _, counted, _, number, _ = self._known.pop(key)
            self._change(-counted, number)

        size, number = storage.nbytes(), self._made
        self._made += 1
        counted = rounded(size, kind)
        self._known[key] = (weakref.ref(storage, released), counted, size, number, kind)
        self._change(counted, number)

    def _change(self, change: int, number: int) -> None:
        self.live += change
        if self.record and change:
            self.events.append(Event(self.label, change, self.live, number))


def _storage(tensor: Tensor) -> Any:
    """Return the storage of a tensor; None for one that has none (sparse tensors)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
