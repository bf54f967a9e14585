"""The captured op graph has the ops of a plain step, composite ops in parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from rematplan import CaptureError, Plan, execute, solve
from rematplan.scheduler.capture.bit_equal_step import difference, step_result
from rematplan.scheduler.capture.graph.decompose import in_parts
from rematplan.scheduler.capture.graph.export import export_graph
from rematplan.scheduler.capture.graph.graph_capture import capture_graph, op_graphs
from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.torch_layer.call import Call, canonical_call, read_sample
from rematplan.scheduler.torch_layer.eager import as_eager
from tests.shared.helpers import smallest
from tests.shared.models import Case, make_llama
from tests.shared.steps import assert_equal, replan, restored, train


def call_of(model: nn.Module, *args: Any, **kwargs: Any) -> Call:
    return canonical_call(inspect.signature(model.forward), *read_sample((args, kwargs)))


def names(graph: OpGraph) -> list[str]:
    return [str(op.node.target).removeprefix("aten.").split(".")[0] for op in graph.ops]


def assert_trains_like(model: nn.Module, graph: OpGraph, call: Call) -> None:
    capture = capture_graph(graph, model)
    plain = step_result(model, lambda: model(*call[0], **call[1]))
    assert difference(plain, step_result(model, lambda: capture.sweep(model, call))) is None


class Attention(nn.Module):
    """Norm, attention and the skip."""

    def __init__(self, dropout: float = 0.1, heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.norm, self.queries, self.out = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.keys_and_values = nn.Linear(32, 2 * 8 * heads)
        self.dropout, self.options = dropout, options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, 8)).transpose(1, 2)

        y = self.norm(x)
        k, v = self.keys_and_values(y).chunk(2, -1)
        made = F.scaled_dot_product_attention(
            split(self.queries(y)), split(k), split(v), mask, self.dropout, **self.options
        )
        return x + self.out(made.transpose(1, 2).flatten(2))


def assert_executed_like(case: Case, plan: Plan) -> None:
    with restored(case.model):
        expected = train(case, case.model)
    with restored(case.model):
        assert_equal(train(case, execute(plan, case.model)), expected)


def stacked(**options: Any) -> Case:
    torch.manual_seed(0)
    batch = torch.randn(4, 48, 32)
    return Case(nn.Sequential(*(Attention(**options) for _ in range(4))).train(), batch, (batch,))


def test_attention_with_dropout_is_taken_apart_and_the_graph_given_stays_whole() -> None:
    model, x = Attention().train(), torch.randn(2, 48, 32)
    call = call_of(model, x)
    whole = export_graph(model, call)
    before = names(whole)
    parts = in_parts(whole, call)
    assert names(whole) == before
    assert "scaled_dot_product_attention" in before
    assert {"matmul", "_safe_softmax", "bernoulli_"} <= set(names(parts))
    assert not {n for n in names(parts) if "scaled_dot" in n or n == "dropout"}
    stacks = {
        str(list(op.node.meta["nn_module_stack"].values())[-1])
        for op in parts.ops
        if op.node.target is torch.ops.aten.bernoulli_.float
    }
    assert len(stacks) == 1, "the parts lie in the module that the op lay in"


def test_ops_with_a_kernel_of_their_own_stay_whole() -> None:
    model, x = Attention(dropout=0.0).train(), torch.randn(2, 48, 32)
    call = call_of(model, x)
    whole = export_graph(model, call)
    assert {"scaled_dot_product_attention", "layer_norm"} <= set(names(whole))
    assert in_parts(whole, call) is whole


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, None),
        ({"is_causal": True}, None),
        ({"scale": 0.3}, torch.randn(2, 1, 48, 48)),
        ({}, torch.randn(48, 48) > 0),
        ({"heads": 2, "enable_gqa": True, "is_causal": True}, None),
        ({"dropout": 0.0}, torch.randn(2, 4, 48, 48).requires_grad_()),
    ],
)
@pytest.mark.slow
def test_the_parts_train_like_the_op(options: dict[str, Any], mask: Tensor | None) -> None:
    torch.manual_seed(0)
    model, x = Attention(**options).train(), torch.randn(2, 48, 32)
    call = call_of(model, x, mask)
    graph = next(op_graphs(model, call))
    assert len(graph.ops) > len(export_graph(model, call).ops)
    assert_trains_like(model, graph, call)


@pytest.mark.slow
def test_a_stage_keeps_the_draws_of_a_dropout_and_drops_its_result() -> None:
    case = stacked()
    plan = solve(case.model, "1GiB", sample=case.sample)
    again = [
        [plan.capture.ops[k][i][0].rstrip("_0123456789") for i in rerun]
        for k, options in enumerate(plan.capture.rerun)
        for rerun in options
    ]
    assert ["mul"] in again, "the one op run again is the product with the draws"
    for share in (0.0, 0.5, 0.9):
        least = smallest(plan.chain)
        assert_executed_like(case, replan(plan, int(least + share * (plan.predicted_peak - least))))


@pytest.mark.slow
def test_a_loaded_plan_captures_the_parts_again(tmp_path: Path) -> None:
    case = stacked()
    plan = solve(case.model, "1GiB", sample=case.sample, costs="roofline")
    replan(plan, smallest(plan.chain)).save(tmp_path / "plan.json")
    assert_executed_like(case, Plan.load(tmp_path / "plan.json"))


@pytest.fixture
def dishonest() -> Iterator[Callable[[Tensor], Tensor]]:
    """A composite op that does something else when its tensors have no data."""
    library = torch.library.Library("dishonest", "DEF")

    def gate(x: Tensor) -> Tensor:
        return x.sigmoid() * x.tanh() * (1 if isinstance(x, FakeTensor) else 2)

    library.define("gate(Tensor x) -> Tensor")
    library.impl("gate", gate, "CompositeImplicitAutograd")
    yield torch.ops.dishonest.gate
    library._destroy()


def test_where_the_parts_train_differently_the_op_stays_whole(
    dishonest: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return dishonest(self.inner(x))

    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    case = Case(nn.Sequential(*(Gate() for _ in range(4))).train(), batch, (batch,))
    first, second = op_graphs(case.model, call_of(case.model, batch))
    assert "tanh" in names(first)
    assert "tanh" not in names(second)
    plan = solve(case.model, "1GiB", sample=batch)
    assert plan.capture.kind == "graph"
    assert plan.capture.graph == second.fingerprint()
    tight = replan(plan, smallest(plan.chain))
    tight.save(tmp_path / "plan.json")
    for again in (tight, Plan.load(tmp_path / "plan.json")):
        assert_executed_like(case, again)


def test_grouped_query_attention_is_captured_as_the_plain_step_runs_it() -> None:
    """Under export transformers makes a mask and repeats the heads: gradients differ in their last bits."""
    torch.manual_seed(0)
    case = make_llama(
        1,
        48,
        64,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    plan = solve(case.model, "1GiB", sample=case.sample, costs="roofline")
    assert plan.capture.kind == "graph"
    (attention,) = (
        op.node for op in plan.live[1].graph.ops if "scaled_dot_product_attention" in str(op.node.target)
    )
    assert attention.args[3] is None, "no mask"
    assert attention.kwargs["enable_gqa"]


class Branching(nn.Module):
    """Takes one branch if a condition holds, which is a tensor of one bool."""

    def __init__(self, condition: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.condition = nn.Linear(8, 8), condition

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.condition(x) else torch.tanh(self.layer(x))


def _changed_in_place(x: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1])
    first = steps[:1]
    steps.add_(1)
    return first == 1


@pytest.mark.parametrize(
    ("condition", "plain"),
    [
        (lambda x: (torch.arange(x.shape[1]).unsqueeze(0).diff() == 1).all(), True),
        (lambda x: torch.ones(3).to(torch.float32).sum() > 3, False),
        (lambda x: torch.full((2,), torch.arange(4).sum().item()).float().mean() == 6, True),
    ],
)
def test_a_branch_on_what_depends_on_nothing_is_taken(
    condition: Callable[[Tensor], Tensor], plain: bool
) -> None:
    model, x = Branching(condition).train(), torch.randn(4, 8)
    call = call_of(model, x)
    graph = next(op_graphs(model, call))
    assert ("tanh" not in names(graph)) == plain
    assert_trains_like(model, graph, call)


@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.sum() > 0,
        lambda x: torch.zeros(3).add(x[0, 0]).sum() > 0,
        lambda x: torch.empty(1) == 0,
        lambda x: torch.rand(1) > 0.5,
        lambda x: F.dropout(torch.ones(8)).sum() > 3,
        _changed_in_place,
    ],
)
def test_a_branch_on_anything_else_is_refused(condition: Callable[[Tensor], Tensor]) -> None:
    model = Branching(condition).train()
    with pytest.raises(CaptureError, match=r"torch\.export failed"):
        next(op_graphs(model, call_of(model, torch.randn(4, 8))))


def test_everything_is_as_before_once_an_export_has_ended_or_failed() -> None:
    from transformers.utils import import_utils

    model, before = nn.Linear(4, 4), import_utils.is_fake_tensor
    seen: SimpleQueue[tuple[bool, bool]] = SimpleQueue()  # no Python state, which an export puts back
    with as_eager(model):
        assert "forward" in vars(model)
        assert import_utils.is_fake_tensor is not before
        with pytest.raises(CaptureError):
            export_graph(model, call_of(model, torch.randn(2, 5)))
    assert not torch.compiler.is_exporting()
    assert "forward" not in vars(model)
    assert import_utils.is_fake_tensor is before

    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.put((torch.compiler.is_compiling(), torch.compiler.is_exporting()))
            return super().forward(x)

    asks = Asks(4, 4)
    with as_eager(asks):
        export_graph(asks, call_of(asks, torch.randn(2, 4)))
    assert seen.get() == (False, False)
    assert seen.empty()
    export_graph(asks, call_of(asks, torch.randn(2, 4)))
    assert seen.get() == (True, True)
