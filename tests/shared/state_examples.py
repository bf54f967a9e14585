"""Small training programs whose forward reads or writes state beside parameters, buffers and arguments."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rematplan import InfeasibleBudget, execute, solve
from tests.shared.steps import assert_equal, state

ROWS, WIDTH, STEPS = 64, 16, 5


def layers() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(3))
    )


class Example(nn.Module):
    """A model, what its loop does between steps, and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def between(self, step: int) -> None:
        """Before each step."""

    def loss(self, planned: Any, x: Tensor) -> Tensor:
        found: Tensor = planned(x)
        return found


class Annealed(Example):
    """A temperature that the loop lowers every step."""

    tau = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) / self.tau).softmax(-1).square().mean()

    def between(self, step: int) -> None:
        self.tau = 1 / (step + 1)


class DropoutSchedule(Example):
    """Dropout whose p changes between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.drop(self.layers(x)).square().mean()
        return found

    def between(self, step: int) -> None:
        self.drop.p = 0.1 * (step + 1)


class Teacher(Example):
    """A frozen copy that the forward itself moves."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = layers().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for ours, theirs in zip(self.layers.parameters(), self.teacher.parameters(), strict=True):
                theirs.lerp_(ours, 0.5)
        return (self.layers(x) - self.teacher(x)).square().mean()


class Rebound(Example):
    """A buffer that is replaced, not changed in place."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        loss: Tensor = (y - self.center).square().mean()
        self.center = self.center * 0.5 + y.detach().mean(0) + 1
        return loss


class Counted(Example):
    """A Python number that the forward counts up."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x).square().mean() * self.calls


class Stashed(Example):
    """An auxiliary loss and a statistic left on the module."""

    auxiliary: Any = None
    norm: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        self.auxiliary, self.norm = y.abs().mean(), y.detach().norm()
        found: Tensor = y.square().mean()
        return found

    def loss(self, planned: Any, x: Tensor) -> Tensor:
        found: Tensor = planned(x) + 0.1 * planned.auxiliary
        return found


class Noised(Example):
    """Noise from a generator of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        noisy = x + 0.1 * torch.randn(x.shape, generator=self.generator)
        found: Tensor = self.layers(noisy).square().mean()
        return found


class Clamped(Example):
    """A learnt temperature clamped within the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.temperature.clamp_(0.05, 0.08)
        return (self.layers(x) / self.temperature).softmax(-1).square().mean()


EXAMPLES: dict[str, type[Example]] = {
    cls.__name__: cls
    for cls in (Annealed, DropoutSchedule, Teacher, Rebound, Counted, Stashed, Noised, Clamped)
}


def train(model: Example, run: Any) -> tuple[list[Any], dict[str, Any]]:
    """Five steps: what each left, and the plain attributes at the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    records = []
    for step in range(STEPS):
        model.between(step)
        torch.manual_seed(5 + step)
        x = torch.randn(ROWS, WIDTH)
        optimizer.zero_grad()
        loss = model.loss(run, x)
        loss.backward()
        records.append({"loss": loss.detach().clone(), **state(model)})
        optimizer.step()
    return [*records, state(model)], plain_attributes(model)


def plain_attributes(model: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, str, tuple)) and not key.startswith("_")
    }


def assert_trains_as_plainly(cls: type[Example], capture: str) -> None:
    """Train plainly, and by a plan of the smallest budget; fail where they differ."""
    torch.manual_seed(0)
    model = cls().train()
    expected = train(model, model)
    torch.manual_seed(0)
    model = cls().train()
    before = copy.deepcopy(model.state_dict()), plain_attributes(model)
    x = torch.randn(ROWS, WIDTH)
    try:
        plan = solve(model, 1, sample=x, capture=capture, costs="roofline")
    except InfeasibleBudget as error:
        plan = solve(model, error.smallest, sample=x, capture=capture, costs="roofline")
    assert_equal(dict(model.state_dict()), dict(before[0]))
    assert plain_attributes(model) == before[1], "solve changed attributes"
    records, attributes = train(model, execute(plan, model))
    assert_equal(records, expected[0])
    assert attributes == expected[1], "attributes"
