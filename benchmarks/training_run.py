"""Claim: a long run by a plan is the plain run bit for bit, resumes from checkpoints, and its memory is flat.

A GPT-2 with dropout, two accumulated batches a step, clipping, AdamW and a schedule of the learning rate, on
the text that ships with Python. Three runs: plain, by a plan, and by the plan as it was saved, from the
checkpoint of the second half-way. Every 50 steps one step's bytes are counted: its peak, and what it leaves
alive.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rematplan import Plan, execute, solve
from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.costs.meters.peak import count_bytes
from rematplan.scheduler.costs.resident import storage_bytes
from rematplan.scheduler.torch_layer.private import pytree, storage_id

BATCH, CONTEXT = 4, 64
SHARE = 0.3  # of the plain step's activations, above what lives all step


class Run(NamedTuple):
    """What a run left behind.

    Attributes:
        curve: loss and gradient norm of every step.
        peaks: bytes of each step that was counted, parameters and optimizer state included.
        left: bytes that each of them left alive.
        alive: bytes of all tensors alive after each of them.
        state: the model's, at the end.
    """

    curve: list[tuple[float, float]]
    peaks: list[int]
    left: list[int]
    alive: list[int]
    state: dict[str, Tensor]
    seconds: float


def _model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=4, n_embd=64, n_head=4, vocab_size=256, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).train()


def _alive() -> int:
    """Bytes of the storages of all tensors that Python knows, fake ones of captures left out."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return sum({storage_id(s): s.nbytes() for s in storages}.values())


def make_plan() -> Plan:
    """A plan for a step whose gradients exist, as those of an accumulated batch do."""
    model = _model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros(BATCH, CONTEXT, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = solve(model, 2**40, sample={"input_ids": ids, "labels": ids}, optimizer=optimizer)
    return plan.within(plan.chain.fixed + int(SHARE * (plan.plain.peak - plan.chain.fixed)))


def run(
    plan: Plan | None, steps: int, every: int, save: Path | None = None, resume: Path | None = None
) -> Run:
    """Train; a checkpoint is saved half-way, and another run can go on from there."""
    plain = _model(0 if resume is None else 1)
    model = plain if plan is None else execute(plan, plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    begin = 0
    torch.manual_seed(5)
    if resume is not None:
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        begin = steps // 2
        del state

    def step(number: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(number)
        starts = torch.randint(0, len(text) - CONTEXT, (2, BATCH), generator=generator)
        total = 0.0
        for row in starts:
            ids = torch.stack([text[s : s + CONTEXT] for s in row])
            loss = model(input_ids=ids, labels=ids).loss / 2
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return total, norm

    def counted_step(number: int, _: Any) -> tuple[float, float]:
        return step(number)

    curve, peaks, left, alive = [], [], [], []
    began = time.perf_counter()
    resident = 0
    for number in range(begin, steps):
        if number == begin + 1:  # AdamW has its state from the first step on
            kept = [*model.parameters(), *pytree.tree_leaves(dict(optimizer.state))]
            resident = storage_bytes([t for t in kept if isinstance(t, Tensor)], torch.device("cpu"))
        if number == steps // 2 and save is not None:
            parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
            torch.save(
                {name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()},
                save,
            )
        if (number + 1) % every:
            curve.append(step(number))
            continue
        counted = count_bytes(functools.partial(counted_step, number), torch.device("cpu"))
        curve.append(counted.result)
        peaks.append(resident + counted.peak)
        left.append(counted.end)
        alive.append(_alive())
    return Run(curve, peaks, left, alive, model.state_dict(), time.perf_counter() - began)


def compare(steps: int, every: int) -> tuple[Plan, Run, Run, Run]:
    """The plan, and the plain, the planned and the resumed run."""
    plan = make_plan()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, path = Path(folder) / "checkpoint.pt", Path(folder) / "plan.json"
        plan.save(path)
        plain = run(None, steps, every)
        planned = run(plan, steps, every, save=checkpoint)
        return plan, plain, planned, run(Plan.load(path), steps, every, resume=checkpoint)


def differences(plan: Plan, plain: Run, planned: Run, resumed: Run) -> list[str]:
    """How the three runs differ, and where memory grows or exceeds the budget; nothing if the claim holds."""
    found = []
    for name, other in (("planned", planned), ("resumed", resumed)):
        if other.curve != plain.curve[-len(other.curve) :]:
            found.append(f"{name}: losses or gradient norms")
        found += [
            f"{name}: {key}" for key, value in plain.state.items() if not torch.equal(value, other.state[key])
        ]
        if max(other.peaks) > plan.memory_budget:
            found.append(
                f"{name}: a peak of {max(other.peaks)} bytes over the budget of {plan.memory_budget}"
            )
        if any(other.left) or len(set(other.alive)) > 1 or len(set(other.peaks)) > 1:
            found.append(f"{name}: memory: peaks {other.peaks}, left {other.left}, alive {other.alive}")
    return found


def report(steps: int = 500, every: int = 50) -> str:
    """The page, as Markdown."""
    plan, plain, planned, resumed = compare(steps, every)
    found = differences(plan, plain, planned, resumed)
    lines = [
        "# A training run by a plan",
        "",
        (
            f"GPT-2 of 4 layers with dropout, {steps} steps of two accumulated batches ({BATCH} x {CONTEXT} bytes of text), gradient "
            "norm clipped at 1, AdamW, one cycle of learning rates. `resumed` is a new model that loads what `planned` saved "
            f"after {steps // 2} steps: parameters, optimizer, schedule, random-number state, and the plan's file. Every {every} "
            "steps one step is counted: its peak, the optimizer's part included, what it leaves alive, and the bytes of all "
            f"tensors alive in the process after it, text and earlier runs' parameters too. torch {torch.__version__}, CPU, {torch.get_num_threads()} thread(s). The runs follow one another on a machine with other work: their times are rough."
        ),
        "",
        (
            f"Budget {format_bytes(plan.memory_budget)}, predicted peak {format_bytes(plan.predicted_peak)}; the plain step's "
            f"{format_bytes(plan.plain.peak)}. Predicted overhead {plan.predicted_overhead:.1%}."
        ),
        "",
        (
            "Losses and gradient norms of all steps, and the parameters at the end: "
            + ("equal bit for bit, memory flat." if not found else "DIFFERENT: " + "; ".join(found))
        ),
        "",
        "| run | steps | first loss | last loss | peak of a step, least to most | left by a step | alive, least to most | ms a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in (("plain", plain), ("planned", planned), ("resumed", resumed)):
        count = len(each.curve)
        lines.append(
            f"| {name} | {count} | {each.curve[0][0]:.6f} | {each.curve[-1][0]:.6f} | {min(each.peaks)} to {max(each.peaks)} "
            f"| {max(map(abs, each.left))} | {min(each.alive)} to {max(each.alive)} | {1e3 * each.seconds / count:.0f} |"
        )
    lines += ["", "| step | loss, all runs | planned: peak | alive |", "|---|---|---|---|"]
    for i, (peak, alive) in enumerate(zip(planned.peaks, planned.alive, strict=True)):
        number = (i + 1) * every
        lines.append(f"| {number} | {planned.curve[number - 1][0]:.6f} | {peak} | {alive} |")
    return "\n".join(lines)
