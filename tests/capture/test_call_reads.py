"""``CallReads`` finds the plain values of a call that a forward reads: names, entries and attributes."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rematplan.scheduler.capture.call_reads import CallReads


class Batch:
    """A batch as an object."""

    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)


def unread(forward: Any, *args: Any, **kwargs: Any) -> frozenset[int]:
    """The leaves of the call that the forward does not read."""
    model = type("Model", (nn.Module,), {"forward": forward})()
    reads = CallReads(model, (args, kwargs))
    watched = reads.watched((args, kwargs))
    with reads.recording():
        model(*watched[0], **watched[1])
    return reads.unread()


X = torch.ones(2)


def test_an_argument_is_read_if_the_code_loads_its_name() -> None:
    assert unread(lambda self, x, step, name: x * step, X, 2, "a.png") == {2}
    assert unread(lambda self, x, step=0, name="": x * step, X, step=2, name="a.png") == {2}


def test_tensors_are_never_plain_values() -> None:
    assert unread(lambda self, x, y: x, X, X) == frozenset()


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_of_a_dict_the_entries_that_are_looked_up(kind: Any) -> None:
    def forward(self: Any, batch: Any) -> Any:
        return batch["x"] * batch.get("scale", 1)

    batch = kind({"x": X, "scale": 2, "file": "a.png", "more": [1, 2]})
    assert unread(forward, batch) == {2, 3, 4}


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, batch: dict(batch.items()),
        lambda self, batch: [*batch],
        lambda self, batch: batch.copy(),
        lambda self, batch: {**batch},
        lambda self, batch: list(batch.values()),
    ],
)
def test_whoever_goes_through_a_dict_may_read_all_of_it(forward: Any) -> None:
    assert unread(forward, {"x": X, "scale": 2, "file": "a.png"}) == frozenset()


@pytest.mark.parametrize("kind", [Batch, SimpleNamespace])
def test_of_an_object_the_attributes_that_are_read(kind: Any) -> None:
    # Objects are leaves unless they hold others; these are taken whole where their members cannot be told.
    batch = kind(x=X, scale=2, file="a.png")
    found = unread(lambda self, batch: batch.x * batch.scale, batch)
    assert found <= {1, 2}
    assert 1 not in found


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, *rest: x * rest[0],
        lambda self, x, **rest: x * rest["step"],
        lambda self, x, step: locals()["x"] * locals()["step"],
        lambda self, x, step: [step * each for each in x],
    ],
)
def test_what_may_be_reached_in_another_way_counts_as_read(forward: Any) -> None:
    try:
        assert unread(forward, X, 2) == frozenset()
    except TypeError:
        assert unread(forward, X, step=2) == frozenset()
