"""Snapshot and restore the Python state of a model: everything on its modules but the values of tensors.

A forward may rebind attributes, append to lists, count in config objects, replace buffers, draw from
generators of its own. ``Snapshot`` walks all that is reachable from some roots (modules, their attributes,
containers, plain objects, closures of functions, class attributes of user code), says what has changed since,
and puts it back: objects by identity, containers by content. Values of tensors are not copied
(``state.preserved`` does that for those that change).
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import types
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.private import replaced

__all__ = [
    "MISSING",
    "Holder",
    "Snapshot",
    "holders_of",
    "is_own_code",
    "is_plain",
    "is_users_code",
    "reads_recorded",
    "same_value",
    "slots_of",
]

MISSING: Any = object()  # in the place of what is not there
# Of the standard library, and yet what a configuration is often made of.
NAMESPACES = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList)
_ITERATORS: tuple[type, ...] = (
    type(iter([])),
    type(iter(())),
    type(iter(range(0))),
    type(iter(range(2**70))),
    type(iter("")),
)
MOST = 200_000  # holders that are walked: beyond, something like a data set hangs on the model
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis),
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip # one table
# Objects of these packages are their own business: engines, loggers, progress bars, locks; not those that are
# modules.
FOREIGN = frozenset(
    {
        "_io", "_thread", "builtins", "accelerate", "asyncio", "concurrent", "ctypes", "importlib", "io", "lightning",
        "logging", "multiprocessing", "numpy", "pathlib", "pytorch_lightning", "queue", "re", "rematplan", "rich", "socket",
        "subprocess", "tensorboard", "threading", "torch", "tqdm", "typing", "wandb", "weakref",
    }
)  # fmt: skip # one table

_OF_MODULES = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip # one table
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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

    def __init__(
        self, path: str, thing: Any, kind: str, owner: type | None = None, about: Any = None
    ) -> None:
        self.path, self.thing, self.kind, self.owner, self.about = path, thing, kind, owner, about

    def content(self) -> Any:
        """Return a shallow copy of what it holds now."""
        thing = self.thing
        if self.kind in ("dict", "class"):
            return dict(thing.__dict__ if self.kind == "class" else thing)
        if self.kind == "slots":
            return {name: getattr(thing, name) for name in slots_of(type(thing)) if hasattr(thing, name)}
        if self.kind == "list":
            return list(thing)
        if self.kind == "set":
            return set(thing)
        if self.kind == "cell":
            return _cell(thing)
        if self.kind == "array":
            return thing.copy()
        if self.kind == "iterator":
            return thing.__reduce__()
        return _generator_state(thing)

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
        if self.kind == "set":
            return [MISSING] if now != before else []
        if self.kind == "cell":
            return [] if _one(now, before) else [MISSING]
        if self.kind == "iterator":
            return [] if now[2:] == before[2:] and len(now) == len(before) else [MISSING]
        return [] if _equal_states(now, before) else [MISSING]

    def put_back(self, before: Any) -> None:  # noqa: C901 - one case per kind of holder
        """Restore the content ``before``."""
        thing = self.thing
        if self.kind == "dict":
            if list(thing) != list(before):  # an order is part of a dict
                thing.clear()
            thing.update(before)
        elif self.kind == "class":
            for key in self.changed(before):
                if key in before:
                    setattr(thing, key, before[key])
                else:
                    delattr(thing, key)
        elif self.kind == "slots":
            for key in self.changed(before):
                if key in before:
                    object.__setattr__(thing, key, before[key])  # it may be frozen
                else:
                    object.__delattr__(thing, key)
        elif self.kind == "list":
            thing.clear()
            thing.extend(before)
        elif self.kind == "set":
            thing.clear()
            thing.update(before)
        elif self.kind == "cell":
            if before is MISSING:
                del thing.cell_contents
            else:
                thing.cell_contents = before
        elif self.kind == "array":
            thing[...] = before
        elif self.kind == "iterator":
            if len(before) > 2:  # one that has come to its end has forgotten what it went through
                thing.__setstate__(before[2])
        else:
            _set_generator_state(thing, before)

    def named(self, key: Any) -> str:
        """Return the path of a key, as a user would write it."""
        if key is MISSING or self.kind in ("cell", "set", "array", "generator", "iterator"):
            return self.path
        attribute = isinstance(key, str) and self.kind != "list" and not self.path.endswith("]")
        if attribute:
            return f"{self.path}.{key}" if self.path else key
        return f"{self.path}[{key!r}]"


@contextmanager
def reads_recorded(
    kinds: Iterable[type], recorder: Callable[[Callable[[Any, str], Any]], Callable[[Any, str], Any]]
) -> Iterator[set[type]]:
    """Replace ``__getattribute__`` of some classes by ``recorder`` of their own, within the block.

    Yields:
        the classes written in C, of which reads cannot be seen.
    """
    unseen: set[type] = set()
    kind: Any
    with ExitStack() as stack:
        for kind in dict.fromkeys(kinds):
            try:
                stack.enter_context(replaced(kind, __getattribute__=recorder(kind.__getattribute__)))
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
        """Return (dict, key, before, after) of each change, MISSING for nothing; None if one is not plain."""
        found = []
        for holder, before in self.before:
            for key in holder.changed(before):
                after = holder.thing.get(key, MISSING) if holder.kind == "dict" else MISSING
                if not is_plain(after):
                    return None
                found.append((holder.thing, key, before.get(key, MISSING), after))
        return found

    def restore(self) -> None:
        """Restore everything; what has not changed is not touched."""
        for holder, before in self.before:
            if holder.changed(before):
                holder.put_back(before)


def holders_of(roots: Iterable[tuple[str, Any]]) -> Iterator[Holder]:
    """Yield all holders reachable from the roots, each once, breadth first."""
    waiting: deque[tuple[str, Any]] = deque(roots)
    seen: set[int] = set()
    alive: list[Any] = []  # or the identity of a temporary would be given to another object
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
        own, attributes = Holder(path, vars(value), "dict", type(value)), vars(value)
        start = f"{path}." if path else ""
        inner: list[tuple[str, Any]] = [(start + n, c) for n, c in value._modules.items()]
        # Dicts of parameters, buffers, children and hooks are places too, of which nothing further is walked.
        inner += [(path, _Raw(attributes[name])) for name in _OF_MODULES if name in attributes]
        for name in _HOOKS:  # what hooks are bound to, and close over
            inner += [
                (f"a hook of {path or 'the model'}", hook) for hook in attributes.get(name, {}).values()
            ]
        inner += [
            (start + k, v) for k, v in attributes.items() if k not in _SKIPPED and not k.endswith("_hooks")
        ]
        return own, [*inner, *_classes(type(value))]
    if isinstance(value, _Raw):
        return Holder(path, value.thing, "dict"), ()
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
        content = _cell(value)
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
    if _is_generator(value):
        return Holder(path, value, "generator"), ()
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray" and value.dtype != object:
        return Holder(path, value, "array"), ()
    if isinstance(value, type):
        return (
            (Holder(value.__name__, value, "class"), _class_values(value))
            if is_own_code(value.__module__)
            else (None, ())
        )
    kind = type(value)
    if kind in weakref.ProxyTypes:
        target = getattr(getattr(value, "__repr__", None), "__self__", None)
        return None, [] if target is None else [(path, target)]
    if isinstance(value, torch.optim.Optimizer):  # a forward may go by its learning rate
        return Holder(path, vars(value), "dict", kind), [(f"{path}.param_groups", value.param_groups)]
    if isinstance(value, types.ModuleType) or not (is_users_code(kind.__module__) or kind in NAMESPACES):
        return None, ()
    members = getattr(value, "__dict__", None)
    inside: list[tuple[str, Any]] = list(_classes(type(value)))
    if not isinstance(members, dict):
        slots = [name for name in slots_of(type(value)) if hasattr(value, name)]
        inside += [(f"{path}.{name}", getattr(value, name)) for name in slots]
        return (Holder(path, value, "slots", type(value)) if slots else None), inside
    inside += [(f"{path}.{k}", v) for k, v in members.items()]
    return Holder(path, members, "dict", type(value)), inside


class _Raw:
    """A dict whose values are not walked."""

    def __init__(self, thing: dict[Any, Any]) -> None:
        self.thing = thing


def _classes(kind: type) -> Iterator[tuple[str, Any]]:
    """Return the classes of user code that an object gets attributes and methods from."""
    return ((c.__name__, c) for c in kind.__mro__ if is_own_code(c.__module__))


def _class_values(kind: type) -> list[tuple[str, Any]]:
    return [
        (f"{kind.__name__}.{k}", v)
        for k, v in vars(kind).items()
        if not k.startswith("__") and isinstance(v, (dict, list, deque, set, type, types.FunctionType))
    ]


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _one(a: Any, b: Any) -> bool:
    return a is b or (is_plain(a) and same_value(a, b))


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if hasattr(value, "bit_generator") else value.get_state()


def _set_generator_state(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, random.Random):
        value.setstate(state)
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = state
    else:
        value.set_state(state)


def _equal_states(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(
            a.numpy().tobytes() == b.numpy().tobytes()
        )  # no op, which a mode would take for one of the model's
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal_states(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal_states, a, b))
    if hasattr(a, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    return bool(a == b)
