"""Claim: the cuts found from the graph alone lose next to nothing to coarser or finer ones.

Seconds come from a roofline and are noiseless; bytes are counted. All cut sets of a model get the same
budgets.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from rematplan import solve_chain
from rematplan.scheduler.capture.graph.cut import Linear, _forbidden, _gaps, _prefix, _valleys
from rematplan.scheduler.capture.graph.graph_capture import capture_graph, op_graphs
from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.costs.graph_chain import graph_chain, measure_graph
from rematplan.scheduler.costs.resident import resident_parts
from rematplan.scheduler.costs.roofline import roofline_graph
from rematplan.scheduler.torch_layer.call import canonical_call
from rematplan.scheduler.torch_layer.preserve import preserved
from tests.shared import models
from tests.shared.helpers import smallest
from tests.shared.models import Case

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)  # of the way from today's smallest budget to keeping all


FOUND = "found"


class Subject(NamedTuple):
    """A model, and a pattern that the module paths of one block share."""

    make: Callable[[], Case]
    block: str


LLAMA = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
VIT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SUBJECTS: Mapping[str, Subject] = {
    "GPT-2, 12 layers": Subject(lambda: models.make_gpt2(8, 128, 1024, n_embd=384, n_head=6), r"h\.\d+"),
    "Llama, 8 layers": Subject(lambda: models.make_llama(8, 128, 1024, **LLAMA), r"layers\.\d+"),
    "ResNet-50": Subject(lambda: models.make_resnet(16, 96), r"stages\.\d+\.layers\.\d+"),
    "ViT, 12 layers": Subject(lambda: models.make_vit(4, 224, **VIT), r"layers?\.\d+"),
    "U-Net": Subject(
        lambda: models.make_unet(4, 32, 77, (32, 64, 128)), r".*(resnets|attentions|samplers)\.\d+"
    ),
}


def _blocks(graph: OpGraph, pattern: str) -> list[str]:
    """The block that each op belongs to, "" if none."""
    found, last = [], ""
    for index, op in enumerate(graph.ops):
        stack = op.node.meta.get("nn_module_stack")
        if stack and any(graph.groups[key].producer == index for key in op.writes):
            match = re.search(pattern, list(stack.values())[-1][0])
            last = match.group() if match else ""
        found.append(last)
    return found


def _dips(graph: OpGraph) -> tuple[int, ...]:
    """Every allowed gap that holds no more bytes than its neighbours."""
    held, bad, prefix = _gaps(graph).held, _forbidden(graph), _prefix(graph)
    gaps = [g for g in range(prefix + 1, len(graph.ops)) if g not in bad]
    chosen = []
    for i, g in enumerate(gaps):
        before = held[gaps[i - 1]] if i else held[g] + 1
        after = held[gaps[i + 1]] if i + 1 < len(gaps) else held[g] + 1
        if held[g] <= min(before, after) and held[g] < max(before, after):
            chosen.append(g)
    return tuple(chosen)


def cut_sets(graph: OpGraph, linear: Linear, pattern: str) -> dict[str, tuple[int, ...]]:
    """Name -> inner cuts: those found first, then coarser ones, then finer ones."""
    ours = linear.cuts[1:-1]
    block = _blocks(graph, pattern)
    whole = tuple(c for c in ours if not block[c] or block[c] != block[c - 1])
    return {
        FOUND: ours,
        "a block a stage": whole,
        "two blocks a stage": whole[::2],
        "valleys, small stages too": tuple(_valleys(graph, _prefix(graph))[0]),
        "every dip of bytes": _dips(graph),
    }


def chain_of(case: Case, cuts: tuple[int, ...] | None) -> tuple[Chain, OpGraph, Linear]:
    """The chain of a model cut at ``cuts``; cuts are found if None."""
    call = canonical_call(inspect.signature(case.model.forward), case.args, case.kwargs)
    captured = capture_graph(next(op_graphs(case.model, call)), case.model, cuts=cuts)
    resident = sum(resident_parts(case.model, call, captured.device).values())
    with preserved(case.model):
        captured.observe(case.model, call)
    with preserved(case.model):
        costs = measure_graph(captured, case.model, call, clock=False)
    costs = roofline_graph(captured, costs)
    chain = graph_chain(captured, case.model, costs, resident=resident, loss_is_output=True)
    return chain, captured.graph, captured.linear


class Row(NamedTuple):
    """What one cut set gives.

    Attributes:
        least: the smallest budget, less what is live all step (bytes).
        overheads: predicted, at each budget of ``SHARES``; None where nothing fits.
        seconds: to price and to solve.
    """

    name: str
    stages: int
    least: int
    overheads: tuple[float | None, ...]
    seconds: float


def _overhead(chain: Chain, budget: int) -> float | None:
    try:
        schedule = solve_chain(chain, budget)
    except InfeasibleBudget:
        return None
    return simulate(chain, schedule).seconds / chain.plain_seconds - 1


def rows(case: Case, pattern: str) -> list[Row]:
    """All cut sets of one model at the same budgets (bytes); a set that equals an earlier one is left out."""
    found: list[Row] = []
    budgets: list[int] = []
    sets: dict[str, tuple[int, ...]] = {FOUND: ()}
    done = set()
    while sets:
        name, cuts = next(iter(sets.items()))
        del sets[name]
        if found and cuts in done:
            continue
        began = time.perf_counter()
        chain, graph, linear = chain_of(case, cuts if found else None)
        if not found:
            low, high = smallest(chain), smallest(chain, "keep_all")
            budgets = [int(low + (high - low) * share) for share in SHARES]
            sets = cut_sets(graph, linear, pattern)
            del sets[FOUND]
        done.add(linear.cuts[1:-1])
        overheads = tuple(_overhead(chain, budget) for budget in budgets)
        took = time.perf_counter() - began
        found.append(Row(name, len(chain), smallest(chain) - chain.fixed, overheads, took))
    return found


def _percent(value: float | None) -> str:
    return "does not fit" if value is None else f"{value:.2%}"


def section(title: str, found: list[Row]) -> list[str]:
    """One model, as lines of Markdown."""
    heads = ["cuts", "stages", "least, MiB", *(f"{share:.0%}" for share in SHARES), "s"]
    lines = ["", f"## {title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found:
        cells = [row.name, str(row.stages), f"{row.least / 2**20:.1f}", *map(_percent, row.overheads)]
        lines.append(f"| {' | '.join(cells)} | {row.seconds:.1f} |")
    ours = found[0]
    gains = [
        (mine - theirs, f"{row.name} at {share:.0%}")
        for row in found[1:]
        for share, mine, theirs in zip(SHARES, ours.overheads, row.overheads, strict=True)
        if mine is not None and theirs is not None
    ]
    most, where = max(gains)
    least = min(found[1:], key=lambda row: row.least)
    gain = f"{max(most, 0):.2%} of the step's time ({where})"
    less = f"{max(1 - least.least / ours.least, 0):.1%} of the least budget ({least.name})"
    return [*lines, "", f"The most that other cuts gain: {gain}; {less}."]


def report(subjects: Mapping[str, Subject] | None = None) -> str:
    """The tables, as Markdown."""
    lines = [
        "# Where to cut a model into stages",
        "",
        "Predicted overheads of the optimal plan, seconds by a roofline of this machine, bytes counted. Budgets lie",
        "between the smallest one of the cuts found and keeping all, the same bytes for all cut sets of a model.",
        "`least` is the smallest budget, less what is live all step; gradients are made in the step; `s` is the time to",
        "capture, price and solve. `a block a stage` drops every cut inside a block; `small stages too` does not merge",
        "small ones; `every dip of bytes` cuts at each gap between ops that holds no more than its neighbours.",
    ]
    for title, subject in (SUBJECTS if subjects is None else subjects).items():
        torch.manual_seed(0)
        lines += section(title, rows(subject.make(), subject.block))
    return "\n".join(lines)
