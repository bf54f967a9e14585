"""Models are cut where few values are live, and the plan reports the cuts."""

from __future__ import annotations

import inspect
import json
from functools import cache

import pytest
import torch

from benchmarks.cuts import FOUND, rows, section
from rematplan import Plan, solve
from rematplan.scheduler.capture.graph.cut import Linear, linearize
from rematplan.scheduler.capture.graph.export import export_graph
from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.plan.why_cut import LEFT_OUT, REASONS, Cut, explain_cut, summary
from rematplan.scheduler.torch_layer.call import canonical_call
from tests.shared.models import Case, gpt2, resnet, tiny, unet
from tests.shared.steps import plan_for


@cache
def _planned() -> tuple[Case, Plan]:
    torch.manual_seed(8)
    case = resnet()
    return case, solve(case.model, 2**40, sample=case.sample, costs="roofline", capture="graph")


def _linear(case: Case) -> tuple[OpGraph, Linear]:
    call = canonical_call(inspect.signature(case.model.forward), case.args, case.kwargs)
    graph = export_graph(case.model, call)
    return graph, linearize(graph)


def test_a_transformer_block_is_cut_between_attention_and_mlp_and_at_its_ends() -> None:
    graph, linear = _linear(gpt2())
    inside = [cut.inside for cut in linear.reasons]
    for layer in range(4):
        assert inside.count(f"transformer.h.{layer}") == 1
    for cut, why in zip(linear.cuts[1:], linear.reasons, strict=False):
        assert why.reason == "valley"
        if why.inside.startswith("transformer.h."):
            stack = graph.ops[cut].node.meta["nn_module_stack"]
            assert list(stack.values())[-1][0] == f"{why.inside}.ln_2"
            assert (why.values, why.bytes) == (1, 8 * 64 * 64 * 4)
            assert min(why.before, why.after) >= 2 * why.bytes


def test_a_resnet_is_cut_at_the_ends_of_its_blocks() -> None:
    graph, linear = _linear(resnet())
    ends = []
    for cut in linear.cuts[3:-1]:
        *_, (before, _) = graph.ops[cut - 1].node.meta["nn_module_stack"].values()
        *_, (after, _) = graph.ops[cut].node.meta["nn_module_stack"].values()
        assert before.endswith(".activation")
        assert ".layer.0." in after
        ends.append(before.removesuffix(".activation"))
    assert ends == [f"resnet.encoder.stages.{i}.layers.{j}" for i in range(4) for j in range(2)][:-1]


@pytest.mark.slow
def test_every_level_of_a_unet_is_cut_from_the_next_and_inside() -> None:
    _, linear = _linear(unet(1))
    inside = [cut.inside for cut in linear.reasons]
    for level in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"):
        assert any(name == level or name.startswith(level + ".") for name in inside)
    assert "" in inside


@pytest.mark.slow
def test_the_benchmark_compares_the_cuts_found_with_coarser_and_finer_ones() -> None:
    found = rows(tiny(), r"^\d+")
    stages = [row.stages for row in found]
    assert found[0].name == FOUND
    assert min(stages[1:]) < stages[0] < max(stages)
    assert all(row.overheads[-1] is not None for row in found)
    assert found[0].overheads[0] is not None
    text = "\n".join(section("six blocks", found))
    assert f"| {FOUND} | {stages[0]} |" in text
    assert "of the least budget" in text


@pytest.mark.slow
def test_the_plan_says_where_it_was_cut_and_why() -> None:
    _, plan = _planned()
    begins = plan.capture.begins
    text = str(plan)
    assert f"{len(plan.chain)} stages, cuts: {len(begins)} where {REASONS['valley']}" in text
    assert "they divide resnet.encoder" in text
    line = plan.explain(2).splitlines()[1]
    assert line == explain_cut(begins[1])
    assert "1 value live" in line
    assert "begins" not in plan.explain(0)


def test_the_facts_about_cuts_come_back_from_json_and_may_be_missing() -> None:
    _, plan = _planned()
    data = json.loads(json.dumps(plan.to_json()))
    loaded = Plan.from_json(data)
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert all(isinstance(cut, Cut) for cut in loaded.capture.begins)
    del data["capture"]["begins"], data["capture"]["left_out"]
    old = Plan.from_json(data)
    assert " stages, cuts: " not in str(old)
    assert "begins" not in old.explain(1)


def test_blocks_of_a_module_capture_are_said_to_be_the_model_s_own() -> None:
    assert "the model's own blocks" in str(plan_for("tiny", "modules"))
    assert "the model's own blocks" not in str(plan_for("tiny", "graph"))


def test_repeated_cuts_say_so_and_few_modules_are_named() -> None:
    graph, linear = _linear(tiny())
    again = linearize(graph, cuts=linear.cuts[1:-1])
    assert {cut.reason for cut in again.reasons} == {"given"}
    assert again.cuts == linear.cuts
    cuts = [Cut("valley", 1, 2**20, 2**21, 2**22, f"part{letter}.{i}") for letter in "abcdef" for i in (1, 2)]
    lines = summary(cuts, {"dip": 3, "small": 0})
    assert lines[0] == f"13 stages, cuts: 12 where {REASONS['valley']} (at the median 1 value, 1.00 MiB)"
    assert lines[1].endswith(f"partd.* (2), 2 more; left out: 3 {LEFT_OUT['dip']}")
    assert len(summary([], {})) == 1
