"""Make and price captures of blocks: whole modules that run one after the other.

Blocks are measured in isolation, like stages of a graph; the user's code around them (*glue*) in its place,
in a step without the blocks (``skeleton.py``). Every storage that enters or leaves a block, and every one
that glue saves, is a value of the chain, so that the referee counts each of them once while it is live.
"""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from rematplan.scheduler.capture.blocks.block_capture import BlockCapture, capture_blocks
from rematplan.scheduler.capture.blocks.calls import is_compiled
from rematplan.scheduler.capture.blocks.layer_drop import fixed_draws
from rematplan.scheduler.capture.protocol import Asked, Producer
from rematplan.scheduler.capture.trial_step import UNTRIED, TrialStep
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.costs.block_chain import BlockParts, stages_to_chain
from rematplan.scheduler.costs.block_costs import BlockCost, BlockRun
from rematplan.scheduler.costs.block_values import Lifetimes, Traffic, block_values
from rematplan.scheduler.costs.gather import measure_gather, resharding, standing_bytes, with_gather
from rematplan.scheduler.costs.meters.peak import count_bytes
from rematplan.scheduler.costs.roofline import Tally, device_rates
from rematplan.scheduler.costs.skeleton import (
    Box,
    Piece,
    SkeletonEvent,
    Timed,
    Visitor,
    pieces,
    run_skeleton,
    stand_in,
)
from rematplan.scheduler.costs.stage_run import fresh_grads
from rematplan.scheduler.plan.plan import CaptureRecord
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.fsdp import holders, sharded_within, unshard
from rematplan.scheduler.torch_layer.layouts import storage_key, tensor_bytes
from rematplan.scheduler.torch_layer.leaves import tensors_in
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import preserved, shielded, uncompiled
from rematplan.scheduler.torch_layer.unwind import met

__all__ = ["BlockProducer", "block_chain"]

MANY_STAGES = 200  # the code around each is timed once


class BlockProducer(Producer):
    """Makes and prices captures of the model's own modules."""

    def capture(self, step: TrialStep, asked: Asked, refused: str) -> tuple[BlockCapture, str]:
        """See ``Producer.capture``."""
        step.progress("capturing the blocks")
        given = None if isinstance(asked, str) else asked
        try:
            with (
                preserved(step.model) if step.target is None else nullcontext(),
                met("a trial forward raises"),
            ):
                captured = capture_blocks(step.model, step.call, given, step.target, step.seen)
        except CaptureError as error:
            why = f" (graph capture: {refused})" if refused else ""
            raise CaptureError(
                f"solve: {type(step.model).__name__} cannot be captured: {error}{why}; pass capture=[blocks], the modules that "
                "run one after the other"
            ) from error
        reason = captured.reason if given is None else "the blocks given"
        if step.target is not None:
            reason += f"; {UNTRIED}"
        return captured, reason + (f"; not as a graph, since {refused}" if refused else "")

    def price(
        self,
        captured: BlockCapture,
        step: TrialStep,
        *,
        resident: int,
        clock: bool,
        options: bool,  # noqa: ARG002 # a module is kept whole or not at all
    ) -> Chain:
        """See ``Producer.price``."""
        model, call, sparse = step.model, step.call, step.sparse
        # They cannot where the loss does not reach them, say.
        what = f"solve: the blocks of {type(model).__name__} cannot be reversed one by one"
        with preserved(model) as existing, met(what, "pass other blocks, capture=[modules]"):
            return block_chain(
                captured, model, call, existing=existing, resident=resident, clock=clock, sparse=sparse
            )

    def asked_again(self, record: CaptureRecord, model: nn.Module, asked: str) -> Asked:  # noqa: ARG002
        """See ``Producer.asked_again``: the blocks of the plan."""
        return tuple(map(model.get_submodule, dict.fromkeys(record.stages)))


