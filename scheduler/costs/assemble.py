"""Facts of stages -> ``Chain``: where counted bytes become those of a Stage and its Options.

A capture's pricing fills one ``StageFacts`` a stage and the ``Values`` that cross stages, stay for a
backward, or live long; ``assemble`` does the sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from rematplan.scheduler.capture.protocol import Capture
from rematplan.scheduler.core.chain import Carried, Chain, Option, Stage
from rematplan.scheduler.costs.gradients import gradients_at_hand
from rematplan.scheduler.costs.resident import copied_buffers
from rematplan.scheduler.costs.stage_run import OptionCost
from rematplan.scheduler.torch_layer.preserve import CPU_RANDOM_STATE

__all__ = ["SMALL_TENSORS", "StageFacts", "Values", "assemble"]

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
        """Return the number of another value, of ``size`` bytes."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def total(self, values: Iterable[int]) -> int:
        """Return the bytes of different values."""
        return sum(self.sizes[value] for value in set(values))


@dataclass(slots=True)
class StageFacts:
    """What was counted of one stage, in bytes; seconds of its forward and its backward.

    Attributes:
        enters: the values of the boundary into it.
        options: the values that stay for the backward, and what that costs: peaks are above the stage's
            input, that of the backward with the gradients that arrive. The first option keeps all.
        handed_out: of its peaks, long-lived values that it leaves behind: of the last stage, which runs once.
        dropping_peak: the most above its input while it runs and keeps nothing; None if it never does.
        boundary_grad: the gradient of its boundary.
        lead: what its backward has made when it first asks for a saved tensor; None if it asks for none.
        arriving: gradients of its results, as far as its backward's peak has them and they are counted
            elsewhere.
        created: gradients of parameters that its backward creates.
        appearing: all gradients that appear with its backward but for that of its boundary.
        change: by how much its backward changes the gradients of long-lived values and of inputs.
        after: what the user's code takes when it is done, before the next stage begins.
        beside: what its backward takes in a step beyond its peak in isolation.
        stays: what stays when it has been reversed, besides gradients.
        recomputable: whether it may run more than once.
        rerun_state: what is noted before its first run, for the next.
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
    name: str,
) -> Chain:
    """Return the chain of stages with these facts.

    Args:
        facts: (L,).
        resident: bytes live during the whole step.
        held: bytes that the capture itself holds meanwhile.
        output_grad: bytes of the gradient of what the model returns.
        name: of the model.
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
    at_hand = gradients_at_hand(
        [each.boundary_grad for each in facts],
        [each.lead for each in facts],
        [each.appearing for each in facts],
    )
    stages = []
    for k, each in enumerate(facts):
        # What stage k - 1 made and nobody saves, where it goes no further: released once stage k has been
        # kept whole.
        released = 0
        if k:
            needed = enters[k + 1] | enters[k - 1] | whole[k] | whole[k - 1] | lasting
            released = values.total(enters[k] - needed)
        # The gradient at hand is what a replay meets; what the stage makes until then is part of its own
        # backward too.
        led = at_hand[k + 1] - facts[k + 1].boundary_grad if k < count - 1 else 0
        gradients = at_hand[k] + led + each.arriving
        options = []
        for keeps, cost in each.options:
            saved = values.total(({*keeps} | enters[k + 1]) - enters[k] - making[k])
            # What the last stage hands out and saves is among the long-lived values; other stages may run
            # again.
            shared = values.total(making[k].intersection(keeps)) if k == count - 1 else 0
            let_go = 0 if cost.dropped else released
            options.append(
                Option(
                    saved - let_go,
                    cost.recompute,
                    max(each.after, cost.keeping_peak - each.handed_out - saved) + let_go,
                    cost.backward_peak - saved - shared - gradients + each.beside,
                    cost.name,
                    keeps,
                    None if cost.rebuild_peak is None else cost.rebuild_peak - saved + let_go,
                )
            )
        overhead = 0
        if each.dropping_peak is not None:
            made = values.total(enters[k + 1] - enters[k])
            overhead = max(each.dropping_peak - each.handed_out, made + each.after) - values.total(
                enters[k + 1]
            )
        stages.append(
            Stage(
                name=each.name,
                forward=each.forward,
                backward=each.backward,
                input=values.total(enters[k]),
                options=tuple(options),
                forward_overhead=overhead,
                input_grad=at_hand[k],
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
        fixed += CPU_RANDOM_STATE * any(capture.random)  # what a replay puts back when it is done
    return Chain(tuple(stages), 0, output_grad, fixed, name, tuple(values.sizes), tuple(values.carried))
