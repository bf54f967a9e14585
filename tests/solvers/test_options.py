"""The options of one stage, against all subsets of its saved values and of its ops."""

from __future__ import annotations

import time
from collections.abc import Collection
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import milp

from rematplan.scheduler.solvers.stage_options import (
    Choices,
    StageOp,
    StageValue,
    _closure,
    _needs,
    _producers,
    choices,
)

Stage = tuple[list[StageOp], list[StageValue]]


@st.composite
def stages(draw: st.DrawFn, most_ops: int = 8, most_saved: int = 8) -> Stage:
    """Two available values, then ops that read earlier values and write one to three new ones."""
    values = [StageValue(7, available=True), StageValue(7, saved=True, available=True)]
    ops = []
    saved = 0
    for _ in range(draw(st.integers(1, most_ops))):
        reads = draw(st.lists(st.integers(0, len(values) - 1), max_size=2, unique=True))
        first = len(values)
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            keep = saved < most_saved and draw(st.booleans())
            saved += keep
            values.append(
                StageValue(draw(st.integers(0, 9)), saved=keep, pinned=keep and draw(st.integers(0, 5)) == 0)
            )
        seconds = float(draw(st.integers(0, 9)))
        writes = tuple(range(first, len(values)))
        ops.append(StageOp(seconds, tuple(reads), writes, draw(st.integers(0, 3)) == 0))
    return ops, values


def saved_values(values: list[StageValue]) -> frozenset[int]:
    return frozenset(v for v, value in enumerate(values) if value.saved and not value.available)


def rebuilds(ops: list[StageOp], values: list[StageValue], kept: frozenset[int], again: set[int]) -> bool:
    """Whether running ``again`` in order brings back every saved value."""
    there = {v for v, value in enumerate(values) if value.available} | kept
    skipped_random = False
    for o, op in enumerate(ops):
        if o not in again:
            skipped_random |= op.random
        elif (op.random and skipped_random) or not there.issuperset(op.reads):
            return False
        else:
            there.update(op.writes)
    return there >= saved_values(values)


def rerun_for(ops: list[StageOp], values: list[StageValue], kept: Collection[int]) -> tuple[int, ...]:
    """The ops that must run again, in order, when of the saved values only ``kept`` stays."""
    producer = _producers("rerun_for", ops, values)
    dropped = [producer[v] for v in producer if values[v].saved and v not in kept]
    return tuple(sorted(_closure(_needs(ops, producer, kept), dropped)))


def every_option(ops: list[StageOp], values: list[StageValue]) -> set[tuple[int, float]]:
    """(bytes, seconds) of each subset of the saved values that holds the pinned ones."""
    saved = saved_values(values)
    pinned = frozenset(v for v in saved if values[v].pinned)
    found = set()
    for count in range(len(saved - pinned) + 1):
        for some in combinations(sorted(saved - pinned), count):
            kept = pinned.union(some)
            again = rerun_for(ops, values, kept)
            found.add((sum(values[v].bytes for v in kept), sum(ops[o].seconds for o in again)))
    return found


def front(points: set[tuple[int, float]]) -> set[tuple[int, float]]:
    """The points that no other point beats."""
    return {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}


def hull(points: set[tuple[int, float]]) -> set[tuple[int, float]]:
    """The points of the front that lie below every line between two others around them."""
    best = sorted(front(points))
    return {
        (x, y)
        for x, y in best
        if all(
            (y - a[1]) * (b[0] - a[0]) < (b[1] - a[1]) * (x - a[0])
            for a in best
            for b in best
            if a[0] < x < b[0]
        )
    }


def sizes(found: Choices) -> list[tuple[int, float]]:
    return [(choice.bytes, choice.seconds) for choice in found.choices]


@given(stages(most_ops=7), st.data())
def test_rerun_for_is_the_smallest_set_of_ops_that_rebuilds_what_was_dropped(
    stage: Stage, data: st.DataObject
) -> None:
    ops, values = stage
    kept = frozenset(v for v in saved_values(values) if values[v].pinned or data.draw(st.booleans()))
    legal = [
        set(again)
        for count in range(len(ops) + 1)
        for again in combinations(range(len(ops)), count)
        if rebuilds(ops, values, kept, set(again))
    ]
    assert set(rerun_for(ops, values, kept)) == legal[0]
    assert all(legal[0] <= again for again in legal)


