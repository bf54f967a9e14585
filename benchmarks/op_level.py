"""Claim: stages kept in part beat the usual methods at equal measured peak, in seconds of a real step.

Per model the plain step, the baselines of ``baselines.py``, the stage-level optimum and the op-level optimum,
all executed for real. Gradients exist before the step and count as live all step, as when they are
accumulated: what the methods differ in is activations. Budgets are shares of the plain step's activation
bytes: its measured peak less what is live all step. Beside each budget stands the floor
(``scheduler/bounds/floor.py``): overhead below which there is no plan of these ops, in the same seconds of
single ops.

``python -m benchmarks op_level --only ViT`` measures one model alone; with ``--write`` it replaces the
section of that model in the document.
"""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.op_dag import measured_seconds, relaxed_dag
from benchmarks.op_level_cases import CASES, DEVICE
from rematplan import InfeasibleBudget, Plan, measure_peak, solve
from rematplan.scheduler.bounds.dag import Dag
from rematplan.scheduler.bounds.floor import Floor, dag_floor
from rematplan.scheduler.torch_layer.call import canonical_call
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.private import pytree
from tests.shared import models
from tests.shared.models import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "op_level.md"
REPEATS = 3
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)  # at which both levels run
MORE = (0.3,)  # at which the op level alone runs
TARGETS = {0.3: 0.1, 0.5: 0.03}  # budget -> predicted overhead that is aimed at
FLOOR_SECONDS = 5.0  # of HiGHS for one moment of one budget
LISTED = 8  # kinds of ops that are named
SMALL: Mapping[str, Callable[[], Case]] = {"six blocks": models.tiny}  # for the test


@dataclass
class Run:
    """What one method did.

    Attributes:
        peak: measured bytes of a step.
        differs: what of loss, gradients and buffers is not that of the plain step; empty if nothing.
        budget, predicted: bytes and overhead of the plan, if it trains by one.
        times: seconds of each step.
    """

    peak: int = 0
    differs: str = ""
    budget: int = 0
    predicted: float = 0.0
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.times)


@dataclass
class Bound:
    """The floor of a model under one budget.

    Attributes:
        overhead: below which there is no plan, as a share of the plain step; inf if nothing fits.
        words: from when on which ops run again in the cheapest way found, by kind, with their seconds.
    """

    overhead: float
    words: str


@dataclass
class Compared:
    """All methods on one model. A plan that no schedule fits is None.

    Attributes:
        about: of the model and its plan, in words.
        resident: bytes live all step.
        op_level, stage_level: share of the activation bytes -> run.
        floors: share of the activation bytes -> floor; empty if there is no op graph.
        baselines: name -> run, and ours within the same measured peak.
    """

    title: str
    about: str
    resident: int
    plain: Run
    op_level: dict[float, Run | None]
    stage_level: dict[float, Run | None]
    floors: dict[float, Bound]
    baselines: dict[str, tuple[Run, Run | None]]

    def share(self, run: Run) -> float:
        """The measured peak of a run as a share of the plain step's activation bytes."""
        return (run.peak - self.resident) / (self.plain.peak - self.resident)

    def overhead(self, run: Run) -> float:
        """The measured overhead of a run."""
        return run.seconds / self.plain.seconds - 1


