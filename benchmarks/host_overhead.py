"""Claim: a stage run costs at most 20 µs of the host's time above what its ops take; a plan that keeps all, 1 % at the most.

Layers so small that the interpreter is all there is. Each row runs one Revolve schedule as a planned model, and as nested
torch checkpoints, beside the plain step, interleaved. What a run without grad takes is measured too: the extra runs of the
schedule are not overhead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from executors import execute
from executors.nested import nested
from scheduler import Chain, Plan, Schedule, solve
from scheduler.schedule import Action, Backward, Checkpoint, Forward, Keep
from scheduler.solvers import solve_chain
from tests.steps import scheduled

REPEATS = 60
ROWS = ((12, 1), (12, 3), (32, 3), (64, 4))  # layers, slots


def layer() -> nn.Module:
    """One tiny layer."""
    return nn.Sequential(nn.Linear(32, 32), nn.GELU())


def revolve(count: int, slots: int) -> Schedule:
    """Binomial checkpointing of equal stages with so many boundaries held, x_0 among them."""
    ones = [1.0] * count
    unit = Chain.from_arrays(ones, ones, [1] * (count + 1), [2] * count, boundary_grad=[0] * (count + 1))
    return solve_chain(unit, slots + 3, solver="revolve")


def inside(inner: Schedule, count: int) -> Schedule:
    """The schedule between the code before the blocks and the code after them."""

    def shifted(action: Action) -> Action:
        if isinstance(action, Forward):
            return Checkpoint(1) if action.stage == 0 else Forward(action.stage + 1)
        if isinstance(action, Keep):
            return Keep(action.stage + 1)
        assert isinstance(action, (Checkpoint, Backward))
        return type(action)(action.stage + 1)

    actions = [shifted(action) for action in inner]
    sweep = next(i for i, action in enumerate(actions) if isinstance(action, Backward))
    end = count + 1
    return Schedule((Keep(0), *actions[:sweep], Keep(end), Backward(end), *actions[sweep:], Backward(0)))


def medians(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median thread seconds of each, interleaved, after warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(REPEATS + 5):
        for name, step in steps.items():
            begin = time.thread_time()
            step()
            if repeat >= 5:
                times[name].append(time.thread_time() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def stepper(model: Callable[[Tensor], Tensor], owner: nn.Module, batch: Tensor) -> Callable[[], None]:
    """A training step."""

    def step() -> None:
        model(batch).square().mean().backward()
        owner.zero_grad()

    return step


def row(count: int, slots: int) -> list[str]:
    """Microseconds a stage run, planned and nested; and the step that keeps all against the plain one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer() for _ in range(count))).train()
    batch = torch.randn(16, 32)
    plan: Plan = solve(model, "1GiB", sample=batch, capture=[*model])
    inner = revolve(count, slots)
    tight = scheduled(plan, inside(inner, count))
    runs = sum(tight.timeline.runs[1:-1])
    checkpoints = nested(
        inner,
        list(model),
        lambda f, x: checkpoint(f, x, use_reentrant=False),
    )

    def forwards() -> None:
        with torch.no_grad():
            model(batch)

    found = medians(
        {
            "plain": stepper(model, model, batch),
            "planned": stepper(execute(tight, model), model, batch),
            "nested": stepper(checkpoints, model, batch),
            "keeps all": stepper(execute(plan, model), model, batch),
            "graph keeps all": stepper(execute(solve(model, "1GiB", sample=batch, capture="graph"), model), model, batch),
            "forward": forwards,
        }
    )  # fmt: skip # one entry a line
    bare = found["plain"] + found["forward"] / count * (runs - count)
    each = [f"{(found[name] - bare) / runs * 1e6:.1f}" for name in ("planned", "nested")]
    all_ = [f"{found[name] / found['plain'] - 1:+.1%}" for name in ("keeps all", "graph keeps all")]
    return [str(count), str(slots), str(runs), f"{found['forward'] / count * 1e6:.1f}", *each, *all_]


def report() -> str:
    """The table, as Markdown."""
    torch.set_num_threads(1)
    lines = [
        "# What the host does beside the ops",
        "",
        f"torch {torch.__version__}, CPU, one thread; Linear(32, 32) and GELU on 16 rows, each layer a stage (module capture); thread",
        f"time, medians of {REPEATS} interleaved steps. `µs a run`: what a stage run takes above its ops. `keeps all`: a planned step",
        "that keeps everything against the plain one, by modules and as a graph (which calls no modules).",
        "",
        "| layers | slots | stage runs | µs of a plain forward | µs a run, planned | µs a run, nested checkpoints | keeps all, modules | graph |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row(*each)) + " |" for each in ROWS]
    return "\n".join(lines)
