"""Count the stages of a chain of blocks: those, the code between them, and their values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, takewhile

from torch import nn

from rematplan.scheduler.capture.blocks.block_capture import BlockCapture
from rematplan.scheduler.capture.blocks.block_state import named_tensors
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.costs.assemble import StageFacts, assemble, parameter_grads
from rematplan.scheduler.costs.block_costs import BlockCost
from rematplan.scheduler.costs.block_values import BlockValues
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.resident import rerun_state, storage_bytes
from rematplan.scheduler.costs.skeleton import Piece
from rematplan.scheduler.costs.stage_run import OptionCost
from rematplan.scheduler.torch_layer.preserve import CPU_RANDOM_STATE
from rematplan.scheduler.torch_layer.target import Device

__all__ = ["BlockParts", "stages_to_chain"]


@dataclass
class BlockParts:
    """The parts of a chain.

    Attributes:
        forward, backward: (blocks + 1,) the user's code before each block and after the last.
        seconds: of these.
        output_grad: bytes of the gradients of the model's outputs.
        shared: (blocks,) bytes of the gradients of its outputs that others, which wait, are views of too.
        readers: the stages that read each parameter, ascending.
        existing: parameters that have a gradient before the step.
        whole: sharded parameters whose gradients wait whole, and the stage at whose end they are reduced.
        waiting: blocks that are not reversed whole: the user holds a tensor made of an output that the loss
            does not reach.
        sparse: bytes of gradients that are sparse.
    """

    capture: BlockCapture
    model: nn.Module
    blocks: list[BlockCost]
    values: BlockValues
    forward: list[Piece]
    backward: list[Piece]
    seconds: tuple[list[float], list[float]]
    output_grad: int
    shared: list[int]
    readers: dict[nn.Parameter, list[int]]
    existing: Collection[nn.Parameter]
    whole: dict[nn.Parameter, int]
    waiting: set[int]
    sparse: Mapping[nn.Parameter, int]

    def __len__(self) -> int:
        return len(self.capture)

    @cached_property
    def pieces(self) -> list[int]:
        """(L,) the piece of the user's code before each stage, or which that stage is."""
        blocks = [int(index is not None) for index in self.capture.stages]
        return [0, *accumulate(blocks[:-1])]

    def lasting(self, k: int) -> int:
        """Return at most the bytes that stay when block k is reversed: saved, or a re-run's boundary."""
        index, total = self.capture.stages[k], self.values.total
        left = 0 if index is None else self.blocks[index].cost.left
        if index not in self.waiting:  # a state holds the graph, and that the boundary that a re-run began at
            return left + total(self.values.enters[k]) if left else 0
        return max(total(self.values.keeps[k]), *map(total, self.values.enters[: k + 1]))

    def gradients(self) -> list[int]:
        """Return (L,) bytes of gradients live when stages k..L-1 are reversed; not blocks' parameters'."""
        left, saved = [], _sums_from(self.values.glue_saved)
        for k, index in enumerate(self.capture.stages):
            piece = self.backward[self.pieces[k]]
            ended = piece.end if index is None or self.capture.stages[k - 1] is not None else piece.start
            left.append(ended - self.backward[-1].start + saved[k])
        return left


def stages_to_chain(parts: BlockParts, resident: int) -> Chain:
    """Return the chain of these parts; ``resident`` bytes are live during the whole step."""
    capture, values, device, model = parts.capture, parts.values, parts.capture.place, parts.model
    facts, created = _gradients(parts)
    # The blocks that need no gradient save nothing, and run once.
    frozen = len(list(takewhile(lambda each: not any(each.box.requires_grad.values()), parts.blocks)))
    for k, (index, fact) in enumerate(zip(capture.stages, facts, strict=True)):
        if index is not None:
            _count_block(parts, k, index, created[k], fact)
        else:
            _count_glue(parts, k, fact)
        fact.enters = values.enters[k]
        fact.stays = parts.lasting(k)
        fact.beside += fact.stays  # in isolation, the block releases it as it is reversed
        fact.recomputable = index is not None and index >= frozen and not capture.effects[k].once
        fact.rerun_state += rerun_state(capture, model, k)
    # Copies of the buffers that a block changes, while it runs again.
    held = max(storage_bytes(named_tensors(model, each.changed), device) for each in capture.effects)
    held += capture.gathering + capture.state_bytes
    return assemble(
        facts, values, capture, model, resident=resident, held=held, output_grad=parts.output_grad
    )


