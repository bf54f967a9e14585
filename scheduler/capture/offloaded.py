"""Trial steps whose saved tensors wait on the host, for a model that may not fit on its device otherwise."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from rematplan.scheduler.core.budget import format_bytes, free_machine_bytes
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.layouts import storage_key, storage_keys
from rematplan.scheduler.torch_layer.leaves import tensors_in
from rematplan.scheduler.torch_layer.preserve import model_device
from rematplan.scheduler.torch_layer.private import storage_id, version_of

__all__ = ["offloaded", "on_host"]


class _OnHost:
    """A copy of a saved tensor on the host, for all nodes that saved it."""

    __slots__ = ("__weakref__", "copy", "device", "held")

    def __init__(self, tensor: Tensor, held: _Bytes) -> None:
        held.take(tensor.numel() * tensor.element_size())
        self.held, self.device = held, tensor.device
        self.copy = tensor.detach().to("cpu", copy=True)  # with the same strides, where it is dense

    def __del__(self) -> None:
        if hasattr(self, "copy"):
            self.held.now -= self.copy.numel() * self.copy.element_size()


class _Bytes:
    """Bytes that are on the host now, and that may be at most."""

    def __init__(self, most: int) -> None:
        self.now, self.most = 0, most

    def take(self, size: int) -> None:
        if self.now + size > self.most:
            raise CaptureError(
                f"a plain step on the sample saves more for its backward than the {format_bytes(self.most)} of host memory that "
                "are free; pass a smaller sample, or plan without data: solve(..., device=...)"
            )
        self.now += size


def on_host(model: nn.Module, call: Any) -> AbstractContextManager[Any]:
    """Return the context of a trial of the model on a call; of a model on the host, none."""
    kind = model_device(model).type
    if kind == "cpu":
        return nullcontext()
    return offloaded([*model.parameters(), *model.buffers(), *tensors_in(call)], kind)


@contextmanager
def offloaded(lasting: Iterable[Tensor], kind: str = "cuda", most: int | None = None) -> Iterator[_Bytes]:
    """Keep what autograd saves within it on the host, each tensor once.

    Args:
        lasting: parameters, buffers, arguments: tensors on their storages stay where they are.
        kind: of the device whose tensors are copied.
        most: bytes on the host; default: those that are free.

    Raises:
        CaptureError: within, where the host has no room for more.
    """
    keys = storage_keys(lasting)
    held = _Bytes(free_machine_bytes() if most is None else most)
    known: dict[Any, tuple[StorageWeakRef, weakref.ref[_OnHost]]] = {}  # by place, while its storage lives

    def pack(tensor: Tensor) -> Tensor | _OnHost:
        if tensor.device.type != kind or tensor.layout is not torch.strided or storage_key(tensor) in keys:
            return tensor if tensor.is_leaf else tensor.detach()
        storage = tensor.untyped_storage()
        lies = tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, version_of(tensor)
        place = (storage_id(storage), tensor.is_conj(), tensor.is_neg(), *lies)
        if place in known:
            live, ref = known[place]
            if not live.expired() and (copy := ref()) is not None:
                return copy
        made = _OnHost(tensor, held)
        known[place] = StorageWeakRef(storage), weakref.ref(made)
        return made

    def unpack(packed: Tensor | _OnHost) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.copy.to(packed.device, copy=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield held
