"""torch.compile: compiled blocks are planned like any other; a planned model is not compiled as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematplan import CaptureError, Plan, execute, solve
from tests.shared.models import Block, Case, tiny
from tests.shared.steps import (
    EITHER_CAPTURE,
    assert_equal,
    case_of,
    plan_for,
    planned_tiny,
    restored,
    tightest,
    train,
)

# The compiler looks at .grad of a block's input, which is no leaf; it does so for the plain model, too.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.fixture(autouse=True)
def compiler() -> Iterator[Any]:
    """The compiler's counts, from zero."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


class Feed(nn.Module):
    """LayerNorm, wide GELU layer, dropout and the skip; with a break in its graph, if asked."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.drop = nn.Dropout(0.1)
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.gelu(self.wide(self.norm(x)))
        if self.broken:
            torch._dynamo.graph_break()
        result: Tensor = x + self.drop(self.narrow(wide))
        return result


class Net(nn.Module):
    """Linear, blocks, and a loss."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Feed(broken) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def compiled(how: str, backend: str, broken: bool = False) -> Case:
    """The net with compiled blocks: "wrapped" by torch.compile, or "in place"."""
    torch.manual_seed(0)
    model = Net(broken).train()
    for i, block in enumerate(model.blocks):
        if how == "wrapped":
            model.blocks[i] = torch.compile(block, backend=backend)  # type: ignore[assignment] # is a module
        else:
            block.compile(backend=backend)
    batch = torch.randn(128, 16)
    return Case(model, batch, (batch,))


def plan_of(case: Case) -> Plan:
    blocks: Any = case.model.get_submodule("blocks")
    plan = tightest(solve(case.model, "1GiB", sample=case.sample, capture=[*blocks]))
    assert max(plan.timeline.runs) > 1, "nothing is recomputed"
    return plan


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_blocks_train_by_their_plan_bit_equal_and_are_not_compiled_again(
    how: str, backend: str, broken: bool, compiler: Any
) -> None:
    plain, case = compiled(how, backend, broken), compiled(how, backend, broken)
    expected = train(plain, plain.model)
    planned = execute(plan_of(case), case.model)
    graphs = compiler["stats"]["unique_graphs"]
    assert graphs > 0, "nothing is compiled"
    assert_equal(train(case, planned), expected)
    assert compiler["stats"]["unique_graphs"] == graphs, "the executor, or blocks again, were compiled"


def test_the_compiler_does_not_see_the_executor_within_blocks_that_it_skips(compiler: Any) -> None:
    torch.manual_seed(0)
    batch = torch.randn(128, 16)
    blocks = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4)]
    case = Case(nn.Sequential(*blocks).train(), batch, (batch,))
    for block in blocks:
        block.compile(
            backend="eager"
        )  # the code of torch's own containers is skipped, so its ops run eagerly
    plan = tightest(solve(case.model, "1GiB", sample=case.sample, capture=blocks))
    train(case, execute(plan, case.model))
    assert max(plan.timeline.runs) > 1
    assert not compiler["stats"], "hooks for saved tensors were compiled"


def test_blocks_that_are_compiled_are_the_stages_where_nothing_is_asked_for() -> None:
    case = compiled("in place", "eager")
    plan = solve(case.model, "1GiB", sample=case.sample)
    assert plan.capture.kind == "modules"
    assert "submodule 'blocks.0' is compiled" in plan.capture.reason
    with pytest.raises(CaptureError, match=r"'blocks\.0' is compiled.*pass a list of blocks"):
        solve(case.model, "1GiB", sample=case.sample, capture="graph")


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@EITHER_CAPTURE
def test_a_planned_model_compiled_as_a_whole_warns_and_keeps_its_schedule(
    capture: str, how: str, compiler: Any
) -> None:
    case, planned = planned_tiny(capture)
    blocks = [block for block in case.model.modules() if isinstance(block, Block)]

    def runs_of(model: nn.Module) -> tuple[list[int], Any]:
        before = [block.runs for block in blocks]
        with restored(case.model):
            records = train(case, model)
        names = [{name.replace("_orig_mod.", ""): value for name, value in r.items()} for r in records]
        return [block.runs - b for block, b in zip(blocks, before, strict=True)], names

    runs, expected = runs_of(planned)
    whole = planned
    if how == "wrapped":
        whole = torch.compile(planned, backend="eager")  # type: ignore[assignment] # is a module
    else:
        planned.compile(backend="eager")
    with pytest.warns(
        UserWarning, match=r"torch\.compile of a planned model is left out.*pass backend='inductor' to solve"
    ):
        got_runs, got = runs_of(whole)
    assert got_runs == runs
    assert_equal(got, expected)
    assert not compiler["stats"]["calls_captured"]


def test_a_full_graph_of_a_planned_model_is_refused() -> None:
    case, planned = planned_tiny("modules")
    with pytest.raises(Exception, match="not compiled as a whole; pass backend='inductor' to solve"):
        case(torch.compile(planned, backend="eager", fullgraph=True))  # type: ignore[arg-type] # is a module


def test_in_eval_mode_a_compiled_planned_model_is_the_plain_one_compiled(compiler: Any) -> None:
    case, planned = planned_tiny("modules")
    try:
        planned.eval()
        with torch.no_grad():
            expected = case(case.model)
            got = case(torch.compile(planned, backend="eager"))  # type: ignore[arg-type] # is a module
    finally:
        planned.train()
    assert torch.equal(got, expected)
    assert compiler["stats"]["calls_captured"] > 0


def test_a_model_that_is_compiled_is_not_planned() -> None:
    case, plan = tiny(), plan_for("tiny", "modules")
    wrapped: Any = torch.compile(tiny().model, backend="eager")
    in_place = tiny().model
    in_place.compile(backend="eager")
    for model in (wrapped, in_place):
        with pytest.raises(ValueError, match=r"solve: model is .*compile its blocks \(block\.compile\(\)\)"):
            solve(model, "1GiB", sample=case.sample)
        with pytest.raises(
            ValueError, match=r"execute: model is .*compile its blocks \(block\.compile\(\)\)"
        ):
            execute(plan, model)


def test_a_planned_model_that_was_compiled_can_be_planned_anew() -> None:
    case = tiny()
    planned = execute(plan_for("tiny", "modules"), case.model)
    planned.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = execute(tightest(solve(planned, "1GiB", sample=case.sample, capture="modules")), planned)
        got = train(case, again)
    with restored(case_of("tiny").model) as model:
        assert_equal(got, train(case_of("tiny"), model))


def test_blocks_are_still_compiled_after_they_were_planned() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(*(Feed(broken=False) for _ in range(3)))
    for block in model:
        block.compile(backend=backend, dynamic=False)
    plan = solve(model, "1GiB", sample=torch.randn(4, 16), capture=list(model))
    planned = execute(plan, model, on_new_shape="plain")
    graphs.clear()
    planned(torch.randn(7, 16)).sum().backward()
    assert graphs, "a call of another shape runs the blocks as they are written"
