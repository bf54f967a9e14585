"""Make the chain of a captured op graph: seconds and bytes of every stage.

Sizes of boundaries, saved tensors, carried values and gradients are exact sums over storages, known from the
graph alone. Transients and seconds are measured, once per distinct stage.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.graph.compiled import CompiledCapture, Variant
from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.capture.graph.recompute import packs_of
from rematplan.scheduler.core.chain import Carried, Chain
from rematplan.scheduler.costs.assemble import StageFacts, Values, assemble, parameter_grads
from rematplan.scheduler.costs.compiled_stages import measure_variants
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.option_costs import measure_options
from rematplan.scheduler.costs.resident import rerun_state, storage_bytes
from rematplan.scheduler.costs.roofline import estimate_run
from rematplan.scheduler.costs.stage_run import (
    Enter,
    OptionCost,
    StageCost,
    StageRun,
    cached_casts,
    fresh_grads,
    measure_stage,
)
from rematplan.scheduler.costs.unreversed import (
    held_by_user,
    held_results,
    unread_results,
    unreversed,
    unreversed_bytes,
)
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.layouts import storage_keys
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import uncached

__all__ = ["graph_chain", "kept_storages", "measure_graph"]

# The costs of a model's stages, by their ops: another budget for the same model finds the same options, so
# that the smallest budget that an error names can be met.
_MEASURED: WeakKeyDictionary[nn.Module, dict[str, StageCost]] = WeakKeyDictionary()


def measure_graph(
    capture: GraphCapture,
    model: nn.Module,
    call: Call,
    *,
    existing: Collection[nn.Parameter] = (),
    loss_is_output: bool = True,
    clock: bool = True,
    options: bool = True,
) -> list[StageCost]:
    """Measure every distinct stage once; equal stages, and later captures of the model, share the figures.

    The caller preserves the model's state (gradients, buffers, random numbers).

    Args:
        existing: parameters that have a gradient before the step.
        loss_is_output: the model returns its own scalar loss; else its outputs themselves get gradients.
        options: whether to look for options of stages that keep less than all.
    """
    # The shares of a tied parameter's gradient wait for one another, whether or not one exists.
    tied = {p for p, stages in _readers(capture, model).items() if len(stages) > 1}
    added = set(existing) - tied
    costs = _MEASURED.setdefault(model, {})
    kinds = ("cpu", capture.device.type)
    autocast = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds]
    surroundings = (autocast, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    measured: list[StageCost] = []
    last = len(capture) - 1
    waiting = unreversed(capture, loss_is_output)

    def visit(k: int, arguments: list[Any]) -> None:
        stage = capture.stages[k]
        adding = [i for i, a in enumerate(arguments) if isinstance(a, nn.Parameter) and a in added]
        layouts, _ = capture.result_layouts(k)
        unread = unread_results(capture, k, loss_is_output)
        held = held_results(capture, k, waiting)
        split = options and not capture.effects[k].once
        how = [clock, split, capture.uncached, *surroundings, sorted(stage.carried_from), k == last, adding]
        how += [sorted(unread), sorted(held), sorted(layouts.items())]
        key = f"{capture.kind}|{capture.place}|{how}|{stage.signature}"
        if key not in costs:
            isolated = functools.partial(_isolated, capture, k, arguments, added, unread, layouts, held)
            if isinstance(capture, CompiledCapture):
                cost = measure_variants(capture, k, isolated, split=options)
            else:
                run = isolated(stage.function)
                cost = measure_stage(run, capture.place, clock=clock)
                if capture.target is not None:
                    forward, backward = estimate_run(run, capture.place)
                    cost = replace(cost, forward=forward, backward=backward)
                if split:
                    found, gap = measure_options(capture, k, run, arguments, clock=clock)
                    cost = replace(cost, options=found, gap=gap)
            if not capture.uncached:
                cost = replace(cost, cached=cached_casts(lambda: stage.function(*arguments), capture.place))
            costs[key] = cost
            model.zero_grad(set_to_none=True)
        measured.append(costs[key])

    with torch.no_grad():
        capture.sweep(model, call, visit)
    if isinstance(capture, CompiledCapture):
        capture.chosen = [cost.variants for cost in measured]
    capture.dropped = [(frozenset(), *(option.dropped for option in cost.options)) for cost in measured]
    capture.gaps = [cost.gap for cost in measured]
    capture.rerun = [((), *(option.rerun for option in cost.options)) for cost in measured]
    return measured


def kept_storages(
    capture: GraphCapture, k: int, dropped: frozenset[int], variant: Variant | None = None
) -> set[int]:
    """Return the storages kept for the backward of stage k; with the boundary if not all are.

    Args:
        variant: of a compiled stage; its private storages are not among them.
    """
    linear, groups = capture.linear, capture.graph.groups
    if variant is not None:
        assert isinstance(capture, CompiledCapture)
        kept = capture.storages(k, variant.arguments, variant.results)
    else:
        kept = _kept_packs(capture, k, dropped).union(linear.boundaries[k] if dropped else ())
    elsewhere = {key for keys in linear.carried for key in keys} - set(linear.carried[k])
    return {key for key in kept - elsewhere if groups[key].producer >= 0}


def _kept_packs(capture: GraphCapture, k: int, dropped: frozenset[int]) -> set[int]:
    packs = packs_of(capture.graph, capture.linear, k)
    return {pack.group for number, pack in enumerate(packs) if number not in dropped}


def _isolated(
    capture: GraphCapture,
    k: int,
    arguments: list[Any],
    existing: Collection[nn.Parameter],
    unread: frozenset[int],
    layouts: Mapping[int, tuple[int, ...]],
    held: frozenset[int],
    function: Callable[..., tuple[Tensor, ...]],
) -> StageRun:
    stage = capture.stages[k]

    def run(enter: Enter) -> tuple[Tensor, ...]:
        fresh = [
            enter(i, a) if source.requires_grad and source.kind in ("boundary", "carried", "input") else a
            for i, (a, source) in enumerate(zip(arguments, stage.sources, strict=True))
        ]
        torch.clear_autocast_cache()
        try:
            with uncached() if capture.uncached else nullcontext():
                return function(*fresh)
        finally:  # a run may be stopped half-way
            torch.clear_autocast_cache()

    def loss(results: Any) -> Tensor | None:
        with suppress(ValueError):  # an earlier stage makes it
            return find_loss(capture.own_output(stage, results))[0]
        return None

    outside = (a for a, source in zip(arguments, stage.sources, strict=True) if source.kind != "boundary")
    lasting = storage_keys(a for a in outside if isinstance(a, Tensor))
    reset = fresh_grads((a for a in arguments if isinstance(a, nn.Parameter)), existing)
    return StageRun(run, reset, loss if k == len(capture) - 1 else None, lasting, unread, layouts, held)


def graph_chain(
    capture: GraphCapture,
    model: nn.Module,
    costs: list[StageCost],
    *,
    resident: int,
    loss_is_output: bool,
    sparse: Mapping[nn.Parameter, int] = MappingProxyType({}),
) -> Chain:
    """Return the chain of a captured graph.

    Args:
        costs: (L,) from ``measure_graph``.
        resident: bytes live during the whole step: parameters, buffers, optimizer state, inputs.
        loss_is_output: the model returns its own scalar loss; else its outputs themselves get gradients.
        sparse: bytes of gradients that are sparse.
    """
    graph, linear = capture.graph, capture.linear
    count = len(linear)
    size = {key: allocated(group.bytes, capture.place) for key, group in graph.groups.items()}
    values = _GraphValues(graph, size)
    flows = _GradFlows(capture, costs, size)
    saved_by = [capture.saves(k) for k in range(count)]
    waiting = unreversed(capture, loss_is_output)
    stays = [unreversed_bytes(capture, k, waiting, values.stored) for k in range(count)]
    freed = _freed(capture, saved_by, {k for k, amount in enumerate(stays) if amount})
    change, output_grad = _gradient_changes(flows, loss_is_output)
    existing = {p for p in model.parameters() if p.grad is not None}
    read_by = _readers(capture, model)
    created, summed = parameter_grads(read_by, existing, change, capture.place, sparse=sparse)
    going = Counter[int]()
    for key, k in freed.items():
        going[k] += size[key]
    facts = []
    for k, stage in enumerate(capture.stages):
        cost, last = costs[k], k == count - 1
        prefix = k == 0 and linear.frozen_prefix
        options = []
        for each in (cost.whole, *cost.options):
            kept = kept_storages(capture, k, each.dropped, each.variant)
            keeps = [values.number(key) for key in sorted(kept, key=values.order.__getitem__)]
            keeps += [values.new(allocated(size, capture.place)) for size in each.private]
            # The loss that stood in keeps the last stage's outputs.
            if (not last or loss_is_output) and (unseen := _unseen(capture, k, each, values)):
                keeps.append(values.new(unseen))
            options.append((tuple(keeps), each))
        facts.append(
            StageFacts(
                name=stage.name,
                forward=cost.forward,
                backward=0.0 if prefix else cost.backward,
                enters=tuple(values.number(key) for key in linear.boundaries[k] if values.is_made(key)),
                options=options,
                handed_out=values.stored(linear.carried[k]) if last else 0,
                dropping_peak=cost.dropping_peak,
                boundary_grad=flows.boundary(k),
                lead=cost.lead,
                arriving=output_grad if last else _arriving(flows, k, cost, loss_is_output),
                created=created[k],
                appearing=created[k] + max(0, change[k] - going[k]),
                change=change[k],
                beside=summed[k],
                stays=stays[k],
                recomputable=not prefix and not capture.effects[k].once,
                rerun_state=rerun_state(capture, model, k),
            )
        )
    for made, keys in enumerate(linear.carried):
        for key in keys:
            readers = linear.readers[key]
            savers = tuple(k for k in readers if key in saved_by[k])
            values.carried.append(Carried(values.number(key), made, readers, savers, freed.get(key)))
    for k, amount in enumerate(_casts(capture, costs)):
        if amount:  # until the forward is over
            values.carried.append(Carried(values.new(amount), k, freed=count - 1))
    state = [places[0].get() for places in graph.face.state if places]
    held = storage_bytes([*capture.constants.values(), *state], capture.place)
    return assemble(facts, values, capture, model, resident=resident, held=held, output_grad=output_grad)


class _GraphValues(Values):
    """The storages of a graph as values.

    Attributes:
        order: storage -> its place in the graph.
    """

    def __init__(self, graph: OpGraph, size: Mapping[int, int]) -> None:
        super().__init__()
        self.order = {key: place for place, key in enumerate(graph.groups)}
        self._graph, self._size = graph, size
        self._numbers: dict[int, int] = {}

    def number(self, key: int) -> int:
        """Return the number of a storage."""
        if key not in self._numbers:
            self._numbers[key] = self.new(self._size[key])
        return self._numbers[key]

    def is_made(self, key: int) -> bool:
        """Whether an op makes the storage: it is no input, parameter or buffer."""
        return self._graph.groups[key].producer >= 0

    def stored(self, keys: Iterable[int]) -> int:
        """Return the bytes of those of different storages that ops make."""
        return sum(self._size[key] for key in set(keys) if self.is_made(key))


class _GradFlows:
    """Counts the bytes that hold the gradients of boundary and carried values while they wait.

    The gradient that a stage leaves of a value may be a view of a larger one (of a concatenation), which it
    keeps live whole, until a second reader's share is added, which makes a tensor of its own.
    """

    def __init__(self, capture: GraphCapture, costs: list[StageCost], size: dict[int, int]) -> None:
        self.capture, self.size = capture, size
        graph, self.carried = capture.graph, {key for keys in capture.linear.carried for key in keys}
        self.nodes = {node.name: node for node in graph.group_of}
        # left[k][value] = {(k, storage): bytes} that stage k's backward leaves as the value's gradient
        self.left: list[dict[int, dict[tuple[int, int], int]]] = []
        for k, (stage, cost) in enumerate(zip(capture.stages, costs, strict=True)):
            left: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
            for position, storage, held in cost.input_grads:
                for key in graph.group_of[self.nodes[stage.argument_names[position]]]:
                    left[key][k, storage] = held
            self.left.append(left)

    def _held(self, key: int, stage: int) -> dict[tuple[int, int], int]:
        """Return storages of the gradient of a value once ``stage`` and all after it are reversed."""
        readers = [k for k in range(stage, len(self.left)) if key in self.left[k]]
        if len(readers) == 1:
            return self.left[readers[0]][key]
        return {(-1, key): self.size[key]} if readers else {}

    def _elsewhere(self, stage: int) -> set[tuple[int, int]]:
        """Return the storages of carried values' gradients once ``stage`` and all after it are reversed."""
        left = {key for left in self.left[stage:] for key in left}
        return {storage for key in left & self.carried for storage in self._held(key, stage)}

    def boundary(self, stage: int) -> int:
        """Return bytes of the gradient of boundary ``stage``, storages of carried gradients left out."""
        held: dict[tuple[int, int], int] = {}
        for key in self.capture.linear.boundaries[stage]:
            held |= self._held(key, stage)
        return sum(held[storage] for storage in held.keys() - self._elsewhere(stage))

    def inputs(self) -> dict[int, list[int]]:
        """Return inputs of the model that get gradients -> the stages that these come from, ascending."""
        found: dict[int, list[int]] = defaultdict(list)
        for k, left in enumerate(self.left):
            for key in left:
                if self.capture.graph.groups[key].producer < 0:
                    found[key].append(k)
        return found

    def carried_bytes(self, key: int, stage: int) -> int:
        """Return bytes of a carried value's gradient once ``stage`` and all after it are reversed."""
        return sum(self._held(key, stage).values())


