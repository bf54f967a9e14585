"""Captured blocks -> chain.

Blocks are measured in isolation, like stages of a graph. What the user's code around them takes (*glue*) is measured
where it stands, in a step without the blocks (``skeleton.py``). Every storage that enters or leaves a block, and every
one that glue saves, is a value of the chain, so that the referee holds each of them once, from its making to its end.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scheduler.capture.flat import tensor_leaves
from scheduler.capture.loss import find_loss, output_tensors
from scheduler.capture.module_capture import ModuleCapture
from scheduler.capture.sample import Call
from scheduler.capture.sharded import holders, unshard
from scheduler.capture.state import CPU_RANDOM_STATE, preserved, shielded
from scheduler.chain import Chain, Option, Stage
from scheduler.costs.gather import measure_gather, resharding, standing_bytes, with_gather
from scheduler.costs.gradients import gradients_at_hand, parameter_grads
from scheduler.costs.graph_chain import SMALL_TENSORS
from scheduler.costs.measure import Enter, StageCost, StageRun, as_leaf, fresh_grads, measure_stage
from scheduler.costs.module_values import ModuleValues
from scheduler.costs.peak import allocated, count_bytes
from scheduler.costs.resident import storage_bytes
from scheduler.costs.roofline import Tally, device_rates, estimate_run
from scheduler.costs.skeleton import (
    Box,
    Lifetimes,
    Piece,
    Timed,
    Traffic,
    Visitor,
    pieces,
    run_skeleton,
    storage_key,
)

__all__ = ["module_chain"]


@dataclass(slots=True)
class _BlockCost:
    """Bytes and seconds of one block.

    Attributes:
        input_grad: bytes of the gradients of its boundary.
        saved_arguments, saved_outputs: leaves whose storages its backward needs.
        private: bytes that it saves besides.
        casts: bytes of weights that it casts and that autocast's cache holds until the forward is over: those that it
            saves, and others.
    """

    cost: StageCost
    input_grad: int
    saved_arguments: frozenset[int]
    saved_outputs: frozenset[int]
    private: int
    casts: tuple[int, int]
    box: Box


def module_chain(
    capture: ModuleCapture,
    model: nn.Module,
    call: Call,
    *,
    existing: Collection[nn.Parameter],
    resident: int,
    clock: bool,
    name: str,
) -> Chain:
    """The chain of captured blocks. Leaves the model's state as it is.

    Args:
        existing: parameters that have a gradient before the step.
        resident: bytes live during the whole step.
        clock: False to estimate the seconds by the roofline.
    """
    modules = [model.get_submodule(block.name) for block in capture.blocks]
    readers = _readers(capture, model, modules)
    costs: dict[int, _BlockCost] = {}
    added = {p for p in existing if len(readers[p]) == 1}
    gathering: dict[int, list[Any]] = {}

    class Measuring(Visitor):
        def enter(self, block: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
            outer = holders(model, capture.blocks[block].name)
            gathering[block] = resharding(outer)

            def run(*args: Any, **kwargs: Any) -> Any:
                unshard(outer)  # shards within the block have hooks, which shard all when a backward ends
                return forward(*args, **kwargs)

            costs[block] = _measure_block(capture, block, modules[block], run, args, kwargs, added, clock)
            boxes[block] = costs[block].box
            model.zero_grad(set_to_none=True)
            unshard(outer)  # the block runs once more

    boxes: dict[int, Box] = {}
    with preserved(model):
        output = run_skeleton(capture, model, call, modules, boxes, Measuring(), inside=True)
        own_loss = find_loss(output)[1]
        del output
    with preserved(model):
        gathers = [measure_gather(gathering[index], capture.device) for index in range(len(modules))]
    for index, gather in enumerate(gathers):
        costs[index].cost = with_gather(costs[index].cost, gather)
    capture.gathering = standing_bytes(gathers)
    lifetimes = Lifetimes(capture)
    with preserved(model), lifetimes.watching():
        output = run_skeleton(capture, model, call, modules, boxes, lifetimes)
        lifetimes.check(len(capture))
    del output  # until here, as the user holds it
    seconds = _seconds(capture, model, call, modules, boxes, own_loss, clock)

    traffic: Traffic | None = None
    returned: set[int] = set()
    output_grad = 0

    def step(mark: Callable[[], None]) -> None:
        nonlocal traffic, output_grad
        traffic = Traffic(capture, [*model.parameters(), *model.buffers(), *_tensors(call)], mark)
        with torch.autograd.graph.saved_tensors_hooks(shielded(traffic.pack), lambda tensor: tensor):
            output = run_skeleton(capture, model, call, modules, boxes, traffic, own_loss=own_loss)
        tensors = output_tensors(output)
        returned.update(key for key in map(storage_key, tensors) if key in traffic.size)
        output_grad = sum(t.numel() * t.element_size() for t in tensors if t.requires_grad)

    glue = {k for k, block in enumerate(capture.stages) if block is None}
    with preserved(model):
        fresh_grads((p for p in existing if glue.intersection(readers[p])), existing)
        counted = count_bytes(step, capture.place)
    assert traffic is not None
    blocks = [costs[index] for index in range(len(modules))]
    values = ModuleValues(
        capture,
        traffic,
        lifetimes,
        [(block.saved_arguments, block.saved_outputs) for block in blocks],
        [(block.private, *block.casts) for block in blocks],
        returned,
        _live(capture, traffic, counted.marks),
    )
    forward, backward = pieces(traffic.events, len(blocks), counted.marks, counted.peaks)
    shared = [traffic.shared(index, counted.marks) for index in range(len(blocks))]
    whole = _whole(capture, model)
    parts = _Parts(capture, blocks, values, forward, backward, seconds, output_grad, shared, whole)
    return _assemble(parts, model, readers, existing, own_loss, resident, name)


def _tensors(call: Call) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]


def _seconds(
    capture: ModuleCapture,
    model: nn.Module,
    call: Call,
    modules: list[nn.Module],
    boxes: dict[int, Box],
    own_loss: bool,
    clock: bool,
) -> tuple[list[float], list[float]]:
    """Seconds of each piece of the user's code, forward and backward."""
    runs: list[tuple[list[Piece], list[Piece]]] = []
    for _ in range(3 if clock else 1):
        tally = Tally(device_rates(capture.place))
        timed = Timed() if clock else Timed(lambda: tally.seconds)  # noqa: B023 # is used before the next
        with preserved(model), nullcontext() if clock else tally:
            run_skeleton(capture, model, call, modules, boxes, timed, own_loss=own_loss)
        runs.append(pieces(timed.events, len(modules), times=timed.times))
    forward, backward = (
        [statistics.median(each.seconds for each in same) for same in zip(*way, strict=True)]
        for way in zip(*runs, strict=True)
    )
    return forward, backward


