"""Random training loops: what is drawn, the model it stands for, and the loop.

``state_kinds.py`` has what a forward reads and writes; here are the model that it is put on, and the ways of a loop: what
happens before a forward, between forward and backward, and how often each is run.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.state_kinds import HIDDEN, ROWS, STATES, WIDTH, State

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
        handle: whose attributes the loop changes: the planned model's, or those of the model that was planned.
        share: of the way from the smallest budget to keeping all.
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
    share: float

    def __str__(self) -> str:
        odd = [f"step {i}: {step}" for i, step in enumerate(self.steps) if str(step) != "plain"]
        flags = [name for name in ("frozen", "input_grad", "smaller") if getattr(self, name)]
        rest = [self.layout, self.output, *([self.root] * (self.root != "plain")), self.optimizer, *flags]
        return (
            f"seed {self.seed} | {self.capture}, share {self.share}, by {self.handle} | {'; '.join(map(str, self.states)) or 'no state'}"
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


def _after(module: nn.Module, args: Any, output: Any) -> Any:
    return _times(1.5, output)


def _ahead(module: nn.Module, args: Any) -> Any:
    return (args[0] * 1.1,)


ROOTS = ("plain", "hook", "pre-hook", "__call__")


def build(recipe: Recipe) -> Net:
    """The model, with random weights, in train mode."""
    torch.manual_seed(recipe.seed)
    model = (Called if recipe.root == "__call__" else Net)(recipe).train()
    if recipe.root == "hook":
        model.register_forward_hook(_after)
    if recipe.root == "pre-hook":
        model.register_forward_pre_hook(_ahead)
    return model


# ---- the loop ----------------------------------------------------------------------------------------


class Loop:
    """Five steps of training.

    Attributes:
        called: the model that is called.
        handle: the model whose attributes the loop reads and changes.
        losses: of the step, and what else it gave.
    """

    def __init__(self, recipe: Recipe, called: nn.Module, handle: nn.Module) -> None:
        self.recipe, self.called, self.handle = recipe, called, handle
        self.number, self.contexts = 0, list[Any]()
        self.given: dict[str, Any] = {}

    def begin(self) -> None:
        """Seed all generators, and make the optimizer."""
        torch.manual_seed(self.recipe.seed + 1)
        random.seed(self.recipe.seed)
        np.random.seed(self.recipe.seed % 2**32)  # noqa: NPY002 # the global one is what models draw from
        self.optimize()

    def owner(self, held: Held) -> Any:
        """The model or block that has it."""
        found: Any = self.handle
        return found if held.owner < 0 else found.blocks[held.owner]

    def leaves(self) -> list[Tensor]:
        """Tensors with gradients that are no parameters."""
        return [t for held in self.recipe.states for t in STATES[held.kind].leaves(self.owner(held))]

    def optimize(self) -> None:
        """An optimizer, of the model that is called now."""
        trained = [*self.called.parameters(), *self.leaves()]
        momentum = 0.5 if self.recipe.optimizer == "momentum" else 0.0
        self.optimizer = torch.optim.SGD(trained, lr=0.05, momentum=momentum)
        if self.recipe.optimizer == "in the backward":
            for tensor in trained:
                if tensor.requires_grad:
                    tensor.register_post_accumulate_grad_hook(_descend)

    def batch(self) -> Tensor:
        """The rows of this step."""
        rows = ROWS // 2 if self.recipe.smaller and self.number == STEPS - 1 else ROWS
        generator = torch.Generator().manual_seed(self.recipe.seed + self.number)
        return torch.randn(rows, WIDTH, generator=generator).requires_grad_(self.recipe.input_grad)

    def forward(self, x: Tensor) -> Tensor:
        """The loss on a batch."""
        with torch.autocast("cpu", torch.bfloat16) if "bf16" in self.contexts else nullcontext():
            output = self.called(x)
            loss: Tensor = output["loss"] if isinstance(output, dict) else output.float().square().mean()
            for held in self.recipe.states:
                more = STATES[held.kind].loss(self.owner(held))
                loss = loss if more is None else loss + more
        return loss

    def change(self, by: float = 0.0) -> None:
        """The loop's changes of what a forward reads."""
        for held in self.recipe.states:
            level = LEVELS[held.change](self.number) + by
            STATES[held.kind].change(self.owner(held), level)

    def step(self) -> dict[str, Any]:
        """One step; what it gave."""
        step = self.recipe.steps[self.number]
        self.given = {}
        self.change()
        self.contexts = [extra for extra in step.extras if extra in ("bf16", "deterministic")]
        for extra in step.extras:
            EXTRAS[extra](self)
        self.x = self.batch()
        if step.shape != "accumulate":
            self.zero()
        torch.use_deterministic_algorithms("deterministic" in self.contexts)
        try:
            SHAPES[step.shape](self)
        finally:
            torch.use_deterministic_algorithms(False)
        if self.recipe.optimizer != "in the backward":
            self.optimizer.step()
        self.given["gradient of x"] = self.x.grad
        self.number += 1
        return self.given

    def zero(self) -> None:
        """No gradients, or zeros."""
        self.optimizer.zero_grad(set_to_none=self.recipe.to_none)

    def note(self, name: str, tensor: Any) -> None:
        """Note what a step gave."""
        self.given[name] = tensor.detach().clone() if isinstance(tensor, Tensor) else tensor

    def midway(self) -> None:
        """What happens between forward and backward."""
        MIDWAY[self.recipe.steps[self.number].midway](self)

    def lesson(self) -> None:
        """A step without oddities, as the plan has it: what its peak is measured of."""
        loss = self.forward(self.x)
        loss.backward()


def _descend(tensor: Tensor) -> None:
    assert tensor.grad is not None
    with torch.no_grad():
        tensor.sub_(0.05 * tensor.grad)
    tensor.grad = None


