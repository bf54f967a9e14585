"""Globals, closures and methods that a forward can reach by name are found without running it."""

from __future__ import annotations

import collections
import functools
import importlib
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rematplan
from rematplan.scheduler.torch_layer.named_by_code import Named, named_by

SCALE = {"by": 2.0}
NEVER = {"by": 3.0}
SHIFT = [1.0]


class Settings:
    """An object that a helper asks."""

    def __init__(self) -> None:
        self.depth = 1

    def asked(self) -> float:
        return SHIFT[0]

    def not_asked(self) -> float:
        return NEVER["by"]


SETTINGS = Settings()


def helper(x: Tensor) -> Tensor:
    return x + SETTINGS.asked()


def unused(x: Tensor) -> Tensor:
    return x * NEVER["by"]


class Layer(nn.Module):
    """Reads a global itself, and others by way of a function and a method."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(helper(x))

    def inner(self, x: Tensor) -> Tensor:
        return torch.stack([row * SCALE["by"] * math.pi for row in x])

    def other(self, x: Tensor) -> Tensor:
        return unused(x)


def values(named: Named) -> set[str]:
    return {path for _, _, path in named.values}


def functions(named: Named) -> set[str]:
    return {name for name, _ in named.functions}


def test_globals_are_followed_through_functions_methods_and_comprehensions() -> None:
    named = named_by([Layer()])
    assert values(named) == {"SCALE", "SHIFT", "SETTINGS"}
    assert functions(named) == {"forward", "inner", "helper", "asked"}
    assert {kind for _, kind in named.kinds} >= {Layer, Settings}
    assert {"inner", "asked"} <= named.names
    assert dict(named.objects())["SCALE"] is SCALE


def test_a_namespace_and_a_name_give_the_value_of_now() -> None:
    ((namespace, name, _),) = [row for row in named_by([Layer()]).values if row[2] == "SHIFT"]
    assert namespace[name] is SHIFT


class Holding(nn.Module):
    """Its forward calls what its attribute holds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x)
        return result


def test_closures_partials_and_decorated_functions_are_followed() -> None:
    count = [0]

    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        return x

    @functools.wraps(helper)
    def decorated(x: Tensor) -> Tensor:
        return counted(x)

    cells = dict(named_by([Holding(functools.partial(counted))]).cells)
    assert cells["count"].cell_contents is count
    named = named_by([Holding(decorated)])
    assert {"count", "counted"} <= dict(named.cells).keys()
    assert "SETTINGS" in values(named)  # of what is decorated, by __wrapped__


def test_hooks_and_methods_of_further_classes_may_run() -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, args, output: unused(output))
    assert "NEVER" in values(named_by([layer]))
    assert "not_asked" not in functions(named_by([Layer()], [Settings]))


class ByText(nn.Module):
    """Calls a method whose name is text."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, "hidden")(x)  # noqa: B009 # on purpose
        return result

    def hidden(self, x: Tensor) -> Tensor:
        return unused(x)


def test_a_method_is_found_by_its_name_in_text() -> None:
    assert "NEVER" in values(named_by([ByText()]))


def test_code_of_libraries_is_not_followed() -> None:
    assert functions(named_by([nn.Linear(2, 2), nn.Dropout()])) == set()


def test_what_lies_in_a_users_own_module_called_scheduler_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scheduler.py").write_text("SCALE = [2.0]\ndef scaled(x):\n    return x * SCALE[0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scheduler", raising=False)
    theirs: Any = importlib.import_module("scheduler")
    layer, x = nn.Linear(2, 2), torch.ones(2, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return theirs.scaled(self.layer(x)).sum()

    model = Model().train()
    planned = rematplan.execute(rematplan.solve(model, "1MiB", sample=x), model)
    planned(x).backward()
    theirs.SCALE[0] = 3.0
    assert torch.equal(planned(x), model(x))


FACTOR = [2.0]


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR[0]


class Holder:
    """An object of the user's that holds a function."""

    def __init__(self) -> None:
        self.function = scaled


BY_NAME = {"scaled": scaled}
MODULES = {"this": sys.modules[__name__]}
HOLDER = Holder()


def _in_a_closure() -> Callable[..., Any]:
    module = sys.modules[__name__]
    return lambda model, x: module.scaled(x)


def _imports(model: Any, x: Tensor) -> Tensor:
    import tests.capture.test_named_by_code as own

    return own.scaled(x)


def _imports_a_name(model: Any, x: Tensor) -> Tensor:
    from tests.capture.test_named_by_code import scaled as own

    return own(x)


def _has_a_default(model: Any, x: Tensor, function: Callable[[Tensor], Tensor] = scaled) -> Tensor:
    return function(x)


def _under_another_name(model: Any, x: Tensor) -> Any:
    module: Any = MODULES["this"]
    other = module
    return other.scaled(x)


class Operators:
    """An object whose operators read the global."""

    def __mul__(self, x: Tensor) -> Tensor:
        return scaled(x)

    def __getitem__(self, x: Tensor) -> Tensor:
        return scaled(x)


class Slotted:
    """An object without a dict."""

    __slots__ = ("function",)

    def __init__(self) -> None:
        self.function = scaled


@functools.singledispatch
def dispatched(x: object) -> Any:
    raise TypeError(x)


@dispatched.register
def _(x: Tensor) -> Tensor:
    return scaled(x)


OPERATORS, SLOTTED = Operators(), Slotted()
SPACE = types.SimpleNamespace(function=scaled)
QUEUE = collections.deque([scaled])

WAYS: dict[str, Callable[..., Any]] = {
    "an operator": lambda model, x: OPERATORS * x,
    "an item": lambda model, x: OPERATORS[x],
    "a slot": lambda model, x: SLOTTED.function(x),
    "a namespace": lambda model, x: SPACE.function(x),
    "a deque": lambda model, x: QUEUE[0](x),
    "singledispatch": lambda model, x: dispatched(x),
    "a function in a global dict": lambda model, x: BY_NAME["scaled"](x),
    "a module in a global dict": _under_another_name,
    "a function of an object": lambda model, x: HOLDER.function(x),
    "a module in a closure": _in_a_closure(),
    "a module imported in the function": _imports,
    "a name imported in the function": _imports_a_name,
    "a default argument": _has_a_default,
    "a module on the model": lambda model, x: model.module.scaled(x),
    "functions deep in a container of the model": lambda model, x: model.functions["a"][0](x),
    "a partial": functools.partial(lambda function, model, x: function(x), scaled),
    "getattr": lambda model, x: model.module.scaled(x),
}


class Way(nn.Module):
    """Scales by a function that it reaches in one of ``WAYS``."""

    def __init__(self, way: Callable[..., Any], holds: str) -> None:
        super().__init__()
        self.way = way
        if "module on" in holds or "getattr" in holds:
            self.module: Any = sys.modules[__name__]
        if "container of the model" in holds:
            self.functions = {"a": (scaled,)}

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


@pytest.mark.parametrize("way", WAYS)
def test_a_global_is_found_however_the_function_that_reads_it_is_reached(way: str) -> None:
    model = Way(WAYS[way], way)
    assert torch.equal(model(torch.ones(1)), torch.full((1,), FACTOR[0]))
    found = named_by([model])
    assert any(space.get(name) is FACTOR for space, name, _ in found.values), [
        each[2] for each in found.values
    ]
