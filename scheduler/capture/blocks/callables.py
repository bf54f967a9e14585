"""A list of plain callables as a model, and the modules that a callable uses.

These are looked for in its closure, in what it is bound to and in globals that it names.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.leaves import map_tensors, tensors_in

__all__ = ["CallableChain", "cut_off", "modules_in", "name_of", "variables"]


class CallableChain(nn.Module):
    """Callables that run one after the other, each a stage: time steps, layers, parts of one function.

    The first is called with the arguments of the chain. Each other is called with what the one before
    returned: a tuple as positional arguments, anything else as the one argument. What the last one returns is
    the output.

    The modules that a callable uses are looked for in the callable itself: a module, the object of a bound
    method, what a ``functools.partial`` binds, the closure, and lists, tuples and dicts in these. Each is a
    submodule of its stage, so that ``parameters()`` of the chain are those to be trained. Other tensors in
    these (an input, in a closure) are outside of a plan's account, as is all that was there before the step.

    Args:
        callables: at least one; it may be given several times.
        modules: further modules that callables use (global variables, say); they count as used by every one.

    Raises:
        TypeError: not callables, or not modules.
        ValueError: there is none.
    """

    def __init__(self, callables: Iterable[Callable[..., Any]], *, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        functions, further = list(callables), list(modules)
        for position, function in enumerate(functions):
            if not callable(function):
                raise TypeError(
                    f"CallableChain: callables[{position}] is a {type(function).__name__}, expected a callable"
                )
        for position, module in enumerate(further):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"CallableChain: modules[{position}] is a {type(module).__name__}, expected a torch.nn.Module"
                )
        if not functions:
            raise ValueError("CallableChain: callables is empty, expected at least one")
        self.stages = nn.ModuleList(_Stage(function, further) for function in functions)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the callables; return the output of the last."""
        first, *others = self.stages
        value = first(*args, **kwargs)
        for stage in others:
            value = stage(*value) if isinstance(value, tuple) else stage(value)
        return value

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run every callable once in grad mode; the caller preserves the chain's state.

        Raises:
            ValueError: one uses a parameter of a module that was not found in it.
        """
        value: Any = args
        for position, stage in enumerate(self.stages):
            positional = value if isinstance(value, tuple) else (value,)
            given = map_tensors(cut_off, (positional, kwargs))
            with torch.enable_grad():
                value = stage(*given[0], **given[1])
            kwargs = {}
            known = {*stage.parameters(), *tensors_in(given)}
            for tensor in variables(value):
                if tensor not in known:
                    raise ValueError(
                        f"callable {position} ({name_of(stage.function)}) uses a tensor of shape {tuple(tensor.shape)} that "
                        "requires grad and belongs to no module that was found in it; pass its module: "
                        "CallableChain(callables, modules=[module])"
                    )


class _Stage(nn.Module):
    """One callable, and the modules that it uses."""

    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], further: list[nn.Module]) -> None:
        super().__init__()
        self.used = nn.ModuleList(dict.fromkeys((*(m for _, m in modules_in(function)), *further)))
        # Not as an attribute: a module would be there twice.
        self.__dict__["function"] = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return name_of(self.function)


def cut_off(tensor: Tensor) -> Tensor:
    """Return the tensor without its history."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def variables(value: Any) -> Iterator[Tensor]:
    """Return the leaves that a backward from the tensors in ``value`` would make gradients of."""
    waiting: list[Any] = [t.grad_fn for t in tensors_in(value)]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
        waiting.extend(following for following, _ in node.next_functions)


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
