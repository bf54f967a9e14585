"""Claim: 2 cores plan a model like Llama-3-70B at 8192 tokens, without weights, in 120 s and 8 GiB."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace

import torch
from torch import nn

from rematplan import DeviceSpec, InfeasibleBudget, Plan, simulate, solve, solve_chain
from rematplan.scheduler.core.budget import format_bytes

TOKENS = 8192
MEMORY = 300 * 2**30  # parameters and gradients are 263 GiB of it
BUDGETS = (280, 300, 330, 360, 390)  # GiB


def llama_70b(layers: int = 80) -> nn.Module:
    """The shape of Llama 3 70B in bfloat16, on meta: no weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def _least(plan: Plan) -> int:
    try:
        solve_chain(plan.chain, 1)
    except InfeasibleBudget as error:
        return error.smallest
    return 1


def report() -> str:
    """The page: how long it took, what the plan is, and what other budgets would give."""
    phases: list[tuple[str, float]] = []
    began = time.perf_counter()

    def progress(line: str) -> None:
        phases.append((line, time.perf_counter()))

    model = llama_70b()
    ids = torch.empty(1, TOKENS, dtype=torch.long, device="meta")
    device = replace(DeviceSpec.of("H200"), name="H200 with 300 GiB", memory=MEMORY)
    plan = solve(model, MEMORY, sample={"input_ids": ids, "labels": ids}, device=device, progress=progress)
    text = str(plan)
    ended = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ends = [when for _, when in phases[1:]] + [ended]
    lines = [
        "# Planning without the hardware",
        "",
        (
            f"A Llama-3-70B-shaped model (80 layers, width 8192, bfloat16) at 1 x {TOKENS} tokens, on meta: "
            f"{format_bytes(plan.resident['parameters'])} of parameters that are nowhere. Planned for a device like an H200 "
            "(its rates by the data sheet, CUDA's rounding), but with 300 GiB: parameters and gradients alone are 263 GiB. "
            "`python -m benchmarks plan_without_hardware --write` makes this page."
        ),
        "",
        (
            f"**{ended - began:.0f} s** and **{format_bytes(memory)}** at the most (RSS of the whole process), on one of "
            f"{os.cpu_count()} cores, torch {torch.__version__}."
        ),
        "",
        "| phase | seconds |",
        "|---|---:|",
        f"| making the model on meta, and a copy on fake tensors | {phases[0][1] - began:.1f} |",
        *(f"| {line} | {end - when:.1f} |" for (line, when), end in zip(phases, ends, strict=True)),
        "",
        "Of capturing, most is torch.export. Equal layers are priced once.",
        "",
        (
            "What other budgets would give, from the same chain. Seconds are the roofline's at peak rates: the ratio is what "
            "counts. Kernels' own scratch space is not in the bytes. Gradients appear in backward, as activations go: the "
            "smallest budget, little over parameters and gradients, has half of itself for activations when backward begins."
        ),
        "",
        "| budget | overhead | peak |",
        "|---:|---:|---:|",
    ]
    for budget in (_least(plan), *(gib * 2**30 for gib in BUDGETS), plan.plain.peak):
        timeline = simulate(plan.chain, solve_chain(plan.chain, budget))
        extra = timeline.seconds / plan.chain.plain_seconds - 1
        lines.append(f"| {format_bytes(budget)} | {max(extra, 0.0):.2%} | {format_bytes(timeline.peak)} |")
    lines += ["", "The plan:", "", "```text", text, "```"]
    return "\n".join(lines)
