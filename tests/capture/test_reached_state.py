"""State that a forward reaches by classes, functions, partials, proxies, optimizers, iterators and hooks."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rematplan import InfeasibleBudget, Plan, PlanMismatch, execute, plans_of, solve

WIDTH, CLASSES = 32, 8


class Net(nn.Module):
    """Three blocks and a head; what scales the loss is its subclasses' matter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        result: Tensor = self.head(x)
        return result

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x), y)

    def change(self, level: float) -> None:
        """What the loop does before a step."""


class Settings:
    weight = 1.0


class Outer:
    inner = Settings


class ByClass(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y) * Settings.weight

    def change(self, level: float) -> None:
        Settings.weight = level


class ByNestedClass(Net):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Outer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y) * self.settings.inner.weight

    def change(self, level: float) -> None:
        Settings.weight = level


class ByType(Net):
    temperature = 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y) * type(self).temperature

    def change(self, level: float) -> None:
        type(self).temperature = level


class ByPartial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = functools.partial(F.cross_entropy, label_smoothing=0.0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.logits(x), y)

    def change(self, level: float) -> None:
        self.criterion.keywords["label_smoothing"] = (level - 1) / 10


def weighted(loss: Tensor, weight: float = 1.0) -> Tensor:
    return loss * weight * weighted.scale  # type: ignore[attr-defined] # which is the point


weighted.scale = 1.0  # type: ignore[attr-defined] # likewise


class ByFunction(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return weighted(self.loss(x, y))

    def change(self, level: float) -> None:
        weighted.scale = level  # type: ignore[attr-defined] # likewise


class ByDefault(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return weighted(self.loss(x, y))

    def change(self, level: float) -> None:
        weighted.__defaults__ = (level,)


class ByMutableDefault(Net):
    def forward(self, x: Tensor, y: Tensor, seen: dict[str, int] = {"count": 0}) -> Tensor:  # noqa: B006 # the point
        seen["count"] += 1
        return self.loss(x, y) / seen["count"]


class ByIterator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.levels: Iterator[float] = iter([1.0, 0.9, 0.8, 0.7, 0.6, *[0.3] * 100])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y) * next(self.levels)


class Loop:
    epoch = 1.0


class ByProxy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["kept"] = Loop()
        self.loop = weakref.proxy(self.__dict__["kept"])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y) * self.loop.epoch

    def change(self, level: float) -> None:
        self.__dict__["kept"].epoch = level


class ByOptimizer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.optimizers = [torch.optim.SGD(self.head.parameters(), lr=0.1)]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y) * self.optimizers[0].param_groups[0]["lr"]

    def change(self, level: float) -> None:
        self.optimizers[0].param_groups[0]["lr"] = level


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.rnn(x.unsqueeze(0))[0][0], y)


KINDS = (
    ByClass, ByNestedClass, ByType, ByPartial, ByFunction, ByDefault, ByMutableDefault, ByIterator, ByProxy, ByOptimizer,
    Recurrent,
)  # fmt: skip # one table


def begin(kind: type[Net]) -> Net:
    Settings.weight = ByType.temperature = weighted.scale = 1.0  # type: ignore[attr-defined] # of the function
    weighted.__defaults__ = (1.0,)
    ByMutableDefault.forward.__defaults__[0]["count"] = 0  # type: ignore[index] # it has one
    torch.manual_seed(0)
    return kind().train()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, WIDTH, generator=generator), torch.randint(0, CLASSES, (64,), generator=generator)


def tight(model: nn.Module, sample: Any) -> Plan:
    try:
        return solve(model, 1, sample=sample)
    except InfeasibleBudget as error:
        return solve(model, error.smallest, sample=sample)


def trained(model: Net, run: Callable[..., Tensor]) -> list[Tensor]:
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
    for step in range(4):
        model.change(1.0 + step)
        optimizer.zero_grad()
        loss = run(*batch(step))
        loss.backward()
        found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return found