class _Bench:
    """Runs methods on one model: first once each, for peak and equality, then in turn, for time."""

    def __init__(self, case: Case) -> None:
        self.case = Case(case.model.to(DEVICE), case.sample, _moved(case.args), _moved(case.kwargs))
        self.model = self.case.model
        if hasattr(getattr(self.model, "config", None), "use_cache"):
            self.model.config.use_cache = False  # type: ignore[union-attr] # keys would be cached again by each recompute
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.buffers = [b.clone() for b in self.model.buffers()]
        self.queue: list[tuple[baselines.Method, Run]] = []
        self.expected: dict[str, Tensor] | None = None
        with baselines.plain(self.model) as trained:
            self._step(trained)  # a warm-up
        self.plain = Run()
        self.resident = self.run(baselines.plain, self.plain)

    def _step(self, trained: torch.nn.Module) -> Any:
        output = self.case(trained)
        find_loss(output)[0].backward()
        return output

    def _fresh(self) -> None:
        torch.manual_seed(1)
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
                buffer.copy_(before)

    def run(self, method: baselines.Method, run: Run) -> int:
        """One step: its peak, and what it computes; the bytes live all step are returned."""
        self._fresh()
        with method(self.model) as trained:
            inputs = [self.model, self.case.args, self.case.kwargs]
            measured = measure_peak(lambda: self._step(trained), resident=inputs)
        record = {"the loss": find_loss(measured.result)[0].detach().clone()}
        record |= {f"the gradient of {n}": p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}  # fmt: skip
        record |= {f"buffer {n}": b.clone() for n, b in self.model.named_buffers()}
        if self.expected is None:
            self.expected = record
        wrong = [name for name, value in self.expected.items() if not torch.equal(value, record[name])]
        if wrong:
            run.differs = f"{len(wrong)} differ: {wrong[0]} first"
            if all(name.startswith("buffer") for name in wrong):
                run.differs = f"{len(wrong)} buffers differ"
        run.peak = measured.peak
        self.queue.append((method, run))
        return measured.resident

    def baseline(self, method: baselines.Method) -> Run:
        """One step of a baseline."""
        run = Run()
        self.run(method, run)
        return run

    def planned(self, make: Callable[[Plan, int], Plan], plan: Plan, budget: int) -> Run | None:
        """One step by a plan within ``budget``; None if nothing fits."""
        try:
            made = make(plan, budget)
        except InfeasibleBudget:
            return None
        run = Run(budget=budget, predicted=made.predicted_overhead)
        self.run(baselines.planned(made), run)
        return run

    def time(self, repeats: int) -> None:
        """All methods in turn, the plain step before every few of the others."""
        plain, *others = self.queue
        for _ in range(repeats):
            for i, entry in enumerate(others):
                for method, run in (plain, entry) if i % 5 == 0 else (entry,):
                    self._fresh()
                    with method(self.model) as trained:
                        _wait()
                        began = _clock()
                        self._step(trained)
                        _wait()
                        run.times.append(_clock() - began)


def _moved(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, tree)


def _clock() -> float:
    """Seconds: of the processor where one thread does all the work, so that other processes count less."""
    alone = DEVICE == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _words(dag: Dag, floor: Floor) -> str:
    """What runs again at the floor, the costliest kinds of ops first."""
    if not floor.rerun:
        return "nothing found in time" if floor.extra else "nothing"
    kinds: dict[str, list[float]] = defaultdict(list)
    for o in floor.rerun:
        kinds[dag.ops[o].name.rstrip("0123456789").rstrip("_")].append(dag.ops[o].seconds)
    listed = sorted(kinds.items(), key=lambda item: -sum(item[1]))
    shown = [f"{len(times)} {kind} {1e3 * sum(times):.1f} ms" for kind, times in listed[:LISTED]]
    others = list(itertools.chain.from_iterable(times for _, times in listed[LISTED:]))
    shown += [f"{len(others)} others {1e3 * sum(others):.1f} ms"] if others else []
    at = dag.ops[dag.turns[floor.turn].ops[0]].name
    moment = (
        "once the forward is over"
        if at == "backward"
        else f"from the backward of {at.removesuffix(chr(39))} on"
    )
    return f"{moment}, {', '.join(shown)}"


def _floors(bench: _Bench, plan: Plan, budgets: Mapping[float, int]) -> dict[float, Bound]:
    """The floor under each budget (bytes), with ops measured now."""
    if plan.capture.kind != "graph":
        return {}
    case, capture = bench.case, plan.live[1]
    call = canonical_call(inspect.signature(bench.model.forward), case.args, case.kwargs)
    seconds = measured_seconds(capture, pytree.tree_leaves(call), plan.chain)
    dag = relaxed_dag(capture, seconds, bench.resident)
    found = {share: dag_floor(dag, budget, time_limit=FLOOR_SECONDS) for share, budget in budgets.items()}
    plain = plan.chain.plain_seconds
    return {share: Bound(floor.extra / plain, _words(dag, floor)) for share, floor in found.items()}


