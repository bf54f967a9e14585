"""Run the step that is planned as it is: ``TrialStep`` has what every kind of capture starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rematplan.scheduler.capture.bit_equal_step import StepResult, custom_functions, difference, step_result
from rematplan.scheduler.capture.blocks.callables import CallableChain, cut_off
from rematplan.scheduler.capture.blocks.calls import Recurrence, intercepted
from rematplan.scheduler.capture.call_reads import CallReads
from rematplan.scheduler.capture.offloaded import on_host
from rematplan.scheduler.capture.step_function import Refused, StepFunction
from rematplan.scheduler.core.errors import CaptureError, SampleError
from rematplan.scheduler.torch_layer.call import Call, canonical_call, forward_signature, nothing_to_train
from rematplan.scheduler.torch_layer.fsdp import sharded_within
from rematplan.scheduler.torch_layer.layouts import is_strided, tensor_bytes
from rematplan.scheduler.torch_layer.leaves import map_tensors, tensors_in
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import HostRandomState, moving, preserved
from rematplan.scheduler.torch_layer.private import DataDependentOutputException, DynamicOutputShapeException
from rematplan.scheduler.torch_layer.target import Device, Target
from rematplan.scheduler.torch_layer.unwind import met

__all__ = ["HOST_DRAWS", "UNTRIED", "TrialStep", "first_forward", "with_plain_step"]

HOST_DRAWS = (
    "the forward draws from the generators of Python or NumPy, which a graph would do once and for all"
)

UNTRIED = "not tried against the plain model: no data"


@dataclass(frozen=True, slots=True)
class TrialStep:
    """A model, the call that it is planned for, and what plain runs of that showed.

    Attributes:
        device: whose costs are asked for; a Target if the model is without data.
        progress: called with a line of text at each part of the planning.
        arrives: what reaches the model's forward, behind its own hooks.
        unread: leaves of that which the forward does not read.
        seen: which modules it calls again and again.
        own_loss: whether the model returns its own loss.
        plain: what one plain step gives; None if none was taken.
        host_draws: whether the step draws from the generators of Python or NumPy. Even if the numbers made no
            difference in it (a branch that is taken seldom), they may in another.
        custom: names of the custom autograd.Functions that it uses.
        sparse: parameter -> bytes of its gradient, where that is sparse.
    """

    model: nn.Module
    call: Call
    device: Device
    progress: Callable[[str], None]
    arrives: Call
    seen: Recurrence
    own_loss: bool
    unread: frozenset[int] = frozenset()
    plain: StepResult | None = None
    host_draws: bool = False
    custom: tuple[str, ...] = ()
    sparse: Mapping[nn.Parameter, int] = field(default_factory=dict)

    @property
    def target(self) -> Target | None:
        """The device described that costs are for; None for the one that holds the model."""
        return self.device if isinstance(self.device, Target) else None


def first_forward(model: nn.Module, call: Call, device: Device, progress: Callable[[str], None]) -> TrialStep:
    """Run one forward, so that a bad sample fails before any training step. The model is left as it is.

    Raises:
        SampleError, ValueError: the model rejects the call, or trains nothing by it.
        CaptureError: without data: its code asks for values.
    """
    if isinstance(device, Target):
        progress("running one forward without data")
        return _without_data(model, call, device, progress)
    progress("running one forward")
    args, kwargs = call
    signature = forward_signature(model)
    arrives, unread = call, frozenset[int]()

    def note(forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            nonlocal arrives, unread
            arriving = canonical_call(signature, args, kwargs)
            arrives = map_tensors(cut_off, arriving)
            calls = CallReads(model, arriving)
            args, kwargs = calls.watched(arriving)
            try:
                with calls.recording():
                    return forward(*args, **kwargs)
            finally:
                unread = calls.unread()

        return noted

    seen = Recurrence()
    try:
        if isinstance(model, StepFunction):
            with preserved(model), on_host(model, call):
                model.check(args, kwargs)
        with (
            preserved(model),
            torch.enable_grad(),
            on_host(model, call),
            nullcontext() if sharded_within(model) else moving(model),
            intercepted([(model, note)]),
            seen.watching(model),
        ):
            output = model(*args, **kwargs)
        if isinstance(model, CallableChain):
            with preserved(model):
                model.check(args, kwargs)
    except (torch.OutOfMemoryError, CaptureError, Refused):
        raise
    except Exception as error:  # whatever the model's code raises on a sample that does not suit it
        raise SampleError(_rejection(model, error)) from error
    hindrance = nothing_to_train(model, call)
    if hindrance and not any(tensor.requires_grad for tensor in tensors_in(output)):
        raise ValueError(hindrance)
    own_loss = find_loss(output)[1]
    return TrialStep(model, call, device, progress, arrives, seen, own_loss, unread)


def _without_data(model: nn.Module, call: Call, device: Target, progress: Callable[[str], None]) -> TrialStep:
    """Run one forward on tensors without data."""
    seen, random = Recurrence(), HostRandomState()
    args, kwargs = call
    try:
        with seen.watching(model), torch.enable_grad():
            output: Any = model(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CaptureError(
            f"solve: {type(model).__name__} asks for the values of tensors ({error}), and without data there are none; "
            "plan it where it has data, without device="
        ) from error
    except Exception as error:  # whatever the model's code raises on a sample that does not suit it
        raise ValueError(_rejection(model, error)) from error
    loss, own = find_loss(output)
    custom = custom_functions([loss, *tensors_in(output)])
    return TrialStep(
        model, call, device, progress, call, seen, own, host_draws=random.differs(), custom=custom
    )


def _rejection(model: nn.Module, error: Exception) -> str:
    return f"solve: {type(model).__name__} rejects the sample: {type(error).__name__}: {error}"


def with_plain_step(step: TrialStep, *, cacheless: bool) -> TrialStep:
    """Take one plain step, saved tensors offloaded from the device; the model's state is preserved.

    Args:
        cacheless: ``use_cache=False`` was added to the call, so that a step with caches must train alike.

    Raises:
        CaptureError: the step raises.
        ValueError: the model trains otherwise with caches.
    """
    model, (args, kwargs) = step.model, step.call
    random = HostRandomState()

    def taken(**keywords: Any) -> StepResult:
        return step_result(model, lambda: model(*args, **keywords), offload=True, call=step.call)

    with met(f"solve: a plain step of {type(model).__name__} on the sample raises"):
        plain = taken(**kwargs)
    if cacheless:
        more = {name: value for name, value in kwargs.items() if name != "use_cache"}
        # The caches may not fit: nobody trains that step, plain or planned.
        with suppress(torch.OutOfMemoryError):
            # Of the outputs the caches are no part of training.
            differs = difference(replace(plain, outputs=[]), replace(taken(**more), outputs=[]))
            if differs is not None:
                raise ValueError(
                    f"solve: {type(model).__name__} trains otherwise when it fills the caches of generation, which a plan "
                    f"leaves out: {differs}. Pass use_cache=False in the sample and in training, or set "
                    "model.config.use_cache = False"
                )
    grads = ((name, grad) for name, grad in plain.grads.items() if grad is not None)
    sparse = {model.get_parameter(name): tensor_bytes(grad) for name, grad in grads if not is_strided(grad)}
    return replace(step, plain=plain, host_draws=random.differs(), custom=plain.custom, sparse=sparse)
