"""Find the fastest plan of a small DAG within a budget by mixed-integer programming, with a proven bound.

Source: Jain et al. 2020, *Checkmate: breaking the memory wall with optimal tensor rematerialization*,
arXiv:1910.02653: the frontier-advancing partition, and memory as linear recurrences. Solved by HiGHS
(scipy.optimize.milp).

Phase t ends with turn t, and runs ops of earlier turns again before it, each at most once and in order:

    R[t, o]  whether op o runs in phase t                                         binary
    P[t, v]  whether value v is live when phase t begins                           binary
    P[t, o, v]  the same just after op o, for each v that o reads or writes        0 .. 1
    U[t, o]  bytes of all values just after op o

    R[t, o] <= sum of P[v] over each group that o reads, just before o
    P[t, o, v] <= P[v] just before o, plus R[t, o] where o writes v
    U[t, o] = U just before o + sum of bytes_v * (change of P[v] at o)
    base + U just before o + R[t, o] * (bytes written + transient) <= budget

Checkmate's FREE[t, o, v] is P just before o minus P just after: bounded by both on either side, without
products, big constants or a constraint left out. With R and the binary P fixed, the least P is 0 or 1
throughout, except for values that share a group with others; those are binary everywhere. Values that are of
no more use, and ops that write nothing else, are fixed to 0. The bytes agree with ``simulate_dag`` to the
last one, and it judges every plan: where HiGHS's tolerance let a plan slip over the budget, the problem is
solved again under a budget that is lower by the slip.

Claim: ``lower_bound`` holds for, and an optimal plan is the fastest of, all plans whose first runs follow the
order of the turns, and which between two first runs run other ops in that order, each at most once
(Checkmate's class; drops may come anywhere). A plan outside it may be faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rematplan.scheduler.bounds.dag import Dag, DagAction, Drop, Run, chain_dag, simulate_dag
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.solvers.checks import checked_budget, checked_chain, checked_time_limit
from rematplan.scheduler.solvers.highs import Program

__all__ = ["DagOptimum", "milp_bound", "relaxed_seconds", "solve_dag"]

ATTEMPTS = 5  # to get HiGHS's plan under the budget to the last byte
GAP = 1e-9  # relative, at which HiGHS stops


@dataclass(frozen=True, slots=True)
class DagOptimum:
    """The outcome of ``solve_dag``.

    Attributes:
        plan: within the budget by ``simulate_dag``.
        seconds, peak: of that plan, by the same.
        lower_bound: seconds that no plan of the class beats, proven by HiGHS to its tolerance (1e-6).
    """

    plan: tuple[DagAction, ...]
    seconds: float
    peak: int
    lower_bound: float

    @property
    def gap(self) -> float:
        """By how much ``seconds`` may exceed the optimum, as a share of ``seconds``; 0 if it is optimal."""
        return 0.0 if self.seconds == 0 else max(0.0, 1 - self.lower_bound / self.seconds)


def _useful_until(dag: Dag) -> tuple[list[int], list[int]]:
    """Return the last phase in which each op can be of use, and in which each value can."""
    turn_of = dag.turn_of
    ops = list(turn_of)
    values = [len(dag.turns) if v in dag.outputs else -1 for v in range(len(dag.sizes))]
    for o in range(len(dag.ops) - 1, -1, -1):
        op = dag.ops[o]
        if not op.once:
            ops[o] = max([turn_of[o], *(min(values[v], len(dag.turns) - 1) for v in op.writes)])
        for group in op.reads:
            for v in group:
                values[v] = max(values[v], ops[o])
    return ops, values


class _Model(Program):
    """The program of one Dag."""

    def __init__(self, dag: Dag, budget: int | None, most_seconds: float) -> None:
        """Minimise the seconds within a ``budget``, without one the peak."""
        super().__init__()
        self.dag = dag
        self.run: dict[tuple[int, int], int] = {}  # (phase, op) -> variable
        self.start: list[dict[int, int]] = []  # phase -> value -> variable
        self.before: dict[tuple[int, int, int], int] = {}  # (phase, op, value) -> variable of P just before
        base = dag.base
        sizes = [*dag.sizes, *(op.transient for op in dag.ops), *(abs(b - base[0]) for b in base)]
        sizes += [abs(turn.starts) for turn in dag.turns]
        sizes += [] if budget is None else [max(budget - base[0], 0)]
        # Bytes in units of the greatest common divisor, or of a millionth of the whole if that is too small.
        self.unit = max(math.gcd(*sizes) or 1, max(sizes) / 1e6)
        total = sum(op.seconds for op in dag.ops) or 1.0
        self.second = total
        self.room = None if budget is None else budget - base[0]
        timed = budget is not None
        self.peak = -1 if timed else self.variable(1.0, math.inf, integer=False)
        self._fill(base, timed)
        if timed and most_seconds < math.inf:
            at = [x for x, c in enumerate(self.cost) if c]
            self.row(at, [self.cost[x] for x in at], most=most_seconds / total)

    def _within(self, at: list[int], factors: list[float], extra: int) -> None:
        """Demand that the bytes ``extra`` and those of the variables fit."""
        if self.room is None:
            self.row([*at, self.peak], [*factors, -1.0], most=-extra / self.unit)
        else:
            self.row(at, factors, most=(self.room - extra) / self.unit)

    def _fill(self, base: list[int], timed: bool) -> None:  # noqa: C901 - a program written row by row
        dag = self.dag
        op_until, value_until = _useful_until(dag)
        weight = [size / self.unit for size in dag.sizes]
        shared = {v for op in dag.ops for group in op.reads if len(group) > 1 for v in group}
        turn_of, last_use = dag.turn_of, dag.last_use
        there: dict[int, int] = {}  # value -> variable of its presence now
        used = -1  # variable of the bytes of all values now; -1 while there are none
        for t, turn in enumerate(dag.turns):
            begin = {}
            stay = {v for v in dag.lasting if last_use[v] >= t}
            for v, last in there.items():
                if value_until[v] < t:
                    continue
                begin[v] = self.variable()
                self.row([begin[v], last], [1.0, -1.0], 0.0 if v in stay else -math.inf, 0.0)
            there = begin
            self.start.append(dict(begin))
            used = self.variable(upper=math.inf, integer=False)
            self.row([used, *there.values()], [1.0, *(-weight[v] for v in there)], 0.0, 0.0)
            self._within([used], [1.0], base[t] - base[0])
            for o in range(turn.ops[-1] + 1):
                op, first = dag.ops[o], turn_of[o] == t
                if not first and (op.once or op_until[o] < t):
                    continue
                run = self.run[t, o] = self.variable(op.seconds / self.second * timed)
                for group in op.reads:
                    if not dag.inputs.intersection(group):
                        at = [there[v] for v in group if v in there]
                        self.row([run, *at], [1.0, *([-1.0] * len(at))], most=0.0)
                extra = base[t] - base[0] + (turn.starts if first else 0)
                own = sum(weight[v] for v in op.writes) + op.transient / self.unit
                self._within([used, run], [1.0, own], extra)
                touched = [v for group in op.reads for v in group if v in there]
                touched = list(dict.fromkeys([*touched, *op.writes]))
                change: list[tuple[int, float]] = []
                useful: list[int] = []
                for v in touched:
                    writes = v in op.writes
                    if writes and value_until[v] < t:
                        continue
                    after = self.variable(integer=v in shared)
                    old = [there[v]] if v in there else []
                    before = [*old, run] if writes else old
                    least = 0.0 if v in stay else -math.inf
                    self.row([after, *before], [1.0, *([-1.0] * len(before))], least, 0.0)
                    change += [(after, -weight[v]), *((x, weight[v]) for x in old)]
                    if writes:
                        useful.append(after)
                        if len(op.writes) == 1 and old and not first:  # nothing to run it for
                            self.row([run, *old], [1.0, 1.0], most=1.0)
                    if old:
                        self.before[t, o, v] = old[0]
                    there[v] = after
                if not first and useful:  # what is run again leaves something behind
                    self.row([run, *useful], [1.0, *([-1.0] * len(useful))], most=0.0)
                if change:
                    now = self.variable(upper=math.inf, integer=False)
                    self.row(
                        [now, used, *(x for x, _ in change)], [1.0, -1.0, *(f for _, f in change)], 0.0, 0.0
                    )
                    used = now
            own_runs = [self.run[t, o] for o in turn.ops]
            self.row(own_runs, [1.0] * len(own_runs), 1.0, 1.0)
        final = {v: self.variable(integer=False) for v in there if v in dag.outputs}
        for v, x in final.items():
            self.row([x, there[v]], [1.0, -1.0], most=0.0)
            self.row([x], [1.0], 1.0)
        self.start.append(final)
        self._within(list(final.values()), [weight[v] for v in final], base[-1] - base[0])

    def plan(self, x: Any) -> tuple[DagAction, ...]:
        """Read the plan off a solution; values go as soon as it has no use for them."""
        dag = self.dag
        last_use = dag.last_use
        actions: list[DagAction] = []
        there: set[int] = set()
        for t in range(len(dag.turns)):
            runs = [o for (phase, o) in self.run if phase == t and x[self.run[phase, o]] > 0.5]
            later = {v for v, at in self.start[t + 1].items() if x[at] > 0.5}
            needs: list[set[int]] = [set(later)]  # what is needed just after each op, last op first
            for o in reversed(runs):
                op = dag.ops[o]
                need = needs[-1] - set(op.writes)
                for group in op.reads:
                    found = [v for v in group if (t, o, v) in self.before and x[self.before[t, o, v]] > 0.5]
                    found += [v for v in group if v in dag.inputs]
                    need.update(found[:1])
                # What is live already is kept where it will be needed, not recomputed.
                need |= {
                    v
                    for v in needs[-1] & set(op.writes)
                    if (t, o, v) in self.before and x[self.before[t, o, v]] > 0.5
                }
                needs.append(need - dag.inputs)
            needs.reverse()
            for need, now in zip(needs, [-1, *runs], strict=True):
                if now >= 0:
                    actions.append(Run(now))
                    there.update(dag.ops[now].writes)
                turns_taken = t + (now == runs[-1])
                stay = {v for v in dag.lasting if last_use[v] >= turns_taken}
                actions += [Drop(v) for v in sorted(there - need - stay)]
                there &= need | stay
        return tuple(actions)


def solve_dag(
    dag: Dag, memory_budget: int, *, time_limit: float = 60.0, most_seconds: float = math.inf
) -> DagOptimum:
    """Return the fastest plan of ``dag`` within ``memory_budget`` that HiGHS finds, and a bound on all plans.

    Args:
        dag: up to some hundred ops.
        memory_budget: bytes of the whole step.
        time_limit: seconds of one call of HiGHS.
        most_seconds: of a plan already known; speeds up the search for one at most as slow.

    Raises:
        InfeasibleBudget: no plan of the class fits; ``smallest`` is the least peak of the class, or of the
            best plan found within the time limit, as its note says.
        TypeError, ValueError: no Dag; ``memory_budget`` is no int or not in 1 .. 2**63 - 1; ``time_limit`` is
            not positive and finite; no plan takes ``most_seconds`` at most.
        TimeoutError: the time limit came before the first plan; the message has the bound so far.

    Example:
        >>> from rematplan import Dag, Op
        >>> loss, grad = Op("loss", 1.0, ((0,),), (1,)), Op("grad", 2.0, ((0,), (1,)), (2,), once=True)
        >>> solve_dag(Dag.plain([loss, grad], [4, 8, 4], inputs=[0], outputs=[2]), 16).seconds
        3.0
    """
    limit = checked_time_limit("solve_dag", time_limit)
    if not isinstance(dag, Dag):
        raise TypeError(f"solve_dag: dag={dag!r} must be a Dag; milp_bound takes a Chain")
    if math.isnan(most_seconds):
        raise ValueError("solve_dag: most_seconds=nan must be a number of seconds, or inf")
    limited = budget = checked_budget("solve_dag", memory_budget)
    bound = 0.0
    for attempt in range(ATTEMPTS):
        model = _Model(dag, limited, most_seconds)
        result = model.solve(limit, GAP)
        if result.status == 2:
            break
        if attempt == 0 and result.mip_dual_bound is not None:
            bound = max(0.0, float(result.mip_dual_bound) * model.second)
        if result.x is None:
            raise TimeoutError(
                f"solve_dag: no plan within {limit} seconds; none takes less than {bound:.6g} s. Raise time_limit, "
                "or give fewer ops"
            )
        plan = model.plan(result.x)
        line = simulate_dag(dag, plan)
        if line.peak <= budget:
            return DagOptimum(plan, line.seconds, line.peak, min(bound, line.seconds))
        limited -= line.peak - budget
    if most_seconds < math.inf:
        raise ValueError(f"solve_dag: no plan within {budget} bytes takes {most_seconds} seconds or less")
    model = _Model(dag, None, math.inf)
    result = model.solve(limit, GAP)
    if result.x is None:
        raise TimeoutError(f"solve_dag: no plan of any size within {limit} seconds; raise time_limit")
    plan = model.plan(result.x)
    line = simulate_dag(dag, plan)
    if line.peak <= budget:  # the plans that were faster slipped over the budget again and again
        return DagOptimum(plan, line.seconds, line.peak, min(bound, line.seconds))
    note = "" if result.status == 0 else "Not proven: the time limit came first."
    raise InfeasibleBudget(budget, line.peak, "milp", note)


def relaxed_seconds(dag: Dag, memory_budget: int, *, time_limit: float = 60.0) -> float:
    """Return seconds of the linear relaxation: a bound that costs one LP; inf if even that does not fit.

    Raises:
        TimeoutError: HiGHS did not finish within ``time_limit`` seconds.
    """
    model = _Model(dag, checked_budget("relaxed_seconds", memory_budget), math.inf)
    result = model.solve(checked_time_limit("relaxed_seconds", time_limit), GAP, relaxed=True)
    if result.status == 2:
        return math.inf
    if result.status != 0:
        raise TimeoutError(f"relaxed_seconds: not done within {time_limit} seconds; raise time_limit")
    return float(result.fun) * model.second


def milp_bound(chain: Chain, memory_budget: int, *, time_limit: float = 60.0) -> DagOptimum:
    """Apply ``solve_dag`` to ``chain_dag(chain)``: a bound that owes nothing to the other solvers.

    The plan is one of the Dag, and not a Schedule: ``chain_dag`` says how far the two differ.

    Raises:
        InfeasibleBudget, TimeoutError, TypeError, ValueError: see ``solve_dag``.
    """
    budget = checked_budget("milp_bound", memory_budget)
    return solve_dag(chain_dag(checked_chain("milp_bound", chain)), budget, time_limit=time_limit)
