"""Copy boundaries and saved tensors between device and host during a step, by storage.

A ``Moved`` stands for each saved tensor in autograd's graph, and for each tensor of a held boundary; it lies
in a ``MovedStorage``, on the device, on the host, or both. Boundary i, and the saved tensors of stage i with
boundary i+1 among them, are *items* of the referee (``rematplan.scheduler.core.host.Item``). A storage stays
on either side while an item that it belongs to is needed there, and its last copy is released with the last
Moved: an order of backwards that the program does not foresee is slower, never wrong.

On CUDA copies run on their own streams, from and to page-locked memory, beside the compute, which waits for a
copy before it uses what is read, or releases what is written. The host's memory is outside torch's allocators
(``host_arena.py``): on the CPU, the bytes counted for the device are those of a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rematplan.executors.host_arena import Arena
from rematplan.scheduler.core import schedule as acts
from rematplan.scheduler.core.host import Item
from rematplan.scheduler.torch_layer.private import FakeTensor, set_conj_and_neg, storage_id, version_of

__all__ = ["Moved", "Store"]


class View(NamedTuple):
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        lies = tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset())
        return cls(tensor.dtype, *lies, tensor.is_conj(), tensor.is_neg())

    def within(self, flat: Tensor) -> Tensor:
        """Return the tensor of this view in ``flat``, (bytes,) of uint8, all of a storage."""
        whole = flat[: flat.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        tensor = whole.as_strided(self.size, self.stride, self.offset)
        if self.conj or self.neg:
            set_conj_and_neg(tensor, self.conj, self.neg)
        return tensor


class HostSide:
    """The host's memory during one step, and the streams that copies run on.

    Attributes:
        bytes, peak: on the host now, and at most.
        storages: those on the device, by the identity of their storage.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.bytes = self.peak = 0
        self.storages: weakref.WeakValueDictionary[int, MovedStorage] = weakref.WeakValueDictionary()
        self._streams: dict[bool, torch.cuda.Stream] = {}

    def take(self, size: int) -> tuple[Tensor, int]:
        """Take (size,) of uint8 on the host; return it and where it lies in the arena."""
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        return self.arena.take(size)

    def give(self, offset: int, size: int) -> None:
        self.bytes -= size
        self.arena.give(offset, size)

    def copy(self, destination: Tensor, source: Tensor, device: torch.device, *, reading: bool) -> Any:
        """Copy between host and device; return the event at whose end it is done, on CUDA."""
        if device.type != "cuda":
            destination.copy_(source)
            return None
        if reading not in self._streams:
            self._streams[reading] = torch.cuda.Stream(device)
        stream = self._streams[reading]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)
        return stream.record_event()


