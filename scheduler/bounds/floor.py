"""Bound from below the seconds of any plan of a DAG within a budget, for thousands of ops.

Take one moment: the first run of turn t. What is live then is a set K of values, and with what that run
writes it fits the budget. Each later turn still has to run, and each value that an op reads later is in K, or
is written later: by a later turn, or by an op that runs again. So a plan gives a solution of

    minimise    seconds of the first runs from turn t on + seconds of the ops that run again, each once
    such that   each turn from t on has a first run;
                of each group read by an op that runs from then on, a value is in K or written from then on;
                of each group that the first run of turn t reads, a value is in K;
                each output is in K or written from then on;
                base bytes + bytes of K + bytes of the first run of turn t <= budget

and the least seconds of all solutions, with those of the turns before t, bound the plan's from below. K may
hold any value written before t, whether or not the backward reads it. The variables, all binary:

    f[o]  whether op o is the first run of its turn (turns from t on)
    r[o]  whether op o runs again after the moment
    k[v]  whether value v is in K

Where groups have one value, and values one writer, all rows but that of the bytes are differences of two
terms each (of r, f and k[v] + r of the writer of v): a minimum cut, whose matrix is totally unimodular. The
linear relaxation is then the Lagrangian bound at the best price per byte, and loses at most one step of a
knapsack; HiGHS (scipy.optimize.milp) closes most of that. The bound is HiGHS's dual bound, which holds when
it is stopped early, less its tolerance.

Claim: the bound holds for all plans that ``simulate_dag`` accepts and which take the turns before t first,
and turn t next: a wider class than that of ``solve_dag``, for ops may run again in any order and any number
of times. (In a training step, with t the first backward turn, these are all plans: the loss exists before it
is reversed. With t a later one, all whose backward follows the order of the turns, as autograd's does.)
Values that live anyway (``inputs``) are free. That values are released at different times later does not
matter.

What is lost: runs before the moment and second runs after it are not counted, nor is the memory that the runs
after it take. A tighter bound would follow K from one turn to the next, as ``solve_dag`` does. ``lasting`` is
not used.

Sources: the one moment relaxes Jain et al. 2020, *Checkmate*, arXiv:1910.02653 (it keeps one of their
phases); minimum cut: Picard 1976, *Maximal closure of a graph and applications to combinatorial problems*,
Management Science 22(11).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from rematplan.scheduler.bounds.dag import Dag
from rematplan.scheduler.solvers.checks import checked_budget, checked_time_limit
from rematplan.scheduler.solvers.highs import Program

__all__ = ["Floor", "dag_floor"]

TOLERANCE = 1e-6  # of HiGHS, relative to the seconds of all ops


@dataclass(frozen=True, slots=True)
class Floor:
    """A bound on all plans within a budget.

    Attributes:
        seconds: that no plan beats; inf if nothing fits.
        extra: of them, above the least seconds in which all turns run once.
        turn: the moment at which the bound is best.
        rerun: the ops that run again in the best solution that was found for that moment, in order; empty if
            none was found in time.
        rerun_seconds: of ``rerun``; more than ``extra`` by what the time limit or the tolerance left open.
    """

    seconds: float
    extra: float
    turn: int
    rerun: tuple[int, ...]
    rerun_seconds: float


def dag_floor(
    dag: Dag, memory_budget: int, *, turns: Iterable[int] | None = None, time_limit: float = 10.0
) -> Floor:
    """Bound from below the seconds of any plan of ``dag`` within ``memory_budget``, at some moments.

    Args:
        dag: up to some thousand ops.
        memory_budget: bytes of the whole step.
        turns: the moments to try. Default: the first turn of an op that may run only once (the first
            backward, as a rule; turn 0 if there is none), and from there on the one at which most bytes are
            live when all that is read later is kept.
        time_limit: seconds of HiGHS for each moment.

    Raises:
        TypeError, ValueError: no Dag; ``memory_budget`` is no int or not in 1 .. 2**63 - 1; a turn out of
            range; ``time_limit`` is not positive and finite.

    Example:
        >>> from rematplan import Dag, Op
        >>> loss, grad = Op("loss", 1.0, ((0,),), (1,)), Op("grad", 2.0, ((0,), (1,)), (2,), once=True)
        >>> dag_floor(Dag.plain([loss, grad], [4, 8, 4], inputs=[0], outputs=[2]), 16).seconds
        3.0
    """
    if not isinstance(dag, Dag):
        raise TypeError(f"dag_floor: dag={dag!r} must be a Dag; chain_dag makes one of a Chain")
    budget = checked_budget("dag_floor", memory_budget)
    limit = checked_time_limit("dag_floor", time_limit)
    tried = tuple(dict.fromkeys(_moments(dag) if turns is None else turns))
    for turn in tried:
        if turn not in range(len(dag.turns)):
            raise ValueError(
                f"dag_floor: turns names {turn!r}, expected one of the turns 0 .. {len(dag.turns) - 1}"
            )
    least = math.fsum(min(dag.ops[o].seconds for o in turn.ops) for turn in dag.turns)
    best = Floor(least, 0.0, -1, (), 0.0)
    for turn in tried:
        extra, rerun = _at(dag, budget, turn, limit)
        if extra > best.extra or best.turn < 0:
            spent = math.fsum(dag.ops[o].seconds for o in rerun)
            best = Floor(least + extra, extra, turn, rerun, spent)
    return best


def _own(dag: Dag, o: int) -> int:
    """Return bytes that a run of an op takes on top of what was live."""
    return dag.ops[o].transient + sum(dag.sizes[v] for v in dag.ops[o].writes)


def _moments(dag: Dag) -> list[int]:
    """Return the turns that ``dag_floor`` tries by default."""
    if not dag.turns:
        return []
    turn_of, last = dag.turn_of, dag.last_use
    kept = [0] * (len(dag.turns) + 1)  # by how much the bytes that are read later change before each turn
    first: dict[int, int] = {}
    for o, op in enumerate(dag.ops):
        for v in op.writes:
            first.setdefault(v, turn_of[o])
    for v, made in first.items():
        until = len(dag.turns) - 1 if v in dag.outputs else last[v]
        if until > made:
            kept[made + 1] += dag.sizes[v]
            kept[until + 1] -= dag.sizes[v]
    live = [base + size for base, size in zip(dag.base, accumulate(kept), strict=True)]
    for t, turn in enumerate(dag.turns):
        live[t] += turn.starts + min(_own(dag, o) for o in turn.ops)
    once = next((turn_of[o] for o, op in enumerate(dag.ops) if op.once), 0)
    return [once, max(range(once, len(dag.turns)), key=live.__getitem__)]


def _at(dag: Dag, budget: int, turn: int, time_limit: float) -> tuple[float, tuple[int, ...]]:  # noqa: C901 - a program written row by row
    """Bound the extra seconds at one moment, inf if nothing fits; and name the ops that run again."""
    turn_of = dag.turn_of
    total = math.fsum(op.seconds for op in dag.ops) or 1.0
    program = Program()
    written: dict[int, list[int]] = {}  # value -> variables of the runs that write it from the moment on
    keep = {
        v: program.variable()
        for v in sorted({v for o, op in enumerate(dag.ops) if turn_of[o] < turn for v in op.writes})
    }
    first: dict[int, int] = {}
    again: dict[int, int] = {}
    for o, op in enumerate(dag.ops):
        alternatives = dag.turns[turn_of[o]].ops
        if turn_of[o] >= turn:
            first[o] = program.variable((op.seconds - min(dag.ops[a].seconds for a in alternatives)) / total)
        if not op.once and (turn_of[o] < turn or len(alternatives) > 1):
            again[o] = program.variable(op.seconds / total)
        for v in op.writes:
            written.setdefault(v, []).extend(x[o] for x in (first, again) if o in x)
    for t in range(turn, len(dag.turns)):
        ways = [first[o] for o in dag.turns[t].ops]
        program.row(ways, [1.0] * len(ways), 1.0, 1.0)
    for o, op in enumerate(dag.ops):
        for group in op.reads:
            if dag.inputs.intersection(group):
                continue
            kept = [keep[v] for v in group if v in keep]
            made = [x for v in group for x in written.get(v, ())]
            runs = [(first[o], kept if turn_of[o] == turn else kept + made)] if o in first else []
            runs += [(again[o], kept + made)] if o in again else []
            for x, there in runs:
                program.row([x, *there], [1.0, *([-1.0] * len(there))], most=0.0)
    for v in dag.outputs - dag.inputs:
        there = [keep[v]] if v in keep else []
        program.row([*there, *written[v]], [1.0] * (len(there) + len(written[v])), least=1.0)
    room = budget - dag.base[turn] - dag.turns[turn].starts
    if room < 0:
        return math.inf, ()
    weights = {x: dag.sizes[v] for v, x in keep.items()}
    weights |= {first[o]: _own(dag, o) for o in dag.turns[turn].ops}
    unit = max(room, 1)  # HiGHS's tolerances then let in a few millionths of the room at most
    program.row(list(weights), [size / unit for size in weights.values()], most=room / unit)
    result = program.solve(time_limit, 1e-3)
    if result.status == 2:
        return math.inf, ()
    bound = 0.0 if result.mip_dual_bound is None else max(0.0, float(result.mip_dual_bound) - TOLERANCE)
    rerun = () if result.x is None else tuple(o for o, x in again.items() if result.x[x] > 0.5)
    return bound * total, rerun
