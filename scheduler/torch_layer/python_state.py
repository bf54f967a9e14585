"""Snapshot and restore the Python state of a model: everything on its modules but the values of tensors.

A forward may rebind attributes, append to lists, count in config objects, replace buffers, draw from
generators of its own. ``Snapshot`` walks all that is reachable from its roots (modules, their attributes,
containers, plain objects, closures, class attributes of user code), reports what has changed since, and
restores it: objects by identity, containers by content. ``preserve.preserved`` restores values of tensors.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import types
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.private import replaced

__all__ = [
    "HOOKS",
    "MISSING",
    "Holder",
    "Snapshot",
    "cell_content",
    "holders_of",
    "is_own_code",
    "is_plain",
    "is_users_code",
    "reads_recorded",
    "same_value",
    "slots_of",
]

MISSING: Any = object()  # stands for no value
# Classes of the standard library that configurations are made of.
NAMESPACES = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList)
_SEQUENCES: tuple[Any, ...] = ([], (), range(0), range(2**70), "")
_ITERATORS = tuple(type(iter(each)) for each in _SEQUENCES)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
MOST = 200_000  # objects that are walked: beyond, something like a data set hangs on the model
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis),
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip # one table
# Objects of these packages (engines, loggers, progress bars, locks) are not walked, except nn.Modules.
FOREIGN = frozenset(
    {
        "_io", "_thread", "builtins", "accelerate", "asyncio", "concurrent", "ctypes", "importlib", "io", "lightning",
        "logging", "multiprocessing", "numpy", "pathlib", "pytorch_lightning", "queue", "re", "rematplan", "rich", "socket",
        "subprocess", "tensorboard", "threading", "torch", "tqdm", "typing", "wandb", "weakref",
    }
)  # fmt: skip # one table

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_MODULES = ("_parameters", "_buffers", "_modules", *HOOKS)
_SKIPPED = frozenset(
    (*_OF_MODULES, "_rematplan", "_non_persistent_buffers_set", "_forward_hooks_with_kwargs",
     "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks")
)  # fmt: skip # one table


def is_plain(value: Any) -> bool:
    """Whether a value is immutable data: numbers, text, dtypes, devices, enum members, tuples of these."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN) or type(type(value)).__name__ == "EnumType"


def same_value(a: Any, b: Any) -> bool:
    """Whether two plain values are one to code: True is not 1, 0.0 is not -0.0, NaN is NaN."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, (float, complex)):
        return repr(a) == repr(b)
    return is_plain(a) and bool(a == b)


def is_users_code(module: str | None) -> bool:
    """Whether a module may be a user's: not of the standard library, torch or a foreign package."""
    root = (module or "").partition(".")[0]
    return root not in FOREIGN and (root == "__main__" or root not in sys.stdlib_module_names)


@functools.cache
def is_own_code(module: str | None) -> bool:
    """Whether code of a module is the user's own: not of an installed package either."""
    if not is_users_code(module):
        return False
    package = sys.modules.get((module or "").partition(".")[0])
    files = [getattr(package, "__file__", None) or "", *map(str, getattr(package, "__path__", ()))]
    return not any("site-packages" in file or "dist-packages" in file for file in files)


def slots_of(kind: type) -> list[str]:
    """Return the names of the ``__slots__`` of a class and its bases."""
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return [name for names in found for name in ((names,) if isinstance(names, str) else names)]


