"""Seconds of pieces of work on the host: one number for each, in order."""

from __future__ import annotations

import time

import pytest
import torch

from rematplan.scheduler.costs.meters.clock import Spans, wait


def test_each_piece_has_its_own_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    spans = Spans(torch.device("cpu"))
    for _ in range(2):
        with spans.span():
            pass
    assert spans.seconds() == spans.seconds() == [1.0, 2.0]


def test_a_piece_that_raises_is_not_counted() -> None:
    spans = Spans(torch.device("cpu"))
    with pytest.raises(KeyError), spans.span():
        raise KeyError("work")
    assert spans.seconds() == []
    wait(torch.device("cpu"))
