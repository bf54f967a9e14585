"""Models are captured and cut, or refused with a reason."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rematplan import CaptureError, InfeasibleBudget, ReplayError, execute, solve, solve_chain
from rematplan.scheduler.capture.bit_equal_step import difference, step_result
from rematplan.scheduler.capture.blocks.block_capture import capture_blocks
from rematplan.scheduler.capture.graph.cut import linearize, op_dag
from rematplan.scheduler.capture.graph.export import export_graph
from rematplan.scheduler.capture.graph.op_graph import Op, OpGraph
from rematplan.scheduler.torch_layer.call import canonical_call, read_sample
from rematplan.scheduler.torch_layer.preserve import preserved
from tests.shared.models import Case, gpt2, llama, residual, unet


class Doubled(torch.autograd.Function):
    """Twice its input, with a backward that export would lose: three times the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Doubled.apply(torch.tanh(self.inner(x)))
        return result


class Routed(nn.Module):
    """Which branch runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.left(x) if x.sum() > 0 else self.right(x))


def _chain_of(block: type[nn.Module], count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(block() for _ in range(count))).train()


def _linear(case: Case) -> Any:
    call = canonical_call(inspect.signature(case.model.forward), *read_sample(case.sample))
    graph = export_graph(case.model, call)
    return graph, linearize(graph)


def _trains_equally(model: nn.Module, batch: Tensor, plan: Any) -> None:
    planned = execute(plan, model)
    plain = step_result(model, lambda: model(batch))
    assert difference(plain, step_result(model, lambda: planned(batch))) is None


def _tight(model: nn.Module, batch: Tensor, **keywords: Any) -> Any:
    loose = solve(model, "1GiB", sample=batch, **keywords)
    from rematplan import InfeasibleBudget

    try:
        solve(model, 1, sample=batch, **keywords)
    except InfeasibleBudget as error:
        middle = (error.smallest + loose.predicted_peak) // 2
        return solve(model, middle, sample=batch, **keywords)
    raise AssertionError("a budget of one byte was met")


def test_a_custom_function_is_refused_by_graph_capture_and_trained_right_as_modules() -> None:
    model, batch = _chain_of(WithFunction), torch.randn(64, 16)
    with pytest.raises(CaptureError, match="Doubled"):
        solve(model, "1GiB", sample=batch, capture="graph")
    plan = _tight(model, batch)
    assert plan.capture.kind == "modules"
    assert "Doubled" in plan.capture.reason
    assert sum(plan.timeline.runs) > len(plan.chain)
    _trains_equally(model, batch, plan)


def test_autograd_function_apply_is_as_before_after_a_capture() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(CaptureError):
        solve(_chain_of(WithFunction), "1GiB", sample=torch.randn(4, 16), capture="graph")
    assert torch.autograd.Function.__dict__["apply"] is before


def test_data_dependent_routing_falls_back_on_modules_and_trains_right_on_either_path() -> None:
    model, batch = _chain_of(Routed), torch.randn(64, 16)
    plan = _tight(model, batch)
    assert plan.capture.kind == "modules"
    _trains_equally(model, batch, plan)
    _trains_equally(model, -batch, plan)


def test_hooks_on_submodules_keep_firing_under_module_capture() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))).train()
    fired: list[int] = []
    model[2].register_forward_hook(lambda *_: fired.append(1))
    batch = torch.randn(64, 16)
    with pytest.raises(CaptureError, match="hooks"):
        solve(model, "1GiB", sample=batch, capture="graph")
    plan = solve(model, "1GiB", sample=batch)
    assert plan.capture.kind == "modules"
    fired.clear()
    execute(plan, model)(batch).sum().backward()
    assert fired == [1]


def test_the_hook_that_checkpointing_leaves_on_embeddings_is_refused_only_where_it_does_something() -> None:
    case = gpt2()
    model: Any = case.model
    model.enable_input_require_grads()  # by gradient_checkpointing_enable, and not undone by its counterpart
    call = canonical_call(inspect.signature(model.forward), *read_sample(case.sample))
    export_graph(model, call)
    model.transformer.wte.weight.requires_grad_(False)
    with pytest.raises(CaptureError, match=r"wte.*model\.disable_input_require_grads\(\)"):
        export_graph(model, call)
    model.disable_input_require_grads()
    model.transformer.wte.register_forward_hook(lambda _module, _given, output: output.mul_(2))
    with pytest.raises(CaptureError, match=r"wte.*does not fire$"):
        export_graph(model, call)


def test_what_cannot_be_captured_says_what_to_pass() -> None:
    with pytest.raises(CaptureError, match=r"capture=\[blocks\]"):
        solve(Routed().train(), "1GiB", sample=torch.randn(4, 16))


def test_blocks_given_by_the_user_are_the_stages() -> None:
    model, batch = _chain_of(Routed), torch.randn(64, 16)
    plan = solve(model, "1GiB", sample=batch, capture=[model[1], model[2]])
    assert [s.name for s in plan.chain.stages] == ["before", "1", "2", "after"]
    assert [s.recomputable for s in plan.chain.stages] == [False, True, True, False]
    _trains_equally(model, batch, plan)
    whole = solve(model, "1GiB", sample=batch, capture=model)
    assert [s.name for s in whole.chain.stages] == ["before", "0", "1", "2", "3", "after"]


@pytest.mark.parametrize(
    "pick", [lambda m: [m[2], m[1]], lambda m: [nn.Linear(1, 1)], lambda m: [m[0], m[0]]]
)
def test_blocks_that_do_not_run_in_that_order_are_refused(pick: Any) -> None:
    model = _chain_of(Routed)
    with pytest.raises(CaptureError):
        solve(model, "1GiB", sample=torch.randn(4, 16), capture=pick(model))


@pytest.mark.slow
def test_gpt2_is_cut_into_the_halves_of_its_blocks() -> None:
    case = gpt2()
    plan = solve(case.model, "1GiB", sample=case.sample)
    names = [s.name for s in plan.chain.stages]
    layers: int = case.model.config.n_layer  # type: ignore[union-attr, assignment] # of transformers
    for layer in range(layers):
        assert sum(name.startswith(f"transformer.h.{layer}") for name in names) == 2
    blocks = [s for s in plan.chain.stages if s.name.startswith("transformer.h.")]
    assert len({s.input for s in blocks}) == 1


def test_the_tables_that_all_blocks_read_are_carried_once() -> None:
    graph, linear = _linear(llama())
    far = [key for key, readers in linear.readers.items() if len(readers) > 2]
    assert far, "rotary tables and the mask are read by every attention"
    assert all(key not in boundary for key in far for boundary in linear.boundaries)
    assert all(not graph.groups[key].requires_grad for key in far)


@pytest.mark.slow
def test_the_skips_of_a_unet_are_carried_and_released_in_reverse() -> None:
    graph, linear = _linear(case := unet(1))
    skips = [
        k for k, readers in linear.readers.items() if graph.groups[k].requires_grad and len(readers) >= 2
    ]
    assert len(skips) >= 3
    plan = solve(case.model, "1GiB", sample=case.sample)
    stages = plan.chain.stages
    assert sum(s.carried for s in stages) > 0
    assert sum(s.carried for s in stages) + sum(s.carried_change for s in stages) >= 0


def test_no_cut_parts_a_value_from_a_later_change_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = torch.tanh(self.b(x))
            y += z
            return y.relu_()

    model, batch = _chain_of(InPlace, 6), torch.randn(64, 16)
    graph, linear = _linear(Case(model, batch, (batch,)))
    for group in graph.groups.values():
        for cut in linear.cuts[1:-1]:
            assert not (0 <= group.producer < cut <= max(group.mutated, default=-1))
    _trains_equally(model, batch, _tight(model, batch))


def test_an_input_changed_in_place_is_refused_as_a_graph() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mul_(2))

    with pytest.raises(CaptureError, match="changed in place"):
        solve(Changes().train(), "1GiB", sample=torch.randn(4, 16), capture="graph")


def test_a_frozen_prefix_is_one_stage_that_runs_once() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(8))).train()
    model[:5].requires_grad_(False)
    batch = torch.randn(64, 16)
    plan = _tight(model, batch)
    first = plan.chain.stages[0]
    assert not first.recomputable
    assert first.backward == 0
    assert plan.timeline.runs[0] == 1
    _trains_equally(model, batch, plan)


def test_ops_form_an_acyclic_graph_that_follows_the_values() -> None:
    graph, linear = _linear(residual())
    dag = op_dag(graph)
    assert dag.number_of_nodes() == len(graph.ops)
    assert all(a < b for a, b in dag.edges)
    for k in range(1, len(linear)):
        crossing = {d["storage"] for a, b, d in dag.edges(data=True) if a < linear.cuts[k] <= b}
        known = set(linear.boundaries[k]) | {key for keys in linear.carried[:k] for key in keys}
        assert crossing <= known


def test_modules_are_expanded_to_the_finest_blocks_that_are_all_there_is() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = nn.Sequential(inner, nn.Tanh()).train()
    call = ((), {"input": torch.randn(4, 8)})
    with preserved(model):
        captured = capture_blocks(model, call)
    assert [block.name for block in captured.blocks] == ["0.0", "0.1", "0.2", "1"]


def test_the_layers_of_a_module_that_does_more_than_run_them_stay_together() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x)

    model = nn.Sequential(Skip(), Skip()).train()
    with preserved(model):
        captured = capture_blocks(model, ((), {"input": torch.randn(4, 8)}))
    assert [block.name for block in captured.blocks] == ["0", "1"]


def test_the_call_has_one_form_however_it_is_written() -> None:
    def forward(a: Tensor, b: Any = None, *, use_cache: Any = None, **more: Any) -> None: ...

    signature = inspect.signature(forward)
    x = torch.zeros(1)
    expected = ((), {"a": x, "b": 2, "use_cache": False})
    assert canonical_call(signature, (x, 2), {}) == expected
    assert canonical_call(signature, (x,), {"b": 2}) == expected
    assert canonical_call(signature, (), {"b": 2, "a": x, "use_cache": False}) == expected
    assert canonical_call(signature, (x,), {"b": None}) == ((), {"a": x, "use_cache": False})
    with pytest.raises(TypeError):
        canonical_call(signature, (), {"b": 2})


class Clipped(torch.autograd.Function):
    """Identity whose backward clips: on a tame sample it is bit-equal to what export makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clamp(-1e6, 1e6)


