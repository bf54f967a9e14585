"""Claim: recurrent models of thousands of steps are planned in seconds, for budgets far below a plain step's.

An LSTMCell in a Python loop, on characters, each call a stage. The longest takes as long to plan as a few
plain steps.
"""

from __future__ import annotations

import pydoc_data.topics
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from rematplan import InfeasibleBudget, Plan, execute, measure_peak, solve

ROWS = ((200, 64, 8), (1000, 64, 8), (2000, 64, 8), (2000, 512, 32))  # time steps, width, batch
SHARES = (0.5, 0.1, 0.0)
REPEATS = 1


class Characters(nn.Module):
    """Predicts the last character of a sequence; the loop over time is in Python."""

    def __init__(self, width: int, characters: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.cell = nn.LSTMCell(width, width)
        self.head = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, steps + 1); the loss."""
        h = c = torch.zeros(ids.shape[0], self.cell.hidden_size)
        for step in range(ids.shape[1] - 1):
            h, c = self.cell(self.embedding(ids[:, step]), (h, c))
        return nn.functional.cross_entropy(self.head(h), ids[:, -1])


def characters(rows: int, steps: int) -> Tensor:
    """(rows, steps + 1) characters of Python's own documentation."""
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    return torch.tensor([list(text[row * steps : row * steps + steps + 1]) for row in range(rows)])


def step(model: nn.Module, ids: Tensor) -> None:
    """A training step, gradients cleared before."""
    model.zero_grad()
    model(ids).backward()


def seconds(model: nn.Module, ids: Tensor) -> float:
    """Thread seconds of a step, the median of a few."""
    times = []
    for _ in range(REPEATS):
        began = time.thread_time()
        step(model, ids)
        times.append(time.thread_time() - began)
    return statistics.median(times)


def smallest(plan: Plan) -> int:
    """The smallest budget (bytes) that can be met."""
    try:
        plan.within(1)
    except InfeasibleBudget as error:
        return error.smallest
    raise AssertionError("a step within one byte")


def rows(steps: int, width: int, batch: int) -> list[str]:
    """One row a budget."""
    torch.manual_seed(0)
    ids, model = characters(batch, steps), Characters(width).train()
    step(model, ids)
    plain = seconds(model, ids)
    model.zero_grad()
    began = time.thread_time()
    largest = solve(model, 2**50, sample=ids)
    planning = time.thread_time() - began
    least, most = smallest(largest), largest.plain.peak
    lines = []
    for share in SHARES:
        began = time.thread_time()
        plan = largest.within(int(least + share * (most - least)))
        again = time.thread_time() - began
        planned = execute(plan, model)
        model.zero_grad()

        def one(planned: nn.Module = planned) -> Any:
            return step(planned, ids)

        one()
        model.zero_grad()
        peak = measure_peak(one, resident=[model, ids]).peak
        taken = seconds(planned, ids)
        lines.append(
            f"| {steps} | {width} | {batch} | {planning:.1f} | {again:.1f} | {plan.memory_budget / most:.1%} | {most / 2**20:.1f} "
            f"| {plan.predicted_peak / 2**20:.2f} | {peak / 2**20:.2f} | {plan.predicted_peak / peak - 1:+.2%} "
            f"| {max(plan.timeline.runs)} | {plain:.2f} | {taken / plain:.2f} |"
        )
    return lines


def report() -> str:
    """The table, as Markdown."""
    columns = (
        "steps", "width", "batch", "solve s", "within s", "budget", "plain MiB", "predicted", "measured", "error", "most runs",
        "plain step s", "planned / plain",
    )  # fmt: skip # the headings of one table
    lines = [
        "# Recurrent models, one stage a time step",
        "",
        f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads. An LSTMCell in a Python loop over characters. Seconds are those of the",
        "thread; `solve s`: planning from nothing; `within s`: another budget from the same costs; `budget`: of the plain step's",
        "bytes, parameters and gradients included; the last of each model is the smallest that can be met.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for each in ROWS:
        lines += rows(*each)
    return "\n".join(lines)
