"""Kinds of state that a forward reads or writes besides parameters, registered buffers and arguments.

Each kind is put on an owner, a model or a block of it, and keeps there all that it has: the same kind is tried at the root and
within blocks. ``training_loops.py`` draws from ``STATES``; ``test_state_kinds.py`` tries each by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16
HIDDEN = 64
ROWS = 64
STATES: dict[str, State] = {}


class State:
    """One kind; the object has nothing of its own."""

    sort = "read"

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):
            STATES[cls.__name__] = cls()

    def __deepcopy__(self, memo: Any) -> State:
        return self

    def begin(self, owner: Any) -> None:
        """What the owner has before training, and in globals."""

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        """What the owner's forward does."""
        return x

    def change(self, owner: Any, level: float) -> None:
        """What the loop does to the owner before a step, or between forward and backward; the level is 1 at first."""

    def loss(self, owner: Any) -> Tensor | None:
        """What the loop adds to the loss after a forward."""
        return None

    def leaves(self, owner: Any) -> list[Tensor]:
        """Tensors with gradients that are no parameters; the loop's optimizer has them."""
        return []


# ---- read --------------------------------------------------------------------------------------------


class Float(State):
    def begin(self, owner: Any) -> None:
        owner.tau = 1.0

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x / owner.tau

    def change(self, owner: Any, level: float) -> None:
        owner.tau = level


class Int(State):
    """How often an op is run."""

    def begin(self, owner: Any) -> None:
        owner.repeats = 1

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        for _ in range(owner.repeats):
            x = x.tanh()
        return x

    def change(self, owner: Any, level: float) -> None:
        owner.repeats = int(2 * level) - 1


class Flag(State):
    def begin(self, owner: Any) -> None:
        owner.rectified = False

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x.relu() if owner.rectified else x

    def change(self, owner: Any, level: float) -> None:
        owner.rectified = level > 1


