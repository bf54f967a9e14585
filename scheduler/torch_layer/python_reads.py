"""Record the Python state that a traced forward reads, and guard that it stays as the graph has it.

While a model is traced, ``__getattribute__`` of the classes of its modules, and of the plain objects that
these reach, is replaced by one that records reads. ``named_by_code`` finds the globals and closures that the
code names. At each forward plain values are compared, by identity first. Tensors are inputs of the graph: the
one in its place at a forward, which may be another one or have a history, takes part in the step.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import contains, getitem, is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.named_by_code import Named, named_by
from rematplan.scheduler.torch_layer.python_state import (
    MISSING,
    Holder,
    holders_of,
    is_own_code,
    is_plain,
    reads_recorded,
    same_value,
)

__all__ = ["Guards", "Reads", "StateTensor", "roots_of", "state_tensors"]

# Read by torch itself of every module. Parameters, buffers, submodules and hooks are guarded elsewhere.
_INTERNAL = frozenset(
    {
        "__class__", "__dict__", "_parameters", "_buffers", "_modules", "_compiled_call_impl", "_is_full_backward_hook",
        "_non_persistent_buffers_set", "call_super_init", "_call_impl", "_slow_forward", "_wrapped_call_impl",
        "_flat_weights", "_flat_weight_refs",
    }
)  # fmt: skip # one table
_Columns = tuple[list[Any], ...]
_TORCH = str(Path(torch.__file__).parent)
_MOST_BYTES = 2**20  # of an array whose content is guarded
_MOST_ITEMS = 10_000  # of a container whose content is guarded
_MOST_TENSORS = 256  # reachable ones that are offered to an export as inputs


def roots_of(model: nn.Module) -> tuple[list[tuple[str, Any]], Named]:
    """Return the roots of a model's Python state: its modules and what their code names; and the latter."""
    kinds = dict.fromkeys(holder.owner for holder in holders_of([("", model)]) if holder.owner is not None)
    named = named_by(model.modules(), kinds)
    return [("", model), *named.objects()], named


class StateTensor:
    """A place in Python state that holds a tensor: an attribute, an item, a closure's variable or a global.

    Attributes:
        path: as a user would write it.
    """

    __slots__ = ("_container", "_inner", "_key", "path")

    def __init__(self, container: Any, key: Any, path: str, inner: int | None = None) -> None:
        self._container, self._key, self._inner, self.path = container, key, inner, path

    def get(self) -> Any:
        """Return the tensor in this place now; MISSING if it holds none."""
        try:
            value = self._container[self._key]
            value = value if self._inner is None else value[self._inner]
        except (KeyError, IndexError, TypeError, ValueError):
            return MISSING
        return value if isinstance(value, Tensor) else MISSING

    def put(self, value: Any) -> None:
        """Put another tensor in this place."""
        if self._inner is not None:
            items = list(self._container[self._key])
            items[self._inner] = value
            value = tuple(items)
        self._container[self._key] = value


class _Attributes:
    """The attributes of an object without ``__dict__``, as a container; of a cell ``cell_contents``."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self.owner, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)


def _items(holder: Holder) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return a holder as a container, and its (key, value) pairs; (None, []) where it has no keys."""
    thing = holder.thing
    if holder.kind == "dict":
        return thing, list(thing.items())
    if holder.kind == "list":
        return thing, list(enumerate(thing)) if len(thing) <= _MOST_ITEMS else []
    if holder.kind == "slots":
        return _Attributes(thing), list(holder.content().items())
    if holder.kind == "cell":
        return _Attributes(thing), [("cell_contents", holder.content())]
    return None, []


def state_tensors(model: nn.Module, roots: Sequence[tuple[str, Any]]) -> list[list[StateTensor]]:
    """Return, for each tensor in Python state that is no parameter or buffer, all places that hold it."""
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    found: dict[int, list[StateTensor]] = {}
    for holder in holders_of(roots):
        container, items = _items(holder)
        for key, value in items:
            inner = enumerate(value) if type(value) is tuple else [(None, value)]
            for index, tensor in inner:
                if isinstance(tensor, Tensor) and id(tensor) not in own:
                    place = StateTensor(container, key, holder.named(key), index)
                    found.setdefault(id(tensor), []).append(place)
    return list(found.values())[:_MOST_TENSORS]


