"""One plan for all ranks of a process group."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rematplan.executors.recapture import ENGINES
from rematplan.scheduler.core.errors import PlanMismatch
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.call import (
    canonical_call,
    forward_signature,
    model_fingerprint,
    read_sample,
    unplanned,
)

__all__ = ["broadcast_plan"]


def broadcast_plan(
    plan: Plan | None,
    model: nn.Module | None = None,
    *,
    sample: Any = None,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Plan:
    """Return the plan of rank ``src`` on every rank: ranks with different plans would wait for each other.

    Collective: every rank of the group calls it. The plan travels as JSON, which is read as data.

    Args:
        plan: on rank ``src`` the plan. Other ranks may pass one of their own, whose capture is used where
            it is the same.
        model: if given, each rank compares its model with the plan's, and all raise if one differs.
        sample: as for ``solve``, of this rank's batch. With ``model``, each rank's model is exported (nothing
            runs) and compared with the op graph of the plan: a difference would otherwise show at a rank's
            first forward, while the others wait in a collective.
        src: global rank that has the plan.
        group: default: the whole world.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: rank ``src`` has no plan; on every rank.
        PlanMismatch: some rank's model, or its op graph, is not the plan's; on every rank.

    Example:
        >>> plan = broadcast_plan(plan if rank == 0 else None, model)  # doctest: +SKIP
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "broadcast_plan: torch.distributed is not initialised; call torch.distributed.init_process_group() first, "
            "or use the plan as it is, if there is one process only"
        )
    device = _device(group)
    own = dist.get_rank() == src
    data = json.dumps(plan.to_json()).encode() if own and isinstance(plan, Plan) else b""
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, src, group=group)
    if not size.item():
        got = f"a {type(plan).__name__}" if own else "none"
        raise ValueError(
            f"broadcast_plan: rank {src} has to pass the Plan that all ranks shall use; it passed {got}"
        )
    content = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    if own:
        content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(content, src, group=group)
    if own and isinstance(plan, Plan):
        result = plan
    else:
        result = Plan.from_json(json.loads(content.cpu().numpy().tobytes()))
        if isinstance(plan, Plan) and plan.capture == result.capture:
            object.__setattr__(result, "live", plan.live)
    own_error: Exception | None = None
    try:
        verdict = _verdict(result, model, sample)
    except Exception as error:  # noqa: BLE001 # whatever a sample or the model's code raises: the others wait
        verdict, own_error = UNUSABLE, error
    _agree(verdict, own_error, device, group)
    return result


# What is wrong on a rank; 0 for nothing.
MODEL, GRAPH, UNUSABLE = 1, 2, 3
WRONG = {
    MODEL: "the model of rank {} is not the one the plan was made for: class, or names, shapes, dtypes, requires_grad or "
    "sharding of parameters or buffers differ; build the same model on every rank",
    GRAPH: "the op graph of rank {} is not the plan's: the code of its model takes another way, its batch has another "
    "shape, or torch or autocast are others; make them alike, or solve(capture='modules')",
    UNUSABLE: "the model or the sample of rank {} cannot be compared with the plan's (that rank says why); pass a module, and what it "
    "is called with",
}


def _verdict(plan: Plan, model: nn.Module | None, sample: Any) -> int:
    """Return what is wrong with this rank's model for the plan."""
    if model is None:
        return 0
    plain = unplanned(model)
    if model_fingerprint(plain) != plan.capture.model:
        return MODEL
    if sample is None:
        return 0
    args, kwargs = read_sample(sample)
    call = canonical_call(forward_signature(plain), args, kwargs)
    return 0 if ENGINES[plan.capture.kind].alike(plan.capture, plain, call) else GRAPH


def _agree(
    verdict: int, own_error: Exception | None, device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """Raise PlanMismatch on every rank if something is wrong on one: what, and on which ranks."""
    own = torch.tensor([verdict], dtype=torch.uint8, device=device)
    verdicts: list[Tensor] = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(verdicts, own, group=group)
    found = list(zip(dist.get_process_group_ranks(group), map(int, verdicts), strict=True))
    for wrong, what in WRONG.items():
        ranks = [str(rank) for rank, each in found if each == wrong]
        if ranks:
            raise PlanMismatch(f"broadcast_plan: {what.format(', '.join(ranks))}") from own_error


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device from which the group's backend sends: the CPU if it can, for the plan is there."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
