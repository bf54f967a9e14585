"""Estimate the seconds of a stage from its FLOPs and the bytes that it moves.

Williams, Waterman, Patterson 2009 (doi:10.1145/1498765.1498785): an op takes the longer of its arithmetic at
the device's peak rate and its memory traffic at the device's bandwidth. Both rates are measured once per
process, by a matrix product and a copy. Two more are measured: seconds for each element of ops that compute
much with it (a tanh, a random number), and for bytes that are mapped again, page by page, at each allocation.
The rates of a described device are its description's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import flop_registry

from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.costs.meters.clock import Spans
from rematplan.scheduler.costs.stage_run import StageCost, StageRun, as_leaf, seed_gradients
from rematplan.scheduler.costs.unreversed import unread_results
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.private import FakeTensorMode, TorchDispatchMode, pytree, storage_id
from rematplan.scheduler.torch_layer.target import Device, Target

__all__ = ["Rates", "Tally", "device_rates", "estimate_run", "roofline_graph"]

# Bytes from which on glibc's malloc never keeps what is freed (M_MMAP_THRESHOLD grows no further).
MAPPED = 2**25


@dataclass(slots=True)
class Rates:
    """The speed of a device.

    Attributes:
        flops: floating-point operations per second.
        bandwidth: bytes per second.
        launch: seconds that any op takes at least.
        by_dtype: floating-point operations per second on numbers of a dtype, where they differ from
            ``flops``; others are added when they are asked for.
        element: op -> seconds that it takes for each element, if it computes much with one.
        fresh: seconds for each byte of a new storage of ``MAPPED`` bytes or more, above those to write it.
        measure: measures ``by_dtype`` for another dtype; None where it is ``flops``.
    """

    flops: float
    bandwidth: float
    launch: float
    by_dtype: dict[torch.dtype, float] = field(default_factory=dict)
    element: Mapping[Any, float] = field(default_factory=dict)
    fresh: float = 0.0
    measure: Callable[[torch.dtype], float] | None = None

    def flops_on(self, dtype: torch.dtype) -> float:
        """Return floating-point operations per second on numbers of that dtype."""
        if dtype not in self.by_dtype:
            self.by_dtype[dtype] = self.flops if self.measure is None else self.measure(dtype)
        return self.by_dtype[dtype]


def device_rates(device: Device) -> Rates:
    """Return the device's rates: by its description, or measured."""
    if isinstance(device, Target):
        spec = device.spec
        by_dtype = {getattr(torch, name): rate for name, rate in spec.flops.items()}
        return Rates(spec.rate("float32"), spec.bandwidth, spec.launch, by_dtype)
    return _measured_rates(device, torch.get_num_threads())


@functools.cache
def _measured_rates(device: torch.device, _threads: int) -> Rates:
    """Return the best of a few runs, with the threads that torch has now."""
    size = 1024 if device.type == "cpu" else 4096

    def product(dtype: torch.dtype, size: int = 256 if device.type == "cpu" else size) -> float:
        # Numbers that a CPU knows nothing of take a hundred times as long: a small product tells as much.
        try:
            with torch.autocast(device.type, enabled=False):
                a = torch.ones(size, size, device=device, dtype=dtype)
                return 2 * size**3 / _best(lambda: a @ a, device)
        except RuntimeError:  # nothing multiplies such numbers here
            return flops

    with torch.autocast(device.type, enabled=False):
        flops = product(torch.float32, size)
        small = torch.ones(1, device=device)
        launch = _best(lambda: small + 1, device)
        big, other = (torch.ones(2**24, device=device) for _ in range(2))
        copy = _best(lambda: other.copy_(big), device)  # beyond the caches, to pages that are mapped already
        fresh = max(0.0, _best(big.clone, device) - copy) / big.nbytes if device.type == "cpu" else 0.0
        element = _element_seconds(device)
    known = {torch.float32: flops}
    return Rates(flops, 2 * big.nbytes / copy, launch, known, element, fresh, product)


