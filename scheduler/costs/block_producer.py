"""Make and price captures of blocks: whole modules that run one after the other."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn

from rematplan.scheduler.capture.blocks.block_capture import ModuleCapture, capture_modules
from rematplan.scheduler.capture.protocol import Asked, Producer
from rematplan.scheduler.capture.trial_step import UNTRIED, TrialStep
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.costs.module_chain import module_chain
from rematplan.scheduler.plan.plan import CaptureRecord
from rematplan.scheduler.torch_layer.preserve import preserved
from rematplan.scheduler.torch_layer.unwind import met

__all__ = ["BlockProducer"]


class BlockProducer(Producer):
    """Makes and prices captures of the model's own modules."""

    def capture(self, step: TrialStep, asked: Asked, refused: str) -> tuple[ModuleCapture, str]:
        """See ``Producer.capture``."""
        step.progress("capturing the blocks")
        given = None if isinstance(asked, str) else asked
        try:
            with (
                preserved(step.model) if step.target is None else nullcontext(),
                met("a trial forward raises"),
            ):
                captured = capture_modules(step.model, step.call, given, step.target, step.seen)
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
        captured: ModuleCapture,
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
            return module_chain(
                captured, model, call, existing=existing, resident=resident, clock=clock, sparse=sparse
            )

    def asked_again(self, record: CaptureRecord, model: nn.Module, asked: str) -> Asked:  # noqa: ARG002
        """See ``Producer.asked_again``: the blocks of the plan."""
        return tuple(map(model.get_submodule, dict.fromkeys(record.stages)))