clip = Clipped.apply  # bound before any capture, as libraries do


class WithClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = clip(torch.tanh(self.inner(x)))
        return result


def test_a_custom_function_is_seen_however_it_is_called_and_whatever_the_sample_shows() -> None:
    model, batch = _chain_of(WithClip), torch.randn(64, 16)
    with pytest.raises(CaptureError, match="Clipped"):
        solve(model, "1GiB", sample=batch, capture="graph")
    plan = _tight(model, batch)
    assert plan.capture.kind == "modules"
    _trains_equally(model, batch, plan)
    _trains_equally(model, 1e9 * batch, plan)


class ReturnsItsOwn(nn.Module):
    """Returns a parameter and a buffer beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        self.norm = nn.BatchNorm1d(16)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.norm(torch.tanh(self.blocks(x)) * self.scale)
        return {"loss": y.square().mean(), "scale": self.scale, "mean": self.norm.running_mean}


@pytest.mark.parametrize("capture", ["graph", "modules"])
def test_a_model_may_return_its_own_parameters_and_buffers(capture: str) -> None:
    torch.manual_seed(0)
    model, batch = ReturnsItsOwn().train(), torch.randn(64, 16)
    plan = _tight(model, batch, capture=capture)
    _trains_equally(model, batch, plan)
    output = execute(plan, model)(batch)
    assert output["scale"] is model.scale
    assert output["mean"] is model.norm.running_mean


def test_code_between_blocks_may_change_their_outputs_in_place() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.blocks):
                x = layer(x)
                if index == 1:
                    x += 1
                elif index == 3:
                    with torch.no_grad():
                        x.clamp_(-0.5, 0.5)
            return x

    torch.manual_seed(0)
    model, batch = Between().train(), torch.randn(512, 16)
    plan = _tight(model, batch, capture="modules")
    assert [s.name for s in plan.chain.stages if not s.recomputable] == [
        "before",
        "glue 1",
        "glue 2",
        "after",
    ]
    assert sum(plan.timeline.runs) > len(plan.chain)
    _trains_equally(model, batch, plan)


def test_code_between_blocks_that_takes_another_path_than_when_planned_is_refused() -> None:
    class Wayward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
            self.way = ""

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.blocks):
                if index == 3 and self.way == "skip":
                    continue
                x = layer(x)
                if index == 2 and self.way == "new":
                    x = x + 1
                if index == 2 and self.way == "in place":
                    x += 1
            return x

    model, batch = Wayward().train(), torch.randn(64, 16)
    planned = execute(_tight(model, batch, capture="modules"), model)
    planned.way = "skip"
    planned(batch).sum().backward()  # a step that leaves blocks out follows the same plan
    for way in ("new", "in place"):
        planned.way = way
        with pytest.raises(ReplayError, match="make a plan for this call"):
            planned(batch)
    planned.way = ""
    planned(batch).sum().backward()


def test_in_place_modules_in_a_sequential_are_glue_and_train_bit_equal() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16))]
    model, batch = nn.Sequential(*layers).train(), torch.randn(512, 16)
    plan = _tight(model, batch, capture="modules")
    assert sum(plan.timeline.runs) > len(plan.chain)
    _trains_equally(model, batch, plan)


def test_a_refusal_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        solve(_chain_of(Routed), "1GiB", sample=torch.randn(4, 16), capture="graph")
    assert capfd.readouterr() == ("", "")


def test_cuts_go_where_autograd_keeps_what_crosses() -> None:
    """A chain charges a kept stage for its output, so a value that nobody saves is no place for a cut."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1))]
    model, batch = nn.Sequential(*layers).train(), torch.randn(64, 16)
    graph, linear = _linear(Case(model, batch, (batch,)))
    saved = {key for op in graph.ops for key in op.saved}
    assert len(linear) >= 8
    for boundary in linear.boundaries[1:-1]:
        assert set(boundary) <= saved


