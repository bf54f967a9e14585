"""Assemble a ``Chain``: the bytes counted of stages become those of Stages and Options.

The pricing of a capture fills one ``StageFacts`` a stage, and the ``Values`` that cross stages, stay for a
backward, or live long; ``assemble`` does the sums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

from torch import nn

from rematplan.scheduler.capture.protocol import Capture
from rematplan.scheduler.core.chain import Carried, Chain, Option, Stage
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.resident import copied_buffers
from rematplan.scheduler.costs.stage_run import OptionCost
from rematplan.scheduler.torch_layer.fsdp import local
from rematplan.scheduler.torch_layer.preserve import CPU_RANDOM_STATE
from rematplan.scheduler.torch_layer.target import Device

__all__ = ["SMALL_TENSORS", "StageFacts", "Values", "assemble", "parameter_grads"]

SMALL_TENSORS = 4096  # bytes: zero-dimensional tensors of scalars, which belong to no value


class Values:
    """The values of a chain, by number.

    Attributes:
        sizes: bytes of each.
        carried: the long-lived ones.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.carried: list[Carried] = []

    def new(self, size: int) -> int:
        """Add a value of ``size`` bytes; return its number."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def total(self, values: Iterable[int]) -> int:
        """Return the bytes of different values."""
        return sum(self.sizes[value] for value in set(values))


@dataclass(slots=True)
class StageFacts:
    """Counts of one stage, in bytes; seconds of its forward and its backward.

    Attributes:
        enters: the values of the boundary into it.
        options: the values that stay for the backward, and their cost: peaks are above the stage's input,
            that of the backward with the gradients that arrive. The first option keeps all.
        handed_out: long-lived values of the last stage, which runs once, that its peaks include.
        dropping_peak: the most above its input while it runs and keeps nothing; None if it never does.
        boundary_grad: the gradient of its boundary.
        lead: made by its backward until it first asks for a saved tensor; None if it asks for none.
        arriving: gradients of its results that its backward's peak includes and that are counted elsewhere.
        created: gradients of parameters that its backward creates.
        appearing: all gradients that appear with its backward, except that of its boundary.
        change: by how much its backward changes the gradients of long-lived values and of inputs.
        after: taken by the user's code after it, before the next stage begins.
        beside: taken by its backward in a step beyond its peak in isolation.
        stays: live when it has been reversed, besides gradients.
        recomputable: whether it may run more than once.
        rerun_state: noted before its first run, for the next.
    """

    name: str = ""
    forward: float = 0.0
    backward: float = 0.0
    enters: tuple[int, ...] = ()
    options: list[tuple[tuple[int, ...], OptionCost]] = field(default_factory=list)
    handed_out: int = 0
    dropping_peak: int | None = None
    boundary_grad: int = 0
    lead: int | None = 0
    arriving: int = 0
    created: int = 0
    appearing: int = 0
    change: int = 0
    after: int = 0
    beside: int = 0
    stays: int = 0
    recomputable: bool = True
    rerun_state: int = 0


def assemble(
    facts: Sequence[StageFacts],
    values: Values,
    capture: Capture,
    model: nn.Module,
    *,
    resident: int,
    held: int,
    output_grad: int,
) -> Chain:
    """Return the chain of stages with these facts.

    Args:
        facts: (L,).
        resident: bytes live during the whole step.
        held: bytes that the capture itself holds meanwhile.
        output_grad: bytes of the gradient of the model's output.
    """
    count = len(facts)
    enters = [*(set(each.enters) for each in facts), set()]
    whole = [{*each.options[0][0]} for each in facts]
    lasting = {each.value for each in values.carried}
    making: list[set[int]] = [set() for _ in facts]
    change = [each.change for each in facts]
    for value in values.carried:
        making[value.made].add(value.value)
        if value.freed is not None:
            change[value.freed] -= values.sizes[value.value]
    between = _gradients_between(facts)
    stages = []
    for k, each in enumerate(facts):
        # Values of stage k - 1 that nobody saves or reads later: released once stage k has been kept whole.
        released = 0
        if k:
            needed = enters[k + 1] | enters[k - 1] | whole[k] | whole[k - 1] | lasting
            released = values.total(enters[k] - needed)
        # A replay meets the gradients between; those that the stage makes until then are part of its own
        # backward too.
        led = between[k + 1] - facts[k + 1].boundary_grad if k < count - 1 else 0
        gradients = between[k] + led + each.arriving
        options = []
        for keeps, cost in each.options:
            saved = values.total(({*keeps} | enters[k + 1]) - enters[k] - making[k])
            # Values that the last stage hands out and saves are long-lived; other stages may run again.
            shared = values.total(making[k].intersection(keeps)) if k == count - 1 else 0
            gone = 0 if cost.dropped else released
            options.append(
                Option(
                    saved - gone,
                    cost.recompute,
                    max(each.after, cost.keeping_peak - each.handed_out - saved) + gone,
                    cost.backward_peak - saved - shared - gradients + each.beside,
                    cost.name,
                    keeps,
                    None if cost.rebuild_peak is None else cost.rebuild_peak - saved + gone,
                )
            )
        overhead = 0
        if each.dropping_peak is not None:
            most = max(
                each.dropping_peak - each.handed_out, values.total(enters[k + 1] - enters[k]) + each.after
            )
            overhead = most - values.total(enters[k + 1])
        stages.append(
            Stage(
                name=each.name,
                forward=each.forward,
                backward=each.backward,
                input=values.total(enters[k]),
                options=tuple(options),
                forward_overhead=overhead,
                input_grad=between[k],
                grad=each.created + each.stays,
                carried=values.total(making[k]),
                carried_change=change[k],
                recomputable=each.recomputable,
                enters=each.enters,
                rerun_state=each.rerun_state,
            )
        )
    fixed = resident + SMALL_TENSORS + held + copied_buffers(capture, model)
    fixed += sum(stage.rerun_state for stage in stages)
    if capture.place.type == "cpu":
        fixed += CPU_RANDOM_STATE * any(
            each.random for each in capture.effects
        )  # which a replay restores at its end
    name, sizes, carried = type(model).__name__, tuple(values.sizes), tuple(values.carried)
    return Chain(tuple(stages), 0, output_grad, fixed, name, sizes, carried)


def _gradients_between(facts: Sequence[StageFacts]) -> list[int]:
    """Return (L,) bytes of gradients live while a replay runs between the backwards of stages k and k - 1.

    They are those of boundary k and those that stage k - 1, about to be reversed, has made when it asks for
    its first saved tensor. A stage that asks for none is reversed already when the replay for it runs:
    autograd comes to an earlier stage before anything is asked for.
    """
    result = [facts[0].boundary_grad]
    for before, each in pairwise(facts):
        reversed_ = max(each.boundary_grad, result[-1] + before.appearing)
        result.append(reversed_ if before.lead is None else each.boundary_grad + before.lead)
    return result


def parameter_grads(
    readers: Mapping[nn.Parameter, list[int]],
    existing: Collection[nn.Parameter],
    change: list[int],
    device: Device,
    whole: Collection[nn.Parameter] = (),
    sparse: Mapping[nn.Parameter, int] = MappingProxyType({}),
) -> tuple[list[int], list[int]]:
    """Return bytes of the gradients of parameters.

    A parameter that several stages read gets its gradient from the last of them, which is reversed first.
    Autograd sums the shares in a tensor of their own before it touches ``.grad``. Where a gradient exists
    already, that tensor waits beside it from the latest reader to the earliest: ``change`` is amended.

    Args:
        readers: the stages that read each parameter, ascending.
        existing: parameters that have a gradient before the step.
        change: (L,) by how much each backward changes the bytes of long-lived values.
        whole: sharded parameters whose gradients stay whole, beside those that exist.
        sparse: bytes of gradients that are sparse.

    Returns:
        (L,) bytes of gradients that the backward of each stage creates; (L,) bytes that it takes besides to
        add its share to the gradient of a parameter that a later stage reads too.
    """
    created, summed = [0] * len(change), [0] * len(change)
    for parameter, stages in readers.items():
        if not parameter.requires_grad:
            continue
        shard = parameter if parameter in whole else local(parameter)
        size = allocated(shard.numel() * shard.element_size(), device)
        if parameter in sparse:  # a share that is dense makes the sum dense
            size = sparse[parameter] if len(stages) == 1 else max(size, sparse[parameter])
        for k in stages[:-1]:
            summed[k] += size
        if parameter not in existing or parameter in sparse or parameter in whole:
            created[stages[-1]] += size
        elif len(stages) > 1:
            change[stages[-1]] += size
            change[stages[0]] -= size
    return created, summed
