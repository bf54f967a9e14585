"""Where the Python state of a block lies, and what lies there at one time: ``StateLayout`` and ``Taken``."""

from __future__ import annotations

import dis
import functools
import random
import sys
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.python_state import MISSING, Holder, holders_of, is_plain, is_users_code

__all__ = ["SIMPLE", "UNREAD", "StateLayout", "Taken", "is_same", "same_content", "value_at", "without_graph"]

# Entries: of larger containers (a vocabulary) only the length is watched, unless blocks change them.
LARGE = 64
SIMPLE = (type(None), bool, int, float, str, Tensor, nn.Parameter, torch.dtype, torch.device)
_INSIDE = (*SIMPLE, nn.Module, dict, list, set, tuple, type, types.FunctionType)  # the rest is outside
_SKIPPED = frozenset(
    ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_rematplan", "_is_full_backward_hook",
     "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
)  # fmt: skip # one table
_CALLS = ("forward", "_compiled_call_impl")  # where calls of blocks are intercepted
UNREAD: Any = object()
Place = tuple[Any, Any]  # a dict and a key, a class and an attribute, a cell and None, a list and an index


class _Detached:
    """A tensor of a graph, without it: what holds it must not hold the graph."""

    __slots__ = ("flag", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.flag = tensor.detach(), tensor.requires_grad


def _detached(value: Any) -> Any:
    return value.tensor if isinstance(value, _Detached) else value


def _as_leaf(value: Any) -> Any:
    return value.tensor.detach().requires_grad_(value.flag) if isinstance(value, _Detached) else value


@dataclass(slots=True)
class Taken:
    """State as it was at one time.

    Attributes:
        layout: where it lies.
        values: of attributes, and lengths of what has them.
        tensors: of the places that hold tensors; UNREAD where nobody reads what was there.
        contents: of containers and arrays.
        generators: their states.
        copies: (tensor, values) of tensors that the block changes in place.
    """

    layout: StateLayout
    values: tuple[tuple[Any, ...], tuple[Any, ...], tuple[int, ...]]
    tensors: list[Any]
    contents: list[Any]
    generators: list[Any]
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def inside(self) -> Iterator[Any]:
        """Yield what lists and the values of dicts hold."""
        return (value for content in self.contents if isinstance(content, list) for value in content)

    def held(self) -> list[Tensor]:
        """Return the tensors that are held for a re-run."""
        found = [t for t in map(_detached, (*self.tensors, *self.inside())) if isinstance(t, Tensor)]
        return [*found, *(tensor for tensor, _ in self.copies)]

    def read(self) -> list[tuple[str, Tensor]]:
        """Return the tensors that a re-run reads and the block does not change, by name."""
        if not (self.tensors or self.contents):
            return []
        changed = {id(tensor) for tensor, _ in self.copies}
        named = zip(map(self.layout.name_of, self.layout.tensors), self.tensors, strict=True)
        inside = (
            (h.named(i) if h.kind == "list" else h.path, t)
            for h, content in zip(self.layout.containers, self.contents, strict=True)
            if isinstance(content, list)
            for i, t in enumerate(content)
        )
        pairs = ((name, _detached(value)) for each in (named, inside) for name, value in each)
        return [(n, t) for n, t in pairs if isinstance(t, Tensor) and id(t) not in changed]


class StateLayout:
    """The places where the state of a block lies, as they are found at one time.

    The values of attributes are read by one compiled expression, ``read``.

    Args:
        name, module: the block.
        sticky: places that hold a tensor at times.
        tracked: containers that are taken down however large they are.
        changed: names of tensors and containers that the block changes in place.
        everything: whether classes and globals of installed packages and large containers are taken down,
            too.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module | list[Any],
        sticky: Collection[tuple[int, Any]],
        tracked: set[int],
        changed: Collection[str],
        everything: bool,
    ) -> None:
        self.sticky, self.tracked, self.changed, self.everything = sticky, tracked, changed, everything
        self.names: dict[int, str] = {}  # of what holds values
        self.solid: list[Place] = []  # places of numbers, flags, text
        self.others: list[Place] = []
        self.tensors: list[Place] = []
        self.containers: list[Holder] = []
        self.large: list[Holder] = []
        self.generators: list[Holder] = []
        self.copied: list[Place] = []
        self.keyed: list[tuple[dict[Any, Any], frozenset[Any]]] = []  # dicts, and the keys known of each
        self.outside: list[tuple[str, Any]] = []  # other objects
        self._terms: tuple[list[str], list[str], list[str]] = [], [], []
        self._installed: tuple[str, ...] = ()  # classes of packages, whose values are what they are
        self._given: dict[str, Any] = {"get": dict.__getitem__}
        members = [*module.modules()] if isinstance(module, nn.Module) else []
        own = [values for each in members for values in (each._parameters, each._buffers)]
        self._own = set() if everything else set(map(id, own))
        self._plain_calls = {id(vars(each)) for each in members[1:]}  # whose forward is never intercepted
        # In these nothing comes and goes.
        self._raw = set() if everything else {id(each._parameters) for each in members}
        roots = [(name, module), *_hooks(members)]
        roots += [(path, each) for path, each in _host_generators() if everything or path in changed]
        for owner, used in {(id(g), used): (g, used) for g, used in _globals(members, everything)}.values():
            self._add(owner, used, owner[used])
            roots.append((used, owner[used]))
        for holder in holders_of(roots):
            self.names[id(holder.thing)] = holder.path
            self._open(holder)
        values, others, lengths = ("".join(term + ", " for term in each) for each in self._terms)
        self.read = eval(f"lambda: (({values}), ({others}), ({lengths}))", self._given)  # of names made here
        self.found = self.read()

    def _open(self, holder: Holder) -> None:  # noqa: C901 - one case per kind of holder
        """Note the places that a holder has."""
        thing, kind = holder.thing, holder.kind
        wanted = self.everything or id(thing) in self.tracked or holder.path in self.changed
        if holder.path.startswith(self._installed) and not wanted:
            return
        if kind == "generator":
            self.generators.append(holder)
        elif kind == "cell":
            content = holder.content()
            routine = isinstance(content, (type, types.FunctionType, types.MethodType, types.ModuleType))
            if content is not MISSING and (not routine or self.everything) and holder.path != "__class__":
                self._add(thing, None, content)
        elif kind == "class":
            if not self.everything and _is_installed(thing.__module__):
                self._installed += (f"{thing.__name__}.",)
            else:
                for key, value in vars(thing).items():
                    if _is_data(key, value):
                        self._add(thing, key, value)
                self._length(vars(thing))
        elif kind == "dict" and "_parameters" in thing and "_modules" in thing:
            self._open_module(holder)
        elif len(thing) > LARGE and not wanted:
            self.large.append(holder)
            if kind != "array":
                self._length(thing)
        elif kind == "dict":
            if id(thing) in self._own:  # the executor looks at the parameters and buffers of the block itself
                self.copied += [(thing, key) for key in thing if holder.named(key) in self.changed]
            if id(thing) not in self._raw:
                for key, value in thing.items() if id(thing) not in self._own else ():
                    self._add(thing, key, value)
                self._length(thing)
                self.keyed.append((thing, frozenset(thing)))
        else:
            self.containers.append(holder)
            if kind == "list":
                self.copied += [(thing, i) for i in range(len(thing)) if holder.named(i) in self.changed]
        if kind in ("dict", "list", "set") and len(thing) <= LARGE:
            self.tracked.add(id(thing))

    def _open_module(self, holder: Holder) -> None:
        attributes = holder.thing
        calls = () if id(attributes) in self._plain_calls else _CALLS
        for key, value in attributes.items():
            if key in _SKIPPED or key.endswith("_hooks"):
                if key not in ("_buffers", "_parameters"):
                    self._raw.add(id(value))
            elif key not in calls:
                self._add(attributes, key, value)
        self._length(attributes, calls)
        self.keyed.append((attributes, frozenset([*attributes, *calls])))

    def _add(self, thing: Any, key: Any, value: Any) -> None:
        """Note one place and the value that it has now."""
        if isinstance(value, Tensor) or (id(thing), key) in self.sticky:
            self.tensors.append((thing, key))
            if isinstance(value, Tensor) and self.name_of((thing, key)) in self.changed:
                self.copied.append((thing, key))
            return
        solid = is_plain(value)
        if not solid and not isinstance(value, _INSIDE):
            self.outside.append((self.name_of((thing, key)), value))
        (self.solid if solid else self.others).append((thing, key))
        if isinstance(thing, types.CellType):
            term = f"{self._variable(thing)}.cell_contents"
        elif isinstance(thing, type):
            term = f"{self._variable(vars(thing), thing)}[{key!r}]"
        else:
            values = self._variable(thing)
            name = repr(key) if type(key) is str else self._variable(key)
            plain = type(thing).__getitem__ is dict.__getitem__
            term = f"{values}[{name}]" if plain else f"get({values}, {name})"
        self._terms[not solid].append(term)

    def _length(self, values: Any, calls: Sequence[str] = ()) -> None:
        """Watch how many keys there are, intercepted calls left out."""
        name = self._variable(values, values)
        self._terms[2].append(f"len({name})" + "".join(f"-({call!r} in {name})" for call in calls))

    def _variable(self, value: Any, of: Any = None) -> str:
        """Return the name of a value in the compiled expression."""
        name = f"x{id(value if of is None else of)}"
        self._given[name] = value
        return name

    def name_of(self, place: Place) -> str:
        """Return a place as a user would write it."""
        thing, key = place
        path = self.names.get(id(thing), "")
        if isinstance(thing, types.CellType):
            return path
        return Holder(path, thing, "list" if isinstance(thing, list) else "dict").named(key)

    def now(self) -> Taken:
        """Return what the places hold, nothing cut off."""
        try:
            values = self.read()
        except (KeyError, ValueError):  # an attribute is gone
            values = tuple(map(value_at, self.solid)), tuple(map(value_at, self.others)), ()
        tensors = [value_at(place) for place in self.tensors]
        contents = [each.content() for each in self.containers]
        return Taken(self, values, tensors, contents, [each.content() for each in self.generators])

    def put(self, then: Taken, now: Taken) -> list[tuple[Any, Any, Any]]:
        """Put what was held at one time in the place of what is held now.

        Returns:
            (dict, key, value) of what was added to dicts since and is taken out.
        """
        places = (*self.solid, *self.others, *self.tensors)
        before, current = ((*each.values[0], *each.values[1], *each.tensors) for each in (then, now))
        for place, value, there in zip(places, before, current, strict=True):
            if value is not there and value is not UNREAD:
                _set(place, _as_leaf(value))
        removed = []
        if then.values[2] != now.values[2]:
            for thing, keys in self.keyed:  # calls of blocks are intercepted meanwhile
                removed += [(thing, key, thing.pop(key)) for key in [*thing] if key not in keys]
        for holder, content, there in zip(self.containers, then.contents, now.contents, strict=True):
            if not same_content(content, there):
                holder.put_back([*map(_as_leaf, content)] if isinstance(content, list) else content)
        for holder, state in zip(self.generators, then.generators, strict=True):
            holder.put_back(state)
        return removed


def is_same(a: Any, b: Any) -> bool:
    """Whether ``a`` is ``b``, or nobody reads it."""
    return a is b or a is UNREAD


def same_content(a: Any, b: Any) -> bool:
    """Whether two contents are one."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_, a, b))
    if isinstance(a, set):
        return bool(a == b)
    return bool(a.tobytes() == b.tobytes())


def without_graph(value: Any) -> Any:
    """Return a tensor of a graph as one that does not hold the graph; anything else as it is."""
    return _Detached(value) if isinstance(value, Tensor) and value.grad_fn is not None else value


def value_at(place: Place) -> Any:
    """Return what lies at a place; MISSING if nothing does."""
    thing, key = place
    if isinstance(thing, types.CellType):
        return Holder("", thing, "cell").content()
    if isinstance(thing, type):
        return vars(thing).get(key, MISSING)
    if isinstance(thing, dict):
        return thing.get(key, MISSING)
    return thing[key] if key < len(thing) else MISSING


def _set(place: Place, value: Any) -> None:
    thing, key = place
    if isinstance(thing, types.CellType):
        if value is not MISSING:
            thing.cell_contents = value
    elif isinstance(thing, type):
        if value is MISSING:
            delattr(thing, key)
        else:
            setattr(thing, key, value)
    elif value is MISSING:
        thing.pop(key, None)
    else:
        thing[key] = value


def _is_data(key: str, value: Any) -> bool:
    """Whether a class attribute is data: no method, property, or part of the class itself."""
    if key.startswith("__") or key in ("_abc_impl", "dump_patches", "call_super_init"):
        return False
    return not hasattr(value, "__get__") and not isinstance(value, type)


def _host_generators() -> list[tuple[str, Any]]:
    """Return Python's own generator and NumPy's, which a block may draw from."""
    found: list[tuple[str, Any]] = [("the generator of random", random._inst)]
    numpy = sys.modules.get("numpy")
    return found if numpy is None else [*found, ("the generator of numpy.random", numpy.random.mtrand._rand)]


def _hooks(modules: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    inner = [each for m in modules for each in (m._forward_hooks, m._forward_pre_hooks)]
    return [("a hook", hook) for hooks in inner for hook in hooks.values()]


def _globals(modules: Sequence[nn.Module], everything: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Return the globals that hold plain values, containers or objects and that the code of a block names."""
    waiting: list[Any] = [
        value
        for kind in {type(inner) for inner in modules}
        for base in kind.__mro__
        if is_users_code(base.__module__) and base.__module__ != "builtins"
        for value in vars(base).values()
    ]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        function = getattr(value, "__func__", getattr(value, "fget", value))
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        owner = function.__module__
        if not is_users_code(owner) or (_is_installed(owner) and not everything):
            continue
        for used in _names(function.__code__):
            there = function.__globals__.get(used, MISSING)
            if isinstance(there, types.FunctionType):
                waiting.append(there)
            elif there is not MISSING and not isinstance(there, (type, types.ModuleType)):
                yield function.__globals__, used


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether a module is of an installed package, whose classes and globals do not change during a step."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Return the globals that code names, and functions within it."""
    found = {
        each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "STORE_GLOBAL")
    }
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(found).union(*inner)
