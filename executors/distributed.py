"""One plan for all ranks of a process group."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scheduler.capture.graph_capture import op_graphs
from scheduler.capture.sample import (
    canonical_call,
    forward_signature,
    model_fingerprint,
    read_sample,
    unplanned,
)
from scheduler.capture.state import preserved
from scheduler.errors import CaptureError, PlanMismatch
from scheduler.plan import Plan

__all__ = ["broadcast_plan"]


def broadcast_plan(
    plan: Plan | None,
    model: nn.Module | None = None,
    *,
    sample: Any = None,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Plan:
    """The plan of rank ``src``, on every rank: ranks that trained by different plans would wait for each other.

    A collective call: every rank of the group makes it. The plan travels as JSON, which is read as data.

    Args:
        plan: on rank ``src`` the plan; what other ranks pass is not used, except that the capture of a plan of
            their own that was captured alike saves a second one.
        model: if given, each rank compares its model with the plan's, and all raise if one differs.
        sample: as for ``solve``, of this rank's batch. If given with ``model``, a plan of an op graph is compared with that of each
            rank's model, which is exported for it (nothing is run): what would otherwise show at a rank's first forward, while
            the others wait for it in a collective.
        src: global rank that has the plan.
        group: default: the whole world.

    Returns:
        the same plan on all ranks.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: rank ``src`` has no plan; raised on every rank.
        PlanMismatch: some rank's model, or its op graph, is not the one the plan was made for; raised on every rank.
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
    if own:
        assert isinstance(plan, Plan)
        result = plan
    else:
        result = Plan.from_json(json.loads(content.cpu().numpy().tobytes()))
        if isinstance(plan, Plan) and plan.capture == result.capture:
            object.__setattr__(result, "live", plan.live)
    if model is not None:
        plain = unplanned(model)
        _agree(
            model_fingerprint(plain) == result.capture.model,
            "the model of rank {} is not the one the plan was made for: class, or names, shapes, dtypes, requires_grad or "
            "sharding of parameters or buffers differ; build the same model on every rank",
            device,
            group,
        )
        if sample is not None and result.capture.kind == "graph":
            _agree(
                _has_graph(plain, sample, result.capture.graph),
                "the op graph of rank {} is not the plan's: the code of its model takes another way, its batch has another "
                "shape, or torch or autocast are others; make them alike, or solve(capture='modules')",
                device,
                group,
            )
    return result


def _has_graph(model: nn.Module, sample: Any, fingerprint: str) -> bool:
    """Whether the model exports as that graph."""
    args, kwargs = read_sample(sample)
    call = canonical_call(forward_signature(model), args, kwargs)
    with preserved(model):
        try:
            return any(graph.fingerprint() == fingerprint for graph in op_graphs(model, call))
        except CaptureError:
            return False


def _agree(alike: bool, what: str, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Refuse on every rank, if something is not alike on one.

    Raises:
        PlanMismatch: ``what``, with the ranks.
    """
    same = torch.tensor([alike], dtype=torch.uint8, device=device)
    verdicts: list[Tensor] = [torch.empty_like(same) for _ in range(dist.get_world_size(group))]
    dist.all_gather(verdicts, same, group=group)
    members = dist.get_process_group_ranks(group)
    others = [rank for rank, verdict in zip(members, verdicts, strict=True) if not verdict.item()]
    if others:
        raise PlanMismatch(f"broadcast_plan: {what.format(', '.join(map(str, others)))}")


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must lie that the group's backend sends: the CPU if it can, for the plan is there."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
