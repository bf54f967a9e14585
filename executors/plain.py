"""The plain model behind a planned one."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from rematplan.scheduler.torch_layer.eager import wrapped_forward
from rematplan.scheduler.torch_layer.fsdp import share_sharding

__all__ = ["plain_copy", "plain_forward", "plans_within", "sharing", "wrappers"]


def plain_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the plain model's forward: what was put on the object, or that of its original class."""
    own = vars(model).get("forward")
    if own is not None:
        return own(*args, **kwargs)
    original: Any = _original(model)
    return original.forward(model, *args, **kwargs)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return the plain model behind a planned one: of its original class, sharing all its attributes."""
    return sharing(model, _original(model))


def plans_within(model: Any) -> Any:
    """Return the plans that a planned model trains by; None of any other."""
    return getattr(model, "_rematplan_plans", None) if hasattr(type(model), "_rematplan_plain") else None


def wrappers(model: nn.Module) -> dict[str, Any]:
    """Return what was put around a planned model's methods since (accelerate's autocast, say)."""
    own: dict[str, Any] = model._rematplan_own  # type: ignore[assignment] # a slot of planned classes
    found = {"forward": own["forward"]} if wrapped_forward(model) is not None else {}
    bound = {n: v for n, v in vars(model).items() if isinstance(v, MethodType) and v.__self__ is model}
    return {**found, **bound}


def _original(model: nn.Module) -> Any:
    """Return the class that the planned model's class was derived from."""
    return type(model).__mro__[1]


def sharing(model: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return another object, of that class, that shares everything: what is set on one is set on both."""
    twin: nn.Module = object.__new__(cls)
    object.__setattr__(twin, "__dict__", vars(model))
    share_sharding(model, twin)
    return twin
