"""The modules that a callable uses: in its closure, in what it is bound to, in globals that it names."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["modules_in", "name_of"]

DEEPEST = 4  # objects within objects that are looked into
_SHUT = (type, types.ModuleType, torch.Tensor, torch.optim.Optimizer, str, bytes, int, float)


def name_of(function: Any) -> str:
    """Return what people call a callable: a function's qualified name, or the class of any other."""
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__qualname__", type(inner).__name__))


def modules_in(function: Any, *, everywhere: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for the modules that a callable, or what it is bound to, holds; names may repeat.

    Args:
        everywhere: look into the global variables that functions name, defaults of parameters, and plain
            objects, too.
    """
    yield from _found(function, "", set(), everywhere, 0)


def _found(
    value: Any, name: str, seen: set[int], everywhere: bool, depth: int
) -> Iterator[tuple[str, nn.Module]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield name, value
        return
    parts: list[tuple[str, Any]] = []
    if isinstance(value, functools.partial):
        names = _parameters(value.func, len(value.args))
        parts = [(name, value.func), *zip(names, value.args, strict=True), *value.keywords.items()]
    elif inspect.ismethod(value):
        owner = value.__self__
        own = [("self", owner)] if isinstance(owner, nn.Module) or everywhere else _attributes(owner)
        parts = [*own, (name, value.__func__)]
    elif inspect.isfunction(value):
        parts = [
            (free, cell.cell_contents)
            for free, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            if _is_filled(cell)
        ]
        if everywhere:
            parameters = inspect.signature(value).parameters.values()
            parts += [(p.name, p.default) for p in parameters if p.default is not p.empty]
            parts += _globals(value)
    elif isinstance(value, (list, tuple)):
        parts = [(f"{name}_{i}", part) for i, part in enumerate(value)]
    elif isinstance(value, dict):
        parts = [(str(key), part) for key, part in value.items()]
    elif not isinstance(value, _SHUT) and (callable(value) or (everywhere and depth < DEEPEST)):
        parts, depth = _attributes(value), depth + 1
        if everywhere and callable(value) and inspect.ismethod(value.__call__):
            parts.append((name, value.__call__.__func__))  # it may name global variables
    for inner, part in parts:
        yield from _found(part, inner, seen, everywhere, depth)


def _parameters(function: Any, count: int) -> list[str]:
    """Return names for the first positional arguments of a callable."""
    try:
        names = [*inspect.signature(function).parameters]
    except (TypeError, ValueError):
        names = []
    return [*names, *(f"argument{i}" for i in range(len(names), count))][:count]


def _globals(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the global variables that a function's code reads; none of a library's."""
    if "site-packages" in function.__code__.co_filename or "dist-packages" in function.__code__.co_filename:
        return
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name = instruction.argval
                if name in function.__globals__:
                    yield name, function.__globals__[name]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    return [*getattr(value, "__dict__", {}).items()]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 # raises where the variable has no value yet
    except ValueError:
        return False
    return True
