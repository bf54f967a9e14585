"""Claim: the checks before a planned forward take at most 50 µs on a GPT-2 of 12 layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.host_overhead import medians
from rematplan import execute, solve
from rematplan.executors.plain import plans_within
from rematplan.scheduler.torch_layer.environment import environment
from rematplan.scheduler.torch_layer.leaves import flatten, repeated_floats
from tests.shared.models import make_gpt2

CALLS = 50  # of a comparison for each time that it is timed


def many(compare: Callable[[], Any]) -> Callable[[], None]:
    """The comparison, so many times over."""

    def run() -> None:
        for _ in range(CALLS):
            compare()

    return run


def report() -> str:
    """The table, as Markdown."""
    torch.set_num_threads(1)
    case = make_gpt2(4, 64, 256, n_layer=12, n_embd=64, n_head=4)
    model = execute(solve(case.model, "1GiB", sample=case.sample), case.model)
    case(model).loss.backward()
    case.model.zero_grad()
    plans = plans_within(model)
    runner, trainable = plans.first, plans.trainable
    assert trainable is not None
    call = plans.read(case.args, case.kwargs)
    flat, spec = flatten(*call)
    guard, repeated = runner.guard, repeated_floats(flat)
    found = medians(
        {
            "Python state that the graph took for constant": many(lambda: runner.holds(repeated)),
            "parameters, and which of them require grad": many(lambda: trainable.flags(model)),
            "submodules and hooks": many(lambda: guard.check(model, fires_hooks=False)),
            "autocast, deterministic algorithms, attention kernels, precision": many(
                lambda: environment("cpu")
            ),
            "arguments": many(lambda: flatten(*plans.read(case.args, case.kwargs))),
            "finding the plan, of which the first, second and fourth are parts": many(
                lambda: plans._find(model, call, flat, spec)
            ),
            "forward": lambda: case(case.model),
        },
        repeats=30,
    )
    forward = found.pop("forward")
    names = list(found)
    guards = sum(found[name] for name in names[:4])
    lines = [
        "# What a planned forward compares before it runs",
        "",
        f"torch {torch.__version__}, CPU, one thread; a GPT-2 of 12 layers of 64, 4 sequences of 64 tokens, whose plain forward takes",
        f"{forward * 1e3:.1f} ms in the same run; thread time, medians of 30, interleaved, of {CALLS} comparisons each. The first four are the guards",
        f"of what a plan takes for granted: {guards / CALLS * 1e6:.0f} µs together, {guards / CALLS / forward:.2%} of the plain forward.",
        "",
        "| compared | µs a forward |",
        "|---|---|",
    ]
    lines += [f"| {name} | {seconds / CALLS * 1e6:.1f} |" for name, seconds in found.items()]
    return "\n".join(lines)
