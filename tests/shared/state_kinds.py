"""Kinds of state that a forward reads or writes besides parameters, registered buffers and arguments.

Each kind keeps all its state on an owner, a model or a block of it: the same kind is tried at the root and
within blocks. ``training_loops.py`` draws from ``STATES``; ``test_state_kinds.py``
tries each by itself.
"""

from __future__ import annotations

import dataclasses
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
        """What the loop does to the owner before a step or between forward and backward; level 1 at first."""

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
        owner.dropout = nn.Dropout(0.2)

    def forward(self, owner: Any, x: Tensor) -> Tensor:
        y: Tensor = owner.dropout(x)
        return y

    def change(self, owner: Any, level: float) -> None:
        owner.dropout.p = 0.2 * level


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
