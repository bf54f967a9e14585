"""Claim: plans made from estimated seconds cost little more than plans made from measured ones.

Forward ops are timed one by one, in grad mode, and compared with what ``scheduler/costs/roofline.py`` says of
them. Each model is then priced twice, with the same bytes and the same options: in measured seconds, and in
estimated ones. Plans made with either are judged in the measured seconds.
"""

from __future__ import annotations

import bisect
import inspect
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from benchmarks.op_dag import op_seconds
from benchmarks.op_level_cases import DEVICE, SCALE
from rematplan import InfeasibleBudget, simulate, solve_chain
from rematplan.scheduler.capture.graph.graph_capture import GraphCapture, capture_graph, op_graphs
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.costs.graph_chain import graph_chain, measure_graph
from rematplan.scheduler.costs.resident import resident_parts
from rematplan.scheduler.costs.roofline import device_rates, roofline_graph
from rematplan.scheduler.torch_layer.call import canonical_call
from rematplan.scheduler.torch_layer.preserve import preserved
from rematplan.scheduler.torch_layer.private import pytree
from tests.shared import models
from tests.shared.helpers import smallest
from tests.shared.models import Case

SHARES = (0.3, 0.5, 0.7)  # of the way from the smallest budget to keeping all
SOLVERS = ("optimal", "revolve", "sqrt", "chen", "recursive", "periodic")  # whose plans are ranked
PARAMETERS: Mapping[str, Mapping[str, Any]] = {"periodic": {"every": 3}}
REPEATS = 7  # runs whose median is an op's seconds
KINDS: Mapping[str, tuple[str, ...]] = {  # the first part of an op's name that fits names its kind
    "products": ("linear", "addmm", "matmul", "mm", "bmm", "baddbmm"),
    "convolution": ("conv",),
    "attention": ("scaled_dot_product", "_scaled_dot_product"),
    "norm": ("batch_norm", "layer_norm", "group_norm", "native_", "rms_norm"),
    "softmax, loss": ("softmax", "_softmax", "log_softmax", "_log_softmax", "cross_entropy", "nll_loss"),
    "random": ("dropout", "bernoulli", "rand", "feature_dropout"),
    "heavy pointwise": ("gelu", "silu", "tanh", "exp", "sigmoid", "pow", "cos", "sin", "rsqrt", "erf"),
    "copies": ("clone", "contiguous", "cat", "_to_copy", "to", "copy_", "repeat", "pad", "upsample", "stack"),
    "embedding": ("embedding", "index", "gather"),
    "pooling, sums": ("max_pool", "avg_pool", "adaptive_avg_pool", "mean", "sum"),
}
SUBJECTS: Mapping[str, Callable[[], Case]] = {
    "GPT-2": lambda: models.make_gpt2(4 * SCALE, 128, 1024, n_layer=4, n_embd=256, n_head=4),
    "Llama": lambda: models.make_llama(
        4 * SCALE,
        128,
        1024,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "ResNet": lambda: models.make_resnet(
        8 * SCALE, 96, embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 3, 2]
    ),
    "ViT": lambda: models.make_vit(
        4 * SCALE, 128, hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768
    ),
    "U-Net": lambda: models.make_unet(4 * SCALE, 24, 77, (32, 64, 128)),
}


class OpTime(NamedTuple):
    """One op of a model: seconds by the clock and by the roofline."""

    kind: str
    measured: float
    estimated: float


class Budgeted(NamedTuple):
    """Two plans for one budget, in measured seconds of a step.

    Attributes:
        share: of the way from the smallest budget to keeping all.
        measured: of the plan made with measured seconds.
        roofline: of the plan made with estimated seconds.
        believed: what the latter was thought to take, in estimated seconds of the plain step.
    """

    share: float
    measured: float
    roofline: float
    believed: float


@dataclass(frozen=True)
class Checked:
    """What the roofline is worth on one model.

    Attributes:
        ops: forward ops, views included.
        measured, estimated: the chain, in either seconds.
        budgets: one for each of ``SHARES``.
        overheads: for each plan of each solver at each budget, its overhead in measured and in estimated
            seconds.
    """

    ops: tuple[OpTime, ...]
    measured: Chain
    estimated: Chain
    budgets: tuple[Budgeted, ...]
    overheads: tuple[tuple[float, float], ...]

    @property
    def worst(self) -> float:
        """The most that a plan made with estimates costs above the other, as a share of it."""
        return max(b.roofline / b.measured - 1 for b in self.budgets)


