"""Claim: stages kept in part beat what people use, at equal measured peak, in the time of a real step.

Per model the plain step, the baselines of ``baselines.py``, the stage-level optimum and the op-level optimum, all
executed for real. Gradients exist before the step and count as live all step, as when they are accumulated: what
the methods differ in is activations. Budgets are shares of the plain step's activation bytes: its measured peak less
what is live all step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import baselines
from executors import measure_peak
from scheduler import InfeasibleBudget, Plan, solve
from scheduler.capture.loss import find_loss
from tests import models
from tests.models import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPEATS = 3
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)  # at which both levels run
MORE = (0.3,)  # at which the op level alone runs
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 16 if DEVICE == "cuda" else 1  # how many times the batch of the CPU


def _gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2048, n_positions=64, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(0, 2048, (SCALE, 64))
    return models._keywords(GPT2LMHeadModel(config), input_ids=ids, labels=ids)


def _llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    ids = torch.randint(0, 2048, (2 * SCALE, 32))
    return models._keywords(LlamaForCausalLM(config), input_ids=ids, labels=ids)


def _resnet() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    images, labels = torch.randn(2 * SCALE, 3, 96, 96), torch.randint(0, 2, (2 * SCALE,))
    return models._keywords(ResNetForImageClassification(ResNetConfig()), pixel_values=images, labels=labels)


def _vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    images, labels = torch.randn(SCALE, 3, 224, 224), torch.randint(0, 2, (SCALE,))
    return models._keywords(ViTForImageClassification(config), pixel_values=images, labels=labels)


def _unet() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=24,
        block_out_channels=(64, 128, 256),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
    )
    return models._keywords(
        model,
        sample=torch.randn(SCALE, 4, 24, 24),
        timestep=torch.full((SCALE,), 3),
        encoder_hidden_states=torch.randn(SCALE, 77, 256),
    )


CASES: Mapping[str, Callable[[], Case]] = {
    "GPT-2, 12 layers, 768": _gpt2,
    "Llama, 8 layers, 1024, GQA": _llama,
    "ResNet-50": _resnet,
    "ViT, 12 layers, 384": _vit,
    "U-Net": _unet,
}
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
class Compared:
    """All methods on one model. A plan that no schedule fits is None.

    Attributes:
        about: of the model and its plan, in words.
        resident: bytes live all step.
        op_level, stage_level: share of the activation bytes -> run.
        baselines: name -> run, and ours within the same measured peak.
    """

    title: str
    about: str
    resident: int
    plain: Run
    op_level: dict[float, Run | None]
    stage_level: dict[float, Run | None]
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
    """Seconds: of the processor where one thread does all the work, so that others on the machine count less."""
    alone = DEVICE == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


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
    for share in sorted({*SHARES, *MORE}):
        budget = int(bench.resident + share * activations)
        op[share] = bench.planned(baselines.op_level, plan, budget)
        if share in SHARES:
            stage[share] = bench.planned(baselines.stage_level, plan, budget)
    bench.time(repeats)
    about = (
        f"{len(plan.chain)} stages with {sum(len(s.options) for s in plan.chain.stages)} options; captured as "
        f"{plan.capture.kind}: {plan.capture.reason}; planned in {took:.0f} s."
    )
    return Compared(title, about, bench.resident, bench.plain, op, stage, pairs)


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
        rows.append([f"{share:.0%}", *_cells(found, ours), *other, ratio])
    ours_heads = ["predicted", "measured", "peak", "within", "bit-equal"]
    lines += _table(
        ["budget", *ours_heads, "stage-level predicted", "measured", "time: op / stage level"], rows
    )
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


def report(cases: Mapping[str, Compared] | None = None) -> str:
    """The tables, as Markdown."""
    found = {title: compared(title) for title in CASES} if cases is None else cases
    clock = "processor seconds" if DEVICE == "cpu" and torch.get_num_threads() == 1 else "seconds"
    about = f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads; {clock}, medians of {REPEATS}"
    lines = [
        "# Op-level plans against what people use",
        "",
        f"Every method executed for real: {about} interleaved repetitions; on a shared machine they are noisy.",
        "Overheads are of the plain step. Budgets and peaks are shares of the plain step's activation bytes: its",
        "measured peak less parameters, gradients (which exist before the step), buffers and inputs. `per-block` is Hugging",
        "Face's own switch, `N segments` is `checkpoint_sequential`, `selective` is PyTorch's selective checkpoint that saves",
        "matmuls, convolutions and attention; `stage level` is the optimal plan of stages kept whole or not at all.",
        "Against each baseline we plan for its measured peak. Batches are small, so that all of it takes minutes; the",
        "gradients of weights on their way are then a large share of the bytes (Llama, ResNet).",
        "",
        "![step time against measured peak](op_level.svg)",
    ]
    for each in found.values():
        lines += section(each)
    return "\n".join(lines)


def figure() -> Figure:
    """Step time against measured peak, one panel a model."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.2 * len(CASES), 4.2), layout="constrained")
    for axes, title in zip(drawn.subplots(1, len(CASES), squeeze=False)[0], CASES, strict=True):
        found = compared(title)

        def points(runs: list[Run], found: Compared = found) -> tuple[list[float], list[float]]:
            runs = sorted(runs, key=lambda run: run.peak)
            return [100 * found.share(r) for r in runs], [1 + found.overhead(r) for r in runs]

        ours = [*found.op_level.values(), *(pair[1] for pair in found.baselines.values())]
        axes.plot(*points([r for r in ours if r]), "o-", markersize=3, label="op level")
        whole = [r for r in found.stage_level.values() if r]
        axes.plot(*points(whole), "s--", markersize=3, label="stage level")
        for name, (base, _) in found.baselines.items():
            axes.plot(*points([base]), "x", label=name)
        axes.plot(100, 1, "k*", label="plain")
        axes.set(title=title, xlabel="measured activation bytes, % of plain", ylabel="step time / plain")
        axes.grid(alpha=0.3)
    drawn.axes[0].legend(fontsize="small")
    return drawn
