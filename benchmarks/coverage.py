"""Claim: plans train models of transformers and diffusers bit for bit like the plain model, or refuse them.

Each architecture has its own process, so that one that fails or takes too long stops no other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.coverage_cases import FAMILIES
from rematplan import CaptureError, InfeasibleBudget, Plan, execute, measure_peak, solve
from rematplan.scheduler.torch_layer.loss import find_loss
from tests.shared.models import Case
from tests.shared.steps import Record, assert_equal, restored, state, tensors

LIMIT = 400  # seconds for one architecture
STEPS = 2


@dataclasses.dataclass(slots=True)
class Row:
    """What became of one architecture.

    Attributes:
        verdict: "equal" (planned, within budget, every bit as in the plain model), "refused", or "wrong".
        why: of the capture, of the refusal, or what is wrong.
        smallest: the smallest budget that can be met, as a share of the plain step's peak.
        used: measured peaks as shares of their budgets: the smallest, and one halfway to the plain step's
            peak.
        seconds: to plan.
        steady: whether two runs of the plain model from one state are equal.
    """

    name: str
    verdict: str
    why: str = ""
    capture: str = ""
    stages: int = 0
    smallest: float = 0.0
    used: tuple[float, ...] = ()
    seconds: float = 0.0
    steady: bool = True


def _seed() -> None:
    """Seed every generator that models draw from: masks of speech models come from numpy's."""
    import numpy as np

    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 # the global generator is the one that transformers uses
    random.seed(11)


def _train(case: Case, model: nn.Module) -> list[Record]:
    """Two steps of SGD from a fixed seed, and from the state that the model is in; it is put back."""
    records = []
    with restored(case.model):
        _seed()
        for _ in range(STEPS):
            output = case(model)
            loss, _ = find_loss(output)
            loss.backward()
            records.append({"loss": loss.detach().clone(), **tensors(output), **state(model)})
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
                        parameter.grad = None
    return records


def _peak(case: Case, model: nn.Module) -> int:
    """Measured peak of a step, after one of the same."""

    def step() -> Any:
        output = case(model)
        find_loss(output)[0].backward()
        return output

    with restored(case.model):
        _seed()
        step()
        model.zero_grad()
        _seed()
        return measure_peak(step, resident=[model, case.args, case.kwargs]).peak


def _difference(got: list[Record], expected: list[Record]) -> str:
    try:
        assert_equal(got, expected)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _tightest(plan: Plan) -> Plan:
    try:
        return plan.within(1)
    except InfeasibleBudget as error:
        return plan.within(error.smallest)


def row(name: str, make: Callable[[], Case], backend: str = "eager") -> Row:
    """Plan one architecture, and train it at two budgets.

    Args:
        backend: as ``solve`` takes it; of "inductor" the plan that keeps all stands for the plain model.
    """
    torch.manual_seed(0)
    case = make()
    plain = _train(case, case.model)
    steady = not _difference(_train(case, case.model), plain)
    peak = _peak(case, case.model)
    began = time.perf_counter()
    _seed()
    try:
        plan = solve(case.model, "64GiB", sample=case.sample, backend=backend)
    except (CaptureError, ValueError) as error:
        return Row(name, "refused", _short(error), steady=steady)
    seconds = time.perf_counter() - began
    if backend != "eager":
        plain = _train(case, execute(plan, case.model))
    plan = _tightest(plan)
    used = []
    wrong = []
    for budget in (plan.memory_budget, max(plan.memory_budget, (plan.memory_budget + peak) // 2)):
        planned = execute(plan.within(budget), case.model)
        try:
            differs = _difference(_train(case, planned), plain)
            used.append(_peak(case, planned) / budget)
        except Exception as error:  # noqa: BLE001 # whatever it is, it is wrong, and the row says so
            differs = _short(error)
        if differs:
            wrong.append(differs)
    if max(used, default=0) > 1:
        wrong.append(f"over budget by {max(used) - 1:.1%}")
    return Row(
        name,
        "wrong" if wrong else "equal",
        wrong[0] if wrong else plan.capture.reason,
        plan.capture.kind,
        len(plan.chain),
        plan.memory_budget / peak,
        tuple(used),
        seconds,
        steady,
    )


def isolated(name: str, backend: str = "eager") -> Row:
    """The row of one architecture, made in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.coverage", name, backend],
            capture_output=True, text=True, timeout=LIMIT, env=environment, check=False,
        )  # fmt: skip # one call
    except subprocess.TimeoutExpired:
        return Row(name, "wrong", f"took more than {LIMIT} s")
    if done.returncode:
        return Row(name, "wrong", done.stderr.strip().splitlines()[-1])
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def cells(found: Row) -> list[str]:
    note = "" if found.steady else "; **the plain model itself is not deterministic**"
    why = found.why.replace("|", "\\|").replace("; one step is bit-equal to the plain model", "")
    why = why if len(why) < 400 else why[:397] + "..."
    if not found.stages:
        return [found.name, f"**{found.verdict}**", "", "", "", "", "", why + note]
    return [
        found.name,
        found.verdict if found.verdict == "equal" else f"**{found.verdict}**",
        found.capture,
        str(found.stages),
        f"{found.smallest:.0%}",
        " / ".join(f"{share:.1%}" for share in found.used),
        f"{found.seconds:.0f}",
        why + note,
    ]


def report(only: str | None = None) -> str:
    """The tables, as Markdown.

    Args:
        only: the architectures whose names have this in them.
    """
    chosen = {
        family: [name for name in cases if only is None or only in name] for family, cases in FAMILIES.items()
    }
    return page({family: [isolated(name) for name in names] for family, names in chosen.items() if names})


def page(found: Mapping[str, Sequence[Row]]) -> str:
    """Rows by family, as Markdown."""
    import diffusers
    import transformers

    verdicts = [each.verdict for rows in found.values() for each in rows]
    equal, refused, wrong = (verdicts.count(v) for v in ("equal", "refused", "wrong"))
    lines = [
        "# Which models can be planned",
        "",
        f"Architectures of transformers {transformers.__version__} and diffusers {diffusers.__version__} in small random",
        f"configurations, train mode, dropout as configured, on a CPU with torch {torch.__version__}. Padding masks where",
        "models take them.",
        "",
        f"**{len(verdicts)} architectures: {equal} planned and bit-equal, {refused} refused, {wrong} wrong.**",
        "",
        f"`equal`: {STEPS} steps of SGD give the plain model's losses, outputs, gradients, buffers, parameters and",
        "random-number state, bit for bit, and the measured peak is within the budget: both at the smallest budget that",
        "can be met and halfway between it and the plain step's peak. `refused`: `solve` raised a CaptureError or a",
        "ValueError. `wrong`: anything else. `smallest` is that budget as a share of the plain step's measured peak,",
        "parameters and gradients included (these models are small: most of it cannot be recomputed); `used` are the",
        "measured peaks as shares of the two budgets; `s` is the time to capture, price and solve, other work beside it.",
    ]
    heads = ["model", "result", "capture", "stages", "smallest", "used", "s", "why"]
    for family, rows in found.items():
        lines += ["", f"## {family}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [f"| {' | '.join(cells(each))} |" for each in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="One row, as JSON.")
    parser.add_argument("name", choices=[name for cases in FAMILIES.values() for name in cases])
    parser.add_argument("backend", choices=["eager", "inductor"], nargs="?", default="eager")
    given = parser.parse_args()
    make = next(cases[given.name] for cases in FAMILIES.values() if given.name in cases)
    print(json.dumps(dataclasses.asdict(row(given.name, make, given.backend))))


if __name__ == "__main__":
    main()
