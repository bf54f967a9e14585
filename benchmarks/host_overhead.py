"""Claim: a stage run takes at most 20 µs of host time beside the run, a plan that keeps all at most 1 % more.

Layers so small that the interpreter is all there is. Each row runs one Revolve schedule as a planned model,
and as nested torch checkpoints, interleaved with a bare step: the plain one in which hooks run the same
layers at the same moments, without grad and for nothing. What the schedule runs again is not overhead, and a
run within a backward takes twice as long as one in a row of equal runs, since the processor's caches hold
other code.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rematplan import Chain, Plan, Schedule, execute, solve
from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Forward, Keep
from rematplan.scheduler.solvers import solve_chain
from tests.shared.models import make_gpt2
from tests.shared.nested import nested
from tests.shared.steps import scheduled

REPEATS = 60
WARM = 3  # runs right before the one that is timed
ROWS = ((12, 1), (12, 3), (32, 3), (48, 4))  # layers, slots


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


def bare(schedule: Schedule, layers: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """A plain forward, in whose backward hooks run the layers that the schedule runs again, for nothing."""
    again: list[list[nn.Module]] = [[] for _ in layers]
    actions = list(schedule)
    waiting: list[nn.Module] = []
    for action in actions[len(layers) :]:
        if isinstance(action, Backward):
            again[action.stage], waiting = waiting, []
        elif isinstance(action, (Forward, Checkpoint, Keep)):
            waiting.append(layers[action.stage])

    def forward(x: Tensor) -> Tensor:
        for layer_, runs in zip(layers, again, strict=True):
            given, x = x.detach(), layer_(x)
            if runs:

                def hook(_: Tensor, given: Tensor = given, runs: list[nn.Module] = runs) -> None:
                    with torch.no_grad():
                        for each in runs:
                            each(given)

                x.register_hook(hook)
        return x

    return forward


def medians(steps: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, float]:
    """Median thread seconds of each, interleaved, after warm-ups.

    Each is timed right after runs of its own, for what ran before it decides which of its code the processor
    has at hand.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 5):
        for name, step in steps.items():
            for _ in range(WARM):
                step()
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
    as_graph: Plan = solve(model, "1GiB", sample=batch, capture="graph")
    assert len(as_graph.chain) == 2 * count  # each op a stage
    ops = revolve(2 * count, slots)
    tight_graph = scheduled(as_graph, ops)
    found = medians(
        {
            "plain": stepper(model, model, batch),
            "bare": stepper(bare(inner, list(model)), model, batch),
            "planned": stepper(execute(tight, model), model, batch),
            "nested": stepper(checkpoints, model, batch),
            "bare ops": stepper(
                bare(ops, [*chain.from_iterable(map(nn.Module.children, model))]), model, batch
            ),
            "graph": stepper(execute(tight_graph, model), model, batch),
            "keeps all": stepper(execute(plan, model), model, batch),
            "graph keeps all": stepper(execute(as_graph, model), model, batch),
        }
    )
    graph_runs = sum(tight_graph.timeline.runs)
    each = [f"{(found[name] - found['bare']) / runs * 1e6:.1f}" for name in ("planned", "nested")]
    each += [str(graph_runs), f"{(found['graph'] - found['bare ops']) / graph_runs * 1e6:.1f}"]
    more = [f"{(found[name] - found['plain']) * 1e6:+.0f}" for name in ("keeps all", "graph keeps all")]
    return [str(count), str(slots), f"{found['plain'] * 1e6:.0f}", str(runs), *each, *more]


def real() -> list[str]:
    """Seconds of a step of a small GPT-2, and percent that keeping all adds, by modules and as a graph."""
    torch.manual_seed(0)
    case = make_gpt2(8, 128, 512, n_layer=4, n_embd=256, n_head=4)
    models = {"plain": case.model}
    for how in ("modules", "graph"):
        models[how] = execute(solve(case.model, "4GiB", sample=case.sample, capture=how), case.model)

    def stepping(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            case(model).loss.backward()
            case.model.zero_grad()

        return step

    found = medians({how: stepping(model) for how, model in models.items()}, repeats=20)
    return [
        f"{found['plain'] * 1e3:.0f} ms",
        *(f"{found[name] / found['plain'] - 1:+.1%}" for name in ("modules", "graph")),
    ]


def report() -> str:
    """The table, as Markdown."""
    torch.set_num_threads(1)
    lines = [
        "# What the host does beside the ops",
        "",
        f"torch {torch.__version__}, CPU, one thread; Linear(32, 32) and GELU on 16 rows; thread time, medians of {REPEATS} interleaved",
        "steps, each timed right after some of its own kind. Revolve schedules with so many slots: by modules, each layer a stage, beside",
        "nested torch checkpoints by the same schedule; and as a graph, each op a stage. `a run`: what a stage run takes above a run of",
        "the same layer (op) without grad at the same moment, everything that the step does besides shared out over the runs. `keeps all`:",
        "a planned step that keeps everything above the plain one, by modules and as a graph (which calls no modules).",
        "",
        "| layers | slots | plain step, µs | stage runs | µs a run, planned | µs a run, nested checkpoints | op runs | µs a run, graph | keeps all, µs a step | as a graph |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row(*each)) + " |" for each in ROWS]
    seconds, by_modules, as_graph = real()
    lines += [
        "",
        f"A GPT-2 of 4 layers of 256, 8 sequences of 128 tokens, a step of {seconds}: keeping all adds {by_modules} by modules and",
        f"{as_graph} as a graph (medians of 20 interleaved steps).",
    ]
    return "\n".join(lines)