# Under the smallest budget of a graph blocks may not be able to take over: then it is captured at every
# change, and said.
@pytest.mark.filterwarnings("ignore:.*the op graph is captured again at every such change")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.slow
def test_what_a_forward_reaches_is_followed(kind: type[Net]) -> None:
    plain = begin(kind)
    want = trained(plain, plain)
    model = begin(kind)
    planned = execute(tight(model, batch(9)), model)
    got = trained(model, planned)
    assert len(got) == len(want)
    assert all(map(torch.equal, got, want))
    begin(kind)


@pytest.mark.slow
def test_a_recurrent_model_is_still_captured_as_a_graph() -> None:
    assert tight(begin(Recurrent), batch(9)).capture.kind == "graph"


class Noisy(Net):
    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return self.loss(x + torch.rand(x.shape, generator=generator), y)


def test_solve_leaves_generators_among_the_arguments_and_what_hooks_write() -> None:
    model, generator, log = begin(Noisy), torch.Generator().manual_seed(7), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, output: log.append(float(output.detach().sum())))
    before = generator.get_state()
    tight(model, (*batch(9), generator))
    assert torch.equal(generator.get_state(), before)
    assert log == []


class Freezing(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.head.weight.requires_grad_(False)
        return self.loss(x, y)


def test_solve_leaves_requires_grad_as_it_was() -> None:
    model = begin(Freezing)
    tight(model, batch(9))
    assert model.head.weight.requires_grad


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        first, last = self.get_submodule("blocks.0.0"), self.get_submodule("blocks.2.0")
        last.weight = first.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y)


def test_parameters_that_are_no_longer_tied_are_named() -> None:
    model = begin(Tied)
    planned = execute(tight(model, batch(9)), model)
    planned(*batch(0)).backward()
    first, last = model.get_submodule("blocks.0.0"), model.get_submodule("blocks.2.0")
    assert isinstance(first.weight, nn.Parameter)
    last.weight = nn.Parameter(first.weight.detach() * 0.5)
    with pytest.raises(PlanMismatch, match=r"'blocks\.2\.0\.weight' was tied"):
        planned(*batch(0))


class Copying(Net):
    """Makes its target at the first forward, as methods of self-supervision do."""

    target: nn.Module | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.target is None:
            self.__dict__["target"] = copy.deepcopy(self.blocks).requires_grad_(False)
        return self.loss(x, y) + self.target[0](x).mean() * 0  # type: ignore[index] # it is a ModuleList


def test_copies_of_blocks_made_in_a_planned_forward_are_modules_of_their_own() -> None:
    model = begin(Copying)
    planned = execute(tight(model, batch(9)), model)
    planned(*batch(0)).backward()
    with torch.no_grad():
        model.target[0][0].weight.zero_()  # type: ignore[index,union-attr] # it is a ModuleList
        model.target[0][2].weight.zero_()  # type: ignore[index,union-attr] # likewise
        x = batch(1)[0]
        bias = model.target[0][2].bias  # type: ignore[index,union-attr] # likewise
        assert torch.equal(model.target[0](x), bias.expand(64, WIDTH))  # type: ignore[index,operator] # likewise


class Batched(Net):
    def forward(self, given: dict[str, Any]) -> Tensor:
        return self.loss(given["x"], given["y"])


def test_one_tensor_that_is_given_twice_in_the_sample_may_be_two_in_training() -> None:
    class Summed(Net):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return (self.logits(x) * self.logits(z)).mean()

    model, (x, _) = begin(Summed), batch(9)
    planned = execute(tight(model, (x, x)), model)
    pair = batch(0)[0], batch(1)[0]
    assert torch.equal(planned(*pair), model(*pair))


def test_names_and_numbers_that_nobody_reads_need_no_plan_of_their_own() -> None:
    model = begin(Batched)

    def given(step: int) -> dict[str, Any]:
        x, y = batch(step)
        return {"x": x, "y": y, "file": f"{step}.png", "index": step}

    planned = execute(tight(model, (given(9),)), model)
    for step in range(3):
        planned(given(step)).backward()
        model.zero_grad()
    assert len(plans_of(planned)) == 1