def compare(title: str, case: Case, repeats: int = REPEATS) -> Compared:
    """All methods on one model."""
    bench = _Bench(case)
    began = time.perf_counter()
    plan = solve(bench.model, 2**50, sample=(bench.case.args, bench.case.kwargs))
    took = time.perf_counter() - began
    pairs: dict[str, tuple[Run, Run | None]] = {}
    for name, method in baselines.methods(bench.model).items():
        run = bench.baseline(method)
        pairs[name] = run, bench.planned(baselines.op_level, plan, run.peak)
    activations = bench.plain.peak - bench.resident
    op: dict[float, Run | None] = {}
    stage: dict[float, Run | None] = {}
    budgets = {share: int(bench.resident + share * activations) for share in sorted({*SHARES, *MORE})}
    for share, budget in budgets.items():
        op[share] = bench.planned(baselines.op_level, plan, budget)
        if share in SHARES:
            stage[share] = bench.planned(baselines.stage_level, plan, budget)
    floors = _floors(bench, plan, budgets)
    bench.time(repeats)
    clock = "processor seconds" if DEVICE == "cpu" and torch.get_num_threads() == 1 else "seconds"
    shapes = ", ".join(
        "x".join(map(str, leaf.shape))
        for leaf in pytree.tree_leaves((bench.case.args, bench.case.kwargs))
        if isinstance(leaf, Tensor)
    )
    about = (
        f"Inputs {shapes}; {sum(p.numel() for p in bench.model.parameters()) / 1e6:.1f} M parameters. torch "
        f"{torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads; {clock}, medians of {repeats} interleaved "
        f"repetitions. {len(plan.chain)} stages with {sum(len(s.options) for s in plan.chain.stages)} options; captured as "
        f"{plan.capture.kind}: {plan.capture.reason}; planned in {took:.0f} s."
    )
    return Compared(title, about, bench.resident, bench.plain, op, stage, floors, pairs)


@cache
def compared(title: str) -> Compared:
    """The methods on a model of ``CASES``, measured once."""
    torch.manual_seed(0)
    return compare(title, CASES[title]())


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _cells(found: Compared, run: Run | None) -> list[str]:
    """Predicted overhead, measured overhead, measured share, within the budget, bit-equal."""
    if run is None:
        return ["does not fit", "", "", "", ""]
    over = run.peak - run.budget
    return [
        _percent(run.predicted),
        _percent(found.overhead(run)),
        _percent(found.share(run)),
        "yes" if over <= 0 else f"over by {over / 2**20:.2f} MiB",
        run.differs or "yes",
    ]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(r)} |" for r in rows),
    ]


def section(found: Compared) -> list[str]:
    """One model, as lines of Markdown."""
    half, third = found.op_level.get(0.5), found.op_level.get(0.3)
    plain = (
        f"Plain step {found.plain.seconds:.2f} s; live all step {found.resident / 2**20:.0f} MiB; activations "
        f"{(found.plain.peak - found.resident) / 2**20:.1f} MiB. {found.about}"
    )
    summary = (
        f"**At 50 %: predicted {_percent(half.predicted if half else None)}, measured "
        f"{_percent(found.overhead(half) if half else None)}. At 30 %: predicted "
        f"{_percent(third.predicted if third else None)}.**"
    )
    lines = ["", f"## {found.title}", "", plain, "", summary]
    rows = []
    for share, ours in found.op_level.items():
        whole = found.stage_level.get(share)
        ratio = f"{ours.seconds / whole.seconds:.3f}" if ours and whole else ""
        other = _cells(found, whole)[:2] if share in found.stage_level else ["", ""]
        floor = found.floors.get(share)
        bound = (
            "-"
            if floor is None
            else "nothing fits"
            if floor.overhead == math.inf
            else f"{floor.overhead:.1%}"
        )
        rows.append([f"{share:.0%}", bound, *_cells(found, ours), *other, ratio])
    ours_heads = ["predicted", "measured", "peak", "within", "bit-equal"]
    lines += _table(
        ["budget", "floor", *ours_heads, "stage-level predicted", "measured", "time: op / stage level"], rows
    )
    lines += _missed(found)
    rows = []
    for name, (base, ours) in found.baselines.items():
        ratio = f"{ours.seconds / base.seconds:.3f}" if ours else ""
        shown = [_percent(found.share(base)), _percent(found.overhead(base)), base.differs or "yes"]
        rows.append([name, *shown, *_cells(found, ours), ratio])
    heads = [
        "baseline",
        "peak",
        "overhead",
        "bit-equal",
        *(f"ours: {h}" for h in ours_heads),
        "time: ours / it",
    ]
    return lines + _table(heads, rows)


