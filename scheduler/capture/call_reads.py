"""Record which plain values of a call a forward reads: one that it does not read needs no plan of its own.

An argument counts as read if the code of ``forward`` loads its name; of a dict among the arguments only the
entries that are looked up, of an object with tensors in it only the attributes. Whatever lies deeper is read
with these.
"""

from __future__ import annotations

import dis
import inspect
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.leaves import tree_leaves
from rematplan.scheduler.torch_layer.python_state import reads_recorded

__all__ = ["CallReads"]

_ALL = frozenset({"locals", "vars", "eval", "exec", "inspect"})  # names by which code may reach any argument


class CallReads:
    """Record what a forward reads of a call.

    Args:
        model: whose forward is to be called.
        call: canonical.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self._loaded, positional = _loaded_names(type(model).forward)  # None: unknown
        self._read: set[int] = set()
        # By the identity of an object's attributes: name -> leaves.
        self._objects: dict[int, dict[str, range]] = {}
        self._kinds: list[type] = []
        args, kwargs = call
        unnamed = itertools.repeat(None, max(0, len(args) - len(positional)))
        self._names = [*positional[: len(args)], *unnamed, *kwargs]
        self._plain = {i for i, leaf in enumerate(tree_leaves(call)) if not isinstance(leaf, Tensor)}

    def watched(self, call: Call) -> Call:
        """Return the call with dicts and objects in it that note what is looked up in them."""
        if not self._plain:
            return call
        args, kwargs = call
        at = 0
        values = []
        for name, value in zip(self._names, (*args, *kwargs.values()), strict=True):
            count = len(tree_leaves(value))
            values.append(self._watch(name, value, range(at, at + count)))
            at += count
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

    def _watch(self, name: str | None, value: Any, leaves: range) -> Any:
        if self._loaded is not None and name is not None and name not in self._loaded:
            return value  # nobody loads it
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return _NotedDict(value, _places(value, leaves.start), self._read)
        if type(value) is SimpleNamespace:  # reads of a class written in C cannot be seen
            value = _Namespace(**vars(value))
        members = getattr(value, "__dict__", None)
        other = not isinstance(value, (Tensor, nn.Module, dict, list, tuple))
        if isinstance(members, dict) and len(leaves) > 1 and other:
            found = _places(members, leaves.start)
            whole = sum(map(len, found.values())) == len(leaves)
            if whole and isinstance(value, UserDict) and isinstance(value.data, dict):
                return self._watch_user_dict(value, found)
            if whole:
                self._objects[id(members)] = found
                self._kinds.append(type(value))
                return value
        self._read.update(leaves)
        return value

    def _watch_user_dict(self, value: Any, found: dict[str, range]) -> Any:
        """A batch of a tokenizer, say: its entries are in the dict that it is built on."""
        places = _places(value.data, found.pop("data").start)
        twin = object.__new__(type(value))
        twin.__dict__.update(vars(value), data=_NotedDict(value.data, places, self._read))
        self._objects[id(vars(twin))] = found
        self._kinds.append(type(value))
        return twin

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is read of objects within the block; after ``watched``."""
        with reads_recorded(self._kinds, self._objects, self._note) as unseen:
            if unseen:
                for places in self._objects.values():
                    self._read.update(*places.values())
            yield

    def _note(self, key: int, name: str) -> None:
        places = self._objects[key]
        for each in places.values() if name == "__dict__" else [places.get(name, ())]:
            self._read.update(each)

    def unread(self) -> frozenset[int]:
        """Return the leaves, other than tensors, that were not read."""
        return frozenset(self._plain - self._read)


def _places(values: Mapping[str, Any], start: int) -> dict[str, range]:
    """Return which leaves, from a number on, are those of each of some values."""
    places = {}
    for key, value in values.items():
        places[key] = range(start, start + len(tree_leaves(value)))
        start = places[key].stop
    return places


class _Namespace(SimpleNamespace):
    """A namespace of a class written in Python."""


def _noting(method: Callable[..., Any]) -> Any:
    def noting(self: _NotedDict, key: Any, *default: Any) -> Any:
        self.noted.update(self.places.get(key, ()))
        return method(self, key, *default)

    return noting


def _noting_all(method: Callable[..., Any]) -> Any:
    def noting(self: _NotedDict) -> Any:
        self.noted.update(*self.places.values())
        return method(self)

    return noting


class _NotedDict(dict[str, Any]):
    """A dict that notes which of its entries are looked up."""

    def __init__(self, values: dict[str, Any], places: dict[str, range], read: set[int]) -> None:
        super().__init__(values)
        self.places, self.noted = places, read

    __getitem__, get, pop = _noting(dict.__getitem__), _noting(dict.get), _noting(dict.pop)
    # Keys are part of the call's structure; whoever goes through them may look up any.
    __iter__, keys, values = _noting_all(dict.__iter__), _noting_all(dict.keys), _noting_all(dict.values)
    items, copy = _noting_all(dict.items), _noting_all(dict.copy)


def _loaded_names(function: Any) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    """Return the locals that a function's code loads (None if unknown); its positional parameters."""
    code = getattr(function, "__code__", None)
    if code is None or hasattr(function, "__wrapped__"):
        return None, ()
    loaded: set[str] = set()
    for instruction in dis.get_instructions(code):
        # From 3.13 on one instruction may store a name and load another: STORE_FAST_LOAD_FAST.
        if any(
            each in instruction.opname
            for each in ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF")
        ):
            argument = instruction.argval
            loaded.update(argument if isinstance(argument, tuple) else (argument,))
        elif instruction.argval in _ALL:
            return None, ()
    first = code.co_argcount + code.co_kwonlyargcount  # of *args and **kwargs, if there are these
    star = code.co_flags & inspect.CO_VARARGS and code.co_varnames[first] in loaded
    if star or code.co_flags & inspect.CO_VARKEYWORDS:
        return None, ()  # what is passed on may be read anywhere
    return frozenset(loaded), code.co_varnames[1 : code.co_argcount]