class Name(State):
    """A string by which a function is chosen."""

    def begin(self, owner: Any) -> None:
        owner.activation = "gelu"

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = getattr(F, owner.activation)(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.activation = "silu" if level > 1 else "gelu"


class Dtype(State):
    def begin(self, owner: Any) -> None:
        owner.dtype = torch.float32

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x.to(owner.dtype).square().to(x.dtype)

    def change(self, owner: Any, level: float) -> None:
        owner.dtype = torch.bfloat16 if level > 1 else torch.float32


class Pair(State):
    """A tuple, put in the place of another."""

    def begin(self, owner: Any) -> None:
        owner.affine = (1.0, 0.0)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        scale, shift = owner.affine
        return x * scale + shift

    def change(self, owner: Any, level: float) -> None:
        owner.affine = (level, level - 1)


class Config(State):
    """An attribute of an object that the owner has."""

    def begin(self, owner: Any) -> None:
        owner.config = SimpleNamespace(scale=1.0)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * owner.config.scale

    def change(self, owner: Any, level: float) -> None:
        owner.config.scale = level


@dataclasses.dataclass
class Settings:
    scale: float = 1.0
    note: str = ""


class Dataclass(State):
    def begin(self, owner: Any) -> None:
        owner.settings = Settings()

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * owner.settings.scale

    def change(self, owner: Any, level: float) -> None:
        owner.settings.scale = level


class DictEntry(State):
    def begin(self, owner: Any) -> None:
        owner.options = {"scale": 1.0}

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * owner.options["scale"]

    def change(self, owner: Any, level: float) -> None:
        owner.options["scale"] = level


class NestedEntry(State):
    """An entry of a dict within a list within a dict."""

    def begin(self, owner: Any) -> None:
        owner.nested = {"inner": [{"scale": 1.0}]}

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * owner.nested["inner"][0]["scale"]

    def change(self, owner: Any, level: float) -> None:
        owner.nested["inner"][0]["scale"] = level


class ListEntry(State):
    def begin(self, owner: Any) -> None:
        owner.scales = [1.0, 2.0]

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * owner.scales[0]

    def change(self, owner: Any, level: float) -> None:
        owner.scales[0] = level


class Member(State):
    """Whether a set has a name in it."""

    def begin(self, owner: Any) -> None:
        owner.enabled = set()

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x.relu() if "relu" in owner.enabled else x

    def change(self, owner: Any, level: float) -> None:
        (owner.enabled.add if level > 1 else owner.enabled.discard)("relu")


TEMPERATURE = 1.0


class Global(State):
    """A global variable of the module in which the forward is defined."""

    def begin(self, owner: Any) -> None:
        self.change(owner, 1.0)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x / TEMPERATURE

    def change(self, owner: Any, level: float) -> None:
        global TEMPERATURE  # noqa: PLW0603 # which is the point
        TEMPERATURE = level


class Closure(State):
    """A variable of the function in which a function was made."""

    def begin(self, owner: Any) -> None:
        owner.scaled, owner.rescale = _scaling(1.0)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.scaled(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.rescale(level)


def _scaling(scale: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    def scaled(x: Tensor) -> Tensor:
        return x * scale

    def rescale(value: float) -> None:
        nonlocal scale
        scale = value

    return scaled, rescale


class Scaled(nn.Module):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class ClassAttribute(State):
    def begin(self, owner: Any) -> None:
        owner.by_class = Scaled()
        self.change(owner, 1.0)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.by_class(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        Scaled.factor = level


class Function(State):
    """A function that another takes the place of."""

    def begin(self, owner: Any) -> None:
        owner.function = F.gelu

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.function(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.function = F.silu if level > 1 else F.gelu


class ReplacedForward(State):
    """A forward put on the object of a submodule."""

    def begin(self, owner: Any) -> None:
        owner.act = nn.Tanh()

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.act(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        vars(owner.act).pop("forward", None)
        if level > 1:
            owner.act.forward = F.silu


class DropoutP(State):
    def begin(self, owner: Any) -> None:
        owner.drop = nn.Dropout(0.2)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.drop(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.drop.p = 0.2 * level


class Momentum(State):
    def begin(self, owner: Any) -> None:
        owner.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.batch_norm(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.batch_norm.momentum = 0.1 * level


class Eps(State):
    def begin(self, owner: Any) -> None:
        owner.layer_norm = nn.LayerNorm(WIDTH, eps=1e-2)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.layer_norm(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.layer_norm.eps = 1e-2 * level


class Merged(State):
    """An adapter of low rank, added to the weight and taken out of it."""

    def begin(self, owner: Any) -> None:
        owner.base = nn.Linear(WIDTH, WIDTH, bias=False)
        owner.down, owner.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        owner.merged = False

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.base(x)
        return y if owner.merged else y + owner.up(owner.down(x))

    def change(self, owner: Any, level: float) -> None:
        merged = level > 1
        if merged is not owner.merged:
            owner.merged = merged
            with torch.no_grad():
                owner.base.weight.add_(owner.up.weight @ owner.down.weight, alpha=1 if merged else -1)


class GradMode(State):
    """A flag given to set_grad_enabled."""

    def begin(self, owner: Any) -> None:
        owner.learning, owner.side = True, nn.Linear(WIDTH, WIDTH)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(owner.learning and torch.is_grad_enabled()):
            y = owner.side(x)
        return x + y

    def change(self, owner: Any, level: float) -> None:
        owner.learning = level <= 1


class BoundTensor(State):
    """A tensor that another takes the place of at each step."""

    def begin(self, owner: Any) -> None:
        owner.weights = torch.ones(WIDTH)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * owner.weights

    def change(self, owner: Any, level: float) -> None:
        owner.weights = torch.full((WIDTH,), level)


class FilledTensor(State):
    """A tensor that is no buffer, filled in place."""

    def begin(self, owner: Any) -> None:
        owner.filled = torch.ones(WIDTH)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * owner.filled

    def change(self, owner: Any, level: float) -> None:
        owner.filled.fill_(level)


class Array(State):
    """A NumPy array, changed in place."""

    def begin(self, owner: Any) -> None:
        owner.array = np.ones(WIDTH, dtype=np.float32)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x * float(owner.array[3])

    def change(self, owner: Any, level: float) -> None:
        owner.array[3] = level


class Optional(State):
    """None at first, then a tensor."""

    def begin(self, owner: Any) -> None:
        owner.prompt = None

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        return x if owner.prompt is None else x + owner.prompt

    def change(self, owner: Any, level: float) -> None:
        owner.prompt = torch.full((WIDTH,), level) if level > 1 else None


class NeverRead(State):
    def begin(self, owner: Any) -> None:
        owner.epoch = 1.0

    def change(self, owner: Any, level: float) -> None:
        owner.epoch = level


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
        owner.norm = None

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        owner.norm = x.detach().norm()
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