class Guards:
    """Places that must hold what they held.

    Attributes:
        tensors: for each state tensor that is an input of the graph, its places.
    """

    def __init__(self) -> None:
        self.tensors: list[list[StateTensor]] = []
        self._kinds: list[tuple[Any, ...]] = []
        # In columns, with a path last, so that the check at each forward runs at the speed of C.
        self._items: _Columns = [], [], [], []  # container, key, value
        self._absent: _Columns = [], [], []  # container, key
        self._contents: _Columns = [], [], []  # set or array, a copy of its content
        self._sizes: _Columns = [], [], []  # container, length
        self._writes: list[tuple[Any, Any, Any, Any]] = []
        self._known: dict[tuple[int, Any], Any] = {}
        self._opened: set[int] = set()

    def hold(self, container: Any, key: Any, path: str) -> None:
        """Guard an item of a container: plain values by value, containers by content, all else by identity.

        Tensors are left to ``hold_tensor``.
        """
        if (id(container), key) in self._known:
            return
        self._known[id(container), key] = container  # held, so that the identity stays its own
        value = container[key]
        if isinstance(value, (list, deque, dict)):
            self._hold_content(value, path)
        elif isinstance(value, functools.partial):
            self._hold_content(value.keywords, path)
        elif isinstance(value, set):
            _append(self._contents, value, value.copy(), path)
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes") and value.nbytes <= _MOST_BYTES:
            _append(self._contents, value, value.tobytes(), path)
        elif type(value) is tuple and not is_plain(value):
            if any(isinstance(inner, Tensor) for inner in value):
                return
            for index, inner in enumerate(value):
                if isinstance(inner, (list, deque, dict)):
                    self._hold_content(inner, f"{path}[{index}]")
        elif isinstance(value, Tensor):
            return
        _append(self._items, container, key, value, path)

    def _hold_content(self, value: Any, path: str) -> None:
        if id(value) in self._opened or len(value) > _MOST_ITEMS:
            return
        self._opened.add(id(value))
        _append(self._sizes, value, len(value), f"len({path})")
        for key in value if isinstance(value, dict) else range(len(value)):
            self.hold(value, key, f"{path}[{key!r}]")

    def hold_absent(self, container: Any, key: Any, path: str) -> None:
        """Guard that a container holds nothing under a key."""
        _append(self._absent, container, key, path)

    def hold_tensor(self, places: list[StateTensor]) -> None:
        """Guard the kind of a tensor that is an input of the graph, and that all its places hold it."""
        self.tensors.append(places)
        self._kinds.append(_kind(places[0].get()))

    def settle_by(self, writes: list[tuple[Any, Any, Any, Any]]) -> None:
        """Allow writes, (dict, key, before, after) each, that only a first forward makes."""
        self._writes = writes

    def holds(self) -> bool:
        """Whether all is unchanged, after making the writes that only a first forward makes."""
        if self._holds():
            return True
        due = [w for w in self._writes if same_value(w[0].get(w[1], MISSING), w[2])]
        if not due:
            return False
        for container, key, _, after in due:
            container[key] = after
        if self._holds():
            return True
        for container, key, before, _ in due:
            if before is MISSING:
                del container[key]
            else:
                container[key] = before
        return False

    def _holds(self) -> bool:
        containers, keys, values, _ = self._items
        try:
            if not all(map(is_, map(getitem, containers, keys), values)) and not all(
                map(same_value, map(getitem, containers, keys), values)
            ):
                return False
        except (KeyError, IndexError, ValueError):
            return False
        absent, sizes, contents = self._absent, self._sizes, self._contents
        if any(map(contains, absent[0], absent[1])) or [*map(len, sizes[0])] != sizes[1]:
            return False
        if contents[0] and not all(map(_has_content, contents[0], contents[1])):
            return False
        return not self.tensors or all(map(self._is_tensor, self.tensors, self._kinds))

    @staticmethod
    def _is_tensor(places: list[StateTensor], kind: tuple[Any, ...]) -> bool:
        tensor = places[0].get()
        return tensor is not MISSING and _kind(tensor) == kind and all(p.get() is tensor for p in places[1:])

    def changes(self) -> list[tuple[str, Any, Any]]:
        """Return (path, then, now) of each change, MISSING for no value."""
        found: list[tuple[str, Any, Any]] = []
        for container, key, then, path in zip(*self._items, strict=True):
            try:
                now = container[key]
            except (KeyError, IndexError, ValueError):
                now = MISSING
            if now is not then and not same_value(now, then):
                found.append((path, then, now))
        absent, sizes, contents = (
            zip(*each, strict=True) for each in (self._absent, self._sizes, self._contents)
        )
        found += [(path, MISSING, each[key]) for each, key, path in absent if key in each]
        found += [(path, size, len(value)) for value, size, path in sizes if len(value) != size]
        found += [(path, then, value) for value, then, path in contents if not _has_content(value, then)]
        for places, kind in zip(self.tensors, self._kinds, strict=True):
            if not self._is_tensor(places, kind):
                tensor = places[0].get()
                found.append((places[0].path, kind, tensor if tensor is MISSING else _kind(tensor)))
        return found


