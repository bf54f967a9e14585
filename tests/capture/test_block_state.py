"""Blocks with Python state train as they do plainly: state that a run reads, writes, counts and draws."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rematplan import CaptureError, Schedule, execute, solve
from rematplan.executors.step_state import Lasting
from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Forward, Keep
from rematplan.scheduler.torch_layer.layouts import storage_keys
from tests.shared.helpers import smallest
from tests.shared.state_training import (
    BATCH,
    WIDTH,
    Layer,
    Stack,
    assert_trains_like_plain,
    planned_like,
    train,
)
from tests.shared.steps import assert_equal, replan, scheduled

LOG: list[int] = []
DEPTH = 4


class Config:
    def __init__(self) -> None:
        self.calls, self.scale = 0, 1.0


class Counting(Layer):
    """Numbers, lists, deques and dicts that each run changes, some of which it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.seen, self.recent = 0, [1.0], deque([0.0], maxlen=3)
        self.table: dict[str, Any] = {"runs": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.seen.append(0.5 * self.runs)
        self.table["runs"] += 1
        self.table[f"run {self.runs}"] = float(len(self.seen))
        self.recent.append(float(sum(self.recent)) * 0.5 + 0.1)
        y: Tensor = self.inner(x) * (
            1 + 0.01 * self.seen[-1] + 0.1 * self.recent[-1] / (1 + self.table["runs"])
        )
        return y


class Stashing(Layer):
    """Leaves an auxiliary loss, attached, and a statistic."""

    aux: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.norm = None, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.aux, self.norm = y.abs().mean(), y.detach().norm()
        return y


class Remembering(Layer):
    """Carries the mean of its output over to the next step, and a list of old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.old: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.hidden is not None:
            y = y + 0.1 * self.hidden + 0.1 * torch.stack(self.old).mean(0)
        self.hidden = y.detach().mean(0)
        self.old.append(self.hidden * 0.5)
        del self.old[:-2]
        return y


class Rebinding(Layer):
    """Binds a buffer anew at each run, and makes an attribute lazily."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x - self.mean)
        self.mean = self.mean * 0.9 + 0.1 * y.detach().mean(0)
        if not hasattr(self, "late"):
            self.late = y.detach().std(0)
            return y
        return y + 0.01 * self.late


class InPlace(Layer):
    """Plain tensors changed in place and through .data, and a parameter that is clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.average, self.bank = torch.zeros(WIDTH), {"keys": [torch.zeros(WIDTH)]}
        self.code = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)
        self.heat = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.heat.clamp_(0.5, 0.999)
        y = self.inner(x) * self.heat
        self.average.mul_(0.9).add_(y.detach().mean(0))
        self.code.data = self.code.data * 0.9 + 0.01 * y.detach().mean(0)
        self.bank["keys"][0].data.lerp_(y.detach().std(0), 0.5)
        return y + 0.1 * torch.tanh(self.average + self.code + self.bank["keys"][0])


class Shared(Layer):
    """Counts in a config that all blocks share, in its class, and in a global list."""

    total = 0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        self.config.calls += 1
        Shared.total += 1
        LOG.append(Shared.total)
        y: Tensor = self.inner(x) * (1 + 0.001 * (self.config.calls + Shared.total + len(LOG)))
        return y


class Closed(Layer):
    """Counts in a closure."""

    def __init__(self) -> None:
        super().__init__()
        count = 0

        def following() -> int:
            nonlocal count
            count += 1
            return count

        self.following = following

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + 0.01 * self.following())


class Drawing(Layer):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_, self.numpy_ = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.python = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.torch_)
        return self.inner(x + 0.1 * noise + self.python.random()) * float(self.numpy_.random())


class DrawingGlobally(Layer):
    """Draws from Python's generator and NumPy's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + random.gauss(0, 1)) * float(np.random.standard_normal())  # noqa: NPY002


def shared() -> nn.Module:
    LOG.clear()
    Shared.total = 0
    config = Config()
    return Stack(*(Shared(config) for _ in range(DEPTH)))


