"""Captured op graph -> chain: seconds and bytes of every stage.

Sizes of boundaries, saved tensors, carried values and gradients are exact sums over storages, known from
the graph alone. Transients and seconds are measured, once per distinct stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from scheduler.capture.graph_capture import GraphCapture
from scheduler.capture.layouts import storage_keys
from scheduler.capture.loss import find_loss
from scheduler.capture.recompute import packs_of
from scheduler.capture.sample import Call
from scheduler.capture.state import CPU_RANDOM_STATE, uncached
from scheduler.chain import Carried, Chain, Option, Stage
from scheduler.costs.gradients import GradFlows, gradients_at_hand, parameter_grads
from scheduler.costs.measure import (
    Enter,
    OptionCost,
    StageCost,
    StageRun,
    cached_casts,
    fresh_grads,
    measure_stage,
)
from scheduler.costs.options import measure_options
from scheduler.costs.peak import allocated
from scheduler.costs.resident import copied_buffers, rerun_state, storage_bytes
from scheduler.costs.roofline import estimate_run
from scheduler.costs.unreversed import (
    held_by_user,
    held_results,
    unread_results,
    unreversed,
    unreversed_bytes,
)

__all__ = ["graph_chain", "kept_storages", "measure_graph"]

# What the stages of a model cost, by what they run: another budget for the same model meets the same options, so that
# the smallest budget that an error names can be met.
_MEASURED: WeakKeyDictionary[nn.Module, dict[str, StageCost]] = WeakKeyDictionary()
SMALL_TENSORS = 4096  # bytes: zero-dimensional tensors of scalars, which belong to no value of the graph


def measure_graph(
    capture: GraphCapture,
    model: nn.Module,
    call: Call,
    *,
    existing: Collection[nn.Parameter] = (),
    loss_is_output: bool = True,
    clock: bool = True,
    options: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[StageCost]:
    """Measure every distinct stage once; equal stages share the figures, and so do later captures of the model.

    The caller preserves the model's state (gradients, buffers, random numbers).

    Args:
        existing: parameters that have a gradient before the step.
        loss_is_output: the model returns its own scalar loss; else its outputs themselves get gradients.
        options: whether to look for options of stages that keep less than all.
        progress: called with (stages done, stages).
    """
    # The shares of a tied parameter's gradient wait for one another, whatever there is already.
    tied = {p for p, stages in _readers(capture, model).items() if len(stages) > 1}
    added = set(existing) - tied
    costs = _MEASURED.setdefault(model, {})
    kinds = ("cpu", capture.device.type)
    autocast = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds]
    surroundings = (autocast, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    keys: dict[int, str] = {}
    last = len(capture) - 1
    waiting = unreversed(capture) if loss_is_output else set()

    def visit(k: int, arguments: list[Any]) -> None:
        stage = capture.stages[k]
        adding = [i for i, a in enumerate(arguments) if isinstance(a, nn.Parameter) and a in added]
        layouts, _ = capture.result_layouts(k)
        unread = unread_results(capture, k, loss_is_output)
        carried = sorted(stage.carried_from)
        held = held_results(capture, k, waiting)
        how = (
            clock,
            options and not capture.once[k],
            capture.uncached,
            *surroundings,
            carried,
            k == last,
            adding,
            sorted(unread),
            sorted(held),
            sorted(layouts.items()),
        )
        key = keys[k] = f"{capture.place}|{how}|{stage.signature}"
        if key not in costs:
            run = _isolated(capture, k, arguments, added, unread, layouts, held)
            cost = measure_stage(run, capture.place, clock=clock)
            if capture.target is not None:
                forward, backward = estimate_run(run, capture.place)
                cost = replace(cost, forward=forward, backward=backward)
            if options and not capture.once[k]:
                found, gap = measure_options(capture, k, run, arguments, clock=clock)
                cost = replace(cost, options=found, gap=gap)
            if not capture.uncached:
                cost = replace(cost, cached=cached_casts(lambda: stage.function(*arguments), capture.place))
            costs[key] = cost
            model.zero_grad(set_to_none=True)
        progress(k + 1, len(capture))

    with torch.no_grad():
        capture.sweep(model, call, visit)
    measured = [costs[keys[k]] for k in range(len(capture))]
    capture.dropped = [(frozenset(), *(option.dropped for option in cost.options)) for cost in measured]
    capture.gaps = [cost.gap for cost in measured]
    capture.rerun = [((), *(option.rerun for option in cost.options)) for cost in measured]
    return measured


def kept_storages(capture: GraphCapture, k: int, dropped: frozenset[int]) -> set[int]:
    """The storages that stay for the backward of stage k; the executor holds the boundary of one kept in part."""
    graph, linear = capture.graph, capture.linear
    kept = {pack.group for number, pack in enumerate(packs_of(graph, linear, k)) if number not in dropped}
    kept |= set(linear.boundaries[k]) if dropped else set()
    elsewhere = {key for keys in linear.carried for key in keys} - set(linear.carried[k])
    return {key for key in kept - elsewhere if graph.groups[key].producer >= 0}


def _isolated(
    capture: GraphCapture,
    k: int,
    arguments: list[Any],
    existing: Collection[nn.Parameter],
    unread: frozenset[int],
    layouts: Mapping[int, tuple[int, ...]],
    held: frozenset[int],
) -> StageRun:
    stage = capture.stages[k]
    parameters = [a for a in arguments if isinstance(a, nn.Parameter)]

    def run(enter: Enter) -> tuple[Tensor, ...]:
        fresh = [
            enter(i, a) if source.requires_grad and source.kind in ("boundary", "carried", "input") else a
            for i, (a, source) in enumerate(zip(arguments, stage.sources, strict=True))
        ]
        torch.clear_autocast_cache()
        try:
            with uncached() if capture.uncached else nullcontext():
                return stage.function(*fresh)
        finally:  # a run may be stopped half-way
            torch.clear_autocast_cache()

    def loss(results: Any) -> Tensor | None:
        try:
            return find_loss(capture.own_output(stage, results))[0]
        except ValueError:  # the loss is made by an earlier stage
            return None

    lasting = storage_keys(
        argument
        for argument, source in zip(arguments, stage.sources, strict=True)
        if source.kind != "boundary" and isinstance(argument, Tensor)
    )
    reset = fresh_grads(parameters, existing)
    of_loss = loss if k == len(capture) - 1 else None
    return StageRun(run, reset, of_loss, lasting, unread, layouts, held)


def graph_chain(
    capture: GraphCapture,
    model: nn.Module,
    costs: list[StageCost],
    *,
    resident: int,
    loss_is_output: bool,
    name: str = "model",
    sparse: Mapping[nn.Parameter, int] = MappingProxyType({}),
) -> Chain:
    """The chain of a captured graph.

    Args:
        costs: (L,) from ``measure_graph``.
        resident: bytes live during the whole step: parameters, buffers, optimizer state, inputs.
        loss_is_output: the model returns its own scalar loss; else its outputs themselves get gradients.
        sparse: bytes of gradients that are sparse.
    """
    graph, linear = capture.graph, capture.linear
    count = len(linear)
    size = {key: allocated(group.bytes, capture.place) for key, group in graph.groups.items()}

    def total(keys: Iterable[int]) -> int:
        return sum(size[key] for key in set(keys) if graph.groups[key].producer >= 0)

    carried_keys = {key for keys in linear.carried for key in keys}
    saved_by = [
        {key for op in graph.ops[linear.cuts[k] : linear.cuts[k + 1]] for key in op.saved}
        for k in range(count)
    ]

    values = _Values(size)
    order = {key: place for place, key in enumerate(graph.groups)}

    def saved_bytes(k: int, kept: set[int]) -> int:
        return total((kept | set(linear.boundaries[k + 1])) - set(linear.boundaries[k]) - carried_keys)

    def released_bytes(k: int) -> int:
        """What stage k - 1 made and nobody saves, where it goes no further: gone once stage k has been kept whole."""
        needed = set(linear.boundaries[k + 1]) | saved_by[k] | saved_by[k - 1] | carried_keys
        fresh = (key for key in linear.boundaries[k] if graph.groups[key].producer >= linear.cuts[k - 1])
        return total(key for key in fresh if key not in needed)

    def unseen_bytes(k: int, cost: OptionCost) -> int:
        """What autograd keeps on real tensors and not on fake ones: kernels that are chosen by their data type."""
        if k == count - 1 and not loss_is_output:  # the loss that stood in keeps the outputs
            return 0
        packs = enumerate(packs_of(graph, linear, k))
        kept = {pack.group for number, pack in packs if number not in cost.dropped}
        return max(0, cost.kept - total(key for key in kept if graph.groups[key].producer >= linear.cuts[k]))

    flows = GradFlows(capture, costs, size)

    def arriving(k: int) -> int:
        """Bytes of gradients that are counted when stage k is reversed, as far as they stood in its isolation.

        Two results may be one storage, whose gradients have become one; a gradient may be a part of one that lasts. Those
        of the boundary and of carried values are two sums: what one has more than in isolation the other has not less.
        """
        if k == count - 1:
            return output_grad
        counted = 0
        for key in linear.carried[k]:
            if graph.groups[key].requires_grad:
                there = flows.carried_bytes(key, linear.readers[key][0]) if linear.readers[key] else 0
                counted += max(there, size[key] if key in outputs and not loss_is_output else 0)
        stood = min(costs[k].output_grads, passed_on(k))
        return min(stood, flows.boundary(k + 1)) + min(costs[k].output_grads - stood, counted)

    def passed_on(k: int) -> int:
        """Bytes of the results of stage k in the next boundary that get a gradient."""
        stage = capture.stages[k]
        unread = unread_results(capture, k, loss_is_output)
        results = zip(stage.boundary, stage.boundary_from, strict=True)
        read = {nodes[name] for name, i in results if i >= 0 and i not in unread}
        layouts = (graph.layout_of[node] for node in read if graph.grad_of[node])
        return sum(math.prod(each.shape) * each.dtype.itemsize for each in layouts)

    nodes = {op.node.name: op.node for op in graph.ops}
    outputs = held_by_user(graph)
    waiting = unreversed(capture) if loss_is_output else set()
    lasting = [unreversed_bytes(capture, k, waiting, total) for k in range(count)]
    freed = _freed(capture, saved_by, {k for k, size in enumerate(lasting) if size})
    change, output_grad = _carried_changes(capture, size, freed, flows, loss_is_output)
    existing = {p for p in model.parameters() if p.grad is not None}
    created, summed = parameter_grads(
        _readers(capture, model), existing, change, capture.place, sparse=sparse
    )
    at_hand = gradients_at_hand(
        [flows.boundary(k) for k in range(count)],
        [cost.lead for cost in costs],
        [made + max(0, more) for made, more in zip(created, change, strict=True)],
    )
    casts = _cached(capture, costs)
    change[-1] -= sum(casts)  # the forward is over then
    stages = []
    for k, stage in enumerate(capture.stages):
        cost = costs[k]
        carried = total(linear.carried[k])
        # The last stage is not run again, which would make them once more.
        new = carried if k == count - 1 else 0
        carried += casts[k]
        entering = [key for key in linear.boundaries[k] if graph.groups[key].producer >= 0]
        following = total(linear.boundaries[k + 1])
        made = total(set(linear.boundaries[k + 1]) - set(linear.boundaries[k]))
        input_grad = at_hand[k]
        prefix = k == 0 and linear.frozen_prefix
        # The gradient at hand is what a replay meets; what the stage makes until then is part of its own backward too.
        led = at_hand[k + 1] - flows.boundary(k + 1) if k < count - 1 else 0
        gradients = input_grad + arriving(k) + led
        # Keeping all is the first option.
        whole = OptionCost(
            frozenset(),
            0.0,
            cost.keeping_peak,
            cost.backward_peak,
            "all",
            rebuild_peak=cost.rebuild_peak,
            kept=cost.kept,
        )
        options = []
        for each in (whole, *cost.options):
            kept = kept_storages(capture, k, each.dropped)
            unseen = unseen_bytes(k, each)
            saved = saved_bytes(k, kept) + unseen
            released = released_bytes(k) if k and not each.dropped else 0
            keeping = max(0, each.keeping_peak - saved - new) + released
            # What the last stage hands out and saves is among the carried values; other stages may run again.
            shared = total(kept & set(linear.carried[k])) if k == count - 1 else 0
            reversing = each.backward_peak - saved - shared - gradients + summed[k]
            keeps = (*map(values.number, sorted(kept, key=order.__getitem__)), *values.unseen(unseen))
            again = None if each.rebuild_peak is None else each.rebuild_peak - saved + released
            options.append(
                Option(saved - released, each.recompute, keeping, reversing, each.name, keeps, again)
            )
        stages.append(
            Stage(
                name=stage.name,
                forward=cost.forward,
                backward=0.0 if prefix else cost.backward,
                input=total(linear.boundaries[k]),
                options=tuple(options),
                forward_overhead=max(cost.dropping_peak - new, made) - following,
                input_grad=input_grad,
                grad=created[k] + lasting[k],
                carried=carried,
                carried_change=change[k],
                recomputable=not prefix and not capture.once[k],
                enters=tuple(map(values.number, entering)),
                rerun_state=rerun_state(capture, model, k),
            )
        )
    state = [places[0].get() for places in graph.face.state if places]
    held = storage_bytes([*capture.constants.values(), *state], capture.place)
    fixed = resident + SMALL_TENSORS + held
    fixed += sum(stage.rerun_state for stage in stages) + copied_buffers(capture, model)
    if capture.place.type == "cpu":
        fixed += CPU_RANDOM_STATE * any(capture.random)  # what a replay puts back when it is done
    carried_values = [
        Carried(
            values.number(key),
            made,
            linear.readers[key],
            tuple(k for k in linear.readers[key] if key in saved_by[k]),
            freed.get(key),
        )
        for made, keys in enumerate(linear.carried)
        for key in keys
    ]
    carried_values += [
        Carried(number, k, freed=count - 1) for k, size in enumerate(casts) for number in values.unseen(size)
    ]
    return Chain(tuple(stages), 0, output_grad, fixed, name, tuple(values.sizes), tuple(carried_values))


class _Values:
    """Numbers of the chain's values."""

    def __init__(self, size: Mapping[int, int]) -> None:
        self.size = size
        self.sizes: list[int] = []
        self._numbers: dict[int, int] = {}

    def number(self, key: int) -> int:
        """Of a storage of the graph."""
        if key not in self._numbers:
            self._numbers[key] = len(self.sizes)
            self.sizes.append(self.size[key])
        return self._numbers[key]

    def unseen(self, size: int) -> tuple[int, ...]:
        """Of the bytes that an option keeps beyond the storages of the graph; nothing if there are none."""
        if not size:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)


