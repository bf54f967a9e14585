"""Claim: within torch.compile, plans are ahead of its own memory budget at every peak.

Per model, in one process and in turn: the plain eager step; torch.compile of the whole model, at several
values of its ``activation_memory_budget``, and with every block checkpointed; our plan of the eager model,
and our plan with ``backend="inductor"``, each at every peak that the others measured. Gradients exist before
the step and count as live all step, as when they are accumulated. Shares are of the eager step's activation
bytes: its measured peak less what is live all step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor, nn

from benchmarks import baselines
from rematplan import InfeasibleBudget, Plan, measure_peak, solve
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.private import pytree
from tests.shared import models
from tests.shared.models import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 8 if DEVICE == "cuda" else 1
REPEATS = 7
TORCH_BUDGETS = (0.5, 0.3, 0.1, 0.0)
SHARES = (0.3, 0.2)  # of the activations, at which ours is tried besides
LLAMA = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
VIT = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 8}


def _gpt2(dropout: float) -> Case:
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
    return models.make_gpt2(4 * SCALE, 128, 1024, n_embd=256, n_layer=6, n_head=8, **rates)


CASES: Mapping[str, Callable[[], Case]] = {
    "GPT-2, 6 layers, 256": lambda: _gpt2(0.0),
    "GPT-2, 6 layers, 256, dropout": lambda: _gpt2(0.1),
    "Llama, 6 layers, 256": lambda: models.make_llama(4 * SCALE, 128, 1024, **LLAMA),
    "ViT, 8 layers, 192": lambda: models.make_vit(4 * SCALE, 224, **VIT),
    "ResNet": lambda: models.make_resnet(8 * SCALE, 96),
    "U-Net": lambda: models.make_unet(2 * SCALE, 24, 32, (32, 64, 128)),
}
SMALL: Mapping[str, Callable[[], Case]] = {"six blocks": models.tiny}  # for the test


@dataclass
class Run:
    """What one method did.

    Attributes:
        method: the context in which the model trains by it.
        peak: measured bytes of a step.
        budget, predicted: bytes of the plan, if it trains by one; predicted peak.
        wall, cpu: seconds of each step.
        loss: of the step.
    """

    name: str
    method: baselines.Method
    budget: int = 0
    predicted: int = 0
    peak: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    loss: float = 0.0


def torch_compiled(budget: float, method: baselines.Method = baselines.plain) -> baselines.Method:
    """torch.compile of the whole model with this ``activation_memory_budget``."""

    def backend(graph: Any, inputs: Any) -> Any:  # one object a method, so that each has its own code
        from torch._inductor.compile_fx import compile_fx

        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    made: dict[nn.Module, Any] = {}

    @contextmanager
    def compiled(model: nn.Module) -> Iterator[nn.Module]:
        with method(model) as trained, torch._functorch.config.patch(activation_memory_budget=budget):
            if model not in made:
                made[model] = torch.compile(trained, backend=backend, dynamic=False)
            yield made[model]

    return compiled


class Bench:
    """Runs methods on one model: first once each, for the peak, then in turn, for time."""

    def __init__(self, case: Case) -> None:
        move = lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf  # noqa: E731 # one line
        args, kwargs, sample = pytree.tree_map(move, (case.args, case.kwargs, case.sample))
        self.case = Case(case.model.to(DEVICE), sample, args, kwargs)
        self.model = self.case.model
        if hasattr(getattr(self.model, "config", None), "use_cache"):
            self.model.config.use_cache = False  # type: ignore[union-attr] # it is a model of transformers
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.runs: list[Run] = []
        self.resident = 0

    def step(self, trained: nn.Module) -> Tensor:
        """One forward and backward."""
        loss, _ = find_loss(self.case(trained))
        loss.backward()
        return loss.detach()

    def add(self, name: str, method: baselines.Method, plan: Plan | None = None) -> Run:
        """Run a method twice, and measure the second step's peak."""
        run = Run(name, method)
        if plan is not None:
            run.budget, run.predicted = plan.memory_budget, plan.predicted_peak
        with method(self.model) as trained:
            self.step(trained)
            torch.manual_seed(1)
            inputs = [self.model, self.case.args, self.case.kwargs]
            measured = measure_peak(lambda: self.step(trained), resident=inputs)
        self.resident = self.resident or measured.resident
        run.peak, run.loss = measured.peak, float(measured.result)
        self.runs.append(run)
        return run

    def time(self) -> None:
        """Run every method in turn, ``REPEATS`` times."""
        for _ in range(REPEATS):
            for run in self.runs:
                with run.method(self.model) as trained:
                    wall, cpu = time.perf_counter(), time.process_time()
                    self.step(trained)
                    if DEVICE == "cuda":
                        torch.cuda.synchronize()
                    run.wall.append(time.perf_counter() - wall)
                    run.cpu.append(time.process_time() - cpu)