def _plain(loop: Loop) -> None:
    loss = loop.forward(loop.x)
    loop.note("loss", loss)
    loop.midway()
    loss.backward()


def _both(loop: Loop, order: str) -> None:
    other = loop.x.detach().flip(0) * 0.7
    losses = [loop.forward(loop.x), loop.forward(other)]
    for number, loss in enumerate(losses):
        loop.note(f"loss {number}", loss)
    loop.midway()
    for loss in {"sum": [losses[0] + losses[1]], "same": losses, "reversed": losses[::-1]}[order]:
        loss.backward()


def _retain(loop: Loop) -> None:
    loss = loop.forward(loop.x)
    loop.note("loss", loss)
    loss.backward(retain_graph=True)
    loop.midway()
    loss.backward()


def _tasks(loop: Loop) -> None:
    """autograd.grad for two halves of the parameters."""
    loss = loop.forward(loop.x)
    loop.note("loss", loss)
    loop.midway()
    trained = [t for t in (*loop.called.parameters(), *loop.leaves()) if t.requires_grad]
    grads = [
        *torch.autograd.grad(loss, trained[::2], retain_graph=True, allow_unused=True),
        *torch.autograd.grad(loss, trained[1::2], allow_unused=True),
    ]
    for tensor, grad in zip([*trained[::2], *trained[1::2]], grads, strict=True):
        tensor.grad = grad


def _abandoned(loop: Loop) -> None:
    loop.forward(loop.x.detach() + 1)
    _plain(loop)


def _penalty(loop: Loop) -> None:
    loss = loop.forward(loop.x)
    trained = [p for p in loop.called.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
    penalty = torch.stack([grad.square().sum() for grad in grads if grad is not None]).sum()
    loop.note("loss", loss)
    loop.note("penalty", penalty)
    loop.midway()
    (loss + 0.1 * penalty).backward()


SHAPES: dict[str, Callable[[Loop], None]] = {
    "plain": _plain,
    "accumulate": _plain,
    "two forwards, one sum": lambda loop: _both(loop, "sum"),
    "two forwards, two backwards": lambda loop: _both(loop, "same"),
    "two forwards, backwards reversed": lambda loop: _both(loop, "reversed"),
    "retain": _retain,
    "grad per task": _tasks,
    "abandoned forward": _abandoned,
    "penalty": _penalty,
}


def _evaluated(loop: Loop) -> None:
    loop.called.eval()
    with torch.no_grad():
        loop.note("evaluated", loop.forward(loop.batch()))
    loop.called.train()


def _without_grad(loop: Loop) -> None:
    with torch.no_grad():
        loop.note("without grad", loop.forward(loop.batch()))


def _aborted(loop: Loop) -> None:
    """A batch that the model rejects."""
    try:
        loop.forward(torch.randn(ROWS, WIDTH + 1, generator=torch.Generator().manual_seed(0)))
    except RuntimeError:
        loop.note("aborted", True)


def _trapped(loop: Loop) -> None:
    """A forward that raises in its last block."""
    block: Any = loop.handle.blocks[-1]  # type: ignore[index, union-attr] # a list of blocks
    block.trap = True
    with suppress(KeyError):
        loop.forward(loop.batch())
        loop.note("trapped", False)
    block.trap = False


def _toggled(loop: Loop) -> None:
    """The first block frozen, or no longer so."""
    for parameter in loop.called.blocks[0].parameters():  # type: ignore[index, union-attr] # a list of blocks
        parameter.requires_grad_(not parameter.requires_grad)
        parameter.grad = None


def _reloaded(loop: Loop) -> None:
    saved = copy.deepcopy(loop.called.state_dict())
    for value in saved.values():
        if value.is_floating_point():
            value.mul_(0.9)
    loop.called.load_state_dict(saved)


def _copied(loop: Loop) -> None:
    loop.called = loop.handle = copy.deepcopy(loop.called)
    loop.optimize()


def _hooked(loop: Loop) -> None:
    loop.called.register_forward_hook(_after)


def _nothing(loop: Loop) -> None:
    pass


EXTRAS: dict[str, Callable[[Loop], None]] = {
    "bf16": _nothing,
    "deterministic": _nothing,
    "evaluated": _evaluated,
    "without grad": _without_grad,
    "aborted": _aborted,
    "trapped": _trapped,
    "freezing toggled": _toggled,
    "reloaded": _reloaded,
    "deep-copied": _copied,
    "hooked": _hooked,
}


def _chosen(loop: Loop) -> nn.Parameter:
    weights = [p for p in loop.called.parameters() if p.ndim == 2]
    return weights[loop.recipe.seed % len(weights)]


def _swapped(loop: Loop) -> None:
    parameter = _chosen(loop)
    parameter.data = parameter.data * 1.5


def _scaled(loop: Loop) -> None:
    _chosen(loop).data.mul_(1.5)


def _input_scaled(loop: Loop) -> None:
    loop.x.data.mul_(1.5)


def _drawn(loop: Loop) -> None:
    loop.note("drawn", torch.rand(3))


def _dropout(loop: Loop) -> None:
    for module in loop.called.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1


MIDWAY: dict[str, Callable[[Loop], None]] = {
    "nothing": _nothing,
    "p.data = other": _swapped,
    "p.data.mul_": _scaled,
    "x.data.mul_": _input_scaled,
    "states changed": lambda loop: loop.change(by=0.6),
    "p of dropout and eps changed": _dropout,
    "numbers drawn": _drawn,
    "evaluated": _evaluated,
    "without grad": _without_grad,
    "zeroed": lambda loop: loop.zero(),
}


@contextmanager
def tidy() -> Iterator[None]:
    """Put back what a loop may leave behind in globals."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