def _missed(found: Compared) -> list[str]:
    """For each target that is missed, the floor in words."""
    lines = []
    for share, target in TARGETS.items():
        ours, floor = found.op_level.get(share), found.floors.get(share)
        if floor is None or (ours is not None and ours.predicted <= target):
            continue
        proven = (
            "no plan of these ops meets it" if floor.overhead > target else "the floor does not rule it out"
        )
        lines += [
            "",
            f"Target at {share:.0%}: {target:.0%} predicted; {proven}. The floor: {floor.words}.",
        ]
    return lines


def chosen(only: str = "") -> list[str]:
    """The titles of ``CASES`` that ``only`` is part of.

    Raises:
        ValueError: there are none.
    """
    found = [title for title in CASES if only in title]
    if not found:
        raise ValueError(f"op_level: --only {only!r} names none of {', '.join(map(repr, CASES))}")
    return found


def report(cases: Mapping[str, Compared] | None = None, *, only: str = "") -> str:
    """The tables, as Markdown.

    Args:
        cases: already measured. Default: those of ``CASES`` whose titles have ``only`` in them; the sections
            of the others are taken from the document.
    """
    found = {title: compared(title) for title in chosen(only)} if cases is None else cases
    lines = [
        "# Op-level plans against what people use",
        "",
        "Every method executed for real, all methods on a model in one run; each section says on what, how often and how it",
        "was timed. Overheads are of the plain step. Budgets and peaks are shares of the plain step's activation bytes: its",
        "measured peak less parameters, gradients (which exist before the step), buffers and inputs. `per-block` is Hugging",
        "Face's own switch, `N segments` is `checkpoint_sequential`, `selective` is PyTorch's selective checkpoint that saves",
        "matmuls, convolutions and attention; `stage level` is the optimal plan of stages kept whole or not at all.",
        "Against each baseline we plan for its measured peak.",
        "",
        "`floor`: no plan of any kind that runs these ops whole has a lower overhead at this budget, by the seconds of single",
        "ops, measured one by one, and scaled such that no stage and no option of the plan is priced below the sum of",
        "its ops. Proven by integer programming: once the forward is over, what autograd saved and what does not fit has to be",
        "made again (`scheduler/bounds/floor.py` has the argument, `relaxed_dag` of `benchmarks/op_dag.py` what is left out of the",
        "step). The bytes of a plan that are no saved values, its gradients and workspaces, are not in the floor.",
    ]
    if cases is not None:
        return "\n".join([*lines, *itertools.chain.from_iterable(section(each) for each in cases.values())])
    earlier = DOCUMENT.read_text(encoding="utf-8") if len(found) < len(CASES) else ""
    sections = {part.partition("\n")[0]: part for part in earlier.rstrip("\n").split("\n## ")[1:]}
    for title in CASES:
        if title in found:
            lines += [
                *section(found[title]),
                "",
                f"![step time against measured peak]({_drawing(title)}.svg)",
            ]
        elif title in sections:
            lines += ["", f"## {sections[title].rstrip()}"]
    return "\n".join(lines)


def _drawing(title: str) -> str:
    """The name of a model's figure."""
    return f"op_level_{title.partition(',')[0].lower().replace('-', '')}"


def figures(*, only: str = "") -> dict[str, Figure]:
    """Name -> step time against measured peak, one figure a model."""
    return {_drawing(title): _figure(compared(title)) for title in chosen(only)}


def _figure(found: Compared) -> Figure:
    from matplotlib.figure import Figure

    def points(runs: list[Run]) -> tuple[list[float], list[float]]:
        runs = sorted(runs, key=lambda run: run.peak)
        return [100 * found.share(r) for r in runs], [1 + found.overhead(r) for r in runs]

    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.subplots()
    ours = [*found.op_level.values(), *(pair[1] for pair in found.baselines.values())]
    axes.plot(*points([r for r in ours if r]), "o-", markersize=3, label="op level")
    axes.plot(*points([r for r in found.stage_level.values() if r]), "s--", markersize=3, label="stage level")
    for name, (base, _) in found.baselines.items():
        axes.plot(*points([base]), "x", label=name)
    floors = {share: floor.overhead for share, floor in found.floors.items() if floor.overhead < math.inf}
    axes.plot([100 * share for share in floors], [1 + over for over in floors.values()], ":", label="floor")
    axes.plot(100, 1, "k*", label="plain")
    axes.set(title=found.title, xlabel="measured activation bytes, % of plain", ylabel="step time / plain")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return drawn
