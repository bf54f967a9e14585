"""Chen's segments, recursive, periodic and selective: each its source's schedules, the fastest that fits."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Chain, Option, Stage
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Forward, Keep, Schedule
from rematplan.scheduler.solvers import solve_chain
from rematplan.scheduler.solvers.candidates import _costs, _price, fastest_fit, schedule_of
from tests.shared.chains import chains

SEGMENTED = ("chen", "recursive", "periodic")


def uniform(length: int, saved: list[int] | None = None) -> Chain:
    return Chain.from_arrays([1.0] * length, [2.0] * length, [1] * (length + 1), saved or [5] * length)


def blocks() -> Chain:
    """Three transformer blocks, attention and MLP each a stage."""
    names = [f"block.{i}.{part}" for i in range(3) for part in ("attention", "mlp")]
    return Chain.from_arrays([1.0] * 6, [2.0] * 6, [10] * 7, [40, 60] * 3, names=names)


# The slow, literal definitions


def runs_of(chain: Chain) -> list[tuple[int, int, bool]]:
    """(first, last, recomputable) of each maximal run of recomputable stages and of each other stage."""
    runs: list[tuple[int, int, bool]] = []
    for i, stage in enumerate(chain.stages):
        if runs and stage.recomputable and runs[-1][2]:
            runs[-1] = (runs[-1][0], i, True)
        else:
            runs.append((i, i, stage.recomputable))
    return runs


def segmented(segments: Iterable[tuple[int, int, bool]]) -> Schedule:
    """Segments first..last in order: kept as they run, or run again."""
    forward: list[Action] = []
    backward: list[Action] = []
    for first, last, again in segments:
        stages = range(first, last + 1)
        if again:
            forward += [Checkpoint(first), *(Forward(i) for i in stages[1:])]
        else:
            forward += [Keep(i) for i in stages]
        backward = [*(Keep(i) for i in stages if again), *(Backward(i) for i in reversed(stages)), *backward]
    return Schedule((*forward, *backward))


def algorithm_3(chain: Chain, limit: int) -> Schedule:
    """Chen et al., Algorithm 3, with b = limit; the last segment is kept."""
    segments = []
    for first, last, recomputable in runs_of(chain):
        start, gathered = first, 0
        for i in range(first, last + 1):
            gathered += chain.stages[i].options[0].saved
            if gathered > limit or i == last:
                segments.append((start, i, recomputable and i < len(chain) - 1))
                start, gathered = i + 1, 0
    return segmented(segments)


def chen_schedules(chain: Chain) -> Iterator[Schedule]:
    """Algorithm 3 for every b that can make a difference: the bytes of any stages in a row."""
    saved = [stage.options[0].saved for stage in chain.stages]
    sums = {sum(saved[i:j]) for i in range(len(saved)) for j in range(i, len(saved) + 1)}
    return (algorithm_3(chain, limit) for limit in {-1, *sums})


def recursive_schedule(chain: Chain, inner: int) -> Schedule:
    """Section 4.2 of Chen et al., literally recursive."""

    def reverse(first: int, last: int) -> list[Action]:
        if first == last:
            return [Keep(first), Backward(first)]
        size = last + 1 - first
        parts = min(inner + 1, size)
        short, longer = divmod(size, parts)  # ``longer`` parts are of one stage more
        starts = [first + p * short + min(p, longer) for p in range(parts)]
        actions: list[Action] = []
        for start, after in pairwise(starts):
            actions += [Checkpoint(start), *(Forward(i) for i in range(start + 1, after))]
        for start, after in reversed(list(zip(starts, [*starts[1:], last + 1], strict=True))):
            actions += reverse(start, after - 1)
        return actions

    forward: list[Action] = []
    backward: list[Action] = []
    for first, last, recomputable in runs_of(chain):
        if not recomputable:
            forward.append(Keep(first))
            backward = [Backward(first), *backward]
            continue
        if last < len(chain) - 1:
            forward += [Checkpoint(first), *(Forward(i) for i in range(first + 1, last + 1))]
        backward = [*reverse(first, last), *backward]
    return Schedule((*forward, *backward))


def periodic_schedule(chain: Chain, every: int) -> Schedule:
    """A checkpoint every so many stages of a run, all run again, unless that is the whole chain."""
    segments = [
        (start, min(start + every - 1, last), recomputable)
        for first, last, recomputable in runs_of(chain)
        for start in range(first, last + 1, every)
    ]
    if len(segments) == 1:
        segments = [(0, len(chain) - 1, False)]
    return segmented(segments)


def schedules(solver: str, chain: Chain) -> list[Schedule]:
    """The whole class of schedules among which the solver chooses."""
    numbers = range(1, len(chain) + 1)
    if solver == "chen":
        return list(chen_schedules(chain))
    make = recursive_schedule if solver == "recursive" else periodic_schedule
    return [make(chain, number) for number in numbers]


@pytest.mark.parametrize("solver", SEGMENTED)
@settings(max_examples=80)
@given(chain=chains(8), data=st.data())
@pytest.mark.slow
def test_the_fastest_of_the_class_is_found_and_its_smallest_budget(solver, chain, data):
    lines = [simulate(chain, schedule) for schedule in schedules(solver, chain)]
    smallest, largest = min(line.peak for line in lines), max(line.peak for line in lines)
    budget = data.draw(st.integers(max(smallest - 1, 1), largest + 1))
    fastest = min((line.seconds for line in lines if line.peak <= budget), default=math.inf)
    if fastest == math.inf:
        with pytest.raises(InfeasibleBudget) as caught:
            solve_chain(chain, budget, solver)
        assert caught.value.smallest == smallest
    else:
        assert simulate(chain, solve_chain(chain, budget, solver)).seconds == fastest


@given(chain=chains(8), data=st.data())
def test_a_given_period_gives_that_schedule(chain, data):
    every = data.draw(st.integers(1, 9))
    assert solve_chain(chain, 2**40, "periodic", every=every) == periodic_schedule(chain, every)


@given(chain=chains(8), data=st.data())
def test_selective_keeps_what_it_is_told_and_recomputes_runs_of_the_rest(chain, data):
    names = [stage.name for stage in chain.stages]
    keep = data.draw(st.sets(st.sampled_from(names), min_size=1))
    segments: list[tuple[int, int, bool]] = []
    for i, stage in enumerate(chain.stages):
        again = stage.recomputable and stage.name not in keep
        if segments and again and segments[-1][2]:
            segments[-1] = (segments[-1][0], i, True)
        else:
            segments.append((i, i, again))
    assert solve_chain(chain, 2**40, "selective", keep=keep) == segmented(segments)


@settings(max_examples=70)
@given(chain=chains(7), data=st.data())
def test_a_tree_is_priced_as_the_referee_prices_its_schedule(chain, data):
    last = len(chain) - 1
    if data.draw(st.booleans()):  # what is passed over decides the peak, not what is kept
        lean = [dataclasses.replace(stage, options=(Option(0),), input_grad=0) for stage in chain.stages]
        chain = dataclasses.replace(chain, stages=tuple(lean), output_grad=0)

    def draw(s: int, t: int) -> list[int]:
        ends = [
            j for j in range(s + 1, t + 1 + (t == last)) if all(x.recomputable for x in chain.stages[s:j])
        ]
        at = data.draw(st.sampled_from([0, *ends]))
        if at == 0:
            return [0, *(draw(s + 1, t) if s < t else [])]
        return [at, *(draw(at, t) if at <= t else []), *draw(s, at - 1)]

    def tree(s: int, t: int) -> list[int]:
        while len(found := draw(s, t)) > 60:  # the whole last segment again and again
            pass
        return found

    nodes = np.array(tree(0, last), np.int64)
    line = simulate(chain, schedule_of(nodes, len(chain)))
    seconds, peak = _price(_costs(chain, "test"), nodes)
    assert seconds == sum(runs * stage.forward for runs, stage in zip(line.runs, chain.stages, strict=True))
    assert max(peak, line.live[-1]) == line.peak


# Golden schedules


def test_chen_cuts_where_the_bytes_exceed_the_limit():
    chain = uniform(6, [3, 3, 10, 1, 1, 1])
    # Stages 0 and 1 save 6 bytes, stage 2 alone 10; what is left saves 3, is the last segment, and kept.
    expected = segmented([(0, 1, True), (2, 2, True), (3, 5, False)])
    assert algorithm_3(chain, 5) == expected
    assert solve_chain(chain, simulate(chain, expected).peak, "chen") == expected


def test_chen_keeps_all_where_that_fits():
    assert solve_chain(uniform(4), 2**40, "chen") == solve_chain(uniform(4), 2**40, "keep_all")


def test_recursive_halves_with_one_boundary_a_level():
    chain = uniform(4)
    halves = (Checkpoint(0), Forward(1), Checkpoint(2), Keep(3), Backward(3), Keep(2), Backward(2))
    again = (Checkpoint(0), Keep(1), Backward(1), Keep(0), Backward(0))
    assert recursive_schedule(chain, 1) == Schedule(halves + again)
    smallest = simulate(chain, Schedule(halves + again)).peak
    assert solve_chain(chain, smallest, "recursive") == Schedule(halves + again)


@pytest.mark.parametrize("levels", range(1, 9))
def test_recursive_holds_a_logarithm_of_boundaries(levels):
    length = 2**levels
    held: set[int] = {0}
    most = 0
    for action in recursive_schedule(uniform(length), 1):
        if isinstance(action, Checkpoint):
            held.add(action.stage)
        elif isinstance(action, Backward):
            held.discard(action.stage)
        most = max(most, len(held))
    assert most <= levels + 1


def test_periodic_reruns_every_segment_the_last_one_too():
    assert solve_chain(uniform(5), 2**40, "periodic", every=2) == segmented(
        [(0, 1, True), (2, 3, True), (4, 4, True)]
    )
    assert simulate(uniform(5), solve_chain(uniform(5), 2**40, "periodic", every=2)).runs == (2,) * 5


@pytest.mark.parametrize(
    "keep",
    [
        r"attention",
        re.compile(r"\.attention$"),
        lambda name: "attention" in name,
        [f"block.{i}.attention" for i in range(3)],
    ],
)
def test_selective_takes_a_pattern_a_predicate_or_names(keep):
    expected = segmented([(i, i, i % 2 == 1) for i in range(6)])
    assert solve_chain(blocks(), 2**40, "selective", keep=keep) == expected


def test_what_is_run_again_together_is_one_segment():
    chain = blocks()
    assert solve_chain(chain, 2**40, "selective", keep="block.1") == segmented(
        [(0, 1, True), (2, 2, False), (3, 3, False), (4, 5, True)]
    )


# Misuse


@pytest.mark.parametrize("every", [True, 2.0, "2"])
def test_a_period_that_is_no_int_is_a_type_error(every):
    with pytest.raises(TypeError, match="periodic: every="):
        solve_chain(uniform(3), 100, "periodic", every=every)


@pytest.mark.parametrize("every", [0, -1])
def test_a_period_below_one_is_a_value_error(every):
    with pytest.raises(ValueError, match="at least 1"):
        solve_chain(uniform(3), 100, "periodic", every=every)


def test_selective_needs_to_know_what_to_keep():
    with pytest.raises(TypeError, match="needs the parameter 'keep'"):
        solve_chain(uniform(3), 100, "selective")
    with pytest.raises(TypeError, match="keep=3 must be a function"):
        solve_chain(uniform(3), 100, "selective", keep=3)


def test_selective_refuses_names_and_patterns_that_match_nothing():
    with pytest.raises(ValueError, match=r"keep names block\.7; the chain has block\.0\.attention"):
        solve_chain(blocks(), 10**6, "selective", keep=["block.7", "block.0.mlp"])
    with pytest.raises(ValueError, match="matches no stage"):
        solve_chain(blocks(), 10**6, "selective", keep="attn")
    with pytest.raises(ValueError, match="regular expression"):
        solve_chain(blocks(), 10**6, "selective", keep="(")


@pytest.mark.parametrize("solver", SEGMENTED)
def test_sizes_that_would_overflow_are_refused(solver):
    chain = Chain.from_arrays([1.0], [1.0], [2**61, 2**61], [0])
    with pytest.raises(ValueError, match=rf"{solver}: the chain's sizes add up to"):
        solve_chain(chain, 2**62, solver)


def test_to_choose_from_nothing_is_refused():
    with pytest.raises(ValueError, match="no schedule to choose from"):
        fastest_fit(uniform(2), 100, [], "none")


# Speed


@pytest.mark.parametrize("solver", SEGMENTED)
def test_a_thousand_unlike_stages_are_searched_within_seconds(solver):
    rng = np.random.default_rng(0)
    saved = rng.integers(10**6, 10**9, 1000).tolist()
    chain = uniform(1000, saved)
    chain = dataclasses.replace(chain, fixed=10**9)
    with pytest.raises(InfeasibleBudget) as caught:
        solve_chain(chain, 1, solver)
    start = time.process_time()
    line = simulate(chain, solve_chain(chain, caught.value.smallest * 2, solver))
    assert time.process_time() - start < 5  # about 0.2 on an idle core
    assert line.peak <= caught.value.smallest * 2


@pytest.mark.parametrize("solver", [*SEGMENTED, "revolve", "exhaustive"])
def test_a_run_again_that_takes_more_bytes_than_the_first_is_within_the_budget(solver):
    option = Option(5, rerun_overhead=9)
    chain = Chain(tuple(Stage(str(i), 1.0, 1.0, 4, (option,), input_grad=1) for i in range(4)), 4, 1)
    with pytest.raises(InfeasibleBudget) as refused:
        solve_chain(chain, 1, solver)
    for budget in range(refused.value.smallest, refused.value.smallest + 15):
        solve_chain(chain, budget, solver)  # which has the referee compare peak and budget
