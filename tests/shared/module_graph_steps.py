"""Draw random module graphs, train them by drawn plans, and compare with the plain model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rematplan import CaptureError, Plan, PlanMismatch, ReplayError, execute, measure_peak, solve
from tests.shared.helpers import smallest
from tests.shared.module_blocks import BATCH, KINDS, TOKENS, WIDTH
from tests.shared.module_graphs import Block, Graph, Recipe
from tests.shared.steps import Record, assert_equal, loss_of, replan, state, tensors

LAYOUTS = (
    *("sequential", "loop", "external", "keywords", "tuple", "dict"),
    *("skips", "history", "encoder", "twice", "branches", "nested"),
)
GLUE = ("none", "none", "none", "none", "gelu", "relu_", "mul_", "parameter", "view", "dropout", "stem")
OUTPUTS = ("loss", "rows", "tuple", "dict", "hidden")


@dataclass
class Trial:
    """A recipe at work: the plain model, and a batch, whose rows may be changed in place."""

    recipe: Recipe
    model: Graph
    rows: Tensor
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, recipe: Recipe) -> Trial:
        """The model, with random weights, in train mode, and a random batch."""
        torch.manual_seed(recipe.seed)
        model = Graph(recipe).train()
        rows = torch.randn(BATCH, TOKENS, WIDTH)
        masks = {"bool": torch.rand(TOKENS, TOKENS) < 0.8, "float": torch.randn(TOKENS, TOKENS)}
        kwargs: dict[str, Any] = {"mask": masks[recipe.mask]} if recipe.mask in masks else {}
        if recipe.embedded:
            kwargs["ids"] = torch.randint(0, 9, (BATCH, TOKENS))
        return cls(recipe, model, rows, kwargs)

    def begin(self) -> None:
        """The batch as it was drawn."""
        self.x = self.rows.clone().requires_grad_(self.recipe.input_grad)

    def context(self) -> AbstractContextManager[Any]:
        """What is around forwards."""
        return torch.autocast("cpu", torch.bfloat16) if self.recipe.autocast == "around" else nullcontext()

    def forward(self, model: nn.Module) -> Any:
        """The output on the batch."""
        with self.context():
            return model(self.x, **self.kwargs)

    def loss(self, output: Any) -> Tensor:
        """What is reversed."""
        if isinstance(output, dict):
            loss: Tensor = output["loss"]
            return loss
        if isinstance(output, tuple):
            output = output[0]
        return loss_of(output)

    def outcome(self, model: nn.Module) -> Record | Exception:
        """What the recipe's procedure gives and leaves behind, or how it fails."""
        torch.manual_seed(17)
        self.begin()
        try:
            record = PROCEDURES[self.recipe.procedure](self, model)
        except Exception as error:  # noqa: BLE001 # whatever torch raises, the planned model must too
            return error
        return {**record, **state(model), "x": self.x.detach(), "gradient of x": self.x.grad}


def _backward(trial: Trial, model: nn.Module) -> Any:
    output = trial.forward(model)
    trial.loss(output).backward()
    return output


def _step(trial: Trial, model: nn.Module) -> Record:
    return tensors(_backward(trial, model))


def _train(trial: Trial, model: nn.Module) -> Record:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    record: Record = {}
    for number in range(3):
        optimizer.zero_grad()
        record |= {f"step {number}: {n}": v for n, v in _step(trial, model).items()}
        optimizer.step()
    return record


def _accumulate(trial: Trial, model: nn.Module) -> Record:
    return {**_step(trial, model), **{f"again {n}": v for n, v in _step(trial, model).items()}}


def _retain(trial: Trial, model: nn.Module) -> Record:
    loss = trial.loss(trial.forward(model))
    loss.backward(retain_graph=True)
    loss.backward()
    return {"loss": loss.detach()}


def _grad(trial: Trial, model: nn.Module) -> Record:
    loss = trial.loss(trial.forward(model))
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trainable[::2], retain_graph=True, allow_unused=True)
    found += torch.autograd.grad(loss, trainable[::-3], allow_unused=True)
    return {f"grad {i}": grad for i, grad in enumerate(found)}


