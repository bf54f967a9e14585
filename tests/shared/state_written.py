"""Kinds of state that a forward writes, and tensors with gradients that are no parameters."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.shared.state_kinds import WIDTH, Settings, State

# ---- written by the forward --------------------------------------------------------------------------


class _Written(State):
    sort = "written"


class Counter(_Written):
    def begin(self, owner: Any) -> None:
        owner.calls = 0

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.calls += 1
        return x


class CounterRead(_Written):
    def begin(self, owner: Any) -> None:
        owner.count = 0

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.count += 1
        return x * (1 + 0.1 * owner.count)


class ConfigWritten(_Written):
    def begin(self, owner: Any) -> None:
        owner.record = Settings()

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.record.note += "."
        return x


class ListOfNumbers(_Written):
    def begin(self, owner: Any) -> None:
        owner.means = []

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.means.append(float(x.detach().mean()))
        return x


class ListOfTensors(_Written):
    def begin(self, owner: Any) -> None:
        owner.seen = []

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.seen.append(x.detach().mean(0))
        return x


class Deque(_Written):
    """The latest two means, which are read too."""

    def begin(self, owner: Any) -> None:
        owner.latest = deque(maxlen=2)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y = x + sum(owner.latest) / 2
        owner.latest.append(x.detach().mean(0))
        return y


class DictWritten(_Written):
    def begin(self, owner: Any) -> None:
        owner.stats = {}

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.stats["norm"] = x.detach().norm()
        return x


CALLS: list[int] = []


class GlobalWritten(_Written):
    """A list that is a global variable."""

    def begin(self, owner: Any) -> None:
        CALLS.clear()
        owner.log = CALLS  # so that it is compared

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        CALLS.append(len(CALLS))
        return x * (1 + 0.1 * len(CALLS))


class ClosureWritten(_Written):
    def begin(self, owner: Any) -> None:
        owner.counted = _counting()

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.counted(x)
        return y


def _counting() -> Callable[[Tensor], Tensor]:
    count = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * (1 + 0.1 * count)

    return counted


class AuxiliaryLoss(_Written):
    def begin(self, owner: Any) -> None:
        owner.auxiliary = None

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.auxiliary = x.abs().mean()
        return x

    def loss(self, owner: Any) -> Tensor | None:
        return 0.1 * owner.auxiliary


class AuxiliaryList(_Written):
    """Losses appended to a list, which the loop empties."""

    def begin(self, owner: Any) -> None:
        owner.losses = []

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.losses.append(x.abs().mean())
        return x

    def change(self, owner: Any, level: float) -> None:
        owner.losses.clear()

    def loss(self, owner: Any) -> Tensor | None:
        return 0.1 * sum(owner.losses) if owner.losses else None


class Feature(_Written):
    """A whole activation left for the loss."""

    def begin(self, owner: Any) -> None:
        owner.feature = None

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.feature = x.sigmoid()
        return x

    def loss(self, owner: Any) -> Tensor | None:
        found: Tensor = owner.feature.square().mean()
        return found


class Statistic(_Written):
    def begin(self, owner: Any) -> None:
        owner.size = None

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.size = x.detach().norm()
        return x


class HookWritten(_Written):
    """What a forward hook of a submodule leaves."""

    def begin(self, owner: Any) -> None:
        owner.hooked = nn.Linear(WIDTH, WIDTH)
        owner.hooked.register_forward_hook(_leave)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.hooked(x)
        return y


def _leave(module: Any, args: Any, output: Tensor) -> None:
    module.captured = output.detach().mean(0)


class BackwardWritten(_Written):
    """What a hook of a tensor appends in the backward."""

    def begin(self, owner: Any) -> None:
        owner.norms = []

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(functools.partial(_note, owner.norms))
        return x


def _note(norms: list[Tensor], grad: Tensor) -> None:
    norms.append(grad.norm())


class Hidden(_Written):
    """A hidden state carried over, detached."""

    def begin(self, owner: Any) -> None:
        owner.hidden = torch.zeros(WIDTH)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y = (x + owner.hidden).tanh()
        owner.hidden = y.detach().mean(0)
        return y


class Membrane(_Written):
    """A hidden state that keeps its graph, and that the loop resets."""

    def begin(self, owner: Any) -> None:
        owner.membrane = None

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.membrane = x if owner.membrane is None else x + 0.5 * owner.membrane.mean(0)
        y: Tensor = owner.membrane.tanh()
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.membrane = None


class Memo(_Written):
    """A table made at the first call of a shape."""

    def begin(self, owner: Any) -> None:
        owner.memo = {}

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        if len(x) not in owner.memo:
            owner.memo[len(x)] = torch.linspace(0, 1, len(x)).unsqueeze(1)
        return x + owner.memo[len(x)]


class ReboundBuffer(_Written):
    def begin(self, owner: Any) -> None:
        owner.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y = x - owner.center
        owner.center = owner.center * 0.5 + 0.5 * x.detach().mean(0)
        return y


class StepBuffer(_Written):
    """An integer buffer counted up and divided by."""

    def begin(self, owner: Any) -> None:
        owner.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.steps += 1
        return x * (1 + 1 / owner.steps)


class _Teacher(_Written):
    def begin(self, owner: Any) -> None:
        owner.student, owner.teacher = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            for ours, theirs in zip(owner.student.parameters(), owner.teacher.parameters(), strict=True):
                self.move(ours, theirs)
            target = owner.teacher(x)
        y: Tensor = owner.student(x) - target
        return y

    def move(self, student: Tensor, teacher: Tensor) -> None:
        raise NotImplementedError


class TeacherInPlace(_Teacher):
    """A frozen copy that the forward moves."""

    def move(self, student: Tensor, teacher: Tensor) -> None:
        teacher.lerp_(student, 0.5)


class TeacherData(_Teacher):
    """A frozen copy whose data the forward replaces."""

    def move(self, student: Tensor, teacher: Tensor) -> None:
        teacher.data = 0.5 * teacher.data + 0.5 * student.data


class Clamped(_Written):
    """A parameter that the forward clamps."""

    def begin(self, owner: Any) -> None:
        owner.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            owner.temperature.clamp_(0.5, 1.2)
        return x / owner.temperature


class MaxNorm(_Written):
    """Rows of an embedding that a lookup scales."""

    def begin(self, owner: Any) -> None:
        owner.table = nn.Embedding(9, WIDTH, max_norm=0.5)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = x + owner.table(torch.arange(len(x)) % 7)
        return y


class NewParameter(_Written):
    """A parameter that the forward puts in the place of another."""

    def begin(self, owner: Any) -> None:
        owner.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.gain = nn.Parameter(owner.gain.detach() * 1.1)
        return x * owner.gain


class LazyParameter(_Written):
    """A parameter made at the first forward."""

    def begin(self, owner: Any) -> None:
        owner.register_parameter("shift", None)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        if owner.shift is None:
            owner.shift = nn.Parameter(torch.zeros(x.shape[1]))
        return x + owner.shift


class OwnGenerator(_Written):
    def begin(self, owner: Any) -> None:
        owner.generator = torch.Generator().manual_seed(3)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=owner.generator)


class PythonRandom(_Written):
    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random())


class NumpyRandom(_Written):
    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * float(np.random.rand()))  # noqa: NPY002 # global on purpose


# ---- tensors with gradients that are no parameters ---------------------------------------------------


class _Leaf(State):
    sort = "leaf"


class ListParameter(_Leaf):
    """Parameters in a Python list."""

    def begin(self, owner: Any) -> None:
        owner.prompts = [nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))]

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = x * owner.prompts[0] + owner.prompts[1]
        return y

    def leaves(self, owner: Any) -> list[Tensor]:
        return [*owner.prompts]


class Latent(_Leaf):
    """A plain tensor that requires grad."""

    def begin(self, owner: Any) -> None:
        owner.latent = torch.ones(WIDTH, requires_grad=True)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = x * owner.latent
        return y

    def leaves(self, owner: Any) -> list[Tensor]:
        return [owner.latent]


class ClosureLatent(_Leaf):
    def begin(self, owner: Any) -> None:
        latent = torch.ones(WIDTH, requires_grad=True)
        owner.modulated, owner.modulators = lambda x: x * latent, lambda: [latent]

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.modulated(x)
        return y

    def leaves(self, owner: Any) -> list[Tensor]:
        found: list[Tensor] = owner.modulators()
        return found


class GraphAttribute(_Leaf):
    """An attribute that the loop sets to a tensor with a history."""

    def begin(self, owner: Any) -> None:
        owner.source = torch.ones(WIDTH, requires_grad=True)
        self.change(owner, 1.0)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = x + owner.style
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.style = owner.source * level

    def leaves(self, owner: Any) -> list[Tensor]:
        return [owner.source]