def block_chain(
    capture: BlockCapture,
    model: nn.Module,
    call: Call,
    *,
    existing: Collection[nn.Parameter],
    resident: int,
    clock: bool,
    once: bool = True,
    sparse: Mapping[nn.Parameter, int] = MappingProxyType({}),
) -> Chain:
    """Return the chain of captured blocks, all of them run; the model's state stays as it is.

    Args:
        existing: parameters that have a gradient before the step.
        resident: bytes live during the whole step.
        clock: False to estimate the seconds by the roofline.
        once: whether blocks that run the same ops are measured once.
        sparse: bytes of gradients that are sparse.
    """
    readers = _readers(capture, model)
    with fixed_draws(capture.fixed_draw):
        blocks, own_loss = _measured(capture, model, call, readers, existing, clock, once)
        boxes = {index: block.box for index, block in enumerate(blocks)}
        run = functools.partial(run_skeleton, capture, model, call, boxes)
        try:
            lifetimes = _lifetimes(capture, model, run)
        except Exception:
            if not any(box.stand_in for box in boxes.values()):
                raise
            for box in boxes.values():  # values of stand-ins led the user's code another way
                box.stand_in = None
            lifetimes = _lifetimes(capture, model, run)
        run = functools.partial(run, own_loss=own_loss)
        seconds = _seconds(capture, model, run, clock)
        glue = {k for k, block in enumerate(capture.stages) if block is None}
        traffic = Traffic(capture, [*model.parameters(), *model.buffers(), *tensors_in(call)])
        with preserved(model):
            fresh_grads((p for p in existing if glue.intersection(readers.get(p, glue))), existing)
            counted = count_bytes(functools.partial(_step_of_glue, run, traffic), capture.place, slack=False)
    at = dict(zip(traffic.events, counted.marks, strict=True))
    both = pieces(traffic.events, len(blocks))
    forward, backward = ([Piece.of(counted, *piece) for piece in way] for way in both)
    parts = BlockParts(
        capture=capture,
        model=model,
        blocks=blocks,
        values=block_values(capture, traffic, lifetimes, blocks, _live(capture, at)),
        forward=forward,
        backward=backward,
        seconds=seconds,
        output_grad=4 if own_loss else traffic.output_grad,
        shared=traffic.shared(at),
        readers=readers,
        existing=existing,
        whole=_whole(capture, model),
        waiting=traffic.waiting,
        sparse=sparse,
    )
    return stages_to_chain(parts, resident)


