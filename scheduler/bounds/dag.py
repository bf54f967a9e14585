"""Describe a training step as a DAG of ops, forward and backward alike, and judge its plans.

An op reads values and writes values. The step is a row of *turns*: in each turn one of a few alternative ops
runs for the first time (as a rule the op itself is the only one), and turns follow a topological order. Any
op may run again later, unless it may run only once. A plan is a tuple of actions, inert data:

* ``Run(o)``: run op o; what it reads must be live; what it writes is live afterwards.
* ``Drop(v)``: release value v.

Memory rules. Live bytes are the fixed bytes, the live values, and the long-lived bytes of the turns taken.
While an op runs, all that it writes counts on top of what was live (a value that was live already counts a
second time: the second copy is released when the op is over), and its transient bytes too. The peak is taken
over all runs, and the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import TypeAlias

from rematplan.scheduler.core.chain import Chain

__all__ = ["Dag", "DagAction", "DagTimeline", "Drop", "Op", "Run", "Turn", "chain_dag", "simulate_dag"]


@dataclass(frozen=True, slots=True)
class Run:
    """Run op ``op``."""

    op: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Release value ``value``."""

    value: int


DagAction: TypeAlias = Run | Drop


@dataclass(frozen=True, slots=True)
class Op:
    """One op, or a few that always run together.

    Attributes:
        name: for people.
        seconds: of one run.
        reads: groups of values; of each group one value must be live. A plain input is a group of one.
        writes: values that are live after a run.
        transient: bytes that it takes while it runs, above what it writes.
        once: whether it may run only in its turn (backward ops, as a rule).
    """

    name: str
    seconds: float
    reads: tuple[tuple[int, ...], ...] = ()
    writes: tuple[int, ...] = ()
    transient: int = 0
    once: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """The first run of one of ``ops``.

    Attributes:
        ops: the alternatives, as numbers of ops.
        starts: long-lived bytes from the start of that run on.
        ends: long-lived bytes added when it is over; negative where it releases some.
    """

    ops: tuple[int, ...]
    starts: int = 0
    ends: int = 0


