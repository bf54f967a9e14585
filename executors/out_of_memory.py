"""Recover from running out of memory: undo a step's changes, switch to a tighter plan, run it once more."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rematplan.executors.first_step_peak import step_bytes
from rematplan.executors.plain import plans_within
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.layouts import equal_bits
from rematplan.scheduler.torch_layer.preserve import Draws, HostRandomState, copy_back
from rematplan.scheduler.torch_layer.private import version_of

__all__ = ["Changes", "lowered", "release", "run_step"]

Result = TypeVar("Result")
BufferPlace = tuple[dict[str, Tensor | None], str]  # a module's buffers, and a name among them


class _State:
    """The generators and buffers before a forward.

    Attributes:
        copies: (place, tensor, copy of its values) of each buffer that a forward may change.
        versions: (place, tensor, version) of each other one.
    """

    def __init__(
        self, device: torch.device, changing: list[BufferPlace], others: list[BufferPlace], host: bool
    ) -> None:
        self.random, self.host_random = Draws(device), HostRandomState()
        self.copies = [(place, t, _copied(t, host=host)) for place, t in _there(changing)]
        self.versions = [(place, t, version_of(t)) for place, t in _there(others)]

    def hindrance(self) -> str | None:
        """Return why the state cannot be restored; None if it can."""
        for (buffers, name), tensor, version in self.versions:
            if buffers[name] is not tensor or version_of(tensor) != version:
                return f"buffer {name!r} has changed, which it did not at the first forward"
        return None

    def restore(self) -> None:
        """Put generators and buffers back."""
        random = self.random.state()
        if random is not None:
            random.restore()
        self.host_random.restore()
        copy_back((tensor, copy) for _, tensor, copy in self.copies)
        for (buffers, name), tensor, _ in self.copies:
            buffers[name] = tensor


class Changes:
    """Finds at the first forward which buffers change, so that later ones copy these only.

    Values decide, not versions: kernels of batch norm change statistics without a new version.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.changing: list[BufferPlace] | None = None
        self.others: list[BufferPlace] = []

    def before(self, model: nn.Module) -> _State:
        """Return the state now; the first time with all buffers, in host memory."""
        if self.changing is not None:
            return _State(self.device, self.changing, self.others, host=False)
        places: list[BufferPlace] = [(m._buffers, name) for m in model.modules() for name in m._buffers]
        return _State(self.device, places, [], host=True)

    def after(self, state: _State) -> None:
        """Note that a forward from that state is over."""
        if self.changing is None:
            self.changing = []
            for place, tensor, copy in state.copies:
                same = place[0][place[1]] is tensor and equal_bits(tensor.cpu(), copy)
                (self.others if same else self.changing).append(place)


def _copied(tensor: Tensor, *, host: bool) -> Tensor:
    """Copy a tensor beside it, in memory that CUDA plans count, or to the host outside torch's allocator."""
    beside = tensor.device.type == "cuda" and not host
    if beside or tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor.detach().to(tensor.device if beside else "cpu", copy=True)
    copy = torch.from_numpy(np.empty(tensor.numel() * tensor.element_size(), dtype=np.uint8))
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _there(places: list[BufferPlace]) -> list[tuple[BufferPlace, Tensor]]:
    return [(place, tensor) for place in places if (tensor := place[0][place[1]]) is not None]


def release(device: torch.device) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def lowered(plan: Plan, device: torch.device) -> Plan | None:
    """Return a plan that takes less, after a step by ``plan`` ran out of memory; None if there is none.

    A tenth less; on CUDA, if that is lower, 95 % of what the allocator can give above what is live now.
    Where no schedule is so tight, the tightest.
    """
    peak = plan.predicted_peak
    budget = peak - peak // 10
    if device.type == "cuda":
        budget = min(budget, peak - step_bytes(plan) + _available(device) * 95 // 100)
    try:
        return plan.within(max(1, budget))
    except InfeasibleBudget as error:
        return plan.within(error.smallest) if error.smallest < peak else None


def _available(device: torch.device) -> int:
    """Return the bytes that the caching allocator can still give."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, limit) + reserved - torch.cuda.memory_allocated(device)


def run_step(
    model: nn.Module, step: Callable[[], Result], *, also: Iterable[Tensor] = (), copies: bool = False
) -> Result:
    """Run a step; if memory runs out, put everything back and run it once more by a tighter plan.

    ::

        def step():
            loss = loss_of(planned(batch))
            loss.backward()
            return loss.detach()

        optimizer.zero_grad()
        loss = run_step(planned, step)
        optimizer.step()

    It restores gradients of the model's parameters and of ``also``, the model's buffers, and generators.
    What a failed backward added to a gradient that existed before (accumulation) cannot be subtracted:
    the error is then raised and says so, unless there are copies. So it is if parameters have changed
    (an optimizer in a hook).

    Args:
        model: a planned model, with ``on_oom="replan"`` (the default on CUDA).
        step: the forward, the loss and the backward, no more: what else it changes is not restored.
        also: further leaves that the step gives gradients to, such as the parameters of other modules.
        copies: whether gradients that exist are copied to host memory before each step.

    Returns:
        what ``step`` returns.

    Raises:
        TypeError: the model does not train by a plan.
        torch.OutOfMemoryError: the step cannot be run again, a note says why; or it ran out of memory again.

    Example:
        >>> planned = execute(plan, model)
        >>> run_step(planned, lambda: planned(batch).sum().backward())
    """
    plans = plans_within(model)
    if plans is None:
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
    """The gradients of parameters before a step."""

    def __init__(self, parameters: Iterable[Tensor], copies: bool) -> None:
        self.parameters = [(p, version_of(p)) for p in parameters]
        self.before: list[tuple[Tensor, Tensor | None, int, Tensor | None]] = []
        for parameter, _ in self.parameters:
            grad = parameter.grad
            copy = grad.detach().to("cpu", copy=True) if copies and grad is not None else None
            self.before.append((parameter, grad, 0 if grad is None else version_of(grad), copy))

    def hindrance(self) -> str | None:
        """Return why they cannot be restored; None if they can."""
        if any(version_of(p) != version for p, version in self.parameters):
            return "parameters have changed in it"
        uncopied = [(g, v) for _, g, v, copy in self.before if g is not None and copy is None]
        touched = sum(version_of(grad) != version for grad, version in uncopied)
        if touched:
            return (
                f"{touched} gradients that existed before it were added to in part; call zero_grad() and begin the "
                "accumulation anew, or pass copies=True"
            )
        return None

    def restore(self) -> None:
        """Put them back."""
        for parameter, grad, version, copy in self.before:
            if grad is not None and copy is not None and version_of(grad) != version:
                copy_back([(grad, copy)])
            parameter.grad = grad