def _gradients(parts: BlockParts) -> tuple[list[StageFacts], list[int]]:
    """Return (L,) facts of stages, as far as they are of gradients; (L,) bytes of blocks' gradients."""
    capture, count, readers = parts.capture, len(parts), parts.readers
    device = capture.place
    change = [0] * count
    alone = {p: ks for p, ks in readers.items() if all(capture.stages[k] is None for k in ks)}
    shared = {p: ks for p, ks in readers.items() if p not in alone}
    by_blocks, _ = parameter_grads(shared, parts.existing, change, device, parts.whole, parts.sparse)
    by_glue, _ = parameter_grads(alone, parts.existing, [0] * count, device, parts.whole, parts.sparse)
    beside = _second_shares(shared, count, device)
    for parameter, end in parts.whole.items():  # copies of gradients of blocks' parameters
        if parameter in shared and parameter.requires_grad:
            beside[end] += allocated(parameter.numel() * parameter.element_size(), device)
    # Gradients of boundaries; what waits besides is long-lived.
    left, boundary, waiting = parts.gradients(), [0] * count, 0
    by_glue_from = _sums_from(by_glue)
    for k in reversed(range(count)):
        index, before = capture.stages[k], capture.stages[k - 1] if k else None
        size = 0
        if index is not None:
            size = parts.blocks[index].input_grad
        elif before is not None:
            size = parts.blocks[before].cost.output_grads
        other = max(0, left[k] - by_glue_from[k])
        boundary[k] = min(size, other) if k else 0
        change[k] += other - boundary[k] - waiting
        waiting = other - boundary[k]
    facts = [
        StageFacts(
            boundary_grad=boundary[k],
            created=by_blocks[k] + by_glue[k],
            appearing=by_blocks[k] + by_glue[k] + max(0, change[k]),
            change=change[k],
            beside=beside[k],
        )
        for k in range(count)
    ]
    return facts, by_blocks


def _count_block(parts: BlockParts, k: int, index: int, created: int, fact: StageFacts) -> None:
    """Fill in the facts of a block; ``created`` bytes of its parameters' gradients appear."""
    values, block, capture = parts.values, parts.blocks[index], parts.capture
    cost, behind = block.cost, 0
    fresh = values.total(set(values.enters[k + 1]) - set(values.enters[k]))
    # A generator's state shows at its end whether it drew.
    drawn = CPU_RANDOM_STATE if capture.place.type == "cpu" else 0
    if capture.stages[k + 1] is not None:  # the user's code after it is no stage
        piece = parts.pieces[k + 1]
        fact.after, behind = parts.forward[piece].taken, parts.backward[piece].taken
    fact.name, fact.forward, fact.backward = capture.blocks[index].label, cost.forward, cost.backward
    fact.dropping_peak = max(cost.dropping_peak, fresh + drawn)
    fact.lead = cost.lead
    fact.rerun_state = cost.held
    # The gradients of its outputs are released as it is reversed, unless others wait in the same storages.
    fact.arriving = cost.output_grads - min(cost.output_grads, max(0, parts.shared[index]))
    reversing = max(cost.backward_peak, block.input_grad + created + behind if behind else 0)
    keeps = tuple(sorted(values.keeps[k]))
    fact.options = [(keeps, replace(cost.whole, backward_peak=reversing))]


def _count_glue(parts: BlockParts, k: int, fact: StageFacts) -> None:
    """Fill in the facts of a stage of the user's code."""
    values, piece, last = parts.values, parts.pieces[k], k == len(parts) - 1
    fact.name = f"glue {k - piece}" if k and not last else ("after" if k else "before")
    fact.forward, fact.backward = parts.seconds[0][piece], parts.seconds[1][piece]
    if last:
        fact.arriving = parts.output_grad
        fact.handed_out = values.total(each.value for each in values.carried if each.made == k)
    kept = values.total(values.keeps[k] - set(values.enters[k]))
    keeps = tuple(sorted(values.keeps[k]))
    keeping, reversing = parts.forward[piece].taken, parts.backward[piece].taken + kept
    fact.options = [(keeps, OptionCost(frozenset(), 0.0, keeping, reversing, "all (glue)"))]


def _second_shares(readers: dict[nn.Parameter, list[int]], count: int, device: Device) -> list[int]:
    """Return (L,) the most bytes that a backward takes to add second shares of parameters' gradients.

    That makes a tensor of its own, one parameter at a time; later shares are added in place.
    """
    result = [0] * count
    for parameter, stages in readers.items():
        if parameter.requires_grad and len(stages) > 1:
            size = allocated(parameter.numel() * parameter.element_size(), device)
            result[stages[-2]] = max(result[stages[-2]], size)
    return result


def _sums_from(sizes: list[int]) -> list[int]:
    """Return the sum of each and all after it."""
    return [*accumulate(reversed(sizes))][::-1]
