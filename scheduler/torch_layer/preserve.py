"""Restore the model after a trial run: gradients, buffers, Python state and random generators."""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.fake import OpWatch
from rematplan.scheduler.torch_layer.fsdp import sharded_within, take_gathered_grads
from rematplan.scheduler.torch_layer.layouts import storage_key
from rematplan.scheduler.torch_layer.leaves import map_tensors, tree_leaves
from rematplan.scheduler.torch_layer.named_by_code import Named
from rematplan.scheduler.torch_layer.private import (
    detect_fake_mode,
    dynamo_is_loaded,
    graph_task,
    hooks_of_gradients,
    replaced,
    storage_id,
    version_of,
)
from rematplan.scheduler.torch_layer.python_reads import roots_of, state_tensors
from rematplan.scheduler.torch_layer.python_state import HOOKS, Snapshot
from rematplan.scheduler.torch_layer.unwind import unwound

__all__ = [
    "CPU_RANDOM_STATE",
    "Draws",
    "HostRandomState",
    "RandomState",
    "aliased",
    "bare",
    "copy_back",
    "in_backward",
    "may_be_seed",
    "model_device",
    "moving",
    "on_gradient",
    "preserved",
    "reverse",
    "set_apart",
    "shielded",
    "uncached",
    "uncompiled",
]

CPU_RANDOM_STATE = 5056  # bytes of torch's CPU generator state, an allocation of its own


class RandomState:
    """The state of the generators that a model on ``device`` draws from: the CPU's and the device's.

    Under FakeTensorMode no random numbers are drawn and the generators are left alone; a tensor of the same
    bytes stands for their state.

    Args:
        faked: whether FakeTensorMode is on; None: find out.
    """

    __slots__ = ("cpu", "device", "faked", "on_device")

    def __init__(self, device: torch.device, faked: bool | None = None) -> None:
        self.device = device
        self.on_device: Tensor | None = None
        self.faked = detect_fake_mode() is not None if faked is None else faked
        if self.faked:  # the CPU's state takes nothing of another device
            self.cpu = torch.empty(CPU_RANDOM_STATE if device.type == "cpu" else 0, dtype=torch.uint8)
        else:
            self.cpu, self.on_device = torch.get_rng_state(), _on_device(device)

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
        return not torch.equal(self.cpu, torch.get_rng_state()) or _moved(self.on_device, self.device)


