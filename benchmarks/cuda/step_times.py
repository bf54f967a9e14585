"""Measure step time and peak of real models: by usual methods, and by plans within their measured peaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks import baselines
from benchmarks.cuda.copies import link, two_level
from benchmarks.cuda.findings import Findings
from benchmarks.cuda.machine import Machine
from benchmarks.cuda.steps import MIB, Training, capture_words, said, tight, timed
from benchmarks.cuda.transformer import gpt
from rematplan import InfeasibleBudget, Plan
from tests.shared.models import make_gpt2, make_llama, make_resnet

__all__ = ["MODELS", "add_times", "gpt2", "llama", "overhead", "plan_file", "planned", "resnet", "whole_plan"]

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
RIVALS: Mapping[str, baselines.Method] = {
    "per-block checkpoint": baselines.per_block,
    "selective checkpoint": baselines.selective,
}


def _gpt2(machine: Machine) -> Training:
    """GPT-2 with dropout under bfloat16 autocast."""
    torch.manual_seed(0)
    small = {"n_layer": 2, "n_embd": 32, "n_head": 2}
    case = make_gpt2(8, 1024, 50257) if machine.cuda else make_gpt2(2, 16, 64, **small)
    setattr(case.model, "loss_type", "ForCausalLM")  # noqa: B010 # or a warning breaks the compiled graph in two
    return Training(case, machine, autocast=True)


def _llama(machine: Machine) -> Training:
    """A Llama of a billion parameters, in bfloat16."""
    torch.manual_seed(0)
    with machine.device:
        case = make_llama(4, 2048, 32768, **LLAMA) if machine.cuda else make_llama(2, 16, 64, **TINY_LLAMA)
    case.model.to(torch.bfloat16)
    return Training(case, machine)


def _resnet(machine: Machine) -> Training:
    """ResNet-50 under bfloat16 autocast."""
    torch.manual_seed(0)
    case = make_resnet(128, 224, num_labels=1000) if machine.cuda else make_resnet(8, 32, **TINY_RESNET)
    return Training(case, machine, autocast=True)


MODELS: Mapping[str, Callable[[Machine], Training]] = {"gpt2": _gpt2, "llama": _llama, "resnet": _resnet}


def overhead(found: Findings, machine: Machine) -> None:
    """Compare predicted with measured overheads of GPT-2 in bfloat16, 16 x 1024 tokens, at three budgets."""
    case = gpt(machine, 0.1, layers=12, width=768, batch=16, tokens=1024, vocabulary=50257)
    case.model.to(torch.bfloat16)
    training = Training(case, machine)
    whole = whole_plan(found, training)
    plans = {f"budget {share:.0%}": tight(whole, share) for share in (0.1, 0.3, 1.0)}
    methods = {"plain": baselines.plain, **{name: baselines.planned(plan) for name, plan in plans.items()}}
    for name, plan in plans.items():
        found.add(name, {"predicted overhead": plan.predicted_overhead})
    found.add("plain", {"predicted ms": 1e3 * whole.chain.plain_seconds})
    add_times(found, training, methods, machine.pick(7, 1))


def gpt2(found: Findings, machine: Machine) -> None:
    """Train GPT-2 (12 layers of 768, 8 x 1024 tokens, bfloat16 autocast) plainly, by checkpoints, by plan."""
    _compare(found, machine, "gpt2", copies=True)


def llama(found: Findings, machine: Machine) -> None:
    """Train a Llama of a billion parameters (16 layers of 2048, 4 x 2048 tokens, bfloat16) likewise."""
    _compare(found, machine, "llama")


def resnet(found: Findings, machine: Machine) -> None:
    """Train ResNet-50 (128 images of 224 pixels, bfloat16 autocast) likewise."""
    _compare(found, machine, "resnet")


def _compare(found: Findings, machine: Machine, name: str, *, copies: bool = False) -> None:
    """Measure peaks of all methods, then their times, in turn."""
    training = MODELS[name](machine)
    methods: dict[str, baselines.Method] = {}
    budgets: dict[str, int] = {}
    for rival, method in {"plain": baselines.plain, **RIVALS}.items():
        with found.attempt(rival):
            with method(training.model) as trained:
                peaks = training.peaks(trained)
            found.add(rival, peaks)
            methods[rival], budgets[rival] = method, int(peaks["measured bytes"])
    with found.attempt("plan"):
        whole = whole_plan(found, training, plan_file(found, name))
        methods |= planned(found, training, {"plan that keeps all": whole})
        for rival in [rival for rival in RIVALS if rival in budgets]:
            methods |= planned(found, training, _within(found, whole, budgets[rival], rival))
        if copies and whole.capture.kind == "graph":
            methods |= _with_copies(found, training, whole, min(budgets.values()))
    add_times(found, training, methods, machine.pick(10, 1))


def plan_file(found: Findings, name: str) -> Path:
    """Where the plan of a model lies for the checks that come later."""
    return found.folder / f"{name}.plan.json"


def whole_plan(found: Findings, training: Training, file: Path | None = None) -> Plan:
    """Plan the step with all the memory there is; leave the plan in a file."""
    began = time.perf_counter()
    plan = training.solve()
    found.add("plan", {"captured as": capture_words(plan), "made in s": time.perf_counter() - began})
    options = sum(len(stage.options) for stage in plan.chain.stages)
    found.add("plan", {"stages": len(plan.chain), "options": options})
    if file is not None:
        plan.save(file)
    return plan


def _within(found: Findings, whole: Plan, budget: int, rival: str) -> dict[str, Plan]:
    """The plan within the measured peak of a rival, by its name; none if nothing fits."""
    name = f"plan at the peak of {rival}"
    try:
        return {name: baselines.op_level(whole, budget)}
    except InfeasibleBudget as error:
        found.add(name, {"does not fit": f"the least is {error.smallest / MIB:.1f} MiB"})
        return {}


def planned(found: Findings, training: Training, plans: Mapping[str, Plan]) -> dict[str, baselines.Method]:
    """The methods that train by plans; their peaks are measured, and are to be within what was predicted."""
    methods = {}
    for name, plan in plans.items():
        with found.attempt(name):
            method = baselines.planned(plan)
            with said() as messages, method(training.model) as trained:
                peaks = training.peaks(trained)
            figures = {
                "predicted overhead": plan.predicted_overhead,
                "predicted MiB": plan.predicted_peak / MIB,
                **peaks,
                "said": "; ".join(messages),
            }
            found.add(name, figures, peaks["measured bytes"] <= plan.predicted_peak)
            methods[name] = method
    return methods


def _with_copies(
    found: Findings, training: Training, whole: Plan, budget: int
) -> dict[str, baselines.Method]:
    """The method that also copies to the host, at the tightest of the budgets."""
    name = "plan with copies to the host"
    with found.attempt(name):
        host = link(training.machine)
        try:
            plan = two_level(whole, budget, host)
        except InfeasibleBudget as error:
            found.add(name, {"does not fit": f"the least is {error.smallest / MIB:.1f} MiB"})
            return {}
        found.add(name, {"predicted wait ms": 1e3 * plan.timeline.stall})
        return planned(found, training, {name: plan})
    return {}


def add_times(
    found: Findings, training: Training, methods: Mapping[str, baselines.Method], repeats: int
) -> None:
    """Time the methods in turn; of all but the plain step, note the overhead."""
    with found.attempt("times"):
        times = timed(training, methods, repeats)
        plain = times["plain"]["step ms"]
        for name, figures in times.items():
            found.add(name, {**figures, "measured overhead": figures["step ms"] / plain - 1})
