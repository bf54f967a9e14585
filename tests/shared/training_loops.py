"""Random training loops: events before a forward, between forward and backward, and counts of both.

``state_kinds.py`` and ``state_written.py`` have the state that a forward reads and writes,
``training_models.py`` the model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.shared.state_kinds import ROWS, STATES, WIDTH
from tests.shared.training_models import EARLY, LATE, LEVELS, ROOTS, STEPS, Held, Recipe, Step, enlarged

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
        rows = ROWS // 2 if self.recipe.smaller and self.number >= len(self.recipe.steps) - 1 else ROWS
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
        if self.number < len(self.recipe.steps):
            self.given[name] = tensor.detach().clone() if isinstance(tensor, Tensor) else tensor

    def midway(self) -> None:
        """What happens between forward and backward."""
        if self.number < len(self.recipe.steps):
            MIDWAY[self.recipe.steps[self.number].midway](self)

    def lesson(self) -> None:
        """Forwards and backwards of the last step: what a peak is measured of."""
        SHAPES[self.recipe.steps[-1].shape](self)


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
    except (RuntimeError, ValueError):  # the model's, or a ValueError that no plan can be made for it
        loop.note("aborted", True)


def _trapped(loop: Loop) -> None:
    """A forward that raises in its last block."""
    block: Any = loop.handle.blocks[-1]  # type: ignore[index] # a list of blocks
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
    loop.called.register_forward_hook(enlarged)


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


# ---- drawn -------------------------------------------------------------------------------------------


def draw(seed: int) -> Recipe:
    """The recipe of a seed."""
    rng = random.Random(seed)
    choose = rng.choice
    blocks = tuple(
        choose(("mlp", "norm", "norm", "drop", "batch", "item" if rng.random() < 0.3 else "mlp"))
        for _ in range(choose((3, 4, 5)))
    )
    states: list[Held] = []
    for kind in rng.sample(sorted(STATES), choose((0, 1, 1, 1, 2, 2, 3))):
        owner = choose((EARLY, LATE, *range(len(blocks))))
        states.append(Held(kind, owner, choose((*LEVELS, "each", "two", "once"))))
    steps = [Step()] * STEPS
    for _ in range(choose((0, 0, 1, 2))):  # what is odd about the loop, in one step or from there on
        first, sort = rng.randrange(STEPS), choose(("shape", "extra", "extra", "midway"))
        odd = choose({"shape": [*SHAPES][1:], "extra": [*EXTRAS], "midway": [*MIDWAY][1:]}[sort])
        for number in range(first, choose((first + 1, first + 1, STEPS))):
            step = steps[number]
            steps[number] = {
                "shape": lambda step=step, odd=odd: replace(step, shape=odd),
                "extra": lambda step=step, odd=odd: replace(step, extras=(*step.extras, odd)),
                "midway": lambda step=step, odd=odd: replace(step, midway=odd),
            }[sort]()
    return Recipe(
        seed=seed,
        blocks=blocks,
        layout=choose(("list", "list", "sequential")),
        output=choose(("loss", "rows", "dict")),
        root=choose(("plain",) * 9 + ROOTS),
        states=tuple(states),
        steps=tuple(steps),
        optimizer=choose(("plain", "momentum", "momentum", "in the backward")),
        frozen=rng.random() < 0.15,
        to_none=rng.random() < 0.7,
        input_grad=rng.random() < 0.2,
        smaller=rng.random() < 0.15,
        handle=choose(("planned", "planned", "planned", "model")),
        capture=choose(("auto", "auto", "auto", "graph", "modules")),
        shares=choose(((0.0,), (0.0,), (0.5,), (0.0, 0.5))),
    )
