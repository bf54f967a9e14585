"""Blocks, the code between them and their values -> the stages of a chain."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile

from torch import nn

from scheduler.capture.block_state import named_tensors
from scheduler.capture.module_capture import ModuleCapture
from scheduler.capture.repeat import draws_elsewhere
from scheduler.capture.state import CPU_RANDOM_STATE
from scheduler.capture.target import Device
from scheduler.chain import Chain, Option, Stage
from scheduler.costs.gradients import gradients_at_hand, parameter_grads
from scheduler.costs.graph_chain import SMALL_TENSORS
from scheduler.costs.module_blocks import BlockCost
from scheduler.costs.module_values import ModuleValues
from scheduler.costs.peak import allocated
from scheduler.costs.resident import copied_buffers, rerun_state, storage_bytes
from scheduler.costs.skeleton import Piece

__all__ = ["Parts", "assemble"]


@dataclass
class Parts:
    """What a chain is made of.

    Attributes:
        forward, backward: (blocks + 1,) the user's code before each block and after the last.
        seconds: of these.
        shared: (blocks,) bytes of the gradients of its outputs that others, which wait, are views of too.
        output_grad: bytes of the gradients of the model's outputs, if it has no loss of its own.
        whole: sharded parameters whose gradients wait whole, and the stage at whose end they are reduced.
        waiting: blocks that are not reversed whole: the user holds what was made of an output that the loss does not reach.
        sparse: bytes of gradients that are sparse.
    """

    capture: ModuleCapture
    blocks: list[BlockCost]
    values: ModuleValues
    forward: list[Piece]
    backward: list[Piece]
    seconds: tuple[list[float], list[float]]
    output_grad: int
    shared: list[int]
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
        """At most what stays when block k is reversed: its saved tensors, or the boundary that it would run again from."""
        index = self.capture.stages[k]
        left = 0 if index is None else self.blocks[index].cost.left
        if (
            index not in self.waiting
        ):  # a state holds on to the graph, and that to the boundary that a re-run began at
            return left + self.values.total(self.values.enters[k]) if left else 0
        boundaries = (self.values.total(entering) for entering in self.values.enters[: k + 1])
        return max(self.values.total(self.values.keeps[k]), *boundaries)

    def taken(self, piece: Piece) -> int:
        """The most bytes that a piece takes above those live when it starts."""
        return piece.peak - piece.start

    def own_code(self, k: int) -> tuple[int, int]:
        """Bytes that the user's code takes between block k and the next, forward and backward, where it is no stage."""
        if self.capture.stages[k] is None or self.capture.stages[k + 1] is None:
            return 0, 0
        piece = self.pieces[k + 1]
        return self.taken(self.forward[piece]), self.taken(self.backward[piece])

    def gradients(self) -> list[int]:
        """(L,) bytes of gradients that are live when stages k..L-1 are reversed, those of blocks' parameters left out."""
        left, saved = [], _sums_from(self.values.glue_saved)
        for k, index in enumerate(self.capture.stages):
            piece = self.backward[self.pieces[k]]
            ended = piece.end if index is None or self.capture.stages[k - 1] is not None else piece.start
            left.append(ended - self.backward[-1].start + saved[k])
        return left


def assemble(
    parts: Parts,
    model: nn.Module,
    readers: dict[nn.Parameter, list[int]],
    existing: Collection[nn.Parameter],
    own_loss: bool,
    resident: int,
    name: str,
) -> Chain:
    """The chain of these parts.

    Args:
        readers: the stages that read each parameter, ascending.
        existing: parameters that have a gradient before the step.
        own_loss: whether the loss is among the model's outputs.
        resident: bytes live during the whole step.
    """
    capture, values = parts.capture, parts.values
    count = len(parts)
    device = capture.place
    change = [0] * count
    alone = {p: ks for p, ks in readers.items() if all(capture.stages[k] is None for k in ks)}
    shared = {p: ks for p, ks in readers.items() if p not in alone}
    created, _ = parameter_grads(shared, existing, change, device, parts.whole, parts.sparse)
    summed = _second_shares(shared, count, device)
    by_glue = parameter_grads(alone, existing, [0] * count, device, parts.whole, parts.sparse)[0]
    reduced = [0] * count  # copies of gradients of blocks' parameters
    for parameter, end in parts.whole.items():
        if parameter in shared and parameter.requires_grad:
            reduced[end] += allocated(parameter.numel() * parameter.element_size(), device)
    output_grad = 4 if own_loss else parts.output_grad
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
    elsewhere = draws_elsewhere(model, device)
    drawn = CPU_RANDOM_STATE if device.type == "cpu" else 0  # by which a block's end knows whether it drew
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
            dropping = max(cost.dropping_peak, fresh + drawn, fresh + ahead if ahead else 0)
            ended = parts.blocks[index].input_grad + created[k]
            # The gradients of its outputs go as it is reversed, unless others wait in the same storages.
            going = cost.output_grads - min(cost.output_grads, max(0, parts.shared[index]))
            reversing = max(cost.backward_peak, ended + behind if behind else 0) - made - going
            seconds = cost.forward, cost.backward
            block = capture.blocks[index].label
            assert cost.rebuild_peak is not None
            again = cost.rebuild_peak - made + released
            overhead = dropping - following
        else:
            piece = parts.pieces[k]
            last = k == count - 1
            keeping = parts.taken(parts.forward[piece]) - (values.total(making[k]) if last else 0)
            kept = values.total(keeps - enters[k] - (making[k] if last else set()))
            reversing = parts.taken(parts.backward[piece]) - (output_grad if last else 0) + kept - made
            seconds = parts.seconds[0][piece], parts.seconds[1][piece]
            block = f"glue {k - parts.pieces[k]}" if k and not last else ("after" if k else "before")
            overhead = 0
        stays = parts.lasting(k)
        reversing += reduced[k] + stays  # by itself, the block lets go of it as it is reversed
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
                grad=created[k] + by_glue[k] + stays,
                carried=values.total(making[k]),
                carried_change=change[k],
                recomputable=index is not None and index >= frozen and not (elsewhere and capture.random[k]),
                enters=values.enters[k],
                rerun_state=rerun_state(capture, model, k)
                + (0 if index is None else parts.blocks[index].cost.held),
            )
        )
    fixed = resident + SMALL_TENSORS + capture.gathering + sum(stage.rerun_state for stage in stages)
    # Copies of the buffers that a block changes, while it runs again.
    fixed += max(storage_bytes(named_tensors(model, names), device) for names in capture.changed)
    fixed += capture.state_bytes + copied_buffers(capture, model)
    fixed += drawn * any(capture.random)  # what a replay puts back when it is done
    return Chain(tuple(stages), 0, output_grad, fixed, name, tuple(values.sizes), tuple(values.carried))


def _second_shares(readers: dict[nn.Parameter, list[int]], count: int, device: Device) -> list[int]:
    """(L,) the most bytes that a backward takes to add a second share of a parameter's gradient to the first.

    That makes a tensor of its own, one parameter at a time; later shares are added in place.
    """
    result = [0] * count
    for parameter, stages in readers.items():
        if parameter.requires_grad and len(stages) > 1:
            size = allocated(parameter.numel() * parameter.element_size(), device)
            result[stages[-2]] = max(result[stages[-2]], size)
    return result


def _sums_from(sizes: list[int]) -> list[int]:
    """The sum of each and all after it."""
    return [*accumulate(reversed(sizes))][::-1]