def _live(capture: ModuleCapture, traffic: Traffic, marks: Sequence[int]) -> list[int]:
    """(L,) bytes live in the forward when the stage after each begins, or when the forward is over."""
    at = dict(zip(traffic.events, marks, strict=True))
    live = []
    for index, following in pairwise((*capture.stages, None)):
        if following is not None:
            live.append(at["enter", following])
        else:
            live.append(at["over", -1] if index is None else at["leave", index])
    return live


def _measure_block(
    capture: ModuleCapture,
    index: int,
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    existing: set[nn.Parameter],
    clock: bool,
) -> _BlockCost:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    block = capture.blocks[index]
    tensors = tensor_leaves((args, kwargs))
    fed = {argument for argument, _ in block.fed} or {i for i, _ in tensors}
    own_inputs = [t for i, t in tensors if i in fed]
    external = [t for i, t in tensors if i not in fed]

    weights = [*module.parameters(), *module.buffers()]  # gathered now, if they are sharded
    grad = {i for i, t in tensors if t.requires_grad}

    def run_all(enter: Enter) -> Any:
        fresh = [enter(i, leaf) if i in grad else leaf for i, leaf in enumerate(leaves)]
        # As in a step, no leaf: autocast would put casts of a leaf into its cache.
        fresh = [t.view_as(t) if i in grad and t.is_leaf else t for i, t in enumerate(fresh)]
        positional, named = pytree.tree_unflatten(fresh, spec)
        return forward(*positional, **named)

    def run(enter: Enter) -> list[Tensor]:
        torch.clear_autocast_cache()  # a run casts its weights anew
        try:
            return [t for _, t in tensor_leaves(run_all(enter))]
        finally:  # it may be stopped half-way
            torch.clear_autocast_cache()

    lasting = frozenset(t.untyped_storage()._cdata for t in (*weights, *external))
    stage = StageRun(run, fresh_grads(module.parameters(), existing), lasting=lasting)
    cost = measure_stage(stage, capture.place, clock=clock)
    if not clock:
        forward_seconds, backward_seconds = estimate_run(stage, capture.place)
        cost = replace(cost, forward=forward_seconds, backward=backward_seconds)
    kept: set[int | None] = set()
    sizes: dict[int | None, int] = {}
    holding: list[Tensor] = []  # no address is used again

    def pack(tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        kept.add(key)
        if key is not None:
            holding.append(tensor.detach())
            sizes[key] = allocated(tensor.untyped_storage().nbytes(), capture.place)
        return tensor

    def saving() -> list[tuple[int, Tensor]]:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(shielded(pack), lambda t: t):
            return tensor_leaves(run_all(as_leaf))

    cached = _cached_casts(capture, run_all)
    outputs = saving()
    given = {storage_key(t) for t in (*weights, *(t for _, t in tensors))}
    first = kept - given
    saved_outputs = frozenset(i for i, t in outputs if storage_key(t) in first)
    fresh = {storage_key(t) for i, t in outputs if i in saved_outputs}
    saved_arguments = frozenset(i for i, t in tensors if storage_key(t) in kept)
    casts = 0
    if cached:  # what a second run saves too it has from autocast's cache
        kept.clear()
        saving()
        casts = sum(sizes[key] for key in kept & (first - fresh))
    torch.clear_autocast_cache()
    # Kernels may keep what no hook sees.
    own = max(cost.kept, sum(sizes[key] for key in first))
    return _BlockCost(
        cost,
        sum(allocated(t.numel() * t.element_size(), capture.place) for t in own_inputs if t.requires_grad),
        saved_arguments,
        saved_outputs,
        own - sum(sizes[key] for key in fresh) - casts,
        (casts, max(0, cached - casts)),
        Box({i: t.requires_grad for i, t in outputs}, cost.input_grads),
    )


def _cached_casts(capture: ModuleCapture, run: Callable[[Enter], Any]) -> int:
    """Bytes of cast weights that autocast's cache holds once a block has run."""
    if not torch.is_autocast_enabled(capture.device.type):
        return 0

    def step(_: Callable[[], None]) -> None:
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(shielded(lambda _: None), lambda _: torch.empty(0)),
        ):
            run(as_leaf)

    torch.clear_autocast_cache()
    cached = count_bytes(step, capture.place).end
    torch.clear_autocast_cache()
    return cached


