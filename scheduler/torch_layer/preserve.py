"""Leave the model as it was: gradients, buffers and random-number state around a trial run."""

from __future__ import annotations

import random
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.fake import Watch
from rematplan.scheduler.torch_layer.fsdp import sharded_within, take_gathered_grads
from rematplan.scheduler.torch_layer.layouts import storage_key
from rematplan.scheduler.torch_layer.leaves import map_tensors, tree_leaves
from rematplan.scheduler.torch_layer.private import (
    detect_fake_mode,
    dynamo_is_loaded,
    graph_task,
    hooks_of_gradients,
    replaced,
    storage_id,
    version_of,
)
from rematplan.scheduler.torch_layer.python_reads import StateTensor, roots_of, state_tensors
from rematplan.scheduler.torch_layer.python_state import Snapshot
from rematplan.scheduler.torch_layer.unwind import unwound

__all__ = [
    "CPU_RANDOM_STATE",
    "Draws",
    "HostRandomState",
    "RandomState",
    "aliased",
    "bare",
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

    Under FakeTensorMode no random numbers are drawn and the generators are left alone; a tensor without data
    stands in for what their state takes.

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

    The CPU's generator has no counter, so its state is compared; it is kept outside of torch's allocator
    meanwhile.
    """

    __slots__ = ("cpu", "device", "on_device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.default_generator.get_state().numpy().tobytes()
        self.on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def state(self) -> RandomState | None:
        """Return how the generators stood when this was made; None if they stand there still."""
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

    def differs(self) -> bool:
        """Whether any number was drawn since."""
        if random.getstate() != self.python:
            return True
        if self.numpy is None:
            return False
        now = sys.modules["numpy"].random.get_state()
        return any(not np.array_equal(a, b) for a, b in zip(self.numpy, now, strict=True))

    def restore(self) -> None:
        """Set the generators back."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def in_backward() -> bool:
    """Whether autograd runs a backward: a forward within it (torch's checkpoint, say) is a re-run."""
    return graph_task() != -1


def may_be_seed(tensor: torch.Tensor) -> bool:
    """Whether a saved tensor may be the seed or offset of attention's dropout: one or two 64-bit integers.

    Without dropout the kernels save them as they find them in memory (``at::empty``): their values say
    nothing.
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
    """A hook for saved tensors that torch.compile leaves alone, as it is called from compiled blocks."""
    return torch.compiler.disable(hook) if dynamo_is_loaded() else hook


@contextmanager
def uncached() -> Iterator[None]:
    """Within it autocast's cache of casts is left alone."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def on_gradient(tensor: torch.Tensor, hook: Callable[[torch.Tensor], Any]) -> None:
    """Call the hook with the gradient of a tensor, which requires grad, when it arrives."""
    # A view whose base was changed in place gets its node when it is asked for; without, torch's
    # register_hook crashes.
    _ = tensor.grad_fn
    tensor.register_hook(hook)


def reverse(root: torch.Tensor) -> None:
    """``root.backward()``, outside of autocast, as it is in training; only the forward belongs inside."""
    with torch.autocast(root.device.type, enabled=False):
        root.backward()


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what calls the model's forward alone: without hooks of the root and a ``__call__`` of its class.

    It shares everything with the model.
    """
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    root = model
    if type(model).__call__ is not nn.Module.__call__:
        cls = type(model)
        plain = type(cls.__name__, (cls,), {"__call__": nn.Module.__call__, "__module__": cls.__module__})
        root = object.__new__(plain)
        object.__setattr__(root, "__dict__", vars(model))
    with replaced(vars(model), **{name: OrderedDict() for name in names}):
        yield root


@contextmanager
def aliased(model: nn.Module) -> Iterator[None]:
    """Within it the model's parameters are others, on the same storages and with the same gradients.

    A backward then reaches nobody who waits for gradients of the real ones: DistributedDataParallel would
    take those of a trial for those of the step, and reduce them.
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
def preserved(model: nn.Module) -> Iterator[frozenset[nn.Parameter]]:  # noqa: C901 - one restore, in its order
    """Within it gradients are fresh; on leaving, the model and what hangs on it are as before.

    That is: gradients, of parameters and of other leaves that Python state holds; buffers, by object and
    value; values of parameters and tensors that ``moving`` has seen change; attributes, containers,
    generators of the model's own (``python_state``); random numbers. Hooks of parameters are silent
    meanwhile: one may step an optimizer, and none of these gradients is for it. Tensors with a history in
    Python state have none meanwhile, or a trial would reverse it.

    Yields:
        the parameters that have a gradient.
    """
    gathered = take_gathered_grads(model)
    generators = RandomState(model_device(model))
    surroundings = _surroundings(model)
    state = Snapshot(surroundings.roots)
    held = surroundings.state(model)
    tensors = [places[0].get() for places in held]
    grads: dict[Tensor, Tensor | None] = {p: p.grad for p in model.parameters()}
    grads.update({t: t.grad for t in tensors if t.is_leaf and t.requires_grad})
    values = {b: b.detach().clone() for b in model.buffers()}
    values.update({t: t.detach().clone() for t in (*model.parameters(), *tensors) if t in surroundings.moved})
    bound = [] if sharded_within(model) else [*model.parameters(), *model.buffers(), *tensors]
    storages = [(t, t.data, storage_key(t)) for t in bound]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    # Autograd calls what is in these dicts when a gradient arrives.
    hooks = [d for p in grads for d in hooks_of_gradients(p)]
    silent = [dict(each) for each in hooks]
    for tensor in grads:
        tensor.grad = None
    for each in hooks:
        each.clear()
    for places in held:
        tensor = places[0].get()
        if tensor.grad_fn is not None:
            apart = tensor.detach().requires_grad_()
            for place in places:
                place.put(apart)
    try:
        with unwound():  # or what follows would run within what a trial has left behind
            yield frozenset(
                p for p, grad in grads.items() if isinstance(p, nn.Parameter) and grad is not None
            )
    finally:
        for each, before in zip(hooks, silent, strict=True):
            each.update(before)
        take_gathered_grads(model)
        state.restore()
        grads = dict([*grads.items(), *gathered.items()])
        for tensor, grad in grads.items():
            tensor.grad = grad
        for parameter, flag in flags:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
        for tensor, data, key in storages:
            if storage_key(tensor) != key:  # ``tensor.data = other``
                tensor.data = data
        for tensor, value in values.items():
            # .data leaves the version counter alone: nothing that autograd saved is invalidated.
            tensor.data.copy_(value)
        generators.restore()


class _Surroundings:
    """What a model's forward may read and change besides its call.

    Attributes:
        roots: what its Python state is reachable from.
        moved: parameters and other tensors whose values a forward was seen to change; buffers always count as
            such.
    """

    def __init__(self, model: nn.Module) -> None:
        _, self.named = roots_of(model)
        self.moved: set[Tensor] = set()
        self.of = weakref.ref(model)

    @property
    def roots(self) -> list[tuple[str, Any]]:
        return [("", self.of()), *self.named.objects()]

    def state(self, model: nn.Module) -> list[list[StateTensor]]:
        """Return the places of tensors in Python state."""
        return state_tensors(model, self.roots)

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """Return tensors in Python state."""
        return [places[0].get() for places in self.state(model)]


_SURROUNDINGS: weakref.WeakKeyDictionary[nn.Module, _Surroundings] = weakref.WeakKeyDictionary()


def _surroundings(model: nn.Module) -> _Surroundings:
    if model not in _SURROUNDINGS:
        _SURROUNDINGS[model] = _Surroundings(model)
    return _SURROUNDINGS[model]


class _Moving(Watch):
    """Copies tensors before an op changes them in place for the first time."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.waiting: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            self.waiting.setdefault(storage_id(tensor.untyped_storage()), []).append(tensor)
        self.copies: dict[Tensor, Tensor] = {}

    def before_change(self, tensor: Tensor) -> None:
        """See ``Watch``."""
        for each in self.waiting.pop(storage_id(tensor.untyped_storage()), ()):
            self.copies[each] = each.detach().clone()


def uncompiled() -> AbstractContextManager[Any]:
    """Within it compiled modules run their own code.

    Of code that it meets under a dispatch mode Dynamo takes note, and compiles it no more.
    """
    if not dynamo_is_loaded():  # nothing is compiled, and loading it takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def moving(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Note which parameters and Python state's tensors a forward changes; ``preserved`` puts them back then.

    Parameters are too many to be copied at each trial for the few models that change them: a frozen teacher
    that follows, weights clamped in the forward, ``Embedding(max_norm)``.
    """
    surroundings = _surroundings(model)
    noted = _Moving([*model.parameters(), *surroundings.tensors(model)])
    try:
        with uncompiled(), noted:
            yield noted.copies
    finally:
        surroundings.moved.update(noted.copies)
        for tensor, value in noted.copies.items():
            tensor.data.copy_(value)


@contextmanager
def set_apart(call: Call) -> Iterator[Call]:
    """Yield the call with detached tensors (same storages); on exit undo in-place changes to the originals.

    Storages are those of the given tensors.
    """
    given = {id(t): t for t in tree_leaves(call) if isinstance(t, torch.Tensor)}
    before = {name: (version_of(t), t.detach().to("cpu", copy=True)) for name, t in given.items()}
    apart = {name: t.detach().requires_grad_() if t.requires_grad else t for name, t in given.items()}
    others = [leaf for leaf in tree_leaves(call) if not isinstance(leaf, torch.Tensor)]
    state = Snapshot((f"argument {i}", leaf) for i, leaf in enumerate(others))  # generators, say
    try:
        yield map_tensors(lambda t: apart[id(t)], call)
    finally:
        state.restore()
        for name, (version, value) in before.items():
            if version_of(given[name]) != version:  # the model changes its input in place
                given[name].data.copy_(value)