@given(stages())
def test_every_choice_is_what_it_says_and_on_the_front_of_all_subsets(stage: Stage) -> None:
    ops, values = stage
    found = choices(ops, values, most=6)
    best = front(every_option(ops, values))
    for choice in found.choices:
        assert choice.kept <= saved_values(values)
        assert choice.kept >= {v for v in saved_values(values) if values[v].pinned}
        assert choice.rerun == rerun_for(ops, values, choice.kept)
        assert choice.bytes == sum(values[v].bytes for v in choice.kept)
        assert choice.seconds == sum(ops[o].seconds for o in choice.rerun)
    assert set(sizes(found)[1:]) <= best
    assert found.gap == 0


@given(stages())
def test_every_vertex_of_the_hull_is_there_when_there_is_room(stage: Stage) -> None:
    assert hull(every_option(*stage)) <= set(sizes(choices(*stage, most=50)))


@given(stages(), st.integers(2, 5))
def test_the_first_keeps_all_the_last_takes_the_fewest_bytes_and_there_are_at_most_most(
    stage: Stage, most: int
) -> None:
    ops, values = stage
    found = choices(ops, values, most=most)
    first, last = found.choices[0], found.choices[-1]
    assert (first.kept, first.rerun, first.seconds) == (saved_values(values), (), 0)
    assert (last.bytes, last.seconds) == min(every_option(ops, values))
    assert len(found.choices) <= most
    for a, b in pairwise(found.choices):
        assert a.bytes > b.bytes
        assert a.seconds < b.seconds or a.seconds == b.seconds == 0


@given(stages())
def test_the_same_stage_gives_the_same_choices(stage: Stage) -> None:
    assert choices(*stage) == choices(*stage)


# Two values rebuilt through a third, which is not saved: the first to be dropped pays for it, so dropping
# both is a bargain, and options with one of them lie above the line.
SHARED = (
    [StageOp(5.0, (0,), (1,)), StageOp(4.0, (1,), (2,)), StageOp(6.5, (1,), (3,))],
    [StageValue(1, available=True), StageValue(1), StageValue(40, saved=True), StageValue(60, saved=True)],
)


def test_a_gap_between_vertices_is_split_where_there_is_room() -> None:
    assert hull(every_option(*SHARED)) == {(100, 0), (0, 15.5)}
    assert (60, 9.0) in front(every_option(*SHARED))  # further from the line than the one below
    assert sizes(choices(*SHARED, most=2)) == [(100, 0), (0, 15.5)]
    assert sizes(choices(*SHARED, most=3)) == [(100, 0), (40, 11.5), (0, 15.5)]


def test_a_gap_is_not_split_next_to_its_ends() -> None:
    """Of 4 bytes more at 0.7 seconds: close to the line, but hardly another option."""
    ops, values = [*SHARED[0], StageOp(0.7, (0,), (4,))], [*SHARED[1], StageValue(4, saved=True)]
    assert {(100, 0.7), (44, 11.5)} <= front(every_option(ops, values))
    assert sizes(choices(ops, values, most=4)) == [(104, 0), (44, 11.5), (4, 15.5), (0, 16.2)]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((2000, 1.0), [(2100, 0), (100, 1.0), (0, 16.5)]),  # few bytes
        ((100, 500.0), [(200, 0), (100, 15.5), (0, 515.5)]),  # few seconds
    ],
)
def test_a_narrow_gap_is_not_split(other: tuple[int, float], expected: list[tuple[int, float]]) -> None:
    ops, values = [*SHARED[0], StageOp(other[1], (0,), (4,))], [*SHARED[1], StageValue(other[0], saved=True)]
    assert sizes(choices(ops, values)) == expected