class Holder:
    """A place that holds values under keys: an object's attributes, a container, a cell, a generator.

    Attributes:
        path: how it is reached, for messages.
        thing: the dict, list, deque, set, class, cell, array or generator.
        kind: "dict", "slots", "class", "list", "set", "cell", "array", "iterator" or "generator".
        owner: the class of the object whose attributes these are; None of a container.
        about: that object, if it is a function.
    """

    __slots__ = ("about", "kind", "owner", "path", "thing")

    def __init__(self, path: str, thing: Any, kind: str, owner: type | None = None, about: Any = None):
        self.path, self.thing, self.kind, self.owner, self.about = path, thing, kind, owner, about

    def content(self) -> Any:
        """Return a shallow copy of what it holds now."""
        return _CONTENTS[self.kind](self.thing)

    def changed(self, before: Any) -> list[Any]:
        """Return the keys whose values differ from ``before``; [MISSING] for a change of what has no keys."""
        now = self.content()
        if self.kind in ("dict", "slots", "class"):
            keys = [k for k, v in before.items() if not _one(now.get(k, MISSING), v)]
            return keys + [k for k in now if k not in before]
        if self.kind == "list":
            if len(now) != len(before):
                return [MISSING]
            return [i for i, (a, b) in enumerate(zip(now, before, strict=True)) if not _one(a, b)]
        if self.kind == "cell":
            same = _one(now, before)
        elif self.kind == "iterator":
            same = now[2:] == before[2:] and len(now) == len(before)
        else:
            same = _equal_states(now, before)
        return [] if same else [MISSING]

    def put_back(self, before: Any) -> None:  # noqa: C901 - one case per kind of holder
        """Restore the content ``before``."""
        thing = self.thing
        if self.kind == "dict":
            if list(thing) != list(before):  # an order is part of a dict
                thing.clear()
            thing.update(before)
        elif self.kind in ("class", "slots"):
            put, drop = setattr, delattr
            if self.kind == "slots":  # of an object that may be frozen
                put, drop = object.__setattr__, object.__delattr__
            for key in self.changed(before):
                if key in before:
                    put(thing, key, before[key])
                else:
                    drop(thing, key)
        elif self.kind in ("list", "set"):
            thing.clear()
            (thing.extend if self.kind == "list" else thing.update)(before)
        elif self.kind == "cell":
            if before is MISSING:
                del thing.cell_contents
            else:
                thing.cell_contents = before
        elif self.kind == "array":
            thing[...] = before
        elif self.kind == "iterator":
            if len(before) > 2:  # an exhausted one no longer knows its sequence
                thing.__setstate__(before[2])
        else:
            _generator(thing)[1](before)

    def named(self, key: Any) -> str:
        """Return the path of a key, as a user would write it."""
        if key is MISSING or self.kind in ("cell", "set", "array", "generator", "iterator"):
            return self.path
        if isinstance(key, str) and self.kind != "list" and not self.path.endswith("]"):
            return f"{self.path}.{key}" if self.path else key
        return f"{self.path}[{key!r}]"