def _unseen(capture: GraphCapture, k: int, cost: OptionCost, values: _GraphValues) -> int:
    """Return bytes that autograd saves of real tensors alone: kernels are chosen by their data type."""
    kept, first = kept_storages(capture, k, cost.dropped, cost.variant), capture.linear.cuts[k]
    own = (key for key in kept if capture.graph.groups[key].producer >= first)
    private = sum(allocated(size, capture.place) for size in cost.private)
    return max(0, cost.kept - values.stored(own) - private)


def _arriving(flows: _GradFlows, k: int, cost: StageCost, loss_is_output: bool) -> int:
    """Return bytes of arriving gradients that are counted elsewhere, as far as isolation counted them.

    Two results may be one storage, whose gradients have become one; a gradient may be a part of one that
    lasts. Those of the boundary and of carried values are two sums: where one exceeds that in isolation, the
    other is no smaller.
    """
    capture, size = flows.capture, flows.size
    graph, linear, stage = capture.graph, capture.linear, capture.stages[k]
    outputs = set() if loss_is_output else held_by_user(graph)
    counted = 0
    for key in linear.carried[k]:
        if graph.groups[key].requires_grad:
            live = flows.carried_bytes(key, linear.readers[key][0]) if linear.readers[key] else 0
            counted += max(live, size[key] if key in outputs else 0)
    unread = unread_results(capture, k, loss_is_output)
    results = zip(stage.boundary, stage.boundary_from, strict=True)
    read = {flows.nodes[name] for name, i in results if i >= 0 and i not in unread}
    layouts = (graph.layout_of[node] for node in read if graph.grad_of[node])
    passed_on = sum(math.prod(each.shape) * each.dtype.itemsize for each in layouts)
    stood = min(cost.output_grads, passed_on)
    return min(stood, flows.boundary(k + 1)) + min(cost.output_grads - stood, counted)


