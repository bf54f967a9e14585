"""Train models whose blocks have Python state, plainly and by a plan; record all that may differ."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rematplan import Plan, execute, measure_peak, solve
from rematplan.scheduler.torch_layer.python_state import Snapshot, holders_of
from tests.shared.helpers import smallest
from tests.shared.steps import CPU, assert_equal, replan

BATCH, WIDTH = 256, 16
Between = Callable[[nn.Module, int], None]


class Layer(nn.Module):
    """A residual pair of linear layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def inner(self, x: Tensor) -> Tensor:
        """The layer's own computation."""
        out: Tensor = x + self.drop(self.down(torch.tanh(self.up(x))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self.inner(x)


class Stack(nn.Module):
    """Layers one after the other, and a loss that adds what they left behind as ``aux``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        for layer in self.layers:
            x = layer(x)
        left = (getattr(layer, "aux", None) for layer in self.layers)
        aux = [each for each in left if isinstance(each, Tensor)]
        loss: Tensor = x.square().mean()
        return loss + 0.1 * torch.stack(aux).sum() if aux else loss


def plain_state(value: Any) -> Any:
    """A copy of an attribute that can be compared; None for what has no value of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, (list, deque)):
        return [plain_state(each) for each in value]
    if isinstance(value, dict):
        return {key: plain_state(each) for key, each in value.items()}
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return vars(value).copy() if type(value).__name__ == "Config" else None


def flattened(value: Any, path: str, into: dict[str, Tensor | None]) -> None:
    """Every number, text and tensor in a copy as a tensor, by its path."""
    if isinstance(value, dict):
        for key, each in value.items():
            flattened(each, f"{path}.{key}", into)
    elif isinstance(value, list):
        into[f"{path} length"] = torch.tensor(len(value))
        for i, each in enumerate(value):
            flattened(each, f"{path}[{i}]", into)
    elif isinstance(value, Tensor):
        into[path] = value
    elif isinstance(value, (bool, int, float)):
        into[path] = (
            torch.tensor(value, dtype=torch.float64)
            if abs(value) < 2**53
            else torch.tensor(hash(value) % 2**31)
        )


def everything(model: nn.Module) -> dict[str, Tensor | None]:
    """Parameters, gradients, buffers, attributes, generators."""
    record: dict[str, Tensor | None] = {"rng": torch.get_rng_state()}
    record["random"] = torch.tensor(hash(random.getstate()) % 2**31)
    record["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # type: ignore[index]  # noqa: NPY002
    for name, parameter in model.named_parameters():
        record[f"parameter {name}"] = parameter.detach().clone()
        record[f"gradient {name}"] = None if parameter.grad is None else parameter.grad.detach().clone()
    for name, module in model.named_modules():
        for key, value in {**vars(module), **module._buffers}.items():
            if not key.startswith("_") and key != "forward":
                flattened(plain_state(value), f"{name}.{key}", record)
    return record


def train(
    run: nn.Module, model: nn.Module, steps: int, before: Between | None, between: Between | None
) -> list[dict[str, Tensor | None]]:
    """A record of each step; ``between`` comes between forward and backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    records = []
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 # it is the global one that is drawn from
    for step in range(steps):
        torch.manual_seed(step)
        if before is not None:
            before(run, step)
        optimizer.zero_grad()
        loss = run(torch.randn(BATCH, WIDTH))
        if between is not None:
            between(run, step)
        loss.backward()
        records.append({"loss": loss.detach().clone(), **everything(run)})
        optimizer.step()
    return records


def planned_like(
    make: Callable[[], nn.Module], *, given: bool = False, roots: Sequence[tuple[str, Any]] = ()
) -> tuple[nn.Module, Plan]:
    """A model and its plan; the model is put back as it was made, whatever solve leaves."""
    torch.manual_seed(0)
    model = make().train()
    state = Snapshot([("", model), *roots])
    places = [h.content() for h in holders_of([("", model), *roots]) if h.kind in ("dict", "list")]
    values = (v for place in places for v in (place.values() if isinstance(place, dict) else place))
    tensors = [(t, t.detach().clone()) for t in values if isinstance(t, Tensor)]
    blocks: Any = [*model.get_submodule("layers").children()] if given else "modules"
    plan = solve(model, "1GiB", sample=torch.randn(BATCH, WIDTH), capture=blocks)
    state.restore()
    for tensor, value in tensors:
        tensor.data.copy_(value)
    return model, plan


def assert_trains_like_plain(
    make: Callable[[], nn.Module],
    *,
    steps: int = 5,
    before: Between | None = None,
    between: Between | None = None,
    given: bool = False,
    roots: Sequence[tuple[str, Any]] = (),
) -> None:
    """Five steps at the smallest budget and in the middle: equal bits, re-runs, within the budget."""
    torch.manual_seed(0)
    plain = make().train()
    want = train(plain, plain, steps, before, between)
    model, plan = planned_like(make, given=given, roots=roots)
    least = smallest(plan.chain)
    for budget in (least, (least + plan.plain.peak) // 2):
        tight = replan(plan, budget)
        if budget == least:
            assert None in tight.program.kept, "no block is run again"
        # A copy of its own for each: state and parameters move.
        twin, plan = (model, plan) if budget == least else planned_like(make, given=given, roots=roots)
        tight = replan(plan, budget)
        run = execute(tight, twin)
        assert_equal(train(run, twin, steps, before, between), want)
        peak = step_peak(run, twin)
        assert peak <= budget, f"{peak} of {budget} bytes"


def step_peak(run: nn.Module, model: nn.Module) -> int:
    """Measured peak of one more step with no gradients yet."""
    batch = torch.randn(BATCH, WIDTH)
    model.zero_grad()
    assert next(model.parameters()).device == CPU
    return measure_peak(lambda: run(batch).backward(), resident=[model, batch]).peak
