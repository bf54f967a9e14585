"""The Dag of single ops, and plans of the chain translated into plans of it."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils import _pytree as pytree

from benchmarks.milp_bound import kept_all
from benchmarks.op_dag import op_dag, op_seconds, priced, translate
from rematplan import solve
from rematplan.scheduler.bounds.dag import simulate_dag
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.solvers import solve_chain
from rematplan.scheduler.torch_layer.call import canonical_call
from tests.shared.helpers import smallest
from tests.shared.models import ResidualNet


@pytest.mark.slow
def test_a_translated_plan_takes_the_seconds_of_the_chain_and_about_its_bytes() -> None:
    torch.manual_seed(0)
    model = ResidualNet(channels=8, blocks=3).train()
    sample = (torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,)))
    plan = solve(model, 2**50, sample=sample, costs="roofline", capture="graph")
    capture = plan.live[1]
    flat = pytree.tree_leaves(canonical_call(inspect.signature(model.forward), sample, {}))
    made = op_dag(capture, op_seconds(capture, flat))
    chain = priced(made, capture, plan.chain)
    plain = simulate_dag(made.dag, kept_all(made.dag))
    assert plain.seconds == pytest.approx(chain.plain_seconds)
    low, high = smallest(chain), smallest(chain, "keep_all")
    for share in (1.0, 0.7, 0.4, 0.0):
        schedule = solve_chain(chain, low + int((high - low) * share))
        line = simulate_dag(made.dag, translate(made, capture, schedule))
        assert line.seconds == pytest.approx(simulate(chain, schedule).seconds)
        assert line.peak == pytest.approx(
            simulate(chain, schedule).peak - chain.fixed, rel=0.25
        )  # no workspaces
        assert share == 1.0 or line.peak < plain.peak
        assert share == 1.0 or sum(line.runs) > len(made.dag.ops)