def _casts(capture: GraphCapture, costs: Sequence[StageCost]) -> list[int]:
    """Return (L,) bytes of casts that each stage adds to autocast's cache, beside earlier stages'."""
    met: set[tuple[str, Any]] = set()
    sizes = []
    for stage, cost in zip(capture.stages, costs, strict=True):
        leaves = {
            (s.kind, s.key) for s in stage.sources if s.requires_grad and s.kind in ("parameter", "input")
        }
        sizes.append(cost.cached if leaves - met else 0)
        met |= leaves
    return sizes


def _freed(capture: GraphCapture, saved_by: list[set[int]], waiting: Collection[int]) -> dict[int, int]:
    """Return the stage whose backward releases each carried value: its earliest reader, or its producer.

    An output is not among them, for the user holds it, nor what stages read that are not reversed whole
    (``waiting``).
    """
    linear, outputs = capture.linear, held_by_user(capture.graph)
    return {
        key: made if key in saved_by[made] else linear.readers[key][0]
        for made, keys in enumerate(linear.carried)
        for key in keys
        if key not in outputs and not {made, *linear.readers[key]}.intersection(waiting)
    }


def _gradient_changes(flows: _GradFlows, loss_is_output: bool) -> tuple[list[int], int]:
    """Return (L,) by how much each backward changes gradients of carried values and inputs; output_grad.

    The gradient of a carried value appears with its latest reader and is released with its producer.
    """
    graph, linear, size = flows.capture.graph, flows.capture.linear, flows.size
    count = len(linear)
    change = [0] * count
    # Outputs without a loss among them get gradients themselves.
    outputs = set() if loss_is_output else held_by_user(graph)
    groups = graph.groups
    made = (key for key in outputs if groups[key].requires_grad and groups[key].producer >= 0)
    output_grad = 4 if loss_is_output else sum(size[key] for key in made)

    def arrive(key: int, stages: Sequence[int], live: int = 0) -> int:
        for k in reversed(stages):
            now = max(live, flows.carried_bytes(key, k))
            change[k] += now - live
            live = now
        return live

    for producer, keys in enumerate(linear.carried):
        for key in keys:
            if groups[key].requires_grad:
                live = size[key] if key in outputs and producer < count - 1 else 0
                change[count - 1] += live
                change[producer] -= arrive(key, linear.readers[key], live)
    for key, stages in flows.inputs().items():  # it stays, or waits for the input's own backward
        arrive(key, stages)
    return change, output_grad


def _readers(capture: GraphCapture, model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """Return the stages that read each parameter, ascending."""
    readers: dict[nn.Parameter, list[int]] = defaultdict(list)
    for k, stage in enumerate(capture.stages):
        names = [source.key for source in stage.sources if source.kind == "parameter"]
        for parameter in dict.fromkeys(map(model.get_parameter, names)):
            readers[parameter].append(k)
    return readers
