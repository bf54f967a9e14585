"""Models drawn at random, with skips, views, in-place changes and shared layers; how their steps compare."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor, nn

from rematplan import Plan, execute, solve
from tests.shared.helpers import smallest
from tests.shared.models import Case
from tests.shared.steps import assert_equal, peak_of_a_step, replan, restored, train

__all__ = ["WIDTH", "check", "drawn"]

WIDTH, BATCH = 24, 192


class Drawn(nn.Module):
    """A straight line of random layers, each of which may read any value made before."""

    def __init__(self, seed: int, length: int = 14) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.rows: list[tuple[str, int, int, int]] = []  # (kind, layer, value read, another value read)
        self.layers = nn.ModuleList()
        for made in range(1, length + 1):
            kind = draw.choice(
                ["linear"] * 4
                + [
                    "norm",
                    "layernorm",
                    "gelu",
                    "relu",
                    "relu_",
                    "dropout",
                    "tanh",
                    "view",
                    "cat",
                    "add",
                    "add_",
                ]
                + ["softmax", "half", "mean", "mask", "twice"]
            )
            layer = -1
            if kind in ("linear", "norm", "layernorm"):
                linears = [i for i, module in enumerate(self.layers) if isinstance(module, nn.Linear)]
                if kind == "linear" and linears and draw.random() < 0.15:
                    layer = draw.choice(linears)  # shared
                else:
                    self.layers.append(
                        {
                            "linear": lambda: nn.Linear(WIDTH, WIDTH),
                            "norm": lambda: nn.BatchNorm1d(WIDTH),
                            "layernorm": lambda: nn.LayerNorm(WIDTH),
                        }[kind]()
                    )
                    layer = len(self.layers) - 1
            latest = made - 1
            other = draw.randrange(made) if draw.random() < 0.4 else max(0, latest - 1)
            self.rows.append((kind, layer, latest, other))
        self.head = nn.Linear(WIDTH, 1)
        if draw.random() < 0.3 and self.layers:
            self.layers[0].requires_grad_(False)
        self.returns_more = draw.random() < 0.3

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for kind, layer, latest, other in self.rows:
            values.append(self.apply_row(kind, layer, values[latest], values[other]))
        result: Tensor = self.head(values[-1]).square().mean()
        return (result, values[len(values) // 2]) if self.returns_more else (result,)

    def apply_row(self, kind: str, layer: int, value: Tensor, other: Tensor) -> Tensor:
        if layer >= 0:
            made: Tensor = self.layers[layer](value)
            return made
        half = WIDTH // 2
        return {
            "gelu": lambda: nn.functional.gelu(value),
            "relu": lambda: torch.relu(value),
            "relu_": lambda: torch.relu_(value + 0.5),
            "dropout": lambda: nn.functional.dropout(value, 0.2, self.training),
            "tanh": lambda: torch.tanh(value),
            "view": lambda: value.view(-1, 2, half).transpose(0, 1).reshape(-1, WIDTH),
            "cat": lambda: torch.cat([value[:, :half], other[:, half:]], dim=1),
            "add": lambda: value + other,
            "add_": lambda: (value * 1.5).add_(other),
            "softmax": lambda: torch.softmax(value, dim=-1) * other,
            "half": lambda: torch.cat(value.chunk(2, dim=1)[::-1], dim=1),
            "mean": lambda: value - value.mean(dim=1, keepdim=True),
            "mask": lambda: torch.where(other > 0, value, value * 0.1),
            "twice": lambda: value * value.sigmoid(),
        }[kind]()


def drawn(seed: int) -> Case:
    torch.manual_seed(seed)
    batch = torch.randn(BATCH, WIDTH)
    return Case(Drawn(seed).train(), batch, (batch,))


def unhurried(plan: Plan) -> Plan:
    """The plan with seconds that no clock decides, so that a failure repeats."""
    stages = tuple(
        replace(stage, forward=1.0 + k % 3, backward=2.0) for k, stage in enumerate(plan.chain.stages)
    )
    return replace(plan, chain=replace(plan.chain, stages=stages))


def check(seed: int, capture: str = "graph") -> list[float]:
    """Train the drawn model by plans of four budgets; gives predicted / measured peak of each."""
    case = drawn(seed)
    plan = unhurried(solve(case.model, "1GiB", sample=case.sample, capture=capture))
    with restored(case.model):
        expected = train(case, case.model)
    low = smallest(plan.chain)
    ratios = []
    for share in (0.0, 0.3, 0.7, 1.0):
        tight = replan(plan, low + int(share * max(0, plan.plain.peak - low)))
        planned = execute(tight, case.model)
        with restored(case.model):
            assert_equal(train(case, planned), expected)
        with restored(case.model):
            measured = peak_of_a_step(case, planned)
        ratios.append(tight.predicted_peak / measured.peak)
        assert measured.peak <= tight.memory_budget, (seed, share, ratios, tight.schedule)
    return ratios
