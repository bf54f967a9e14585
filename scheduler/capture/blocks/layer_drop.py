"""Fix draws by which a model leaves out layers (LayerDrop, stochastic depth), so that all of them run.

A model decides by a random number or a few whether a layer runs. While it is captured, these numbers are
fixed at the value with which most runs; a step that leaves layers out then takes less than the plan says.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rematplan.scheduler.torch_layer.private import TorchDispatchMode, replaced

__all__ = ["VALUES", "Effort", "fixed_draws"]

# `if rand() < p: continue` runs all with the first, `if rand() > survival: continue` with the second.
VALUES = (1 - 2.0**-20, 0.0)
FEW = 256  # numbers drawn at once by which layers may be chosen
_UNIFORM = frozenset({torch.rand, torch.rand_like, Tensor.uniform_})
_FLAGS = frozenset({torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_})


class _Draws(TorchFunctionMode):
    """Count draws of one number or a few, and fix them."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.value, self.count = value, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        drawn = (func in _UNIFORM or func in _FLAGS) and isinstance(result, Tensor)
        if drawn and (result.numel() == 1 or (result.ndim == 1 and result.numel() <= FEW)):
            self.count += 1
            if self.value is not None:
                result.detach().fill_(round(self.value) if func in _FLAGS else self.value)
        return result

    def on_host(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of ``random`` or ``numpy.random``, likewise."""

        def drawn(*args: Any, **kwargs: Any) -> Any:
            result = draw(*args, **kwargs)
            self.count += 1
            if self.value is None or not isinstance(result, float):
                return result
            low, high = (*args[:2],) if draw.__name__ == "uniform" and len(args) >= 2 else (0.0, 1.0)
            return low + (high - low) * self.value

        return drawn


@contextmanager
def fixed_draws(value: float | None, *, counting: bool = False) -> Iterator[_Draws]:
    """Fix draws of one number or a few within it at this value; None leaves them as they are.

    Args:
        counting: whether they are counted even if they are not fixed.
    """
    draws = _Draws(value)
    if value is None and not counting:
        yield draws
        return
    numpy = sys.modules.get("numpy")
    places = [(random, name) for name in ("random", "uniform")]
    if numpy is not None:
        places += [(numpy.random, name) for name in ("rand", "random", "random_sample", "uniform")]
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(replaced(module, **{name: draws.on_host(getattr(module, name))}))
        stack.enter_context(draws)
        yield draws


class Effort(TorchDispatchMode):
    """Count ops."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        self.ops += 1
        return func(*args, **(kwargs or {}))
