"""A whole training step, run again by a tighter plan where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from rematplan.executors.plans import Plans
from rematplan.executors.runner import plans_within
from rematplan.scheduler.torch_layer.private import version_of

__all__ = ["run_step"]

Result = TypeVar("Result")


def run_step(
    model: nn.Module, step: Callable[[], Result], *, also: Iterable[Tensor] = (), copies: bool = False
) -> Result:
    """Run forward, loss and backward; if memory runs out, put everything back and run them once more by a tighter plan.

    ::

        def step():
            loss = loss_of(planned(batch))
            loss.backward()
            return loss.detach()

        optimizer.zero_grad()
        loss = run_step(planned, step)
        optimizer.step()

    What is put back: gradients of the model's parameters and of ``also``, the model's buffers, generators.
    What a failed backward has added to a gradient that existed before (accumulation) cannot be taken away
    again; then the error is raised and says so, unless there are copies. The same if parameters have changed
    (an optimizer in a hook).

    Args:
        model: a planned model, with ``on_oom="replan"`` (the default on CUDA).
        step: the forward, the loss and the backward, no more: what else it changes is not put back.
        also: further leaves that the step gives gradients to, such as the parameters of other modules.
        copies: whether gradients that exist are copied to host memory before each step.

    Returns:
        what ``step`` returns.

    Raises:
        TypeError: the model does not train by a plan.
        torch.OutOfMemoryError: the step cannot be run again, a note says why; or it ran out of memory again.
    """
    plans = plans_within(model)
    if not isinstance(plans, Plans):
        raise TypeError(
            f"run_step: {type(model).__name__} does not train by a plan; pass what execute(plan, model) gave"
        )
    if plans.changes is None:
        return step()
    name, plans.last = type(model).__name__, None
    state, gradients = plans.changes.before(model), _Gradients([*model.parameters(), *also], copies)
    try:
        return step()
    except torch.OutOfMemoryError as error:
        runner = plans.last
        if runner is None:
            error.add_note(f"run_step: {name} ran no forward by a plan in this step")
            raise
        runner.ran_out = True  # whatever happens now, the next forward follows a tighter plan
        hindrance = gradients.hindrance() or state.hindrance()
        if hindrance is not None:
            error.add_note(f"run_step: the step of {name} is not run again: {hindrance}")
            raise
        reason = str(error)
    # The exception is gone, and with it the frames that held the graph.
    gradients.restore()
    state.restore()
    if not plans.tighten(model, runner, "in a step", "the step is run again"):
        raise torch.OutOfMemoryError(f"run_step: no schedule of {name} takes less than this one: {reason}")
    try:
        return step()
    except torch.OutOfMemoryError:
        runner.ran_out = True
        raise


class _Gradients:
    """The gradients of parameters as they are before a step."""

    def __init__(self, parameters: Iterable[Tensor], copies: bool) -> None:
        self.parameters = [(p, version_of(p)) for p in parameters]
        self.before: list[tuple[Tensor, Tensor | None, int, Tensor | None]] = []
        for parameter, _ in self.parameters:
            grad = parameter.grad
            copy = grad.detach().to("cpu", copy=True) if copies and grad is not None else None
            self.before.append((parameter, grad, 0 if grad is None else version_of(grad), copy))

    def hindrance(self) -> str | None:
        """Why they cannot be put back; None if they can."""
        if any(version_of(p) != version for p, version in self.parameters):
            return "parameters have changed in it"
        touched = [
            g
            for _, g, version, copy in self.before
            if g is not None and copy is None and version_of(g) != version
        ]
        if touched:
            return (
                f"{len(touched)} gradients that existed before it were added to in part; call zero_grad() and begin the "
                "accumulation anew, or pass copies=True"
            )
        return None

    def restore(self) -> None:
        """Put them back."""
        for parameter, grad, version, copy in self.before:
            if grad is not None and copy is not None and version_of(grad) != version:
                grad.data.copy_(copy)
            parameter.grad = grad
