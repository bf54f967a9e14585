"""Globals, closures and methods that a forward can reach by name are found without running it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
