"""Check bits: whether planned steps equal the plain step, and whether the plain step repeats itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cuda.findings import Findings
from benchmarks.cuda.machine import Machine
from benchmarks.cuda.steps import Training, capture_words, difference, planned_as, said, tight
from benchmarks.cuda.transformer import gpt
from rematplan import CaptureError, execute
from tests.shared.models import Case, ResidualNet

__all__ = [
    "attention_backends",
    "autocast_equality",
    "convolutions",
    "determinism",
    "determinism_asked_for",
    "equality",
    "lstm_dropout",
    "values",
]

CAPTURES = ("graph", "modules")
DTYPES = (torch.float32, torch.bfloat16)


def attention_backends(found: Findings, machine: Machine) -> None:
    """Name the kernels that attention chooses, and the places and contents of the seeds that they save."""
    if not machine.cuda:
        found.add("skipped", "takes a CUDA device")
        return
    for dtype in DTYPES:
        for dropout in (0.0, 0.1):
            name = f"{_short(dtype)}, dropout {dropout}"
            with found.attempt(name):
                query = torch.randn(2, 4, 256, 64, device=machine.device, dtype=dtype, requires_grad=True)
                made = nn.functional.scaled_dot_product_attention(
                    query, query, query, dropout_p=dropout, is_causal=True
                )
                found.add(name, {"node": made.grad_fn.name() if made.grad_fn else "", **_seeds(made)})


def _seeds(made: Tensor) -> dict[str, str]:
    """The scalars that the node of an attention saved."""
    node = made.grad_fn
    names = [name for name in dir(node) if name.startswith(("_saved_philox", "_saved_rng"))]
    saved = {name.removeprefix("_saved_"): getattr(node, name) for name in names}
    return {name: f"{each.device}: {each.flatten().tolist()}" for name, each in saved.items()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def equality(found: Findings, machine: Machine) -> None:
    """Train by plans at three budgets, by either capture, with dropout and without.

    Attention is made of plain products, so that only the executor is judged.
    """
    with sdpa_kernel(SDPBackend.MATH):
        for dropout in (0.0, 0.1):
            training = Training(gpt(machine, dropout), machine)
            _equal(found, f"dropout {dropout}, ", training, (0.0, 0.4, 0.8))


def autocast_equality(found: Findings, machine: Machine) -> None:
    """Do the same under bfloat16 autocast."""
    with sdpa_kernel(SDPBackend.MATH):
        _equal(found, "", Training(gpt(machine, 0.1), machine, autocast=True), (0.0, 0.4))


def _equal(found: Findings, what: str, training: Training, shares: tuple[float, ...]) -> None:
    """Compare steps by plans with the plain one."""
    want = training.outcome(training.model)
    twice = difference(training.outcome(training.model), want)
    found.add(f"{what}the plain step twice", twice or "equal")
    for capture in CAPTURES:
        with found.attempt(f"{what}{capture}"):
            plan = training.solve(capture=capture)
            for share in shares:
                name = f"{what}{capture}, budget {share:.0%}"
                with found.attempt(name):
                    got = training.outcome(execute(tight(plan, share), training.model))
                    found.equal(name, difference(got, want), repeatable=not twice)


def determinism(found: Findings, machine: Machine) -> None:
    """Run the plain step twice at torch's default settings, and show the outcome of solve(capture="auto")."""
    _determinism(found, machine, asked_for=False)