_aten = torch.ops.aten
_attend = _aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
# Ops that do much with each element, and how to run them on one of (8, 16, 256). All others move their bytes
# and no more: powers are special cases (squares, cubes), and the seconds of a selection are a matter of its
# mask.
_HEAVY: dict[Any, Callable[[Tensor], Any]] = {
    _aten.bernoulli_: lambda x: torch.empty_like(x).bernoulli_(0.9),
    _aten.native_dropout: lambda x: _aten.native_dropout(x, 0.1, True),
    _aten._softmax: lambda x: _aten._softmax(x, -1, False),
    _aten._log_softmax: lambda x: _aten._log_softmax(x, -1, False),
    _aten.native_layer_norm: lambda x: _aten.native_layer_norm(x, x.shape[-1:], None, None, 1e-5),
    _aten.native_batch_norm: lambda x: _aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5),
    _aten.native_group_norm: lambda x: _aten.native_group_norm(x, None, None, *x.shape, 4, 1e-5),
    _aten.max_pool2d_with_indices: lambda x: _aten.max_pool2d_with_indices(x.view(-1, 16, 16, 16), 3, 2, 1),
    _attend: lambda x: _attend(*[x.view(-1, 1, 128, 16)[:2]] * 3),  # as many scores as elements
} | {
    op: op
    for op in (
        *(_aten.bernoulli, _aten.cos, _aten.erf, _aten.exp, _aten.gelu, _aten.log),
        *(_aten.rsqrt, _aten.sigmoid, _aten.silu, _aten.sin, _aten.sqrt, _aten.tanh),
    )
}
# Ops that do about as much with each element as others.
_LIKE = {
    _aten.gelu_backward: _aten.gelu,
    _aten.silu_backward: _aten.silu,
    _aten.native_layer_norm_backward: _aten.native_layer_norm,
    _aten.native_batch_norm_backward: _aten.native_batch_norm,
    _aten.native_group_norm_backward: _aten.native_group_norm,
    _attend_backward: _attend,
}


def _element_seconds(device: torch.device) -> dict[Any, float]:
    """Return the seconds of the ops in ``_HEAVY`` and ``_LIKE``. The generator is left as it was."""
    # Off the CPU so many that starting the op does not count.
    batch = 8 if device.type == "cpu" else 4096
    found = {}
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        numbers = torch.rand(batch, 16, 256, device=device)
        for op, run in _HEAVY.items():
            if op is not _attend or device.type == "cpu":
                found[op] = _best(functools.partial(run, numbers), device) / numbers.numel()
    return found | {op: found[like] for op, like in _LIKE.items() if like in found}


def _elements(op: Any, args: Any, tensors: Sequence[Tensor]) -> int:
    """Count the elements of the largest tensor; of attention, its scores."""
    if op in (_attend, _attend_backward):
        query, key = args[:2] if op is _attend else args[1:3]
        return math.prod(query.shape[:-1]) * key.shape[-2]
    return max((t.numel() for t in tensors), default=0)


def _mapped(args: Any, result: Any) -> int:
    """Return bytes of the op's new storages that the system maps page by page."""
    old, new = (
        {
            storage_id(t.untyped_storage()): t.untyped_storage().nbytes()
            for t in pytree.tree_leaves(tree)
            if isinstance(t, Tensor)
        }
        for tree in (args, result)
    )
    return sum(size for key, size in new.items() if key not in old and size >= MAPPED)


def _best(run: Any, device: torch.device, repeats: int = 7) -> float:
    spans = Spans(device)
    for _ in range(repeats):
        with spans.span():
            run()
    return min(spans.seconds()[1:])


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
        op = func.overloadpacket
        count = _FLOPS.get(op)
        flops = count(*args, **kwargs, out_val=result) if count is not None else 0
        rate = self.rates.flops
        if flops:
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
            rate = self.rates.flops_on(dtype)
        fresh = self.rates.fresh * _mapped(args, result) if self.rates.fresh else 0.0
        each = self.rates.element.get(op, 0.0) * _elements(op, args, tensors)
        self.seconds += max(self.rates.launch, flops / rate + each, moved / self.rates.bandwidth + fresh)
        return result