def stack_of(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Stack(*(kind() for _ in range(DEPTH)))


KINDS = [Counting, Stashing, Remembering, Rebinding, InPlace, Closed, Drawing, DrawingGlobally]


@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_block_with_state_of_its_own_trains_as_it_does_plainly(kind: Any, given: bool) -> None:
    assert_trains_like_plain(stack_of(kind), given=given)


@pytest.mark.parametrize(
    "make", [*map(stack_of, KINDS), shared], ids=[*(k.__name__ for k in KINDS), "Shared"]
)
@pytest.mark.slow
def test_a_block_with_state_of_its_own_may_run_again_more_than_once(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = make().train()
    want = train(plain, plain, 3, None, None)
    model, plan = planned_like(make, roots=[("LOG", LOG)])
    # Of the first three blocks only the first one's input is held: each runs from there, after those before
    # it.
    dropped, kept = [1, 2, 3], range(4, len(plan.chain))
    assert all(plan.chain.stages[k].recomputable for k in dropped)
    actions: list[Action] = [Keep(0), Checkpoint(1), Forward(2), Forward(3), *map(Keep, kept)]
    actions += map(Backward, reversed(kept))
    for stage in reversed(dropped):
        actions += [*map(Forward, dropped[: stage - 1]), Keep(stage), Backward(stage)]
    run = execute(scheduled(plan, Schedule((*actions, Backward(0)))), model)
    assert_equal(train(run, model, 3, None, None), want)


def test_a_config_a_class_and_a_global_list_that_blocks_share_count_once_a_step() -> None:
    assert_trains_like_plain(shared, roots=[("LOG", LOG)])


def test_a_hook_within_a_block_that_collects_outputs_collects_each_once() -> None:
    def make() -> nn.Module:
        model = Stack(*(Layer() for _ in range(DEPTH)))
        collected: list[Tensor] = []
        model.collected = collected  # type: ignore[assignment]
        for layer in model.layers:
            layer.get_submodule("up").register_forward_hook(
                lambda _, __, out: collected.append(out.detach().mean())
            )
        return model

    assert_trains_like_plain(make)


def switched(model: nn.Module, step: int) -> None:
    """What a loop may change between forward and backward."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1 + 0.1 * (step % 2)
        if isinstance(module, nn.LayerNorm):
            module.eps *= 10
        if isinstance(module, Scaled):
            module.settings["scale"] += 1.0
            module.train(step % 2 == 0)
            if step == 2:
                module.get_submodule("up").forward = lambda x: x.repeat(1, 4)


class Scaled(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.settings = nn.LayerNorm(WIDTH), {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x)) * self.settings["scale"]


def back(model: nn.Module, step: int) -> None:
    model.train()


def test_what_the_loop_changes_between_forward_and_backward_is_for_a_re_run_as_it_was() -> None:
    assert_trains_like_plain(stack_of(Scaled), before=back, between=switched)


class Noisy(nn.Module):
    """Takes a generator among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Perturbed() for _ in range(DEPTH))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        for layer in self.layers:
            x = layer(x, generator)
        return x.square().mean()


class Perturbed(Layer):
    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]
        return self.inner(x + 0.1 * torch.randn(x.shape, generator=generator))


def test_a_generator_among_the_arguments_is_for_a_re_run_as_it_was() -> None:
    assert_trains_like_plain(Noisy)


class Iterating(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        next(self.numbers)
        return self.inner(x)


def test_a_block_whose_effect_cannot_be_put_back_is_refused_with_the_reason() -> None:
    model = stack_of(Iterating)().train()
    with pytest.raises(CaptureError, match=r"changes layers\.0\.numbers, whose state cannot be put back"):
        solve(model, "1GiB", sample=torch.randn(BATCH, WIDTH), capture="modules")


def test_an_abandoned_forward_with_state_leaves_no_graph_behind() -> None:
    model, plan = planned_like(stack_of(Remembering))
    batch = torch.randn(BATCH, WIDTH, requires_grad=True)  # whose gradient the plan does not know yet
    run = execute(replan(plan, smallest(plan.chain) + 2 * batch.nbytes), model)
    gone: list[int] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.note = _Note(gone)
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return grads[0]

    loss = run(Noted.apply(batch))
    del loss
    model.zero_grad()
    assert gone == [1]


class _Note:
    def __init__(self, gone: list[int]) -> None:
        self.gone = gone

    def __del__(self) -> None:
        self.gone.append(1)


@pytest.mark.parametrize("bound", [True, False])
def test_what_is_made_where_old_data_lay_does_not_pass_for_it(bound: bool) -> None:
    lasting = Lasting()
    passed = 0
    for _ in range(100):
        code = torch.zeros(WIDTH)
        lasting.add([code], bound=bound)
        code.data = torch.ones(WIDTH)  # the storage from before is gone
        made = [torch.empty(WIDTH) for _ in range(10)]
        passed += len(storage_keys(made) & lasting.keys)
    assert (passed > 0) is bound
