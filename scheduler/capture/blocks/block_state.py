"""Python state that a block's code reads or writes: taken at its first run, put in place for a re-run.

A block may count, append to lists, leave statistics and losses on modules, carry hidden states over, rebind
buffers, draw from generators of its own. A re-run has to read what the first run read and to leave nothing
behind. ``BlockState`` finds the places of such state (``python_state.holders_of``) once for many steps, and
again when a container or an object there is new. ``CallState`` finds what one call changes.
"""

from __future__ import annotations

import ast
import re
import types
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.block_layout import (
    SIMPLE,
    UNREAD,
    StateLayout,
    Taken,
    is_same,
    same_content,
    value_at,
    without_graph,
)
from rematplan.scheduler.capture.repeat import ValuesBefore
from rematplan.scheduler.torch_layer.fake import OpWatch
from rematplan.scheduler.torch_layer.preserve import CPU_RANDOM_STATE, copy_back
from rematplan.scheduler.torch_layer.private import pytree, versions_kept
from rematplan.scheduler.torch_layer.python_state import MISSING, Holder, holders_of, is_plain

__all__ = ["BlockState", "CallState", "Taken", "is_walked", "named_tensors"]


class BlockState:
    """The Python state of one block.

    Args:
        name, module: the block; or a list of objects.
        changed: names of tensors that it changes in place, parameters and buffers among them.
        overwritten: places whose tensors it replaces before it reads them: what was there need not be held.
        everything: whether large containers are taken down, too.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module | list[Any],
        changed: Collection[str] = (),
        overwritten: Collection[str] = (),
        *,
        everything: bool = False,
    ) -> None:
        self.name, self.module, self.changed, self.overwritten = name, module, changed, overwritten
        self.everything = everything
        self.sticky: set[tuple[int, Any]] = set()  # places that held tensors once
        self.tracked: set[int] = set()  # containers that were small once, or whose length has changed
        self._find()

    def _find(self, large: Iterable[Holder] = ()) -> None:
        self.tracked.update(id(holder.thing) for holder in large)
        self.layout = StateLayout(
            self.name, self.module, self.sticky, self.tracked, self.changed, self.everything
        )
        self.sticky |= {(id(thing), key) for thing, key in self.layout.tensors}
        self.unread = [
            i for i, place in enumerate(self.layout.tensors) if self.layout.name_of(place) in self.overwritten
        ]

    def take(self, *, cut: bool = True) -> Taken:
        """Return what the block's code finds now.

        Args:
            cut: whether tensors are cut off from their graphs.
        """
        taken = self.layout.now()
        if self._is_new(taken):
            grown = taken.values[2] != self.layout.found[2]
            self._find([h for h in self.layout.large if h.kind != "array"] if grown else ())
            taken = self.layout.now()
        layout = self.layout
        for i in self.unread:
            taken.tensors[i] = UNREAD
        if cut:
            taken.tensors = [*map(without_graph, taken.tensors)]
            for i, content in enumerate(taken.contents):
                if type(content) is list:
                    taken.contents[i] = [*map(without_graph, content)]
        changing = (t for t in map(value_at, layout.copied) if isinstance(t, Tensor))
        taken.copies = [(t, t.detach().clone()) for t in changing]
        return taken

    def _is_new(self, taken: Taken) -> bool:
        """Whether a container or an object is there whose own places are not known."""
        layout, values = self.layout, taken.values
        found = layout.found
        if values[2] != found[2] or not all(map(is_, values[1], found[1])):
            return True
        if not _are_equal(values[0], found[0]):
            pairs = zip(values[0], found[0], strict=True)
            if any(isinstance(v, Tensor) or not is_plain(v) for v, before in pairs if v is not before):
                return True
            layout.found = values
        if not (taken.tensors or taken.contents):
            return False
        held = (v for each in (taken.tensors, taken.inside()) for v in each)
        new = (v for v in held if not isinstance(v, SIMPLE) and v is not MISSING)
        return any(id(v) not in layout.names and not is_plain(v) and is_walked(v) for v in new)

    def put(self, then: Taken) -> None:
        """Let the block's code find what it found then; what is there now is lost."""
        now = then.layout.now()
        if not _equal(then, now):
            then.layout.put(then, now)
        copy_back(then.copies)

    @contextmanager
    def as_of(self, then: Taken) -> Iterator[None]:
        """Let the block's code find within it what it found then; restore the present state on leaving."""
        layout = then.layout
        now = layout.now()
        differs = not _equal(then, now)
        current = [(tensor, tensor.detach().clone()) for tensor, _ in then.copies]
        removed = layout.put(then, now) if differs else []
        copy_back(then.copies)
        changed = tuple([tensor for tensor, _ in current if not tensor.is_inference()])
        try:
            # What the block changes in place meanwhile is put back: to autograd, too, it is what it was.
            with versions_kept(changed) if changed else nullcontext():
                yield
        finally:
            after = layout.now()
            if differs or not _equal(now, after):
                layout.put(now, after)
                for thing, key, value in removed:
                    thing[key] = value
            copy_back(current)


def _are_equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether plain values are the same, or almost (1 and True)."""
    try:
        return a == b
    except Exception:  # noqa: BLE001 # whatever compares there now
        return False


def _equal(a: Taken, b: Taken) -> bool:
    return (
        a.values[2] == b.values[2]
        and all(map(is_, a.values[0], b.values[0]))
        and all(map(is_, a.values[1], b.values[1]))
        and all(map(is_same, a.tensors, b.tensors))
        and all(map(same_content, a.contents, b.contents))
        and not a.generators
    )


def is_walked(value: Any) -> bool:
    """Whether a value has places of its own."""
    return next(iter(holders_of([("", value)])), None) is not None


def named_tensors(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """Return the tensors of these names (``blocks.0.stats['mean']``) that attributes and keys lead to."""
    found = []
    for name in names:
        value: Any = model
        try:
            for attribute, key in re.findall(r"([^.\[\]]+)|\[((?:'[^']*'|[^\]])*)\]", name):
                if not attribute:
                    value = value[ast.literal_eval(key)]
                elif attribute in getattr(value, "_modules", ()):
                    value = value._modules[attribute]
                else:
                    value = getattr(value, attribute)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, SyntaxError):
            continue
        if isinstance(value, Tensor):
            found.append(value)
    return found


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
        self.values = ValuesBefore(_tensors(state, self.taken), data=data)
        outside = self.taken.layout.outside
        self.outside = [(name, each, _look(each)) for name, each in outside if not is_walked(each)]

    def changed(self, ops: OpWatch | None = None) -> set[str]:
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
        """Restore within it the state in which the call began; restore the present one on leaving.

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
