"""Leave the model as it was: gradients, buffers and random-number state around a trial run."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from scheduler.capture.sample import Call
from scheduler.capture.sharded import take_gathered_grads
from scheduler.capture.unwind import unwound

__all__ = [
    "CPU_RANDOM_STATE",
    "AutocastState",
    "Draws",
    "HostRandomState",
    "RandomState",
    "aliased",
    "autocast_contexts",
    "autocast_state",
    "model_device",
    "preserved",
    "reverse",
    "set_apart",
    "shielded",
    "uncached",
]

CPU_RANDOM_STATE = 5056  # bytes of torch's CPU generator state, an allocation of its own


class RandomState:
    """The state of the generators that a model on ``device`` draws from: the CPU's and the device's.

    Under FakeTensorMode no random numbers are drawn and the generators are left alone; a tensor without data stands
    in for what their state takes.

    Args:
        faked: whether that is so, where it is known.
    """

    __slots__ = ("cpu", "device", "faked", "on_device")

    def __init__(self, device: torch.device, faked: bool | None = None) -> None:
        self.device = device
        self.on_device: torch.Tensor | None = None
        self.faked = detect_fake_mode() is not None if faked is None else faked
        if self.faked:  # the CPU's state takes nothing of another device
            self.cpu = torch.empty(CPU_RANDOM_STATE if device.type == "cpu" else 0, dtype=torch.uint8)
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


class Draws:
    """Whether random numbers have been drawn since this was made, and how the generators stood then.

    The CPU's generator has no counter, so its state is compared; it is kept outside of torch's allocator meanwhile.
    """

    __slots__ = ("cpu", "device", "on_device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.default_generator.get_state().numpy().tobytes()
        self.on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def state(self) -> RandomState | None:
        """How the generators stood when this was made; None if they stand there still."""
        now = torch.default_generator.get_state()
        moved = now.numpy().tobytes() != self.cpu
        if self.on_device is not None and not moved:
            moved = not torch.equal(self.on_device, torch.cuda.get_rng_state(self.device))
        if not moved:
            return None
        state = object.__new__(RandomState)
        now.numpy()[:] = np.frombuffer(self.cpu, dtype=np.uint8)
        state.cpu, state.device, state.on_device, state.faked = now, self.device, self.on_device, False
        return state


class HostRandomState:
    """The state of Python's own generator and of NumPy's, which a model's code may draw from."""

    __slots__ = ("numpy", "python")

    def __init__(self) -> None:
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")  # nothing draws from what nobody imported
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Set the generators back."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def model_device(model: nn.Module) -> torch.device:
    """The one device that holds the model's parameters; of a model without any, its buffers; without these, the CPU.

    Raises:
        ValueError: the parameters lie on several devices.
    """
    devices = {p.device for p in model.parameters()} or {b.device for b in model.buffers()}
    devices = devices or {torch.device("cpu")}
    if len(devices) != 1:
        raise ValueError(
            f"solve: the model's parameters lie on {sorted(map(str, devices))}; "
            "move the model to one device first (model.to(device))"
        )
    return devices.pop()


def shielded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for saved tensors that torch.compile leaves alone, as it is called from compiled blocks."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


AutocastState = tuple[tuple[str, bool, torch.dtype], ...]  # (device type, enabled, dtype)


def autocast_state(device: torch.device) -> AutocastState:
    """(device type, enabled, dtype) for the CPU and the model's device."""
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in dict.fromkeys(("cpu", device.type))
    )


def autocast_contexts(state: AutocastState) -> list[torch.autocast]:
    """What brings back the autocast state of the forward, where the backward's differs.

    The cache of casts is off: what it holds may come from a no-grad run.
    """
    contexts = []
    for kind, enabled, dtype in state:
        if enabled or torch.is_autocast_enabled(kind):
            contexts.append(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
    return contexts


@contextmanager
def uncached() -> Iterator[None]:
    """Within it autocast's cache of casts is left alone."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def reverse(root: torch.Tensor) -> None:
    """``root.backward()``, outside of autocast, as it is in training; only the forward belongs inside."""
    with torch.autocast(root.device.type, enabled=False):
        root.backward()


@contextmanager
def aliased(model: nn.Module) -> Iterator[None]:
    """Within it the model's parameters are others, on the same storages and with the same gradients.

    A backward then reaches nobody who waits for gradients of the real ones: DistributedDataParallel would take those of a
    trial for those of the step, and reduce them.
    """
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    alias: dict[nn.Parameter, nn.Parameter] = {}
    for values, name, parameter in places:
        if parameter not in alias:
            alias[parameter] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            alias[parameter].grad = parameter.grad
        values[name] = alias[parameter]
    try:
        yield
    finally:
        for values, name, parameter in places:
            values[name] = parameter


@contextmanager
def preserved(model: nn.Module) -> Iterator[frozenset[nn.Parameter]]:
    """Within it gradients are fresh; on leaving, gradients, buffers and random numbers are as before.

    Hooks of parameters are silent meanwhile: one may step an optimizer, and none of these gradients is for it.

    Yields:
        the parameters that have a gradient.
    """
    gathered = take_gathered_grads(model)
    generators = RandomState(model_device(model))
    grads = {p: p.grad for p in model.parameters()}
    buffers = {b: b.detach().clone() for b in model.buffers()}
    # Autograd calls what is in these dicts when a gradient arrives.
    hooks = [d for p in grads for d in (p._backward_hooks, p._post_accumulate_grad_hooks) if d]
    silent = [dict(each) for each in hooks]
    for parameter in grads:
        parameter.grad = None
    for each in hooks:
        each.clear()
    try:
        with unwound():  # or what follows would run within what a trial has left behind
            yield frozenset(p for p, grad in grads.items() if grad is not None)
    finally:
        for each, before in zip(hooks, silent, strict=True):
            each.update(before)
        take_gathered_grads(model)
        grads.update(gathered)
        for parameter, grad in grads.items():
            parameter.grad = grad
        for buffer, value in buffers.items():
            # .data leaves the version counter alone: nothing that autograd saved is invalidated.
            buffer.data.copy_(value)
        generators.restore()


@contextmanager
def set_apart(call: Call) -> Iterator[Call]:
    """A call for trials: none of its tensors has a history or keeps a gradient; on leaving, the given ones have their values.

    Storages are those of the given tensors.
    """
    given = {id(t): t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)}
    before = {name: (t._version, t.detach().to("cpu", copy=True)) for name, t in given.items()}
    apart = {name: t.detach().requires_grad_() if t.requires_grad else t for name, t in given.items()}
    try:
        yield pytree.tree_map_only(torch.Tensor, lambda t: apart[id(t)], call)
    finally:
        for name, (version, value) in before.items():
            if given[name]._version != version:  # the model changes its input in place
                given[name].data.copy_(value)
