"""The protocol of captures: ``Capture``, a model cut into stages; ``Producer``, which makes and prices it.

``rematplan.scheduler.plan.kinds.KINDS`` names the kinds, and ``rematplan.executors.recapture.ENGINES`` what
runs each. A further kind is a row in both, a ``Capture`` and a ``Producer`` here, and an ``Executor`` and
``Stages`` of ``executors/engine.py``; nothing else asks which kind a capture is of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.target import Device, Target

if TYPE_CHECKING:
    from rematplan.scheduler.capture.blocks.calls import Recurrence
    from rematplan.scheduler.capture.trial_step import TrialStep
    from rematplan.scheduler.core.chain import Chain
    from rematplan.scheduler.plan.plan import CaptureRecord

__all__ = ["Asked", "Capture", "Producer", "StageEffects"]

Asked: TypeAlias = str | tuple[nn.Module, ...]  # "auto", a kind of capture, or the blocks


@dataclass(frozen=True, slots=True)
class StageEffects:
    """What a stage does besides returning values.

    Attributes:
        random: whether it draws random numbers.
        changed: names of the tensors, containers and other state that it changes in place.
        once: why it may not be run again, in words; "" if it may.
    """

    random: bool = False
    changed: tuple[str, ...] = ()
    once: str = ""


class Capture(ABC):
    """A model captured as a chain of L stages.

    Attributes:
        kind: its key in ``rematplan.scheduler.plan.kinds.KINDS``.
        device: the device that holds the model.
        target: the device that costs are for, if the model is without data; else None.
        effects: (L,) what each stage does besides returning values.
    """

    __slots__ = ()

    kind: ClassVar[str]
    device: torch.device
    target: Target | None
    effects: list[StageEffects]

    @abstractmethod
    def __len__(self) -> int:
        """Count the stages."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return the fields of a plan's ``CaptureRecord`` by which this kind of capture is repeated."""

    @abstractmethod
    def without_data(self, device: torch.device, fake: Callable[[Any], Any]) -> Capture:
        """Return the capture for fake tensors in the place of those on ``device``; ``fake`` makes them."""

    @property
    def place(self) -> Device:
        """The device that costs are for: the one described, or the one that holds the model."""
        return self.device if self.target is None else self.target

    @property
    def unread(self) -> Iterable[int] | None:
        """Leaves of the call, other than tensors, that no stage reads; None if the plan's record has them."""
        return None

    def holds(self, repeated: tuple[tuple[int, int], ...]) -> bool:  # noqa: ARG002 # the protocol's signature
        """Whether what was taken for constant is still so.

        Args:
            repeated: (leaf, earlier leaf) of the call's tensors that are one.
        """
        return True

    def changes(self) -> str:
        """Return, in words, what was taken for constant and has changed."""
        return ""

    def constant_tensors(self) -> Iterable[Tensor]:
        """Return the tensors that the capture itself holds on the device."""
        return ()

    def live_besides(self) -> dict[str, int]:
        """Return bytes, by what they are, live during the whole step because of the kind of capture."""
        return {}


class Producer(ABC):
    """Make captures of one kind, and price them.

    Attributes:
        compares: whether a capture is tried against a plain step, which is then taken before.
    """

    compares: ClassVar[bool] = False

    def unsuited(self, seen: Recurrence) -> str:  # noqa: ARG002 # the protocol's signature
        """Return why ``capture="auto"`` does not try it, by the calls of a first forward; "" if it does."""
        return ""

    @abstractmethod
    def capture(self, step: TrialStep, asked: Asked, refused: str) -> tuple[Capture, str]:
        """Return the captured model, and why it was captured so, in words.

        Args:
            step: a plain step of the model; the model is left as it is.
            asked: what ``solve`` was asked for.
            refused: why the kinds tried before did not capture it; "" if none was.

        Raises:
            CaptureError: it cannot be captured so; says why.
        """

    @abstractmethod
    def price(self, captured: Any, step: TrialStep, *, resident: int, clock: bool, options: bool) -> Chain:
        """Return the chain of a capture of this kind; the model is left as it is.

        Args:
            resident: bytes live during the whole step.
            clock: False to estimate the seconds by the roofline.
            options: whether to look for options of stages that keep less than all.

        Raises:
            CaptureError: its stages cannot be run in isolation.
        """

    def asked_again(self, record: CaptureRecord, model: nn.Module, asked: str) -> Asked:  # noqa: ARG002
        """Return what is asked for to capture another call of the model as ``record`` was.

        Args:
            asked: "auto", or the kind that is to take over.
        """
        return record.kind

    def activations(self, captured: Any, chain: Chain, named: Callable[[str], str]) -> dict[str, int]:  # noqa: ARG002
        """Return the bytes of what autograd saves and of the outputs, by the module that makes them.

        Args:
            named: path of a module -> the name under which it is counted.
        """
        found = Counter[str]()
        for stage in chain.stages:
            found[named(stage.name)] += stage.options[0].saved + stage.carried
        return dict(found)
