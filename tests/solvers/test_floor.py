"""The floor of a DAG, against the MILP optimum and against Dijkstra over all plans of a wider class."""

from __future__ import annotations

import heapq
import importlib
import inspect
import math
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from rematplan import solve
from rematplan.scheduler.bounds.dag import Dag, Op, Turn
from rematplan.scheduler.bounds.floor import dag_floor
from rematplan.scheduler.bounds.milp import solve_dag
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import solve_chain
from rematplan.scheduler.torch_layer.call import canonical_call
from tests.shared.dags import DIAMOND, dags, fastest
from tests.shared.helpers import smallest
from tests.shared.models import gpt2, residual

op_dag: Any = importlib.import_module("benchmarks.op_dag")

# Forward a, b, c; the backward reads what each of them makes, the last one first.
STEP = Dag.plain(
    [
        Op("a", 3.0, ((0,),), (1,)),
        Op("b", 1.0, ((1,),), (2,)),
        Op("c", 5.0, ((2,),), (3,)),
        Op("c'", 1.0, ((3,),), (4,), once=True),
        Op("b'", 1.0, ((2,), (4,)), (5,), once=True),
        Op("a'", 1.0, ((1,), (5,)), (6,), once=True),
    ],
    [1, 4, 4, 4, 1, 1, 1],
    inputs=[0],
    outputs=[6],
)


def fastest_of_all(dag: Dag, budget: int) -> float:
    """Least seconds of all plans that take the turns in order, by Dijkstra; inf if nothing fits.

    Between two first runs any op of a turn taken may run, in any order and any number of times.
    """
    always = dag.base
    turn_of, last_use = dag.turn_of, dag.last_use
    tie = count()
    queue: list[tuple[float, int, int, frozenset[int]]] = [(0.0, next(tie), 0, frozenset())]
    seen: set[tuple[int, frozenset[int]]] = set()
    while queue:
        seconds, _, taken, there = heapq.heappop(queue)
        if (taken, there) in seen:
            continue
        seen.add((taken, there))
        live = always[taken] + sum(dag.sizes[v] for v in there)
        if taken == len(dag.turns) and dag.outputs <= there | dag.inputs and live <= budget:
            return seconds
        for v in there:
            if v not in dag.lasting or last_use[v] < taken:
                heapq.heappush(queue, (seconds, next(tie), taken, there - {v}))
        for o, op in enumerate(dag.ops):
            first = turn_of[o] == taken
            if turn_of[o] > taken or (op.once and not first):
                continue
            if not all(there.union(dag.inputs).intersection(group) for group in op.reads):
                continue
            if any(last_use[v] >= taken for v in dag.lasting & there & frozenset(op.writes)):
                continue
            during = live + op.transient + sum(dag.sizes[v] for v in op.writes)
            if during + (dag.turns[taken].starts if first else 0) <= budget:
                after = (seconds + op.seconds, next(tie), taken + first, there | frozenset(op.writes))
                heapq.heappush(queue, after)
    return math.inf


@settings(max_examples=50)
@given(dags(), st.integers(1, 60))
def test_at_every_moment_the_floor_is_at_most_the_optimum_of_all_plans(dag, budget):
    best = fastest_of_all(dag, budget)
    assert best <= fastest(dag, budget)
    for turn in range(len(dag.turns)):
        assert dag_floor(dag, budget, turns=[turn]).seconds <= best * (1 + 1e-9)


@settings(max_examples=60)
@given(dags(), st.integers(1, 60))
def test_the_default_is_one_of_the_moments_and_all_of_them_are_better(dag, budget):
    each = [dag_floor(dag, budget, turns=[turn]).seconds for turn in range(len(dag.turns))]
    chosen, every = dag_floor(dag, budget), dag_floor(dag, budget, turns=range(len(dag.turns)))
    assert chosen.seconds == each[chosen.turn]
    assert every.seconds == max(each) >= chosen.seconds


def test_the_floor_names_the_ops_that_must_run_again_and_some_moment_gives_the_optimum():
    assert dag_floor(STEP, 14).extra == 0  # x, a, b, c and a gradient
    for budget, ops in ((13, (1,)), (10, (1,)), (9, (0, 1)), (7, (0, 1))):
        found = dag_floor(STEP, budget)
        assert found.rerun == ops, budget
        assert found.turn == 3
        assert found.extra == pytest.approx(sum(STEP.ops[o].seconds for o in ops), rel=1e-3)
    for budget in (13, 10):  # at 10, c itself leaves no room for what a makes
        every = dag_floor(STEP, budget, turns=range(6))
        assert every.seconds == pytest.approx(solve_dag(STEP, budget).seconds, rel=1e-3)
        assert every.turn == {13: 3, 10: 2}[budget]
    assert dag_floor(STEP, 5).seconds == math.inf  # x, c and the gradient that is made of it


