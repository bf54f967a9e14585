"""Python state that a block's code reads or writes: taken at its first run, put in place for a re-run.

A block may count, append to lists, leave statistics and losses on modules, carry hidden states over, rebind
buffers, draw from generators of its own. A re-run has to read what the first run read and to leave nothing
behind. ``BlockState`` finds the places of such state (``python_state.holders_of``) once for many steps, and
again when a container or an object there is new.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from operator import is_
from typing import Any

from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.block_layout import (
    SIMPLE,
    UNREAD,
    Layout,
    Taken,
    is_same,
    same_content,
    value_at,
    without_graph,
)
from rematplan.scheduler.torch_layer.private import versions_kept
from rematplan.scheduler.torch_layer.python_state import MISSING, Holder, holders_of, is_plain

__all__ = ["BlockState", "Taken", "is_walked", "named_tensors"]


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
        self.layout = Layout(self.name, self.module, self.sticky, self.tracked, self.changed, self.everything)
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
        _copy_back(then.copies)

    @contextmanager
    def as_of(self, then: Taken) -> Iterator[None]:
        """Within it the block's code finds what it found then; on leaving, all is as it was before."""
        layout = then.layout
        now = layout.now()
        differs = not _equal(then, now)
        current = [(tensor, tensor.detach().clone()) for tensor, _ in then.copies]
        removed = layout.put(then, now) if differs else []
        _copy_back(then.copies)
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
            _copy_back(current)


def _copy_back(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in copies:
        tensor.data.copy_(value)  # .data: the version that autograd saw stays


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