def determinism_asked_for(found: Findings, machine: Machine) -> None:
    """Do the same under torch.use_deterministic_algorithms(True): steps repeat, and a graph is captured."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    _determinism(found, machine, asked_for=True)


def _determinism(found: Findings, machine: Machine, *, asked_for: bool) -> None:
    for dtype, tokens in zip(2 * DTYPES, machine.pick((64, 64, 1024, 2048), (16, 32)), strict=False):
        name = f"{_short(dtype)}, {tokens} tokens"
        with found.attempt(name):
            case = gpt(machine, tokens=tokens)
            case.model.to(dtype)
            training = Training(case, machine)
            first = training.outcome(training.model)
            differs = difference(training.outcome(training.model), first)
            found.add(f"{name}, twice", differs or "equal", not differs if asked_for else None)
            plan = training.solve()
            graph = plan.capture.kind == "graph"
            found.add(f"{name}, captured as", capture_words(plan), graph if asked_for else None)


def values(found: Findings, machine: Machine) -> None:
    """Train with check="values" on memory that held other numbers before; no difference may be reported."""
    training = Training(gpt(machine), machine)
    for capture in CAPTURES:
        with found.attempt(capture):
            plan = tight(planned_as(found, training, capture), 0.0)
            found.add(f"{capture}, options", sum(len(stage.options) for stage in plan.chain.stages))
            _litter(machine)
            planned = execute(plan, training.model, check="values")
            for _ in range(2):
                training.outcome(planned)
            found.add(capture, "no difference", ok=True)


def _litter(machine: Machine) -> None:
    """Leave numbers in memory that ops which set nothing will find."""
    for device in (machine.device, torch.device("cpu")):
        made = [torch.full((), 1 << 40 | i, dtype=torch.int64, device=device) for i in range(64)]
        del made


def convolutions(found: Findings, machine: Machine) -> None:
    """Train a residual net by a plan, three steps each: cudnn.benchmark off and on, cudnn.deterministic."""
    channels, batch, pixels = machine.pick((64, 32, 64), (8, 2, 8))
    for benchmark, deterministic in ((False, False), (True, False), (False, True)):
        name = f"benchmark {'on' if benchmark else 'off'}{', deterministic' if deterministic else ''}"
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
        with found.attempt(name):
            torch.manual_seed(0)
            net = ResidualNet(channels, machine.pick(6, 2)).train()
            images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 10, (batch,))
            training = Training(Case(net, (images, labels), (images, labels)), machine)
            want = training.outcome(net)
            twice = difference(training.outcome(net), want)
            found.add(f"{name}, the plain step twice", twice or "equal", not twice if deterministic else None)
            plan = tight(training.solve(), 0.0)
            found.add(f"{name}, captured as", capture_words(plan))
            with said() as messages:
                planned = execute(plan, net)
                for step in ("first", "second", "third"):
                    differs = difference(training.outcome(planned), want)
                    found.equal(f"{name}, {step} planned step", differs, repeatable=not twice)
            found.add(f"{name}, said", "; ".join(messages) or "nothing")


class TwoLstms(nn.Module):
    """Two LSTMs of two layers each, with dropout between their layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.LSTM(width, width, 2, dropout=0.5, batch_first=True)
        self.second = nn.LSTM(width, width, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Give the features of each row and time."""
        result: Tensor = self.head(self.second(self.first(x)[0])[0])
        return result


def lstm_dropout(found: Findings, machine: Machine) -> None:
    """Train two LSTMs by a plan, or refuse them: cuDNN draws their dropout masks outside of the generator."""
    torch.manual_seed(0)
    width = machine.pick(64, 16)
    batch = torch.randn(16, 32, width)
    training = Training(Case(TwoLstms(width).train(), batch, (batch,)), machine)
    want = training.outcome(training.model)
    twice = difference(training.outcome(training.model), want)
    found.add("the plain step twice", twice or "equal")
    for capture in CAPTURES:
        with found.attempt(capture), _refusal(found, capture):
            plan = tight(training.solve(capture=capture), 0.0)
            found.add(f"{capture}, runs of each stage", str(plan.timeline.runs))
            planned = execute(plan, training.model)
            for step in ("first", "second"):
                differs = difference(training.outcome(planned), want)
                found.equal(f"{capture}, {step} planned step", differs, repeatable=not twice)


@contextlib.contextmanager
def _refusal(found: Findings, name: str) -> Iterator[None]:
    try:
        yield
    except CaptureError as error:
        found.add(name, f"refused: {str(error)[:300]}", ok=True)