# What b reads is saved by nobody; b's result gives way while d runs, and is an output.
WITH_ITS_READS = Dag.plain(
    [
        Op("a", 2.0, (), (0,)),
        Op("b", 3.0, ((0,),), (1,)),
        Op("d", 1.0, (), (2,), transient=8),
        Op("e", 1.0, ((1,),), (), once=True),
    ],
    [4, 4, 1],
)
OUTPUT = Dag.plain([Op("a", 2.0, (), (0,)), Op("b", 1.0, (), (), transient=8)], [4], outputs=[0])
# Each way of the one turn makes one of the outputs.
BOTH_WAYS = Dag(
    (Op("a", 2.0, (), (0,)), Op("b", 1.0, (), (1,))), (1, 1), (Turn((0, 1)),), outputs=frozenset({0, 1})
)


@pytest.mark.parametrize(
    ("dag", "budget", "turn", "seconds"),
    [(WITH_ITS_READS, 9, 2, 12.0), (OUTPUT, 8, 1, 5.0), (BOTH_WAYS, 2, 0, 3.0)],
)
def test_the_floor_is_the_optimum_where_one_moment_says_all(dag, budget, turn, seconds):
    assert dag_floor(dag, budget, turns=[turn]).seconds == pytest.approx(seconds, rel=1e-3)
    assert fastest_of_all(dag, budget) == seconds


def test_the_floor_finds_the_cheap_branch_of_a_diamond_while_its_other_one_runs():
    found = dag_floor(DIAMOND, 17, turns=[2])
    assert found.rerun == (1,)
    assert found.seconds == pytest.approx(solve_dag(DIAMOND, 17).seconds, rel=1e-3)


def test_thousands_of_ops_take_seconds_and_the_floor_is_close_to_what_its_ops_cost():
    ops, sizes, saved = [], [1000], []
    for block in range(300):
        for seconds, size in ((7.0, 900), (1.0, 1700 + block), (3.0, 800), (2.0, 4100), (9.0, 1100)):
            ops.append(Op(f"{block}", seconds, ((len(sizes) - 1,),), (len(sizes),)))
            saved.append(len(sizes))
            sizes.append(size)
    backward = [Op(f"{v}'", 5.0, ((v,),), (), once=True) for v in reversed(saved)]
    dag = Dag.plain(ops + backward, sizes, inputs=[0])
    found = dag_floor(dag, sum(sizes) // 2, time_limit=3.0)
    assert 0.99 * found.rerun_seconds <= found.extra <= found.rerun_seconds
    assert sum(sizes[v] for o in found.rerun for v in dag.ops[o].writes) >= sum(sizes) // 2


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        ((None, 9), TypeError, "must be a Dag"),
        ((STEP, 9.0), TypeError, "memory_budget"),
        ((STEP, 9, [6]), ValueError, r"turns names 6, expected one of the turns 0 \.\. 5"),
        ((STEP, 9, None, math.inf), ValueError, "time_limit"),
    ],
)
def test_misuse_is_an_error_at_once(arguments, error, why):
    dag, budget, *more = arguments
    with pytest.raises(error, match=why):
        dag_floor(dag, budget, **dict(zip(("turns", "time_limit"), more, strict=False)))


@pytest.mark.parametrize("build", [gpt2, residual])
@pytest.mark.slow
def test_the_floor_of_a_captured_step_is_below_every_plan_and_not_far_below(build):
    case = build()
    plan = solve(case.model, 2**50, sample=case.sample, capture="graph")
    chain, capture = plan.chain, plan.live[1]
    call = canonical_call(inspect.signature(case.model.forward), case.args, case.kwargs)
    seconds = op_dag.measured_seconds(capture, pytree.tree_leaves(call), chain)
    low, high = smallest(chain), smallest(chain, "keep_all")
    dag = op_dag.relaxed_dag(capture, seconds, chain.fixed)
    shares = []
    for share in (0.0, 0.25, 0.5, 1.0):
        budget = low + int((high - low) * share)
        ours = simulate(chain, solve_chain(chain, budget)).seconds - chain.plain_seconds
        floor = dag_floor(dag, budget, time_limit=2.0)
        assert floor.extra <= ours + 1e-9, share
        shares.append(floor.extra / ours if ours else 0.0)
    assert shares[-1] == 0
    assert max(shares) > 0.2
