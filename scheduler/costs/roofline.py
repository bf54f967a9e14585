"""Seconds of a stage estimated from its FLOPs and the bytes that it moves.

Williams, Waterman, Patterson 2009 (doi:10.1145/1498765.1498785): an op takes the longer of its arithmetic at
the device's peak rate and its memory traffic at the device's bandwidth. Both rates are measured once per
process by a matrix product and a copy; those of a device that is not there are its description's.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from scheduler.capture.graph_capture import GraphCapture
from scheduler.capture.target import Device, Target
from scheduler.costs.measure import StageCost, StageRun, _Seed, as_leaf
from scheduler.device import DeviceSpec

__all__ = ["Rates", "Tally", "device_rates", "estimate_run", "roofline_graph"]


class Rates:
    """What a device can do.

    Attributes:
        flops: floating-point operations per second.
        bandwidth: bytes per second.
        launch: seconds that any op takes at least.
        by_dtype: floating-point operations per second on numbers of a dtype, where they are not ``flops``.
    """

    __slots__ = ("bandwidth", "by_dtype", "flops", "launch")

    def __init__(
        self,
        flops: float,
        bandwidth: float,
        launch: float,
        by_dtype: Mapping[torch.dtype, float] | None = None,
    ) -> None:
        self.flops, self.bandwidth, self.launch = flops, bandwidth, launch
        self.by_dtype = dict(by_dtype or {})

    @classmethod
    def of(cls, spec: DeviceSpec) -> Rates:
        """Those of a description."""
        by_dtype = {getattr(torch, name): rate for name, rate in spec.flops.items()}
        return cls(spec.rate("float32"), spec.bandwidth, spec.launch, by_dtype)


def device_rates(device: Device, dtype: torch.dtype = torch.float32) -> Rates:
    """The device's rates: by its description, or measured."""
    return Rates.of(device.spec) if isinstance(device, Target) else _measured_rates(device, dtype)


@functools.cache
def _measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few runs."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device, dtype=dtype)
    small = torch.ones(1, device=device)
    product = _best(lambda: a @ a, device)
    big = torch.ones(2**24, device=device)
    copy = _best(big.clone, device)
    launch = _best(lambda: small + 1, device)
    return Rates(2 * size**3 / product, 2 * big.nbytes / copy, launch)


def _best(run: Any, device: torch.device, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


# Ops that move nothing.
_FREE = (
    "aten.detach.default",
    "aten._unsafe_view.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.empty_strided.default",
)


class Tally(TorchDispatchMode):
    """Adds up the estimated seconds of every op that is dispatched."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func.namespace == "prim" or str(func) in _FREE:
            return result
        tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        count = _FLOPS.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count is not None else 0
        rate = self.rates.flops
        if flops and self.rates.by_dtype:
            rate = self.rates.by_dtype.get(next(t.dtype for t in tensors if t.is_floating_point()), rate)
        self.seconds += max(self.rates.launch, flops / rate, moved / self.rates.bandwidth)
        return result


def _attention(products: int, first: int) -> Any:
    """FLOPs of attention of ``products`` products as large as the one of its scores; its query is argument ``first``."""

    def count(*args: Any, **_: Any) -> int:
        query, key = args[first], args[first + 1]
        size: int = math.prod(query.shape) * key.shape[-2]
        return 2 * products * size

    return count


# Of the attention that a CPU has, torch's own counts say nothing. Backward: the scores again, and four gradients.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention(2, 0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5, 1),
}


def roofline_graph(capture: GraphCapture, costs: list[StageCost]) -> list[StageCost]:
    """``costs`` with estimated seconds in place of measured ones; nothing is run on data."""
    rates = device_rates(capture.place)
    known: dict[str, tuple[float, float]] = {}
    nodes = {node.name: node for node in capture.graph.module.graph.nodes}
    result = []
    for k, stage in enumerate(capture.stages):
        if stage.signature not in known:
            known[stage.signature] = _estimate(capture, k, nodes, rates)
        forward, backward = known[stage.signature]
        result.append(replace(costs[k], forward=forward, backward=backward))
    return result


def estimate_run(stage: StageRun, device: Device) -> tuple[float, float]:
    """Seconds of the forward and the backward of a stage, by the ops of one run of each."""
    rates = device_rates(device)
    with torch.enable_grad():
        with Tally(rates) as forward:
            outputs = stage.run(as_leaf)
        grad = [t for t in outputs if t.requires_grad]
        seed = _Seed.apply(*grad) if grad else None
    backward = Tally(rates)
    if seed is not None:
        with backward:
            seed.backward()
    stage.reset()
    return forward.seconds, backward.seconds


def _estimate(capture: GraphCapture, k: int, nodes: dict[str, fx.Node], rates: Rates) -> tuple[float, float]:
    """Seconds of the forward and the backward of a stage, run on fake tensors."""
    stage = capture.stages[k]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    arguments: list[Any] = []
    with fake:
        for source, name in zip(stage.sources, stage.argument_names, strict=True):
            value = nodes[name].meta.get("val")
            if isinstance(value, Tensor):
                double = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
                double.requires_grad_(source.requires_grad)
                value = (
                    nn.Parameter(double) if source.kind == "parameter" and source.requires_grad else double
                )
            arguments.append(value)
        forward = Tally(rates)
        with forward, torch.enable_grad():
            results = stage.function(*arguments)
        backward = Tally(rates)
        grad = [t for t in results if t.requires_grad]
        if grad:
            with torch.enable_grad():
                seed = _Seed.apply(*grad)
            with backward:
                seed.backward()
    return forward.seconds, backward.seconds
