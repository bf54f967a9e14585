"""Find the globals, closures and objects that a model's code can reach by name, without running it.

Functions are followed by the names in their byte code: globals that they load, attributes of Python modules,
methods of the classes of known objects, closures.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rematplan.scheduler.torch_layer.python_state import MISSING, cell_content, is_own_code, is_plain

__all__ = ["Named", "named_by"]

LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
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

    def know(self, kind: type) -> None:
        """Add a class whose methods may be called by name, for code can reach an object of it."""
        for base in kind.__mro__:
            if base in self.known or not is_own_code(base.__module__):
                continue
            self.known.add(base)
            self.found.kinds.append((base.__name__, base))
            for name, value in vars(base).items():
                self.methods.setdefault(name, []).append(value)
                if name in self.names or (name.startswith("__") and name in ("__call__", "__getattr__")):
                    self.visit(value)

    def visit(self, value: Any) -> None:
        """Queue the functions that a value is or holds."""
        if isinstance(value, (functools.partial, functools.cached_property)):
            self.visit(value.func)
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
            self.visit(getattr(value, "__wrapped__", None))

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
            if instruction.opname in LOADS and name in namespace:
                module = self._place(namespace, name, name)
            elif instruction.opname in ATTRIBUTES:
                if module is not None and name in vars(module):
                    module = self._place(vars(module), name, f"{module.__name__}.{name}")
                else:
                    module = None
                    self._attribute(name)
            elif instruction.opname != "CACHE":
                module = None
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, namespace)
            elif isinstance(constant, str) and constant in self.methods:  # getattr(self, "name")
                self._attribute(constant)

    def _attribute(self, name: str) -> None:
        if name not in self.names:
            self.names.add(name)
            for value in self.methods.get(name, ()):
                self.visit(value)

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
