"""What one call of a block changes besides what it returns, found by looking before and after it."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.block_state import BlockState, Taken, is_walked
from rematplan.scheduler.torch_layer.fake import Watch
from rematplan.scheduler.torch_layer.layouts import equal_bits
from rematplan.scheduler.torch_layer.preserve import CPU_RANDOM_STATE
from rematplan.scheduler.torch_layer.private import pytree, version_of
from rematplan.scheduler.torch_layer.python_state import is_plain

__all__ = ["CallState"]


class CallState:
    """The state of a block as one call of it begins.

    Args:
        state: of the block, with everything.
        args, kwargs: of the call: the state of objects among them counts, too.
        data: whether tensors have values.
    """

    def __init__(self, state: BlockState, args: Any, kwargs: Any, *, data: bool = True) -> None:
        self.state, self.data = state, data
        self.taken = state.take(cut=False)
        objects = [
            leaf
            for leaf in pytree.tree_leaves((args, kwargs))
            if not isinstance(leaf, Tensor) and not is_plain(leaf)
        ]
        self.given = BlockState("argument", objects, everything=True).take(cut=False) if objects else None
        self.values = {
            name: (tensor, tensor.detach().clone() if data else tensor, version_of(tensor))
            for name, tensor in _tensors(state.name, state.module, self.taken)
        }
        self.outside = [
            (name, each, _look(each)) for name, each in self.taken.layout.outside if not is_walked(each)
        ]

    def changed(self, ops: Watch | None = None) -> set[str]:
        """Return the names of the tensors, containers and generators that were changed in place since.

        Args:
            ops: what ran since, where tensors have no data.
        """
        found = {name for name, each in self.values.items() if self._differs(*each, ops)}
        layout = self.taken.layout
        found |= {h.path for h, c in zip(layout.containers, self.taken.contents, strict=True) if h.changed(c)}
        return found | {
            h.path for h, c in zip(layout.generators, self.taken.generators, strict=True) if h.changed(c)
        }

    def _differs(self, tensor: Tensor, value: Tensor, version: int, ops: Watch | None) -> bool:
        # Kernels of batch norm change statistics without a new version; a fill may put the same values in
        # again.
        if not self.data:
            return ops is not None and ops.has_changed(tensor)
        return version_of(tensor) != version or tensor.shape != value.shape or not equal_bits(tensor, value)

    def replaced(self) -> set[str]:
        """Return the names of the places in which another tensor is now than before."""
        layout = self.taken.layout
        now = layout.now()
        pairs = zip(layout.tensors, self.taken.tensors, now.tensors, strict=True)
        return {layout.name_of(place) for place, before, after in pairs if after is not before}

    def left(self) -> dict[str, int]:
        """Return bytes of tensors live now and not before, and of generators' states, by place."""
        now = self.state.take(cut=False)
        before = {id(tensor) for _, tensor in self.taken.read()} | {id(t) for t, _, _ in self.values.values()}
        found: dict[str, int] = {}
        for name, tensor in _tensors(self.state.name, self.state.module, now):
            if id(tensor) not in before:
                found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
        for taken in (self.taken, self.given):
            for holder in () if taken is None else taken.layout.generators:
                if isinstance(holder.thing, torch.Generator):
                    found[holder.path] = CPU_RANDOM_STATE
        return found

    def beyond(self) -> str:
        """The name of an object that has changed and whose state cannot be put back; "" if there is none."""
        return next((name for name, each, before in self.outside if _look(each) != before), "")

    @contextmanager
    def again(self, without: Iterable[str] = ()) -> Iterator[None]:
        """Within it, all is as when the call began; on leaving, as it is now.

        Args:
            without: places where something stands that no code can use.
        """
        then = Taken()
        for slot in ("layout", "values", "tensors", "contents", "generators"):
            setattr(then, slot, getattr(self.taken, slot))
        changed = self.changed()
        then.copies = [(tensor, value) for name, (tensor, value, _) in self.values.items() if name in changed]
        hidden = set(without)
        then.tensors = [
            object() if self.taken.layout.name_of(place) in hidden else value
            for place, value in zip(then.layout.tensors, then.tensors, strict=True)
        ]
        with ExitStack() as stack:
            stack.enter_context(self.state.as_of(then))
            if self.given is not None:
                stack.enter_context(self.state.as_of(self.given))
            yield


def _tensors(name: str, module: Any, taken: Taken) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(module, nn.Module)
    yield from ((f"{name}.{n}", p) for n, p in module.named_parameters())
    yield from ((f"{name}.{n}", b) for n, b in module.named_buffers())
    yield from taken.read()


def _look(value: Any) -> Any:
    """Return what shows of an object whose state is not walked: how far an iterator or a file has got."""
    try:
        if isinstance(value, types.GeneratorType):
            return None if value.gi_frame is None else value.gi_frame.f_lasti
        if hasattr(value, "tell"):
            return value.tell()
        shown = repr(value.__reduce_ex__(4))
    except Exception:  # noqa: BLE001 # objects of any kind
        shown = repr(value)
    return shown if " at 0x" not in shown else None