def _on_device(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _moved(then: Tensor | None, device: torch.device) -> bool:
    return then is not None and not torch.equal(then, torch.cuda.get_rng_state(device))


class Draws:
    """The state of the same generators, the CPU's kept outside of torch's allocator."""

    __slots__ = ("cpu", "device", "on_device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.default_generator.get_state().numpy().tobytes()
        self.on_device = _on_device(device)

    def state(self) -> RandomState | None:
        """Return the state; None if no random numbers were drawn since."""
        now = torch.default_generator.get_state()
        if now.numpy().tobytes() == self.cpu and not _moved(self.on_device, self.device):
            return None
        state = object.__new__(RandomState)
        now.numpy()[:] = np.frombuffer(self.cpu, dtype=np.uint8)
        state.cpu, state.device, state.on_device, state.faked = now, self.device, self.on_device, False
        return state


class HostRandomState:
    """The state of Python's global generator and of NumPy's."""

    __slots__ = ("numpy", "python")

    def __init__(self) -> None:
        self.python, self.numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 # of the user's code

    def differs(self) -> bool:
        """Whether any number was drawn since."""
        if random.getstate() != self.python:
            return True
        now = np.random.get_state()  # noqa: NPY002
        return not all(map(np.array_equal, self.numpy, now))

    def restore(self) -> None:
        """Set the generators back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


def in_backward() -> bool:
    """Whether a backward runs in this thread: a forward within it (torch's checkpoint, say) is a re-run."""
    return graph_task() != -1


def may_be_seed(tensor: Tensor) -> bool:
    """Whether a saved tensor may be the seed or offset of attention's dropout: one or two 64-bit integers.

    Without dropout the kernels save uninitialised memory (``at::empty``).
    """
    return tensor.dtype in (torch.int64, torch.uint64) and tuple(tensor.shape) in ((), (2,))


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters; without any, of its buffers; without these, the CPU.

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
    """Return the hook for saved tensors such that torch.compile does not trace it in compiled blocks."""
    return torch.compiler.disable(hook) if dynamo_is_loaded() else hook


def copy_back(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give tensors their values back; the versions stay, so that nothing that autograd saved is invalid."""
    for tensor, value in values:
        tensor.data.copy_(value)


@contextmanager
def uncached() -> Iterator[None]:
    """Switch autocast's cache of casts off within the block."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def on_gradient(tensor: Tensor, hook: Callable[[Tensor], Any]) -> None:
    """Call the hook with the gradient of a tensor, which requires grad, when it arrives."""
    _ = tensor.grad_fn  # made now of a view whose base was changed in place; register_hook crashes without
    tensor.register_hook(hook)


def reverse(root: Tensor) -> None:
    """Call ``root.backward()`` outside of autocast, as training does."""
    with torch.autocast(root.device.type, enabled=False):
        root.backward()


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a module with the model's state but no hooks on the root and no ``__call__`` of its class."""
    root, cls = model, type(model)
    if cls.__call__ is not nn.Module.__call__:
        plain = type(cls.__name__, (cls,), {"__call__": nn.Module.__call__, "__module__": cls.__module__})
        root = object.__new__(plain)
        object.__setattr__(root, "__dict__", vars(model))
    with replaced(vars(model), **{name: OrderedDict() for name in HOOKS}):
        yield root


@contextmanager
def aliased(model: nn.Module) -> Iterator[None]:
    """Replace the model's parameters by others on the same storages with the same gradients in the block.

    A backward then calls no hooks on the real ones: DistributedDataParallel would reduce the gradients of a
    trial as those of the step.
    """
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    alias: dict[nn.Parameter, nn.Parameter] = {}
    for values, name, given in places:
        if given not in alias:
            alias[given] = nn.Parameter(given.detach(), requires_grad=given.requires_grad)
            alias[given].grad = given.grad
        values[name] = alias[given]
    try:
        yield
    finally:
        for values, name, parameter in places:
            values[name] = parameter


@contextmanager
def preserved(model: nn.Module) -> Iterator[frozenset[nn.Parameter]]:
    """Clear gradients within the block; restore the model and everything it reaches on leaving.

    Restored are gradients, of parameters and of other leaves in Python state; buffers, by object and value;
    values of parameters and tensors that ``moving`` has seen change; attributes, containers and generators
    (``python_state``); the global random generators. Within the block hooks on gradients do not run (one may
    step an optimizer), and tensors in Python state are detached, or a trial would reverse their history.

    Yields:
        the parameters that had a gradient.
    """
    gathered = take_gathered_grads(model)
    generators = RandomState(model_device(model))
    roots, moved = _surroundings(model)
    state, held = Snapshot(roots), state_tensors(model, roots)
    tensors = [places[0].get() for places in held]
    grads: dict[Tensor, Tensor | None] = {p: p.grad for p in model.parameters()}
    grads.update({t: t.grad for t in tensors if t.is_leaf and t.requires_grad})
    values = {b: b.detach().clone() for b in model.buffers()}
    values.update({t: t.detach().clone() for t in (*model.parameters(), *tensors) if t in moved})
    bound = [] if sharded_within(model) else [*model.parameters(), *model.buffers(), *tensors]
    storages = [(t, t.data, storage_key(t)) for t in bound]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    hooks = [(d, dict(d)) for p in grads for d in hooks_of_gradients(p)]
    for tensor in grads:
        tensor.grad = None
    for each, _ in hooks:
        each.clear()
    for places in held:
        tensor = places[0].get()
        if tensor.grad_fn is not None:
            apart = tensor.detach().requires_grad_()
            for place in places:
                place.put(apart)
    try:
        with unwound():  # what follows must not run within modes that a trial has left behind
            yield frozenset(p for p, g in grads.items() if isinstance(p, nn.Parameter) and g is not None)
    finally:
        for each, before in hooks:
            each.update(before)
        take_gathered_grads(model)
        state.restore()
        for tensor, grad in (*grads.items(), *gathered.items()):
            tensor.grad = grad
        for parameter, flag in flags:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
        for tensor, data, key in storages:
            if storage_key(tensor) != key:  # ``tensor.data = other``
                tensor.data = data
        copy_back(values.items())
        generators.restore()


_SURROUNDINGS: weakref.WeakKeyDictionary[nn.Module, tuple[Named, set[Tensor]]] = weakref.WeakKeyDictionary()


def _surroundings(model: nn.Module) -> tuple[list[tuple[str, Any]], set[Tensor]]:
    """Return the roots of a model's Python state, and the tensors but buffers that a forward has changed."""
    if model not in _SURROUNDINGS:
        _SURROUNDINGS[model] = roots_of(model)[1], set()
    named, moved = _SURROUNDINGS[model]
    return [("", model), *named.objects()], moved


class _Moving(OpWatch):
    """Copies tensors before an op changes them in place for the first time."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.waiting: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            self.waiting.setdefault(storage_id(tensor.untyped_storage()), []).append(tensor)
        self.copies: dict[Tensor, Tensor] = {}

    def before_change(self, tensor: Tensor) -> None:
        """See ``OpWatch``."""
        for each in self.waiting.pop(storage_id(tensor.untyped_storage()), ()):
            self.copies[each] = each.detach().clone()


def uncompiled() -> AbstractContextManager[Any]:
    """Return the context in which compiled modules run their own code.

    Code that Dynamo meets under a dispatch mode it never compiles again.
    """
    if not dynamo_is_loaded():  # nothing is compiled, and loading it takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def moving(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Note which parameters and tensors in Python state a forward changes; ``preserved`` restores them later.

    Copying all parameters at each trial would be too much for the few models that change some: a teacher that
    follows the student, weights clamped in the forward, ``Embedding(max_norm)``.
    """
    roots, moved = _surroundings(model)
    noted = _Moving([*model.parameters(), *(places[0].get() for places in state_tensors(model, roots))])
    try:
        with uncompiled(), noted:
            yield noted.copies
    finally:
        moved.update(noted.copies)
        copy_back(noted.copies.items())


@contextmanager
def set_apart(call: Call) -> Iterator[Call]:
    """Yield the call with detached tensors (same storages); undo in-place changes to them on exit."""
    leaves = tree_leaves(call)
    given = {id(t): t for t in leaves if isinstance(t, Tensor)}
    before = {name: (version_of(t), t.detach().to("cpu", copy=True)) for name, t in given.items()}
    apart = {name: t.detach().requires_grad_() if t.requires_grad else t for name, t in given.items()}
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    state = Snapshot((f"argument {i}", leaf) for i, leaf in enumerate(others))  # generators, say
    try:
        yield map_tensors(lambda t: apart[id(t)], call)
    finally:
        state.restore()
        # What the model changes in place of its input.
        copy_back(
            (given[n], value) for n, (version, value) in before.items() if version_of(given[n]) != version
        )