def _readers(
    capture: ModuleCapture, model: nn.Module, modules: list[nn.Module]
) -> dict[nn.Parameter, list[int]]:
    """The stages that read each parameter, ascending.

    One outside the blocks belongs to the last glue if its name comes after the blocks' in the model, else to the
    first; a tied one has several names.
    """
    stage_of: dict[nn.Module, int] = {
        inner: block.stage
        for block, module in zip(capture.blocks, modules, strict=True)
        for inner in module.modules()
    }
    readers: dict[nn.Parameter, set[int]] = {}
    seen_block = False
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stage = stage_of.get(model.get_submodule(name.rpartition(".")[0]))
        seen_block |= stage is not None
        outside = len(capture) - 1 if seen_block else 0
        readers.setdefault(parameter, set()).add(outside if stage is None else stage)
    return {parameter: sorted(stages) for parameter, stages in readers.items()}


def _whole(capture: ModuleCapture, model: nn.Module) -> dict[nn.Parameter, int]:
    """Sharded parameters whose gradients wait whole for the end of a module around several stages.

    Returns:
        for each, the stage at whose end fully_shard copies its gradient and reduces that.
    """
    ends: dict[Any, int] = {}
    for block in capture.blocks:
        own = model.get_submodule(block.name)
        for holder in holders(model, block.name):
            if holder is not own:
                ends.setdefault(holder, 0 if holder is model else block.stage)
    found = {}
    for name, parameter in model.named_parameters() if ends else ():
        around = holders(model, name.rpartition(".")[0])
        if around and around[-1] in ends:
            found[parameter] = ends[around[-1]]
    return found


