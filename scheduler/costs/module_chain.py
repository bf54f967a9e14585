"""Captured blocks -> chain.

Blocks are measured in isolation, like stages of a graph. Glue is measured where it stands: one step is run
in which every block's outputs are cut loose from its inputs, so that the glue's own graphs can be reversed
one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from scheduler.capture.loss import find_loss, output_tensors
from scheduler.capture.module_capture import ModuleCapture, intercepted, tensor_leaves
from scheduler.capture.sample import Call
from scheduler.capture.sharded import holders, unshard
from scheduler.capture.state import CPU_RANDOM_STATE, preserved, shielded
from scheduler.chain import Chain, Option, Stage
from scheduler.costs.gather import Gather, measure_gather, resharding, standing_bytes, with_gather
from scheduler.costs.graph_chain import SMALL_TENSORS, gradients_at_hand, parameter_grads
from scheduler.costs.measure import Enter, StageCost, StageRun, as_leaf, fresh_grads, measure_stage
from scheduler.costs.peak import allocated, count_bytes
from scheduler.costs.resident import storage_bytes
from scheduler.costs.roofline import Tally, device_rates, estimate_run

__all__ = ["module_chain"]


@dataclass(slots=True)
class _BlockCost:
    """Bytes and seconds of one block."""

    cost: StageCost
    input: int
    input_grad: int
    saved: int
    external: list[tuple[int, int]]  # (identity, bytes) of external tensors that require grad


@dataclass(slots=True)
class _Pass:
    """One step in which the blocks are cut loose: what its glue took.

    Attributes:
        entered: the tensors that glue gave to blocks.
        forward, backward: seconds of glue.
        produced: (blocks,) bytes of each block's outputs.
        lingering: (blocks,) bytes of those outputs that are there when the block after the next begins: in the
            frame that called a container of blocks, for instance, or in a list.
        lasting: (blocks,) bytes of those that are there when the forward is over: skips, hidden states that the
            user's code collects or that glue saves.
        returned: (blocks,) bytes of those that are outputs of the model.
        outputs: bytes of the model's other outputs.
        held: (glue,) bytes of all blocks' outputs that are there when each piece of glue ends.
    """

    entered: list[list[Tensor]] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    produced: list[int] = field(default_factory=list)
    lingering: list[int] = field(default_factory=list)
    lasting: list[int] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    outputs: int = 0
    held: list[int] = field(default_factory=list)
    own_loss: bool = True


def module_chain(
    capture: ModuleCapture, model: nn.Module, call: Call, *, resident: int, clock: bool, name: str
) -> Chain:
    """The chain of captured blocks. Leaves the model's state as it is.

    Args:
        resident: bytes live during the whole step.
        clock: False to estimate the seconds by the roofline.
    """
    existing = {p for p in model.parameters() if p.grad is not None}
    costs: dict[int, _BlockCost] = {}
    modules = [model.get_submodule(block.name) for block in capture.blocks]
    readers = _readers(capture, model, modules)
    added = {p for p in existing if len(readers[p]) == 1}
    gathering: dict[int, list[Any]] = {}
    with preserved(model):

        def measure(index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
            outer = holders(model, capture.blocks[index].name)
            gathering[index] = resharding(outer)

            def run(*args: Any, **kwargs: Any) -> Any:
                unshard(
                    outer
                )  # shards within the block have their hooks, which shard all when a backward ends
                return forward(*args, **kwargs)

            costs[index] = _measure_block(capture, index, modules[index], run, args, kwargs, added, clock)
            model.zero_grad(set_to_none=True)

        _run(capture, model, call, modules, measure)
    with preserved(model):
        gathers = [measure_gather(gathering[index], capture.device) for index in range(len(modules))]
    for index, gather in enumerate(gathers):
        costs[index].cost = with_gather(costs[index].cost, gather)
    capture.gathering = standing_bytes(gathers)
    times: list[_Pass] = []
    for _ in range(3 if clock else 0):
        with preserved(model):
            times.append(_run(capture, model, call, modules))
    if not clock:
        tally = Tally(device_rates(capture.place))
        with preserved(model), tally:
            times.append(_run(capture, model, call, modules, now=lambda: tally.seconds))
    glue = [k for k, block in enumerate(capture.stages) if block is None]
    with preserved(model):
        fresh_grads((p for p in added if readers[p][0] in glue), added)
        marks: list[Callable[[], None]] = []

        def step(mark: Callable[[], None]) -> None:
            marks.append(mark)
            _run(capture, model, call, modules, mark=mark, gathers=gathers)

        counted = count_bytes(step, capture.place)
    change = [0] * len(capture)
    grads = parameter_grads(readers, existing, change, capture.place)
    return _assemble(
        capture, model, costs, times, counted.peaks, counted.marks, glue, grads, change, resident, name
    )


def _run(
    capture: ModuleCapture,
    model: nn.Module,
    call: Call,
    modules: list[nn.Module],
    measure: Callable[[int, Callable[..., Any], Any, Any], None] | None = None,
    mark: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
    gathers: Sequence[Gather] = (),
) -> _Pass:
    """One step with the blocks cut loose.

    Marks: where each block begins and ends; then, in backward, where the reversal of each piece of glue does.
    """
    result = _Pass()
    external: list[Tensor] = []
    made: list[dict[int, tuple[StorageWeakRef, int]]] = []  # block -> storage -> (reference, bytes)
    since = now()
    starts_glue = {block.stage for block in capture.blocks if capture.stages[block.stage - 1] is None}

    def wrapper(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def loose(*args: Any, **kwargs: Any) -> Any:
                nonlocal since
                if index > 1:
                    result.lingering.append(_alive(made[index - 2]))
                if capture.blocks[index].stage in starts_glue:
                    result.forward.append(now() - since)
                    result.entered.append([t for _, t in tensor_leaves((args, kwargs)) if t.requires_grad])
                    there = gathers[index].peak if gathers else 0  # of the block, which gathered them already
                    result.held.append(sum(map(_alive, made)) + there)
                if measure is None:
                    # The executor holds the arguments that come from elsewhere until the step is over.
                    fed = {argument for argument, _ in capture.blocks[index].fed}
                    external.extend(t for i, t in tensor_leaves((args, kwargs)) if i not in fed)
                mark()
                if measure is not None:
                    measure(index, forward, args, kwargs)
                with torch.no_grad():
                    produced = forward(*args, **kwargs)
                produced = pytree.tree_map_only(Tensor, _loosened, produced)
                given = _storages(t for _, t in tensor_leaves((args, kwargs)))
                made.append(
                    {
                        storage._cdata: (StorageWeakRef(storage), allocated(storage.nbytes(), capture.place))
                        for storage in (t.untyped_storage() for _, t in tensor_leaves(produced))
                        if storage._cdata not in given
                    }
                )
                result.produced.append(sum(size for _, size in made[-1].values()))
                mark()
                since = now()
                return produced

            return loose

        return wrap

    args, kwargs = call
    with torch.enable_grad(), intercepted([(m, wrapper(i)) for i, m in enumerate(modules)]):
        output = model(*args, **kwargs)
        loss, result.own_loss = find_loss(output)
    result.forward.append(now() - since)
    result.held.append(sum(map(_alive, made)))
    # The output of the last block is the boundary of the glue that follows.
    result.lasting = [*(_alive(storages) for storages in made[:-1]), 0]
    result.lingering += [0] * (len(made) - len(result.lingering))
    ends = _storages(output_tensors(output))
    result.returned = [
        sum(size for key, (_, size) in storages.items() if key in ends) if lasting else 0
        for storages, lasting in zip(made, result.lasting, strict=True)
    ]
    result.outputs = storage_bytes(output_tensors(output), capture.place) - sum(result.returned)
    for position in range(len(result.entered), -1, -1):
        roots = (
            [loss] if position == len(result.entered) else [t for t in result.entered[position] if t.grad_fn]
        )
        seeds = [torch.ones_like(t) for t in roots]
        mark()
        began = now()
        if roots:
            with torch.autocast(roots[0].device.type, enabled=False):
                torch.autograd.backward(roots, seeds, retain_graph=position > 0)
        result.backward.append(now() - began)
        mark()
    result.backward.reverse()
    return result


def _alive(storages: dict[int, tuple[StorageWeakRef, int]]) -> int:
    """Bytes of the storages that are still there."""
    return sum(size for reference, size in storages.values() if not reference.expired())


class _Cut(torch.autograd.Function):
    """A tensor with a history of its own: requires grad, is no leaf, and may be changed in place like any other."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, held: list[Tensor]) -> Tensor:  # noqa: ARG004 # autograd's signature
        return held.pop().detach()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # noqa: ARG004 # autograd's signature
        return None, None