def kind_of(name: str) -> str:
    """The kind of an op, by its name in aten."""
    found = [kind for kind, names in KINDS.items() if name.removesuffix("_") in names]
    found += [kind for kind, names in KINDS.items() if name.startswith(names)]
    return found[0] if found else "pointwise"


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 1 where one side is all alike, for then no order is wrong."""
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return 1.0
    return float(spearmanr(a, b).statistic)


def _times(capture: GraphCapture, flat: Sequence[Any], repeats: int) -> tuple[list[OpTime], list[float]]:
    """The ops, and their estimated seconds."""
    op_seconds(capture, flat, clock=True)  # a warm-up
    runs = [op_seconds(capture, flat, clock=True) for _ in range(repeats)]
    measured = [statistics.median(times) for times in zip(*runs, strict=True)]
    estimated = op_seconds(capture, flat)
    names = [str(op.node.target).removeprefix("aten.").split(".")[0] for op in capture.graph.ops]
    ops = [
        OpTime(kind_of(name) if guess else "views", clock, guess)
        for name, clock, guess in zip(names, measured, estimated, strict=True)
    ]
    return ops, estimated


def _two_chains(case: Case, repeats: int) -> tuple[tuple[OpTime, ...], Chain, Chain]:
    """The ops, the chain in measured seconds, and the same chain in estimated ones."""
    model = case.model
    call = canonical_call(inspect.signature(model.forward), case.args, case.kwargs)
    capture = capture_graph(next(op_graphs(model, call)), model)
    resident = sum(resident_parts(model, call, capture.device).values())
    flat = pytree.tree_leaves(call)
    with preserved(model):
        capture.observe(model, call)
    with preserved(model):
        costs = measure_graph(capture, model, call)
    with preserved(model):
        ops, seconds = _times(capture, flat, repeats)

    def chain(costs: Any) -> Chain:
        # By its sums the optimum is exact, so that what one plan loses to another is due to the estimates
        # alone.
        return graph_chain(capture, model, costs, resident=resident, loss_is_output=True).as_sums()

    measured, estimated = chain(costs), chain(roofline_graph(capture, costs))
    stages = []
    for k, (first, last) in enumerate(itertools.pairwise(capture.linear.cuts)):
        own, stage = seconds[first:last], estimated.stages[k]
        rerun = capture.rerun[k]
        options = (
            replace(option, recompute=math.fsum(own[i] for i in again))
            for option, again in zip(stage.options, rerun, strict=True)
        )
        stages.append(replace(stage, options=tuple(options)))
    return tuple(ops), measured, replace(estimated, stages=tuple(stages))


def overhead(chain: Chain, schedule: Any) -> float:
    """Of a plan, as a share of the plain step, in the chain's seconds."""
    return simulate(chain, schedule).seconds / chain.plain_seconds - 1


def check(case: Case, repeats: int = REPEATS) -> Checked:
    """Price the model twice, and plan with both."""
    ops, measured, estimated = _two_chains(case, repeats)
    least = smallest(measured)
    most = simulate(measured, solve_chain(measured, 2**60, "keep_all")).peak
    budgets, overheads = [], []
    for share in SHARES:
        budget = int(least + share * (most - least))
        plans = [solve_chain(chain, budget) for chain in (measured, estimated)]
        mine, theirs = (simulate(measured, plan).seconds for plan in plans)
        believed = simulate(estimated, plans[1]).seconds / estimated.plain_seconds
        budgets.append(Budgeted(share, mine, theirs, believed))
        for solver in SOLVERS:
            try:
                plan = solve_chain(measured, budget, solver, **PARAMETERS.get(solver, {}))
            except InfeasibleBudget:
                continue
            overheads.append((overhead(measured, plan), overhead(estimated, plan)))
    return Checked(ops, measured, estimated, tuple(budgets), tuple(overheads))


class Row(NamedTuple):
    """Ops of one kind.

    Attributes:
        share, estimated: of all ops' seconds, measured and estimated.
        ratios: estimated / measured at 10, 50 and 90 % of the measured time; None if the roofline says that
            they take no time.
    """

    kind: str
    ops: int
    share: float
    estimated: float
    ratios: tuple[float, float, float] | None


def quantiles(ops: Sequence[OpTime]) -> tuple[float, float, float]:
    """Estimated / measured seconds that 10, 50 and 90 % of the ops' measured time lie below.

    By time and not by number: a hundred counters of a BatchNorm say nothing of a step.
    """
    ordered = sorted(ops, key=lambda op: op.estimated / op.measured)
    until = list(itertools.accumulate(op.measured for op in ordered))
    at = [ordered[bisect.bisect_left(until, q * until[-1])] for q in (0.1, 0.5, 0.9)]
    low, middle, high = (op.estimated / op.measured for op in at)
    return low, middle, high


def rows(ops: Iterable[OpTime]) -> list[Row]:
    """By kind, those that take most of the time first."""
    all_ops = list(ops)
    total, guess = math.fsum(op.measured for op in all_ops), math.fsum(op.estimated for op in all_ops)
    found = []
    for kind in {op.kind for op in all_ops}:
        own = [op for op in all_ops if op.kind == kind]
        at = quantiles(own)
        share, estimated = math.fsum(op.measured for op in own), math.fsum(op.estimated for op in own)
        found.append(Row(kind, len(own), share / total, estimated / guess, at if at[2] else None))
    return sorted(found, key=lambda row: -row.share)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(c)} |" for c in lines)]