def _cached(capture: GraphCapture, costs: Sequence[StageCost]) -> list[int]:
    """(L,) bytes of casts that each stage adds to autocast's cache: of what the stages before have cast there is one."""
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
    """The stage with whose backward each carried value goes: its earliest reader, or its producer if that saves it.

    An output is not among them, for the user holds it, nor what stages read that are not reversed whole (``waiting``).
    """
    linear, outputs = capture.linear, held_by_user(capture.graph)
    return {
        key: made if key in saved_by[made] else linear.readers[key][0]
        for made, keys in enumerate(linear.carried)
        for key in keys
        if key not in outputs and not {made, *linear.readers[key]}.intersection(waiting)
    }


def _carried_changes(
    capture: GraphCapture,
    size: dict[int, int],
    freed: Mapping[int, int],
    flows: GradFlows,
    loss_is_output: bool,
) -> tuple[list[int], int]:
    """(L,) by how much each backward changes the bytes of carried values, of their gradients and those of inputs; output_grad.

    The gradient of a carried value comes with its latest reader and goes with its producer.
    """
    graph, linear = capture.graph, capture.linear
    count = len(linear)
    change = [0] * count
    outputs = held_by_user(graph)
    output_grad = 4
    if not loss_is_output:
        output_grad = sum(
            size[key]
            for key in outputs
            if graph.groups[key].requires_grad and graph.groups[key].producer >= 0
        )
    for made, keys in enumerate(linear.carried):
        for key in keys:
            readers = linear.readers[key]
            if key in freed:
                change[freed[key]] -= size[key]
            if not graph.groups[key].requires_grad:
                continue
            there = 0
            if key in outputs and not loss_is_output and made < count - 1:
                change[count - 1] += size[key]
                there = size[key]
            for reader in reversed(readers):
                now = max(there, flows.carried_bytes(key, reader))
                change[reader] += now - there
                there = now
            change[made] -= there
    # That of an input stays, or waits for what the input was made by.
    for key, stages in flows.inputs().items():
        there = 0
        for reader in reversed(stages):
            now = flows.carried_bytes(key, reader)
            change[reader] += now - there
            there = now
    return change, output_grad


def _readers(capture: GraphCapture, model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """The stages that read each parameter, ascending."""
    readers: dict[nn.Parameter, list[int]] = {}
    for k, stage in enumerate(capture.stages):
        names = [source.key for source in stage.sources if source.kind == "parameter"]
        for parameter in dict.fromkeys(model.get_parameter(name) for name in names):
            readers.setdefault(parameter, []).append(k)
    return readers