@dataclass(frozen=True, slots=True)
class Dag:
    """A whole training step.

    Attributes:
        ops: each in the order of its turn.
        sizes: (V,) bytes of each value.
        turns: in topological order; each op is in one of them.
        inputs: values that are live during the whole step.
        outputs: values that must be live at the end.
        fixed: bytes live during the whole step, ``inputs`` excluded.
        lasting: values that, once written, stay as they are until the last turn of an op that reads them.

    Raises:
        ValueError: a negative or non-integer size, a number out of range, an op in no turn or in two, an op
            that reads what no earlier turn and no input provides.
    """

    ops: tuple[Op, ...]
    sizes: tuple[int, ...]
    turns: tuple[Turn, ...]
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    fixed: int = 0
    lasting: frozenset[int] = frozenset()

    def __post_init__(self) -> None:  # noqa: C901 - one list of checks
        values = range(len(self.sizes))
        for size in (*self.sizes, *(op.transient for op in self.ops), self.fixed):
            if type(size) is not int or size < 0:
                raise ValueError(f"Dag: {size!r} must be an int of at least 0 (bytes)")
        for size in (size for turn in self.turns for size in (turn.starts, turn.ends)):
            if type(size) is not int:
                raise ValueError(f"Dag: the {size!r} of a turn must be an int (bytes)")
        if [o for turn in self.turns for o in turn.ops] != list(range(len(self.ops))):
            raise ValueError("Dag: the turns must name each op once, in order")
        if any(not turn.ops for turn in self.turns):
            raise ValueError("Dag: a turn must name at least one op")
        there = set(self.inputs)
        for turn in self.turns:
            for o in turn.ops:
                op = self.ops[o]
                if not isinstance(op.seconds, Real) or not 0 <= op.seconds < math.inf:
                    raise ValueError(
                        f"Dag: op {op.name!r}: seconds={op.seconds!r} must be finite and not negative"
                    )
                if not {*op.writes, *(v for group in op.reads for v in group)} <= set(values):
                    raise ValueError(f"Dag: op {op.name!r} names a value that is not in 0..{len(values) - 1}")
                if len({*op.writes}) < len(op.writes) or self.inputs & {*op.writes}:
                    raise ValueError(f"Dag: op {op.name!r} writes a value twice, or an input")
                if not all(there.intersection(group) for group in op.reads):
                    raise ValueError(f"Dag: op {op.name!r} reads what no earlier turn and no input provides")
            there.update(v for o in turn.ops for v in self.ops[o].writes)
        if not self.outputs <= there or not self.inputs <= set(values):
            raise ValueError("Dag: an output that nothing writes, or an input that is no value")
        if not self.lasting <= set(values):
            raise ValueError(
                f"Dag: lasting names {sorted(self.lasting.difference(values))}, which are no values"
            )

    @classmethod
    def plain(
        cls,
        ops: Iterable[Op],
        sizes: Iterable[int],
        inputs: Iterable[int] = (),
        outputs: Iterable[int] = (),
        fixed: int = 0,
    ) -> Dag:
        """Return a Dag without alternatives: each op has its turn, in the order given."""
        ops = tuple(ops)
        turns = tuple(Turn((o,)) for o in range(len(ops)))
        return cls(ops, tuple(sizes), turns, frozenset(inputs), frozenset(outputs), fixed)

    @property
    def base(self) -> list[int]:
        """(turns + 1,) fixed, input and long-lived bytes before each turn, and after the last."""
        always = self.fixed + sum(self.sizes[v] for v in self.inputs)
        return list(accumulate((turn.starts + turn.ends for turn in self.turns), initial=always))

    @property
    def last_use(self) -> list[int]:
        """(V,) the last turn of an op that reads the value, -1 if none does."""
        last = [-1] * len(self.sizes)
        for t, turn in enumerate(self.turns):
            for v in (v for o in turn.ops for group in self.ops[o].reads for v in group):
                last[v] = t
        return last

    @property
    def turn_of(self) -> list[int]:
        """(ops,) the turn of each op."""
        return [t for t, turn in enumerate(self.turns) for _ in turn.ops]


@dataclass(frozen=True, slots=True)
class DagTimeline:
    """The referee's account of a plan.

    Attributes:
        seconds: of the whole step.
        peak: the most bytes live at once.
        runs: (ops,) how often each op ran.
    """

    seconds: float
    peak: int
    runs: tuple[int, ...]


def simulate_dag(dag: Dag, plan: Iterable[DagAction]) -> DagTimeline:
    """Carry out ``plan`` on ``dag`` by the memory rules above. The one referee of such plans.

    Raises:
        ValueError: an action that cannot be carried out where it stands, a turn not taken, or an output that
            is not there at the end.
    """
    there = set(dag.inputs)
    live = peak = dag.base[0]
    last_use = dag.last_use
    runs = [0] * len(dag.ops)
    turn_of = dag.turn_of
    taken = [False] * len(dag.turns)
    seconds = 0.0
    for index, action in enumerate(plan):
        where = f"simulate_dag: action {index}, {action}"
        if isinstance(action, Drop):
            if action.value in dag.lasting and not all(taken[: last_use[action.value] + 1]):
                raise ValueError(
                    f"{where}: value {action.value} stays until turn {last_use[action.value]} is taken"
                )
            if action.value not in there or action.value in dag.inputs:
                raise ValueError(f"{where}: value {action.value} is not there, or is an input")
            there.remove(action.value)
            live -= dag.sizes[action.value]
            continue
        if not 0 <= action.op < len(dag.ops):
            raise ValueError(f"{where}: there is no such op; ops are 0..{len(dag.ops) - 1}")
        op, turn = dag.ops[action.op], dag.turns[turn_of[action.op]]
        first = not taken[turn_of[action.op]]
        if op.once and not first:
            raise ValueError(f"{where}: {op.name!r} may run only in its turn")
        fresh = [v for v in op.writes if v not in there]
        stay = dag.lasting.intersection(op.writes).difference(fresh)
        if any(not all(taken[: last_use[v] + 1]) for v in stay):
            raise ValueError(f"{where}: {op.name!r} writes a value that is there, and stays as it is")
        for group in op.reads:
            if not there.intersection(group):
                raise ValueError(f"{where}: {op.name!r} reads one of the values {group}, and none is there")
        live += turn.starts if first else 0
        peak = max(peak, live + op.transient + sum(dag.sizes[v] for v in op.writes))
        live += sum(dag.sizes[v] for v in fresh)
        live += turn.ends if first else 0
        there.update(op.writes)
        taken[turn_of[action.op]] = True
        runs[action.op] += 1
        seconds += op.seconds
    if not all(taken) or not dag.outputs <= there:
        raise ValueError(
            f"simulate_dag: at the end, turn {taken.index(False)} is not taken"
            if not all(taken)
            else f"simulate_dag: at the end, the outputs {sorted(dag.outputs - there)} are not there"
        )
    return DagTimeline(seconds, max(peak, live), tuple(runs))