def _append(columns: _Columns, *row: Any) -> None:
    for column, value in zip(columns, row, strict=True):
        column.append(value)


def _has_content(value: Any, then: Any) -> bool:
    return bool(value == then) if isinstance(value, set) else value.tobytes() == then


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride()


class Reads:
    """Records which attributes of a model's modules, and of what hangs on them, its forward reads."""

    def __init__(self, model: nn.Module) -> None:
        self.roots, self._named = roots_of(model)
        self._holders = list(holders_of(self.roots))
        # By the identity of ``__dict__``, which an export's stand-in for a module shares.
        self._objects = {id(h.thing): h for h in self._holders if h.owner is not None and h.kind == "dict"}
        self._reads: dict[tuple[int, str], None] = {}
        self._classes: dict[type, Any] = {}
        self._unseen: set[type] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record attribute reads within the block."""
        kinds = {holder.owner for holder in self._holders if holder.owner is not None}
        modules = [k for k in kinds if issubclass(k, nn.Module) and "__getattribute__" in vars(k)]
        classes: list[type] = [nn.Module, *modules, *(k for k in kinds if not issubclass(k, nn.Module))]
        with reads_recorded(classes, self._objects, self._note) as unseen:
            self._unseen = unseen
            yield

    def _note(self, key: int, name: str) -> None:
        if name != "__dict__":
            self._reads[key, name] = None
        elif not sys._getframe(2).f_code.co_filename.startswith(_TORCH):  # vars(self): any of them
            self._reads.update(((key, each), None) for each in self._objects[key].thing)

    def guards(self, tensors: Sequence[list[StateTensor]] = ()) -> Guards:
        """Return guards of all that was read, as it is now.

        Args:
            tensors: the state tensors that are inputs of the graph.
        """
        found = Guards()
        for key, name in self._reads:
            if name not in _INTERNAL and not name.endswith("_hooks"):
                self._guard_attribute(found, self._objects[key], name)
        for holder in self._holders:
            self._guard_unseen(found, holder)
        for namespace, name, path in self._named.values:
            found.hold(namespace, name, path)
        for path, cell in self._named.cells:
            with suppress(ValueError):  # the variable has no value yet
                found.hold(_Attributes(cell), "cell_contents", path)
        for places in tensors:
            found.hold_tensor(places)
        return found

    def _guard_unseen(self, found: Guards, holder: Holder) -> None:
        """Guard what no recorder sees: slots, objects of classes written in C, classes, functions."""
        if holder.kind == "slots" or holder.owner in self._unseen:
            container, items = _items(holder)
            for name, _ in items:
                found.hold(container, name, holder.named(name))
        if holder.kind == "class":
            self._guard_class(found, holder)
        elif holder.owner is types.FunctionType:
            function = _Attributes(holder.about)
            for name in ("__defaults__", "__kwdefaults__"):
                found.hold(function, name, f"{holder.path}.{name}")
            for name in holder.thing:
                found.hold(holder.thing, name, holder.named(name))

    def _guard_class(self, found: Guards, holder: Holder) -> None:
        """Guard the values of a class that code names as attributes."""
        kind = holder.thing
        view = self._classes.setdefault(kind, vars(kind))
        for name, value in view.items():
            value_of_its_own = is_plain(value) or isinstance(value, (list, dict, set, deque, type))
            if name in self._named.names and not name.startswith("__") and value_of_its_own:
                found.hold(view, name, f"{holder.path}.{name}")

    def _guard_attribute(self, found: Guards, holder: Holder, name: str) -> None:
        container, path = holder.thing, holder.named(name)
        # ``eager.as_eager`` sets a forward while it is traced.
        ours = name == "forward" and getattr(container.get(name), "eager", False)
        if name in container and not ours:
            found.hold(container, name, path)
            return
        for kind in (holder.owner or object).__mro__:
            if name in vars(kind):
                value = vars(kind)[name]
                method = isinstance(value, (types.FunctionType, property, staticmethod, classmethod))
                if not method or name == "forward" or is_own_code(kind.__module__):
                    found.hold_absent(container, name, path)
                    # One view of a class, so that each of its attributes is guarded once.
                    view = self._classes.setdefault(kind, vars(kind))
                    found.hold(view, name, f"{kind.__name__}.{name}")
                return
