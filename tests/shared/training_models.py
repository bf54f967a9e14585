"""The drawn parts of a random training loop, and its model; its state is in ``state_kinds.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tests.shared.state_written  # noqa: F401 # its kinds join STATES
from tests.shared.state_kinds import HIDDEN, STATES, WIDTH, State

STEPS = 5
EARLY, LATE = -1, -2  # owners at the root: before the blocks, and after them

LEVELS: dict[str, Callable[[int], float]] = {
    "never": lambda step: 1.0,
    "once": lambda step: 1.5 if step >= 2 else 1.0,
    "two": lambda step: 1.0 + 0.5 * (step % 2),
    "each": lambda step: 1.0 + 0.25 * step,
    "soon": lambda step: 1.5,
}


@dataclass(frozen=True)
class Held:
    """A kind of state, and where it is: EARLY, LATE, or the number of a block.

    Attributes:
        change: how the loop changes it, of ``LEVELS``.
    """

    kind: str
    owner: int
    change: str

    def __str__(self) -> str:
        return f"{self.kind}({self.change}) at {({EARLY: 'root', LATE: 'root, late'}).get(self.owner, f'block {self.owner}')}"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        shape: of ``SHAPES``: forwards and backwards.
        extras: of ``EXTRAS``: what comes before.
        midway: of ``MIDWAY``: what happens between forward and backward.
    """

    shape: str = "plain"
    extras: tuple[str, ...] = ()
    midway: str = "nothing"

    def __str__(self) -> str:
        return "+".join([self.shape, *self.extras, *([f"midway {self.midway}"] * (self.midway != "nothing"))])


@dataclass(frozen=True)
class Recipe:
    """A model, how it is planned, and the loop that trains it.

    Attributes:
        root: what is at the root before solve: of ``ROOTS``.
        frozen: whether the first block starts frozen.
        to_none: the argument of zero_grad.
        smaller: whether the last batch is.
        handle: whose attributes the loop changes: the planned model's, or those of the model that was
            planned.
        shares: of the way from the smallest budget to keeping all; of two, the second is that of a plan for
            the latter half of the steps.
    """

    seed: int
    blocks: tuple[str, ...]
    layout: str
    output: str
    root: str
    states: tuple[Held, ...]
    steps: tuple[Step, ...]
    optimizer: str
    frozen: bool
    to_none: bool
    input_grad: bool
    smaller: bool
    handle: str
    capture: str
    shares: tuple[float, ...]

    def __str__(self) -> str:
        odd = [f"step {i}: {step}" for i, step in enumerate(self.steps) if str(step) != "plain"]
        flags = [name for name in ("frozen", "input_grad", "smaller") if getattr(self, name)]
        rest = [self.layout, self.output, *([self.root] * (self.root != "plain")), self.optimizer, *flags]
        return (
            f"seed {self.seed} | {self.capture}, shares {self.shares}, by {self.handle} | {'; '.join(map(str, self.states)) or 'no state'}"
            f" | {'; '.join(odd) or 'plain steps'} | {'-'.join(self.blocks)}, {', '.join(rest)}"
        )


# ---- the model ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with states of its own."""

    def __init__(self, kind: str, states: Sequence[State]) -> None:
        super().__init__()
        self.norm = {"norm": lambda: nn.LayerNorm(WIDTH), "batch": lambda: nn.BatchNorm1d(WIDTH)}.get(
            kind, nn.Identity
        )()
        self.inner = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.drop = nn.Dropout(0.1) if kind == "drop" else nn.Identity()
        self.kind, self.states, self.trap = kind, (*states,), False
        for state in self.states:
            state.begin(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.inner(self.norm(x)))
        if self.kind == "item":  # code that depends on data
            y = y if float(y.detach().mean()) > 0 else y + 0.1
        for state in self.states:
            y = state.forward(self, y)
        if self.trap:
            raise KeyError("trap")
        return x + y


class Net(nn.Module):
    """The model of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        blocks = [
            Block(kind, [STATES[h.kind] for h in recipe.states if h.owner == i])
            for i, kind in enumerate(recipe.blocks)
        ]
        self.blocks = nn.Sequential(*blocks) if recipe.layout == "sequential" else nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 5)
        self.layout, self.output = recipe.layout, recipe.output
        self.early = tuple(STATES[h.kind] for h in recipe.states if h.owner == EARLY)
        self.late = tuple(STATES[h.kind] for h in recipe.states if h.owner == LATE)
        for state in (*self.early, *self.late):
            state.begin(self)
        if recipe.frozen:
            blocks[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for state in self.early:
            x = state.forward(self, x)
        if self.layout == "sequential":
            x = self.blocks(x)
        else:
            for block in self.blocks:
                x = block(x)
        for state in self.late:
            x = state.forward(self, x)
        rows = self.head(x)
        loss = rows.float().square().mean()
        return {"loss": loss, "rows": rows, "dict": {"loss": loss, "rows": rows}}[self.output]


class Called(Net):
    """A model that does something where it is called."""

    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x * 0.9)


def _times(factor: float, output: Any) -> Any:
    return {k: v * factor for k, v in output.items()} if isinstance(output, dict) else output * factor


def enlarged(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook."""
    return _times(1.5, output)


def _ahead(module: nn.Module, args: Any) -> Any:
    return (args[0] * 1.1,)


ROOTS = ("plain", "hook", "pre-hook", "__call__")


def build(recipe: Recipe) -> Net:
    """The model, with random weights, in train mode."""
    torch.manual_seed(recipe.seed)
    model = (Called if recipe.root == "__call__" else Net)(recipe).train()
    if recipe.root == "hook":
        model.register_forward_hook(enlarged)
    if recipe.root == "pre-hook":
        model.register_forward_pre_hook(_ahead)
    return model