@dataclass(slots=True)
class _Parts:
    """What a chain is made of.

    Attributes:
        forward, backward: (blocks + 1,) the user's code before each block and after the last.
        seconds: of these.
        shared: (blocks,) bytes of the gradients of its outputs that others, which wait, are views of too.
        output_grad: bytes of the gradients of the model's outputs, if it has no loss of its own.
        whole: sharded parameters whose gradients wait whole, and the stage at whose end they are reduced.
    """

    capture: ModuleCapture
    blocks: list[_BlockCost]
    values: ModuleValues
    forward: list[Piece]
    backward: list[Piece]
    seconds: tuple[list[float], list[float]]
    output_grad: int
    shared: list[int]
    whole: dict[nn.Parameter, int]

    def __len__(self) -> int:
        return len(self.capture)

    def piece(self, k: int) -> int:
        """The piece of the user's code before stage ``k``, or which that stage is."""
        return sum(1 for index in self.capture.stages[:k] if index is not None)

    def taken(self, piece: Piece) -> int:
        """The most bytes that a piece takes above those live when it starts."""
        return piece.peak - piece.start

    def own_code(self, k: int) -> tuple[int, int]:
        """Bytes that the user's code takes between block k and the next, forward and backward, where it is no stage."""
        if self.capture.stages[k] is None or self.capture.stages[k + 1] is None:
            return 0, 0
        piece = self.piece(k + 1)
        return self.taken(self.forward[piece]), self.taken(self.backward[piece])

    def gradients(self) -> list[int]:
        """(L,) bytes of gradients that are live when stages k..L-1 are reversed, those of blocks' parameters left out."""
        left = []
        for k, index in enumerate(self.capture.stages):
            piece = self.backward[self.piece(k)]
            ended = piece.end if index is None or self.capture.stages[k - 1] is not None else piece.start
            left.append(ended - self.backward[-1].start + sum(self.values.glue_saved[k:]))
        return left


