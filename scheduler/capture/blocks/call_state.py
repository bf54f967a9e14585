"""Find by comparison before and after one call of a block what it changes besides what it returns."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.block_state import BlockState, Taken, is_walked
from rematplan.scheduler.capture.repeat import Values
from rematplan.scheduler.torch_layer.fake import Watch
from rematplan.scheduler.torch_layer.preserve import CPU_RANDOM_STATE
from rematplan.scheduler.torch_layer.private import pytree
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
        self.state = state
        self.taken = state.take(cut=False)
        leaves = pytree.tree_leaves((args, kwargs))
        objects = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and not is_plain(leaf)]
        self.given = BlockState("argument", objects, everything=True).take(cut=False) if objects else None
        self.values = Values(_tensors(state, self.taken), data=data)
        outside = self.taken.layout.outside
        self.outside = [(name, each, _look(each)) for name, each in outside if not is_walked(each)]

    def changed(self, ops: Watch | None = None) -> set[str]:
        """Return the names of the tensors, containers and generators that were changed in place since.

        Args:
            ops: what ran since, where tensors have no data.
        """
        taken, layout = self.taken, self.taken.layout
        holders = zip(
            (*layout.containers, *layout.generators), (*taken.contents, *taken.generators), strict=True
        )
        return {*self.values.changed(ops), *(h.path for h, content in holders if h.changed(content))}

    def replaced(self) -> set[str]:
        """Return the names of the places in which another tensor is now than before."""
        layout = self.taken.layout
        pairs = zip(layout.tensors, self.taken.tensors, layout.now().tensors, strict=True)
        return {layout.name_of(place) for place, before, after in pairs if after is not before}

    def left(self) -> dict[str, int]:
        """Return bytes of tensors live now and not before, and of generators' states, by place."""
        now = self.state.take(cut=False)
        before = {id(tensor) for tensor, _, _ in self.values.before.values()}
        before |= {id(tensor) for _, tensor in self.taken.read()}
        found = Counter[str]()
        for name, tensor in _tensors(self.state, now):
            if id(tensor) not in before:
                found[name] += tensor.numel() * tensor.element_size()
        for taken in (self.taken, self.given):
            for holder in () if taken is None else taken.layout.generators:
                if isinstance(holder.thing, torch.Generator):
                    found[holder.path] = CPU_RANDOM_STATE
        return dict(found)

    def beyond(self) -> str:
        """Return the name of a changed object whose state cannot be put back; "" if there is none."""
        return next((name for name, each, before in self.outside if _look(each) != before), "")

    @contextmanager
    def again(self, without: Iterable[str] = ()) -> Iterator[None]:
        """Within it, all is as when the call began; on leaving, as it is now.

        Args:
            without: places where something stands that no code can use.
        """
        layout, hidden, changed = self.taken.layout, set(without), self.changed()
        places = zip(layout.tensors, self.taken.tensors, strict=True)
        then = replace(
            self.taken,
            tensors=[object() if layout.name_of(place) in hidden else value for place, value in places],
            copies=[
                (tensor, value) for name, (tensor, value, _) in self.values.before.items() if name in changed
            ],
        )
        given = nullcontext() if self.given is None else self.state.as_of(self.given)
        with self.state.as_of(then), given:
            yield


def _tensors(state: BlockState, taken: Taken) -> Iterator[tuple[str, Tensor]]:
    name, module = state.name, state.module
    assert isinstance(module, nn.Module)
    yield from ((f"{name}.{n}", p) for n, p in module.named_parameters())
    yield from ((f"{name}.{n}", b) for n, b in module.named_buffers())
    yield from taken.read()


def _look(value: Any) -> Any:
    """Return what an object whose state is not walked shows of it: an iterator's or a file's position."""
    try:
        if isinstance(value, types.GeneratorType):
            return None if value.gi_frame is None else value.gi_frame.f_lasti
        if hasattr(value, "tell"):
            return value.tell()
        shown = repr(value.__reduce_ex__(4))
    except Exception:  # noqa: BLE001 # objects of any kind
        shown = repr(value)
    return shown if " at 0x" not in shown else None
