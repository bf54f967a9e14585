"""Copy a model and a call to fake tensors, which take no memory, and watch its ops without values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.eager import as_eager
from rematplan.scheduler.torch_layer.fsdp import sharded_within
from rematplan.scheduler.torch_layer.layouts import is_strided
from rematplan.scheduler.torch_layer.leaves import map_tensors
from rematplan.scheduler.torch_layer.private import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    pytree,
    schema_of,
    storage_id,
)

__all__ = ["OpWatch", "fake_call", "fake_model", "has_data", "without_hardware"]


def has_data(tensors: Iterable[Any]) -> bool:
    """Whether none of the tensors is fake or on meta."""
    return not any(
        isinstance(t, FakeTensor) or t.device.type == "meta" for t in tensors if isinstance(t, Tensor)
    )


def _faked(tensor: Tensor, mode: FakeTensorMode, device: str) -> Tensor:
    """Return a fake tensor of the same shape, strides and dtype; a Parameter for a Parameter."""
    if not is_strided(tensor):
        raise CaptureError(
            "solve: a sparse or nested tensor has no stand-in without data; plan the model where it has data, without device="
        )
    with mode, torch.no_grad():
        storage_size = tensor.untyped_storage().nbytes() // tensor.element_size()
        whole = torch.empty(storage_size, dtype=tensor.dtype, device=device)
        fake = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).detach()
    if isinstance(tensor, nn.Parameter):
        result: Tensor = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        if tensor.grad is not None:
            result.grad = _faked(tensor.grad, mode, device)
        return result
    return fake.requires_grad_(tensor.requires_grad)


def fake_model(model: nn.Module, mode: FakeTensorMode, device: str = "cpu") -> nn.Module:
    """Return a copy of ``model`` whose parameters, buffers and other tensors are fake and take no memory.

    Args:
        model: real, fake or on meta.
        device: the device that the fake tensors claim.

    Raises:
        CaptureError: the model cannot be copied; says why.
    """
    if sharded_within(model):
        raise CaptureError(
            f"solve: {type(model).__name__} is sharded by fully_shard and cannot be copied without its data: plan it on the "
            "devices that hold it, without device=; rehearse it with real=True"
        )
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in pytree.tree_leaves(vars(module)):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _faked(tensor, mode, device)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # of any kind: the copying of attributes is the user's code
        raise CaptureError(
            f"solve: {type(model).__name__} cannot be copied without its data: {type(error).__name__}: {error}; "
            "planning for a device that is not there works on such a copy"
        ) from error


def fake_call(call: Any, mode: FakeTensorMode, device: str = "cpu") -> Any:
    """Return the call with a fake tensor for each tensor, the same for the same."""
    return map_tensors(functools.cache(lambda tensor: _faked(tensor, mode, device)), call)


class OpWatch(TorchDispatchMode):
    """Notes whether ops draw random numbers, and which storages they change, by tags and schemas.

    Attributes:
        random: whether an op drew random numbers, or would have with data.
        changed: identities of the storages that were changed in place.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.random = False
        self.changed: set[int] = set()

    def restart(self) -> None:
        """Forget what was noted."""
        self.random, self.changed = False, set()

    def has_changed(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage was changed."""
        return storage_id(tensor.untyped_storage()) in self.changed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op and note its effects."""
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):  # an op of higher order
            return func(*args, **kwargs)
        schema = schema_of(func)
        given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        given |= {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
        if torch.Tag.nondeterministic_seeded in func.tags and given.get("dropout_p") != 0.0:
            self.random = True
        written = [given.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        # The schema of batch normalisation does not tell that its statistics change.
        if "running_mean" in given and (given.get("training") or given.get("train")):
            written += [given["running_mean"], given.get("running_var")]
        for leaf in pytree.tree_leaves(written):
            if isinstance(leaf, Tensor):
                self.before_change(leaf)
                self.changed.add(storage_id(leaf.untyped_storage()))
        return func(*args, **kwargs)

    def before_change(self, tensor: Tensor) -> None:
        """Called with each tensor that an op is about to change in place; does nothing here."""


@contextmanager
def without_hardware(model: nn.Module, call: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Yield copies of the model and the call on fake tensors, which its code takes for real (``as_eager``).

    Raises:
        CaptureError: the model cannot be copied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copies = fake_model(model, mode), fake_call(call, mode)
    with as_eager(copies[0]), mode:
        yield copies