def _assemble(
    parts: _Parts,
    model: nn.Module,
    readers: dict[nn.Parameter, list[int]],
    existing: Collection[nn.Parameter],
    own_loss: bool,
    resident: int,
    name: str,
) -> Chain:
    capture, values = parts.capture, parts.values
    count = len(parts)
    device = capture.place
    change = [0] * count
    alone = {p: ks for p, ks in readers.items() if all(capture.stages[k] is None for k in ks)}
    shared = {p: ks for p, ks in readers.items() if p not in alone}
    created, summed = parameter_grads(shared, existing, change, device, parts.whole)
    by_glue = parameter_grads(alone, existing, [0] * count, device, parts.whole)[0]
    reduced = [0] * count  # copies of gradients of blocks' parameters
    for parameter, end in parts.whole.items():
        if parameter in shared and parameter.requires_grad:
            reduced[end] += allocated(parameter.numel() * parameter.element_size(), device)
    output_grad = 4 if own_loss else parts.output_grad
    # Gradients of boundaries; what waits besides is long-lived.
    left, boundary, waiting = parts.gradients(), [0] * count, 0
    for k in reversed(range(count)):
        index, before = capture.stages[k], capture.stages[k - 1] if k else None
        size = 0
        if index is not None:
            size = parts.blocks[index].input_grad
        elif before is not None:
            size = parts.blocks[before].cost.output_grads
        other = max(0, left[k] - sum(by_glue[k:]))
        boundary[k] = min(size, other) if k else 0
        change[k] += other - boundary[k] - waiting
        waiting = other - boundary[k]
    at_hand = gradients_at_hand(
        boundary,
        [0 if index is None else parts.blocks[index].cost.lead for index in capture.stages],
        [a + b + max(0, more) for a, b, more in zip(created, by_glue, change, strict=True)],
    )
    making: list[set[int]] = [set() for _ in range(count)]
    for each in values.carried:
        making[each.made].add(each.value)
        if each.freed is not None:
            change[each.freed] -= values.sizes[each.value]
    # The blocks that need no gradient: they save nothing, and run once.
    frozen = len(list(takewhile(lambda each: not any(each.box.requires_grad.values()), parts.blocks)))
    enters = [*map(set, values.enters), set()]
    lasting = {each.value for each in values.carried}
    stages = []
    for k, index in enumerate(capture.stages):
        keeps = values.keeps[k]
        following = values.total(enters[k + 1])
        made = values.total((keeps | enters[k + 1]) - enters[k] - making[k])
        fresh = values.total(enters[k + 1] - enters[k])
        # What stage k - 1 made and nobody saves, where it goes no further: gone once stage k has been kept.
        released = 0
        if k:
            needed = enters[k + 1] | enters[k - 1] | keeps | values.keeps[k - 1] | lasting
            released = values.total(enters[k] - needed)
        led = at_hand[k + 1] - boundary[k + 1] if k < count - 1 else 0
        gradients = at_hand[k] + led - summed[k]
        again = None
        if index is not None:
            cost = parts.blocks[index].cost
            ahead, behind = parts.own_code(k)
            # Code of the user's that is no stage runs when the block is done.
            keeping = max(cost.keeping_peak, made + ahead if ahead else 0)
            dropping = max(cost.dropping_peak, fresh, fresh + ahead if ahead else 0)
            ended = parts.blocks[index].input_grad + created[k]
            # The gradients of its outputs go as it is reversed, unless others wait in the same storages.
            going = cost.output_grads - min(cost.output_grads, max(0, parts.shared[index]))
            reversing = max(cost.backward_peak, ended + behind if behind else 0) - made - going
            seconds = cost.forward, cost.backward
            block = capture.blocks[index].name
            assert cost.rebuild_peak is not None
            again = cost.rebuild_peak - made + released
            overhead = dropping - following
        else:
            piece = parts.piece(k)
            last = k == count - 1
            keeping = parts.taken(parts.forward[piece]) - (values.total(making[k]) if last else 0)
            kept = values.total(keeps - enters[k] - (making[k] if last else set()))
            reversing = parts.taken(parts.backward[piece]) - (output_grad if last else 0) + kept - made
            seconds = parts.seconds[0][piece], parts.seconds[1][piece]
            block = (
                f"glue {capture.stages[:k].count(None)}" if k and not last else ("after" if k else "before")
            )
            overhead = 0
        reversing += reduced[k]
        option = Option(
            made - released,
            forward_overhead=max(0, keeping - made) + released,
            backward_overhead=reversing - gradients,
            name="all" if index is not None else "all (glue)",
            keeps=tuple(sorted(keeps)),
            rerun_overhead=again,
        )
        stages.append(
            Stage(
                name=block,
                forward=seconds[0],
                backward=seconds[1],
                input=values.total(enters[k]),
                options=(option,),
                forward_overhead=overhead,
                input_grad=at_hand[k],
                grad=created[k] + by_glue[k],
                carried=values.total(making[k]),
                carried_change=change[k],
                recomputable=index is not None and index >= frozen,
                enters=values.enters[k],
                rerun_state=_rerun_state(capture, model, k),
            )
        )
    fixed = resident + SMALL_TENSORS + capture.gathering + sum(stage.rerun_state for stage in stages)
    # Copies of the buffers that a block changes, while it runs again.
    fixed += max(storage_bytes(map(model.get_buffer, names), device) for names in capture.changed)
    if device.type == "cpu":
        fixed += CPU_RANDOM_STATE  # what a replay puts back when it is done, or a block that drew nothing is known by
    return Chain(tuple(stages), 0, output_grad, fixed, name, tuple(values.sizes), tuple(values.carried))


def _rerun_state(capture: ModuleCapture, model: nn.Module, k: int) -> int:
    """Bytes that are held while a block may run again, besides values: the executor notes them before each first run."""
    if capture.stages[k] is None:
        return 0
    state = CPU_RANDOM_STATE if capture.random[k] and capture.place.type == "cpu" else 0
    return state + storage_bytes(map(model.get_buffer, capture.changed[k]), capture.place)
