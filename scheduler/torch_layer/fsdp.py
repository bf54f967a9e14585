"""Handle models on many devices: refuse wrappers, and gather parameters that fully_shard (FSDP2) has sharded.

A model that uses parts of torch.distributed has imported them; nothing is imported here for other models.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.private import TorchDispatchMode, share_fsdp_state

__all__ = [
    "CollectiveCall",
    "NoCollectives",
    "gathered",
    "holders",
    "is_distributed",
    "local",
    "own_parameters",
    "placement",
    "reject_tensor_parallel",
    "reject_wrapped",
    "reshard",
    "sharded_within",
    "share_sharding",
    "take_gathered_grads",
    "unshard",
]

WRAPPERS = {
    "DistributedDataParallel": "plan the model inside it, and wrap what executes the plan: "
    "DistributedDataParallel(execute(plan, model))",
    "DataParallel": "plan the model inside it; DistributedDataParallel can wrap what executes the plan, DataParallel not",
    "FullyShardedDataParallel": "shard with torch.distributed.fsdp.fully_shard instead, and plan the sharded model",
    "OptimizedModule": "torch.compile of a whole model would lose the schedule: compile its blocks (block.compile()), "
    "then plan the model with capture=[blocks]",
}


def reject_wrapped(call: str, model: nn.Module) -> None:
    """Refuse a wrapper of torch's that belongs around a planned model, not into it.

    Raises:
        ValueError: says what to do instead.
    """
    if model._compiled_call_impl is not None:
        raise ValueError(f"{call}: model is compiled: {WRAPPERS['OptimizedModule']}")
    for kind in type(model).__mro__:
        if kind.__module__.startswith("torch.") and kind.__name__ in WRAPPERS:
            raise ValueError(f"{call}: model is a {kind.__name__}: {WRAPPERS[kind.__name__]}")


def reject_tensor_parallel(model: nn.Module) -> None:
    """Refuse parameters that are DTensors but not by fully_shard alone.

    Raises:
        ValueError: says which parameter, and what can be planned.
    """
    for name, parameter in model.named_parameters():
        if not placement(parameter):
            continue
        shards = sum(not place.is_replicate() for place in parameter.placements)  # type: ignore[attr-defined]
        if shards > 1 or not holders(model, name.rpartition(".")[0]):
            raise ValueError(
                f"solve: parameter {name} is a DTensor that fully_shard does not gather ({placement(parameter)}); "
                "of models whose parameters are DTensors only those sharded by fully_shard over data-parallel ranks "
                "can be planned, without tensor parallelism"
            )


def is_distributed() -> bool:
    """Whether torch.distributed is initialised."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class CollectiveCall(RuntimeError):
    """A collective was about to be called."""


class NoCollectives(TorchDispatchMode):
    """Raises CollectiveCall at a collective, instead of waiting for ranks that may never come."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            raise CollectiveCall(f"{func} waits for other ranks")
        return func(*args, **(kwargs or {}))


def _kind(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, ())


def _fsdp_module() -> Any:
    return _kind("torch.distributed.fsdp", "FSDPModule")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this device: the shard of a DTensor, else the tensor itself."""
    if not placement(tensor):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def placement(tensor: Tensor) -> str:
    """Describe the placement of a DTensor on its mesh, alike on all devices; "" for any other tensor."""
    if not isinstance(tensor, _kind("torch.distributed.tensor", "DTensor")):
        return ""
    return f"{tensor.placements} over {tuple(tensor.device_mesh.shape)}"


def sharded_within(module: nn.Module) -> list[Any]:
    """Return the modules, itself included, that fully_shard was called on."""
    kind = _fsdp_module()
    return [inner for inner in module.modules() if isinstance(inner, kind)] if kind else []


def holders(model: nn.Module, name: str) -> list[Any]:
    """Return the modules that gather ``name``: it and those above that fully_shard was called on."""
    parts = name.split(".") if name else []
    path = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    return [module for module in path if isinstance(module, _fsdp_module())]


def reshard(model: nn.Module) -> None:
    """Release gathered parameters, which fully_shard's root keeps after a forward without backward."""
    for module in sharded_within(model):
        module.reshard()


def share_sharding(model: nn.Module, twin: nn.Module) -> None:
    """Make fully_shard's methods (unshard, ...) work on an object that shares a model's ``__dict__``, too."""
    if isinstance(model, _fsdp_module()):
        share_fsdp_state(model, twin)


def unshard(modules: Sequence[Any]) -> list[Any]:
    """Gather the parameters of ``modules``, and return those modules that were sharded. Collective."""
    before = [own_parameters(module) for module in modules]
    for module in modules:
        module.unshard()
    return [module for module, own in zip(modules, before, strict=True) if own_parameters(module) != own]


def take_gathered_grads(model: nn.Module) -> dict[nn.Parameter, Tensor | None]:
    """Remove and return the gradients of gathered parameters, then reshard all. Collective.

    A backward through a part of the model leaves some there, which fully_shard would add to those of the next
    step.
    """
    found: dict[nn.Parameter, Tensor | None] = {}
    for module in sharded_within(model):
        module.unshard()
        for parameter in own_parameters(module):
            found[parameter], parameter.grad = parameter.grad, None
        module.reshard()
    return found


@contextmanager
def gathered(outer: Sequence[Any], inner: Sequence[Any]) -> Iterator[None]:
    """Gather the parameters of ``outer`` within the block; on exit reshard those that were sharded before.

    Collective: every rank must enter in the same order.

    Args:
        outer: modules that fully_shard was called on.
        inner: likewise, gathered by their own hooks, which do not reshard them in backward.
    """
    before = [own_parameters(module) for module in inner]
    opened = unshard(outer)
    try:
        yield
    finally:
        opened += [m for m, own in zip(inner, before, strict=True) if own_parameters(m) != own]
        for module in opened:
            module.reshard()


def own_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that a module gathers itself: at present full ones or shards."""
    found = set(module.parameters(recurse=False))
    for child in module.children():
        if not isinstance(child, _fsdp_module()):
            found |= own_parameters(child)
    return found