def test_the_cut_of_a_block_without_saved_tensors_is_replayed_at_the_right_moment() -> None:
    """A stage of views and sums saves nothing: autograd is through with it before anything is asked for."""

    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 4, 4).transpose(1, 2).reshape(-1, 16) + 1

    torch.manual_seed(0)
    layers = [m for _ in range(5) for m in (nn.Linear(16, 16), Views(), Views())]
    model, batch = nn.Sequential(*layers).train(), torch.randn(64, 16)
    for capture in ("graph", "modules"):
        plan = solve(model, "1GiB", sample=batch, capture=capture)
        with pytest.raises(InfeasibleBudget) as caught:
            solve_chain(plan.chain, 1)
        budget = caught.value.smallest
        tight = replace(plan, memory_budget=budget, schedule=solve_chain(plan.chain, budget))
        _trains_equally(model, batch, tight)


def test_a_graph_of_one_device_is_that_of_another_of_its_kind() -> None:
    """Ranks of one job make positions by torch.arange, each on its own device: one plan is for all."""

    def fingerprint(index: int) -> str:
        graph = fx.Graph()
        arguments: dict[str, Any] = {"device": torch.device("cuda", index)}
        node = graph.call_function(torch.ops.aten.arange.default, (4,), arguments)
        graph.output(node)
        op = Op(node, (), (), (), requires_grad=False)
        return OpGraph(fx.GraphModule(nn.Module(), graph), [op], {}, [], {}, {}, {}, [], None).fingerprint()

    assert fingerprint(0) == fingerprint(1)