def chain_dag(chain: Chain) -> Dag:
    """Return the chain as a Dag: L forward turns (``Forward`` or a ``Keep``), then L backward turns.

    x_i can be read as itself, or inside what stage i-1 keeps. The Dag prices every action as the chain's
    referee does. It differs in what it allows: it may hold a boundary without running the stage that reads
    it, which the chain's actions cannot say, and it may release a working boundary at any time.

    Raises:
        ValueError: the chain knows its values, or has negative sums: a Dag cannot say what goes early.
    """
    options = [option for stage in chain.stages for option in stage.options]
    if chain.values or any(
        o.saved < 0 or o.backward_overhead < 0 or o.rerun_overhead is not None for o in options
    ):
        raise ValueError(
            "chain_dag: the chain says of single values when they go, which a Dag of its stages cannot; pass a chain of sums"
        )
    length = len(chain)
    sizes = [chain.input_bytes(i) for i in range(length)]  # x_i, as value i
    ops: list[Op] = []
    turns: list[Turn] = []
    sources: list[tuple[int, ...]] = [(0,)]  # for each boundary, the values that it can be read from
    kept: list[list[int]] = []  # the value of each option of each stage

    def turn(alternatives: list[Op], starts: int, ends: int) -> None:
        turns.append(Turn(tuple(range(len(ops), len(ops) + len(alternatives))), starts, ends))
        ops.extend(alternatives)

    for i, stage in enumerate(chain.stages):
        kept.append(list(range(len(sizes), len(sizes) + len(stage.options))))
        sizes += [option.saved for option in stage.options]
        ways = [
            Op(
                f"keep {i} {k}",
                stage.forward,
                (sources[i],),
                (kept[i][k],),
                o.forward_overhead,
                not stage.recomputable,
            )
            for k, o in enumerate(stage.options)
        ]
        if stage.recomputable and i + 1 < length:
            ways.insert(0, Op(f"forward {i}", stage.forward, (sources[i],), (i + 1,), stage.forward_overhead))
        turn(ways, stage.carried, chain.output_grad if i == length - 1 else 0)
        sources.append((i + 1, *kept[i]) if stage.recomputable else tuple(kept[i]))
    gradient: tuple[tuple[int, ...], ...] = ()
    for i in range(length - 1, -1, -1):
        stage = chain.stages[i]
        if i > 0:
            sizes.append(stage.input_grad)
        writes = (len(sizes) - 1,) if i > 0 else ()
        # What goes with this backward: the gradient of x_L, or x_0; other gradients are values that are read
        # no more.
        gone = (chain.output_grad if i == length - 1 else 0) + (sizes[0] if i == 0 else 0)
        extra = 0 if i > 0 else stage.input_grad
        ways = [
            Op(
                f"backward {i} {k}",
                stage.backward + o.recompute,
                (sources[i], (kept[i][k],), *gradient),
                writes,
                o.backward_overhead + extra,
                once=True,
            )
            for k, o in enumerate(stage.options)
        ]
        turn(ways, 0, stage.retained - gone)
        gradient = (writes,)
    lasting = frozenset(v for values in kept for v in values)
    return Dag(tuple(ops), tuple(sizes), tuple(turns), frozenset({0}), frozenset(), chain.fixed, lasting)
