"""The modules that a callable uses are found wherever it holds them, each once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from rematplan.scheduler.capture.blocks.callables import modules_in, name_of

LAYER = nn.Linear(2, 2)


def found(function: Any, **options: bool) -> dict[str, nn.Module]:
    return dict(modules_in(function, **options))


class Holder:
    """Is called, and holds a module deep within."""

    def __init__(self, module: nn.Module) -> None:
        self.inner = {"deep": [module]}

    def __call__(self, x: Any) -> Any:
        return self.inner["deep"][0](x)

    def method(self, x: Any) -> Any:
        return self(x)


def _closure(module: nn.Module) -> Callable[..., Any]:
    return lambda x: module(x) + 1


def _unfilled() -> Callable[..., Any]:
    def function(x: Any) -> Any:
        return later(x)

    if function is None:
        later: nn.Module = nn.Linear(2, 2)
    return function


def reads_a_global(x: Any) -> Any:
    return [LAYER(each) for each in x]  # within a comprehension


def has_a_default(x: Any, layer: nn.Module = LAYER) -> Any:
    return layer(x)


def test_a_module_is_itself_and_its_forward_is_bound_to_it() -> None:
    module = nn.Sequential(LAYER)
    assert found(module) == {"": module}  # what is within it is its own
    assert found(module.forward) == {"self": module}


def test_arguments_of_partials_have_the_parameters_names() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    assert found(functools.partial(has_a_default, 1, layer=second)) == {"layer": second}
    assert found(functools.partial(has_a_default, first)) == {"x": first}
    assert found(functools.partial(print, first)) == {"args": first}
    assert found(functools.partial(functools.partial(has_a_default, first), second)).keys() >= {"x"}


def test_closures_containers_and_objects_are_looked_into() -> None:
    module = nn.Linear(2, 2)
    assert found(_closure(module)) == {"module": module}
    assert found(_closure(_closure(module))) == {"module": module}  # type: ignore[arg-type] # any callable
    assert found(functools.partial(print, {"a": [module]})) == {"a_0": module}
    assert found(Holder(module)) == {"deep_0": module}
    assert found(Holder(module).method) == {"deep_0": module}
    assert found(_unfilled()) == {}


def test_globals_and_defaults_are_looked_at_only_where_asked() -> None:
    assert found(reads_a_global) == found(has_a_default) == {}
    assert found(reads_a_global, everywhere=True) == {"LAYER": LAYER}
    assert found(has_a_default, everywhere=True) == {"layer": LAYER}


def test_each_is_found_once_and_circles_end() -> None:
    module = nn.Linear(2, 2)
    circle: list[Any] = [module, module]
    circle.append(circle)
    assert [m for _, m in modules_in(functools.partial(print, circle, module))] == [module]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (has_a_default, "has_a_default"),
        (functools.partial(has_a_default, 1), "has_a_default"),
        (Holder(LAYER), "Holder"),
        (Holder(LAYER).method, "Holder.method"),
    ],
)
def test_a_callable_is_called_by_the_name_that_people_use(function: Any, name: str) -> None:
    assert name_of(function) == name