def _inputs(trial: Trial, model: nn.Module) -> Record:
    trainable = [p for p in model.parameters() if p.requires_grad]
    trial.loss(trial.forward(model)).backward(inputs=trainable[len(trainable) // 2 :: 2])
    return {}


def _alive(trial: Trial, model: nn.Module) -> Record:
    trial.forward(model)  # and abandoned
    losses = [trial.loss(trial.forward(model)) for _ in range(2)]
    drawn = torch.rand(3)
    losses[1].backward()
    losses[0].backward()
    return {"drawn": drawn}


def _parts(trial: Trial, model: nn.Module) -> Record:
    output = trial.forward(model)
    floats = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    for tensor in reversed(floats):
        tensor.float().square().mean().backward(retain_graph=True)
    trial.loss(output).backward()
    return {}


def _twofold(trial: Trial, model: nn.Module) -> Record:
    loss = trial.loss(trial.forward(model))
    trainable = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trainable, create_graph=True, allow_unused=True)
    penalty = torch.stack([grad.square().sum() for grad in grads if grad is not None]).sum()
    (loss + penalty).backward()
    return {"penalty": penalty.detach()}


def _evaluated(trial: Trial, model: nn.Module) -> Record:
    loss = trial.loss(trial.forward(model))
    model.eval()
    with torch.no_grad():
        between = tensors(trial.forward(model))
    model.train()
    loss.backward()
    return between


def _changed(trial: Trial, model: nn.Module) -> Record:
    """A parameter is changed between forward and backward: an error, or no difference."""
    loss = trial.loss(trial.forward(model))
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        trainable[trial.recipe.seed % len(trainable)].add_(1.0)
    loss.backward()
    return {}


PROCEDURES: dict[str, Callable[[Trial, nn.Module], Record]] = {
    "step": _step,
    "train": _train,
    "accumulate": _accumulate,
    "retain": _retain,
    "grad": _grad,
    "inputs": _inputs,
    "alive": _alive,
    "parts": _parts,
    "twofold": _twofold,
    "evaluated": _evaluated,
    "changed": _changed,
}


def recipe_by(choose: Callable[[Sequence[Any]], Any]) -> Recipe:
    """A recipe, each part of which is chosen from a few."""
    blocks = [
        Block(
            kind=choose(tuple(KINDS)),
            variant=choose(range(4)),
            glue=choose(GLUE),
            state=choose(("train",) * 6 + ("frozen", "eval")),
        )
        for _ in range(choose(range(2, 7)))
    ]
    return Recipe(
        seed=choose(range(2**16)),
        blocks=tuple(blocks),
        layout=choose(LAYOUTS),
        output=choose(OUTPUTS),
        shares=choose(("nothing",) * 3 + ("parameter", "module")),
        stem=choose(("train", "train", "frozen", "none")),
        mask=choose(("none", "bool", "float", "learned")),
        embedded=choose((False, True)),
        input_grad=choose((False, True)),
        autocast=choose(("none",) * 4 + ("around", "inside")),
        capture=choose(("auto",) * 4 + ("graph", "modules", "modules")),
        costs=choose(("roofline",) * 7 + ("measure",)),
        share=choose((0.0, 0.0, 0.2, 0.5, 1.0)),
        procedure=choose(("step",) * 6 + tuple(PROCEDURES)),
    )


# ---- judged ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How a recipe went, nothing being wrong.

    Attributes:
        kind: "graph" or "modules" (planned, and bit-equal), "refused", or "raises" as the plain model does.
        reason: why it was refused.
        recomputes: whether the plan does.
        ratio: predicted by measured peak, if that was measured.
    """

    kind: str
    reason: str = ""
    recomputes: bool = False
    ratio: float | None = None


class OverBudget(AssertionError):
    """A step took more than its budget."""


def judge(recipe: Recipe) -> Verdict:
    """Plan and train the recipe's model as it says, and hold it against the plain model.

    Raises:
        AssertionError: it is not bit-equal, or raises where the plain model does not, or the other way
            around.
        OverBudget: it is over budget.
    """
    trial = Trial.of(recipe)
    expected = trial.outcome(copy.deepcopy(trial.model))
    trial.begin()
    try:
        with trial.context():
            plan = solve(
                trial.model,
                "1GiB",
                sample=((trial.x,), trial.kwargs),
                capture=recipe.capture,
                costs=recipe.costs,
            )
    except Exception as error:
        if isinstance(expected, Exception):
            return Verdict("raises", str(error))
        if isinstance(error, (CaptureError, ValueError)):
            return Verdict("refused", str(error))
        raise
    low = smallest(plan.chain)
    plan = replan(plan, low + int(recipe.share * max(0, plan.plain.peak - low)))
    planned = execute(plan, trial.model, on_new_shape="error")
    found = trial.outcome(planned)
    if isinstance(found, Exception):
        if isinstance(expected, Exception):
            return Verdict("raises", str(expected))
        in_place = recipe.procedure == "changed" and "modified by an inplace operation" in str(found)
        if in_place or isinstance(found, (ReplayError, PlanMismatch)):
            return Verdict("refused", str(found))
        raise AssertionError("the planned model raises, the plain one does not") from found
    assert not isinstance(expected, Exception), (
        f"the plain model raises, the planned one does not: {expected}"
    )
    assert_equal(found, expected)
    recomputes = max(plan.timeline.runs) > 1 or any(plan.program.kept)
    ratio = within_budget(trial, planned, plan) if recipe.procedure == "step" else None
    return Verdict(plan.capture.kind, "", recomputes, ratio)


def within_budget(trial: Trial, planned: nn.Module, plan: Plan) -> float:
    """Predicted by measured peak of a step with no gradients before.

    Raises:
        OverBudget: the step takes more.
    """
    planned.zero_grad()
    trial.begin()
    torch.manual_seed(17)
    measured = measure_peak(
        functools.partial(_backward, trial, planned), resident=[trial.model, trial.x, trial.kwargs]
    )
    if measured.peak > plan.memory_budget:
        raise OverBudget(f"peak {measured.peak} over budget {plan.memory_budget}")
    return plan.predicted_peak / measured.peak