def _attention(products: int, first: int) -> Any:
    """Return a counter of FLOPs: ``products`` like attention's scores; argument ``first`` is its query."""

    def count(*args: Any, **_: Any) -> int:
        query, key = args[first], args[first + 1]
        size: int = math.prod(query.shape) * key.shape[-2]
        return 2 * products * size

    return count


# torch counts nothing of a CPU's attention. Backward: the scores again, and four gradients.
_FLOPS = {**flop_registry, _attend: _attention(2, 0), _attend_backward: _attention(5, 1)}


def roofline_graph(
    capture: GraphCapture, costs: list[StageCost], loss_is_output: bool = True
) -> list[StageCost]:
    """Return ``costs`` with estimated seconds in place of measured ones; nothing is run on data."""
    rates = device_rates(capture.place)
    known: dict[tuple[str, frozenset[int], bool], tuple[float, float]] = {}
    nodes = {node.name: node for node in capture.graph.module.graph.nodes}
    result = []
    for k, (stage, cost) in enumerate(zip(capture.stages, costs, strict=True)):
        unread = unread_results(capture, k, loss_is_output)
        last = loss_is_output and k == len(capture) - 1
        key = stage.signature, unread, last
        if key not in known:
            known[key] = _estimate(capture, k, None if last else unread, nodes, rates)
        forward, backward = known[key]
        result.append(replace(cost, forward=forward, backward=backward))
    return result


def estimate_run(stage: StageRun, device: Device) -> tuple[float, float]:
    """Return seconds of the forward and the backward of a stage, by the ops of one run of each."""

    def root(outputs: Sequence[Tensor]) -> Tensor | None:
        return seed_gradients({i: t for i, t in enumerate(outputs) if i not in stage.unread}, {})[0]

    seconds = _tallied(lambda: stage.run(as_leaf), root, device_rates(device))
    stage.reset()
    return seconds


def _tallied(
    run: Callable[[], Sequence[Tensor]], root: Callable[[Sequence[Tensor]], Tensor | None], rates: Rates
) -> tuple[float, float]:
    """Return seconds of ``run()``, and of the backward from the ``root`` of its outputs."""
    forward, backward = Tally(rates), Tally(rates)
    with torch.enable_grad():
        with forward:
            outputs = run()
        seed = root(outputs)
    if seed is not None:
        with backward:
            seed.backward()
    return forward.seconds, backward.seconds


def _estimate(
    capture: GraphCapture, k: int, unread: frozenset[int] | None, nodes: dict[str, fx.Node], rates: Rates
) -> tuple[float, float]:
    """Return seconds of the forward and the backward of a stage, run on fake tensors.

    Args:
        unread: the results that get no gradient; None: the loss alone gets one, if the stage makes it.
    """
    stage = capture.stages[k]

    def root(results: Sequence[Tensor]) -> Tensor | None:
        if unread is None:
            with suppress(ValueError):  # an earlier stage makes it
                return find_loss(capture.own_output(stage, tuple(results)))[0]
        return seed_gradients({i: t for i, t in enumerate(results) if i not in (unread or ())}, {})[0]

    arguments: list[Any] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for source, name in zip(stage.sources, stage.argument_names, strict=True):
            value = nodes[name].meta.get("val")
            if isinstance(value, Tensor):
                dtype, device = value.dtype, value.device
                value = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device)
                value.requires_grad_(source.requires_grad)
                if source.kind == "parameter" and source.requires_grad:
                    value = nn.Parameter(value)
            arguments.append(value)
        return _tallied(lambda: stage.function(*arguments), root, rates)
