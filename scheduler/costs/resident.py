"""Bytes live during the whole step: parameters, buffers, gradients, optimizer state, inputs, workspaces."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.block_state import named_tensors
from rematplan.scheduler.capture.blocks.calls import makes_weights
from rematplan.scheduler.capture.protocol import Capture
from rematplan.scheduler.costs.meters.cuda_overheads import workspace_bytes
from rematplan.scheduler.costs.meters.live_storages import LiveBytes
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.torch_layer.fsdp import local
from rematplan.scheduler.torch_layer.layouts import held_bytes, parts, unused_room
from rematplan.scheduler.torch_layer.leaves import tensors_in
from rematplan.scheduler.torch_layer.preserve import CPU_RANDOM_STATE
from rematplan.scheduler.torch_layer.private import (
    FakeTensorMode,
    default_foreach,
    drop_step_hooks,
    storage_id,
)
from rematplan.scheduler.torch_layer.target import Device, Target, lies_on

__all__ = [
    "copied_buffers",
    "optimizer_bytes",
    "optimizer_step_bytes",
    "rerun_state",
    "resident_parts",
    "storage_bytes",
]


def storage_bytes(tensors: Iterable[Tensor], device: Device) -> int:
    """Return bytes that ``tensors`` take on the kind of ``device``: a storage that several share counts once.

    Of a storage larger than the tensors seen on it (a batch cut out of a data set) only their part counts.
    """
    found: dict[int, tuple[int, int]] = {}  # storage -> (its bytes, bytes of the tensors on it)
    for tensor in dict.fromkeys(map(local, tensors)):
        for each in parts(tensor) if lies_on(tensor, device) else ():
            storage = each.untyped_storage()
            _, part = found.get(storage_id(storage), (0, 0))
            found[storage_id(storage)] = (storage.nbytes(), part + each.nbytes)
    return sum(allocated(min(whole, part), device) for whole, part in found.values())


# Bytes, at most, of a few elements of a stage's inputs, by which a re-run sees whether they have changed.
SAMPLES = 16 * 1024


def rerun_state(capture: Capture, model: nn.Module, k: int) -> int:
    """Return bytes held while stage k may run again, besides values: noted before each first run."""
    state = CPU_RANDOM_STATE * capture.effects[k].random if capture.place.type == "cpu" else SAMPLES
    return state + storage_bytes(named_tensors(model, capture.effects[k].changed), capture.place)


def copied_buffers(capture: Capture, model: nn.Module) -> int:
    """Return bytes of the copies of changing buffers that a forward on CUDA holds against out-of-memory."""
    if capture.place.type != "cuda":
        return 0
    changed = {name for each in capture.effects for name in each.changed}
    return storage_bytes((b for name, b in model.named_buffers() if name in changed), capture.place)


def resident_parts(model: nn.Module, call: Any, device: Device) -> dict[str, int]:
    """Return bytes of parameters, existing gradients, buffers, tensors in ``call``, cuBLAS's workspaces."""
    made = [t for m in model.modules() if makes_weights(m) for t in vars(m).values() if isinstance(t, Tensor)]
    given = tensors_in(call)
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return {
        "parameters": storage_bytes(model.parameters(), device),
        "existing gradients": storage_bytes(grads, device),
        "buffers": storage_bytes((*model.buffers(), *made), device),
        "inputs": storage_bytes(given, device) + sum(map(unused_room, given)),
        "workspaces": workspace_bytes(device),
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer | None, device: Device) -> int:
    """Return bytes of the optimizer's state: as it is, or as its first step will make it.

    An empty state is found by one step of a copy of the optimizer on fake tensors: exact, and without memory.

    Raises:
        ValueError: the optimizer's step does not run on fake tensors and its state is empty.
    """
    if optimizer is None:
        return 0
    if optimizer.state:
        return storage_bytes(tensors_in(dict(optimizer.state)), device)
    try:
        states = _stepped(optimizer, device)[0].state.values()
    except Exception as error:  # whatever a third-party optimizer does on fake tensors
        raise ValueError(
            f"solve: the state of {type(optimizer).__name__} is still empty and its size cannot be found by a "
            f"trial step on fake tensors ({error}); call optimizer.step() once before solve()"
        ) from error
    made = (t for t in tensors_in(list(states)) if lies_on(t, device))
    # Optimizers keep their counts of steps, of no dimension, on the host.
    scalars = not isinstance(device, Target) or device.type == "cpu"
    return sum(allocated(held_bytes(t), device) for t in made if scalars or t.ndim)


def optimizer_step_bytes(optimizer: torch.optim.Optimizer | None, device: Device) -> int | None:
    """Return the most bytes that the optimizer's step takes above its state and gradients; None if unknown.

    They are counted in the second step of a copy on fake tensors, when its state exists; on CUDA over all
    parameters at once, unless the optimizer is told otherwise.
    """
    if optimizer is None:
        return 0
    try:
        stand_in, fake = _stepped(optimizer, device)
        with fake, LiveBytes(device.type) as counter, torch.no_grad():
            type(optimizer).step(stand_in)
    except Exception:  # noqa: BLE001 # whatever a third-party optimizer does on fake tensors
        return None
    return counter.peak


def _foreach(group: dict[str, Any], device: Device) -> dict[str, bool]:
    """Return torch's choice of a group's ``foreach`` where it is not set; nothing where it is.

    With it a step on CUDA runs over all parameters at once, and has a temporary of each. torch chooses by the
    parameters' type, and knows none of fake ones.
    """
    if group.get("foreach", False) is not None or group.get("fused") is not None:
        return {}
    differentiable = group.get("differentiable", False)
    if isinstance(device, Target):
        foreach = device.type == "cuda" and not differentiable
    else:
        foreach = default_foreach([local(p) for p in group["params"]], differentiable)
    if isinstance(group.get("lr"), Tensor) and not group.get("capturable", False):
        foreach = False  # as the optimizers have it
    return {"foreach": foreach}


def _stepped(
    optimizer: torch.optim.Optimizer, device: Device
) -> tuple[torch.optim.Optimizer, FakeTensorMode]:
    """Return a copy of the optimizer on fake tensors, after its first step."""
    fake = FakeTensorMode()
    stand_in = copy.copy(optimizer)
    stand_in.state = defaultdict(dict)
    drop_step_hooks(stand_in)

    def double(whole: Tensor) -> nn.Parameter:
        tensor = local(whole)
        place = "cpu" if isinstance(device, Target) else tensor.device
        with fake:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)
        made = nn.Parameter(like, requires_grad=whole.requires_grad)
        if whole.requires_grad:
            with fake:
                made.grad = torch.empty_like(made)
        return made

    stand_in.param_groups = [
        {**group, **_foreach(group, device), "params": [*map(double, group["params"])]}
        for group in optimizer.param_groups
    ]
    with fake, torch.no_grad():
        type(optimizer).step(stand_in)
    return stand_in, fake
