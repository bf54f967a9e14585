"""Random Dags of ops, and the seconds of their fastest plans, by Dijkstra over sets of values."""

from __future__ import annotations

import heapq
import math
from itertools import count

from hypothesis import strategies as st

from rematplan.scheduler.bounds.dag import Dag, Op, Turn

__all__ = ["DIAMOND", "dags", "fastest"]

# Two branches from one input: b is large and cheap, and in the way while c runs.
DIAMOND = Dag.plain(
    [
        Op("a", 1.0, ((0,),), (1,)),
        Op("b", 1.0, ((1,),), (2,)),
        Op("c", 4.0, ((1,),), (3,), transient=4),
        Op("d", 1.0, ((2,), (3,)), (4,), once=True),
    ],
    [1, 2, 6, 5, 1],
    inputs=[0],
    outputs=[4],
)


@st.composite
def dags(draw: st.DrawFn) -> Dag:
    """Up to five turns of one or two ops, which read earlier values and write one or two of six."""

    def size(most: int = 5) -> int:
        return draw(st.integers(0, most))

    ops: list[Op] = []
    turns: list[Turn] = []
    sizes = [size()]
    for _ in range(draw(st.integers(1, 5))):
        first = len(sizes)
        known = st.integers(0, first - 1)
        sizes += [size() for _ in range(draw(st.integers(1, 2)))]
        written = tuple(range(first, len(sizes)))
        ways = draw(st.sampled_from([1, 1, 2]))
        groups = st.lists(st.lists(known, min_size=1, max_size=2, unique=True), max_size=2)
        for _ in range(ways):
            reads = tuple(tuple(group) for group in draw(groups))
            writes = tuple(sorted(draw(st.sets(st.sampled_from(written), min_size=1))))
            ops.append(Op(str(len(ops)), float(size(9)), reads, writes, size(), draw(st.booleans())))
        turns.append(Turn(tuple(range(len(ops) - ways, len(ops))), size(3), draw(st.integers(-3, 3))))
        if not all(
            v in op.writes for op in ops[-ways:] for v in written
        ):  # nobody may rely on what may be missing
            ops[-ways:] = [
                Op(op.name, op.seconds, op.reads, written, op.transient, op.once) for op in ops[-ways:]
            ]
    lasting = draw(st.sets(st.integers(1, len(sizes) - 1), max_size=2))
    return Dag(
        tuple(ops),
        tuple(sizes),
        tuple(turns),
        frozenset({0}),
        frozenset({len(sizes) - 1}),
        2 + size(),  # so that one byte is too little
        frozenset(lasting),
    )


def fastest(dag: Dag, budget: int) -> float:
    """Least seconds of the class that ``bounds.milp`` claims, by Dijkstra; inf if nothing fits."""
    always = sum(dag.sizes[v] for v in dag.inputs) + dag.fixed
    turn_of, last_use = dag.turn_of, dag.last_use
    tie = count()
    queue: list[tuple[float, int, int, int, frozenset[int]]] = [(0.0, next(tie), 0, -1, frozenset())]
    seen: set[tuple[int, int, frozenset[int]]] = set()
    while queue:
        seconds, _, taken, after, there = heapq.heappop(queue)
        if (taken, after, there) in seen:
            continue
        seen.add((taken, after, there))
        live = always + sum(dag.sizes[v] for v in there)
        live += sum(turn.starts + turn.ends for turn in dag.turns[:taken])
        if taken == len(dag.turns):
            if dag.outputs <= there | dag.inputs and live <= budget:
                return seconds
        else:
            for o, op in enumerate(dag.ops[: dag.turns[taken].ops[-1] + 1]):
                first = turn_of[o] == taken
                if o <= after or (op.once and not first):
                    continue
                if not all(there.union(dag.inputs).intersection(group) for group in op.reads):
                    continue
                if any(last_use[v] >= taken for v in dag.lasting & there & frozenset(op.writes)):
                    continue
                during = live + op.transient + sum(dag.sizes[v] for v in op.writes)
                if during + (dag.turns[taken].starts if first else 0) <= budget:
                    reached = (taken + 1, -1) if first else (taken, o)
                    queue_item = (seconds + op.seconds, next(tie), *reached, there | frozenset(op.writes))
                    heapq.heappush(queue, queue_item)
        for v in there:
            if v not in dag.lasting or last_use[v] < taken:
                heapq.heappush(queue, (seconds, next(tie), taken, after, there - {v}))
    return math.inf