class MovedStorage:
    """One storage, on the device, on the host, or both.

    Attributes:
        on_device: its known tensors, by view; None while it is on the host alone.
        holders, hosts: the items that need it on the device, and on the host.
        pinned: whether it outlives the step (a parameter, a carried value): moving it would free nothing.
    """

    def __init__(self, side: HostSide, tensor: Tensor) -> None:
        whole = tensor.untyped_storage()
        self.side = side
        self.device = tensor.device
        self.key, self.bytes = storage_id(whole), whole.nbytes()
        self.on_device: dict[View, Tensor] | None = {}
        self.holders: set[Item] = set()
        self.hosts: set[Item] = set()
        self.pinned = False
        self._versions: dict[View, int] = {}  # of the tensors, when they left the device
        self._flat: Tensor | None = None  # all of the storage, once it has come back
        self._host: Tensor | bool | None = None  # the copy on the host; True if tensors have no data
        self._offset = -1  # in the arena
        self._written = 0  # version of what is on the host, as tensors on the device count
        self._began = 0  # where they began to count: at what wrote the bytes that came back
        self._copied: Any = None  # the event at the end of the copy under way

    def tensor(self, view: View, version: int) -> Tensor:
        """Return the tensor of a view, copied back if needed; RuntimeError if its version is another."""
        self.read()
        assert self.on_device is not None
        if self._flat is not None:
            self._wait()
        tensor = self.on_device.get(view)
        if tensor is None:
            assert self._flat is not None
            with torch.no_grad():
                tensor = self.on_device[view] = view.within(self._flat)
        now = self.version(tensor, view)
        if now != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {view.size} is at version {now}, expected version {version}"
            )
        return tensor

    def version(self, tensor: Tensor, view: View) -> int:
        """Return the version of a tensor of this storage; a copy continues the count of what was copied."""
        return version_of(tensor) - self._began + self._versions.get(view, 0)

    def write(self) -> None:
        """Start to copy it to the host, unless it is there or pinned."""
        if self._host is not None or self.on_device is None or self.pinned:
            return
        tensor = next(iter(self.on_device.values()))
        self._written = version_of(tensor)
        if isinstance(tensor, FakeTensor):
            self._host = True
            return
        with torch.no_grad():
            whole = torch.empty(0, dtype=torch.uint8, device=self.device)
            whole.set_(tensor.untyped_storage(), 0, (self.bytes,), (1,))
            self._host, self._offset = self.side.take(self.bytes)
            self._copied = self.side.copy(self._host, whole, self.device, reading=False)

    def read(self) -> None:
        """Claim its bytes on the device and start to copy it there, unless it is there."""
        if self.on_device is not None:
            return
        flat = self._flat = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)
        if isinstance(self._host, Tensor):
            with torch.no_grad():
                self._copied = self.side.copy(flat, self._host, self.device, reading=True)
        self._written = self._began = version_of(flat)
        self.on_device = {View.of(flat): flat}
        self.key = storage_id(flat.untyped_storage())
        self.side.storages[self.key] = self

    def settle(self) -> None:
        """Release the copies that no item needs; never the last one."""
        if self._host is None or self.on_device is None:
            return
        tensor = next(iter(self.on_device.values()))  # all of them have one version
        if not self.holders and version_of(tensor) == self._written:
            self._wait()
            views = (*self._versions, *self.on_device)
            self._versions = {view: self.version(tensor, view) for view in views}
            self.on_device = self._flat = None
            self.side.storages.pop(self.key, None)
        elif not self.hosts or version_of(tensor) != self._written:  # changed in place since it was copied
            self._drop_host()

    def _wait(self) -> None:
        """Make later work of the device wait for the copy in flight."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None

    def _drop_host(self) -> None:
        self._wait()
        # Later copies into these bytes wait for the compute stream, which has waited for the copy in flight.
        if isinstance(self._host, Tensor):
            self.side.give(self._offset, self.bytes)
        self._host = None

    def __del__(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # or bytes still being copied would be allocated again
            self._copied = None
        self._drop_host()


@dataclass(frozen=True, slots=True)
class Moved:
    """Stands for a tensor, on either side, that ``stage`` saved, or that enters it."""

    stage: int
    storage: MovedStorage
    view: View
    version: int

    def tensor(self) -> Tensor:
        """Return the tensor, on the device; RuntimeError if it was modified in place since."""
        return self.storage.tensor(self.view, self.version)


class Store:
    """The storages of one step and the items they belong to, copied to an arena that all steps share."""

    def __init__(self, arena: Arena) -> None:
        self.side = HostSide(arena)
        self._items: dict[Item, list[weakref.ref[MovedStorage]]] = {}
        # Of the boundary that the next stage of the first sweep starts from; and what the running stage has
        # saved, where a node that dies meanwhile (argsort's) takes its storages with it.
        self._entering: list[MovedStorage] = []
        self._packed: list[weakref.ref[MovedStorage]] = []

    def pack(self, stage: int, tensor: Tensor) -> Moved:
        """Return the Moved of a tensor that the stage saves."""
        storage = self._storage(tensor)
        self._packed.append(weakref.ref(storage))
        return self._moved(stage, storage, tensor)

    def hold(self, boundary: int, tensors: Sequence[Tensor], *, own: bool) -> tuple[Moved, ...]:
        """Return the Moved of a boundary's tensors; ``own``: it is live by itself, not as a saved tensor."""
        storages = [self._storage(tensor) for tensor in tensors]
        if own:
            self._belong(("boundary", boundary), storages)
        return tuple(self._moved(boundary, b, t) for b, t in zip(storages, tensors, strict=True))

    def ran(self, stage: int, following: Sequence[Tensor], lasting: Collection[int], *, kept: bool) -> bool:
        """Note the first run of a stage; return whether anything that it saved is live.

        Args:
            following: the tensors of boundary ``stage + 1``.
            lasting: identities of storages that live on anyway.
            kept: whether its saved tensors stay.
        """
        after = [self._storage(tensor) for tensor in following]
        for storage, tensor in zip(after, following, strict=True):
            self._moved(stage, storage, tensor)
        entering = set(self._entering)
        packed = dict.fromkeys(_alive(self._packed))
        own = [storage for storage in packed if storage not in entering]
        for storage in (*own, *after):
            storage.pinned = storage.key in lasting
        if kept:
            self._belong(("saved", stage), [*own, *after])
            self._items["boundary", stage + 1] = list(map(weakref.ref, after))
        else:
            self._belong(("boundary", stage + 1), after)
        self._entering, self._packed = after, []
        return bool(packed)

    def passed(self, boundary: int) -> None:
        """Note that a boundary which is not held was used: its storages are live only for other items."""
        self._leave(("boundary", boundary))

    def sweep_is_over(self) -> None:
        """Note that every stage has run."""
        self._entering, self._packed = [], []

    def move(self, action: acts.CopyAction | acts.Free) -> None:
        """Carry out a copy, or free one of two copies."""
        saved = isinstance(action, (acts.OffloadSaved, acts.PrefetchSaved, acts.FreeSaved))
        item: Item = ("saved", action.stage) if saved else ("boundary", action.boundary)  # type: ignore[union-attr]
        storages = self._alive(item)
        if isinstance(action, acts.FreeSaved):
            for storage in self._alive(("boundary", action.stage + 1)):
                storage.holders.add(("boundary", action.stage + 1))
        for storage in storages:
            if isinstance(action, (acts.Offload, acts.OffloadSaved)):
                storage.hosts.add(item)
                storage.write()
            elif isinstance(action, (acts.Prefetch, acts.PrefetchSaved)):
                storage.holders.add(item)
                storage.read()
            elif isinstance(action, acts.FreeHost):
                storage.hosts.discard(item)
                storage.settle()
            else:
                storage.holders.discard(item)
                storage.settle()

    def reversed(self, stage: int) -> None:
        """Release the items of a stage that is reversed."""
        self._leave(("saved", stage))
        self._leave(("boundary", stage))

    def wanted(self, boundary: int) -> bool:
        """Return whether the boundary is to be anywhere, on the device or on the host."""
        storages = self._alive(("boundary", boundary))
        return not storages or any(storage.holders or storage.hosts or storage.pinned for storage in storages)

    def _leave(self, item: Item) -> None:
        for storage in self._alive(item):
            storage.holders.discard(item)
            storage.hosts.discard(item)
            storage.settle()
        self._items.pop(item, None)

    def _alive(self, item: Item) -> list[MovedStorage]:
        return _alive(self._items.get(item, ()))

    def _storage(self, tensor: Tensor) -> MovedStorage:
        key = storage_id(tensor.untyped_storage())
        storage = self.side.storages.get(key)
        if storage is None:
            storage = self.side.storages[key] = MovedStorage(self.side, tensor)
        return storage

    def _moved(self, stage: int, storage: MovedStorage, tensor: Tensor) -> Moved:
        view = View.of(tensor)
        assert storage.on_device is not None
        # Detached, for a node must not own its own output; versions are those of the tensor.
        known = storage.on_device.setdefault(view, tensor.detach())
        return Moved(stage, storage, view, storage.version(known, view))

    def _belong(self, item: Item, storages: Sequence[MovedStorage]) -> None:
        for storage in storages:
            storage.holders.add(item)
        self._items[item] = list(map(weakref.ref, storages))


def _alive(storages: Iterable[weakref.ref[MovedStorage]]) -> list[MovedStorage]:
    found = (ref() for ref in storages)
    return [storage for storage in found if storage is not None]