def _measured(
    capture: BlockCapture,
    model: nn.Module,
    call: Call,
    readers: dict[nn.Parameter, list[int]],
    existing: Collection[nn.Parameter],
    clock: bool,
    once: bool,
) -> tuple[list[BlockCost], bool]:
    """Return the cost of each block, gathered parameters included; whether the model returns its loss."""
    modules = capture.modules(model)
    costs: dict[int, BlockCost] = {}
    boxes: dict[int, Box] = {}
    # A parameter in a list is none of the model's: its readers are unknown.
    added = {p for p in existing if len(readers.get(p, ())) == 1}
    gathering: dict[int, list[Any]] = {}
    known: dict[Hashable, BlockCost] = {}
    # Ops of compiled code cannot be seen, and every rank takes part in collectives.
    opaque = not once or bool(sharded_within(model)) or any(map(is_compiled, model.modules()))

    class Measuring(Visitor):
        def enter(self, block: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            outer = holders(model, capture.blocks[block].name)
            gathering[block] = resharding(outer)

            def run(*args: Any, **kwargs: Any) -> Any:
                unshard(outer)  # shards within the block have hooks, which shard all when a backward ends
                return forward(*args, **kwargs)

            stage = capture.blocks[block].stage
            later = {p for p in modules[block].parameters() if readers.get(p, [stage])[-1] > stage}
            here = BlockRun(capture, block, modules[block], run, args, kwargs, added, later)
            trace, produced = (block, None) if opaque else here.trace()
            if trace not in known:
                left = here.state.take()
                known[trace] = here.measure(clock)
                here.state.put(left if produced is not None else here.found)
                if produced is not None and len(capture) >= MANY_STAGES:
                    known[trace].box.stand_in = stand_in(produced, here.given)
                model.zero_grad(set_to_none=True)
                unshard(outer)  # the block runs once more
            costs[block], boxes[block] = known[trace], known[trace].box
            return produced

    with preserved(model):
        output = run_skeleton(capture, model, call, boxes, Measuring(), inside=True)
        own_loss = find_loss(output)[1]
        del output
    with preserved(model):
        gathers = [measure_gather(gathering[index], capture.device) for index in range(len(modules))]
    capture.gathering = standing_bytes(gathers)
    blocks = (costs[index] for index in range(len(modules)))
    return [replace(b, cost=with_gather(b.cost, g)) for b, g in zip(blocks, gathers, strict=True)], own_loss


def _lifetimes(capture: BlockCapture, model: nn.Module, run: Callable[..., Any]) -> Lifetimes:
    """Return how long the user's code holds the arguments and outputs of blocks."""
    lifetimes = Lifetimes(capture)
    with preserved(model), uncompiled(), lifetimes.watching():
        output = run(lifetimes)
        lifetimes.check(len(capture))
    del output  # until here, as the user holds it
    return lifetimes


def _step_of_glue(run: Callable[..., Any], traffic: Traffic, mark: Callable[[], None]) -> None:
    """Run one step of the user's code without the blocks; ``mark`` is called at each event."""
    traffic.mark = mark
    with torch.autograd.graph.saved_tensors_hooks(shielded(traffic.pack), lambda tensor: tensor):
        output = run(traffic)
    tensors = tensors_in(output)
    traffic.returned.update(key for key in map(storage_key, tensors) if key in traffic.size)
    traffic.output_grad = sum(tensor_bytes(t) for t in tensors if t.requires_grad)


def _seconds(
    capture: BlockCapture, model: nn.Module, run: Callable[..., Any], clock: bool
) -> tuple[list[float], list[float]]:
    """Return the seconds of each piece of the user's code, forward and backward."""
    runs: list[list[list[float]]] = []
    for _ in range(3 if clock and len(capture) < MANY_STAGES else 1):
        tally = None if clock else Tally(device_rates(capture.place))
        timed = Timed() if tally is None else Timed(lambda: tally.seconds)  # noqa: B023 # is used before the next
        with preserved(model), nullcontext() if clock else uncompiled(), tally or nullcontext():
            run(timed)
        times, both = timed.times, pieces(timed.events, len(capture.blocks))
        runs.append([[times[end + 1] - times[start + 1] for start, end in way] for way in both])
    forward, backward = ([*map(statistics.median, zip(*way, strict=True))] for way in zip(*runs, strict=True))
    return forward, backward


def _live(capture: BlockCapture, at: Mapping[SkeletonEvent, int]) -> list[int]:
    """Return (L,) bytes live in the forward when the stage after each begins, or when the forward is over.

    Args:
        at: bytes live at each event.
    """
    live = []
    for index, following in pairwise((*capture.stages, None)):
        if following is not None:
            live.append(at["enter", following])
        else:
            live.append(at["over", -1] if index is None else at["leave", index])
    return live


def _readers(capture: BlockCapture, model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """Return the stages that read each parameter, ascending.

    One outside the blocks belongs to the last glue if its name comes after the blocks' in the model, else to
    the first; a tied one has several names.
    """
    stages_of: dict[str, set[int]] = defaultdict(set)
    for block in capture.blocks:
        stages_of[block.name].add(block.stage)
    within: dict[nn.Module, set[int]] = defaultdict(set)
    for name, stages in stages_of.items():
        for inner in model.get_submodule(name).modules():
            within[inner] |= stages
    readers: dict[nn.Parameter, set[int]] = defaultdict(set)
    outside = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stages = within.get(model.get_submodule(name.rpartition(".")[0]), set())
        if stages:
            outside = len(capture) - 1
        readers[parameter] |= stages or {outside}
    return {parameter: sorted(stages) for parameter, stages in readers.items()}


def _whole(capture: BlockCapture, model: nn.Module) -> dict[nn.Parameter, int]:
    """Return sharded parameters whose gradients wait whole for the end of a module around several stages.

    Returns:
        for each, the stage at whose end fully_shard copies its gradient and reduces that.
    """
    ends: dict[Any, int] = {}
    for block in capture.blocks:
        own = model.get_submodule(block.name)
        for holder in holders(model, block.name):
            if holder is not own:
                ends.setdefault(holder, 0 if holder is model else block.stage)
    around = ((p, holders(model, name.rpartition(".")[0])) for name, p in model.named_parameters() if ends)
    return {p: ends[outer[-1]] for p, outer in around if outer and outer[-1] in ends}
