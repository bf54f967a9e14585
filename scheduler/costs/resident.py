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
from rematplan.scheduler.torch_layer.leaves import tree_leaves
from rematplan.scheduler.torch_layer.preserve import CPU_RANDOM_STATE
from rematplan.scheduler.torch_layer.private import (
    FakeTensorMode,
    default_foreach,
    drop_step_hooks,
    pytree,
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

    Of a storage that is larger than the tensors seen on it (a batch cut out of a data set) only their part
    counts.
    """
    seen: set[Tensor] = set()
    found: dict[int, tuple[int, int]] = {}  # storage -> (its bytes, bytes of the tensors on it)
    for tensor in map(local, tensors):
        if lies_on(tensor, device) and tensor not in seen:
            seen.add(tensor)
            for each in parts(tensor):
                storage = each.untyped_storage()
                _, part = found.get(storage_id(storage), (0, 0))
                found[storage_id(storage)] = (storage.nbytes(), part + each.numel() * each.element_size())
    return sum(allocated(min(whole, part), device) for whole, part in found.values())


SAMPLES = (
    16 * 1024
)  # bytes, at most: a few elements of all that a stage reads, by which a re-run sees whether it has changed


def rerun_state(capture: Capture, model: nn.Module, k: int) -> int:
    """Return bytes that are held while stage k may run again, besides values: noted before each first run."""
    state = CPU_RANDOM_STATE if capture.random[k] and capture.place.type == "cpu" else 0
    if capture.place.type != "cpu":
        state += SAMPLES
    return state + storage_bytes(named_tensors(model, capture.changed[k]), capture.place)


def copied_buffers(capture: Capture, model: nn.Module) -> int:
    """Return bytes of the copies of changing buffers that a forward on CUDA holds, lest memory runs out."""
    if capture.place.type != "cuda":
        return 0
    changed = {name for names in capture.changed for name in names}
    return storage_bytes((b for name, b in model.named_buffers() if name in changed), capture.place)


def resident_parts(model: nn.Module, call: Any, device: Device) -> dict[str, int]:
    """Return bytes of parameters, existing gradients, buffers, tensors in ``call``, cuBLAS's workspaces."""
    made = [t for m in model.modules() if makes_weights(m) for t in vars(m).values() if isinstance(t, Tensor)]
    given = [t for t in tree_leaves(call) if isinstance(t, Tensor)]
    return {
        "parameters": storage_bytes(model.parameters(), device),
        "existing gradients": storage_bytes(
            (p.grad for p in model.parameters() if p.grad is not None), device
        ),
        "buffers": storage_bytes((*model.buffers(), *made), device),
        "inputs": storage_bytes(given, device) + sum(map(unused_room, given)),
        "workspaces": workspace_bytes(device),
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer | None, device: Device) -> int:
    """Return bytes of the optimizer's state: as it is, or as its first step will make it.

    A state that is still empty is found by one step of a copy of the optimizer on fake tensors: exact, and
    without memory.

    Raises:
        ValueError: the optimizer's step does not run on fake tensors and its state is empty.
    """
    if optimizer is None:
        return 0
    if optimizer.state:
        return storage_bytes(
            (leaf for leaf in pytree.tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)), device
        )
    try:
        states = _stepped(optimizer, device)[0].state.values()
    except Exception as error:  # whatever a third-party optimizer does on fake tensors
        raise ValueError(
            f"solve: the state of {type(optimizer).__name__} is still empty and its size cannot be found by a "
            f"trial step on fake tensors ({error}); call optimizer.step() once before solve()"
        ) from error
    total = 0
    for leaf in pytree.tree_leaves(list(states)):
        if not isinstance(leaf, Tensor) or not lies_on(leaf, device):
            continue
        # Optimizers keep their counts of steps, of no dimension, on the host.
        if not (isinstance(device, Target) and device.type != "cpu" and not leaf.ndim):
            total += allocated(held_bytes(leaf), device)
    return total


def optimizer_step_bytes(optimizer: torch.optim.Optimizer | None, device: Device) -> int | None:
    """Return the most bytes that the optimizer's step takes above its state and gradients; None if unknown.

    By a step of a copy on fake tensors, the second one, when its state exists; on CUDA over all parameters
    at once, unless the optimizer is told otherwise.
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
    """Return what torch takes for a group's ``foreach`` where nobody has said it; nothing if somebody has.

    On CUDA a step goes over all parameters at once then, and has a temporary of each. torch decides by the
    parameters' type, and fake ones are of none that it knows.
    """
    if group.get("foreach", False) is not None or group.get("fused") is not None:
        return {}
    if isinstance(device, Target):
        foreach = device.type == "cuda" and not group.get("differentiable", False)
    else:
        parameters = [local(p) for p in group["params"]]
        foreach = default_foreach(parameters, group.get("differentiable", False))
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
    groups = []
    for group in optimizer.param_groups:
        parameters = []
        for whole in group["params"]:
            parameter, trained = local(whole), whole.requires_grad
            with fake:
                place = "cpu" if isinstance(device, Target) else parameter.device
                like = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device=place
                )
            double = nn.Parameter(like, requires_grad=trained)
            if trained:
                with fake:
                    double.grad = torch.empty_like(double)
            parameters.append(double)
        groups.append({**group, **_foreach(group, device), "params": parameters})
    stand_in.param_groups = groups
    with fake, torch.no_grad():
        type(optimizer).step(stand_in)
    return stand_in, fake
