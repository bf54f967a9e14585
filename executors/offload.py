"""What a step has on the device and on the host, by storage, for programs that copy between the two.

Autograd's graph holds a ``Moved`` in place of each saved tensor, and the step holds its boundaries as such; the storage is
that of a ``Block``, which is on the device, on the host, or both. Boundary i, and the saved tensors of stage i with boundary
i+1 among them, are *items* of the referee (``scheduler.host.Item``). A block is on either side as long as an item that it
belongs to is to be there, and its last copy goes with the last Moved: an order of backwards that the program does not foresee
is slower, never wrong.

On CUDA copies run on streams of their own, from and to page-locked memory, beside the compute, which waits for a copy where
it needs what is read, or is about to release what is written. The host's memory is outside of torch's allocators (``arena.py``):
on the CPU, the bytes counted for the device are those of a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executors.arena import Arena
from scheduler.actions import (
    CopyAction,
    Free,
    FreeHost,
    FreeSaved,
    Offload,
    OffloadSaved,
    Prefetch,
    PrefetchSaved,
)
from scheduler.capture.private import FakeTensor, set_conj_and_neg, storage_id, version_of
from scheduler.host import Item

__all__ = ["Moved", "Store"]


class Place(NamedTuple):
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """That of a tensor."""
        lies = tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset())
        return cls(tensor.dtype, *lies, tensor.is_conj(), tensor.is_neg())

    def within(self, flat: Tensor) -> Tensor:
        """The tensor that lies so in ``flat``, (bytes,) of uint8, all of a storage."""
        whole = flat[: flat.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        tensor = whole.as_strided(self.size, self.stride, self.offset)
        if self.conj or self.neg:
            set_conj_and_neg(tensor, self.conj, self.neg)
        return tensor


class HostSide:
    """The host's memory during one step, and the streams of the copies.

    Attributes:
        bytes, peak: on the host now, and at most.
        blocks: those on the device, by the identity of their storage.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.bytes = self.peak = 0
        self.blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self._streams: dict[bool, torch.cuda.Stream] = {}

    def take(self, size: int) -> tuple[Tensor, int]:
        """(size,) of uint8 on the host, and where it lies in the arena."""
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        return self.arena.take(size)

    def give(self, offset: int, size: int) -> None:
        """Take it back."""
        self.bytes -= size
        self.arena.give(offset, size)

    def copy(self, target: Tensor, source: Tensor, device: torch.device, *, reading: bool) -> Any:
        """Copy between host and device; on CUDA, the event at whose end it is done."""
        if device.type != "cuda":
            target.copy_(source)
            return None
        if reading not in self._streams:
            self._streams[reading] = torch.cuda.Stream(device)
        stream = self._streams[reading]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()


class Block:
    """One storage, on the device, on the host, or both.

    Attributes:
        on_device: the tensors of this storage that are known, by how they lie in it; None while it is on the host alone.
        holders, hosts: the items for which it is to be on the device, and on the host.
        pinned: it lives on anyway (a parameter, a carried value), so that moving it would free nothing.
    """

    def __init__(self, side: HostSide, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.side = side
        self.device = tensor.device
        self.key = storage_id(storage)
        self.bytes = storage.nbytes()
        self.on_device: dict[Place, Tensor] | None = {}
        self.holders: set[Item] = set()
        self.hosts: set[Item] = set()
        self.pinned = False
        self._versions: dict[Place, int] = {}  # of the tensors, when they left the device
        self._flat: Tensor | None = None  # all of the storage, once it has come back
        self._host: Tensor | bool | None = None  # the copy on the host; True if tensors have no data
        self._offset = -1  # in the arena
        self._written = 0  # version of what is on the host, as tensors on the device count
        self._began = 0  # where they began to count: at what wrote the bytes that came back
        self._copied: Any = None  # the event at the end of the copy under way

    def tensor(self, place: Place, version: int) -> Tensor:
        """The tensor that lies so, copied back if it is not on the device.

        Raises:
            RuntimeError: it has been modified in place since its version was ``version``.
        """
        self.read()
        assert self.on_device is not None
        if self._flat is not None:
            self._wait()
        tensor = self.on_device.get(place)
        if tensor is None:
            assert self._flat is not None
            with torch.no_grad():
                tensor = self.on_device[place] = place.within(self._flat)
        now = self.version(tensor, place)
        if now != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {place.size} is at version {now}, expected version {version}"
            )
        return tensor

    def version(self, tensor: Tensor, place: Place) -> int:
        """The version of a tensor of this storage; that of a copy goes on from what was copied."""
        return version_of(tensor) - self._began + self._versions.get(place, 0)

    def write(self) -> None:
        """Start to copy it to the host, if it is not there."""
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
        """Claim its bytes on the device and start to copy it there, if it is not there."""
        if self.on_device is not None:
            return
        flat = self._flat = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)
        if isinstance(self._host, Tensor):
            with torch.no_grad():
                self._copied = self.side.copy(flat, self._host, self.device, reading=True)
        self._written = self._began = version_of(flat)
        self.on_device = {Place.of(flat): flat}
        self.key = storage_id(flat.untyped_storage())
        self.side.blocks[self.key] = self

    def settle(self) -> None:
        """Let go of the copies that no item asks for; never of the last one."""
        if self._host is None or self.on_device is None:
            return
        tensor = next(iter(self.on_device.values()))  # all of them have one version
        if not self.holders and version_of(tensor) == self._written:
            self._wait()
            places = (*self._versions, *self.on_device)
            self._versions = {place: self.version(tensor, place) for place in places}
            self.on_device = self._flat = None
            self.side.blocks.pop(self.key, None)
        elif (
            not self.hosts or version_of(tensor) != self._written
        ):  # or it was changed in place since it was copied
            self._drop_host()

    def _wait(self) -> None:
        """What the device does next comes after the copy under way."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None

    def _drop_host(self) -> None:
        self._wait()
        # What is under way there comes before all that the compute stream does from now on, and copies wait for that.
        if isinstance(self._host, Tensor):
            self.side.give(self._offset, self.bytes)
        self._host = None

    def __del__(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # or what is being copied would be given to others
            self._copied = None
        self._drop_host()


@dataclass(frozen=True, slots=True)
class Moved:
    """Stands for a tensor wherever it is: in autograd's graph for one that ``stage`` saved, in a Step for one of a boundary."""

    stage: int
    block: Block
    place: Place
    version: int

    def tensor(self) -> Tensor:
        """The tensor, on the device.

        Raises:
            RuntimeError: it has been modified in place since.
        """
        return self.block.tensor(self.place, self.version)


