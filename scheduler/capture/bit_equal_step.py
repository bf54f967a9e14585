"""Run one step of a model, plain or captured, and compare a captured step with plain ones bit for bit.

Kernels that sum in no fixed order (atomic additions in the backward of attention, convolutions, scatter and
embedding on a GPU) give the plain model other last bits at each step. A captured step is then held against
the plain one under deterministic algorithms. Where there are none, outputs and buffers must be equal bit for
bit, and gradients may differ as those of plain steps do from one another, if that is no more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.offloaded import on_host
from rematplan.scheduler.capture.repeat import LARGEST, MOST, as_real, deterministic, largest, rounds_alike
from rematplan.scheduler.torch_layer.layouts import equal_bits
from rematplan.scheduler.torch_layer.leaves import tensors_in
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import RandomState, model_device, preserved, reverse
from rematplan.scheduler.torch_layer.private import BackwardHookFunction, function_of_node, is_of_library_op

__all__ = ["BIT_EQUAL", "PlainSteps", "StepResult", "custom_functions", "difference", "step_result"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of one step, copied to the CPU.

    Attributes:
        custom: names of the custom autograd.Functions in the graph of the outputs.
        given: gradients of the arguments that require grad.
    """

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    generators: RandomState
    own_loss: bool
    custom: tuple[str, ...] = ()
    given: tuple[Tensor | None, ...] = ()

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients of parameters and arguments, by name."""
        return {
            **{f"the gradient of {name}": each for name, each in self.grads.items()},
            **{f"the gradient of input {i}": each for i, each in enumerate(self.given)},
        }


def step_result(
    model: nn.Module, forward: Callable[[], Any], *, offload: bool = False, call: Any = ()
) -> StepResult:
    """Run one forward and backward from the present state, which is restored afterwards.

    Args:
        call: the arguments of the forward, whose gradients are compared too; none of its tensors has a
            history.
        offload: keep saved tensors in host memory meanwhile, for a model that may not fit otherwise.
    """
    with preserved(model):
        with on_host(model, call) if offload else nullcontext(), torch.enable_grad():
            output = forward()
            loss, own = find_loss(output)
        outputs = [_copy(t) for t in tensors_in(output)]
        custom = custom_functions([loss, *tensors_in(output)])
        del output
        given = [t for t in tensors_in(call) if t.requires_grad]
        for tensor in given:
            tensor.grad = None
        reverse(loss)
        arrived = tuple(_copy(t.grad) for t in given)
        grads = {name: _copy(parameter.grad) for name, parameter in model.named_parameters()}
        for tensor in given:
            tensor.grad = None
        buffers = {name: _copy(buffer) for name, buffer in model.named_buffers()}
        return StepResult(outputs, grads, buffers, RandomState(model_device(model)), own, custom, arrived)


def _copy(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().cpu().clone()


def custom_functions(tensors: list[Tensor]) -> tuple[str, ...]:
    """Return the names of the custom autograd.Functions that a backward from these tensors would run."""
    waiting: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    found: dict[str, None] = {}
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            function = function_of_node(node)
            # Those of module hooks are looked for elsewhere.
            if function is not BackwardHookFunction and not is_of_library_op(function):
                found[f"{function.__module__}.{function.__qualname__}"] = None
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return tuple(found)


def difference(plain: StepResult, other: StepResult) -> str | None:
    """Return the first thing in which two steps differ, in words; None if they are equal bit for bit."""
    if len(plain.outputs) != len(other.outputs):
        return f"{len(other.outputs)} output tensors instead of {len(plain.outputs)}"
    outputs = zip(plain.outputs, other.outputs, strict=True)
    found = other.gradients()
    compared: list[tuple[str, Tensor | None, Tensor | None]] = [
        *((f"output {i}", a, b) for i, (a, b) in enumerate(outputs)),
        *((name, grad, found[name]) for name, grad in plain.gradients().items()),
        *((f"buffer {name}", buffer, other.buffers[name]) for name, buffer in plain.buffers.items()),
    ]
    for what, a, b in compared:
        if a is None or b is None:
            if a is not b:
                return f"{what} is {'missing' if b is None else 'there, but not in the plain model'}"
        elif not equal_bits(a, b):
            return f"{what} differs{_amount(a, b)}"
    if not torch.equal(plain.generators.cpu, other.generators.cpu):
        return "the state of the CPU's random-number generator differs after the step"
    before, after = plain.generators.on_device, other.generators.on_device
    if before is not None and after is not None and not torch.equal(before, after):
        return "the state of the device's random-number generator differs after the step"
    return None


def _amount(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f": {tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
    if a.layout is not b.layout:
        return f": {b.layout} instead of {a.layout}"
    if not a.is_floating_point() or a.layout is not torch.strided:
        return ""
    return f" by up to {(a.double() - b.double()).abs().max().item():.3g}"


BIT_EQUAL = "one step is bit-equal to the plain model"
SPREAD = 8  # times what plain steps differ by from one another
SAMPLES = 3


class PlainSteps:
    """One plain step, and more of them once a captured step is not equal to it.

    Args:
        first: a plain step.
        step: makes one more, from the same state; it draws no random numbers but torch's.
        device: of the model.
    """

    def __init__(self, first: StepResult, step: Callable[[], StepResult], device: torch.device) -> None:
        self.first, self.step, self.device = first, step, device

    @cached_property
    def samples(self) -> list[StepResult]:
        """Plain steps, the first one included; two of them where these are equal bit for bit."""
        found = [self.first, self.step()]
        while len(found) < SAMPLES and difference(*found[-2:]):
            found.append(self.step())
        return found

    @cached_property
    def apart(self) -> str | None:
        """In what plain steps differ from one another, in words; None if they are equal bit for bit."""
        return _apart(self.samples)

    @cached_property
    def wide(self) -> str | None:
        """Return in what plain forwards differ by more than rounding, in words: no order of sums does so."""
        first, *others = (
            {f"output {i}": each for i, each in enumerate(step.outputs)}
            | {f"buffer {name}": each for name, each in step.buffers.items()}
            for step in self.samples
        )
        for name, plain in first.items():
            if not all(rounds_alike(plain, other[name], MOST) for other in others):
                return f"{name} differs"
        return None

    @cached_property
    def exact(self) -> StepResult | None:
        """Return a plain step under deterministic algorithms; None if they differ, or an op has none."""
        try:
            with deterministic(self.device):
                one, other = self.step(), self.step()
        except RuntimeError:
            return None
        return one if difference(one, other) is None else None

    def judge(self, trial: Callable[[], StepResult]) -> tuple[str | None, str]:
        """Compare a step of the captured model with the plain one.

        Args:
            trial: makes such a step, from the same state.

        Returns:
            in what it is not like the plain step, in words, and None if it is; how it is like it.
        """
        found = trial()
        differs = difference(self.first, found)
        if differs is None:
            return None, BIT_EQUAL
        if self.apart is None:
            return differs, ""
        if self.wide is not None:
            return f"{differs}, and between plain steps {self.wide} by more than rounding", ""
        if self.exact is not None:
            try:
                with deterministic(self.device):
                    differs = difference(self.exact, trial())
            except RuntimeError as error:
                return f"under deterministic algorithms it raises {type(error).__name__}: {error}", ""
            how = f"{BIT_EQUAL} under deterministic algorithms; by default plain steps differ: {self.apart}"
            return (None, how) if differs is None else (f"{differs}, under deterministic algorithms", "")
        beyond = self._beyond(found)
        how = f"gradients of one step differ from the plain ones as those do from one another: {self.apart}"
        return (None, how) if beyond is None else (beyond, "")

    def hint(self) -> str:
        """Return what to say when no captured step is like the plain one; "" if there is nothing to say."""
        if self.apart is None:
            return ""
        cublas = ", and CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment" * (self.device.type == "cuda")
        return (
            f"; the plain model itself is not deterministic: {self.apart} (torch.use_deterministic_algorithms(True){cublas} "
            "makes it so, where each of its ops has such an algorithm)"
        )

    def _beyond(self, found: StepResult) -> str | None:
        """Return the first thing in which a step differs from the plain one by more than plain steps do."""
        rest = _apart([replace(each, grads={}, given=()) for each in (*self.samples, found)])
        if rest is not None:
            return rest
        plain, *others = (step.gradients() for step in self.samples)
        # Of gradients that are zero but for rounding, the noise is as large as they are.
        scale = max((largest(as_real(each)) for each in plain.values() if each is not None), default=0.0)
        for name, tensor in found.gradients().items():
            own = plain[name]
            off, spread = _distance(own, tensor), max(_distance(own, other[name]) for other in others)
            if off > SPREAD * spread:
                return f"{name} differs by up to {off:.3g}, between plain steps by {spread:.3g}"
            if own is not None and spread > _rounding(own) * scale:
                return (
                    f"{name} differs between plain steps by up to {spread:.3g}, which is more than rounding"
                )
        return None


def _apart(steps: Iterable[StepResult]) -> str | None:
    first, *others = steps
    return next(filter(None, (difference(first, other) for other in others)), None)


def _rounding(tensor: Tensor) -> float:
    """Return what sums in another order may differ by, as a share of the largest value."""
    real = as_real(tensor)
    return min(MOST * torch.finfo(real.dtype).eps, LARGEST) if real.is_floating_point() else 0.0


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    """Return the most by which two tensors differ; 0 if bits are equal, infinity if incomparable."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if equal_bits(a, b):
        return 0.0
    if a.shape != b.shape or a.dtype != b.dtype or a.layout is not b.layout:
        return math.inf
    a, b = as_real(a), as_real(b)
    if not a.is_floating_point():
        return math.inf
    off = (a.double() - b.double()).abs()
    off[a.isnan() & b.isnan()] = 0.0
    most = float(off.max())
    return math.inf if math.isnan(most) else most