def _model_line(title: str, found: Checked) -> list[str]:
    """One model in the table of models."""
    cells = [title, f"{found.measured.plain_seconds:.3f}"]
    for field in ("forward", "backward"):
        seconds = [
            math.fsum(getattr(s, field) for s in chain.stages) for chain in (found.estimated, found.measured)
        ]
        cells.append(f"{seconds[0] / seconds[1]:.2f}")
    timed = [op for op in found.ops if op.estimated]
    stages = [[s.forward + s.backward for s in chain.stages] for chain in (found.measured, found.estimated)]
    ranks = (
        rank_correlation([op.measured for op in timed], [op.estimated for op in timed]),
        rank_correlation(*stages),
        rank_correlation([o[0] for o in found.overheads], [o[1] for o in found.overheads]),
    )
    return cells + [f"{rank:.2f}" for rank in ranks]


def _plan_lines(title: str, found: Checked) -> list[list[str]]:
    """One model in the table of plans."""
    plain = found.measured.plain_seconds
    return [
        [
            title,
            f"{b.share:.0%}",
            f"{b.measured / plain - 1:.2%}",
            f"{b.roofline / plain - 1:.2%}",
            f"{b.believed - 1:.2%}",
            f"{b.roofline / b.measured - 1:.2%}",
        ]
        for b in found.budgets
    ]


def summary(checked: Mapping[str, Checked]) -> list[str]:
    """The tables, as lines of Markdown."""
    ops = [op for found in checked.values() for op in found.ops]
    kinds = (
        [
            row.kind,
            str(row.ops),
            f"{row.share:.1%}",
            f"{row.estimated:.1%}",
            *(["-"] * 3 if row.ratios is None else [f"{ratio:.2f}" for ratio in row.ratios]),
        ]
        for row in rows(ops)
    )
    low, middle, high = quantiles([op for op in ops if op.estimated])
    within = {
        factor: math.fsum(op.measured for op in ops if 1 / factor <= op.estimated / op.measured <= factor)
        / math.fsum(op.measured for op in ops)
        for factor in (1.5, 2, 4)
    }
    shares = ", ".join(f"{share:.0%} within a factor of {factor:g}" for factor, share in within.items())
    worst = max(checked, key=lambda title: checked[title].worst)
    losses = [b.roofline / b.measured - 1 for found in checked.values() for b in found.budgets]
    return [
        "",
        "## Ops, by kind",
        "",
        *_table(["kind", "ops", "measured", "estimated", "10 %", "50 %", "90 %"], kinds),
        "",
        f"Of the ops' measured time, {shares}; all kinds: {low:.2f}, {middle:.2f}, {high:.2f}.",
        "",
        "## Models",
        "",
        *_table(
            ["model", "step, s", "forward", "backward", "ranks of ops", "of stages", "of plans"],
            (_model_line(title, found) for title, found in checked.items()),
        ),
        "",
        "## Plans",
        "",
        *_table(
            ["model", "budget", "measured", "roofline", "believed", "loss"],
            (line for title, found in checked.items() for line in _plan_lines(title, found)),
        ),
        "",
        (
            f"A plan made with estimates takes {statistics.mean(losses):.2%} longer on average, and at most "
            f"{max(losses):.2%} ({worst})."
        ),
    ]


def _moved(case: Case) -> Case:
    """The case on the device that is measured."""

    def move(value: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), value)

    return Case(case.model.to(DEVICE), move(case.sample), move(case.args), move(case.kwargs))


def report(subjects: Mapping[str, Callable[[], Case]] | None = None, repeats: int = REPEATS) -> str:
    """The page."""
    checked = {}
    for title, make in (SUBJECTS if subjects is None else subjects).items():
        torch.manual_seed(0)
        checked[title] = check(_moved(make()), repeats)
    rates, threads = device_rates(torch.device(DEVICE)), torch.get_num_threads()
    return "\n".join(
        [
            "# Estimated seconds against measured ones",
            "",
            (
                f"On {DEVICE}, {threads} thread{'s' * (threads > 1)}; the roofline's rates: {rates.flops / 1e9:.1f} GFLOP/s, "
                f"{rates.bandwidth / 1e9:.1f} GB/s, {1e6 * rates.launch:.1f} µs an op."
            ),
            "",
            f"Forward ops run one by one in grad mode, the median of {repeats} runs; `measured` and `estimated` are the kind's",
            "shares of all ops' seconds, the other columns estimated / measured seconds of single ops, at 10, 50 and 90 % of the",
            "kind's measured time. Ops that take some microseconds are beyond estimates: the interpreter that times them takes as",
            "long, which `views` show.",
            "Of models: the step's measured seconds, estimated / measured seconds of all stages' forwards and backwards, and",
            "Spearman's rank correlation of estimated and measured seconds of ops, of stages (forward and backward), and of",
            f"overheads of the plans that {', '.join(SOLVERS)} make at the budgets below.",
            "Of plans: the budget lies so far between the smallest one and keeping all; overheads in measured seconds of the",
            "plan made with measured seconds and of the one made with estimates; the overhead that estimates promised; and",
            "by how much the step of the second plan is longer. Both choose among the same options: those that measured",
            "seconds suggest.",
            *summary(checked),
        ]
    )