def compared(title: str, case: Case) -> str:
    """Return the table of one model."""
    bench = Bench(case)
    plain = bench.add("plain eager", baselines.plain)
    others = [bench.add("torch.compile", torch_compiled(1.0))]
    others += [bench.add(f"torch.compile, budget {b}", torch_compiled(b)) for b in TORCH_BUDGETS]
    if any(type(module).__name__ in baselines.BLOCKS for module in bench.model.modules()):
        checkpointed = torch_compiled(1.0, baselines.per_block)
        others.append(bench.add("torch.compile, checkpoint per block", checkpointed))
    activations = plain.peak - bench.resident
    peaks = {run.name: run.peak for run in others}
    peaks |= {
        f"{share:.0%} of the activations": int(bench.resident + share * activations) for share in SHARES
    }
    wanted: dict[str, dict[str, Run | str]] = {"eager": {}, "inductor": {}}
    took = {}
    for backend, found in wanted.items():
        began = time.perf_counter()
        plan = solve(bench.model, plain.peak * 2, sample=case.sample, backend=backend)
        took[backend] = time.perf_counter() - began
        for name, peak in peaks.items():
            try:
                planned = plan.within(peak)
            except InfeasibleBudget as error:
                found[name] = f"needs {_share(error.smallest, bench.resident, activations)}"
                continue
            found[name] = bench.add(f"plan, {backend}, at {name}", baselines.planned(planned), planned)
    bench.time()
    return _table(title, bench, plain, others, wanted, took)


def _share(peak: int, resident: int, activations: int) -> str:
    return f"{(peak - resident) / activations:.0%}"


def _ratio(run: Run, other: Run) -> str:
    """Medians of a run's seconds over another's, wall and processor, round by round."""
    wall, cpu = (
        statistics.median(a / b for a, b in zip(*both, strict=True))
        for both in ((run.wall, other.wall), (run.cpu, other.cpu))
    )
    return f"{wall:.2f} ({cpu:.2f})"


def _table(
    title: str,
    bench: Bench,
    plain: Run,
    others: list[Run],
    wanted: Mapping[str, Mapping[str, Run | str]],
    took: Mapping[str, float],
) -> str:
    activations = plain.peak - bench.resident
    share = lambda run: _share(run.peak, bench.resident, activations)  # noqa: E731 # one line
    rows = []
    names = {run.name: run for run in others} | dict.fromkeys(f"{s:.0%} of the activations" for s in SHARES)
    for name, other in names.items():
        cells = [name] + ([share(other), _ratio(other, plain)] if other else ["", ""])
        for backend in ("eager", "inductor"):
            run = wanted[backend][name]
            cells += [run, ""] if isinstance(run, str) else [share(run), _ratio(run, plain)]
        rows.append(cells)
    planned = [run for run in bench.runs if run.budget]
    worst = max((abs(1 - run.peak / run.predicted) for run in planned), default=0.0)
    over = sum(run.peak > run.budget for run in planned)
    head = [
        "at the peak of",
        "share",
        "seconds",
        "our eager share",
        "seconds",
        "our compiled share",
        "seconds",
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    about = (
        f"Plain eager step {statistics.median(plain.wall):.2f} s, activations {activations / 2**20:.1f} MiB; planned in "
        f"{took['eager']:.0f} s, and {took['inductor']:.0f} s with compilation. Of {len(planned)} plans {over} over their "
        f"budget; predicted peaks at most {worst:.2%} off."
    )
    return "\n".join((f"## {title}", "", about, "", *lines))


def report(only: str = "", cases: Mapping[str, Callable[[], Case]] = CASES) -> str:
    """Return the document."""
    sections = []
    with torch._dynamo.config.patch(recompile_limit=64):
        for title, make in cases.items():
            if only in title:
                torch.manual_seed(0)
                torch._dynamo.reset()
                sections.append(compared(title, make()))
                print(sections[-1], flush=True)
    head = f"# Plans within torch.compile\n\n{__doc__.partition(chr(10) * 2)[2]}" if __doc__ else ""
    return "\n\n".join(
        (
            head + "Seconds are medians of ratios to the plain eager step, processor seconds in brackets.",
            *sections,
        )
    )
