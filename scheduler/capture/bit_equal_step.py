"""Run one step of a model, captured or plain, and compare two steps bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.offloaded import on_host
from rematplan.scheduler.torch_layer.layouts import equal_bits
from rematplan.scheduler.torch_layer.loss import find_loss, output_tensors
from rematplan.scheduler.torch_layer.preserve import RandomState, model_device, preserved, reverse
from rematplan.scheduler.torch_layer.private import (
    BackwardHookFunction,
    function_of_node,
    is_of_library_op,
    pytree,
)

__all__ = ["StepResult", "custom_functions", "difference", "run_step"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step left behind, copied to the CPU.

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


def run_step(
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
        outputs = [_copy(t) for t in output_tensors(output)]
        custom = custom_functions([loss, *output_tensors(output)])
        del output
        given = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor) and t.requires_grad]
        for tensor in given:
            tensor.grad = None
        reverse(loss)
        arrived = tuple(_copy(t.grad) for t in given)
        for tensor in given:
            tensor.grad = None
        grads = {name: _copy(parameter.grad) for name, parameter in model.named_parameters()}
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
