"""Leave the model as it was: gradients, buffers and random-number state around a trial run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._guards import detect_fake_mode

__all__ = ["CPU_RANDOM_STATE", "RandomState", "model_device", "preserved"]

CPU_RANDOM_STATE = 5056  # bytes of torch's CPU generator state, an allocation of its own


class RandomState:
    """The state of the generators that a model on ``device`` draws from: the CPU's and the device's.

    Under FakeTensorMode no random numbers are drawn and the generators are left alone; a tensor without data stands
    in for what their state takes.
    """

    __slots__ = ("cpu", "device", "faked", "on_device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_device: torch.Tensor | None = None
        self.faked = detect_fake_mode() is not None
        if self.faked:
            self.cpu = torch.empty(CPU_RANDOM_STATE, dtype=torch.uint8, device="cpu")
            return
        self.cpu = torch.get_rng_state()
        self.on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Set the generators back."""
        if self.faked:
            return
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)

    def differs(self) -> bool:
        """Whether any random number was drawn since."""
        if self.faked:
            return False
        if not torch.equal(self.cpu, torch.get_rng_state()):
            return True
        return self.on_device is not None and not torch.equal(
            self.on_device, torch.cuda.get_rng_state(self.device)
        )


def model_device(model: nn.Module) -> torch.device:
    """The one device that holds the model's parameters.

    Raises:
        ValueError: the parameters lie on several devices.
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"solve: the model's parameters lie on {sorted(map(str, devices))}; "
            "move the model to one device first (model.to(device))"
        )
    return devices.pop()


@contextmanager
def preserved(model: nn.Module) -> Iterator[frozenset[nn.Parameter]]:
    """Within it gradients are fresh; on leaving, gradients, buffers and random numbers are as before.

    Yields:
        the parameters that have a gradient.
    """
    random = RandomState(model_device(model))
    grads = {p: p.grad for p in model.parameters()}
    buffers = {b: b.detach().clone() for b in model.buffers()}
    for parameter in grads:
        parameter.grad = None
    try:
        yield frozenset(p for p, grad in grads.items() if grad is not None)
    finally:
        for parameter, grad in grads.items():
            parameter.grad = grad
        for buffer, value in buffers.items():
            # .data leaves the version counter alone: nothing that autograd saved is invalidated.
            buffer.data.copy_(value)
        random.restore()
