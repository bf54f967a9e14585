"""Fast pytree flatten/unflatten for tensors, scalars and flat tuples; anything else falls back to pytree.

Beyond pytree, objects that hold tensors are opened: batches of tokenizers, dataclasses, namespaces, mappings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.private import pytree
from rematplan.scheduler.torch_layer.python_state import is_plain, slots_of

__all__ = [
    "flatten",
    "map_tensors",
    "repeated_floats",
    "repeats",
    "tensor_leaves",
    "tensors_in",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
    "unflatten",
]

# Exactly these types: subclasses and any other type may be registered as containers.
LEAVES = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str})
DEEPEST = 8  # objects within objects that are opened


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """The structure of a tree with opened objects.

    Attributes:
        outer: pytree's spec, in which each opened object is a leaf.
        inner: for each leaf of ``outer`` (type, names of attributes, spec) of an opened object, or None.
        counts: leaves of the whole tree below each.
    """

    outer: Any
    inner: tuple[tuple[type, tuple[str, ...], Any] | None, ...]
    counts: tuple[int, ...]


def _members(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object that may be opened; None for any other."""
    closed = (Tensor, nn.Module, type, torch.Generator)
    if type(value) in LEAVES or is_plain(value) or callable(value) or isinstance(value, closed):
        return None
    found = {name: getattr(value, name) for name in slots_of(type(value)) if hasattr(value, name)}
    found.update(getattr(value, "__dict__", {}))
    return found or None


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor):
        return True
    if type(value) in LEAVES or depth > DEEPEST:
        return False
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            return True
        if any(_holds_tensors(member, depth + 1) for member in (_members(leaf) or {}).values()):
            return True
    return False


def tree_flatten(value: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a tree, objects that hold tensors opened, and the spec for ``tree_unflatten``."""
    leaves, outer = pytree.tree_flatten(value)
    if LEAVES.issuperset(map(type, leaves)):
        return leaves, outer
    opened = [found if (found := _members(leaf)) and _holds_tensors(leaf) else None for leaf in leaves]
    if not any(opened):
        return leaves, outer
    flat: list[Any] = []
    inner: list[tuple[type, tuple[str, ...], Any] | None] = []
    counts: list[int] = []
    for leaf, members in zip(leaves, opened, strict=True):
        below, spec = tree_flatten(tuple(members.values())) if members else ([leaf], None)
        flat += below
        inner.append((type(leaf), tuple(members), spec) if members else None)
        counts.append(len(below))
    return flat, ObjectSpec(outer, tuple(inner), tuple(counts))


def tree_unflatten(leaves: list[Any], spec: Any) -> Any:
    """Rebuild a tree from leaves; opened objects are new ones of the same classes."""
    if not isinstance(spec, ObjectSpec):
        return pytree.tree_unflatten(leaves, spec)
    each = iter(leaves)
    outer = []
    for opened, count in zip(spec.inner, spec.counts, strict=True):
        below = list(islice(each, count))
        if opened is None:
            outer += below
            continue
        kind, names, inner = opened
        try:
            made: Any = kind.__new__(kind)  # type: ignore[call-overload] # no metaclass
        except TypeError:  # it asks for arguments
            made = object.__new__(kind)
        for name, member in zip(names, tree_unflatten(below, inner), strict=True):
            object.__setattr__(made, name, member)
        outer.append(made)
    return pytree.tree_unflatten(outer, spec.outer)


def tree_leaves(value: Any) -> list[Any]:
    """Return the leaves of a tree, in the order of ``tree_flatten``."""
    return tree_flatten(value)[0]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return the same tree with ``function`` applied to each tensor."""
    leaves, spec = tree_flatten(value)
    return tree_unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the leaves of ``(args, kwargs)``, as ``tree_flatten`` does, and the spec for ``unflatten``."""
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
            return tree_flatten((args, kwargs))
    return leaves, (len(args), tuple(kwargs), tuple(groups))


def unflatten(leaves: list[Any], spec: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rebuild ``(args, kwargs)`` from leaves."""
    if type(spec) is tuple:
        count, names, groups = spec
        if groups is not None:
            each = iter(leaves)
            leaves = [next(each) if size is None else tuple(islice(each, size)) for size in groups]
        return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs


def repeats(leaves: Sequence[Any]) -> list[tuple[int, int]]:
    """Return (leaf, first leaf) for every tensor that occurs again: code may compare them by identity."""
    first: dict[int, int] = {}
    found = [(i, first.setdefault(id(t), i)) for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    return [(i, earlier) for i, earlier in found if i != earlier]


def repeated_floats(leaves: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Return the ``repeats`` of floats: query, key and value, say, not ids that serve as labels, too."""
    return tuple((i, earlier) for i, earlier in repeats(leaves) if leaves[i].is_floating_point())


def tensor_leaves(value: Any) -> list[tuple[int, Tensor]]:
    """Return (index, tensor) for every tensor among the leaves of ``value``."""
    if type(value) is Tensor:
        return [(0, value)]
    if type(value) is tuple and LEAVES.issuperset(map(type, value)):
        return [(i, leaf) for i, leaf in enumerate(value) if isinstance(leaf, Tensor)]
    return [(i, leaf) for i, leaf in enumerate(tree_leaves(value)) if isinstance(leaf, Tensor)]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among the leaves of ``value``, attributes of objects included."""
    return [leaf for _, leaf in tensor_leaves(value)]
