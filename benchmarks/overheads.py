"""Claim: at every budget the optimal schedule is the fastest; all solvers on three chains.

A GPT-2, a ResNet (captured, priced by a roofline, so that the run is the same everywhere) and a heterogeneous
synthetic chain. The two-level solver may copy to a host over a link that would take the time of the plain
step for all saved tensors.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.solver_speed import synthetic
from rematplan import solve
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.solvers import SOLVERS
from rematplan.scheduler.solvers.compare import Comparison, compare
from tests.shared.helpers import smallest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = 12


def _transformer() -> Chain:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1024, n_positions=256, n_embd=256, n_layer=12, n_head=4, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(0, 1024, (4, 256))
    model = GPT2LMHeadModel(config).train()
    return solve(model, 2**50, sample={"input_ids": ids, "labels": ids}, costs="roofline").chain


def _resnet() -> Chain:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3])
    batch = {"pixel_values": torch.randn(8, 3, 96, 96), "labels": torch.randint(0, 2, (8,))}
    model = ResNetForImageClassification(config).train()
    return solve(model, 2**50, sample=batch, costs="roofline").chain


@cache
def comparisons() -> dict[str, Comparison]:
    """All solvers from the smallest budget of the optimal one to the one that keeps all."""
    found = {}
    for title, chain, kept in (
        ("GPT-2, 12 layers", _transformer(), "ln_1"),
        ("ResNet-50", _resnet(), r"stages\.[23]"),
        ("synthetic, 60 unlike stages", synthetic(60), "[02468]$"),
    ):
        low, high = smallest(chain, "optimal"), smallest(chain, "keep_all")
        budgets = [low + (high - low) * i // (BUDGETS - 1) for i in range(BUDGETS)]
        link = sum(stage.options[0].saved for stage in chain.stages) / chain.plain_seconds
        host = HostMemory(2**60, link, link, asynchronous=True)
        parameters: dict[str, dict[str, Any]] = {"two_level": {"host": host}, "selective": {"keep": kept}}
        solvers = [name for name in SOLVERS if name != "exhaustive"]  # these chains are too long for it
        found[title] = compare(chain, budgets, solvers, parameters)
    return found


def report() -> str:
    """The tables, as Markdown."""
    lines = [
        "# Overhead against budget, for all solvers",
        "",
        "Predicted extra seconds of a step, as a share of the plain step; `-` where a solver finds nothing that fits. Budgets",
        "from the smallest that the optimal solver can meet to that of keeping everything. `two_level` has a host memory",
        "besides, at the end of a link that would take the time of the plain step to copy all saved tensors once, in either",
        "direction, while the device computes.",
        "",
        "![overhead against budget](overheads.svg)",
    ]
    for title, table in comparisons().items():
        lines += ["", f"## {title} ({len(table.chain)} stages)", ""]
        lines.append(f"| budget MiB | {' | '.join(table.cells)} |")
        lines.append("|---" * (len(table.cells) + 1) + "|")
        for index, budget in enumerate(table.budgets):
            overheads = (table.overhead(solver, index) for solver in table.cells)
            row = " | ".join("-" if o is None else f"{o:.1%}" for o in overheads)
            lines.append(f"| {budget / 2**20:.1f} | {row} |")
        longest = (max(cell.solve_seconds for cell in cells) for cells in table.cells.values())
        lines.append(f"| longest solve, s | {' | '.join(f'{seconds:.3f}' for seconds in longest)} |")
    return "\n".join(lines)


def figure() -> Figure:
    """Overhead against budget, one panel a chain."""
    from matplotlib.figure import Figure

    found = comparisons()
    drawn = Figure(figsize=(5 * len(found), 4.2), layout="constrained")
    for axes, (title, table) in zip(
        drawn.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for solver in table.cells:
            overheads = [table.overhead(solver, i) for i in range(BUDGETS)]
            points = [
                (b / 2**20, 100 * o) for b, o in zip(table.budgets, overheads, strict=True) if o is not None
            ]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=solver) if points else None
        axes.set(title=title, xlabel="budget, MiB", ylabel="overhead, %", ylim=(-3, 150))
        axes.grid(alpha=0.3)
    drawn.axes[0].legend(fontsize="small")
    return drawn