class Store:
    """The blocks of one step, and which items they belong to.

    Args:
        arena: of all steps, for the copies on the host.
    """

    def __init__(self, arena: Arena) -> None:
        self.side = HostSide(arena)
        self._items: dict[Item, list[weakref.ref[Block]]] = {}
        self._entering: list[Block] = []  # of the boundary that the next stage of the first sweep starts from
        # By the stage of the first sweep that runs; those of a node that dies meanwhile (argsort's) go with it.
        self._packed: list[weakref.ref[Block]] = []

    def pack(self, stage: int, tensor: Tensor) -> Moved:
        """What stands for a tensor that the stage saves."""
        block = self._block(tensor)
        self._packed.append(weakref.ref(block))
        return self._moved(stage, block, tensor)

    def hold(self, boundary: int, tensors: Sequence[Tensor], *, own: bool) -> tuple[Moved, ...]:
        """What stands for the tensors of a boundary; ``own``: it is on the device by itself, not with what a stage saved."""
        blocks = [self._block(tensor) for tensor in tensors]
        if own:
            self._belong(("boundary", boundary), blocks)
        return tuple(self._moved(boundary, b, t) for b, t in zip(blocks, tensors, strict=True))

    def ran(self, stage: int, following: Sequence[Tensor], lasting: Collection[int], *, kept: bool) -> bool:
        """A stage has run for the first time.

        Args:
            following: the tensors of boundary ``stage + 1``.
            lasting: identities of storages that live on anyway.
            kept: whether its saved tensors stay.

        Returns:
            whether anything that it saved is here.
        """
        after = [self._block(tensor) for tensor in following]
        for block, tensor in zip(after, following, strict=True):
            self._moved(stage, block, tensor)
        entering = set(self._entering)
        packed = dict.fromkeys(_alive(self._packed))
        own = [block for block in packed if block not in entering]
        for block in (*own, *after):
            block.pinned = block.key in lasting
        if kept:
            self._belong(("saved", stage), [*own, *after])
            self._items["boundary", stage + 1] = list(map(weakref.ref, after))
        else:
            self._belong(("boundary", stage + 1), after)
        self._entering, self._packed = after, []
        return bool(packed)

    def passed(self, boundary: int) -> None:
        """The next stage has run on the boundary, which nobody holds: what of it others hold is there for these alone."""
        self._leave(("boundary", boundary))

    def sweep_is_over(self) -> None:
        """Every stage has run."""
        self._entering, self._packed = [], []

    def move(self, action: CopyAction | Free) -> None:
        """Carry out a word for copies."""
        saved = isinstance(action, (OffloadSaved, PrefetchSaved, FreeSaved))
        item: Item = ("saved", action.stage) if saved else ("boundary", action.boundary)  # type: ignore[union-attr] # by kind
        blocks = self._alive(item)
        if isinstance(action, FreeSaved):
            for block in self._alive(("boundary", action.stage + 1)):
                block.holders.add(("boundary", action.stage + 1))
        for block in blocks:
            if isinstance(action, (Offload, OffloadSaved)):
                block.hosts.add(item)
                block.write()
            elif isinstance(action, (Prefetch, PrefetchSaved)):
                block.holders.add(item)
                block.read()
            elif isinstance(action, FreeHost):
                block.hosts.discard(item)
                block.settle()
            else:
                block.holders.discard(item)
                block.settle()

    def reversed(self, stage: int) -> None:
        """The stage is reversed: its items go."""
        self._leave(("saved", stage))
        self._leave(("boundary", stage))

    def wanted(self, boundary: int) -> bool:
        """Whether the boundary is to be anywhere, on the device or on the host."""
        blocks = self._alive(("boundary", boundary))
        return not blocks or any(block.holders or block.hosts or block.pinned for block in blocks)

    def _leave(self, item: Item) -> None:
        for block in self._alive(item):
            block.holders.discard(item)
            block.hosts.discard(item)
            block.settle()
        self._items.pop(item, None)

    def _alive(self, item: Item) -> list[Block]:
        return _alive(self._items.get(item, ()))

    def _block(self, tensor: Tensor) -> Block:
        key = storage_id(tensor.untyped_storage())
        block = self.side.blocks.get(key)
        if block is None:
            block = self.side.blocks[key] = Block(self.side, tensor)
        return block

    def _moved(self, stage: int, block: Block, tensor: Tensor) -> Moved:
        place = Place.of(tensor)
        assert block.on_device is not None
        # Detached, for a node must not own its own output; versions are those of the tensor.
        known = block.on_device.setdefault(place, tensor.detach())
        return Moved(stage, block, place, block.version(known, place))

    def _belong(self, item: Item, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.holders.add(item)
        self._items[item] = list(map(weakref.ref, blocks))


def _alive(blocks: Iterable[weakref.ref[Block]]) -> list[Block]:
    found = (ref() for ref in blocks)
    return [block for block in found if block is not None]
