"""The fast paths through a call give the results of the slow ones."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from rematplan.scheduler.torch_layer.call import CallReader, canonical_call
from rematplan.scheduler.torch_layer.leaves import flatten, tensor_leaves, unflatten

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=2),
    st.builds(torch.zeros, st.integers(0, 3)),
    st.builds(lambda: nn.Parameter(torch.zeros(2))),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.tuples(inner, inner), max_leaves=4
)
NAMES = st.sampled_from(["zoo", "b", "a"])


@given(args=st.lists(VALUES, max_size=3).map(tuple), kwargs=st.dictionaries(NAMES, VALUES, max_size=3))
@pytest.mark.slow
def test_leaves_are_numbered_as_by_tree_flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    leaves, spec = flatten(args, kwargs)
    expected = pytree.tree_leaves((args, kwargs))
    assert len(leaves) == len(expected)
    assert all(a is b for a, b in zip(leaves, expected, strict=True))
    again = unflatten(leaves, spec)
    assert pytree.tree_structure(again) == pytree.tree_structure((args, kwargs))
    assert all(a is b for a, b in zip(pytree.tree_leaves(again), leaves, strict=True))
    assert [i for i, _ in tensor_leaves((args, kwargs))] == [
        i for i, leaf in enumerate(expected) if isinstance(leaf, torch.Tensor)
    ]


def plain(a: Any, b: Any = None, zoo: Any = 3) -> None: ...


def starred(a: Any, *more: Any, use_cache: Any = None, **kwargs: Any) -> None: ...


def by_place(a: Any, /, b: Any = None, *, zoo: Any = None) -> None: ...


SIGNATURES = [inspect.signature(f) for f in (plain, starred, by_place)]


@given(
    st.sampled_from(SIGNATURES),
    st.lists(
        st.tuples(st.lists(LEAVES, max_size=3).map(tuple), st.dictionaries(NAMES, LEAVES, max_size=3)),
        min_size=2,
        max_size=4,
    ),
)
def test_calls_are_read_as_by_their_definition(signature: inspect.Signature, calls: list[Any]) -> None:
    """Several calls by one reader: what it knows of one must be right of the next."""
    read = CallReader(signature)
    for args, kwargs in calls * 2:
        try:
            expected = canonical_call(signature, args, kwargs)
        except TypeError as error:
            with pytest.raises(TypeError, match=re.escape(str(error))):
                read(args, kwargs)
            continue
        found = read(args, kwargs)
        assert list(found[1]) == list(expected[1])
        pairs = zip([*found[0], *found[1].values()], [*expected[0], *expected[1].values()], strict=True)
        assert all(a is b for a, b in pairs)
