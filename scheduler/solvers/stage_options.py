"""Find the options of one stage: which saved values to keep, and the ops that rebuild the others. Torch-free.

A stage is a list of ops in the order in which they run. An option keeps some of the values that autograd
saved; the others are rebuilt just before the backward:

* the producer of a dropped value runs again;
* what an op reads when it runs again is available, or kept, or its producer runs again too;
* a random op runs again only after all random ops before it: they share the generator state of the stage's
  start.

An option costs the seconds of what runs again, and takes the bytes of what is kept. The transient bytes of a
rebuild are not judged here.

How the choices are found. Of the options with the same ops run again, the smallest drops every value that
they write and that may be dropped. So an option is a set R of ops, with seconds s(R) and freed bytes b(R),
and two rules: with an op, R has the producers of the *unsaved* values that it reads, and the random ops
before it. (A saved value that it reads is kept, or is dropped because its producer is in R.) Hence R is a
closure, and at a price per byte the best option is a closure of the greatest weight: a minimum cut. Source:
Picard 1976, *Maximal closure of a graph and applications to combinatorial problems*, Management Science
22(11).

The vertices of the lower convex hull are the best options at some price. The closures that are best grow with
the price, so that a search between two vertices cuts only the ops by which they differ, at the price at which
both cost the same: a better closure is a further vertex, or there is none. All of it in exact integers.
Between vertices no price finds the options: that is a knapsack with precedences, NP-hard, solved by HiGHS
(scipy.optimize.milp).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from numbers import Integral, Real
from typing import NamedTuple

import networkx as nx

from rematplan.scheduler.solvers.highs import Program

__all__ = ["Choice", "Choices", "StageOp", "StageValue", "choices"]


@dataclass(frozen=True, slots=True)
class StageOp:
    """One op of a stage.

    Attributes:
        seconds: of one run.
        reads: values that it needs.
        writes: values that it makes, internal tensors that autograd saves among them.
        random: whether it draws random numbers.
    """

    seconds: float
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    random: bool = False


@dataclass(frozen=True, slots=True)
class StageValue:
    """One value of a stage.

    Attributes:
        bytes: that it takes while it is kept.
        saved: whether autograd keeps it for the backward.
        available: there at any time at no cost, and written by no op: an input of the stage, a parameter.
        pinned: saved, and cannot be dropped: the output of the stage, say.
    """

    bytes: int
    saved: bool = False
    available: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of a stage.

    Attributes:
        kept: the saved values that stay; available ones are not among them.
        rerun: the ops that run again before the backward, in order.
        bytes: of ``kept``.
        seconds: of ``rerun``.
    """

    kept: frozenset[int]
    rerun: tuple[int, ...]
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of a stage that matter.

    Attributes:
        choices: the first keeps all; each next one takes fewer bytes and, save where it costs nothing, more
            seconds; the last takes the fewest bytes possible.
        gap: share by which the seconds of a choice may exceed the least for its bytes; 0 if all are proven
            to be optimal (vertices of the hull always are, others to HiGHS's tolerance of 1e-6).
    """

    choices: tuple[Choice, ...]
    gap: float


def choices(
    ops: Sequence[StageOp], values: Sequence[StageValue], most: int = 8, time_limit: float = 1.0
) -> Choices:
    """Return the options of one stage that matter, at most ``most``.

    The rule:

    1. The first keeps all saved values. The last takes the fewest bytes, and of those the least seconds (a
       value of no bytes is kept where that saves a run).
    2. Between them come the vertices of the lower convex hull of (bytes, seconds). While there are too many,
       the one goes that spans the smallest triangle with its neighbours: the seconds lost, summed over all
       byte budgets, are the least.
    3. If there is room, the gap that is widest by bytes times seconds is split, then the next. Only gaps that
       span more than 1/``most`` of the whole both in bytes and in seconds are. In goes the option closest to
       the line across the gap, of those that save a quarter or more of the gap's bytes and a quarter or more
       of its seconds; where there is none, the gap stays.

    Every choice is Pareto optimal, save that the first is beaten where something can be rebuilt for nothing.

    Args:
        ops: in the order in which they run.
        values: which the ops name by position.
        most: number of choices, 2 or more.
        time_limit: seconds for the options between vertices, all in all. If it strikes, fewer choices or a
            ``gap`` come back, and another run may differ; the vertices are always found.

    Raises:
        ValueError: the stage is malformed, or ``most`` is below 2.
    """
    if most < 2:
        raise ValueError(f"choices: most={most}, expected 2 or more: the first and the last are always there")
    deadline = time.monotonic() + time_limit
    producer = _producers("choices", ops, values)
    saved = frozenset(v for v in producer if values[v].saved)
    stage = _Closures(ops, values, producer, saved)
    points = stage.hull()

    def area(i: int) -> int:
        """Return twice the area of the triangle of points i-1, i and i+1."""
        a, b, c = points[i - 1 : i + 2]
        return (b.freed - a.freed) * (c.seconds - a.seconds) - (c.freed - a.freed) * (b.seconds - a.seconds)

    while len(points) > most:
        del points[min(range(1, len(points) - 1), key=area)]

    gap = 0.0
    tried = set()
    while len(points) < most:
        wide = [
            ((b.freed - a.freed) * (b.seconds - a.seconds), i)
            for i, (a, b) in enumerate(pairwise(points), 1)
            if (b.freed - a.freed) * most > points[-1].freed
            and (b.seconds - a.seconds) * most > points[-1].seconds
            and (a, b) not in tried
        ]
        remaining = deadline - time.monotonic()
        if not wide or remaining <= 0:
            break
        i = max(wide)[1]
        low, high = points[i - 1 : i + 1]
        tried.add((low, high))
        found, doubt = stage.between(low, high, remaining)
        if found is not None:
            points.insert(i, found)
            gap = max(gap, doubt)
    made = []
    for point in points:
        kept = saved - stage.dropped(point.rerun)
        size = sum(int(values[v].bytes) for v in kept)
        made.append(
            Choice(kept, tuple(sorted(point.rerun)), size, math.fsum(ops[o].seconds for o in point.rerun))
        )
    return Choices(tuple(made), gap)


def _producers(call: str, ops: Sequence[StageOp], values: Sequence[StageValue]) -> dict[int, int]:  # noqa: C901 - one walk, with its refusals
    """Return the op that writes each value; a ValueError if the stage is malformed."""
    for v, value in enumerate(values):
        if not isinstance(value.bytes, Integral) or value.bytes < 0:
            raise ValueError(f"{call}: value {v} has bytes={value.bytes!r}, expected an integer, 0 or more")
        if value.pinned and not value.saved:
            raise ValueError(f"{call}: value {v} is pinned and not saved; pin only what autograd saves")
    producer: dict[int, int] = {}
    for o, op in enumerate(ops):
        if not isinstance(op.seconds, Real) or not 0 <= op.seconds < math.inf:
            raise ValueError(f"{call}: op {o} has seconds={op.seconds!r}, expected finite, 0 or more")
        for v in (*op.reads, *op.writes):
            if not 0 <= v < len(values):
                raise ValueError(
                    f"{call}: op {o} names value {v}, expected 0 to {len(values) - 1}; list it in values"
                )
        for v in op.reads:
            if not values[v].available and v not in producer:
                raise ValueError(
                    f"{call}: op {o} reads value {v}, which no op before it writes; list the ops in order, "
                    "or mark what comes from outside as available"
                )
        for v in op.writes:
            if values[v].available or v in producer:
                raise ValueError(
                    f"{call}: op {o} writes value {v}, which is there already; give each version a value of its own"
                )
            producer[v] = o
    for v, value in enumerate(values):
        if value.saved and not value.available and v not in producer:
            raise ValueError(
                f"{call}: value {v} is saved and no op writes it; add its op, or mark it available"
            )
    return producer


def _needs(ops: Sequence[StageOp], producer: dict[int, int], kept: Collection[int]) -> list[set[int]]:
    """For each op the earlier ops that must run again if it does, while ``kept`` is there."""
    needs = []
    last_random: set[int] = set()
    for o, op in enumerate(ops):
        needs.append({producer[v] for v in op.reads if v in producer and v not in kept})
        if op.random:
            needs[o] |= last_random
            last_random = {o}
    return needs


def _closure(needs: list[set[int]], wanted: Iterable[int]) -> frozenset[int]:
    """Return ``wanted`` and all that it needs."""
    found: set[int] = set()
    queue = list(wanted)
    while queue:
        o = queue.pop()
        if o not in found:
            found.add(o)
            queue += needs[o]
    return frozenset(found)


class _Point(NamedTuple):
    """A closure: the bytes that it frees, its seconds in units of ``_Closures``, and its ops."""

    freed: int
    seconds: int
    rerun: frozenset[int]


class _Closures:
    """The sets of ops to run again. Seconds are integers here, in a unit that makes them exact."""

    def __init__(
        self,
        ops: Sequence[StageOp],
        values: Sequence[StageValue],
        producer: dict[int, int],
        saved: frozenset[int],
    ) -> None:
        self.needs = _needs(ops, producer, saved)
        self.droppable = [
            frozenset(v for v in op.writes if v in saved and not values[v].pinned) for op in ops
        ]
        self.freed = [sum(int(values[v].bytes) for v in droppable) for droppable in self.droppable]
        exact = [Fraction(float(op.seconds)) for op in ops]
        unit = math.lcm(*(seconds.denominator for seconds in exact))
        self.seconds = [int(seconds * unit) for seconds in exact]

    def dropped(self, rerun: Iterable[int]) -> frozenset[int]:
        """Return the values to drop when ``rerun`` runs: all that it can rebuild."""
        return frozenset().union(*(self.droppable[o] for o in rerun))

    def point(self, rerun: Iterable[int]) -> _Point:
        """Return the least closure that frees as many bytes as ``rerun``."""
        least = _closure(self.needs, (o for o in rerun if self.freed[o]))
        return _Point(sum(self.freed[o] for o in least), sum(self.seconds[o] for o in least), least)

    def hull(self) -> list[_Point]:
        """Return the vertices, by freed bytes: from nothing to all."""
        nothing, everything = self.point(()), self.point(range(len(self.needs)))
        found = {nothing, everything}
        stack = [(nothing, everything)]
        while stack:
            low, high = stack.pop()
            better = self._cut(low, high)
            if better:
                middle = self.point(low.rerun | better)
                found.add(middle)
                stack += [(low, middle), (middle, high)]
        return sorted(found, key=lambda point: point.freed)

    def _cut(self, low: _Point, high: _Point) -> set[int]:
        """Return what to add to ``low`` where ``high`` costs the same a byte; empty if nothing is better."""
        inside = high.rerun - low.rerun
        seconds, freed = high.seconds - low.seconds, high.freed - low.freed
        graph = nx.DiGraph()
        source, sink = -1, -2
        graph.add_nodes_from((source, sink))
        gains = 0
        for o in sorted(inside):
            weight = seconds * self.freed[o] - freed * self.seconds[o]
            if weight > 0:
                gains += weight
                graph.add_edge(source, o, capacity=weight)
            else:
                graph.add_edge(o, sink, capacity=-weight)
            for need in self.needs[o] & inside:
                graph.add_edge(o, need)  # no capacity: never cut
        losses, (chosen, _) = nx.minimum_cut(graph, source, sink)
        return chosen - {source} if gains > losses else set()

    def between(self, low: _Point, high: _Point, time_limit: float) -> tuple[_Point | None, float]:
        """Return the option between two others that ``choices`` describes, if any, and its gap.

        The least of seconds minus freed bytes, each in units of the gap, under a least of freed bytes and a
        most of seconds: an option that beat it would meet both as well, so it is Pareto optimal.
        """
        seconds, freed = high.seconds - low.seconds, high.freed - low.freed
        ops = sorted(self.point(range(len(self.needs))).rerun)
        program = Program()
        at = {o: program.variable(self.seconds[o] / seconds - self.freed[o] / freed) for o in ops}
        for o in ops:
            for need in self.needs[o]:
                program.row([at[o], at[need]], [-1.0, 1.0], least=0.0)
        freeing, slow = [o for o in ops if self.freed[o]], [o for o in ops if self.seconds[o]]
        least, most = low.freed / freed + 0.25, high.seconds / seconds - 0.25
        program.row([at[o] for o in freeing], [self.freed[o] / freed for o in freeing], least=least)
        program.row([at[o] for o in slow], [self.seconds[o] / seconds for o in slow], most=most)
        result = program.solve(time_limit, 0.0)
        if result.x is None:
            return None, 0.0
        found = self.point(o for o, x in zip(ops, result.x, strict=True) if x > 0.5)
        if not (low.freed < found.freed < high.freed and low.seconds < found.seconds < high.seconds):
            return None, 0.0  # HiGHS ran out of time, or its tolerance let it astray
        doubt = 0.0 if result.status == 0 else max(0.0, result.fun - result.mip_dual_bound)
        return found, doubt * (seconds / found.seconds)