def test_what_is_not_proven_shows_as_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    def hurried(*args: Any, **settings: Any) -> Any:
        result = milp(*args, **settings)
        result.status, result.mip_dual_bound = 1, result.fun - 0.1
        return result

    monkeypatch.setattr("rematplan.scheduler.solvers.highs.milp", hurried)
    assert choices(*SHARED, most=2).gap == 0
    assert choices(*SHARED, most=3).gap == pytest.approx(0.1 * 15.5 / 11.5)


def test_too_many_vertices_lose_the_one_that_matters_least() -> None:
    """Rates of 1, 1.1 and 9 seconds a byte: the bend between the first two hardly shows."""
    values = [StageValue(10, saved=True) for _ in range(3)]
    ops = [StageOp(seconds, (), (v,)) for v, seconds in enumerate([10.0, 11.0, 90.0])]
    assert sizes(choices(ops, values, most=3)) == [(30, 0), (10, 21.0), (0, 111.0)]


def test_a_random_op_takes_all_random_ops_before_it_along() -> None:
    values = [StageValue(0, available=True), *(StageValue(8, saved=True) for _ in range(4))]
    ops = [StageOp(1.0, (v,), (v + 1,), random=v in {0, 2}) for v in range(4)]
    assert rerun_for(ops, values, {1, 2, 4}) == (0, 2)
    assert rerun_for(ops, values, {2, 3, 4}) == (0,)
    assert rerun_for(ops, values, {1, 2, 3}) == (3,)


def test_available_values_cost_nothing_and_pinned_ones_stay() -> None:
    values = [
        StageValue(100, saved=True, available=True),
        StageValue(8, saved=True),
        StageValue(4, True, pinned=True),
    ]
    ops = [StageOp(1.0, (0,), (1,)), StageOp(2.0, (1,), (2,))]
    assert sizes(choices(ops, values)) == [(12, 0), (4, 1.0)]


def test_a_chain_of_60_ops_takes_less_than_a_second() -> None:
    """Cheap and dear ops in turn; every third value is not saved, and some ops are random."""
    values = [StageValue(1, available=True)]
    values += [StageValue(10**7 + 7919 * i * i % 10**7, saved=i % 3 > 0) for i in range(60)]
    ops = [
        StageOp((1 + 6151 * i % 997) * (1e-3 if i % 4 == 0 else 1e-5), (i, i // 2), (i + 1,), i % 13 == 5)
        for i in range(60)
    ]
    start = time.perf_counter()
    found = choices(ops, values)
    assert time.perf_counter() - start < 1
    assert len(found.choices) == 8


def test_the_vertices_are_found_even_without_time() -> None:
    assert sizes(choices(*SHARED, time_limit=0)) == [(100, 0), (0, 15.5)]
    assert len(choices(*SHARED).choices) > 2


GOOD = [StageValue(1, available=True), StageValue(1, saved=True)]


@pytest.mark.parametrize(
    ("ops", "values", "message"),
    [
        ([StageOp(1.0, (1,), (1,))], GOOD, "no op before it writes"),
        ([StageOp(1.0, (0,), (0,))], GOOD, "there already"),
        ([StageOp(1.0, (0,), (1,)), StageOp(1.0, (0,), (1,))], GOOD, "there already"),
        ([StageOp(1.0, (0,), (2,))], GOOD, "expected 0 to 1"),
        ([StageOp(-1.0, (0,), (1,))], GOOD, "seconds=-1.0"),
        ([StageOp(float("nan"), (0,), (1,))], GOOD, "seconds=nan"),
        ([], GOOD, "no op writes it"),
        ([], [StageValue(-1)], "bytes=-1"),
        ([], [StageValue(1, pinned=True)], "pinned and not saved"),
    ],
)
def test_a_malformed_stage_is_refused(ops: list[StageOp], values: list[StageValue], message: str) -> None:
    with pytest.raises(ValueError, match=f"^choices: .*{message}"):
        choices(ops, values)


def test_wrong_arguments_are_refused() -> None:
    ops, values = [StageOp(1.0, (0,), (1,))], GOOD
    with pytest.raises(ValueError, match="most=1, expected 2 or more"):
        choices(ops, values, most=1)
