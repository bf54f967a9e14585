"""The leaves of a call: by a short way where no argument is a container, which is most of the calls of most blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["flatten", "tensor_leaves", "unflatten"]

# Of exactly these types: subclasses and anything else may be registered as containers.
LEAVES = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of ``(args, kwargs)``, numbered as by ``tree_flatten``, and what ``unflatten`` needs to undo it."""
    if LEAVES.issuperset(map(type, args)) and LEAVES.issuperset(map(type, kwargs.values())):
        return [*args, *kwargs.values()], (len(args), tuple(kwargs))
    return pytree.tree_flatten((args, kwargs))


def unflatten(leaves: list[Any], spec: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of these leaves."""
    if type(spec) is tuple:
        count, names = spec
        return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def tensor_leaves(value: Any) -> list[tuple[int, Tensor]]:
    """(index, tensor) for every tensor among the leaves of ``value``."""
    if type(value) is Tensor:
        return [(0, value)]
    return [(i, leaf) for i, leaf in enumerate(pytree.tree_leaves(value)) if isinstance(leaf, Tensor)]