def _loosened(tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.detach()
    loose: Tensor = _Cut.apply(torch.empty(0, requires_grad=True), [tensor])
    return loose


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


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
    own = [t for i, t in tensors if i in fed]
    external = [t for i, t in tensors if i not in fed]

    def run(enter: Enter) -> list[Tensor]:
        fresh = [
            enter(i, leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf
            for i, leaf in enumerate(leaves)
        ]
        positional, named = pytree.tree_unflatten(fresh, spec)
        return [t for _, t in tensor_leaves(forward(*positional, **named))]

    lasting = frozenset(
        t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers(), *external)
    )
    stage = StageRun(run, fresh_grads(module.parameters(), existing), lasting=lasting)
    cost = measure_stage(stage, capture.place, clock=clock)
    if not clock:
        forward_seconds, backward_seconds = estimate_run(stage, capture.place)
        cost = replace(cost, forward=forward_seconds, backward=backward_seconds)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(shielded(pack), lambda t: t):
        outputs = run(as_leaf)
    saved = _storages([*kept, *outputs])
    for key in _storages([*module.parameters(), *module.buffers(), *(t for _, t in tensors)]):
        saved.pop(key, None)
    device = capture.place
    return _BlockCost(
        cost,
        sum(allocated(size, device) for size in _storages(own).values()),
        sum(allocated(t.numel() * t.element_size(), device) for t in own if t.requires_grad),
        sum(allocated(size, device) for size in saved.values()),
        [
            (t.untyped_storage()._cdata, allocated(t.numel() * t.element_size(), device))
            for t in external
            if t.requires_grad
        ],
    )


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


def _assemble(
    capture: ModuleCapture,
    model: nn.Module,
    costs: dict[int, _BlockCost],
    times: list[_Pass],
    peaks: tuple[int, ...],
    marks: tuple[int, ...],
    glue: list[int],
    grads: tuple[list[int], list[int]],
    change: list[int],
    resident: int,
    name: str,
) -> Chain:
    count = len(capture)
    blocks = len(capture.blocks)
    trial = times[0]
    output_grad = 4 if trial.own_loss else trial.outputs + sum(trial.returned)
    created, summed = grads
    readers: dict[int, list[int]] = {}
    for number, priced in costs.items():
        for key, _ in priced.external:
            readers.setdefault(key, []).append(capture.blocks[number].stage)
    sizes = {key: size for cost in costs.values() for key, size in cost.external}
    for key, stages in readers.items():
        change[max(stages)] += sizes[key]
        change[max(g for g in glue if g < min(stages))] -= sizes[key]
    for block, lingering, lasting, returned in zip(
        capture.blocks, trial.lingering, trial.lasting, trial.returned, strict=True
    ):
        change[block.stage] -= lasting - returned  # the user holds what is returned
        change[count - 1] -= max(0, lingering - lasting)
    produced = [0 if b is None else trial.produced[b] - trial.lasting[b] for b in (None, *capture.stages)]
    at_hand = gradients_at_hand(
        [produced[k] if b is None else costs[b].input_grad for k, b in enumerate(capture.stages)],
        [0 if b is None else costs[b].cost.lead for b in capture.stages],
        [made + max(0, more) for made, more in zip(created, change, strict=True)],
    )
    carried = [max(a, b) for a, b in zip(trial.lingering, trial.lasting, strict=True)]
    glue_saved = 0  # by the glue so far
    stages_made = []
    for k, index in enumerate(capture.stages):
        after_it = capture.stages[k + 1] if k + 1 < count else None
        before = capture.stages[k - 1] if k else None
        # A value that lasts is carried: held once, whatever boundary it is part of as well.
        handed = trial.lasting[before] if before is not None else 0
        if index is not None:
            cost = costs[index]
            measured = cost.cost
            lasting = trial.lasting[index]
            saved = max(0, cost.saved - lasting)
            following = max(0, costs[after_it].input - lasting) if after_it is not None else 0
            stages_made.append(
                Stage(
                    name=capture.blocks[index].name,
                    forward=measured.forward,
                    backward=measured.backward,
                    input=max(0, cost.input - handed),
                    options=(
                        Option(
                            saved,
                            forward_overhead=max(0, measured.keeping_peak - saved - lasting),
                            backward_overhead=max(
                                0,
                                measured.backward_peak - saved - at_hand[k] - measured.output_grads,
                            )
                            + summed[k],
                        ),
                    ),
                    forward_overhead=max(0, measured.dropping_peak - following - lasting),
                    input_grad=at_hand[k],
                    grad=created[k],
                    carried=carried[index],
                    carried_change=change[k],
                )
            )
            continue
        position = glue.index(k)
        # Phases of the counted step: glue, block, glue, block, ...; every block has a mark at both ends.
        begins, ends = _glue_phase(capture, k)
        # Outputs of blocks are no business of the glue: they are boundaries, or carried.
        returned_now = trial.outputs if k == count - 1 else 0
        saved = max(0, marks[ends] - trial.held[position] - glue_saved - returned_now)
        glue_saved += saved
        charged = glue_saved + returned_now + produced[k] + sum(carried[: before or 0])
        reversal = 2 * blocks + 1 + 2 * (len(glue) - 1 - position)
        entering = produced[k]
        backward_peak = peaks[reversal] - marks[reversal - 1]
        stages_made.append(
            Stage(
                name=f"glue {position}"
                if 0 < position < len(glue) - 1
                else ("before" if not position else "after"),
                forward=statistics.median(t.forward[position] for t in times),
                backward=statistics.median(t.backward[position] for t in times),
                input=entering,
                options=(
                    Option(
                        saved,
                        forward_overhead=max(0, peaks[begins + 1] - charged),
                        backward_overhead=max(0, backward_peak - (entering if position else 0)) + summed[k],
                        name="all (glue)",
                    ),
                ),
                input_grad=at_hand[k],
                grad=created[k],
                carried=trial.outputs if k == count - 1 else 0,
                carried_change=change[k],
                recomputable=False,
            )
        )
    fixed = resident + SMALL_TENSORS + capture.gathering
    if capture.place.type == "cpu":
        # Noted before each block, drawn from or not; and what a replay puts back when it is done.
        fixed += CPU_RANDOM_STATE * (len(capture.blocks) + 1)
    for names in capture.changed:
        fixed += 2 * storage_bytes((model.get_buffer(n) for n in names), capture.place)
    return Chain(tuple(stages_made), 0, output_grad, fixed, name)


def _glue_phase(capture: ModuleCapture, k: int) -> tuple[int, int]:
    """Marks at which glue stage k begins (-1: at the start) and ends, in the forward."""
    done = sum(1 for index in capture.stages[:k] if index is not None)
    return 2 * done - 1, 2 * done
