"""Make exports run the same ops as the plain model.

Libraries run other ops while they are exported: transformers makes attention masks that it skips otherwise,
and repeats the heads of grouped-query attention, so that gradients differ in their last bits. Within
``as_eager``

* ``torch.compiler.is_exporting`` and ``is_compiling`` return False to the model's code, and transformers
  takes no tensor for a fake one;
* a branch on a tensor that depends on no input, parameter or random number (positions from ``torch.arange``)
  is decided by its value. A branch on any other tensor still fails to export.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rematplan.scheduler.torch_layer.private import (
    TorchDispatchMode,
    modes_disabled,
    pytree,
    replaced,
    version_of,
)

__all__ = ["as_eager", "own_attributes", "wrapped_forward"]

_MAKERS = (torch.arange, torch.full, torch.ones, torch.tensor, torch.zeros)
_READERS = (Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.item, Tensor.tolist)


@contextmanager
def as_eager(model: nn.Module) -> Iterator[None]:
    """Make exports of ``model`` run its code as a plain step does, within the block."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Only around the model's code: torch.export itself reads these flags, too.
        with replaced(torch.compiler, _is_compiling_flag=False, _is_exporting_flag=False), _Constants():
            return original(*args, **kwargs)

    forward.eager = True  # type: ignore[attr-defined] # read by ``wrapped_forward``
    transformers = sys.modules.get("transformers.utils.import_utils")
    with (
        replaced(own_attributes(model), forward=forward),
        replaced(vars(transformers) if transformers else {}, is_fake_tensor=lambda x: False),
    ):
        yield


def wrapped_forward(model: nn.Module) -> Any:
    """Return the ``forward`` set on the object itself, unless by ``as_eager``; None if there is none."""
    found = own_attributes(model).get("forward")
    return None if getattr(found, "eager", False) else found


def own_attributes(model: nn.Module) -> dict[str, Any]:
    """Return the object's own attributes: a planned model keeps its ``forward`` apart."""
    own: dict[str, Any] = getattr(model, "_rematplan_own", vars(model))
    return own


class _Constants(TorchFunctionMode):
    """Notes how tensors that depend on code alone are made, and makes them with data when one is read."""

    def __init__(self) -> None:
        super().__init__()
        # By identity, with the tensor, which keeps its identity while it is held.
        self.made: dict[int, tuple[Tensor, Any, tuple[Any, ...], Mapping[str, Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch."""
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        constant = all(self._known(t) for t in tensors)
        if func in _READERS and constant:
            try:
                with modes_disabled(), _NoRandom():
                    return func(*(self._value(a) for a in args), **kwargs)
            except _Random:
                pass
        result = func(*args, **kwargs)
        if constant and (tensors or func in _MAKERS) and isinstance(result, Tensor):
            # The first note counts: ``to`` may return its own argument.
            self.made.setdefault(id(result), (result, func, args, kwargs))
        return result

    def _known(self, tensor: Tensor) -> bool:
        """Whether the tensor is a constant, and neither it nor its base was changed in place."""
        return id(tensor) in self.made and version_of(tensor) == 0

    def _value(self, leaf: Any) -> Any:
        """Return the leaf; for a constant, a tensor with its data."""
        if not isinstance(leaf, Tensor):
            return leaf
        _, func, args, kwargs = self.made[id(leaf)]
        args, kwargs = pytree.tree_map(self._value, (args, kwargs))
        return func(*args, **kwargs)


class _Random(Exception):
    """A constant would take random numbers."""


class _NoRandom(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op, if it draws no random numbers."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Random
        return func(*args, **(kwargs or {}))