@contextmanager
def reads_recorded(
    kinds: Iterable[type], objects: Container[int], note: Callable[[int, str], None]
) -> Iterator[set[type]]:
    """Replace ``__getattribute__`` of classes within the block, so that reads of attributes are noted.

    Args:
        kinds: the classes.
        objects: identities of the ``__dict__`` of the objects whose reads matter.
        note: called with that identity and the attribute's name.

    Yields:
        the classes written in C, whose reads cannot be seen.
    """
    unseen: set[type] = set()
    kind: Any

    def noting(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807 # it replaces that method
            try:
                key = id(object.__getattribute__(self, "__dict__"))
            except AttributeError:
                return original(self, name)
            if key in objects:
                note(key, name)
            return original(self, name)

        return __getattribute__

    with ExitStack() as stack:
        for kind in dict.fromkeys(kinds):
            try:
                stack.enter_context(replaced(kind, __getattribute__=noting(kind.__getattribute__)))
            except TypeError:
                unseen.add(kind)
        yield unseen


class Snapshot:
    """Python state as it is now.

    Args:
        roots: modules, functions, or other objects, by the name that messages call each.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]]) -> None:
        self.before = [(holder, holder.content()) for holder in holders_of(roots)]

    def changes(self) -> list[str]:
        """Return the paths of what has changed; equal plain values are no change."""
        return [holder.named(key) for holder, before in self.before for key in holder.changed(before)]

    def plain_writes(self) -> list[tuple[Any, Any, Any, Any]] | None:
        """Return (dict, key, before, after) of each change, MISSING for none; None if one is not plain."""
        found = []
        for holder, before in self.before:
            for key in holder.changed(before):
                after = holder.thing.get(key, MISSING) if holder.kind == "dict" else MISSING
                if not is_plain(after):
                    return None
                found.append((holder.thing, key, before.get(key, MISSING), after))
        return found

    def restore(self) -> None:
        """Restore what has changed."""
        for holder, before in self.before:
            if holder.changed(before):
                holder.put_back(before)


def holders_of(roots: Iterable[tuple[str, Any]]) -> Iterator[Holder]:
    """Yield all holders reachable from the roots, each once, breadth first."""
    waiting: deque[tuple[str, Any]] = deque(roots)
    seen: set[int] = set()
    alive: list[Any] = []  # otherwise another object may get the identity of a temporary
    while waiting and len(seen) < MOST:
        path, value = waiting.popleft()
        if isinstance(value, (Tensor, types.BuiltinFunctionType)) or id(value) in seen or is_plain(value):
            continue
        seen.add(id(value))
        alive.append(value)
        holder, inside = _opened(path, value)
        if holder is not None:
            yield holder
        waiting.extend(inside)


def _opened(path: str, value: Any) -> tuple[Holder | None, Iterable[tuple[str, Any]]]:  # noqa: C901 - one case per kind of object
    """Return the holder that a value is, if it is one, and what is reachable from it."""
    if isinstance(value, nn.Module):
        start, own = f"{path}." if path else "", vars(value)
        inner: list[tuple[str, Any]] = [(start + n, c) for n, c in value._modules.items()]
        # Dicts of parameters, buffers, children and hooks are holders, too; their values are not walked.
        inner += [(path, Holder(path, own[name], "dict")) for name in _OF_MODULES if name in own]
        # Hooks are walked for the objects that they are bound to and close over.
        inner += [
            (f"a hook of {path or 'the model'}", f) for name in HOOKS for f in own.get(name, {}).values()
        ]
        inner += [(start + k, v) for k, v in own.items() if k not in _SKIPPED and not k.endswith("_hooks")]
        return Holder(path, own, "dict", type(value)), [*inner, *_classes(type(value))]
    if isinstance(value, Holder):
        return value, ()
    if isinstance(value, dict):
        return Holder(path, value, "dict"), [(f"{path}[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, (list, deque)):
        return Holder(path, value, "list"), [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    if isinstance(value, set):
        return Holder(path, value, "set"), ()
    if isinstance(value, (tuple, frozenset)):
        return None, [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    if type(value) in _ITERATORS:
        return Holder(path, value, "iterator"), ()
    if isinstance(value, types.CellType):
        content = cell_content(value)
        return Holder(path, value, "cell"), () if content is MISSING else [(path, content)]
    if isinstance(value, types.FunctionType):
        if not is_own_code(value.__module__):
            return None, ()
        inner = list(zip(value.__code__.co_freevars, value.__closure__ or (), strict=False))
        inner += [(f"{path}.{k}", v) for k, v in vars(value).items()]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        inner += [(f"{path}.__defaults__", v) for v in defaults]
        return Holder(path, vars(value), "dict", types.FunctionType, value), inner
    if isinstance(value, types.MethodType):
        return None, [(path, value.__self__), (path, value.__func__)]
    if isinstance(value, functools.partial):
        return None, [(path, value.func), (path, value.args), (path, value.keywords)]
    if isinstance(value, _GENERATORS):
        return Holder(path, value, "generator"), ()
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray" and value.dtype != object:
        return Holder(path, value, "array"), ()
    if isinstance(value, type):
        if not is_own_code(value.__module__):
            return None, ()
        walked = (dict, list, deque, set, type, types.FunctionType)
        found = {k: v for k, v in vars(value).items() if not k.startswith("__") and isinstance(v, walked)}
        name = value.__name__
        return Holder(name, value, "class"), [(f"{name}.{k}", v) for k, v in found.items()]
    kind = type(value)
    if kind in weakref.ProxyTypes:
        referent = getattr(getattr(value, "__repr__", None), "__self__", None)
        return None, [] if referent is None else [(path, referent)]
    if isinstance(value, torch.optim.Optimizer):  # a forward may read its learning rate
        return Holder(path, vars(value), "dict", kind), [(f"{path}.param_groups", value.param_groups)]
    if isinstance(value, types.ModuleType) or not (is_users_code(kind.__module__) or kind in NAMESPACES):
        return None, ()
    members = getattr(value, "__dict__", None)
    if isinstance(members, dict):
        holder = Holder(path, members, "dict", kind)
    else:
        holder = Holder(path, value, "slots", kind)
        members = holder.content()
    inside = [*_classes(kind), *((f"{path}.{k}", v) for k, v in members.items())]
    return holder if members or holder.kind == "dict" else None, inside


def _classes(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the classes of user code among the bases of a class, itself included."""
    return ((c.__name__, c) for c in kind.__mro__ if is_own_code(c.__module__))


def cell_content(cell: types.CellType) -> Any:
    """Return the value of a closure's variable; MISSING if it has none yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


_CONTENTS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "slots": lambda thing: {n: getattr(thing, n) for n in slots_of(type(thing)) if hasattr(thing, n)},
    "class": lambda thing: dict(vars(thing)),
    "list": list,
    "set": set,
    "cell": cell_content,
    "array": lambda thing: thing.copy(),
    "iterator": lambda thing: thing.__reduce__(),
    "generator": lambda thing: _generator(thing)[0](),
}


def _one(a: Any, b: Any) -> bool:
    return a is b or (is_plain(a) and same_value(a, b))


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return the functions that read and set the state of a random generator."""
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, functools.partial(setattr, bits, "state")
    return value.get_state, value.set_state


def _equal_states(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        # Not by an op, which a mode would take for one of the model's.
        return bool(a.numpy().tobytes() == b.numpy().tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal_states(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal_states, a, b))
    if hasattr(a, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    return bool(a == b)
