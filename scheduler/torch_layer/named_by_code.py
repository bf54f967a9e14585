"""Find the globals, closures and objects that a model's code can reach by name, without running it.

Functions are followed by the names in their byte code: globals that they load, attributes of Python modules,
methods of the classes of known objects, closures, defaults, what they import. Functions and Python modules
that lie in containers, or in attributes of the user's objects, count as reached.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import nn

from rematplan.scheduler.torch_layer.python_state import (
    MISSING,
    cell_content,
    is_own_code,
    is_plain,
    slots_of,
)

__all__ = ["Named", "named_by"]

LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
MOST_ITEMS = 10_000  # of a container that is searched for functions
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")  # LOAD_METHOD before Python 3.12, the last since


@dataclass(slots=True)
class Named:
    """Everything that code names.

    Attributes:
        values: (namespace, name, how a user would write it) of what is no function, class or module.
        cells: (name, cell) of closures.
        kinds: classes of the user's own, by name.
        functions: functions of the user's own that may run, by name.
        names: of attributes that code reads.
    """

    values: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)
    cells: list[tuple[str, types.CellType]] = field(default_factory=list)
    kinds: list[tuple[str, type]] = field(default_factory=list)
    functions: list[tuple[str, types.FunctionType]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def objects(self) -> Iterator[tuple[str, Any]]:
        """Yield (path, object) of what is named: roots for ``python_state.holders_of``."""
        for namespace, name, path in self.values:
            if not is_plain(namespace.get(name)):
                yield path, namespace.get(name)
        yield from (*self.cells, *self.kinds, *self.functions)


def named_by(modules: Iterable[nn.Module], kinds: Iterable[type] = ()) -> Named:
    """Return everything that the code of these modules can reach by name: their forwards and what these call.

    Args:
        kinds: classes of further objects, whose methods may be called.
    """
    walk = _Walk()
    for kind in kinds:
        walk.know(kind)
    for each in modules:
        walk.know(type(each))
        hooks = (each._forward_hooks, each._forward_pre_hooks)
        called = [hook for found in hooks for hook in found.values()]
        for function in (getattr(type(each), "forward", None), *vars(each).values(), *called):
            walk.visit(function)
    walk.run()
    return walk.found


class _Walk:
    def __init__(self) -> None:
        self.found = Named()
        self.waiting: list[types.FunctionType] = []
        self.seen: set[Any] = set()
        self.methods: dict[str, list[Any]] = {}  # of known classes, by name
        self.names = self.found.names  # that code calls or reads as attributes
        self.known: set[type] = set()
        self.cells: set[int] = set()
        self.places: set[tuple[int, str]] = set()
        self.opened: dict[int, Any] = {}  # containers and objects, by identity
        self.modules: dict[int, types.ModuleType] = {}  # Python modules that code has hold of, by identity
        self.strings: set[str] = set()  # constants of code: names for getattr

    def know(self, kind: type) -> None:
        """Add a class whose methods may be called by name, for code can reach an object of it."""
        for base in kind.__mro__:
            if base in self.known or not is_own_code(base.__module__):
                continue
            self.known.add(base)
            self.found.kinds.append((base.__name__, base))
            for name, value in vars(base).items():
                self.methods.setdefault(name, []).append(value)
                # Operators call special methods without naming them.
                if name in self.names or (name.startswith("__") and name not in ("__init__", "__new__")):
                    self.visit(value)

    def know_module(self, module: types.ModuleType) -> None:
        """Add a Python module whose attributes may be read by name."""
        if id(module) not in self.modules and is_own_code(module.__name__):
            self.modules[id(module)] = module
            for name in self.names | self.strings:
                self._of_module(module, name)

    def _of_module(self, module: types.ModuleType, name: str) -> None:
        if name in vars(module) and not name.startswith("__"):
            self._place(vars(module), name, f"{module.__name__}.{name}")

    def _open(self, value: Any) -> None:
        """Visit what a container or an object of the user's holds."""
        inside: Collection[Any] = ()
        if isinstance(value, dict):
            inside = value.values()
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inside = value
        elif isinstance(value, (types.SimpleNamespace, functools.partialmethod)):
            inside = vars(value).values()
        elif isinstance(value, Enum):
            inside = (value.value,)
        elif not isinstance(value, type) and is_own_code(type(value).__module__):
            self.know(type(value))
            slots = [getattr(value, name, None) for name in slots_of(type(value))]
            inside = [*getattr(value, "__dict__", {}).values(), *slots]
        if inside and id(value) not in self.opened and len(inside) <= MOST_ITEMS:
            self.opened[id(value)] = value
            for each in tuple(inside):
                self.visit(each)

    def visit(self, value: Any) -> None:
        """Queue the functions that a value is or holds."""
        if isinstance(value, functools.partial):
            self._open((value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, functools.cached_property):
            self.visit(value.func)
        elif isinstance(value, types.ModuleType):
            self.know_module(value)
        elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
            if isinstance(value, types.MethodType):
                self.know(type(value.__self__))
            self.visit(value.__func__)
        elif isinstance(value, property):
            self.visit(value.fget)
        elif isinstance(value, types.FunctionType):
            if value not in self.seen and is_own_code(value.__module__):
                self.seen.add(value)
                self.waiting.append(value)
                self.found.functions.append((value.__name__, value))
                self._open((*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()))
            self.visit(getattr(value, "__wrapped__", None))
            if isinstance(registered := getattr(value, "registry", None), types.MappingProxyType):
                self._open(tuple(registered.values()))  # functools.singledispatch
        elif not is_plain(value) or isinstance(value, Enum):
            self._open(value)

    def run(self) -> None:
        while self.waiting:
            function = self.waiting.pop()
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
                if id(cell) in self.cells:
                    continue
                self.cells.add(id(cell))
                content = cell_content(cell)
                if isinstance(content, type):
                    self.know(content)
                elif name != "self":
                    self.found.cells.append((name, cell))
                self._value(content)
            self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, namespace: dict[str, Any]) -> None:
        module: Any = None  # a Python module whose attribute the next instruction may load
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if module is not None and instruction.opname not in (*ATTRIBUTES, "CACHE"):
                self.know_module(module)  # it is assigned or passed on
            if instruction.opname in LOADS and name in namespace:
                module = self._place(namespace, name, name)
            elif instruction.opname in ATTRIBUTES:
                if module is not None and name in vars(module):
                    module = self._place(vars(module), name, f"{module.__name__}.{name}")
                else:
                    module = None
                    self._attribute(name)
            elif instruction.opname == "IMPORT_NAME":
                self._import(namespace.get("__package__") or "", name)
            elif instruction.opname == "IMPORT_FROM":
                self._attribute(name)
            if instruction.opname not in (*LOADS, *ATTRIBUTES, "CACHE"):
                module = None
        self._constants(code, namespace)

    def _constants(self, code: types.CodeType, namespace: dict[str, Any]) -> None:
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, namespace)
            elif isinstance(constant, str) and constant.isidentifier():  # getattr(self, "name")
                self.strings.add(constant)
                if constant in self.methods or any(constant in vars(each) for each in self.modules.values()):
                    self._attribute(constant)

    def _import(self, package: str, name: str) -> None:
        """Add the modules that an import statement may mean, relative to any package above or to none."""
        above = package.split(".") if package else []
        for prefix in ([], *(above[:n] for n in range(1, len(above) + 1))):
            parts = [*prefix, *name.split(".")] if name else prefix
            for n in range(1, len(parts) + 1):
                found = sys.modules.get(".".join(parts[:n]))
                if found is not None:
                    self.know_module(found)

    def _attribute(self, name: str) -> None:
        if name not in self.names:
            self.names.add(name)
            for value in self.methods.get(name, ()):
                self.visit(value)
            for module in tuple(self.modules.values()):
                self._of_module(module, name)

    def _place(self, namespace: dict[str, Any], name: str, path: str) -> Any:
        """Note the value of a name; return it if it is a Python module of user code."""
        value = namespace.get(name, MISSING)
        if isinstance(value, types.ModuleType):
            return value if is_own_code(value.__name__) else None
        if isinstance(value, type):
            if is_own_code(value.__module__):
                self.know(value)
                for method in vars(value).values():
                    self.visit(method)
        elif isinstance(value, (types.FunctionType, functools.partial, types.MethodType)):
            self.visit(value)
        elif value is not MISSING and not isinstance(value, types.BuiltinFunctionType):
            if (id(namespace), name) not in self.places and not name.startswith("__"):
                self.places.add((id(namespace), name))
                self.found.values.append((namespace, name, path))
            self._value(value)
        return None

    def _value(self, value: Any) -> None:
        self.visit(value)
        if not isinstance(value, (type, types.ModuleType)) and not is_plain(value):
            self.know(type(value))
