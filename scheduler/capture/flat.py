"""The leaves of a call: by a short way where arguments are tensors, plain values and tuples of them, as in most calls of blocks."""

from __future__ import annotations

from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["flatten", "tensor_leaves", "unflatten"]

# Of exactly these types: subclasses and anything else may be registered as containers.
LEAVES = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of ``(args, kwargs)``, numbered as by ``tree_flatten``, and what ``unflatten`` needs to undo it."""
    if LEAVES.issuperset(map(type, args)) and LEAVES.issuperset(map(type, kwargs.values())):
        return [*args, *kwargs.values()], (len(args), tuple(kwargs), None)
    leaves: list[Any] = []
    groups: list[int | None] = []  # lengths of tuples, such as the state of an LSTM
    for value in (*args, *kwargs.values()):
        if type(value) in LEAVES:
            leaves.append(value)
            groups.append(None)
        elif type(value) is tuple and LEAVES.issuperset(map(type, value)):
            leaves += value
            groups.append(len(value))
        else:
            return pytree.tree_flatten((args, kwargs))
    return leaves, (len(args), tuple(kwargs), tuple(groups))


def unflatten(leaves: list[Any], spec: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of these leaves."""
    if type(spec) is tuple:
        count, names, groups = spec
        if groups is not None:
            each = iter(leaves)
            leaves = [next(each) if size is None else tuple(islice(each, size)) for size in groups]
        return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def tensor_leaves(value: Any) -> list[tuple[int, Tensor]]:
    """(index, tensor) for every tensor among the leaves of ``value``."""
    if type(value) is Tensor:
        return [(0, value)]
    if type(value) is tuple and LEAVES.issuperset(map(type, value)):
        return [(i, leaf) for i, leaf in enumerate(value) if isinstance(leaf, Tensor)]
    return [(i, leaf) for i, leaf in enumerate(pytree.tree_leaves(value)) if isinstance(leaf, Tensor)]
